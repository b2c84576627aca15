// Package otelobserve makes spans and metrics of what the idempotency engine does, by the API of OpenTelemetry.
//
//	idem := middleware.New(store, account, &middleware.Options{
//		Tracer: otelobserve.New(nil),
//		TraceID: otelobserve.TraceID,
//	})
//	handler := otelhttp.NewHandler(idem.Handler(transfer), "transfer") // otelhttp outside: its span is the server's
//
// A request is one span, named idempotency, below whatever span its context has, and above those that the handler makes. Its
// steps are spans below it: claim, handler, commit and so on, with their own times. A replay's span is linked to the span
// that [TraceID] recorded with the original attempt.
//
// No key, scope, header or body, and no error's text, is in an attribute.
package otelobserve
