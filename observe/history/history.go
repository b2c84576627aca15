// Package history writes the ends of requests into the table idempotency_events, so that the
// timeline of a key shows its retries too: a replay itself writes nothing.
//
//	h := history.New(store, nil)
//	defer h.Close(ctx) // after the server has stopped
//	idem := middleware.New(store, accountID, &middleware.Options{Tracer: h})
//
// It is opt-in, and does not delay requests. A request adds its end to a queue in memory and goes
// on; one goroutine writes the queue, once a second or when it is half full. If the database is
// slow or away the queue fills, and further events are dropped and counted. So events can be
// missing, for example those of the last second of a process that is killed: nothing may depend on
// them. Migration 3 makes the table, and operator.GC (idemctl gc) deletes old rows.
//
// The table contains scopes and keys unchanged, as the table of records does. Each event takes
// about 250 bytes of the table and its indexes.
package history

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
)

// TableName is the name of the table, in the store's schema.
const TableName = "idempotency_events"

// Store is a database and the schema in it that has the table: a *postgres.Store.
type Store interface {
	Pool() *pgxpool.Pool
	Schema() string
}

// Options tune a [History]. Nil and the zero value are the defaults.
type Options struct {
	// QueueMax is the maximum number of events that wait in memory, each of up to 1 kB. Further
	// events are dropped, and counted in [Stats.Dropped]. Defaults to 10,000.
	QueueMax int

	// Interval is the maximum time that an event waits for others. Defaults to 1 second.
	Interval time.Duration

	// WriteTimeout is the maximum duration of one write, including the wait for a connection.
	// Events that can't be written in that time are dropped. Defaults to 5 seconds.
	WriteTimeout time.Duration

	// Keep reports whether to write a request's event. It must be safe for concurrent use. Nil
	// keeps all requests with a key; one without is never kept.
	Keep func(end idempotency.RequestEnd) bool

	// OnError is called with the error of a failed write, and the number of events lost by it. Nil
	// logs them to slog.Default().
	OnError func(err error, lost int)
}

// Stats are counts of the events of a [History] so far.
type Stats struct {
	Written int64
	Dropped int64 // the queue was full
	Lost    int64 // a write failed, or its outcome is unknown
}

// History is a tracer that writes the ends of requests. It is safe for concurrent use.
type History struct {
	pool    *pgxpool.Pool
	options Options
	table   pgx.Identifier
	begin   func()

	queue  chan event
	half   chan struct{} // the queue is half full
	closed chan struct{} // Close was called
	ended  chan struct{} // all events are written

	closing                sync.Once
	written, dropped, lost atomic.Int64
}

var _ idempotency.Tracer = (*History)(nil)

// event is one row.
type event struct {
	at       time.Time
	duration time.Duration
	outcome  idempotency.Outcome
	reason   idempotency.Reason
	attempts int
	attempt  idempotency.AttemptID
	key      idempotency.Key
	traceID  string
}

// New returns a history that writes through the store's pool: it takes one connection at a time,
// and never in a request. The first request starts its goroutine, and [History.Close] ends it. New
// panics if the store is nil or an option is invalid.
func New(store Store, opts *Options) *History {
	if store == nil {
		panic("idempotency/history: New needs a store")
	}
	var o Options
	if opts != nil {
		o = *opts
	}
	o.QueueMax = cmp.Or(o.QueueMax, 10_000)
	o.Interval = cmp.Or(o.Interval, time.Second)
	o.WriteTimeout = cmp.Or(o.WriteTimeout, 5*time.Second)
	if o.QueueMax < 1 || o.Interval < 0 || o.WriteTimeout < 0 {
		panic(fmt.Sprintf("idempotency/history: Options.QueueMax is %d, Interval %v, WriteTimeout %v: they must be positive", o.QueueMax, o.Interval, o.WriteTimeout))
	}
	if o.OnError == nil {
		o.OnError = func(err error, lost int) {
			slog.Warn("idempotency: the history of requests is not written", "lost", lost, "error", err)
		}
	}
	h := &History{
		pool: store.Pool(), options: o, table: pgx.Identifier{store.Schema(), TableName},
		queue: make(chan event, o.QueueMax), half: make(chan struct{}, 1), closed: make(chan struct{}), ended: make(chan struct{}),
	}
	h.begin = sync.OnceFunc(func() { go h.run() })
	return h
}

// Stats returns the counts so far.
func (h *History) Stats() Stats {
	return Stats{Written: h.written.Load(), Dropped: h.dropped.Load(), Lost: h.lost.Load()}
}

// Close writes the queue and ends the goroutine. Call it when no request is in flight any more:
// later events are dropped. It returns when the queue is settled, or with ctx's error if that ends
// first. It may be called again.
func (h *History) Close(ctx context.Context) error {
	h.closing.Do(func() { close(h.closed) })
	h.begin() // if there was no request
	select {
	case <-h.ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("history: close: %w", ctx.Err())
	}
}

type traceIDKey struct{}

// TraceRequestStart implements [idempotency.Tracer].
func (h *History) TraceRequestStart(ctx context.Context, data idempotency.RequestStart) context.Context {
	if data.TraceID == "" {
		return ctx
	}
	return context.WithValue(ctx, traceIDKey{}, data.TraceID)
}

// TraceStep implements [idempotency.Tracer].
func (h *History) TraceStep(context.Context, idempotency.StepEnd) {}

// TraceRefused implements [idempotency.Tracer].
func (h *History) TraceRefused(context.Context, idempotency.Refused) {}

// TraceRequestEnd implements [idempotency.Tracer]. It never waits.
func (h *History) TraceRequestEnd(ctx context.Context, data idempotency.RequestEnd) {
	if data.Key.Value == "" || h.options.Keep != nil && !h.options.Keep(data) {
		return
	}
	e := event{
		at: data.Started.Add(data.Duration), duration: data.Duration, outcome: data.Result.Outcome, reason: data.Result.Reason,
		attempts: data.Attempts, attempt: data.Attempt, key: data.Key,
	}
	if data.Result.Record != nil { // the attempt that recorded the answer
		e.attempt = data.Result.Record.Attempt
	}
	e.traceID, _ = ctx.Value(traceIDKey{}).(string)
	select {
	case <-h.closed:
		h.dropped.Add(1)
		return
	default:
	}
	h.begin()
	select {
	case h.queue <- e:
	default:
		h.dropped.Add(1)
		return
	}
	if 2*len(h.queue) >= cap(h.queue) {
		select {
		case h.half <- struct{}{}:
		default: // it is already signaled
		}
	}
}

// run writes until Close.
func (h *History) run() {
	defer close(h.ended)
	timer := time.NewTimer(h.options.Interval)
	defer timer.Stop()
	for open := true; open; {
		select {
		case <-h.closed:
			open = false
		case <-h.half:
		case <-timer.C:
		}
		for n := len(h.queue); n > 0; n = len(h.queue) {
			batch := make([]event, 0, min(n, batchMax))
			for range cap(batch) {
				batch = append(batch, <-h.queue)
			}
			h.write(batch)
		}
		timer.Reset(h.options.Interval)
	}
}

// batchMax is the maximum number of events in one COPY.
const batchMax = 1000

var columns = []string{"at", "duration_us", "outcome", "reason", "attempts", "attempt_id", "scope", "key", "trace_id"}

// write writes a batch by COPY, or loses it: a second try might write it twice.
func (h *History) write(batch []event) {
	ctx, cancel := context.WithTimeout(context.Background(), h.options.WriteTimeout)
	defer cancel()
	written, err := h.pool.CopyFrom(ctx, h.table, columns, pgx.CopyFromSlice(len(batch), func(i int) ([]any, error) {
		e := &batch[i]
		row := []any{e.at, e.duration.Microseconds(), string(e.outcome), nil, int32(min(e.attempts, 1<<30)), nil, e.key.Scope, e.key.Value, nil}
		if e.reason != "" {
			row[3] = string(e.reason)
		}
		if !e.attempt.IsZero() {
			row[5] = [16]byte(e.attempt)
		}
		if e.traceID != "" {
			row[8] = e.traceID
		}
		return row, nil
	}))
	if err != nil {
		h.lost.Add(int64(len(batch)))
		h.options.OnError(fmt.Errorf("history: write: %w", sqlError(err)), len(batch))
		return
	}
	h.written.Add(written)
	if lost := len(batch) - int(written); lost > 0 { // COPY returns the number of rows that it wrote
		h.lost.Add(int64(lost))
		h.options.OnError(fmt.Errorf("history: write: a BEFORE trigger on %s drops rows: ALTER TABLE ... DISABLE TRIGGER", TableName), lost)
	}
}

// sqlError makes err safe to log: the server's message may quote a key.
func sqlError(err error) error {
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) {
		return err
	}
	text := "SQLSTATE " + pgErr.Code
	switch pgErr.Code {
	case "42P01", "3F000":
		text += ": the table " + TableName + " is missing: run the migrations"
	case "42501":
		text += ": GRANT INSERT ON " + TableName + " to the service's role"
	}
	return errors.New(text)
}
