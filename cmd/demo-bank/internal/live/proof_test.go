package live

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

const testRun = "01a20ef36616-2a"

// twins returns a database with twins that paid exactly three payments each.
func twins(t *testing.T) *pgxpool.Pool {
	t.Helper()
	pool := pgtest.Pool(t, pgtest.Database(t), map[string]string{"search_path": bank.Schema})
	store := postgres.New(pool, &postgres.Options{Schema: bank.Schema})
	if err := migrations.Up(t.Context(), store, nil); err != nil {
		t.Fatal(err)
	}
	if err := bank.Migrate(t.Context(), store); err != nil {
		t.Fatal(err)
	}
	seed(t, pool)
	return pool
}

// seed recreates the books: two people, and twins.
func seed(t *testing.T, pool *pgxpool.Pool) {
	t.Helper()
	execute(t, pool, `
		TRUNCATE accounts, transfers, orders, entries, idempotency_keys CASCADE;
		ALTER TABLE entries ALTER COLUMN id RESTART WITH 43;
		INSERT INTO accounts (id, currency, opening_balance, balance) VALUES ('alice', 'EUR', 70, 70), ('bob', 'EUR', 50, 50);
		INSERT INTO accounts (id, currency, opening_balance, balance)
		SELECT 'twin-01a20ef36616-2a-' || side, 'EUR', 20000, 12500 FROM unnest('{protected,unprotected}'::text[]) side
		UNION ALL SELECT 'twin-01a20ef36616-2a-' || side || '-payee', 'EUR', 0, 7500 FROM unnest('{protected,unprotected}'::text[]) side;
		INSERT INTO transfers (id, amount, from_account, to_account, currency, reference, scope, key, attempt_id)
		SELECT n, 2500, 'twin-01a20ef36616-2a-protected', 'twin-01a20ef36616-2a-protected-payee', 'EUR', 'payment ' || n, 'public', 'k' || n, md5(n::text)::uuid
		FROM generate_series(1, 3) n;
		INSERT INTO transfers (id, amount, from_account, to_account, currency, reference)
		SELECT 10 + n, 2500, 'twin-01a20ef36616-2a-unprotected', 'twin-01a20ef36616-2a-unprotected-payee', 'EUR', 'payment ' || n FROM generate_series(1, 3) n;
		INSERT INTO entries (transfer_id, account, amount) SELECT id, from_account, -amount FROM transfers UNION ALL SELECT id, to_account, amount FROM transfers;
		INSERT INTO idempotency_keys (created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)
		SELECT created_at, created_at + interval '1 day', 201, 1, attempt_id, scope, key, '\x00', '\x0100', '' FROM transfers WHERE key IS NOT NULL`)
}

func execute(t *testing.T, pool *pgxpool.Pool, sql string) {
	t.Helper()
	if _, err := pool.Exec(t.Context(), sql, pgx.QueryExecModeSimpleProtocol); err != nil {
		t.Fatal(err)
	}
}

// wrongs returns the failed checks of a side.
func wrongs(p *Proof, side Side) (names []string) {
	for _, twin := range p.Twins {
		for _, check := range twin.Checks {
			if twin.Side == side && !check.OK {
				names = append(names, check.Name)
			}
		}
	}
	return names
}

// TestTheProofFindsWhatIsPlanted: each possible error in the protected twin's books breaks the
// intended checks and no others.
func TestTheProofFindsWhatIsPlanted(t *testing.T) {
	t.Parallel()
	const again = `
		INSERT INTO transfers (id, amount, from_account, to_account, currency, reference, scope, key, attempt_id)
		SELECT 4, 2500, from_account, to_account, currency, reference, scope, KEY, md5('other')::uuid FROM transfers WHERE id = 3;
		INSERT INTO entries (transfer_id, account, amount) SELECT 4, account, amount FROM entries WHERE transfer_id = 3;
		UPDATE accounts SET balance = balance - 2500 WHERE id = 'twin-01a20ef36616-2a-protected';
		UPDATE accounts SET balance = balance + 2500 WHERE id = 'twin-01a20ef36616-2a-protected-payee'`
	pool := twins(t)
	for name, plant := range map[string]struct {
		sql   string
		wrong []string
	}{
		"nothing":                          {"SELECT", nil},
		"money made":                       {"UPDATE accounts SET balance = balance + 1 WHERE id LIKE 'twin-%-protected'", []string{CheckBalances, CheckLedger}},
		"money moved without the ledger":   {"UPDATE accounts SET balance = balance + CASE WHEN id LIKE '%payee' THEN 1 ELSE -1 END WHERE id LIKE 'twin-%-protected%'", []string{CheckLedger}},
		"an entry lost":                    {"DELETE FROM entries WHERE transfer_id = 2 AND amount < 0", []string{CheckLedger}},
		"paid twice with one key":          {strings.Replace(again, "KEY", "key", 1), []string{CheckTransfers, CheckAnswers}},
		"paid twice with two keys":         {strings.Replace(again, "KEY", "'other'", 1), []string{CheckTransfers, CheckAnswers}},
		"an answer lost":                   {"DELETE FROM idempotency_keys WHERE key = 'k2'", []string{CheckAnswers}},
		"the answer of another attempt":    {"UPDATE idempotency_keys SET attempt_id = md5('other')::uuid WHERE key = 'k2'", []string{CheckAnswers}},
		"an answer whose time is over":     {"DELETE FROM idempotency_keys; UPDATE transfers SET created_at = now() - interval '2 hours'", nil},
		"another account of a twin's name": {"INSERT INTO accounts (id, currency, opening_balance, balance) VALUES ('twin-z', 'EUR', 5, 5), ('twin-01a20ef36616-2a-protected-x', 'EUR', 5, 5)", nil},
	} {
		t.Run(name, func(t *testing.T) {
			seed(t, pool)
			execute(t, pool, plant.sql)
			p, err := prove(t.Context(), pool, testRun, time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			if got := wrongs(p, Protected); len(p.Twins) != 2 || !slices.Equal(got, plant.wrong) {
				t.Errorf("of %d twins wrong are %q, want %q", len(p.Twins), got, plant.wrong)
			}
			if got := wrongs(p, Unprotected); got != nil {
				t.Errorf("of the other twin wrong are %q", got)
			}
		})
	}
}

// TestTheProofOfTheNewestRun: without a run, the proof is that of the newest twins, as a restarted
// bank needs. Lost money is the sum of the transfers after the first of each payment, and the
// ledger's tail marks them.
func TestTheProofOfTheNewestRun(t *testing.T) {
	t.Parallel()
	pool := twins(t)
	execute(t, pool, `
		INSERT INTO accounts (id, currency, opening_balance, balance)
		VALUES ('twin-01a20ef36600-1-protected', 'EUR', 1, 1), ('twin-01a20ef36600-1-protected-payee', 'EUR', 0, 0);
		INSERT INTO transfers (id, amount, from_account, to_account, currency, reference)
		SELECT 20 + n, 2500, 'twin-01a20ef36616-2a-unprotected', 'twin-01a20ef36616-2a-unprotected-payee', 'EUR', 'payment 3' FROM generate_series(1, 2) n;
		INSERT INTO entries (transfer_id, account, amount)
		SELECT id, from_account, -amount FROM transfers WHERE id > 20 UNION ALL SELECT id, to_account, amount FROM transfers WHERE id > 20;
		UPDATE accounts SET balance = balance + CASE WHEN id LIKE '%payee' THEN 5000 ELSE -5000 END WHERE id LIKE 'twin-01a20ef36616-2a-unprotected%'`)
	p, err := prove(t.Context(), pool, "", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if p.Run != testRun || len(p.Twins) != 2 || wrongs(p, Protected) != nil {
		t.Fatalf("the proof is %+v", p)
	}
	if got := wrongs(p, Unprotected); !slices.Equal(got, []string{CheckTransfers, CheckAnswers}) {
		t.Errorf("wrong are %q", got)
	}
	twin := p.Twins[1]
	if twin.Payments != 3 || twin.Transfers != 5 || twin.Doubles != 2 || twin.LostMoney != 5000 || twin.Opening != 20000 {
		t.Errorf("the twin is %+v", twin)
	}
	if len(p.Ledger) != ledgerLines || !p.Ledger[0].Double || p.Ledger[11].Double || p.Alice != 70 {
		t.Errorf("the ledger ends with %+v", p.Ledger)
	}
	empty, err := prove(t.Context(), pool, "ffffffffffff-0", time.Hour)
	if err != nil || empty.Run != "" || len(empty.Twins) != 0 {
		t.Errorf("of a run that has no accounts yet the proof is %+v, %v", empty, err)
	}
}

// TestTheProofDoesNotReadTheWholeBooks: if others have filled the books, every table is read by an
// index.
func TestTheProofDoesNotReadTheWholeBooks(t *testing.T) {
	t.Parallel()
	pool := twins(t)
	execute(t, pool, `
		INSERT INTO accounts (id, currency, opening_balance, balance) SELECT 'user-' || n, 'EUR', 0, 0 FROM generate_series(1, 20000) n;
		INSERT INTO transfers (id, amount, from_account, to_account, currency, reference, scope, key, attempt_id)
		SELECT 100 + n, 1, 'user-' || n, 'user-' || n + 1, 'EUR', '', 'public', 'u' || n, md5('u' || n)::uuid FROM generate_series(1, 19999) n;
		INSERT INTO entries (id, transfer_id, account, amount) OVERRIDING SYSTEM VALUE
		SELECT -id, id, from_account, -1 FROM transfers WHERE id > 100 UNION ALL SELECT -id - 100000, id, to_account, 1 FROM transfers WHERE id > 100;
		INSERT INTO idempotency_keys (created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)
		SELECT created_at, created_at + interval '1 day', 201, 1, attempt_id, scope, key, '\x00', '\x0100', '' FROM transfers WHERE id > 100;
		ANALYZE`)
	payers := []string{payerOf(testRun, Protected), payerOf(testRun, Unprotected)}
	for sql, args := range map[string][]any{
		selectTwins:   {""},
		selectMoves:   {time.Hour / time.Microsecond, payers},
		selectEntries: {payers, int64(42)},
		selectLedger:  {payers, ledgerLines},
	} {
		plan := explain(t, pool, sql, args...)
		for _, table := range []string{"accounts", "transfers", "entries", "idempotency_keys"} {
			if strings.Contains(plan, "Seq Scan on "+table) {
				t.Errorf("%s is read from end to end:\n%s\n%s", table, sql, plan)
			}
		}
	}
	if p, err := prove(t.Context(), pool, testRun, time.Hour); err != nil || wrongs(p, Protected) != nil || len(p.Twins) != 2 {
		t.Errorf("the proof is %+v, %v", p, err)
	}
}

func explain(t *testing.T, pool *pgxpool.Pool, sql string, args ...any) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	rows, err := pool.Query(ctx, "EXPLAIN "+sql, args...)
	if err != nil {
		t.Fatal(err)
	}
	lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return strings.Join(lines, "\n")
}
