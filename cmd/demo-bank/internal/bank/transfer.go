package bank

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
)

// ReferenceRunesMax is the maximum length of a transfer's reference, in characters.
const ReferenceRunesMax = 140

// Transfer is a transfer as clients see it. Money is in minor units.
type Transfer struct {
	ID        string    `json:"id"`
	From      string    `json:"from"`
	To        string    `json:"to"`
	Amount    int64     `json:"amount"`
	Currency  string    `json:"currency"`
	Reference string    `json:"reference"`
	CreatedAt time.Time `json:"created_at"`
}

func invalidTransfer(detail string) *Problem { return invalid("invalid-transfer", detail) }

// decodeTransfer reads the body of POST /v1/transfers.
func (b *Bank) decodeTransfer(body []byte) (work, error) {
	var from, to, currency, reference text
	var amount integer
	if err := decodeObject(body, "invalid-transfer", map[string]json.Unmarshaler{
		"from": &from, "to": &to, "amount": &amount, "currency": &currency, "reference": &reference,
	}); err != nil {
		return nil, err
	}
	switch {
	case from == "" || to == "":
		return nil, invalidTransfer("from and to must be given.")
	case from == to:
		return nil, invalidTransfer("from and to must be different accounts.")
	case !amount.set || amount.value <= 0:
		return nil, invalidTransfer("amount must be a positive integer of minor units.")
	case currency != "" && !validCurrency(string(currency)):
		return nil, invalidTransfer("currency must be a code of ISO 4217, such as EUR.")
	case utf8.RuneCountInString(string(reference)) > ReferenceRunesMax:
		return nil, invalidTransfer(fmt.Sprintf("reference must be at most %d characters.", ReferenceRunesMax))
	case strings.IndexByte(string(reference), 0) >= 0:
		return nil, invalidTransfer("reference must not contain a NUL.")
	case !validAccountID(string(from)) || !validAccountID(string(to)):
		return nil, accountNotFound()
	}
	t := Transfer{From: string(from), To: string(to), Amount: amount.value, Currency: string(currency), Reference: string(reference)}
	return func(ctx context.Context, tx pgx.Tx, s stamp) (*answer, error) { return b.transfer(ctx, tx, s, t) }, nil
}

// transfer moves money between two accounts in the given transaction and two round trips: one locks
// and reads, one writes. If it returns an error, the caller must roll back.
func (b *Bank) transfer(ctx context.Context, tx pgx.Tx, s stamp, t Transfer) (*answer, error) {
	if err := b.onTransfer(ctx, tx, false); err != nil {
		return nil, fmt.Errorf("before the transfer: %w", err)
	}
	rows, err := tx.Query(ctx, lockAccounts, t.From, t.To)
	if err != nil {
		return nil, fmt.Errorf("lock accounts: %w", err)
	}
	defer rows.Close()
	locked := make(map[string]lockedAccount, 2)
	if err := readLocked(locked)(rows); err != nil {
		return nil, fmt.Errorf("lock accounts: %w", err)
	}
	from, fromFound := locked[t.From]
	to, toFound := locked[t.To]
	if t.Currency == "" {
		t.Currency = from.currency
	}
	switch {
	case !fromFound || !toFound:
		return nil, accountNotFound()
	case from.currency != t.Currency || to.currency != t.Currency:
		return nil, invalidTransfer("The currency differs from that of an account.")
	case from.balance < t.Amount:
		return nil, insufficientFunds()
	case to.balance > math.MaxInt64-t.Amount:
		return nil, balanceLimit()
	}

	id, err := b.ids.Next()
	if err != nil {
		return nil, fmt.Errorf("make a transfer id: %w", err)
	}
	var batch pgx.Batch
	batch.Queue(moveBalance, t.From, t.To, t.Amount)
	batch.Queue(`
		INSERT INTO transfers (id, from_account, to_account, amount, currency, reference, scope, key, attempt_id, message_id)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
		RETURNING created_at`,
		id, t.From, t.To, t.Amount, t.Currency, t.Reference, s.scope, s.key, s.attempt, s.message).
		QueryRow(func(row pgx.Row) error { return row.Scan(&t.CreatedAt) })
	batch.Queue(`
		INSERT INTO entries (transfer_id, account, amount) VALUES ($1, $2, -$4::bigint), ($1, $3, $4)`,
		id, t.From, t.To, t.Amount)
	if err := tx.SendBatch(ctx, &batch).Close(); err != nil {
		return nil, fmt.Errorf("write the transfer: %w", err)
	}
	if err := b.onTransfer(ctx, tx, true); err != nil {
		return nil, fmt.Errorf("after the transfer: %w", err)
	}
	t.ID, t.CreatedAt = strconv.FormatInt(id, 10), t.CreatedAt.UTC()
	if err := publish(ctx, s, transferEvent, t.From, t); err != nil {
		return nil, err
	}
	return &answer{status: http.StatusCreated, location: "/v1/transfers/" + t.ID, body: t}, nil
}

func transferNotFound() *Problem {
	return notFound("transfer-not-found", "There is no transfer with this id.")
}

func insufficientFunds() *Problem {
	return refusal(http.StatusPaymentRequired, "insufficient-funds", "Insufficient funds", "The account's balance is lower than the amount.")
}

func balanceLimit() *Problem {
	return refusal(http.StatusConflict, "balance-limit", "The account can't hold more", "The receiving account's balance would exceed 64 bits.")
}

const selectTransfers = `SELECT id, from_account, to_account, amount, currency, reference, created_at FROM transfers`

func scanTransfer(row pgx.CollectableRow) (Transfer, error) {
	var t Transfer
	var id int64
	err := row.Scan(&id, &t.From, &t.To, &t.Amount, &t.Currency, &t.Reference, &t.CreatedAt)
	t.ID, t.CreatedAt = strconv.FormatInt(id, 10), t.CreatedAt.UTC()
	return t, err
}

// oneTransfer reads a transfer by its id. The error is a `transfer-not-found` problem if there is
// none.
func (b *Bank) oneTransfer(ctx context.Context, id string) (*Transfer, error) {
	absent := transferNotFound()
	number, err := parseID(id)
	if err != nil {
		return nil, absent
	}
	rows, err := b.pool.Query(ctx, selectTransfers+` WHERE id = $1`, number)
	if err != nil {
		return nil, fmt.Errorf("read transfer: %w", err)
	}
	t, err := pgx.CollectExactlyOneRow(rows, scanTransfer)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return nil, absent
	case err != nil:
		return nil, fmt.Errorf("read transfer: %w", err)
	}
	return &t, nil
}

// transfers reads at most limit transfers with ids after the given one, oldest first. If account is
// not empty, it reads only that account's.
func (b *Bank) transfers(ctx context.Context, account string, after int64, limit int) ([]Transfer, error) {
	sql, args := selectTransfers+` WHERE id > $1 ORDER BY id LIMIT $2`, []any{after, limit}
	if account != "" {
		// Each half reads its own index up to the limit. One condition with OR would read the whole
		// table.
		sql = `(` + selectTransfers + ` WHERE from_account = $3 AND id > $1 ORDER BY id LIMIT $2)
			UNION ALL
			(` + selectTransfers + ` WHERE to_account = $3 AND id > $1 ORDER BY id LIMIT $2)
			ORDER BY id LIMIT $2`
		args = append(args, account)
	}
	rows, err := b.pool.Query(ctx, sql, args...)
	if err != nil {
		return nil, fmt.Errorf("list transfers: %w", err)
	}
	transfers, err := pgx.CollectRows(rows, scanTransfer)
	if err != nil {
		return nil, fmt.Errorf("list transfers: %w", err)
	}
	return transfers, nil
}

// parseID reads an id as clients see it. It accepts only the spelling that the bank itself writes.
func parseID(id string) (int64, error) {
	number, err := strconv.ParseInt(id, 10, 64)
	if err != nil || number < 0 || strconv.FormatInt(number, 10) != id {
		return 0, errors.New("not an id")
	}
	return number, nil
}
