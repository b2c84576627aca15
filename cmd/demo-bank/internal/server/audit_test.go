package server

import (
	"context"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/internal/pgtest"
)

// TestAuditFindsWhatIsWrong plants each error in the database. If the audit misses one, every other
// verdict is worthless.
func TestAuditFindsWhatIsWrong(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for _, body := range []string{`{"from":"alice","to":"bob","amount":100}`, `{"from":"bob","to":"alice","amount":30}`} {
		if r := b.keyed("/v1/transfers", body); r.status != 201 {
			t.Fatalf("transfer: %d %s", r.status, r.body)
		}
	}
	if r := b.keyed("/v1/orders", `{"account":"alice","sku":"mug","quantity":1}`); r.status != 201 {
		t.Fatalf("order: %d %s", r.status, r.body)
	}
	if r := b.keyed("/v1/accounts", `{"id":"carol","currency":"EUR","opening_balance":5}`); r.status != 201 {
		t.Fatalf("account: %d %s", r.status, r.body)
	}
	if audit := b.audit(); !audit.OK {
		t.Fatalf("the audit finds wrongs where there are none: %+v", audit)
	}

	// The rows of a handler that ran twice under one key, with and without the money.
	const double = `INSERT INTO transfers (id, amount, created_at, from_account, to_account, currency, reference, scope, key, attempt_id)
		SELECT id + 1, amount, created_at, from_account, to_account, currency, reference, scope, key, attempt_id
		FROM transfers WHERE amount = 100`
	const paidTwice = `WITH twice AS (` + double + ` RETURNING id),
		entered AS (INSERT INTO entries (transfer_id, account, amount)
			SELECT id, 'alice', -100 FROM twice UNION ALL SELECT id, 'bob', 100 FROM twice)
		UPDATE accounts SET balance = balance + CASE id WHEN 'bob' THEN 100 ELSE -100 END WHERE id IN ('alice', 'bob')`
	for _, one := range []struct {
		name, plant string
		sees        func(a bank.Audit) bool
	}{
		{"money from nowhere", `UPDATE accounts SET balance = balance + 1 WHERE id = 'bob'`,
			func(a bank.Audit) bool { return a.BalanceTotal != a.OpeningTotal && a.BalanceMismatches == 1 }},
		{"money on the wrong accounts", `UPDATE accounts SET balance = balance + CASE id WHEN 'bob' THEN 1 ELSE -1 END WHERE id IN ('alice', 'bob')`,
			func(a bank.Audit) bool { return a.BalanceTotal == a.OpeningTotal && a.BalanceMismatches == 2 }},
		{"a negative balance", `UPDATE accounts SET balance = -1, opening_balance = -1 WHERE id = 'acct-0009'`,
			func(a bank.Audit) bool { return a.NegativeBalances == 1 && a.BalanceMismatches == 0 }},
		{"an entry alone", `INSERT INTO entries (transfer_id, account, amount) SELECT min(id), 'bob', 5 FROM transfers`,
			func(a bank.Audit) bool { return a.EntriesTotal == "5" && a.UnbalancedTransfers == 1 }},
		{"a transfer without entries", `DELETE FROM entries WHERE transfer_id = (SELECT id FROM transfers WHERE amount = 30)`,
			func(a bank.Audit) bool { return a.UnbalancedTransfers == 1 && a.BalanceMismatches == 2 }},
		{"entries of another amount", `UPDATE transfers SET amount = 31 WHERE amount = 30`,
			func(a bank.Audit) bool { return a.UnbalancedTransfers == 1 && a.BalanceMismatches == 0 }},
		{"entries that are three", `INSERT INTO entries (order_id, account, amount) SELECT id, 'bob', 0 FROM orders`,
			func(a bank.Audit) bool { return a.UnbalancedTransfers == 1 && a.EntriesTotal == "0" }},
		{"a double without money", double,
			func(a bank.Audit) bool {
				return a.KeysWithManyTransfers == 1 && a.UnbalancedTransfers == 1 && a.TransfersWithoutRecord == 0
			}},
		{"a double that moved money", paidTwice,
			func(a bank.Audit) bool {
				return a.KeysWithManyTransfers == 1 && a.UnbalancedTransfers == 0 && a.BalanceMismatches == 0 && a.TransfersWithoutRecord == 0
			}},
		{"an order under a transfer's key", `UPDATE orders o SET scope = t.scope, key = t.key FROM transfers t WHERE t.amount = 30`,
			func(a bank.Audit) bool { return a.KeysWithManyTransfers == 1 && a.KeysWithTransfers == 2 }},
		{"a lost record of a transfer", `DELETE FROM idempotency_keys WHERE attempt_id = (SELECT attempt_id FROM transfers WHERE amount = 30)`,
			func(a bank.Audit) bool { return a.TransfersWithoutRecord == 1 && a.RecordsWithoutTransfer == 0 }},
		{"a lost record of an order", `DELETE FROM idempotency_keys WHERE attempt_id = (SELECT attempt_id FROM orders)`,
			func(a bank.Audit) bool { return a.TransfersWithoutRecord == 1 }},
		{"a lost record of an account", `DELETE FROM idempotency_keys WHERE attempt_id = (SELECT attempt_id FROM accounts WHERE id = 'carol')`,
			func(a bank.Audit) bool { return a.TransfersWithoutRecord == 1 }},
		{"a record of another attempt", `UPDATE transfers SET attempt_id = gen_random_uuid() WHERE amount = 30`,
			func(a bank.Audit) bool { return a.TransfersWithoutRecord == 1 && a.RecordsWithoutTransfer == 1 }},
		{"a record of nothing", `INSERT INTO idempotency_keys (created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)
			VALUES (now(), now() + interval '1 day', 201, 1, gen_random_uuid(), 'public', 'nothing', '', '', '')`,
			func(a bank.Audit) bool { return a.RecordsWithoutTransfer == 1 }},
	} {
		t.Run(one.name, func(t *testing.T) {
			undo := plant(t, b, one.plant)
			defer undo()
			if audit := b.audit(); audit.OK || !one.sees(audit) {
				t.Errorf("the audit says %+v", audit)
			}
		})
	}
	if audit := b.audit(); !audit.OK {
		t.Fatalf("a wrong was not undone: %+v", audit)
	}

	// The record of a declined request has no transfer, and the audit accepts that.
	if r := b.keyed("/v1/transfers", `{"from":"acct-0001","to":"bob","amount":100001}`); r.status != 402 {
		t.Fatalf("transfer: %d %s", r.status, r.body)
	}
	if audit := b.audit(); !audit.OK {
		t.Errorf("the audit misses the transfer of a declined request: %+v", audit)
	}
}

// plant runs a statement, and returns a function that restores all tables.
func plant(t *testing.T, b *bundle, statement string) (undo func()) {
	t.Helper()
	tables := []string{"accounts", "transfers", "orders", "topups", "payouts", "receipts", "entries", "idempotency_keys", "idempotency_open", "idempotency_effects"}
	for _, table := range tables {
		b.exec(`CREATE TABLE saved_` + table + ` AS TABLE ` + table)
	}
	b.exec(statement)
	return func() {
		b.exec(`TRUNCATE ` + strings.Join(tables, ", ") + ` CASCADE`)
		for _, table := range tables {
			b.exec(`INSERT INTO ` + table + ` OVERRIDING SYSTEM VALUE TABLE saved_` + table)
			b.exec(`DROP TABLE saved_` + table)
		}
	}
}

// TestAuditIsRightWhileRecordsExpire: the reaper deletes records at exactly the age at which the
// audit ignores them. The audit's bank has a slow database, so that records also expire between its
// BEGIN and its snapshot.
func TestAuditIsRightWhileRecordsExpire(t *testing.T) {
	t.Parallel()
	short := func(c *Config) { c.TTL, c.ReapInterval = time.Second, time.Millisecond }
	database := pgtest.Database(t)
	b := setupOn(t, database, short)
	slowURL, proxy := slowDatabase(t, database)
	auditor := setupOn(t, slowURL, short, func(c *Config) { c.PoolSize = 2 })
	proxy.SetLatency(10 * time.Millisecond) // each way
	defer proxy.SetLatency(0)

	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
	defer cancel()
	var group sync.WaitGroup
	for range 2 {
		group.Go(func() {
			for ctx.Err() == nil {
				if r := b.keyed("/v1/transfers", `{"from":"alice","to":"bob","amount":1}`); r.status != 201 {
					t.Errorf("transfer: %d %s", r.status, r.body)
					return
				}
			}
		})
	}
	// The record of a top-up is older than its posting.
	group.Go(func() {
		for ctx.Err() == nil {
			if r := b.keyed(bank.TopUpsPath, `{"account":"alice","card":"tok","amount":1}`); r.status != 201 {
				t.Errorf("top-up: %d %s", r.status, r.body)
				return
			}
		}
	})
	audits := 0
	for ctx.Err() == nil {
		audits++
		if audit := auditor.audit(); !audit.OK {
			t.Errorf("audit %d: %+v", audits, audit)
			break
		}
	}
	cancel()
	group.Wait()
	var records, transfers int64
	if err := connect(t, database).QueryRow(t.Context(), `SELECT (SELECT count(*) FROM idempotency_keys WHERE scope NOT LIKE 'message:%'), (SELECT count(*) FROM transfers) + (SELECT count(*) FROM topups)`).Scan(&records, &transfers); err != nil {
		t.Fatal(err)
	}
	if records >= transfers || audits < 10 {
		t.Errorf("%d records of %d transfers and top-ups are left, %d audits ran: nothing was tried", records, transfers, audits)
	}
}

// slowDatabase returns a URL that leads to the database through a proxy with latency.
func slowDatabase(t *testing.T, database string) (slowURL string, proxy *pgfault.Proxy) {
	t.Helper()
	network, address, err := pgfault.Upstream(database)
	if err != nil {
		t.Fatal(err)
	}
	proxy, err = pgfault.Start(pgfault.Options{Network: network, Address: address})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = proxy.Close() }) // the connections that it cuts are no longer used
	return proxy.URL(database), proxy
}

// TestAuditNeverSeesHalfAMove: every read during transfers and orders is balanced.
func TestAuditNeverSeesHalfAMove(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	var group sync.WaitGroup
	for _, one := range []struct{ path, body string }{
		{"/v1/transfers", `{"from":"alice","to":"bob","amount":7}`},
		{"/v1/transfers", `{"from":"bob","to":"alice","amount":7}`},
		{"/v1/orders", `{"account":"alice","sku":"mug","quantity":1}`},
		// No middleware runs these again after a deadlock.
		{"/v1/unprotected/transfers", `{"from":"alice","to":"bob","amount":1}`},
		{"/v1/unprotected/transfers", `{"from":"bob","to":"alice","amount":1}`},
	} {
		group.Go(func() {
			for ctx.Err() == nil {
				r := b.send(http.MethodPost, one.path, one.body, "Idempotency-Key", uuid.NewString())
				if r.status != 201 {
					t.Errorf("%s: %d %s", one.path, r.status, r.body)
					return
				}
			}
		})
	}
	for ctx.Err() == nil {
		if audit := b.audit(); !audit.OK {
			t.Errorf("audit: %+v", audit)
			break
		}
	}
	cancel()
	group.Wait()
}
