package bank

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// Audit reports whether the books are right. Sums are in minor units, over all currencies. They are
// arbitrary-precision integers because a sum over all books may exceed 64 bits.
type Audit struct {
	// OK reports that balance_total = opening_total, entries_total = 0, and every count of errors
	// is 0. If the processor can't be reached, its counts are null and don't matter. The counts of
	// the projection matter only once no message is under way, and dead messages never.
	OK bool `json:"ok"`

	Accounts  int64 `json:"accounts"`
	Transfers int64 `json:"transfers"` // including unprotected ones
	Orders    int64 `json:"orders"`

	BalanceTotal json.Number `json:"balance_total"`
	OpeningTotal json.Number `json:"opening_total"`
	EntriesTotal json.Number `json:"entries_total"`

	// Transfers and orders without exactly two entries of their amount, one each way.
	UnbalancedTransfers int64 `json:"unbalanced_transfers"`
	// Accounts with a balance that is not opening balance + entries.
	BalanceMismatches int64 `json:"balance_mismatches"`
	NegativeBalances  int64 `json:"negative_balances"`

	KeysWithTransfers int64 `json:"keys_with_transfers"`
	// Keys with more than one transfer, order or account.
	KeysWithManyTransfers int64 `json:"keys_with_many_transfers"`
	// Keyed transfers, orders and accounts without a recorded 2xx of their attempt.
	TransfersWithoutRecord int64 `json:"transfers_without_record"`
	// Recorded 2xx answers of attempts without a transfer, order or account.
	RecordsWithoutTransfer int64 `json:"records_without_transfer"`
	// Transfers without a key. They do not affect OK.
	UnprotectedTransfers int64 `json:"unprotected_transfers"`

	// Requests that have begun to call the processor and have no answer yet: those that go on by
	// themselves, and those that wait for a person. They do not affect OK.
	OpenOperations   int64 `json:"open_operations"`
	ParkedOperations int64 `json:"parked_operations"`
	// Money that is held for payouts. It is a part of balance_total.
	HeldTotal json.Number `json:"held_total"`

	// PSP is the id of the processor's instance, or [ProcessorUnreachable]. The next five counts
	// compare its lists with the postings of this instance. They are null if it can't be reached.
	PSP string `json:"psp,omitempty"`
	// Charges at the processor. ChargesWithoutPosting does not count charges of open requests.
	Charges               *int64 `json:"charges"`
	ChargesWithoutPosting *int64 `json:"charges_without_posting"`
	PostingsWithoutCharge *int64 `json:"postings_without_charge"`
	PayoutsWithoutPosting *int64 `json:"payouts_without_posting"`
	PostingsWithoutPayout *int64 `json:"postings_without_payout"`

	OutboxPending     int64 `json:"outbox_pending"`
	MessagesConsumed  int64 `json:"messages_consumed"`  // by all consumers together
	MessagesDuplicate int64 `json:"messages_duplicate"` // that consumers dropped as copies
	MessagesDead      int64 `json:"messages_dead"`
	// ProjectionLag is the number of messages at the broker that the projection lacks. It is null
	// if that is not known: the broker can't be reached, other banks have brokers of their own, or
	// lost messages are still being published again.
	ProjectionLag *int64 `json:"projection_lag"`
	// The next three lag while messages are under way. They affect OK only if OutboxPending and
	// ProjectionLag are 0. Moves with a parked message count in none of them.
	ProjectionMissing    int64 `json:"projection_missing"`    // moves that are not in the projection
	ProjectionDoubled    int64 `json:"projection_doubled"`    // moves that are in it more than once
	ProjectionMismatches int64 `json:"projection_mismatches"` // accounts whose change differs
}

// ProcessorUnreachable is an audit's PSP if the processor does not answer.
const ProcessorUnreachable = "unreachable"

// totals are the sums of the audit. The statements of [Inspect] count the errors.
const totals = `
	SELECT
		(SELECT count(*) FROM accounts WHERE NOT starts_with(id, '` + ownPrefix + `')),
		(SELECT count(*) FROM transfers),
		(SELECT count(*) FROM orders),
		(SELECT COALESCE(sum(balance), 0)::text FROM accounts),
		(SELECT COALESCE(sum(opening_balance), 0)::text FROM accounts),
		(SELECT COALESCE(sum(amount), 0)::text FROM entries),
		(SELECT count(*) FROM accounts WHERE ` + negative + `),
		(SELECT count(*) FROM (SELECT DISTINCT scope, key FROM transfers WHERE key IS NOT NULL) keys),
		(SELECT count(*) FROM transfers WHERE key IS NULL),
		(SELECT count(*) FROM idempotency_open WHERE parked IS NULL),
		(SELECT count(*) FROM idempotency_open WHERE parked IS NOT NULL),
		(SELECT COALESCE(sum(balance), 0)::text FROM accounts WHERE starts_with(id, '` + heldAccount + `'))`

// Audit reads the books in one REPEATABLE READ snapshot, taken after the call began.
func (b *Bank) Audit(ctx context.Context) (*Audit, error) {
	select {
	case b.audits <- struct{}{}:
		defer func() { <-b.audits }()
	case <-ctx.Done():
		return nil, fmt.Errorf("audit: wait for a turn: %w", ctx.Err())
	}
	var a Audit
	var balance, opening, entries, held string
	made := b.processor.made(ctx) // before the snapshot, which then has each listed item's intent
	feed := b.look(ctx)
	err := Snapshot(ctx, b.pool, func(tx pgx.Tx) error {
		var batch pgx.Batch
		batch.Queue(totals).QueryRow(func(row pgx.Row) error {
			return row.Scan(&a.Accounts, &a.Transfers, &a.Orders, &balance, &opening, &entries,
				&a.NegativeBalances, &a.KeysWithTransfers, &a.UnprotectedTransfers,
				&a.OpenOperations, &a.ParkedOperations, &held)
		})
		made.compare(&batch)
		feed.read(&batch)
		batch.Queue(ownProjection().compare()).QueryRow(func(row pgx.Row) error {
			return row.Scan(&a.ProjectionMissing, &a.ProjectionDoubled, &a.ProjectionMismatches)
		})
		batch.Queue(counted).QueryRow(func(row pgx.Row) error {
			return row.Scan(&a.OutboxPending, &a.MessagesConsumed, &a.MessagesDuplicate, &a.MessagesDead)
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
	a.HeldTotal = json.Number(held)
	made.fill(ctx, &a)
	a.ProjectionLag = feed.lag(ctx)
	settled := a.OutboxPending == 0 && a.ProjectionLag != nil && *a.ProjectionLag == 0
	wrong := func(n *int64) bool { return n != nil && *n != 0 }
	a.OK = balance == opening && entries == "0" &&
		a.UnbalancedTransfers == 0 && a.BalanceMismatches == 0 && a.NegativeBalances == 0 &&
		a.KeysWithManyTransfers == 0 && a.TransfersWithoutRecord == 0 && a.RecordsWithoutTransfer == 0 &&
		!wrong(a.ChargesWithoutPosting) && !wrong(a.PostingsWithoutCharge) && !wrong(a.PayoutsWithoutPosting) && !wrong(a.PostingsWithoutPayout) &&
		(!settled || a.ProjectionMissing == 0 && a.ProjectionDoubled == 0 && a.ProjectionMismatches == 0)
	return &a, nil
}
