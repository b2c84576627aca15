package check

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

func TestTheRealBankKeepsEveryPromise(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.work()
	history, ledger := History(b.ops, b.expected), b.ledger()
	wantWrong(t, history)
	wantWrong(t, ledger)
	// k1, k2, globex's k1, an order and an account took effect; one was declined and one given up.
	seen := map[string]int{EffectsCounted: 5, OneEffect: 5, TwoEntries: 4, EffectsRecorded: 5, RecordsHaveEffects: 5, InTheBooks: 5, GivenUpForGood: 1, MoneyKept: 1004, BalancesAddUp: 1004}
	for _, r := range ledger {
		if r.Seen != seen[r.Name] {
			t.Errorf("%s saw %d, want %d", r.Name, r.Seen, seen[r.Name])
		}
		delete(seen, r.Name)
	}
	if len(seen) > 0 {
		t.Errorf("missing are %v", seen)
	}
	if money, err := Money(t.Context(), b.conn); err != nil || !money.OK() || money.Seen != 1004 {
		t.Errorf("money is %+v, %v", money, err)
	}

	live, err := Live(t.Context(), b.conn, Acknowledged(b.ops), Bounds{Live: 6})
	if err != nil {
		t.Fatal(err)
	}
	b.await(func() bool { return b.quiet()[0].OK() }) // the session that migrated is gone
	quiet := b.quiet()[0]
	same := Resources{Goroutines: 10, FileDescriptors: 10, Connections: 3}
	if v := Judge(slices.Concat(history, ledger, []Result{live, quiet, Baseline(same, same)})...); !v.OK {
		t.Errorf("the verdict is %+v", v)
	}
}

// Each corruption of the books is found by the checks that it names, and by no other.
func TestCorruptedBooksAreCaught(t *testing.T) {
	t.Parallel()
	const transfer = "(SELECT min(id) FROM demo_bank.transfers WHERE scope = 'acme' AND key = 'k1')"
	for name, c := range map[string]struct {
		sql   []string
		wrong []string
	}{
		"money from nowhere": {
			[]string{"UPDATE demo_bank.accounts SET balance = balance + 1 WHERE id = 'bob'"}, []string{MoneyKept, BalancesAddUp},
		},
		"a negative balance": {
			[]string{"UPDATE demo_bank.accounts SET balance = -1, opening_balance = -1 WHERE id = 'bob'"}, []string{MoneyKept},
		},
		"a balance at another's cost": {
			[]string{
				"UPDATE demo_bank.accounts SET balance = balance + 1 WHERE id = 'bob'",
				"UPDATE demo_bank.accounts SET balance = balance - 1 WHERE id = 'alice'",
			}, []string{BalancesAddUp},
		},
		"a transfer of the same key and attempt twice": {
			[]string{
				"INSERT INTO demo_bank.transfers SELECT 9001, amount, created_at, from_account, to_account, currency, reference, scope, key, attempt_id FROM demo_bank.transfers WHERE id = " + transfer,
				"INSERT INTO demo_bank.entries (transfer_id, account, amount) VALUES (9001, 'acct-0001', -100), (9001, 'acct-0002', 100)",
				"UPDATE demo_bank.accounts SET balance = balance - 100 WHERE id = 'acct-0001'",
				"UPDATE demo_bank.accounts SET balance = balance + 100 WHERE id = 'acct-0002'",
			}, []string{OneEffect},
		},
		"the second transfer of a key by another attempt": {
			[]string{
				"INSERT INTO demo_bank.transfers SELECT 9001, amount, created_at, from_account, to_account, currency, reference, scope, key, gen_random_uuid() FROM demo_bank.transfers WHERE id = " + transfer,
				"INSERT INTO demo_bank.entries (transfer_id, account, amount) VALUES (9001, 'acct-0001', -100), (9001, 'acct-0002', 100)",
				"UPDATE demo_bank.accounts SET balance = balance - 100 WHERE id = 'acct-0001'",
				"UPDATE demo_bank.accounts SET balance = balance + 100 WHERE id = 'acct-0002'",
			}, []string{OneEffect, EffectsRecorded},
		},
		"an order under a transfer's key": {
			[]string{"UPDATE demo_bank.orders SET (scope, key, attempt_id) = (SELECT scope, key, attempt_id FROM demo_bank.transfers WHERE id = " + transfer + ")"},
			[]string{EffectsCounted, OneEffect, RecordsHaveEffects, InTheBooks},
		},
		"an acknowledged transfer is lost with its money": {
			[]string{
				"UPDATE demo_bank.accounts SET balance = balance + 100 WHERE id = 'acct-0001'",
				"UPDATE demo_bank.accounts SET balance = balance - 100 WHERE id = 'acct-0002'",
				"DELETE FROM demo_bank.entries WHERE transfer_id = " + transfer,
				"DELETE FROM demo_bank.transfers WHERE id = " + transfer,
			}, []string{EffectsCounted, RecordsHaveEffects, InTheBooks},
		},
		"it is lost with its money and its record": {
			[]string{
				"UPDATE demo_bank.accounts SET balance = balance + 100 WHERE id = 'acct-0001'",
				"UPDATE demo_bank.accounts SET balance = balance - 100 WHERE id = 'acct-0002'",
				"DELETE FROM demo_bank.entries WHERE transfer_id = " + transfer,
				"DELETE FROM demo_bank.transfers WHERE id = " + transfer,
				"DELETE FROM demo_bank.idempotency_keys WHERE scope = 'acme' AND key = 'k1'",
			}, []string{EffectsCounted, InTheBooks},
		},
		"a transfer without entries": {
			[]string{"DELETE FROM demo_bank.entries WHERE transfer_id = " + transfer}, []string{TwoEntries, BalancesAddUp},
		},
		"half a transfer": {
			[]string{"DELETE FROM demo_bank.entries WHERE transfer_id = " + transfer + " AND amount < 0"}, []string{TwoEntries, BalancesAddUp},
		},
		"entries of another amount": {
			[]string{
				"UPDATE demo_bank.entries SET amount = amount * 2 WHERE transfer_id = " + transfer,
				"UPDATE demo_bank.accounts SET balance = balance - 100 WHERE id = 'acct-0001'",
				"UPDATE demo_bank.accounts SET balance = balance + 100 WHERE id = 'acct-0002'",
			}, []string{TwoEntries},
		},
		"a third and a fourth entry": {
			[]string{"INSERT INTO demo_bank.entries (transfer_id, account, amount) VALUES (" + transfer + ", 'bob', 1), (" + transfer + ", 'bob', -1)"},
			[]string{TwoEntries},
		},
		"entries of the wrong account": {
			[]string{
				"UPDATE demo_bank.entries SET account = 'bob' WHERE transfer_id = " + transfer + " AND amount > 0",
				"UPDATE demo_bank.accounts SET balance = balance - 100 WHERE id = 'acct-0002'",
				"UPDATE demo_bank.accounts SET balance = balance + 100 WHERE id = 'bob'",
			}, []string{TwoEntries},
		},
		"an order without its credit": {
			[]string{"DELETE FROM demo_bank.entries WHERE order_id IS NOT NULL AND amount > 0"}, []string{TwoEntries, BalancesAddUp},
		},
		"a record in another transaction": {
			[]string{"UPDATE demo_bank.idempotency_keys SET attempt_id = gen_random_uuid() WHERE scope = 'acme' AND key = 'k1'"}, []string{EffectsRecorded, RecordsHaveEffects},
		},
		"a transfer without its record": {
			[]string{"DELETE FROM demo_bank.idempotency_keys WHERE scope = 'globex'"}, []string{EffectsRecorded},
		},
		"a declined request kept its record as a 2xx": {
			[]string{"UPDATE demo_bank.idempotency_keys SET status = 201 WHERE key = 'declined'"}, []string{RecordsHaveEffects},
		},
		"a refusal that kept its writes": {
			[]string{"UPDATE demo_bank.idempotency_keys SET status = 402 WHERE key = 'k2'"}, []string{EffectsRecorded},
		},
		"records older than the TTL are nobody's": {
			[]string{
				"DELETE FROM demo_bank.idempotency_keys WHERE scope = 'globex'",
				"UPDATE demo_bank.transfers SET created_at = now() - interval '61 minutes' WHERE scope = 'globex'",
			}, nil,
		},
		"another transfer's id": {
			[]string{
				"INSERT INTO demo_bank.transfers SELECT 9001, amount, created_at, from_account, to_account, currency, reference, scope, key, attempt_id FROM demo_bank.transfers WHERE id = " + transfer,
				"UPDATE demo_bank.entries SET transfer_id = 9001 WHERE transfer_id = " + transfer,
				"DELETE FROM demo_bank.transfers WHERE id <> 9001 AND scope = 'acme' AND key = 'k1'",
			}, []string{InTheBooks},
		},
		"another amount": {
			[]string{
				"UPDATE demo_bank.transfers SET amount = 101 WHERE id = " + transfer,
				"UPDATE demo_bank.entries SET amount = sign(amount) * 101 WHERE transfer_id = " + transfer,
				"UPDATE demo_bank.accounts SET balance = balance - 1 WHERE id = 'acct-0001'",
				"UPDATE demo_bank.accounts SET balance = balance + 1 WHERE id = 'acct-0002'",
			}, []string{InTheBooks},
		},
		"another account": {
			[]string{
				"UPDATE demo_bank.transfers SET to_account = 'bob' WHERE id = " + transfer,
				"UPDATE demo_bank.entries SET account = 'bob' WHERE transfer_id = " + transfer + " AND amount > 0",
				"UPDATE demo_bank.accounts SET balance = balance - 100 WHERE id = 'acct-0002'",
				"UPDATE demo_bank.accounts SET balance = balance + 100 WHERE id = 'bob'",
			}, []string{InTheBooks},
		},
		"a scope that was left out": {
			[]string{
				"UPDATE demo_bank.transfers SET scope = 'public' WHERE scope = 'globex'",
				"UPDATE demo_bank.idempotency_keys SET scope = 'public' WHERE scope = 'globex'",
			}, []string{EffectsCounted, InTheBooks},
		},
		"a transfer whose key nobody sent": {
			[]string{forged("acme", "unsent"), money},
			[]string{EffectsCounted},
		},
		"a transfer without a key": {
			[]string{"INSERT INTO demo_bank.transfers (id, amount, from_account, to_account, currency, reference) VALUES (9001, 5, 'acct-0001', 'acct-0002', 'EUR', '')", money},
			[]string{EffectsCounted},
		},
		"a declined request moved money": {
			[]string{
				"DELETE FROM demo_bank.idempotency_keys WHERE key = 'declined'",
				forged("acme", "declined"), money,
			}, []string{EffectsCounted},
		},
		"a key that was given up moved money": {
			[]string{forged("acme", "given up"), money}, []string{GivenUpForGood},
		},
		"a key that was given up was declined": {
			[]string{"UPDATE demo_bank.idempotency_keys SET key = 'given up' WHERE key = 'declined'"}, []string{GivenUpForGood},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			b.work()
			for _, sql := range c.sql {
				b.exec(sql)
			}
			wantWrong(t, b.ledger(), c.wrong...)
			money, err := Money(t.Context(), b.conn)
			if err != nil || money.OK() == slices.Contains(c.wrong, MoneyKept) {
				t.Errorf("money is %+v, %v", money, err)
			}
		})
	}
}

// forged inserts transfer 9001 of 5 under a key, with a record of its attempt.
func forged(scope, key string) string {
	const attempt = "'9e107d9d-372b-4b66-8bd3-5b1d3f4d0a11'"
	key = "'" + scope + "', '" + key + "'"
	return `
		WITH r AS (
			INSERT INTO demo_bank.idempotency_keys (created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)
			VALUES (now(), now() + interval '1 hour', 201, 1, ` + attempt + `, ` + key + `, '', '', '')
		)
		INSERT INTO demo_bank.transfers (id, amount, from_account, to_account, currency, reference, attempt_id, scope, key)
		VALUES (9001, 5, 'acct-0001', 'acct-0002', 'EUR', '', ` + attempt + `, ` + key + `)`
}

// money corrupts the amount of transfer 9001's entries.
const money = `WITH e AS (
		INSERT INTO demo_bank.entries (transfer_id, account, amount) VALUES (9001, 'acct-0001', -5), (9001, 'acct-0002', 5)
	) UPDATE demo_bank.accounts SET balance = balance + CASE id WHEN 'acct-0001' THEN -5 ELSE 5 END
	WHERE id IN ('acct-0001', 'acct-0002')`

// An effect without a request in the history is as wrong as the reverse: here the books are right,
// and the history contradicts them.
func TestAHistoryThatTheBooksDoNotKnowIsCaught(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		change func(*bundle)
		wrong  []string
	}{
		"another id was acknowledged": {func(b *bundle) { b.ops[0].ID = "12345" }, []string{InTheBooks}},
		"another amount was asked":    {func(b *bundle) { b.ops[0].Amount = 99 }, []string{InTheBooks}},
		"another account was asked":   {func(b *bundle) { b.ops[0].From = "acct-0009" }, []string{InTheBooks}},
		"a key was acknowledged that did nothing": {func(b *bundle) {
			b.ops = append(b.ops, op(1, 0, 1, "executed").with(of("public", "k9")))
		}, []string{EffectsCounted, InTheBooks}},
		"a key took effect and was never acknowledged": {func(b *bundle) {
			for i := range b.ops {
				if b.ops[i].Scope == "globex" {
					b.ops[i].Outcome, b.ops[i].Status = "unknown", 503
				}
			}
		}, []string{EffectsCounted}},
		"a key took effect and was given up": {func(b *bundle) {
			for i := range b.ops {
				if b.ops[i].Scope == "globex" {
					b.ops[i].Outcome, b.ops[i].Status = "not-executed", 503
				}
			}
			for i := range b.expected {
				b.expected[i].GivenUp = b.expected[i].GivenUp || b.expected[i].Scope == "globex"
			}
		}, []string{GivenUpForGood}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			b.work()
			c.change(b)
			wantWrong(t, b.ledger(), c.wrong...)
		})
	}
}

// Unreadable books give an error and no verdict.
func TestBooksThatCannotBeReadAreNoVerdict(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.work()
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if results, err := Ledger(ended, b.connect(), b.ops, b.expected, ttl); !errors.Is(err, context.Canceled) || results != nil {
		t.Errorf("with a context that has ended: %v, %v", results, err)
	}
	b.exec("DROP TABLE demo_bank.idempotency_keys CASCADE")
	if results, err := Ledger(t.Context(), b.conn, b.ops, b.expected, ttl); err == nil || results != nil {
		t.Errorf("without the table of records: %v, %v", results, err)
	}
	if _, err := Live(t.Context(), b.conn, nil, Bounds{}); err == nil {
		t.Error("Live needs no table of records")
	}
	b.exec("DROP SCHEMA demo_bank CASCADE")
	if _, err := Money(t.Context(), b.conn); err == nil {
		t.Error("Money needs no bank")
	}
}

// All statements see one snapshot: a transfer between two of them is in all or in none.
func TestLedgerReadsOneSnapshot(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.work()
	meddler := b.connect()
	err := snapshot(t.Context(), b.conn, func(tx pgx.Tx) error {
		before, err := inspected(t.Context(), tx, time.Hour, MoneyKept)
		if err != nil {
			return err
		}
		if _, err := meddler.Exec(t.Context(), "UPDATE demo_bank.accounts SET balance = balance + 1"); err != nil {
			return err
		}
		after, err := inspected(t.Context(), tx, time.Hour, MoneyKept)
		if err == nil && (!before[0].OK() || !after[0].OK()) {
			t.Errorf("one snapshot says %+v, then %+v", before, after)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if money, err := Money(t.Context(), b.conn); err != nil || money.OK() {
		t.Errorf("the next says %+v, %v", money, err)
	}
}
