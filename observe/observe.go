package observe

import (
	"context"
	"errors"

	"github.com/paidonce/idempotency"
)

// Join returns a tracer that calls each of the tracers, in order; each gets the context that the
// previous one returned. Nil tracers are left out. It returns nil if none is left, and a single
// tracer unchanged.
func Join(tracers ...idempotency.Tracer) idempotency.Tracer {
	var all joined
	for _, tracer := range tracers {
		if tracer != nil {
			all = append(all, tracer)
		}
	}
	switch len(all) {
	case 0:
		return nil
	case 1:
		return all[0]
	}
	return all
}

// joined are the tracers of one engine.
type joined []idempotency.Tracer

var (
	_ idempotency.Tracer       = joined(nil)
	_ idempotency.WaitTracer   = joined(nil)
	_ idempotency.EffectTracer = joined(nil)
)

func (j joined) TraceRequestStart(ctx context.Context, data idempotency.RequestStart) context.Context {
	for _, tracer := range j {
		ctx = tracer.TraceRequestStart(ctx, data)
	}
	return ctx
}

func (j joined) TraceWaitStart(ctx context.Context) {
	for _, tracer := range j {
		if waiter, ok := tracer.(idempotency.WaitTracer); ok {
			waiter.TraceWaitStart(ctx)
		}
	}
}

func (j joined) TraceEffect(ctx context.Context, data idempotency.EffectEnd) {
	for _, tracer := range j {
		if effects, ok := tracer.(idempotency.EffectTracer); ok {
			effects.TraceEffect(ctx, data)
		}
	}
}

func (j joined) TraceStep(ctx context.Context, data idempotency.StepEnd) {
	for _, tracer := range j {
		tracer.TraceStep(ctx, data)
	}
}

func (j joined) TraceRequestEnd(ctx context.Context, data idempotency.RequestEnd) {
	for _, tracer := range j {
		tracer.TraceRequestEnd(ctx, data)
	}
}

func (j joined) TraceRefused(ctx context.Context, data idempotency.Refused) {
	for _, tracer := range j {
		tracer.TraceRefused(ctx, data)
	}
}

// OutcomeDeclined is the outcome of a request with an answer that was recorded without its
// handler's writes. On the wire it is executed, like any other recorded answer.
const OutcomeDeclined idempotency.Outcome = "declined"

// Outcome returns the outcome of a request for metrics: its outcome on the wire, or
// [OutcomeDeclined].
func Outcome(end idempotency.RequestEnd) idempotency.Outcome {
	if end.Declined {
		return OutcomeDeclined
	}
	return end.Result.Outcome
}

// KindOther is the kind of an error that wraps none of the sentinels.
const KindOther = "other"

// kinds of errors, the most important first: an unknown outcome stays unknown whatever else the
// error wraps.
var kinds = []struct {
	err  error
	kind string
}{
	{idempotency.ErrRecordCorrupt, "record-corrupt"},
	{idempotency.ErrUnknown, "unknown"},
	{idempotency.ErrTransactionLost, "transaction-lost"},
	{idempotency.ErrKeyRecorded, "key-recorded"},
	{idempotency.ErrInProgress, "in-progress"},
	{idempotency.ErrNotSerializable, "serialization"},
	{idempotency.ErrUnavailable, "unavailable"},
	{idempotency.ErrAborted, "aborted"},
}

// ErrorKind returns a label for an error: the sentinel that it wraps, or [KindOther]; never its
// text. For nil it returns the empty string.
func ErrorKind(err error) string {
	if err == nil {
		return ""
	}
	for _, k := range kinds {
		if errors.Is(err, k.err) {
			return k.kind
		}
	}
	return KindOther
}
