// Package metrics is what the bank shows to Prometheus: the engine's metrics, its pool's and its table's, and those of the
// process. No key, scope or body is ever a label.
package metrics

import (
	"net/http"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	promobserve "github.com/paidonce/idempotency/observe/prometheus"
	"github.com/paidonce/idempotency/storage/postgres"
)

// Metrics is a registry of its own and a tracer that feeds it.
type Metrics struct {
	*promobserve.Tracer
	registry *prometheus.Registry
}

// New returns metrics that count from zero. handlerTimeout is the engine's; zero is its default.
func New(handlerTimeout time.Duration) *Metrics {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return &Metrics{
		Tracer:   promobserve.New(registry, &promobserve.Options{HandlerTimeout: handlerTimeout}),
		registry: registry,
	}
}

// Handler answers a scrape.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{Registry: m.registry})
}

// Observe shows the pool's connections and the store's table. Call it once.
func (m *Metrics) Observe(pool *pgxpool.Pool, store *postgres.Store) {
	m.registry.MustRegister(promobserve.NewPoolCollector(pool.Stat), promobserve.NewRecordsCollector(
		store.Statistics, &promobserve.RecordsOptions{Timeout: time.Second})) // a scrape must not be late
}
