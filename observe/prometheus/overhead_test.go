package promobserve_test

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/observe/internal/fixture"
	promobserve "github.com/paidonce/idempotency/observe/prometheus"
)

var observer = fixture.Observer{
	Name: "prometheus", New: func() idempotency.Tracer { return promobserve.New(prometheus.NewRegistry(), nil) }, AllocsMax: 0,
}

func TestGateAllocationsOfPrometheus(t *testing.T) { fixture.GateAllocations(t, observer) }

func BenchmarkFresh(b *testing.B)  { fixture.Benchmark(b, false, observer) }
func BenchmarkReplay(b *testing.B) { fixture.Benchmark(b, true, observer) }
