package promobserve_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/paidonce/idempotency/middleware"
	promobserve "github.com/paidonce/idempotency/observe/prometheus"
	"github.com/paidonce/idempotency/storage/memory"
	"github.com/paidonce/idempotency/storage/postgres"
)

// A retry, counted by its route.
func ExampleNew() {
	registry := prometheus.NewRegistry()
	account := func(*http.Request) (string, error) { return "acme", nil }
	idem := middleware.New(memory.New(nil), account, &middleware.Options{
		Tracer: promobserve.New(registry, nil),
	})
	mux := http.NewServeMux()
	mux.Handle("POST /transfers", idem.Handler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusCreated) })))
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))

	for range 3 {
		r := httptest.NewRequest(http.MethodPost, "/transfers", strings.NewReader(`{"amount":1250}`))
		r.Header.Set("Idempotency-Key", "8e03978e")
		mux.ServeHTTP(httptest.NewRecorder(), r)
	}
	w := httptest.NewRecorder()
	mux.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	for line := range strings.Lines(w.Body.String()) {
		if strings.HasPrefix(line, "idempotency_duplicates_total") || strings.HasPrefix(line, `idempotency_requests_total{outcome="executed"`) {
			fmt.Print(line)
		}
	}
	// Output:
	// idempotency_duplicates_total{outcome="in-progress",route="POST /transfers"} 0
	// idempotency_duplicates_total{outcome="replayed",route="POST /transfers"} 2
	// idempotency_requests_total{outcome="executed",reason=""} 1
}

// The pool's connections and the table's records, beside the engine's metrics.
func ExampleNewRecordsCollector() {
	serve := func(ctx context.Context, store *postgres.Store) {
		metrics := promobserve.New(prometheus.DefaultRegisterer, nil)
		prometheus.MustRegister(promobserve.NewPoolCollector(store.Pool().Stat), promobserve.NewRecordsCollector(store.Statistics, nil))
		postgres.NewReaper(store, &postgres.ReaperOptions{OnWalk: metrics.OnWalk}).Run(ctx)
	}
	_ = serve
	// Output:
}
