// Package otelobserve makes spans and metrics of the idempotency engine's work, with
// OpenTelemetry's API.
//
//	idem := middleware.New(store, account, &middleware.Options{
//		Tracer: otelobserve.New(nil),
//		TraceID: otelobserve.TraceID,
//	})
//	handler := otelhttp.NewHandler(idem.Handler(transfer), "transfer") // otelhttp outside: its span is the server's
//
// Each request is one span, named idempotency. Its parent is the span of its context, and the
// handler's spans are its children. So are the spans of its steps: claim, handler, commit and so
// on, with their own times. A replay's span is linked to the span that [TraceID] recorded with the
// original attempt.
//
// No attribute contains a key, scope, header, body or an error's text.
package otelobserve
