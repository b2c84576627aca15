package postgres

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/paidonce/idempotency"
)

// Rows is the exact number of rows that a deferred statement must touch. Put it in front of the
// arguments of [DeferExec]; without it the number is 1.
type Rows int

// AnyRowsUnchecked accepts every number of rows. A statement that finds nothing to update is then
// committed with the answer, without any error.
const AnyRowsUnchecked Rows = -1

// DeferExec adds a statement to those that run after the handler has returned, in the same
// transaction and in the order of the calls. They travel together with the record and COMMIT, so
// the last statements of a handler cost no round trip of their own if it does not need their
// results:
//
//	postgres.DeferExec(ctx, "UPDATE accounts SET balance = balance - $2 WHERE id = $1", from, amount)
//	postgres.DeferExec(ctx, "DELETE FROM holds WHERE payment = $1", postgres.Rows(2), payment)
//
// COMMIT is on its way behind them, so each statement must touch exactly one row, or as many as a
// [Rows] in front of the arguments says. Otherwise nothing is committed: the request is answered
// 500 not-executed. Any other error of a deferred statement ends the request in the same way,
// except that 40001 and 40P01 start it again, and an outage or a timeout is 503, as for statements
// of [Tx]. By then the handler has given its answer and can't turn the error into another one: so
// check a client's input before you defer a statement.
//
// The statement is an INSERT, UPDATE or DELETE, or a SELECT, which counts the rows that it returns;
// any rows are discarded. It must not begin with WITH. Arguments are encoded as pgx does in the
// pool's mode, at once; pgx.NamedArgs may come in front of them. In the modes that describe
// statements, one costs a round trip when a connection first meets it. Tracers of pgx don't see
// deferred statements.
//
// With an answer that undoes the handler's writes, such as a 4xx or 5xx, the statements are not
// sent. A statement that was deferred while a nested transaction was open is dropped if that is
// rolled back. The time of deferred statements counts for the engine's Timeouts.Commit.
//
// In a consumer's batch the statements of all messages travel with the batch's COMMIT, behind those
// that its handlers run at once. An error among them fails the batch, which is then tried in halves.
//
// Inside a [Phase] the statement travels with the phase's COMMIT. On a resumable route, outside of
// a phase, DeferExec counts as a use of Tx: no call to another service may follow.
//
// An error means that the statement was not added. If the handler ignores the error, the request
// fails, and nothing is committed. Like [Tx], DeferExec is for one goroutine at a time, returns
// [ErrBusy] or [ErrSealed], and panics outside an idempotent handler.
func DeferExec(ctx context.Context, sql string, args ...any) error {
	return handleOf(ctx, "DeferExec").Defer(ctx, func() (int, string, []any, error) { return deferOptions(ctx, sql, args) })
}

// deferOptions parses the options in front of the arguments.
func deferOptions(ctx context.Context, sql string, args []any) (int, string, []any, error) {
	rows, rewriter := Rows(1), pgx.QueryRewriter(nil)
options:
	for len(args) > 0 {
		switch option := args[0].(type) {
		case Rows:
			if rows = option; rows < AnyRowsUnchecked {
				return 0, "", nil, fmt.Errorf("idempotency/postgres: Rows is %d: it must be the number of rows, or AnyRowsUnchecked", rows)
			}
		case pgx.QueryRewriter:
			rewriter = option
		case pgx.QueryExecMode, pgx.QueryResultFormats, pgx.QueryResultFormatsByOID:
			return 0, "", nil, fmt.Errorf("idempotency/postgres: a deferred statement takes no %T", option)
		default:
			break options
		}
		args = args[1:]
	}
	if rewriter != nil {
		var err error
		if sql, args, err = rewriter.RewriteQuery(ctx, nil, sql, args); err != nil {
			return 0, "", nil, fmt.Errorf("idempotency/postgres: rewrite a deferred statement: %w", err)
		}
	}
	for _, arg := range args {
		if _, ok := arg.(Rows); ok {
			return 0, "", nil, errors.New("idempotency/postgres: Rows comes in front of the arguments of a deferred statement")
		}
	}
	return int(rows), sql, args, nil
}

// deferredMeaning returns the sentinel for PostgreSQL's error in the handler's deferred statement
// of this number, and the error with its place added. It is never about the record. A statement
// that is stale, or was deallocated by somebody, is prepared once more by the next run.
func deferredMeaning(number int, stale bool, err *pgconn.PgError) (sentinel, explained error) {
	if stale || err.Code == "26000" && err.Where == "" {
		return idempotency.ErrNotSerializable, err
	}
	remedy := "deferred statement " + strconv.Itoa(number)
	if err.Code == "22012" && err.Where == "" { // a function's own error would name it in its context
		remedy += " touched another number of rows than it must, or divides by zero itself: give DeferExec a Rows, or look before the handler answers"
	}
	return classify(err), explain(err, remedy)
}

// refusal returns the sentinel for a statement that was not deferred.
func refusal(err error) error {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return idempotency.ErrUnavailable
	}
	return idempotency.ErrAborted
}
