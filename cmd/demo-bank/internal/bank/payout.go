package bank

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency/effect"
	"github.com/paidonce/idempotency/storage/postgres"
)

// Payout is a payout as clients see it. Money is in minor units.
type Payout struct {
	ID        string    `json:"id"`
	Account   string    `json:"account"`
	Amount    int64     `json:"amount"`
	Payout    string    `json:"payout"` // the processor's id
	CreatedAt time.Time `json:"created_at"`
}

// decodePayout reads the body of POST /v1/payouts.
func (b *Bank) decodePayout(body []byte) (call, error) {
	const slug = "invalid-payout"
	var account, iban text
	var amount integer
	if err := decodeObject(body, slug, map[string]json.Unmarshaler{"account": &account, "iban": &iban, "amount": &amount}); err != nil {
		return nil, err
	}
	switch {
	case account == "" || iban == "":
		return nil, invalid(slug, "account and iban must be given.")
	case utf8.RuneCountInString(string(iban)) > CardRunesMax:
		return nil, invalid(slug, fmt.Sprintf("iban must be at most %d characters.", CardRunesMax))
	case !amount.set || amount.value <= 0 || amount.value > CallAmountMax:
		return nil, invalid(slug, fmt.Sprintf("amount must be a positive integer of minor units, at most %d.", int64(CallAmountMax)))
	case !validAccountID(string(account)):
		return nil, accountNotFound()
	}
	p := Payout{Account: string(account), Amount: amount.value}
	order := payoutOrder{IBAN: string(iban), Amount: amount.value, Reference: "payout of " + string(account)}
	return func(ctx context.Context) (*answer, error) { return b.payOut(ctx, p, order) }, nil
}

// hold is the result of the phase that holds a payout's amount.
type hold struct {
	ID        int64     `json:"id"` // of the payout
	CreatedAt time.Time `json:"created_at"`
}

type nothing struct{}

// payOut holds the amount, sends it, and then posts or releases it. Each step is committed before
// the next one, and the last one with the answer.
func (b *Bank) payOut(ctx context.Context, p Payout, order payoutOrder) (*answer, error) {
	s := stampOfAttempt(ctx)
	held, err := postgres.Phase(ctx, "hold", func(tx pgx.Tx) (hold, error) { return b.holdPayout(ctx, tx, s, p) })
	if err != nil {
		return nil, err
	}
	p.ID, p.CreatedAt = strconv.FormatInt(held.ID, 10), held.CreatedAt.UTC()
	sent, err := b.processor.payout.Call(ctx, order)
	switch {
	case errors.Is(err, effect.ErrDeclined):
		// A refusal undoes the writes of its own transaction, so the release has one of its own.
		if _, err := postgres.Phase(ctx, "release", func(tx pgx.Tx) (nothing, error) {
			return nothing{}, b.endPayout(ctx, tx, held.ID, p, nil)
		}); err != nil {
			return nil, unsettled(err)
		}
		return nil, refusal(http.StatusUnprocessableEntity, "payout-refused", "The payout was refused", "The processor refused the payout. The account has the amount back.")
	case err != nil:
		return nil, unsettled(err)
	}
	p.Payout = sent.ID
	if err := b.endPayout(ctx, postgres.Tx(ctx), held.ID, p, &sent); err != nil {
		return nil, err
	}
	return &answer{status: http.StatusCreated, body: p}, nil
}

// holdPayout moves the amount from the account to the bank's account for held money, in two round
// trips: one locks and reads, one writes.
func (b *Bank) holdPayout(ctx context.Context, tx pgx.Tx, s stamp, p Payout) (h hold, err error) {
	account, err := b.lockWithOwn(ctx, tx, p.Account, heldAccount)
	switch {
	case err != nil:
		return hold{}, err
	case account.balance < p.Amount:
		return hold{}, insufficientFunds()
	}
	if h.ID, err = b.ids.Next(); err != nil {
		return hold{}, fmt.Errorf("make a payout id: %w", err)
	}
	var batch pgx.Batch
	batch.Queue(`
		INSERT INTO payouts (id, amount, state, account, scope, key, attempt_id)
		VALUES ($1, $2, 'held', $3, $4, $5, $6)
		RETURNING created_at`,
		h.ID, p.Amount, p.Account, s.scope, s.key, s.attempt).
		QueryRow(func(row pgx.Row) error { return row.Scan(&h.CreatedAt) })
	queuePayoutMove(&batch, h.ID, p.Account, heldAccount+account.currency, p.Amount)
	if err := tx.SendBatch(ctx, &batch).Close(); err != nil {
		return hold{}, fmt.Errorf("hold the amount: %w", err)
	}
	return h, nil
}

// endPayout moves the held amount to the processor's account if the processor has sent it, and
// otherwise back to the account, in two round trips.
func (b *Bank) endPayout(ctx context.Context, tx pgx.Tx, id int64, p Payout, sent *executed) error {
	account, err := b.lockWithOwn(ctx, tx, p.Account, heldAccount, processorAccount)
	if err != nil {
		return err
	}
	state, to := "released", p.Account
	var payout, instance *string
	if sent != nil {
		state, to, payout, instance = "posted", processorAccount+account.currency, &sent.ID, &sent.Instance
	}
	var batch pgx.Batch
	batch.Queue(`
		UPDATE payouts SET state = $2, payout = $3, instance = $4, ended_at = transaction_timestamp()
		WHERE id = $1 AND state = 'held' RETURNING id`, id, state, payout, instance).
		QueryRow(func(row pgx.Row) error { return row.Scan(new(int64)) })
	queuePayoutMove(&batch, id, heldAccount+account.currency, to, p.Amount)
	if err := tx.SendBatch(ctx, &batch).Close(); err != nil {
		return fmt.Errorf("end the payout: %w", err)
	}
	return nil
}

// queuePayoutMove queues a move with its two entries.
func queuePayoutMove(batch *pgx.Batch, id int64, from, to string, amount int64) {
	batch.Queue(moveBalance, from, to, amount)
	batch.Queue(`
		INSERT INTO entries (payout_id, account, amount) VALUES ($1, $2, -$4::bigint), ($1, $3, $4)`,
		id, from, to, amount)
}
