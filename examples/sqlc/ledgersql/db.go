// Package ledgersql looks like sqlc's output for database/sql from query.sql. It was written by
// hand, so that the example needs no generator.
package ledgersql

import (
	"context"
	"database/sql"
)

// DBTX is implemented by a *sql.DB, a *sql.Conn and a *sql.Tx.
type DBTX interface {
	ExecContext(context.Context, string, ...interface{}) (sql.Result, error)
	PrepareContext(context.Context, string) (*sql.Stmt, error)
	QueryContext(context.Context, string, ...interface{}) (*sql.Rows, error)
	QueryRowContext(context.Context, string, ...interface{}) *sql.Row
}

// New returns the queries on db.
func New(db DBTX) *Queries {
	return &Queries{db: db}
}

// Queries has a method for each query of query.sql.
type Queries struct {
	db DBTX
}

// WithTx returns the same queries on a transaction.
func (q *Queries) WithTx(tx *sql.Tx) *Queries {
	return &Queries{
		db: tx,
	}
}
