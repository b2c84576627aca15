package promobserve_test

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/paidonce/idempotency"
	promobserve "github.com/paidonce/idempotency/observe/prometheus"
)

// However many routes a client causes, the number of series is bounded.
func TestRoutesAreBounded(t *testing.T) {
	t.Parallel()
	registry := prometheus.NewRegistry()
	tracer := promobserve.New(registry, &promobserve.Options{RoutesMax: 2})
	replay := func(route string) {
		ctx := tracer.TraceRequestStart(context.Background(), idempotency.RequestStart{Route: route})
		tracer.TraceRequestEnd(ctx, idempotency.RequestEnd{Route: route, Result: idempotency.Result{Outcome: idempotency.OutcomeReplayed}})
	}
	long := strings.Repeat("x", promobserve.RouteBytesMax)
	replay(long + "y")
	replay("\xff")
	for n := range 1000 {
		replay("/" + strconv.Itoa(n))
	}
	replay(long)
	text := scrape(t, registry)
	wantLines(t, text, `idempotency_duplicates_total{outcome="replayed",route="`+long+`"} 2`,
		`idempotency_duplicates_total{outcome="replayed",route="`+"\uFFFD"+`"} 1`, `idempotency_duplicates_total{outcome="replayed",route="other"} 1000`,
		`idempotency_lost_keys_total{route="other"} 0`)
	if n := strings.Count(text, "\nidempotency_duplicates_total{"); n != 6 {
		t.Errorf("%d series, want 6", n)
	}
}

// Values that the engine does not have today are counted too, under a label that does not grow.
func TestUnknownLabelsAreOther(t *testing.T) {
	t.Parallel()
	registry := prometheus.NewRegistry()
	tracer := promobserve.New(registry, &promobserve.Options{Route: func(context.Context, string) string { return "own" }})
	tracer.TraceRefused(context.Background(), idempotency.Refused{Reason: "canary"})
	tracer.TraceStep(context.Background(), idempotency.StepEnd{Step: "canary", Err: errors.New("canary")})
	tracer.TraceRequestEnd(context.Background(), idempotency.RequestEnd{Result: idempotency.Result{Outcome: "canary", Reason: "canary"}})
	tracer.TraceRequestEnd(context.Background(), idempotency.RequestEnd{Route: "canary", Result: idempotency.Result{Outcome: idempotency.OutcomeReplayed}})
	text := scrape(t, registry)
	wantLines(t, text, `idempotency_refused_total{reason="other"} 1`, `idempotency_requests_total{outcome="other",reason="other"} 1`,
		`idempotency_step_failures_total{error="other",step="other"} 1`, `idempotency_duplicates_total{outcome="replayed",route="own"} 1`)
	if strings.Contains(text, "canary") {
		t.Error("a label is made of what came")
	}
}

// The series of alerts exist before the first event, or their first increase would not be one.
func TestSeriesBeginAtZero(t *testing.T) {
	t.Parallel()
	registry := prometheus.NewRegistry()
	promobserve.New(registry, nil)
	wantLines(t, scrape(t, registry),
		`idempotency_requests_total{outcome="unknown",reason=""} 0`, `idempotency_requests_total{outcome="unknown",reason="call-unknown"} 0`,
		`idempotency_requests_total{outcome="unknown",reason="needs-attention"} 0`,
		`idempotency_requests_total{outcome="unknown",reason="outcome-unknown"} 0`, `idempotency_requests_total{outcome="mismatch",reason="key-reused"} 0`,
		`idempotency_resolved_total{result="unknown"} 0`, `idempotency_reaper_walks_total{result="ok"} 0`, `idempotency_refused_total{reason="scope"} 0`,
		`idempotency_step_failures_total{error="unavailable",step="claim"} 0`, `idempotency_step_duration_seconds_count{step="resolve"} 0`,
		`idempotency_handler_timeout_seconds 10`)
}

// An effect's series begin at zero with its first call. Those over the limit share one label.
func TestEffectsAreBounded(t *testing.T) {
	t.Parallel()
	registry := prometheus.NewRegistry()
	tracer := promobserve.New(registry, nil)
	for i := range promobserve.EffectsMax + 2 {
		tracer.TraceEffect(context.Background(), idempotency.EffectEnd{Name: fmt.Sprint("e", i), Result: idempotency.EffectResultDone, Sent: true})
	}
	text := scrape(t, registry)
	wantLines(t, text, `idempotency_effects_total{effect="e99",result="done",sent="true"} 1`, `idempotency_effects_total{effect="other",result="done",sent="true"} 2`,
		`idempotency_effects_total{effect="e0",result="fenced",sent="true"} 0`, `idempotency_effects_total{effect="e0",result="not-sent",sent="false"} 0`)
	if strings.Contains(text, `"e100"`) {
		t.Error("there is a series over the limit")
	}
}

// If a tracer around this one does not implement WaitTracer, the figure is missing, and does not
// become negative.
func TestWaitersAreNeverNegative(t *testing.T) {
	t.Parallel()
	registry := prometheus.NewRegistry()
	tracer := promobserve.New(registry, nil)
	tracer.TraceStep(context.Background(), idempotency.StepEnd{Step: idempotency.StepWait})
	wantLines(t, scrape(t, registry), "idempotency_requests_waiting 0")
	tracer.TraceWaitStart(context.Background())
	wantLines(t, scrape(t, registry), "idempotency_requests_waiting 1")
}

func TestWithoutLostKeys(t *testing.T) {
	t.Parallel()
	registry := prometheus.NewRegistry()
	tracer := promobserve.New(registry, &promobserve.Options{WithoutLostKeys: true})
	for _, key := range []string{"a", "b"} {
		tracer.TraceRequestStart(context.Background(), idempotency.RequestStart{Key: idempotency.Key{Scope: "s", Value: key}})
	}
	if text := scrape(t, registry); strings.Contains(text, "lost_keys") {
		t.Error("lost keys are counted")
	}
}

func TestWiringMistakesPanic(t *testing.T) {
	t.Parallel()
	read := func(context.Context) (promobserve.Records, error) { return promobserve.Records{}, nil }
	for name, wire := range map[string]func(){
		"no registerer": func() { promobserve.New(nil, nil) },
		"twice":         func() { r := prometheus.NewRegistry(); promobserve.New(r, nil); promobserve.New(r, nil) },
		"routes":        func() { promobserve.New(prometheus.NewRegistry(), &promobserve.Options{RoutesMax: -1}) },
		"handler's timeout": func() {
			promobserve.New(prometheus.NewRegistry(), &promobserve.Options{Timeouts: idempotency.Timeouts{Handler: -1}})
		},
		"no statistics of open requests": func() { promobserve.NewOpenCollector[promobserve.Open](nil, nil) },
		"no statistics":                  func() { promobserve.NewRecordsCollector[promobserve.Records](nil, nil) },
		"interval":                       func() { promobserve.NewRecordsCollector(read, &promobserve.RecordsOptions{Interval: -1}) },
		"timeout":                        func() { promobserve.NewRecordsCollector(read, &promobserve.RecordsOptions{Timeout: -1}) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: it does not panic", name)
				}
			}()
			wire()
		}()
	}
}

// The store is read once per interval, however often Prometheus scrapes. If the figures can't be
// read again, the old ones stay, and age.
func TestRecordsAreReadOncePerInterval(t *testing.T) {
	t.Parallel()
	now, reads := time.Unix(1_700_000_000, 0), 0
	var failure error
	registry := prometheus.NewRegistry()
	registry.MustRegister(promobserve.NewRecordsCollector(func(ctx context.Context) (promobserve.Records, error) {
		reads++
		if deadline, ok := ctx.Deadline(); !ok || time.Until(deadline) > time.Second {
			t.Error("the reading is not bounded")
		}
		return promobserve.Records{Records: int64(reads), Expired: 1, Overdue: time.Minute, TableBytes: 3, IndexBytes: 4}, failure
	}, &promobserve.RecordsOptions{Interval: 10 * time.Second, Timeout: time.Second, Now: func() time.Time { return now }}))
	failure = errors.New("canary")
	if text := scrape(t, registry); strings.Contains(text, "estimate") || strings.Contains(text, "canary") {
		t.Errorf("figures that were never read: %s", text)
	}
	failure = nil
	for _, step := range []struct {
		sleep             time.Duration
		failure           error
		live, age, failed string
	}{
		{10 * time.Second, nil, "1", "0", "1"}, {10*time.Second - 1, nil, "1", "9.999999999", "1"}, {1, nil, "2", "0", "1"},
		{10 * time.Second, errors.New("canary"), "2", "10", "2"}, {5 * time.Second, nil, "2", "15", "2"}, {5 * time.Second, nil, "4", "0", "2"},
	} {
		now, failure = now.Add(step.sleep), step.failure
		wantLines(t, scrape(t, registry), "idempotency_records_live_estimate "+step.live, "idempotency_records_read_age_seconds "+step.age,
			"idempotency_records_read_failures_total "+step.failed, "idempotency_records_expired_estimate 1",
			"idempotency_records_overdue_estimate_seconds 60", "idempotency_records_table_bytes 3", "idempotency_records_index_bytes 4")
	}
	if reads != 5 {
		t.Errorf("read %d times, want 5", reads)
	}
}
