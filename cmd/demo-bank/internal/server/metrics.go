package server

import (
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/paidonce/idempotency"
	promobserve "github.com/paidonce/idempotency/observe/prometheus"
	"github.com/paidonce/idempotency/storage/postgres"
)

// metrics are the bank's Prometheus metrics: those of the engine, its pool, its tables, the
// relay, the consumers and the process. No label ever contains a key, scope or body.
type metrics struct {
	*promobserve.Tracer
	messages *promobserve.Messages
	registry *prometheus.Registry
}

// newMetrics returns metrics that start at zero. handlerTimeout is that of the engine; zero means
// the engine's default.
func newMetrics(handlerTimeout time.Duration) *metrics {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return &metrics{
		Tracer:   promobserve.New(registry, &promobserve.Options{Timeouts: idempotency.Timeouts{Handler: handlerTimeout}}),
		messages: promobserve.NewMessages(registry),
		registry: registry,
	}
}

// handler returns the handler of scrapes.
func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{Registry: m.registry})
}

// observe registers metrics of the pool's connections and the store's tables. Call it once.
func (m *metrics) observe(store *postgres.Store) {
	options := &promobserve.RecordsOptions{Timeout: time.Second} // a scrape must not be late
	m.registry.MustRegister(promobserve.NewPoolCollector(store.Pool().Stat), promobserve.NewRecordsCollector(store.Statistics, options),
		promobserve.NewOpenCollector(store.OpenStatistics, options),
		promobserve.NewMessagesCollector(store.MessageStatistics, options))
}
