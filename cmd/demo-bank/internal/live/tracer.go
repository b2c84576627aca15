package live

import (
	"context"
	"time"

	"github.com/paidonce/idempotency"
)

// Tracer returns a tracer that reports the outcome of each request to the page. It skips requests
// of the page's own storm: the storm reports those, in more detail.
func (l *Live) Tracer() idempotency.Tracer { return tracer{l} }

type tracer struct{ live *Live }

// TraceRequestStart implements [idempotency.Tracer].
func (tracer) TraceRequestStart(ctx context.Context, _ idempotency.RequestStart) context.Context {
	return ctx
}

// TraceStep implements [idempotency.Tracer].
func (tracer) TraceStep(context.Context, idempotency.StepEnd) {}

// TraceRequestEnd implements [idempotency.Tracer].
func (t tracer) TraceRequestEnd(ctx context.Context, end idempotency.RequestEnd) {
	if markedFrom(ctx) != nil {
		return
	}
	hash := end.Key.String() // never the key itself
	dot := dotOf(end.Result.Outcome)
	t.live.board.attempt(time.Now(), Protected, hash, hash[:6], dot, dot)
}

// TraceRefused implements [idempotency.Tracer].
func (t tracer) TraceRefused(ctx context.Context, _ idempotency.Refused) {
	if markedFrom(ctx) == nil {
		t.live.board.attempt(time.Now(), Protected, "refused", "refused", DotFailed, DotFailed)
	}
}
