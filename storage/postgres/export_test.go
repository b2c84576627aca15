package postgres

import (
	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
)

// RawConn leads around the seal, as a handler in bad faith might find a way to.
func RawConn(tx pgx.Tx) *pgx.Conn { return tx.(*sealedTx).conn }

// RawConnOf returns the connection of an attempt.
func RawConnOf(a idempotency.Attempt) *pgx.Conn { return a.(*attempt).tx.conn }
