package server

import (
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	promobserve "github.com/paidonce/idempotency/observe/prometheus"
	"github.com/paidonce/idempotency/storage/postgres"
)

// metrics are what the bank shows to Prometheus: the engine's metrics, its pool's and its table's, and those of the process. No
// key, scope or body is ever a label.
type metrics struct {
	*promobserve.Tracer
	registry *prometheus.Registry
}

// newMetrics returns metrics that count from zero. handlerTimeout is the engine's; zero is its default.
func newMetrics(handlerTimeout time.Duration) *metrics {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return &metrics{
		Tracer:   promobserve.New(registry, &promobserve.Options{HandlerTimeout: handlerTimeout}),
		registry: registry,
	}
}

// handler answers a scrape.
func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{Registry: m.registry})
}

// observe shows the pool's connections and the store's table. Call it once.
func (m *metrics) observe(store *postgres.Store) {
	m.registry.MustRegister(promobserve.NewPoolCollector(store.Pool().Stat), promobserve.NewRecordsCollector(
		store.Statistics, &promobserve.RecordsOptions{Timeout: time.Second})) // a scrape must not be late
}
