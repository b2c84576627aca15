// Package promobserve counts and times what the idempotency engine does, for Prometheus. docs/metrics.md describes each
// metric; rules.yaml and dashboard.json beside this file have alerts and a Grafana dashboard.
//
//	metrics := promobserve.New(prometheus.DefaultRegisterer, nil)
//	prometheus.MustRegister(promobserve.NewPoolCollector(pool.Stat), promobserve.NewRecordsCollector(store.Statistics, nil))
//	idem := middleware.New(store, account, &middleware.Options{Tracer: metrics})
//	go postgres.NewReaper(store, &postgres.ReaperOptions{OnWalk: metrics.OnWalk}).Run(ctx)
//
// It imports neither pgx nor a store: the pool and the store are given by their methods. Labels are outcomes, reasons, steps,
// kinds of errors and routes, each from a set that is bounded; no key, scope or body is ever one.
package promobserve
