package bank

import (
	"context"
	"encoding/json"
	"fmt"

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

// totals are the sums of the audit. What is wrong is counted by [Inspect]'s statements.
const totals = `
	SELECT
		(SELECT count(*) FROM accounts),
		(SELECT count(*) FROM transfers),
		(SELECT count(*) FROM orders),
		(SELECT COALESCE(sum(balance), 0)::text FROM accounts),
		(SELECT COALESCE(sum(opening_balance), 0)::text FROM accounts),
		(SELECT COALESCE(sum(amount), 0)::text FROM entries),
		(SELECT count(*) FROM accounts WHERE balance < 0),
		(SELECT count(*) FROM (SELECT DISTINCT scope, key FROM transfers WHERE key IS NOT NULL) keys),
		(SELECT count(*) FROM transfers WHERE key IS NULL)`

// Audit reads the books in one REPEATABLE READ snapshot, which is taken after Audit was called.
func (b *Bank) Audit(ctx context.Context) (*Audit, error) {
	select {
	case b.audits <- struct{}{}:
		defer func() { <-b.audits }()
	case <-ctx.Done():
		return nil, fmt.Errorf("audit: wait for a turn: %w", ctx.Err())
	}
	var a Audit
	var balance, opening, entries string
	err := Snapshot(ctx, b.pool, func(tx pgx.Tx) error {
		var batch pgx.Batch
		batch.Queue(totals).QueryRow(func(row pgx.Row) error {
			return row.Scan(&a.Accounts, &a.Transfers, &a.Orders, &balance, &opening, &entries,
				&a.NegativeBalances, &a.KeysWithTransfers, &a.UnprotectedTransfers)
		})
		findings := inspect(&batch, b.ttl, OneEffect, TwoEntries, BalancesAddUp, EffectsRecorded, RecordsHaveEffects)
		if err := tx.SendBatch(ctx, &batch).Close(); err != nil {
			return err
		}
		for _, f := range findings {
			*map[string]*int64{
				OneEffect: &a.KeysWithManyTransfers, TwoEntries: &a.UnbalancedTransfers, BalancesAddUp: &a.BalanceMismatches,
				EffectsRecorded: &a.TransfersWithoutRecord, RecordsHaveEffects: &a.RecordsWithoutTransfer,
			}[f.Name] = int64(f.Count)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("audit: %w", err)
	}
	a.BalanceTotal, a.OpeningTotal, a.EntriesTotal = json.Number(balance), json.Number(opening), json.Number(entries)
	a.OK = balance == opening && entries == "0" &&
		a.UnbalancedTransfers == 0 && a.BalanceMismatches == 0 && a.NegativeBalances == 0 &&
		a.KeysWithManyTransfers == 0 && a.TransfersWithoutRecord == 0 && a.RecordsWithoutTransfer == 0
	return &a, nil
}
