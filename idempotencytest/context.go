package idempotencytest

import (
	"context"
	"fmt"
	"io"
	"sync/atomic"
	"time"
)

// tripwire is a context that ends when it is used for the at-th time. Code that waits, looks up a
// value or reads the deadline uses it. So every step of a handler that passes its context on can be
// its last, without a clock.
type tripwire struct {
	context.Context
	cancel context.CancelFunc
	uses   atomic.Int64
	at     int64       // 0: never
	trip   func() bool // called once: reports whether the context must end
	armed  atomic.Bool
}

func newTripwire(ctx context.Context, at int64, trip func() bool) *tripwire {
	w := &tripwire{at: at, trip: trip}
	w.Context, w.cancel = context.WithCancel(ctx)
	w.armed.Store(at > 0)
	return w
}

func (w *tripwire) use() {
	if w.uses.Add(1) == w.at && w.armed.CompareAndSwap(true, false) && w.trip() {
		w.cancel()
	}
}

// disarm keeps the context from ending from now on, and reports whether it had been tripped.
func (w *tripwire) disarm() (tripped bool) {
	return w.at > 0 && !w.armed.CompareAndSwap(true, false)
}

// String returns only the context's name. The contexts below it belong to other packages, which may
// change them meanwhile.
func (*tripwire) String() string { return "idempotencytest.tripwire" }

// Format keeps the contexts below out of every verb of fmt. It drops the error, for which
// fmt has no use.
func (w *tripwire) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, w.String()) }

// Deadline implements context.Context.
func (w *tripwire) Deadline() (time.Time, bool) { w.use(); return w.Context.Deadline() }

// Done implements context.Context.
func (w *tripwire) Done() <-chan struct{} { w.use(); return w.Context.Done() }

// Err implements context.Context.
func (w *tripwire) Err() error { w.use(); return w.Context.Err() }

// Value implements context.Context.
func (w *tripwire) Value(key any) any { w.use(); return w.Context.Value(key) }
