package bank

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// Audit says whether the books are right. Sums are in minor units, over all currencies; they are as wide as PostgreSQL
// needs them, so no book is too big for its audit.
type Audit struct {
	// OK: balance_total = opening_total, entries_total = 0, and every count of wrongs is 0.
	OK bool `json:"ok"`

	Accounts  int64 `json:"accounts"`
	Transfers int64 `json:"transfers"` // unprotected ones included
	Orders    int64 `json:"orders"`

	BalanceTotal json.Number `json:"balance_total"`
	OpeningTotal json.Number `json:"opening_total"`
	EntriesTotal json.Number `json:"entries_total"`

	UnbalancedTransfers int64 `json:"unbalanced_transfers"` // transfers and orders without exactly two entries of their amount, one each way
	BalanceMismatches   int64 `json:"balance_mismatches"`   // accounts whose balance is not opening balance + entries
	NegativeBalances    int64 `json:"negative_balances"`

	KeysWithTransfers      int64 `json:"keys_with_transfers"`
	KeysWithManyTransfers  int64 `json:"keys_with_many_transfers"` // keys with more than one transfer, order or account
	TransfersWithoutRecord int64 `json:"transfers_without_record"` // keyed transfers, orders, accounts whose attempt has no recorded 2xx
	RecordsWithoutTransfer int64 `json:"records_without_transfer"` // recorded 2xx whose attempt has no transfer, order or account
	UnprotectedTransfers   int64 `json:"unprotected_transfers"`    // transfers without a key; outside of OK
}

// auditStatement counts everything in one statement, and so in one snapshot.
//
// The cutoff is read while the statement runs, and so after its snapshot was taken. A record whose deletion the
// snapshot sees had expired before that by the same clock: a row younger than the cutoff minus the TTL can't have lost
// its record to the reaper, however the two race. A row and its record carry the same created_at, that of their
// transaction, so both sides of the comparison are cut at the same point.
const auditStatement = `
WITH cutoff AS MATERIALIZED (
	SELECT clock_timestamp() - $1 * interval '1 microsecond' AS at
),
moves AS MATERIALIZED (
	SELECT id, amount, scope, key, attempt_id, created_at, 'transfer' AS kind FROM transfers
	UNION ALL
	SELECT id, amount, scope, key, attempt_id, created_at, 'order' FROM orders
),
entries_by_move AS (
	SELECT transfer_id, order_id, count(*) AS entries, sum(amount) AS total, max(amount) AS highest
	FROM entries GROUP BY transfer_id, order_id
),
entries_by_account AS (
	SELECT account, sum(amount) AS total FROM entries GROUP BY account
),
account_totals AS (
	SELECT count(*) AS accounts, sum(a.balance) AS balance_total, sum(a.opening_balance) AS opening_total,
		count(*) FILTER (WHERE a.balance <> a.opening_balance + COALESCE(e.total, 0)) AS balance_mismatches,
		count(*) FILTER (WHERE a.balance < 0) AS negative_balances
	FROM accounts a LEFT JOIN entries_by_account e ON e.account = a.id
),
written AS MATERIALIZED (
	SELECT kind, scope, key, attempt_id, created_at FROM moves WHERE key IS NOT NULL
	UNION ALL
	SELECT 'account', scope, key, attempt_id, created_at FROM accounts WHERE key IS NOT NULL
),
keys AS (
	SELECT count(*) AS written, count(*) FILTER (WHERE kind = 'transfer') AS transfers FROM written GROUP BY scope, key
),
recorded AS MATERIALIZED (
	SELECT scope, key, attempt_id FROM idempotency_keys, cutoff
	WHERE status BETWEEN 200 AND 299 AND created_at > cutoff.at
)
SELECT
	t.accounts,
	(SELECT count(*) FROM moves WHERE kind = 'transfer'),
	(SELECT count(*) FROM moves WHERE kind = 'order'),
	COALESCE(t.balance_total, 0)::text,
	COALESCE(t.opening_total, 0)::text,
	(SELECT COALESCE(sum(amount), 0)::text FROM entries),
	(SELECT count(*) FROM moves m
		LEFT JOIN entries_by_move t ON m.kind = 'transfer' AND t.transfer_id = m.id
		LEFT JOIN entries_by_move o ON m.kind = 'order' AND o.order_id = m.id
		WHERE (COALESCE(t.entries, o.entries), COALESCE(t.total, o.total), COALESCE(t.highest, o.highest))
			IS DISTINCT FROM (2::bigint, 0::numeric, m.amount)),
	t.balance_mismatches,
	t.negative_balances,
	(SELECT count(*) FROM keys WHERE transfers > 0),
	(SELECT count(*) FROM keys WHERE written > 1),
	(SELECT count(*) FROM written w, cutoff WHERE w.created_at > cutoff.at AND NOT EXISTS (
		SELECT 1 FROM recorded r WHERE r.attempt_id = w.attempt_id AND r.scope = w.scope AND r.key = w.key)),
	(SELECT count(*) FROM recorded r WHERE NOT EXISTS (
		SELECT 1 FROM written w WHERE w.attempt_id = r.attempt_id AND w.scope = r.scope AND w.key = r.key)),
	(SELECT count(*) FROM moves WHERE kind = 'transfer' AND key IS NULL)
FROM account_totals t`

// Audit reads the books in one REPEATABLE READ snapshot, which is taken after Audit was called.
func (b *Bank) Audit(ctx context.Context) (*Audit, error) {
	select {
	case b.audits <- struct{}{}:
		defer func() { <-b.audits }()
	case <-ctx.Done():
		return nil, fmt.Errorf("audit: wait for a turn: %w", ctx.Err())
	}
	tx, err := b.pool.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly})
	if err != nil {
		return nil, fmt.Errorf("audit: begin: %w", err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rollbackTimeout)
		defer cancel()
		_ = tx.Rollback(ctx) // it wrote nothing
	}()
	var a Audit
	var balance, opening, entries string
	err = tx.QueryRow(ctx, auditStatement, b.ttl/time.Microsecond).Scan(
		&a.Accounts, &a.Transfers, &a.Orders, &balance, &opening, &entries,
		&a.UnbalancedTransfers, &a.BalanceMismatches, &a.NegativeBalances,
		&a.KeysWithTransfers, &a.KeysWithManyTransfers, &a.TransfersWithoutRecord, &a.RecordsWithoutTransfer,
		&a.UnprotectedTransfers)
	if err != nil {
		return nil, fmt.Errorf("audit: %w", err)
	}
	a.BalanceTotal, a.OpeningTotal, a.EntriesTotal = json.Number(balance), json.Number(opening), json.Number(entries)
	a.OK = balance == opening && entries == "0" &&
		a.UnbalancedTransfers == 0 && a.BalanceMismatches == 0 && a.NegativeBalances == 0 &&
		a.KeysWithManyTransfers == 0 && a.TransfersWithoutRecord == 0 && a.RecordsWithoutTransfer == 0
	return &a, nil
}
