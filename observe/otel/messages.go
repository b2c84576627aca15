package otelobserve

import (
	"context"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/observe"
	"github.com/paidonce/idempotency/relay"
)

const (
	attributeConsumer = attribute.Key("idempotency.consumer")
	// attributeOf is the outcome of a message, or the result of a batch.
	attributeOf = attribute.Key("idempotency.message.result")
)

// Messages makes metrics from the batches of consumers and relays: idempotency.messages.consumed,
// idempotency.message.batch.duration, idempotency.messages.published and
// idempotency.message.publish.duration. It is safe for concurrent use.
type Messages struct {
	consumed  metric.Int64Counter
	durations metric.Float64Histogram
	published metric.Int64Counter
	publishes metric.Float64Histogram
}

// NewMessages returns metrics of Options.MeterProvider. It panics if the meter refuses an instrument.
// The consumers and the relay of a process share them:
//
//	messages := otelobserve.NewMessages(nil)
//	relay.New(store.Outbox(), publisher, &relay.Options{OnDrain: messages.OnDrain})
//	consumer.New("ledger", store.Inbox(), source, project, &consumer.Options{OnBatch: messages.OnBatch})
func NewMessages(opts *Options) *Messages {
	var provider metric.MeterProvider
	if opts != nil {
		provider = opts.MeterProvider
	}
	if provider == nil {
		provider = otel.GetMeterProvider()
	}
	meter := provider.Meter(Name)
	return &Messages{
		consumed:  made(meter.Int64Counter("idempotency.messages.consumed", metric.WithDescription("Messages that a consumer is done with for now, by outcome."), metric.WithUnit("{message}"))),
		durations: made(meter.Float64Histogram("idempotency.message.batch.duration", metric.WithDescription("Time of a batch of a consumer, by result."), metric.WithUnit("s"), secondsBuckets)),
		published: made(meter.Int64Counter("idempotency.messages.published", metric.WithDescription("Messages that a relay gave to the broker, by result."), metric.WithUnit("{message}"))),
		publishes: made(meter.Float64Histogram("idempotency.message.publish.duration", metric.WithDescription("Time of a batch of the relay that had messages, with the broker's confirmation."), metric.WithUnit("s"), secondsBuckets)),
	}
}

// OnBatch counts a batch: pass it as consumer.Options.OnBatch.
func (m *Messages) OnBatch(end consumer.BatchEnd) {
	ctx, name := context.Background(), attributeConsumer.String(end.Consumer)
	m.durations.Record(ctx, end.Duration.Seconds(), metric.WithAttributes(name, attributeOf.String(observe.BatchResult(&end))))
	for outcome, n := range observe.BatchOutcomes(&end) {
		if n > 0 {
			m.consumed.Add(ctx, int64(n), metric.WithAttributes(name, attributeOf.String(outcome)))
		}
	}
}

// OnDrain counts a batch of a relay: pass it as relay.Options.OnDrain.
func (m *Messages) OnDrain(_ int, drained relay.Drained, duration time.Duration, _ error) {
	ctx, some := context.Background(), false
	for result, n := range map[string]int{"published": drained.Published, "failed": drained.Failed, "refused": drained.Refused} {
		if n > 0 {
			some = true
			m.published.Add(ctx, int64(n), metric.WithAttributes(attributeOf.String(result)))
		}
	}
	if some {
		m.publishes.Record(ctx, duration.Seconds())
	}
}
