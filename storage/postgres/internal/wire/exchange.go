// Package wire exchanges messages with PostgreSQL: several statements in one round trip, prepared
// statements, the binary format, SQLSTATEs and notices. It knows pgconn, and nothing of keys and
// records.
package wire

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/paidonce/idempotency/internal/deadline"
)

var binaryFormat = []int16{1} // stands for all parameters, and for all columns

// Call is a statement with its parameters and, if it returns a row, the reader of its first row.
type Call struct {
	Statement *Statement
	Params    [][]byte
	Row       RowReader

	Formats []int16 // of the parameters; nil: all are binary

	// Meaning returns the sentinel for PostgreSQL's error in this call, and the error with a remedy
	// added. It is nil in calls of the store's own.
	Meaning func(err *pgconn.PgError) (sentinel, explained error)

	// Apart puts a Sync in front of the parameters, after the text of a statement that is not
	// prepared. While a session has parsed or executed something and waits for the rest of a
	// message, none of PostgreSQL's timeouts runs; after a Sync,
	// idle_in_transaction_session_timeout does. The transaction must be open by then: otherwise an
	// error before the Sync would not fail the statements after it.
	Apart bool
}

// TogetherBytesMax is the maximum size of encoded parameters that are sent together with the
// statements in front of them. It applies to the parameters of deferred statements, and to the
// headers and body of the record. More does not fit into one TCP segment with the rest of the
// flush, and may arrive in part. A decline begins its transaction in the same flush, so its record
// is never apart.
const TogetherBytesMax = 512

// RowReader reads a row in binary format. The values are in the connection's buffer: copy those
// that you keep.
type RowReader interface{ ReadRow(values [][]byte) error }

// RowFunc is a function as a [RowReader].
type RowFunc func(values [][]byte) error

func (f RowFunc) ReadRow(values [][]byte) error { return f(values) }

// reply is the result of a flush.
type reply struct {
	Committed bool // the last statement that completed was COMMIT, and it committed
	Failed    int  // index of the call that failed; the number of calls if none did
	parsed    int  // number of statements that were parsed before anything failed
}

// Flush sends the calls in one message and reads their results: one round trip. After an error the
// server has skipped the calls behind the failed one; those before it were executed.
//
// It uses the extended query protocol through pgconn's own frontend. pgconn's Pipeline does the
// same for statements of any kind; Flush knows the columns of its few statements, so it describes
// nothing and keeps no queues.
func (s *Set) Flush(ctx context.Context, conn *pgconn.PgConn, calls ...Call) (reply, error) {
	switch {
	case ctx.Err() != nil:
		return reply{}, fmt.Errorf("nothing was sent: %w", ctx.Err())
	case conn.IsClosed() || conn.IsBusy():
		return reply{}, errors.New("nothing was sent: connection is closed or busy")
	}
	frontend, prepared, kept := conn.Frontend(), s.namesOn(conn), keptOn(conn)
	for i := range calls {
		c := &calls[i]
		name, formats := c.Statement.Name, c.Formats
		if name == "" && prepared != nil {
			if name = prepared.names[c.Statement.number]; name == "" && c.Statement.Keep {
				name = kept.names[c.Statement.SQL]
			}
		}
		if formats == nil {
			formats = binaryFormat
		}
		if name == "" {
			name = kept.parse(c.Statement, prepared != nil && c.Statement.Keep)
			frontend.SendParse(&pgproto3.Parse{Name: name, Query: c.Statement.SQL, ParameterOIDs: c.Statement.OIDs})
		}
		if c.Apart {
			frontend.SendSync(&pgproto3.Sync{})
		}
		frontend.SendBind(&pgproto3.Bind{
			PreparedStatement: name, Parameters: c.Params, ParameterFormatCodes: formats, ResultFormatCodes: binaryFormat,
		})
		frontend.SendExecute(&pgproto3.Execute{})
	}
	frontend.SendSync(&pgproto3.Sync{})
	var result reply
	var err error
	if c, ok := ctx.(*deadline.Context); ok {
		result, err = exchangeBefore(c, conn, calls)
	} else {
		result, err = exchangeWatched(ctx, conn, calls)
	}
	kept.done(conn, result.parsed)
	if err != nil && Unprepared(err) {
		s.ForgetPrepared(conn)
	}
	return result, err
}

// exchangeBefore is exchange with a context that only ends by time: the deadline of the socket ends
// it.
func exchangeBefore(ctx *deadline.Context, conn *pgconn.PgConn, calls []Call) (reply, error) {
	at, _ := ctx.Deadline()
	// Best effort: a connection without deadlines can't be interrupted by the other watch either.
	_ = conn.Conn().SetDeadline(at)
	result, err := exchange(conn, calls)
	if !conn.IsClosed() {
		_ = conn.Conn().SetDeadline(time.Time{})
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("%w: %w", context.DeadlineExceeded, err)
	}
	return result, err
}

// exchangeWatched is exchange with a context that may end for any reason.
func exchangeWatched(ctx context.Context, conn *pgconn.PgConn, calls []Call) (reply, error) {
	watch := watchContext(ctx, conn)
	result, err := exchange(conn, calls)
	if interrupted := watch.end(); interrupted && err != nil {
		err = fmt.Errorf("%w: %w", ctx.Err(), err)
	}
	return result, err
}

// exchange flushes the written messages and reads the replies.
//
// It writes everything before it reads anything. That can't block both sides: the sent messages fit
// into one that the server reads whole, or the replies fit into the socket's buffer.
func exchange(conn *pgconn.PgConn, calls []Call) (result reply, err error) {
	if err := conn.Frontend().Flush(); err != nil {
		abandon(conn)
		return reply{}, err
	}
	reader := replyReader{calls: calls, syncs: 1}
	for i := range calls {
		if calls[i].Apart {
			reader.syncs++
		}
	}
	for {
		message, err := conn.ReceiveMessage(context.Background()) // the watch has the context
		if err != nil {
			abandon(conn)
			return reader.reply, reader.broken(err)
		}
		over, err := reader.read(message)
		if err != nil {
			abandon(conn)
			return reader.reply, reader.broken(err)
		}
		if over {
			return reader.reply, reader.err
		}
	}
}

// replyReader reads the messages that answer calls, up to and including the ReadyForQuery of the
// last Sync.
type replyReader struct {
	calls []Call
	syncs int // not answered yet
	reply reply
	row   bool  // the call under way returned one
	err   error // of the call that failed
}

// read takes one message and reports whether it was the last. An error means that the server broke
// the protocol; errors of statements go to r.err.
func (r *replyReader) read(message pgproto3.BackendMessage) (over bool, err error) {
	switch message := message.(type) {
	case *pgproto3.ParseComplete:
		if r.err == nil {
			r.reply.parsed++
		}
	case *pgproto3.BindComplete,
		// pgconn has handled the last three.
		*pgproto3.ParameterStatus, *pgproto3.NoticeResponse, *pgproto3.NotificationResponse:
	case *pgproto3.DataRow:
		if r.err == nil && !r.row && r.reply.Failed < len(r.calls) && r.calls[r.reply.Failed].Row != nil {
			r.err = r.calls[r.reply.Failed].Row.ReadRow(message.Values)
		}
		r.row = true
	case *pgproto3.CommandComplete:
		if r.err == nil {
			r.reply.Committed = string(message.CommandTag) == "COMMIT"
			r.reply.Failed++
		}
		r.row = false
	case *pgproto3.ErrorResponse:
		// No later error takes a COMMIT back.
		if committed := r.reply.Committed && r.reply.Failed == len(r.calls); r.err == nil && !committed {
			r.err = pgconn.ErrorResponseToPgError(message)
		}
	case *pgproto3.ReadyForQuery:
		r.row = false
		if r.syncs--; r.syncs > 0 {
			return false, nil
		}
		if r.err == nil && r.reply.Failed != len(r.calls) {
			return false, errors.New("server answered fewer statements than were sent")
		}
		return true, nil
	default:
		return false, fmt.Errorf("server answered with an unexpected %T", message)
	}
	return false, nil
}

// broken returns the error for a connection that failed while it was read. If every call was
// answered, there is none.
func (r *replyReader) broken(err error) error {
	switch {
	case r.err != nil:
		return r.err
	case r.reply.Failed == len(r.calls):
		return nil
	}
	return err
}

// abandon closes a connection if its reply did not come, as pgconn does: at once for the caller,
// and with a request to cancel, in the background, for the server.
func abandon(conn *pgconn.PgConn) {
	if conn.IsClosed() {
		return
	}
	_ = conn.Conn().SetDeadline(longAgo)
	pipeline := conn.StartPipeline(context.Background())
	pipeline.SendPipelineSync()
	_ = pipeline.Flush() // fails by the deadline, upon which pgconn closes
	_ = pipeline.Close()
	closeNow(conn) // even if the socket has no deadlines
}

// closeNow closes a connection without waiting for anything.
func closeNow(conn *pgconn.PgConn) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_ = conn.Close(ctx) // a closed one stays so
}

var longAgo = time.Unix(1, 0)

// contextWatch interrupts a connection when a context ends.
type contextWatch struct {
	conn *pgconn.PgConn
	stop func() bool

	mu          sync.Mutex
	over        bool
	interrupted bool
}

// watchContext returns nil if the context never ends.
func watchContext(ctx context.Context, conn *pgconn.PgConn) *contextWatch {
	if ctx.Done() == nil {
		return nil
	}
	w := &contextWatch{conn: conn}
	w.stop = context.AfterFunc(ctx, w.interrupt)
	return w
}

func (w *contextWatch) interrupt() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.over {
		w.interrupted = true
		_ = w.conn.Conn().SetDeadline(longAgo) // of a socket, which is safe for concurrent use
	}
}

// end ends the watch and reports whether the context ended first.
func (w *contextWatch) end() bool {
	if w == nil || w.stop() {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.over = true
	if w.interrupted && !w.conn.IsClosed() {
		_ = w.conn.Conn().SetDeadline(time.Time{})
	}
	return w.interrupted
}
