// Package promobserve counts and times the idempotency engine's work, for Prometheus.
// docs/metrics.md describes each metric; rules.yaml and dashboard.json beside this file have alerts
// and a Grafana dashboard.
//
//	metrics := promobserve.New(prometheus.DefaultRegisterer, nil)
//	prometheus.MustRegister(promobserve.NewPoolCollector(pool.Stat), promobserve.NewRecordsCollector(store.Statistics, nil))
//	idem := middleware.New(store, account, &middleware.Options{Tracer: metrics})
//	go postgres.NewReaper(store, &postgres.ReaperOptions{OnWalk: metrics.OnWalk}).Run(ctx)
//
// It imports neither pgx nor a store: pass their methods. Labels are outcomes, reasons, steps,
// kinds of errors and routes, each from a bounded set; no key, scope or body is ever a label.
package promobserve
