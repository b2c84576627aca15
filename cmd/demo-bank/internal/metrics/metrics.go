// Package metrics shows what the idempotency engine and the connection pool do to Prometheus. No key, scope or body is
// ever a label.
package metrics

import (
	"context"
	"errors"
	"net/http"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/paidonce/idempotency"
)

// Metrics is a registry of its own and a tracer that feeds it.
type Metrics struct {
	registry *prometheus.Registry

	requests *prometheus.CounterVec
	duration *prometheus.HistogramVec
	attempts prometheus.Counter
	inFlight prometheus.Gauge
	steps    *prometheus.HistogramVec
	failures *prometheus.CounterVec
	refused  *prometheus.CounterVec
	reaped   prometheus.Counter
}

var _ idempotency.Tracer = (*Metrics)(nil)

// secondsBuckets reach from a replay on a warm connection to the longest that a handler may take.
var secondsBuckets = []float64{.0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 20}

// New returns metrics that count from zero.
func New() *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "idempotency_requests_total",
			Help: "Requests that the engine settled, by what became of them and, where there was no answer, why.",
		}, []string{"outcome", "reason"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "idempotency_request_duration_seconds", Buckets: secondsBuckets,
			Help: "Time from the claim until everything about a request was settled.",
		}, []string{"outcome"}),
		attempts: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "idempotency_attempts_total",
			Help: "Claims that were begun. More than requests means serialization failures and lost races.",
		}),
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "idempotency_requests_in_flight",
			Help: "Requests in the engine now.",
		}),
		steps: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "idempotency_step_duration_seconds", Buckets: secondsBuckets,
			Help: "Time of each step of an attempt.",
		}, []string{"step"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "idempotency_step_failures_total",
			Help: "Steps that ended with an error, by its kind. A claim that found its key in progress is one.",
		}, []string{"step", "error"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "idempotency_refused_total",
			Help: "Requests refused before the engine was asked, by reason.",
		}, []string{"reason"}),
		reaped: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "idempotency_records_deleted_total",
			Help: "Expired records that this process deleted.",
		}),
	}
	m.registry.MustRegister(m.requests, m.duration, m.attempts, m.inFlight, m.steps, m.failures, m.refused, m.reaped,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Handler answers a scrape.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{Registry: m.registry})
}

// Reaped counts deleted records.
func (m *Metrics) Reaped(records int64) { m.reaped.Add(float64(records)) }

// ObservePool shows the pool's connections. Call it once.
func (m *Metrics) ObservePool(pool *pgxpool.Pool) {
	gauge := func(name, help string, value func(*pgxpool.Stat) float64) {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "demo_bank_pool_" + name, Help: help},
			func() float64 { return value(pool.Stat()) }))
	}
	counter := func(name, help string, value func(*pgxpool.Stat) float64) {
		m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "demo_bank_pool_" + name, Help: help},
			func() float64 { return value(pool.Stat()) }))
	}
	gauge("connections_max", "Size of the connection pool.", func(s *pgxpool.Stat) float64 { return float64(s.MaxConns()) })
	gauge("connections", "Connections that are open.", func(s *pgxpool.Stat) float64 { return float64(s.TotalConns()) })
	gauge("connections_acquired", "Connections in use.", func(s *pgxpool.Stat) float64 { return float64(s.AcquiredConns()) })
	counter("acquires_total", "Connections taken from the pool.", func(s *pgxpool.Stat) float64 { return float64(s.AcquireCount()) })
	counter("acquires_canceled_total", "Waits for a connection that were given up.", func(s *pgxpool.Stat) float64 { return float64(s.CanceledAcquireCount()) })
	counter("acquire_wait_seconds_total", "Time spent waiting for connections.", func(s *pgxpool.Stat) float64 { return s.AcquireDuration().Seconds() })
}

// TraceRequestStart implements [idempotency.Tracer].
func (m *Metrics) TraceRequestStart(ctx context.Context, _ idempotency.RequestStart) context.Context {
	m.inFlight.Inc()
	return ctx
}

// TraceStep implements [idempotency.Tracer].
func (m *Metrics) TraceStep(_ context.Context, step idempotency.StepEnd) {
	m.steps.WithLabelValues(string(step.Step)).Observe(step.Duration.Seconds())
	if step.Err != nil {
		m.failures.WithLabelValues(string(step.Step), kindOf(step.Err)).Inc()
	}
}

// kinds of errors, the most telling first: an unknown outcome stays one whatever it was that hid it.
var kinds = []struct {
	err  error
	kind string
}{
	{idempotency.ErrRecordCorrupt, "record-corrupt"}, {idempotency.ErrUnknown, "unknown"},
	{idempotency.ErrTransactionLost, "transaction-lost"},
	{idempotency.ErrKeyRecorded, "key-recorded"},
	{idempotency.ErrInProgress, "in-progress"},
	{idempotency.ErrSerialization, "serialization"},
	{idempotency.ErrUnavailable, "unavailable"},
	{idempotency.ErrAborted, "aborted"},
}

// kindOf is an error as a label: by what it wraps, never by its text.
func kindOf(err error) string {
	for _, k := range kinds {
		if errors.Is(err, k.err) {
			return k.kind
		}
	}
	return "other"
}

// TraceRequestEnd implements [idempotency.Tracer].
func (m *Metrics) TraceRequestEnd(_ context.Context, end idempotency.RequestEnd) {
	m.inFlight.Dec()
	m.attempts.Add(float64(end.Attempts))
	m.requests.WithLabelValues(string(end.Result.Outcome), string(end.Result.Reason)).Inc()
	m.duration.WithLabelValues(string(end.Result.Outcome)).Observe(end.Duration.Seconds())
}

// TraceRefused implements [idempotency.Tracer].
func (m *Metrics) TraceRefused(_ context.Context, refused idempotency.Refused) {
	m.refused.WithLabelValues(string(refused.Reason)).Inc()
}
