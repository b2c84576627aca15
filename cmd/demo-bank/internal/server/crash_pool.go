package server

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/multitracer"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/internal/crashpoint"
	"github.com/paidonce/idempotency/storage/postgres"
)

// Configure adds the point to the config of the service's pool. Call it before postgres.Configure.
func (p *CrashPoint) Configure(config *pgxpool.Config) {
	conn := config.ConnConfig
	tracer := &crashPoolTracer{point: p}
	if _, wired := wirePoints[p.name]; wired || p.name == crashpoint.ReaperBatch {
		build := conn.BuildFrontend
		conn.BuildFrontend = func(r io.Reader, w io.Writer) *pgproto3.Frontend {
			sent := &sentWriter{Writer: w, point: p}
			frontend := build(r, sent)
			// Never deleted: few connections are made before the process dies.
			tracer.sent.Store(frontend, sent)
			return frontend
		}
	}
	if conn.Tracer == nil {
		conn.Tracer = tracer
	} else {
		conn.Tracer = multitracer.New(conn.Tracer, tracer)
	}
}

// crashPoolTracer sees the statements of the handler and the reaper, and the resolver's connection.
type crashPoolTracer struct {
	point *CrashPoint
	sent  sync.Map // *sentWriter by *pgproto3.Frontend
}

var (
	_ pgx.QueryTracer   = (*crashPoolTracer)(nil)
	_ pgx.BatchTracer   = (*crashPoolTracer)(nil)
	_ pgx.ConnectTracer = (*crashPoolTracer)(nil)
)

// TraceQueryStart implements [pgx.QueryTracer].
func (t *crashPoolTracer) TraceQueryStart(ctx context.Context, conn *pgx.Conn, data pgx.TraceQueryStartData) context.Context {
	if t.point.name == crashpoint.ReaperBatch && strings.Contains(data.SQL, "DELETE FROM") && strings.Contains(data.SQL, postgres.TableName) {
		if sent, ok := t.sent.Load(conn.PgConn().Frontend()); ok {
			sent.(*sentWriter).batch.Store(true)
		}
	}
	if completes(ctx) && strings.Contains(data.SQL, takeOverSQL) {
		t.point.reached(crashpoint.CompleterBatch)
	}
	return ctx
}

// TraceQueryEnd implements [pgx.QueryTracer].
func (t *crashPoolTracer) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

// TraceBatchStart implements [pgx.BatchTracer]. A transfer locks and reads in one round trip, and
// writes in a batch.
func (t *crashPoolTracer) TraceBatchStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceBatchStartData) context.Context {
	if crashRequestFrom(ctx) != nil {
		t.point.reached(crashpoint.MidHandler)
	}
	if r := crashCallFrom(ctx); r != nil {
		r.batch(t.point)
	}
	return ctx
}

// TraceBatchQuery implements [pgx.BatchTracer].
func (t *crashPoolTracer) TraceBatchQuery(context.Context, *pgx.Conn, pgx.TraceBatchQueryData) {}

// TraceBatchEnd implements [pgx.BatchTracer].
func (t *crashPoolTracer) TraceBatchEnd(context.Context, *pgx.Conn, pgx.TraceBatchEndData) {}

// TraceConnectStart implements [pgx.ConnectTracer].
func (t *crashPoolTracer) TraceConnectStart(ctx context.Context, _ pgx.TraceConnectStartData) context.Context {
	return ctx
}

// TraceConnectEnd implements [pgx.ConnectTracer].
func (t *crashPoolTracer) TraceConnectEnd(ctx context.Context, data pgx.TraceConnectEndData) {
	if r := crashRequestFrom(ctx); r != nil && data.Err == nil && r.lost.CompareAndSwap(true, false) {
		t.point.reached(crashpoint.Resolving)
	}
}

// sentWriter writes to the database server. It can kill the process before or after a statement of
// an open request is sent, and after a batch of the reaper.
type sentWriter struct {
	io.Writer
	point *CrashPoint
	batch atomic.Bool // the next statement to be executed is the reaper's DELETE
}

// Write implements io.Writer. Each flush of the protocol is one write.
func (w *sentWriter) Write(messages []byte) (int, error) {
	at, wired := wirePoints[w.point.name]
	wired = wired && bytes.Contains(messages, []byte(at.sql))
	if wired && at.before {
		w.point.reached(w.point.name)
	}
	n, err := w.Writer.Write(messages)
	if err == nil && wired && !at.before {
		w.point.reached(w.point.name)
	}
	if err == nil && executes(messages) && w.batch.Swap(false) {
		w.point.reached(crashpoint.ReaperBatch)
	}
	return n, err
}

// executes reports whether messages, which are whole messages of protocol version 3, contain one
// that executes a statement: Execute or Query. Parse and Describe come earlier.
func executes(messages []byte) bool {
	for len(messages) >= 5 {
		if messages[0] == 'E' || messages[0] == 'Q' {
			return true
		}
		length := 1 + int(binary.BigEndian.Uint32(messages[1:]))
		if length < 5 || length > len(messages) {
			return false
		}
		messages = messages[length:]
	}
	return false
}
