package otelobserve

import (
	"context"
	"net/http"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

// TraceID returns the trace of a request for its record: pass it as middleware.Options.TraceID. It
// is [TraceIDFrom] of the request's context, with the server's span if the middleware is mounted
// inside otelhttp. Otherwise it is the span that the client sent (traceparent, W3C Trace Context),
// or empty if there is none.
func TraceID(r *http.Request) string {
	if id := TraceIDFrom(r.Context()); id != "" {
		return id
	}
	return TraceIDFrom(propagation.TraceContext{}.Extract(r.Context(), propagation.HeaderCarrier(r.Header)))
}

// TraceIDFrom returns the trace of a context for idempotency.Request.TraceID: a traceparent,
// version 00, of the context's span, or empty if there is none. Its 55 characters contain all that
// a link needs; a bare trace id does not.
func TraceIDFrom(ctx context.Context) string {
	span := trace.SpanContextFromContext(ctx)
	if !span.IsValid() {
		return ""
	}
	return "00-" + span.TraceID().String() + "-" + span.SpanID().String() + "-" + span.TraceFlags().String()
}

// original parses the recorded trace of an attempt: a traceparent, or the bare id of a trace. For a
// bare id, the result has no span id. For anything else ok is false, and the text must not be
// shown.
func original(recorded string) (span trace.SpanContext, ok bool) {
	if id, err := trace.TraceIDFromHex(recorded); err == nil {
		return trace.NewSpanContext(trace.SpanContextConfig{TraceID: id, Remote: true}), true
	}
	carrier := propagation.MapCarrier{"traceparent": recorded}
	span = trace.SpanContextFromContext(propagation.TraceContext{}.Extract(context.Background(), carrier))
	return span, span.IsValid()
}

// link links a replay's span to the original attempt. For a bare id there is only the attribute: an
// exporter may drop a link without a span, or worse, pass it on.
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
