package promobserve

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/observe"
	"github.com/paidonce/idempotency/observe/lostkey"
)

// Labels of routes.
const (
	RouteBytesMax = 128 // a longer one is cut

	// RouteOther is the label of all routes over [Options.RoutesMax].
	RouteOther = "other"

	// EffectsMax is the maximum number of effects with series of their own; further ones are "other".
	EffectsMax = 100
)

// Options tune a [Tracer]. Nil and the zero value are the defaults. A negative number panics.
type Options struct {
	// Timeouts are those of middleware.Options. They set no timeout here: Handler, which defaults to
	// 10 seconds in both, becomes a metric, so that an alert can compare handlers with it.
	Timeouts idempotency.Timeouts

	// Route returns a request's route from its context, if Request.Route is unsuitable. Its values
	// must come from a small set. Nil takes Request.Route, which the middleware sets.
	Route func(ctx context.Context, route string) string

	// RoutesMax is the maximum number of routes with series of their own, about 6 each; further
	// routes are [RouteOther]. Defaults to 100.
	RoutesMax int

	// LostKeys tune the detector of clients that lose their keys. OnLost is called after the
	// finding was counted.
	LostKeys lostkey.Options

	// WithoutLostKeys disables the detector.
	WithoutLostKeys bool
}

// full returns a copy with defaults filled in. It panics on invalid values.
func (o *Options) full() Options {
	var full Options
	if o != nil {
		full = *o
	}
	full.Timeouts.Handler = cmp.Or(full.Timeouts.Handler, 10*time.Second)
	full.RoutesMax = cmp.Or(full.RoutesMax, 100)
	if full.Route == nil {
		full.Route = func(_ context.Context, route string) string { return route }
	}
	if full.Timeouts.Handler < 0 || full.RoutesMax < 0 {
		panic(fmt.Sprintf("idempotency/prometheus: Options.Timeouts.Handler is %v and RoutesMax is %d: neither may be negative", full.Timeouts.Handler, full.RoutesMax))
	}
	return full
}

// Tracer makes metrics from the engine's events. It is safe for concurrent use.
type Tracer struct {
	options  Options
	detector *lostkey.Detector // nil if disabled

	requests   *prometheus.CounterVec
	durations  *prometheus.HistogramVec
	attempts   prometheus.Counter
	inFlight   prometheus.Gauge
	steps      *prometheus.HistogramVec
	failures   *prometheus.CounterVec
	refused    *prometheus.CounterVec
	resolved   *prometheus.CounterVec
	duplicates *prometheus.CounterVec
	lost       *prometheus.CounterVec
	deleted    prometheus.Counter
	walks      *prometheus.CounterVec
	walkTime   prometheus.Histogram
	takeOvers  prometheus.Counter
	effects    *prometheus.CounterVec
	drifts     *prometheus.CounterVec
	effectTime *prometheus.HistogramVec

	waiters atomic.Int64

	// Series that each request uses.
	ends  map[end]endSeries
	times map[idempotency.Step]prometheus.Observer

	mu     sync.RWMutex
	routes map[string]*routeSeries
	named  map[string]string // the labels of effects
}

// end is the outcome and reason of a request.
type end struct {
	outcome idempotency.Outcome
	reason  idempotency.Reason
}

type endSeries struct {
	count prometheus.Counter
	time  prometheus.Observer
}

// routeSeries are the series of one route.
type routeSeries struct{ replayed, inProgress, lost prometheus.Counter }

var (
	_ idempotency.Tracer       = (*Tracer)(nil)
	_ idempotency.WaitTracer   = (*Tracer)(nil)
	_ idempotency.EffectTracer = (*Tracer)(nil)
)

// secondsBuckets reach from a replay on a warm connection to the longest time of a handler.
var secondsBuckets = []float64{.0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 20}

// ends are the engine's pairs of outcome and reason. Their series exist from the start, so that the
// first event is an increase, and not a new series at one.
var ends = []struct {
	outcome idempotency.Outcome
	reasons []idempotency.Reason
}{
	{idempotency.OutcomeExecuted, []idempotency.Reason{""}},
	{observe.OutcomeDeclined, []idempotency.Reason{""}},
	{idempotency.OutcomeReplayed, []idempotency.Reason{""}},
	{idempotency.OutcomeInProgress, []idempotency.Reason{idempotency.ReasonInProgress}},
	{idempotency.OutcomeMismatch, []idempotency.Reason{idempotency.ReasonKeyReused}},
	{idempotency.OutcomeNotExecuted, []idempotency.Reason{"", idempotency.ReasonHandlerFailed, idempotency.ReasonUnavailable, idempotency.ReasonQuotaExceeded}},
	{idempotency.OutcomeUnknown, []idempotency.Reason{
		"", idempotency.ReasonCallUnknown, idempotency.ReasonNeedsAttention, idempotency.ReasonOutcomeUnknown, idempotency.ReasonRecordCorrupt, idempotency.ReasonTransactionLost,
	}},
}

// refusals are the reasons of the middleware.
var refusals = []idempotency.Reason{
	idempotency.ReasonKeyMissing, idempotency.ReasonKeyInvalid, idempotency.ReasonScope, idempotency.ReasonBodyTooLarge,
	idempotency.ReasonBodyUnread, idempotency.ReasonMediaType, idempotency.ReasonReplayDenied, idempotency.ReasonQuotaExceeded, idempotency.ReasonRecordCorrupt,
	idempotency.ReasonHandlerFailed,
}

const labelOther = "other"

// failuresWatched are the failures of a step that alerts watch: their series exist from the start
// too.
var failuresWatched = map[idempotency.Step][]string{
	idempotency.StepClaim:   {"unavailable"},
	idempotency.StepCommit:  {"unavailable", "unknown"},
	idempotency.StepDecline: {"unavailable", "unknown"},
	idempotency.StepResolve: {"unknown"},
}

// Results of the look-up of a lost COMMIT.
const (
	resolvedFound    = "found"     // a record: of this attempt, or of another
	resolvedNotFound = "not-found" // proven: nothing was recorded
	resolvedUnknown  = "unknown"
)

// New returns a tracer with metrics that count from zero, and registers them. It panics if there is
// no registerer, if the metrics are registered already, or on invalid options. Two engines share
// one tracer.
func New(registerer prometheus.Registerer, opts *Options) *Tracer {
	if registerer == nil {
		panic("idempotency/prometheus: New needs a Registerer")
	}
	t := &Tracer{
		options: opts.full(),
		requests: counters("requests_total", "Requests that the engine settled, by outcome and, if they got no answer, by reason.",
			"outcome", "reason"),
		durations: histograms("request_duration_seconds", "Time until everything about a request was settled.", "outcome"),
		attempts: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "idempotency_attempts_total", Help: "Claims that were begun. More than requests means serialization failures and lost races.",
		}),
		inFlight: gauge("requests_in_flight", "Requests in the engine now."),
		steps:    histograms("step_duration_seconds", "Time of each step of an attempt, and of each wait for another one.", "step"),
		failures: counters("step_failures_total", "Steps that ended with an error, by its kind. A claim that found its key in progress is one.", "step", "error"),
		refused:  counters("refused_total", "Requests refused before the engine was called or over a quota, and replays that were not shown, by reason.", "reason"),
		resolved: counters("resolved_total", "Lost COMMITs that were looked up, by the result of the look-up.", "result"),
		duplicates: counters("duplicates_total", "Requests that came again: answered with the record, or while the first was in progress.",
			"route", "outcome"),
		lost: counters("lost_keys_total", "Requests that came again with another key: the client lost the first one, or makes a new one for each try.", "route"),
		deleted: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "idempotency_records_deleted_total", Help: "Expired records that this process deleted.",
		}),
		walks: counters("reaper_walks_total", "Walks of this process's reaper through the table, by result.", "result"),
		walkTime: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "idempotency_reaper_walk_duration_seconds", Help: "Time of each walk of the reaper.", Buckets: []float64{.01, .1, 1, 10, 60, 600, 3600},
		}),
		takeOvers: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "idempotency_take_overs_total", Help: "Open requests that this process took over: from a process that died, or after a pause.",
		}),
		effects: counters("effects_total", "Calls of effects by handlers, by result. The label sent is true if that call was sent.",
			"effect", "result", "sent"),
		drifts:     counters("effect_drifts_total", "Calls of effects with an input that differs from the recorded one, which was sent.", "effect"),
		effectTime: histograms("effect_duration_seconds", "Time of a call of an effect that was sent, with its intent and its result.", "effect"),
		ends:       map[end]endSeries{}, times: map[idempotency.Step]prometheus.Observer{}, routes: map[string]*routeSeries{}, named: map[string]string{},
	}
	limit := gauge("handler_timeout_seconds", "The limit of the claim and the handler together.")
	limit.Set(t.options.Timeouts.Handler.Seconds())
	waiting := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "idempotency_requests_waiting", Help: "Requests that wait for another attempt now. They hold no connection.",
	}, func() float64 { return float64(t.waiters.Load()) })
	all := []prometheus.Collector{
		t.requests, t.durations, t.attempts, t.inFlight, waiting, t.steps, t.failures, t.refused, t.resolved, t.duplicates,
		t.deleted, t.walks, t.walkTime, limit, t.takeOvers, t.effects, t.drifts, t.effectTime,
	}
	if !t.options.WithoutLostKeys {
		lostKeys := t.options.LostKeys
		onLost := lostKeys.OnLost
		lostKeys.OnLost = func(ctx context.Context, event lostkey.Event) {
			t.route(ctx, event.Route).lost.Inc()
			if onLost != nil {
				onLost(ctx, event)
			}
		}
		t.detector = lostkey.New(&lostKeys)
		all = append(all, t.lost, prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "idempotency_lost_keys_forgotten_total", Help: "Requests that the detector of lost keys forgot before its window ended, because it had no room: at most this many.",
		}, func() float64 { return float64(t.detector.Dropped()) }))
	}
	t.begin()
	registerer.MustRegister(all...)
	return t
}

// begin makes the series that exist from the start.
func (t *Tracer) begin() {
	for _, e := range ends {
		for _, reason := range e.reasons {
			t.ends[end{e.outcome, reason}] = t.seriesOf(string(e.outcome), string(reason))
		}
	}
	for _, step := range []idempotency.Step{
		idempotency.StepClaim, idempotency.StepHandler, idempotency.StepCommit, idempotency.StepDecline, idempotency.StepRollback,
		idempotency.StepResolve, idempotency.StepWait,
	} {
		t.times[step] = t.steps.WithLabelValues(string(step))
	}
	for step, kinds := range failuresWatched {
		for _, kind := range kinds {
			t.failures.WithLabelValues(string(step), kind)
		}
	}
	for _, reason := range refusals {
		t.refused.WithLabelValues(string(reason))
	}
	for _, result := range []string{resolvedFound, resolvedNotFound, resolvedUnknown} {
		t.resolved.WithLabelValues(result)
	}
	for _, result := range []string{"ok", "failed"} {
		t.walks.WithLabelValues(result)
	}
}

func (t *Tracer) seriesOf(outcome, reason string) endSeries {
	return endSeries{t.requests.WithLabelValues(outcome, reason), t.durations.WithLabelValues(outcome)}
}

func counters(name, help string, labels ...string) *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "idempotency_" + name, Help: help}, labels)
}

func gauge(name, help string) prometheus.Gauge {
	return prometheus.NewGauge(prometheus.GaugeOpts{Name: "idempotency_" + name, Help: help})
}

// histograms have classic buckets, and native ones for a Prometheus that asks for them.
func histograms(name, help string, labels ...string) *prometheus.HistogramVec {
	return prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "idempotency_" + name, Help: help, Buckets: secondsBuckets,
		NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100, NativeHistogramMinResetDuration: time.Hour,
	}, labels)
}

// route returns the series of a request's route, and makes them if there is room.
func (t *Tracer) route(ctx context.Context, name string) *routeSeries {
	name = t.options.Route(ctx, name)
	if len(name) > RouteBytesMax {
		name = name[:RouteBytesMax]
	}
	t.mu.RLock()
	series := t.routes[name]
	t.mu.RUnlock()
	if series != nil {
		return series
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.routes) >= t.options.RoutesMax {
		name = RouteOther
	}
	series = t.routes[name]
	if series == nil {
		label := strings.ToValidUTF8(name, "\uFFFD") // otherwise the client library panics
		series = &routeSeries{
			t.duplicates.WithLabelValues(label, string(idempotency.OutcomeReplayed)),
			t.duplicates.WithLabelValues(label, string(idempotency.OutcomeInProgress)), t.lost.WithLabelValues(label),
		}
		t.routes[strings.Clone(name)] = series
	}
	return series
}

// TraceRequestStart implements [idempotency.Tracer].
func (t *Tracer) TraceRequestStart(ctx context.Context, start idempotency.RequestStart) context.Context {
	t.inFlight.Inc()
	t.route(ctx, start.Route) // so that its series begin at zero
	if t.detector != nil {
		t.detector.TraceRequestStart(ctx, start)
	}
	return ctx
}

// TraceWaitStart implements [idempotency.WaitTracer].
func (t *Tracer) TraceWaitStart(context.Context) { t.waiters.Add(1) }

// TraceStep implements [idempotency.Tracer].
func (t *Tracer) TraceStep(_ context.Context, step idempotency.StepEnd) {
	if step.Step == idempotency.StepWait {
		t.waitEnds()
	}
	name, times := string(step.Step), t.times[step.Step]
	if times == nil {
		name, times = labelOther, t.steps.WithLabelValues(labelOther)
	}
	times.Observe(step.Duration.Seconds())
	if step.Err != nil {
		t.failures.WithLabelValues(name, observe.ErrorKind(step.Err)).Inc()
	}
}

// waitEnds decrements the number of waiting requests, unless a tracer around this one does not
// forward TraceWaitStart.
func (t *Tracer) waitEnds() {
	for n := t.waiters.Load(); n > 0; n = t.waiters.Load() {
		if t.waiters.CompareAndSwap(n, n-1) {
			return
		}
	}
}

// TraceRequestEnd implements [idempotency.Tracer].
func (t *Tracer) TraceRequestEnd(ctx context.Context, e idempotency.RequestEnd) {
	t.inFlight.Dec()
	t.attempts.Add(float64(e.Attempts))
	outcome := observe.Outcome(e)
	series, ok := t.ends[end{outcome, e.Result.Reason}]
	if !ok {
		series = t.seriesOf(labelOther, labelOther)
	}
	series.count.Inc()
	series.time.Observe(e.Duration.Seconds())
	switch outcome {
	case idempotency.OutcomeReplayed:
		t.route(ctx, e.Route).replayed.Inc()
	case idempotency.OutcomeInProgress:
		t.route(ctx, e.Route).inProgress.Inc()
	}
	if e.TakenOver {
		t.takeOvers.Inc()
	}
	if e.Resolved {
		t.resolved.WithLabelValues(resolvedResult(e.Result.Outcome)).Inc()
	}
}

// resolvedResult derives the result of the look-up of a lost COMMIT from the end of the request.
func resolvedResult(outcome idempotency.Outcome) string {
	switch outcome {
	case idempotency.OutcomeExecuted, idempotency.OutcomeReplayed, idempotency.OutcomeMismatch:
		return resolvedFound
	case idempotency.OutcomeNotExecuted:
		return resolvedNotFound
	}
	return resolvedUnknown
}

// effectResults are the results of calls that were sent (true), and of those that were not (false).
var effectResults = map[bool][]idempotency.EffectResult{
	true: {
		idempotency.EffectResultDone, idempotency.EffectResultDeclined, idempotency.EffectResultMaybe, idempotency.EffectResultUnknown,
		idempotency.EffectResultParked, idempotency.EffectResultFenced,
	},
	false: {
		idempotency.EffectResultDone, idempotency.EffectResultDeclined, idempotency.EffectResultMaybe, idempotency.EffectResultUnknown,
		idempotency.EffectResultNotSent, idempotency.EffectResultParked, idempotency.EffectResultFenced, idempotency.EffectResultFailed,
	},
}

// effect returns the label of an effect. A new one's series begin at zero.
func (t *Tracer) effect(name string) string {
	t.mu.RLock()
	label, ok := t.named[name]
	t.mu.RUnlock()
	if ok {
		return label
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	switch label, ok = t.named[name]; {
	case ok:
		return label
	case len(t.named) >= EffectsMax:
		return labelOther
	}
	label = strings.ToValidUTF8(name, "\uFFFD") // otherwise the client library panics
	t.named[strings.Clone(name)] = label
	for sent, results := range effectResults {
		for _, result := range results {
			t.effects.WithLabelValues(label, string(result), fmt.Sprint(sent))
		}
	}
	t.drifts.WithLabelValues(label)
	return label
}

// TraceEffect implements [idempotency.EffectTracer].
func (t *Tracer) TraceEffect(_ context.Context, e idempotency.EffectEnd) {
	label := t.effect(e.Name)
	t.effects.WithLabelValues(label, string(e.Result), fmt.Sprint(e.Sent)).Inc()
	if e.Drift {
		t.drifts.WithLabelValues(label).Inc()
	}
	if e.Sent {
		t.effectTime.WithLabelValues(label).Observe(e.Duration.Seconds())
	}
}

// TraceRefused implements [idempotency.Tracer].
func (t *Tracer) TraceRefused(_ context.Context, refused idempotency.Refused) {
	for _, reason := range refusals {
		if reason == refused.Reason {
			t.refused.WithLabelValues(string(reason)).Inc()
			return
		}
	}
	t.refused.WithLabelValues(labelOther).Inc()
}

// OnWalk counts a walk of the reaper: pass it as postgres.ReaperOptions.OnWalk. It does not log the
// error's text: a service that wants to do that calls OnWalk from a function of its own.
func (t *Tracer) OnWalk(deleted int64, duration time.Duration, err error) {
	t.deleted.Add(float64(deleted))
	t.walkTime.Observe(duration.Seconds())
	if err != nil {
		t.walks.WithLabelValues("failed").Inc()
		return
	}
	t.walks.WithLabelValues("ok").Inc()
}
