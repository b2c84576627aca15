package observe

import (
	"context"
	"log/slog"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/observe/lostkey"
)

// Log is a tracer that writes events: the outcome of each request, failed steps, refusals. The
// middleware's own Logger only gets events that need an operator; this one writes all of them, most
// at [slog.LevelDebug]. It is safe for concurrent use.
//
// Events that need attention are at [slog.LevelWarn]: mismatches, lost COMMITs that were looked up,
// replays that were denied, failed handlers, a store that is unavailable, unknown outcomes, lost
// keys. Events contain route, outcome, reason, kinds of errors, durations and the attempt's id, by
// which a record can be found; never a key, a scope, a body or an error's text.
type Log struct{ logger *slog.Logger }

var _ idempotency.Tracer = (*Log)(nil)

// NewLog returns a tracer that writes to the logger. It panics if the logger is nil.
func NewLog(logger *slog.Logger) *Log {
	if logger == nil {
		panic("idempotency/observe: NewLog needs a logger")
	}
	return &Log{logger: logger}
}

// TraceRequestStart implements [idempotency.Tracer].
func (l *Log) TraceRequestStart(ctx context.Context, _ idempotency.RequestStart) context.Context {
	return ctx
}

// TraceStep implements [idempotency.Tracer].
func (l *Log) TraceStep(ctx context.Context, step idempotency.StepEnd) {
	level := slog.LevelDebug
	if step.Step == idempotency.StepResolve {
		level = slog.LevelWarn
	} else if step.Err == nil {
		return // the request's end says enough
	}
	if !l.logger.Enabled(ctx, level) {
		return
	}
	l.logger.LogAttrs(ctx, level, "idempotency: step", slog.String("step", string(step.Step)), slog.String("error", ErrorKind(step.Err)),
		slog.Duration("duration", step.Duration), slog.String("attempt", attempt(step.Attempt)))
}

// TraceRequestEnd implements [idempotency.Tracer].
func (l *Log) TraceRequestEnd(ctx context.Context, end idempotency.RequestEnd) {
	level := slog.LevelDebug
	switch {
	case end.Result.Outcome == idempotency.OutcomeMismatch, end.Result.Outcome == idempotency.OutcomeUnknown,
		end.Result.Outcome == idempotency.OutcomeNotExecuted && end.Result.Reason != "", end.Resolved:
		level = slog.LevelWarn
	}
	if !l.logger.Enabled(ctx, level) {
		return
	}
	l.logger.LogAttrs(ctx, level, "idempotency: request settled", slog.String("route", end.Route), slog.String("outcome", string(Outcome(end))),
		slog.String("reason", string(end.Result.Reason)), slog.String("error", ErrorKind(end.Result.Err)), slog.Bool("resolved", end.Resolved),
		slog.Duration("duration", end.Duration), slog.Int("attempts", end.Attempts), slog.String("attempt", attempt(end.Attempt)))
}

// TraceRefused implements [idempotency.Tracer].
func (l *Log) TraceRefused(ctx context.Context, refused idempotency.Refused) {
	level := slog.LevelDebug
	switch refused.Reason {
	case idempotency.ReasonReplayDenied, idempotency.ReasonRecordCorrupt:
		level = slog.LevelWarn
	}
	l.logger.LogAttrs(ctx, level, "idempotency: request refused", slog.String("route", refused.Route), slog.String("reason", string(refused.Reason)),
		slog.Int("status", refused.Status))
}

// LostKey writes a detector's finding; pass it as [lostkey.Options.OnLost].
func (l *Log) LostKey(ctx context.Context, event lostkey.Event) {
	l.logger.LogAttrs(ctx, slog.LevelWarn, "idempotency: the same request came with another key", slog.String("route", event.Route),
		slog.Duration("after", event.After.Round(time.Millisecond)))
}

// attempt returns an attempt's id as text, or "" if there was none.
func attempt(id idempotency.AttemptID) string {
	if id.IsZero() {
		return ""
	}
	return id.String()
}
