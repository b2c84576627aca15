package otelobserve

import (
	"context"
	"strings"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/observe"
	"github.com/paidonce/idempotency/observe/lostkey"
)

// Name is the instrumentation scope of the spans and metrics.
const Name = "github.com/paidonce/idempotency/observe/otel"

// Attributes. Those of HTTP have the names of OpenTelemetry's semantic conventions.
const (
	attributeOutcome       = attribute.Key("idempotency.outcome")
	attributeReason        = attribute.Key("idempotency.reason")
	attributeAttempts      = attribute.Key("idempotency.attempts")
	attributeAttempt       = attribute.Key("idempotency.attempt")
	attributeResolved      = attribute.Key("idempotency.resolved")
	attributeStep          = attribute.Key("idempotency.step")
	attributeOriginalTrace = attribute.Key("idempotency.original.trace_id")
	attributeAfter         = attribute.Key("idempotency.after_seconds")
	attributeEffect        = attribute.Key("idempotency.effect.name")
	attributeResult        = attribute.Key("idempotency.effect.result")
	attributeSent          = attribute.Key("idempotency.effect.sent")
	attributeDrift         = attribute.Key("idempotency.effect.drift")
	attributeRoute         = attribute.Key("http.route")
	attributeMethod        = attribute.Key("http.request.method")
	attributeStatus        = attribute.Key("http.response.status_code")
	attributeError         = attribute.Key("error.type")
)

// Options tune a [Tracer]. Nil and the zero value are the defaults.
type Options struct {
	// TracerProvider and MeterProvider receive spans and metrics. Default to the global ones.
	TracerProvider trace.TracerProvider
	MeterProvider  metric.MeterProvider

	// LostKeys tune the detector of clients that lose their keys. OnLost is called after the
	// finding was counted.
	LostKeys lostkey.Options

	// WithoutLostKeys disables the detector, for example if observe/prometheus already has one.
	WithoutLostKeys bool
}

// Tracer makes spans and metrics from the engine's events. It is safe for concurrent use.
type Tracer struct {
	tracer   trace.Tracer
	metrics  *instruments
	detector *lostkey.Detector // nil if disabled
}

var (
	_ idempotency.Tracer       = (*Tracer)(nil)
	_ idempotency.WaitTracer   = (*Tracer)(nil)
	_ idempotency.EffectTracer = (*Tracer)(nil)
)

// New returns a tracer. It panics if the meter refuses an instrument.
func New(opts *Options) *Tracer {
	var o Options
	if opts != nil {
		o = *opts
	}
	if o.TracerProvider == nil {
		o.TracerProvider = otel.GetTracerProvider()
	}
	if o.MeterProvider == nil {
		o.MeterProvider = otel.GetMeterProvider()
	}
	t := &Tracer{tracer: o.TracerProvider.Tracer(Name), metrics: newInstruments(o.MeterProvider.Meter(Name))}
	if !o.WithoutLostKeys {
		onLost := o.LostKeys.OnLost
		o.LostKeys.OnLost = func(ctx context.Context, event lostkey.Event) {
			t.metrics.lost.Add(ctx, 1, metric.WithAttributes(attributeRoute.String(pathOf(event.Route))))
			spanOf(ctx).AddEvent("idempotency.lost_key", trace.WithAttributes(attributeAfter.Float64(event.After.Seconds())))
			if onLost != nil {
				onLost(ctx, event)
			}
		}
		t.detector = lostkey.New(&o.LostKeys)
	}
	return t
}

// spanKey finds the request's span in its context: the current span may be another tracer's.
type spanKey struct{}

func spanOf(ctx context.Context) trace.Span {
	if span, ok := ctx.Value(spanKey{}).(trace.Span); ok {
		return span
	}
	return trace.SpanFromContext(ctx)
}

// methodOf and pathOf split a route as net/http's ServeMux writes it, or as chi does, without the
// method.
func methodOf(route string) string {
	if method, _, ok := strings.Cut(route, " "); ok {
		return method
	}
	return ""
}

func pathOf(route string) string {
	if _, path, ok := strings.Cut(route, " "); ok {
		return path
	}
	return route
}

// TraceRequestStart implements [idempotency.Tracer]. The handler's spans are children of the
// request's.
func (t *Tracer) TraceRequestStart(ctx context.Context, start idempotency.RequestStart) context.Context {
	ctx, span := t.tracer.Start(ctx, "idempotency", trace.WithSpanKind(trace.SpanKindInternal))
	ctx = context.WithValue(ctx, spanKey{}, span)
	if span.IsRecording() {
		if path := pathOf(start.Route); path != "" {
			span.SetAttributes(attributeRoute.String(path))
		}
		if method := methodOf(start.Route); method != "" {
			span.SetAttributes(attributeMethod.String(method))
		}
	}
	t.metrics.active.Add(ctx, 1)
	if t.detector != nil {
		t.detector.TraceRequestStart(ctx, start)
	}
	return ctx
}

// TraceWaitStart implements [idempotency.WaitTracer].
func (t *Tracer) TraceWaitStart(ctx context.Context) { t.metrics.waiting.Add(ctx, 1) }

// TraceStep implements [idempotency.Tracer]. It is called when a step has ended, so it makes the
// span then, with the step's times. The handler's own spans are its siblings, below the request's.
func (t *Tracer) TraceStep(ctx context.Context, step idempotency.StepEnd) {
	if step.Step == idempotency.StepWait {
		t.metrics.waiting.Add(ctx, -1)
	}
	kind := observe.ErrorKind(step.Err)
	t.metrics.step(ctx, step, kind)
	parent := spanOf(ctx)
	if !parent.IsRecording() {
		return
	}
	_, span := t.tracer.Start(trace.ContextWithSpan(ctx, parent), "idempotency "+string(step.Step), trace.WithTimestamp(step.Started),
		trace.WithSpanKind(trace.SpanKindInternal), trace.WithAttributes(attributeStep.String(string(step.Step))))
	if kind != "" {
		span.SetAttributes(attributeError.String(kind))
	}
	if isFailure(step.Err, kind) {
		span.SetStatus(codes.Error, kind)
	}
	span.End(trace.WithTimestamp(step.Started.Add(step.Duration)))
}

// isFailure distinguishes an operator's errors from normal results of a claim.
func isFailure(err error, kind string) bool {
	switch kind {
	case observe.ErrorKind(idempotency.ErrInProgress), observe.ErrorKind(idempotency.ErrKeyRecorded):
		return false
	}
	return err != nil
}

// TraceRequestEnd implements [idempotency.Tracer].
func (t *Tracer) TraceRequestEnd(ctx context.Context, end idempotency.RequestEnd) {
	t.metrics.active.Add(ctx, -1)
	t.metrics.end(ctx, end)
	span := spanOf(ctx)
	if span.IsRecording() {
		t.describe(span, end)
	}
	span.End(trace.WithTimestamp(end.Started.Add(end.Duration)))
}

func (t *Tracer) describe(span trace.Span, end idempotency.RequestEnd) {
	result := end.Result
	span.SetAttributes(attributeOutcome.String(string(observe.Outcome(end))), attributeAttempts.Int(end.Attempts))
	if !end.Attempt.IsZero() {
		span.SetAttributes(attributeAttempt.String(end.Attempt.String()))
	}
	if result.Reason != "" {
		span.SetAttributes(attributeReason.String(string(result.Reason)))
	}
	if end.Resolved {
		span.SetAttributes(attributeResolved.Bool(true))
	}
	if result.Answer != nil {
		span.SetAttributes(attributeStatus.Int(result.Answer.Status))
	}
	failed := result.Reason
	switch {
	case result.Outcome == idempotency.OutcomeUnknown && failed == "":
		// The handler answered after it had called DerivedKey.
		failed = idempotency.ReasonCallUnknown
	case result.Outcome != idempotency.OutcomeUnknown && result.Outcome != idempotency.OutcomeNotExecuted:
		failed = ""
	}
	if failed != "" {
		span.SetStatus(codes.Error, string(failed))
		span.SetAttributes(attributeError.String(string(failed)))
	}
	if result.Record != nil && result.Outcome == idempotency.OutcomeReplayed {
		link(span, result.Record.TraceID)
	}
}

// TraceEffect implements [idempotency.EffectTracer]: an event of the request's span.
func (t *Tracer) TraceEffect(ctx context.Context, end idempotency.EffectEnd) {
	of := []attribute.KeyValue{
		attributeEffect.String(end.Name), attributeResult.String(string(end.Result)), attributeSent.Bool(end.Sent), attributeDrift.Bool(end.Drift),
	}
	t.metrics.effects.Add(ctx, 1, metric.WithAttributes(of...))
	spanOf(ctx).AddEvent("idempotency.effect", trace.WithAttributes(of...))
}

// TraceRefused implements [idempotency.Tracer]: an event of the span that the request's context
// has, if any.
func (t *Tracer) TraceRefused(ctx context.Context, refused idempotency.Refused) {
	t.metrics.refused.Add(ctx, 1, metric.WithAttributes(attributeReason.String(string(refused.Reason))))
	trace.SpanFromContext(ctx).AddEvent("idempotency.refused", trace.WithAttributes(
		attributeReason.String(string(refused.Reason)), attributeStatus.Int(refused.Status)))
}
