package bench

import (
	"context"
	"fmt"
	"time"

	hdr "github.com/HdrHistogram/hdrhistogram-go"
)

// Sample is the result of one slice: one design in one round.
type Sample struct {
	Design       string  `json:"design"`
	Keys         int64   `json:"keys"`
	Round        int     `json:"round"`
	Requests     int64   `json:"requests"`
	PerSecond    float64 `json:"requests_per_second"`
	P50MS        float64 `json:"p50_ms"`
	P99MS        float64 `json:"p99_ms"`
	GoUS         float64 `json:"go_us"`       // the service's CPU time per request; 0 if unknown
	PostgresUS   float64 `json:"postgres_us"` // PostgreSQL's
	Allocations  float64 `json:"allocations"` // of the service, per request
	WALBytes     float64 `json:"wal_bytes"`   // per request
	RoundTrips   float64 `json:"round_trips"` // per request
	Connections  int64   `json:"connections"` // maximum that was busy at once
	cpuUS        float64
	histogram    *hdr.Histogram
	acknowledged int64
}

// measure measures one design for one slice.
func (r *run) measure(ctx context.Context, clients []*client, e *entry, round int) (Sample, error) {
	s := Sample{Design: e.design.name, Keys: e.keys, Round: round}
	// The beginning is not typical: idle conns are pinged, and so on.
	warmed, err := r.drive(ctx, clients, e, runIn, 0)
	if err != nil {
		return s, err
	}
	before, err := r.look(ctx, true)
	if err != nil {
		return s, err
	}
	done, err := r.drive(ctx, clients, e, 1, r.config.Slice)
	if err != nil {
		return s, err
	}
	after, err := r.look(ctx, false)
	if err != nil {
		return s, err
	}
	per := func(what float64) float64 { return what / float64(done.requests) }
	s.Requests, s.PerSecond, s.histogram = done.requests, done.perSec, done.latency
	s.P50MS, s.P99MS = milliseconds(done.latency, 50), milliseconds(done.latency, 99)
	s.GoUS = per(float64(after.served.CPU-before.served.CPU) / 1e3)
	s.PostgresUS = per(float64(after.postgres-before.postgres) / 1e3)
	s.cpuUS = s.GoUS + s.PostgresUS
	if !r.cpuKnown {
		s.GoUS, s.PostgresUS, s.cpuUS = 0, 0, 0
	}
	s.Allocations = per(float64(after.served.Allocations - before.served.Allocations))
	s.RoundTrips = per(float64(after.served.RoundTrips - before.served.RoundTrips))
	s.WALBytes = per(float64(after.walBytes - before.walBytes))
	s.Connections = after.served.BusyMax
	if e.design.kind == fresh {
		s.acknowledged = warmed.requests + done.requests
	}
	return s, nil
}

// drive makes the clients send requests of a design, or the serving process consume messages.
func (r *run) drive(ctx context.Context, clients []*client, e *entry, each int, duration time.Duration) (load, error) {
	if e.design.kind == consumes {
		return r.consume(ctx, e, duration)
	}
	return drive(ctx, clients, &e.target, each, duration)
}

func emptyLatency() *hdr.Histogram { return hdr.New(1, latencyMax.Microseconds(), 3) }

// sight holds the totals so far.
type sight struct {
	served   stats
	postgres time.Duration
	walBytes int64
}

// look reads all counters. Reading the WAL position costs PostgreSQL processor time, which must not
// count. So it is read first at the beginning of a slice, and last at the end.
func (r *run) look(ctx context.Context, begin bool) (s sight, err error) {
	wal := func() error {
		s.walBytes, err = r.cluster.walBytes(ctx)
		return err
	}
	serve := func() error {
		answer, err := r.child.ask(ctx, order{Stats: true, Begin: begin})
		s.served = answer.Stats
		return err
	}
	processor := func() error {
		s.postgres, err = familyCPU(r.cluster.server.PID())
		if err != nil || s.served.CPU == 0 {
			r.cpuKnown = false
		}
		return nil
	}
	steps := []func() error{wal, serve, processor}
	if !begin {
		steps = []func() error{serve, processor, wal}
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return s, fmt.Errorf("read the counters: %w", err)
		}
	}
	return s, nil
}

func milliseconds(h *hdr.Histogram, quantile float64) float64 {
	return float64(h.ValueAtQuantile(quantile)) / 1e3
}
