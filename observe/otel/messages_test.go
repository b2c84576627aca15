package otelobserve_test

import (
	"context"
	"errors"
	"testing"
	"time"

	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/paidonce/idempotency/consumer"
	otelobserve "github.com/paidonce/idempotency/observe/otel"
	"github.com/paidonce/idempotency/relay"
)

// Each message is counted once, and those of a batch that failed are not, unless they are dead.
func TestMessagesAreCountedOnce(t *testing.T) {
	t.Parallel()
	reader := sdkmetric.NewManualReader()
	meters := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))
	t.Cleanup(func() { _ = meters.Shutdown(context.Background()) })
	messages := otelobserve.NewMessages(&otelobserve.Options{MeterProvider: meters})
	messages.OnBatch(consumer.BatchEnd{Consumer: "ledger", Duration: time.Second, Executed: 5, Duplicates: 1, Redelivered: 2, Mismatches: 1, Parked: 3, Dead: 3})
	messages.OnBatch(consumer.BatchEnd{Consumer: "ledger", Duration: time.Second, Duplicates: 7, Redelivered: 7, Dead: 1, Err: errors.New("canary")})
	messages.OnBatch(consumer.BatchEnd{Consumer: "ledger", Duplicates: 7, Err: consumer.ErrHeld})
	messages.OnBatch(consumer.BatchEnd{Consumer: "ledger", Duplicates: 7, Err: consumer.ErrFenced})
	messages.OnDrain(0, relay.Drained{Published: 4, Failed: 2, Refused: 1}, time.Second, nil)
	messages.OnDrain(0, relay.Drained{Held: true}, time.Second, nil)

	got := map[string]int64{}
	var data metricdata.ResourceMetrics
	if err := reader.Collect(t.Context(), &data); err != nil {
		t.Fatal(err)
	}
	for _, scope := range data.ScopeMetrics {
		for _, m := range scope.Metrics {
			switch d := m.Data.(type) {
			case metricdata.Sum[int64]:
				for _, point := range d.DataPoints {
					result, _ := point.Attributes.Value("idempotency.message.result")
					got[m.Name+" "+result.AsString()] += point.Value
				}
			case metricdata.Histogram[float64]:
				for _, point := range d.DataPoints {
					result, _ := point.Attributes.Value("idempotency.message.result")
					got[m.Name+" "+result.AsString()] += int64(point.Count)
				}
			}
		}
	}
	want := map[string]int64{
		"idempotency.messages.consumed executed": 5, "idempotency.messages.consumed duplicate": 1, "idempotency.messages.consumed redelivered": 2,
		"idempotency.messages.consumed mismatch": 1, "idempotency.messages.consumed parked": 3, "idempotency.messages.consumed dead": 3,
		"idempotency.message.batch.duration done": 1, "idempotency.message.batch.duration failed": 1, "idempotency.message.batch.duration held": 1,
		"idempotency.message.batch.duration fenced": 1, "idempotency.messages.published published": 4, "idempotency.messages.published failed": 2,
		"idempotency.messages.published refused": 1, "idempotency.message.publish.duration ": 1,
	}
	for name, n := range want {
		if got[name] != n {
			t.Errorf("%s is %d, want %d", name, got[name], n)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%v", got)
	}
}
