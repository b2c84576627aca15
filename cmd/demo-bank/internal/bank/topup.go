package bank

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/effect"
	"github.com/paidonce/idempotency/storage/postgres"
)

// Limits of top-ups and payouts.
const (
	CardRunesMax = 64 // of a card or an IBAN
	// CallAmountMax is the largest amount of a top-up or payout, in minor units.
	CallAmountMax = 1_000_000_000_000
	// balanceBeforeTopUpMax leaves room for all top-ups that may be under way.
	balanceBeforeTopUpMax = math.MaxInt64 / 2
)

// TopUp is a top-up as clients see it. Money is in minor units.
type TopUp struct {
	ID        string    `json:"id"`
	Account   string    `json:"account"`
	Amount    int64     `json:"amount"`
	Charge    string    `json:"charge"` // the processor's id
	CreatedAt time.Time `json:"created_at"`
}

// decodeTopUp reads the body of POST /v1/topups.
func (b *Bank) decodeTopUp(body []byte) (call, error) {
	const slug = "invalid-topup"
	var account, card text
	var amount integer
	if err := decodeObject(body, slug, map[string]json.Unmarshaler{"account": &account, "card": &card, "amount": &amount}); err != nil {
		return nil, err
	}
	switch {
	case account == "" || card == "":
		return nil, invalid(slug, "account and card must be given.")
	case utf8.RuneCountInString(string(card)) > CardRunesMax:
		return nil, invalid(slug, fmt.Sprintf("card must be at most %d characters.", CardRunesMax))
	case !amount.set || amount.value <= 0 || amount.value > CallAmountMax:
		return nil, invalid(slug, fmt.Sprintf("amount must be a positive integer of minor units, at most %d.", int64(CallAmountMax)))
	case !validAccountID(string(account)):
		return nil, accountNotFound()
	}
	t := TopUp{Account: string(account), Amount: amount.value}
	order := chargeOrder{Card: string(card), Amount: amount.value, Reference: "top-up of " + string(account)}
	return func(ctx context.Context) (*answer, error) { return b.topUp(ctx, t, order) }, nil
}

// topUp charges the card, and then credits the account.
func (b *Bank) topUp(ctx context.Context, t TopUp, order chargeOrder) (*answer, error) {
	if !idempotency.Resumed(ctx) { // an earlier run has checked, and money may have moved since
		if err := b.mayTopUp(ctx, t.Account); err != nil {
			return nil, err
		}
	}
	paid, err := b.processor.charge.Call(ctx, order)
	switch {
	case errors.Is(err, effect.ErrDeclined):
		return nil, refusal(http.StatusPaymentRequired, "card-declined", "The card was declined", "The processor declined the card. Nothing was charged.")
	case err != nil:
		return nil, unsettled(err)
	}
	// The amount of the recorded charge counts, even if this run's input differs.
	t.Charge, t.Amount = paid.ID, paid.Amount
	return b.postTopUp(ctx, postgres.Tx(ctx), stampOfAttempt(ctx), t, paid.Instance)
}

// TopUpWithoutEffects charges a card inside a transaction, like a handler without effects: if the
// reply is lost, the charge stays and is recorded nowhere. It is for demonstrations. The processor
// must be one that the audit does not compare.
func (b *Bank) TopUpWithoutEffects(ctx context.Context, processor *Processor, account, card string, amount int64) error {
	order := chargeOrder{Card: card, Amount: amount, Reference: "top-up of " + account}
	_, err := b.commit(ctx, func(ctx context.Context, tx pgx.Tx, s stamp) (*answer, error) {
		paid, err := processor.execute(ctx, "/charges", uuid.NewString(), order)
		if err != nil {
			return nil, err
		}
		return b.postTopUp(ctx, tx, s, TopUp{Account: account, Amount: paid.Amount, Charge: paid.ID}, paid.Instance)
	}, stamp{})
	return err
}

// mayTopUp returns a problem if the account can't be topped up. It reads on a connection of its
// own, because the request's transaction must not be used before a call.
func (b *Bank) mayTopUp(ctx context.Context, id string) error {
	apart, cancel := apart(ctx)
	defer cancel()
	account, err := b.account(apart, id)
	switch {
	case err != nil:
		return err
	case account.Balance > balanceBeforeTopUpMax:
		return balanceLimit()
	}
	return nil
}

// postTopUp credits the account in the given transaction, in two round trips: one locks and reads,
// one writes.
func (b *Bank) postTopUp(ctx context.Context, tx pgx.Tx, s stamp, t TopUp, instance string) (*answer, error) {
	account, err := b.lockWithOwn(ctx, tx, t.Account, processorAccount)
	if err != nil {
		return nil, err
	}
	if account.balance > math.MaxInt64-t.Amount {
		return nil, errors.New("the account can't hold the amount that was charged")
	}
	id, err := b.ids.Next()
	if err != nil {
		return nil, fmt.Errorf("make a top-up id: %w", err)
	}
	from := processorAccount + account.currency
	var batch pgx.Batch
	batch.Queue(`
		INSERT INTO topups (id, amount, account, charge, instance, scope, key, attempt_id, message_id)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
		RETURNING created_at`,
		id, t.Amount, t.Account, t.Charge, instance, s.scope, s.key, s.attempt, s.message).
		QueryRow(func(row pgx.Row) error { return row.Scan(&t.CreatedAt) })
	batch.Queue(moveBalance, from, t.Account, t.Amount)
	batch.Queue(`
		INSERT INTO entries (topup_id, account, amount) VALUES ($1, $2, -$4::bigint), ($1, $3, $4)`,
		id, from, t.Account, t.Amount)
	if err := tx.SendBatch(ctx, &batch).Close(); err != nil {
		return nil, fmt.Errorf("write the top-up: %w", err)
	}
	t.ID, t.CreatedAt = strconv.FormatInt(id, 10), t.CreatedAt.UTC()
	if err := publish(ctx, s, topUpEvent, t.Account, t); err != nil {
		return nil, err
	}
	return &answer{status: http.StatusCreated, body: t}, nil
}
