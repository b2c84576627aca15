package live

import (
	"context"
	"time"

	"github.com/paidonce/idempotency"
)

// Trace returns a tracer that tells next everything, and the page what became of each request. Requests of the page's
// own storm are left to the storm, which knows more of them.
func (l *Live) Trace(next idempotency.Tracer) idempotency.Tracer { return &tracer{next, l} }

type tracer struct {
	idempotency.Tracer
	live *Live
}

// TraceRequestEnd implements [idempotency.Tracer].
func (t *tracer) TraceRequestEnd(ctx context.Context, end idempotency.RequestEnd) {
	t.Tracer.TraceRequestEnd(ctx, end)
	if markedFrom(ctx) != nil {
		return
	}
	hash := end.Key.String() // never the key itself
	dot := dotOf(end.Result.Outcome)
	t.live.board.attempt(time.Now(), Protected, hash, hash[:6], dot, dot)
}

// TraceRefused implements [idempotency.Tracer].
func (t *tracer) TraceRefused(ctx context.Context, refused idempotency.Refused) {
	t.Tracer.TraceRefused(ctx, refused)
	if markedFrom(ctx) == nil {
		t.live.board.attempt(time.Now(), Protected, "refused", "refused", DotFailed, DotFailed)
	}
}
