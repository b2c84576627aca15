package ledgersql

import (
	"context"
)

// LedgerAccount is a row of ledger.accounts.
type LedgerAccount struct {
	Name    string `json:"name"`
	Balance int64  `json:"balance"`
}

const deposit = `-- name: Deposit :one
UPDATE ledger.accounts SET balance = balance + $2 WHERE name = $1 RETURNING name, balance
`

// DepositParams are the arguments of Deposit.
type DepositParams struct {
	Name    string
	Balance int64
}

// Deposit adds to the balance of an account.
func (q *Queries) Deposit(ctx context.Context, arg DepositParams) (LedgerAccount, error) {
	row := q.db.QueryRowContext(ctx, deposit, arg.Name, arg.Balance)
	var i LedgerAccount
	err := row.Scan(&i.Name, &i.Balance)
	return i, err
}
