package otelobserve

import (
	"context"
	"sync"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/observe"
)

// instruments are the metrics.
type instruments struct {
	requests   metric.Int64Counter
	durations  metric.Float64Histogram
	steps      metric.Float64Histogram
	active     metric.Int64UpDownCounter
	waiting    metric.Int64UpDownCounter
	refused    metric.Int64Counter
	resolved   metric.Int64Counter
	duplicates metric.Int64Counter
	lost       metric.Int64Counter
	takeOvers  metric.Int64Counter
	effects    metric.Int64Counter

	// sets has the series by labels: the engine's labels are few, and making a set costs more than
	// counting.
	sets sync.Map
}

// labels identify a series: a step and a kind of error, or an outcome and a reason.
type labels struct{ first, second attribute.KeyValue }

// series is a set of attributes in the form that instruments take.
type series struct {
	add    []metric.AddOption
	record []metric.RecordOption
}

func (i *instruments) series(l labels) *series {
	if known, ok := i.sets.Load(l); ok {
		return known.(*series)
	}
	attributes := []attribute.KeyValue{l.first}
	if l.second.Valid() {
		attributes = append(attributes, l.second)
	}
	set := metric.WithAttributeSet(attribute.NewSet(attributes...))
	made, _ := i.sets.LoadOrStore(l, &series{[]metric.AddOption{set}, []metric.RecordOption{set}})
	return made.(*series)
}

// secondsBuckets reach from a replay on a warm connection to the longest time of a handler.
var secondsBuckets = metric.WithExplicitBucketBoundaries(.0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 20)

func newInstruments(meter metric.Meter) *instruments {
	return &instruments{
		requests:   made(meter.Int64Counter("idempotency.requests", metric.WithDescription("Requests that the engine settled."), metric.WithUnit("{request}"))),
		durations:  made(meter.Float64Histogram("idempotency.request.duration", metric.WithDescription("Time until everything about a request was settled."), metric.WithUnit("s"), secondsBuckets)),
		steps:      made(meter.Float64Histogram("idempotency.step.duration", metric.WithDescription("Time of each step of an attempt, and of each wait for another one."), metric.WithUnit("s"), secondsBuckets)),
		active:     made(meter.Int64UpDownCounter("idempotency.requests.active", metric.WithDescription("Requests in the engine now."), metric.WithUnit("{request}"))),
		waiting:    made(meter.Int64UpDownCounter("idempotency.requests.waiting", metric.WithDescription("Requests that wait for another attempt now."), metric.WithUnit("{request}"))),
		refused:    made(meter.Int64Counter("idempotency.refused", metric.WithDescription("Requests refused before the engine was called or over a quota, and replays that were not shown."), metric.WithUnit("{request}"))),
		resolved:   made(meter.Int64Counter("idempotency.resolved", metric.WithDescription("Lost COMMITs that were looked up, by the result of the look-up."), metric.WithUnit("{request}"))),
		duplicates: made(meter.Int64Counter("idempotency.duplicates", metric.WithDescription("Requests that came again."), metric.WithUnit("{request}"))),
		lost:       made(meter.Int64Counter("idempotency.lost_keys", metric.WithDescription("Requests that came again with another key."), metric.WithUnit("{request}"))),
		takeOvers:  made(meter.Int64Counter("idempotency.take_overs", metric.WithDescription("Open requests that this process took over."), metric.WithUnit("{request}"))),
		effects:    made(meter.Int64Counter("idempotency.effects", metric.WithDescription("Calls of effects by handlers, by result."), metric.WithUnit("{call}"))),
	}
}

// made returns an instrument. A meter refuses one with a bad name or bad buckets, which a test
// would find.
func made[T any](instrument T, err error) T {
	if err != nil {
		panic("idempotency/otel: " + err.Error())
	}
	return instrument
}

func (i *instruments) step(ctx context.Context, step idempotency.StepEnd, kind string) {
	l := labels{first: attributeStep.String(string(step.Step))}
	if kind != "" {
		l.second = attributeError.String(kind)
	}
	i.steps.Record(ctx, step.Duration.Seconds(), i.series(l).record...)
}

func (i *instruments) end(ctx context.Context, end idempotency.RequestEnd) {
	outcome := attributeOutcome.String(string(observe.Outcome(end)))
	i.requests.Add(ctx, 1, i.series(labels{outcome, attributeReason.String(string(end.Result.Reason))}).add...)
	ofOutcome := i.series(labels{first: outcome})
	i.durations.Record(ctx, end.Duration.Seconds(), ofOutcome.record...)
	if end.Resolved {
		i.resolved.Add(ctx, 1, ofOutcome.add...)
	}
	if end.TakenOver {
		i.takeOvers.Add(ctx, 1)
	}
	switch end.Result.Outcome {
	case idempotency.OutcomeReplayed, idempotency.OutcomeInProgress:
		// There are many routes, and the SDK bounds their number.
		i.duplicates.Add(ctx, 1, metric.WithAttributes(outcome, attributeRoute.String(pathOf(end.Route))))
	}
}
