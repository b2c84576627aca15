// Package history writes how requests ended into the table idempotency_events, so that the timeline of a key shows its
// retries too: a replay writes nothing of its own.
//
//	h := history.New(store, nil)
//	defer h.Close(ctx) // after the server has stopped
//	idem := middleware.New(store, accountID, &middleware.Options{Tracer: h})
//
// It is opt-in, and off the path of a request: a request puts its end into a queue in memory and goes on; one goroutine writes what is
// in the queue, once a second or when it is half full. Where the database is slow or away the queue fills, and what does
// not fit is dropped and counted. So some ends may be missing, those of the last second of a process that is killed for
// one: nothing must rest on them. Migration 3 makes the table, and operator.GC (idemctl gc) keeps it from growing for ever.
//
// The table holds scopes and keys as they are, as that of the records does. Each event costs about 250 bytes of it and of
// its indexes.
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

	// Interval is how long an event waits for others at most. Defaults to 1 second.
	Interval time.Duration

	// WriteTimeout is how long one write may take, the wait for a connection included. Events that
	// can't be written in that time are dropped. Defaults to 5 seconds.
	WriteTimeout time.Duration

	// Keep reports whether a request is worth a row. It is called from the goroutines of the requests. Nil keeps all of those
	// with a key; one without is never kept.
	Keep func(end idempotency.RequestEnd) bool

	// OnError is told of writes that failed, and of how many events were lost by it. Nil logs them to slog.Default().
	OnError func(err error, lost int)
}

// Stats say what became of the events of a [History] so far.
type Stats struct {
	Written int64
	Dropped int64 // there was no room in the queue
	Lost    int64 // a write failed, or its outcome is not known
}

// History is a tracer that writes how requests ended. It is safe for concurrent use.
type History struct {
	pool    *pgxpool.Pool
	options Options
	table   pgx.Identifier
	begin   func()

	queue  chan event
	half   chan struct{} // the queue is half full
	closed chan struct{} // Close was called
	ended  chan struct{} // everything is written

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

// New returns a history that writes through the store's pool: it takes one connection at a time, and
// never in a request. It starts its goroutine with the first request, and [History.Close] ends it.
// It panics if the store is nil or the options can't work.
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

// Stats returns what became of the events so far.
func (h *History) Stats() Stats {
	return Stats{Written: h.written.Load(), Dropped: h.dropped.Load(), Lost: h.lost.Load()}
}

// Close writes what is in the queue and ends the goroutine. Events that come later are dropped: call it when no request
// is in flight any more. It returns when everything is settled, or with ctx's error where that ends first. It may be
// called again.
func (h *History) Close(ctx context.Context) error {
	h.closing.Do(func() { close(h.closed) })
	h.begin() // where no request came
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
	if data.Result.Record != nil { // the attempt whose answer is repeated
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
		default: // it knows
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

// batchMax is how many events one COPY writes.
const batchMax = 1000

var columns = []string{"at", "duration_us", "outcome", "reason", "attempts", "attempt_id", "scope", "key", "trace_id"}

// write writes a batch, by COPY, or loses it: one that is tried again may be written twice.
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

// sqlError returns err fit for a log: the server's message may quote a key.
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
