package postgres

import (
	"context"
	"fmt"
	"io"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/storage/postgres/internal/sealed"
)

// Errors of a handler that uses its transaction in a way that it must not.
var (
	// ErrSealed: the handler must not end the transaction, or has returned and must not use it any
	// more.
	ErrSealed = sealed.ErrSealed
	// ErrBusy: the transaction is used by two goroutines at once, or from inside a callback of its
	// own.
	ErrBusy = sealed.ErrBusy
)

type txKey = sealed.Key

// Tx returns the transaction of the idempotent handler that runs with this context. The handler's
// writes through it are committed together with its answer, or not at all.
//
// It is a pgx.Tx for one goroutine at a time, and from QueryRow until Scan it is in use. Commit and
// Rollback on it are refused with [ErrSealed], and so is SQL text that controls transactions. Begin
// opens a savepoint, which is sent in front of the next statement, and must be ended before the
// handler returns. Once the handler has returned, every call returns [ErrSealed]. Conn returns nil,
// and LargeObjects panics: both would lead around the seal.
//
// On a resumable route it is the handler's last transaction, after the calls to other services;
// inside a [Phase] it is the phase's transaction.
//
// Tx panics outside an idempotent handler, so that no write escapes the transaction unseen.
func Tx(ctx context.Context) pgx.Tx { return handleOf(ctx, "Tx") }

// handleOf returns the transaction of the handler that called a function of this package.
func handleOf(ctx context.Context, function string) *sealed.Tx {
	if tx := sealed.From(ctx); tx != nil {
		return tx
	}
	panic(idempotency.UsageError("idempotency/postgres: " + function + " outside an idempotent handler: mount the middleware with this store on the route, and pass the request's context on (in gin c.Request.Context(), in Fiber c.Context(), not c)"))
}

// txContext carries the handler's transaction: a context.WithValue that contains its value.
type txContext struct {
	context.Context
	tx *sealed.Tx
}

// Value implements context.Context.
func (c *txContext) Value(key any) any {
	switch key {
	case txKey{}, message.OutboxKey{}:
		return c.tx
	}
	return c.Context.Value(key)
}

// String returns only the context's name. The contexts below it belong to other packages, which may
// change them meanwhile.
func (*txContext) String() string { return "postgres.WithTx" }

// Format keeps the transaction and the contexts below out of every verb of fmt. It drops the error,
// for which fmt has no use.
func (c *txContext) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, c.String()) }
