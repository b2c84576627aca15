package otelobserve_test

import (
	"context"
	"testing"

	sdktrace "go.opentelemetry.io/otel/sdk/trace"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/observe/internal/fixture"
	otelobserve "github.com/paidonce/idempotency/observe/otel"
)

// sampledBy returns an observer with this sampler. The SDK decides the cost of a sampled span,
// which has no limit here.
func sampledBy(t testing.TB, name string, sampler sdktrace.Sampler, allocsMax int) fixture.Observer {
	return fixture.Observer{Name: name, AllocsMax: allocsMax, New: func() idempotency.Tracer {
		provider := sdktrace.NewTracerProvider(sdktrace.WithSampler(sampler))
		t.Cleanup(func() { _ = provider.Shutdown(context.Background()) })
		return otelobserve.New(&otelobserve.Options{TracerProvider: provider, WithoutLostKeys: true})
	}}
}

func TestGateAllocationsOfOpenTelemetry(t *testing.T) {
	fixture.GateAllocations(t, sampledBy(t, "otel not sampled", sdktrace.NeverSample(), 11))
}

func BenchmarkFresh(b *testing.B)  { benchmark(b, false) }
func BenchmarkReplay(b *testing.B) { benchmark(b, true) }

func benchmark(b *testing.B, replay bool) {
	fixture.Benchmark(b, replay, sampledBy(b, "otel not sampled", sdktrace.NeverSample(), 0), sampledBy(b, "otel sampled", sdktrace.AlwaysSample(), 0))
}
