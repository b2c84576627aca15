package otelobserve_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"

	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/paidonce/idempotency/middleware"
	otelobserve "github.com/paidonce/idempotency/observe/otel"
	"github.com/paidonce/idempotency/storage/memory"
)

// A request is a span with its steps below it, and a replay leads to the trace of the original
// attempt.
func ExampleNew() {
	exporter := tracetest.NewInMemoryExporter()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSyncer(exporter))
	defer func() { _ = provider.Shutdown(context.Background()) }()

	account := func(*http.Request) (string, error) { return "acme", nil }
	idem := middleware.New(memory.New(nil), account, &middleware.Options{
		Tracer:  otelobserve.New(&otelobserve.Options{TracerProvider: provider}),
		TraceID: otelobserve.TraceID,
	})
	handler := idem.Handler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusCreated) }))
	for _, traceparent := range []string{
		"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
	} {
		r := httptest.NewRequest(http.MethodPost, "/transfers", strings.NewReader("{}"))
		r.Header.Set("Idempotency-Key", "8e03978e")
		r.Header.Set("Traceparent", traceparent) // otelhttp, mounted outside, would make a span of it
		handler.ServeHTTP(httptest.NewRecorder(), r)
	}
	for _, span := range exporter.GetSpans() {
		fmt.Println(span.Name)
		for _, link := range span.Links {
			fmt.Println("  of", link.SpanContext.TraceID())
		}
	}
	// Output:
	// idempotency claim
	// idempotency handler
	// idempotency commit
	// idempotency
	// idempotency claim
	// idempotency
	//   of 4bf92f3577b34da6a3ce929d0e0e4736
}
