// Package effects looks like sqlc's output for database/sql, with prepared queries, from the query
//
//	-- name: CreateEffect :one
//	INSERT INTO effects (name) VALUES ($1) RETURNING id;
//
// It was written by hand.
package effects

import (
	"context"
	"database/sql"
	"fmt"
)

// DBTX is implemented by *sql.DB, *sql.Conn and *sql.Tx.
type DBTX interface {
	ExecContext(context.Context, string, ...interface{}) (sql.Result, error)
	PrepareContext(context.Context, string) (*sql.Stmt, error)
	QueryContext(context.Context, string, ...interface{}) (*sql.Rows, error)
	QueryRowContext(context.Context, string, ...interface{}) *sql.Row
}

// Prepare returns the queries on db, prepared.
func Prepare(ctx context.Context, db DBTX) (*Queries, error) {
	q := Queries{db: db}
	var err error
	if q.createEffectStmt, err = db.PrepareContext(ctx, createEffect); err != nil {
		return nil, fmt.Errorf("error preparing query CreateEffect: %w", err)
	}
	return &q, nil
}

// Close closes the prepared queries.
func (q *Queries) Close() error { return q.createEffectStmt.Close() }

// Queries has a method for each query.
type Queries struct {
	db               DBTX
	tx               *sql.Tx
	createEffectStmt *sql.Stmt
}

// WithTx returns the same queries on a transaction.
func (q *Queries) WithTx(tx *sql.Tx) *Queries {
	return &Queries{db: tx, tx: tx, createEffectStmt: q.createEffectStmt}
}

const createEffect = `-- name: CreateEffect :one
INSERT INTO effects (name) VALUES ($1) RETURNING id
`

// CreateEffect inserts a row and returns its id.
func (q *Queries) CreateEffect(ctx context.Context, name string) (int64, error) {
	stmt := q.createEffectStmt
	if q.tx != nil {
		stmt = q.tx.StmtContext(ctx, stmt)
	}
	var id int64
	err := stmt.QueryRowContext(ctx, name).Scan(&id)
	return id, err
}
