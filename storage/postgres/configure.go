package postgres

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/multitracer"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/storage/postgres/internal/sealed"
	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

// ErrPoolRefused is returned to a handler that acquires a connection from the store's pool with its
// own context, or one derived from it: its writes there would not be in the transaction, and a pool
// full of such handlers would wait for itself. A handler that acquires one with any other context,
// such as context.Background, or from another pool, can't be distinguished from the rest of the
// program. It is not refused, and its writes are committed apart from its request.
var ErrPoolRefused = errors.New("idempotency/postgres: an idempotent handler must not take a connection from the pool: use postgres.Tx(ctx)")

// Configure completes a pool's config for the connections of a [Store]. [Open] calls it; call it
// before pgxpool.NewWithConfig for a pool of your own, with the options that [New] will get, and
// once more for each other store on the pool:
//
//   - the settings of opts. One that the config already has stays, except for synchronous_commit;
//     [Store.Check] then finds that it differs.
//   - TCP keep-alives after 30 seconds, each 10 seconds, and tcp_user_timeout: the server ends a
//     connection if the other side acknowledges nothing for 60 seconds
//   - our statements prepared on connect, in pgx's default mode, so that a warm connection parses
//     nothing. If the table is not there yet, as before the first migration, or is locked for
//     longer than Options.PrepareTimeout, they are sent as text for that connection's life.
//   - with Options.TransactionPooling, pgx.QueryExecModeExec in place of pgx's default mode, which
//     prepares statements
//   - a notice handler, which learns that a COMMIT did not wait for the standbys
//   - a tracer that refuses an Acquire with a running handler's context, with [ErrPoolRefused]
//
// Hooks and tracers of the config are kept and called first. The connection itself is not wrapped:
// pgconn checks its type to bind the log-in to TLS.
func Configure(config *pgxpool.Config, opts *Options) {
	o := opts.full()
	conn := config.ConnConfig
	if conn.RuntimeParams == nil {
		conn.RuntimeParams = map[string]string{}
	}
	conn.RuntimeParams["client_encoding"] = "UTF8" // see wire.PlainText; a pooler knows this one
	// A pooler would refuse these settings, or hand them on to other clients.
	if !o.TransactionPooling {
		keepAlive := []setting{
			{name: "tcp_keepalives_idle", value: "30"}, {name: "tcp_keepalives_interval", value: "10"}, {name: "tcp_keepalives_count", value: "3"},
			// Without this, unacknowledged data keeps a connection for 15 minutes.
			{name: "tcp_user_timeout", value: "60000"},
		}
		for _, setting := range append(o.settings(), keepAlive...) {
			if _, ok := conn.RuntimeParams[setting.name]; !ok || setting.name == "synchronous_commit" {
				conn.RuntimeParams[setting.name] = setting.value
			}
		}
		if conn.DefaultQueryExecMode == pgx.QueryExecModeCacheStatement {
			statements, inner := newStatements(o), config.AfterConnect
			names := statements.NewNames()
			config.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
				if inner != nil {
					if err := inner(ctx, conn); err != nil {
						return err
					}
				}
				if ctx.Value(unpreparedKey{}) != nil {
					return nil
				}
				return statements.Prepare(ctx, conn.PgConn(), names, o.PrepareTimeout)
			}
		}
	} else if conn.DefaultQueryExecMode == pgx.QueryExecModeCacheStatement {
		conn.DefaultQueryExecMode = pgx.QueryExecModeExec
	}
	conn.OnNotice = wire.MarkWarnings(conn.OnNotice)
	if conn.Tracer == nil {
		conn.Tracer = escapeTracer{}
	} else {
		conn.Tracer = multitracer.New(conn.Tracer, escapeTracer{})
	}
}

// escapeTracer refuses an Acquire if its context carries an attempt on the same pool.
type escapeTracer struct{}

var _ pgxpool.AcquireTracer = escapeTracer{}

func (escapeTracer) TraceAcquireStart(ctx context.Context, pool *pgxpool.Pool, _ pgxpool.TraceAcquireStartData) context.Context {
	switch tx := ctx.Value(txKey{}).(type) {
	case *sealed.Tx:
		if tx.Holds(pool) {
			return refusedContext{ctx}
		}
	case *openAttempt:
		if tx.store.pool == pool {
			return refusedContext{ctx}
		}
	}
	return ctx
}

func (escapeTracer) TraceAcquireEnd(context.Context, *pgxpool.Pool, pgxpool.TraceAcquireEndData) {}

func (escapeTracer) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	return ctx
}

func (escapeTracer) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

// refusedContext has ended, with an error that the pool passes on. No context of package context
// can have such an error.
type refusedContext struct{ context.Context }

func (refusedContext) Done() <-chan struct{} {
	done := make(chan struct{})
	close(done)
	return done
}

func (refusedContext) Err() error { return ErrPoolRefused }

func (refusedContext) Deadline() (time.Time, bool) { return time.Time{}, false }

func (refusedContext) String() string { return "postgres.WithRefusal" }

// Format keeps the contexts below out of every verb of fmt. It drops the error, for which fmt has
// no use.
func (c refusedContext) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, c.String()) }
