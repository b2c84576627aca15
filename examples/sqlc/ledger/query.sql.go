package ledger

import (
	"context"
)

// LedgerTransfer is a row of ledger.transfers.
type LedgerTransfer struct {
	ID     int64  `json:"id"`
	Payer  string `json:"payer"`
	Payee  string `json:"payee"`
	Amount int64  `json:"amount"`
}

const createTransfer = `-- name: CreateTransfer :one
INSERT INTO ledger.transfers (payer, payee, amount) VALUES ($1, $2, $3) RETURNING id, payer, payee, amount
`

// CreateTransferParams are the arguments of CreateTransfer.
type CreateTransferParams struct {
	Payer  string
	Payee  string
	Amount int64
}

// CreateTransfer inserts a transfer.
func (q *Queries) CreateTransfer(ctx context.Context, arg CreateTransferParams) (LedgerTransfer, error) {
	row := q.db.QueryRow(ctx, createTransfer, arg.Payer, arg.Payee, arg.Amount)
	var i LedgerTransfer
	err := row.Scan(
		&i.ID,
		&i.Payer,
		&i.Payee,
		&i.Amount,
	)
	return i, err
}

const listTransfers = `-- name: ListTransfers :many
SELECT id, payer, payee, amount FROM ledger.transfers WHERE payer = $1 OR payee = $1 ORDER BY id
`

// ListTransfers returns the transfers of an account.
func (q *Queries) ListTransfers(ctx context.Context, payer string) ([]LedgerTransfer, error) {
	rows, err := q.db.Query(ctx, listTransfers, payer)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var items []LedgerTransfer
	for rows.Next() {
		var i LedgerTransfer
		if err := rows.Scan(
			&i.ID,
			&i.Payer,
			&i.Payee,
			&i.Amount,
		); err != nil {
			return nil, err
		}
		items = append(items, i)
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	return items, nil
}

const moveMoney = `-- name: MoveMoney :many
UPDATE ledger.accounts
SET balance = balance + CASE name WHEN $1::text THEN -$2::bigint ELSE $2::bigint END
WHERE name IN ($1::text, $3::text)
RETURNING name, balance
`

// MoveMoneyParams are the arguments of MoveMoney.
type MoveMoneyParams struct {
	Payer  string
	Amount int64
	Payee  string
}

// MoveMoneyRow is an account after the move.
type MoveMoneyRow struct {
	Name    string
	Balance int64
}

// MoveMoney changes the balances of payer and payee and returns both accounts.
func (q *Queries) MoveMoney(ctx context.Context, arg MoveMoneyParams) ([]MoveMoneyRow, error) {
	rows, err := q.db.Query(ctx, moveMoney, arg.Payer, arg.Amount, arg.Payee)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var items []MoveMoneyRow
	for rows.Next() {
		var i MoveMoneyRow
		if err := rows.Scan(&i.Name, &i.Balance); err != nil {
			return nil, err
		}
		items = append(items, i)
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	return items, nil
}
