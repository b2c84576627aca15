package bank

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/jackc/pgx/v5"
)

// Limits of an account.
const (
	AccountIDBytesMax = 64
	// OpeningBalanceMax keeps the sum of millions of accounts within 64 bits.
	OpeningBalanceMax = 1_000_000_000_000
)

// Account is an account as clients see it. Money is in minor units.
type Account struct {
	ID             string `json:"id"`
	Currency       string `json:"currency"`
	Balance        int64  `json:"balance"`
	OpeningBalance int64  `json:"opening_balance"`
}

// validAccountID reports whether id has the form of an account's id.
func validAccountID(id string) bool {
	for i := range len(id) {
		c := id[i]
		letter := c|0x20 >= 'a' && c|0x20 <= 'z'
		digit := c >= '0' && c <= '9'
		if !letter && !digit && strings.IndexByte("-_.", c) < 0 {
			return false
		}
	}
	return id != "" && len(id) <= AccountIDBytesMax
}

// validCurrency reports whether code has the form of an ISO 4217 code.
func validCurrency(code string) bool {
	for i := range len(code) {
		if code[i] < 'A' || code[i] > 'Z' {
			return false
		}
	}
	return len(code) == 3
}

// decodeAccount reads the body of POST /v1/accounts.
func (b *Bank) decodeAccount(body []byte) (work, error) {
	var id, currency text
	var opening integer
	if err := decodeObject(body, "invalid-account", map[string]json.Unmarshaler{
		"id": &id, "currency": &currency, "opening_balance": &opening,
	}); err != nil {
		return nil, err
	}
	switch {
	case id == merchant: // the first order opens it
		return nil, invalid("invalid-account", "This id is the bank's own.")
	case !validAccountID(string(id)):
		return nil, invalid("invalid-account", fmt.Sprintf("id must be 1 to %d letters, digits, dots, hyphens and underscores.", AccountIDBytesMax))
	case !validCurrency(string(currency)):
		return nil, invalid("invalid-account", "currency must be a code of ISO 4217, such as EUR.")
	case !opening.set || opening.value < 0 || opening.value > OpeningBalanceMax:
		return nil, invalid("invalid-account", fmt.Sprintf("opening_balance must be an integer of minor units from 0 to %d.", int64(OpeningBalanceMax)))
	}
	account := Account{ID: string(id), Currency: string(currency), Balance: opening.value, OpeningBalance: opening.value}
	return func(ctx context.Context, tx pgx.Tx, s stamp) (*answer, error) {
		// ON CONFLICT instead of a SELECT first: two requests with different keys may open the same
		// account at once.
		tag, err := tx.Exec(ctx, `
			INSERT INTO accounts (id, currency, opening_balance, balance, scope, key, attempt_id)
			VALUES ($1, $2, $3, $3, $4, $5, $6)
			ON CONFLICT (id) DO NOTHING`,
			account.ID, account.Currency, account.OpeningBalance, s.scope, s.key, s.attempt)
		switch {
		case err != nil:
			return nil, fmt.Errorf("insert account: %w", err)
		case tag.RowsAffected() == 0:
			return nil, refusal(http.StatusConflict, "account-exists", "The account exists", "An account with this id exists already.")
		}
		return &answer{status: http.StatusCreated, location: "/v1/accounts/" + account.ID, body: account}, nil
	}, nil
}

// account reads one account. The error is an `account-not-found` problem if there is none.
func (b *Bank) account(ctx context.Context, id string) (*Account, error) {
	if !validAccountID(id) {
		return nil, accountNotFound()
	}
	a := Account{ID: id}
	err := b.pool.QueryRow(ctx, `SELECT currency, balance, opening_balance FROM accounts WHERE id = $1`, id).
		Scan(&a.Currency, &a.Balance, &a.OpeningBalance)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return nil, accountNotFound()
	case err != nil:
		return nil, fmt.Errorf("read account: %w", err)
	}
	return &a, nil
}

func accountNotFound() *Problem {
	return notFound("account-not-found", "There is no account with this id.")
}

// accounts reads at most limit accounts with ids after the given one, ordered by id, without the
// bank's own.
func (b *Bank) accounts(ctx context.Context, after string, limit int) ([]Account, error) {
	rows, err := b.pool.Query(ctx, `
		SELECT id, currency, balance, opening_balance FROM accounts
		WHERE id > $1 AND NOT starts_with(id, '`+ownPrefix+`') ORDER BY id LIMIT $2`, after, limit)
	if err != nil {
		return nil, fmt.Errorf("list accounts: %w", err)
	}
	accounts, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (a Account, err error) {
		err = row.Scan(&a.ID, &a.Currency, &a.Balance, &a.OpeningBalance)
		return a, err
	})
	if err != nil {
		return nil, fmt.Errorf("list accounts: %w", err)
	}
	return accounts, nil
}

// lockedAccount holds the columns of a locked account that a move needs.
type lockedAccount struct {
	currency string
	balance  int64
}

// lockAccounts locks two accounts. Every move locks them in the order of their ids, so two moves
// cannot deadlock. NO KEY UPDATE keeps out other moves but allows foreign key checks.
const lockAccounts = `
	SELECT id, currency, balance FROM accounts WHERE id IN ($1, $2) ORDER BY id FOR NO KEY UPDATE`

// readLocked reads the rows of lockAccounts.
func readLocked(locked map[string]lockedAccount) func(pgx.Rows) error {
	return func(rows pgx.Rows) error {
		for rows.Next() {
			var id string
			var a lockedAccount
			if err := rows.Scan(&id, &a.currency, &a.balance); err != nil {
				return err
			}
			locked[id] = a
		}
		return rows.Err()
	}
}

// moveBalance moves $3 from account $1 to account $2. The caller has locked both.
const moveBalance = `
	UPDATE accounts SET balance = balance + CASE id WHEN $1 THEN -$3::bigint ELSE $3::bigint END WHERE id IN ($1, $2)`
