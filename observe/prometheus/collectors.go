package promobserve

import (
	"cmp"
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// PoolStat has the statistics of a pool. *pgxpool.Stat implements it.
type PoolStat interface {
	MaxConns() int32
	TotalConns() int32
	AcquiredConns() int32
	AcquireCount() int64
	EmptyAcquireCount() int64
	CanceledAcquireCount() int64
	AcquireDuration() time.Duration
}

// NewPoolCollector shows the pool's connections: a keyed request holds one from its claim to its
// commit. Pass the method Stat of a *pgxpool.Pool. If there are two pools, register each with
// prometheus.WrapRegistererWith and a label.
func NewPoolCollector[S PoolStat](stat func() S) prometheus.Collector {
	if stat == nil {
		panic("idempotency/prometheus: NewPoolCollector needs a function")
	}
	return &poolCollector{stat: func() PoolStat { return stat() }}
}

type poolCollector struct{ stat func() PoolStat }

// poolMetrics are the metrics of a pool.
var poolMetrics = []struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(PoolStat) float64
}{
	{poolDesc("connections_max", "Size of the connection pool."), prometheus.GaugeValue, func(s PoolStat) float64 { return float64(s.MaxConns()) }},
	{poolDesc("connections", "Connections that are open."), prometheus.GaugeValue, func(s PoolStat) float64 { return float64(s.TotalConns()) }},
	{poolDesc("connections_acquired", "Connections that are held."), prometheus.GaugeValue, func(s PoolStat) float64 { return float64(s.AcquiredConns()) }},
	{poolDesc("acquires_total", "Connections taken from the pool."), prometheus.CounterValue, func(s PoolStat) float64 { return float64(s.AcquireCount()) }},
	{poolDesc("acquires_waited_total", "Connections that had to be waited for or made."), prometheus.CounterValue, func(s PoolStat) float64 { return float64(s.EmptyAcquireCount()) }},
	{poolDesc("acquires_canceled_total", "Waits for a connection that were given up."), prometheus.CounterValue, func(s PoolStat) float64 { return float64(s.CanceledAcquireCount()) }},
	{poolDesc("acquire_wait_seconds_total", "Time spent taking connections."), prometheus.CounterValue, func(s PoolStat) float64 { return s.AcquireDuration().Seconds() }},
}

func poolDesc(name, help string) *prometheus.Desc {
	return prometheus.NewDesc("idempotency_pool_"+name, help, nil, nil)
}

// Describe implements [prometheus.Collector].
func (c *poolCollector) Describe(descs chan<- *prometheus.Desc) {
	for _, m := range poolMetrics {
		descs <- m.desc
	}
}

// Collect implements [prometheus.Collector].
func (c *poolCollector) Collect(metrics chan<- prometheus.Metric) {
	stat := c.stat()
	for _, m := range poolMetrics {
		metrics <- prometheus.MustNewConstMetric(m.desc, m.kind, m.value(stat))
	}
}

// Records are figures of the table of records: those of postgres.Statistics.
type Records struct {
	Records    int64
	Expired    int64
	Overdue    time.Duration
	TableBytes int64
	IndexBytes int64
}

// RecordsOptions tune a collector of records. Nil and the zero value are the defaults. A negative
// number panics.
type RecordsOptions struct {
	// Interval is the time for which figures are shown before a scrape reads them again. Any number
	// of scrapes cause one query per interval. Defaults to 30 seconds.
	Interval time.Duration

	// Timeout bounds the query, and with it the delay of a scrape. It must be well below the
	// scrape's own timeout. Defaults to 2 seconds.
	Timeout time.Duration

	// Now is the clock. Defaults to time.Now.
	Now func() time.Time
}

// NewRecordsCollector shows figures of the table of records. Pass the method Statistics of a
// *postgres.Store. Its result is kept for the interval. If reading fails the last figures stay,
// their age grows, and the failure is counted. Before the first success there are none.
func NewRecordsCollector[S interface {
	~struct {
		Records    int64
		Expired    int64
		Overdue    time.Duration
		TableBytes int64
		IndexBytes int64
	}
}](read func(ctx context.Context) (S, error), opts *RecordsOptions) prometheus.Collector {
	if read == nil {
		panic("idempotency/prometheus: NewRecordsCollector needs a function")
	}
	return newFigures(opts, "records", recordsMetrics, func(ctx context.Context) (Records, error) {
		stats, err := read(ctx)
		return Records(stats), err
	})
}

// Open are figures of the open requests: those of postgres.OpenStatistics.
type Open struct {
	Open         int64
	Parked       int64
	Due          int64
	OldestOpen   time.Duration
	OldestParked time.Duration
	OldestDue    time.Duration
}

// NewOpenCollector shows figures of the open requests, for a service that calls other services
// (package effect). Pass the method OpenStatistics of a *postgres.Store. It keeps and reads them as
// [NewRecordsCollector] does.
func NewOpenCollector[S interface {
	~struct {
		Open         int64
		Parked       int64
		Due          int64
		OldestOpen   time.Duration
		OldestParked time.Duration
		OldestDue    time.Duration
	}
}](read func(ctx context.Context) (S, error), opts *RecordsOptions) prometheus.Collector {
	if read == nil {
		panic("idempotency/prometheus: NewOpenCollector needs a function")
	}
	return newFigures(opts, "open", openMetrics, func(ctx context.Context) (Open, error) {
		stats, err := read(ctx)
		return Open(stats), err
	})
}

// figures collects figures that are read from the store and kept for RecordsOptions.Interval.
type figures[T any] struct {
	options  RecordsOptions
	read     func(context.Context) (T, error)
	metrics  []figure[T]
	age      *prometheus.Desc
	failed   *prometheus.Desc
	mu       sync.Mutex // held while the figures are read: concurrent scrapes read them once
	last     T
	asked    time.Time // zero: never
	readAt   time.Time // of last; zero: there are none
	failures float64
}

// figure is one metric of the figures.
type figure[T any] struct {
	desc  *prometheus.Desc
	value func(T) float64
}

func newFigures[T any](opts *RecordsOptions, about string, metrics []figure[T], read func(context.Context) (T, error)) *figures[T] {
	var o RecordsOptions
	if opts != nil {
		o = *opts
	}
	o.Interval = cmp.Or(o.Interval, 30*time.Second)
	o.Timeout = cmp.Or(o.Timeout, 2*time.Second)
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Interval < 0 || o.Timeout < 0 {
		panic(fmt.Sprintf("idempotency/prometheus: RecordsOptions.Interval is %v and Timeout is %v: neither may be negative", o.Interval, o.Timeout))
	}
	return &figures[T]{
		options: o, read: read, metrics: metrics,
		age:    prometheus.NewDesc("idempotency_"+about+"_read_age_seconds", "Age of these figures.", nil, nil),
		failed: prometheus.NewDesc("idempotency_"+about+"_read_failures_total", "Readings of these figures that failed.", nil, nil),
	}
}

// recordsMetrics are the metrics of the records.
var recordsMetrics = []figure[Records]{
	{recordsDesc("live_estimate", "Records that count, about."), func(r Records) float64 { return float64(r.Records - r.Expired) }},
	{recordsDesc("expired_estimate", "Records that have expired and wait for the reaper, about."), func(r Records) float64 { return float64(r.Expired) }},
	{recordsDesc("overdue_estimate_seconds", "For how long the oldest expired record waits for the reaper, at least."), func(r Records) float64 { return r.Overdue.Seconds() }},
	{recordsDesc("table_bytes", "Size of the table of the records, bodies included."), func(r Records) float64 { return float64(r.TableBytes) }},
	{recordsDesc("index_bytes", "Size of its index."), func(r Records) float64 { return float64(r.IndexBytes) }},
}

func recordsDesc(name, help string) *prometheus.Desc {
	return prometheus.NewDesc("idempotency_records_"+name, help, nil, nil)
}

// openMetrics are the metrics of the open requests.
var openMetrics = []figure[Open]{
	{openDesc("requests", "Requests that are open: they have called another service, or were about to, and have no answer yet."), func(o Open) float64 { return float64(o.Open) }},
	{openDesc("parked", "Of these, those that only a person can end."), func(o Open) float64 { return float64(o.Parked) }},
	{openDesc("due", "Of the others, those that wait for a run of their handler."), func(o Open) float64 { return float64(o.Due) }},
	{openDesc("oldest_seconds", "Age of the oldest that is not parked."), func(o Open) float64 { return o.OldestOpen.Seconds() }},
	{openDesc("oldest_parked_seconds", "Age of the oldest that is parked."), func(o Open) float64 { return o.OldestParked.Seconds() }},
	{openDesc("oldest_due_seconds", "The longest time that one has been waiting for a run."), func(o Open) float64 { return o.OldestDue.Seconds() }},
}

func openDesc(name, help string) *prometheus.Desc {
	return prometheus.NewDesc("idempotency_open_"+name, help, nil, nil)
}

// Describe implements [prometheus.Collector].
func (f *figures[T]) Describe(descs chan<- *prometheus.Desc) {
	for _, m := range f.metrics {
		descs <- m.desc
	}
	descs <- f.age
	descs <- f.failed
}

// Collect implements [prometheus.Collector].
func (f *figures[T]) Collect(metrics chan<- prometheus.Metric) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if now := f.options.Now(); f.asked.IsZero() || now.Sub(f.asked) >= f.options.Interval {
		f.asked = now
		ctx, cancel := context.WithTimeout(context.Background(), f.options.Timeout)
		defer cancel()
		if read, err := f.read(ctx); err != nil {
			f.failures++
		} else {
			f.last, f.readAt = read, now
		}
	}
	metrics <- prometheus.MustNewConstMetric(f.failed, prometheus.CounterValue, f.failures)
	if f.readAt.IsZero() {
		return
	}
	for _, m := range f.metrics {
		metrics <- prometheus.MustNewConstMetric(m.desc, prometheus.GaugeValue, m.value(f.last))
	}
	metrics <- prometheus.MustNewConstMetric(f.age, prometheus.GaugeValue, f.options.Now().Sub(f.readAt).Seconds())
}
