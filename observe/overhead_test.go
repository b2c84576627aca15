package observe_test

import (
	"context"
	"log/slog"
	"strconv"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/observe"
	"github.com/paidonce/idempotency/observe/lostkey"
	otelobserve "github.com/paidonce/idempotency/observe/otel"
	promobserve "github.com/paidonce/idempotency/observe/prometheus"
	"github.com/paidonce/idempotency/storage/memory"
)

// The limits that a change must keep, in allocations per request over an engine without a tracer. They are what was measured.
const (
	allocsPrometheusMax = 0
	allocsLostKeyMax    = 0
	allocsLogMax        = 0 // at a level at which nothing is written
	allocsNotSampledMax = 11
)

// observers are what a service may have its engine watched by, each made anew.
func observers(t testing.TB) map[string]func() idempotency.Tracer {
	traced := func(sampler sdktrace.Sampler) func() idempotency.Tracer {
		return func() idempotency.Tracer {
			provider := sdktrace.NewTracerProvider(sdktrace.WithSampler(sampler))
			t.Cleanup(func() { _ = provider.Shutdown(context.Background()) })
			return otelobserve.New(&otelobserve.Options{TracerProvider: provider, WithoutLostKeys: true})
		}
	}
	return map[string]func() idempotency.Tracer{
		"none":    func() idempotency.Tracer { return nil },
		"lostkey": func() idempotency.Tracer { return lostkey.New(nil) },
		"prometheus": func() idempotency.Tracer {
			return promobserve.New(prometheus.NewRegistry(), nil)
		},
		"log":              func() idempotency.Tracer { return observe.NewLog(slog.New(slog.DiscardHandler)) },
		"otel not sampled": traced(sdktrace.NeverSample()),
		"otel sampled":     traced(sdktrace.AlwaysSample()),
	}
}

// once takes one request through an engine: a fresh one, or always the same.
func once(engine *idempotency.Engine, replay bool) func() {
	n := 0
	return func() {
		n++
		key := "k"
		if !replay {
			key = strconv.Itoa(n)
		}
		engine.Do(context.Background(), idempotency.Request{
			Key: idempotency.Key{Scope: "acme", Value: key}, Fingerprint: idempotency.FingerprintOf(100, []byte(key)), Route: "POST /transfers",
		}, func(context.Context) (*idempotency.Answer, error) { return &idempotency.Answer{Status: 201}, nil })
	}
}

// Who watches allocates no more than this for each request.
func TestGateAllocationsOfObservers(t *testing.T) {
	if raceDetector {
		t.Skip("the race detector allocates too")
	}
	of := func(name string, replay bool) int {
		do := once(idempotency.NewEngine(memory.New(nil), &idempotency.Options{Tracer: observers(t)[name]()}), replay)
		for range 100 {
			do()
		}
		return int(testing.AllocsPerRun(500, do))
	}
	for _, replay := range []bool{false, true} {
		bare := of("none", replay)
		for name, limit := range map[string]int{
			"prometheus": allocsPrometheusMax, "lostkey": allocsLostKeyMax, "log": allocsLogMax, "otel not sampled": allocsNotSampledMax,
		} {
			got := of(name, replay) - bare
			t.Logf("%s, replay %t: %d allocations", name, replay, got)
			if got > limit {
				t.Errorf("%s costs %d allocations (replay %t); the limit is %d", name, got, replay, limit)
			}
		}
	}
}

// What each observer costs, against none: the engine alone, with the store in memory.
func BenchmarkFresh(b *testing.B)  { benchmark(b, false) }
func BenchmarkReplay(b *testing.B) { benchmark(b, true) }

func benchmark(b *testing.B, replay bool) {
	all := observers(b)
	for _, name := range []string{"none", "lostkey", "prometheus", "log", "otel not sampled", "otel sampled"} {
		b.Run(name, func(b *testing.B) {
			do := once(idempotency.NewEngine(memory.New(nil), &idempotency.Options{Tracer: all[name]()}), replay)
			b.ReportAllocs()
			for b.Loop() {
				do()
			}
		})
	}
}
