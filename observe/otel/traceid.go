package otelobserve

import (
	"context"
	"net/http"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

// TraceID names the trace of a request for its record: pass it as middleware.Options.TraceID. It is [TraceIDFrom] of the
// request's context, whose span is the server's where the middleware is mounted inside otelhttp, or else of the span that the client
// sent (traceparent, W3C Trace Context); empty where there is none.
func TraceID(r *http.Request) string {
	if id := TraceIDFrom(r.Context()); id != "" {
		return id
	}
	return TraceIDFrom(propagation.TraceContext{}.Extract(r.Context(), propagation.HeaderCarrier(r.Header)))
}

// TraceIDFrom names the trace of a context for idempotency.Request.TraceID: a traceparent, version 00, of the context's span,
// and empty where there is none. Its 55 characters hold what a link needs, which a trace's id alone does not.
func TraceIDFrom(ctx context.Context) string {
	span := trace.SpanContextFromContext(ctx)
	if !span.IsValid() {
		return ""
	}
	return "00-" + span.TraceID().String() + "-" + span.SpanID().String() + "-" + span.TraceFlags().String()
}

// original reads what was recorded as the trace of an attempt: a traceparent, or the bare id of a trace, for which span has
// no id. Everything else is not ok, and shown nowhere.
func original(recorded string) (span trace.SpanContext, ok bool) {
	if id, err := trace.TraceIDFromHex(recorded); err == nil {
		return trace.NewSpanContext(trace.SpanContextConfig{TraceID: id, Remote: true}), true
	}
	carrier := propagation.MapCarrier{"traceparent": recorded}
	span = trace.SpanContextFromContext(propagation.TraceContext{}.Extract(context.Background(), carrier))
	return span, span.IsValid()
}

// link leads from a replay's span to the original attempt. Of a bare id there is the attribute alone: a link to no span
// is dropped on its way, or worse, not.
func link(span trace.Span, recorded string) {
	to, ok := original(recorded)
	if !ok {
		return
	}
	span.SetAttributes(attributeOriginalTrace.String(to.TraceID().String()))
	if to.HasSpanID() {
		span.AddLink(trace.Link{SpanContext: to, Attributes: []attribute.KeyValue{attribute.String("idempotency.link", "original")}})
	}
}
