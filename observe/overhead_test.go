package observe_test

import (
	"log/slog"
	"testing"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/observe"
	"github.com/paidonce/idempotency/observe/internal/fixture"
	"github.com/paidonce/idempotency/observe/lostkey"
)

// The limits that a change must keep equal the measured figures. The log has a level at which it
// writes nothing.
var observers = []fixture.Observer{
	{Name: "lostkey", New: func() idempotency.Tracer { return lostkey.New(nil) }, AllocsMax: 0},
	{Name: "log", New: func() idempotency.Tracer { return observe.NewLog(slog.New(slog.DiscardHandler)) }, AllocsMax: 0},
}

func TestGateAllocationsOfObservers(t *testing.T) { fixture.GateAllocations(t, observers...) }

func BenchmarkFresh(b *testing.B)  { fixture.Benchmark(b, false, observers...) }
func BenchmarkReplay(b *testing.B) { fixture.Benchmark(b, true, observers...) }
