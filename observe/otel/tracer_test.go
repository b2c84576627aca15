package otelobserve_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/observe/internal/fixture"
	"github.com/paidonce/idempotency/observe/lostkey"
	otelobserve "github.com/paidonce/idempotency/observe/otel"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// observed is a service with a server that makes a span for each request, as otelhttp does.
type observed struct {
	*fixture.Service
	spans  *tracetest.InMemoryExporter
	reader *sdkmetric.ManualReader
}

func observe(t *testing.T, sampler sdktrace.Sampler, traceID func(*http.Request) string) *observed {
	t.Helper()
	o := &observed{spans: tracetest.NewInMemoryExporter(), reader: sdkmetric.NewManualReader()}
	traces := sdktrace.NewTracerProvider(sdktrace.WithSyncer(o.spans), sdktrace.WithSampler(sampler))
	meters := sdkmetric.NewMeterProvider(sdkmetric.WithReader(o.reader))
	t.Cleanup(func() {
		_ = traces.Shutdown(context.Background())
		_ = meters.Shutdown(context.Background())
	})
	server := traces.Tracer("server")
	o.Service = fixture.New(t, fixture.Options{
		Tracer:  otelobserve.New(&otelobserve.Options{TracerProvider: traces, MeterProvider: meters}),
		TraceID: traceID,
		Around: func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				ctx := propagation.TraceContext{}.Extract(r.Context(), propagation.HeaderCarrier(r.Header))
				ctx, span := server.Start(ctx, "server", trace.WithSpanKind(trace.SpanKindServer))
				defer span.End()
				next.ServeHTTP(w, r.WithContext(ctx))
			})
		},
	})
	return o
}

// take returns the spans that have ended since its last call, in the order of their ends.
func (o *observed) take() tracetest.SpanStubs {
	defer o.spans.Reset()
	return o.spans.GetSpans()
}

func named(spans tracetest.SpanStubs, name string) (all tracetest.SpanStubs) {
	for _, span := range spans {
		if span.Name == name {
			all = append(all, span)
		}
	}
	return all
}

func names(spans tracetest.SpanStubs) string {
	var all []string
	for _, span := range spans {
		all = append(all, strings.TrimPrefix(span.Name, "idempotency "))
	}
	return strings.Join(all, ", ")
}

func attributes(span tracetest.SpanStub) map[string]string {
	all := map[string]string{}
	for _, a := range span.Attributes {
		all[string(a.Key)] = a.Value.String()
	}
	return all
}

// A request is a span below the server's, with its steps below it and its outcome in attributes.
func TestSpansOfEachOutcome(t *testing.T) {
	t.Parallel()
	o := observe(t, sdktrace.AlwaysSample(), otelobserve.TraceID)
	for _, test := range []struct {
		name    string
		cause   func()
		spans   string // of the last request
		outcome string
		more    map[string]string
		failed  string // the status' description
	}{
		{"executed", func() { o.Execute(fixture.Transfers, 1) }, "claim, handler, commit, idempotency, server", "executed",
			map[string]string{"http.route": "/transfers", "http.request.method": "POST", "http.response.status_code": "200", "idempotency.attempts": "1"}, ""},
		{"replayed", func() { o.Replay(fixture.Payments) }, "claim, idempotency, server", "replayed", map[string]string{"http.route": "/payments"}, ""},
		{"declined", o.Decline, "claim, handler, decline, idempotency, server", "declined", map[string]string{"http.response.status_code": "402"}, ""},
		{"forgotten", o.Forget, "claim, handler, rollback, idempotency, server", "not-executed", map[string]string{"http.response.status_code": "500"}, ""},
		{"failed", o.Fail, "claim, handler, rollback, idempotency, server", "not-executed", map[string]string{"idempotency.reason": "handler-failed"}, "handler-failed"},
		{"call", func() { o.Call(false) }, "claim, handler, rollback, idempotency, server", "unknown",
			map[string]string{"http.response.status_code": "504", "idempotency.reason": "", "error.type": "call-unknown"}, "call-unknown"},
		{"call, failed", func() { o.Call(true) }, "claim, handler, rollback, idempotency, server", "unknown",
			map[string]string{"idempotency.reason": "call-unknown", "error.type": "call-unknown"}, "call-unknown"},
		{"mismatch", o.Mismatch, "claim, idempotency, server", "mismatch", map[string]string{"idempotency.reason": "key-reused"}, ""},
		{"unavailable", func() { o.Unavailable(1) }, "claim, idempotency, server", "not-executed", map[string]string{"error.type": "unavailable"}, "unavailable"},
		{"found", func() { o.LoseCommit(true) }, "claim, handler, commit, resolve, idempotency, server", "executed", map[string]string{"idempotency.resolved": "true"}, ""},
		{"not found", func() { o.LoseCommit(false) }, "claim, handler, commit, resolve, idempotency, server", "not-executed", map[string]string{"idempotency.resolved": "true"}, "unavailable"},
		{"unknown", o.LoseDatabase, "claim, handler, commit, resolve, idempotency, server", "unknown", map[string]string{"idempotency.reason": "outcome-unknown"}, "outcome-unknown"},
	} {
		o.take()
		test.cause()
		spans := o.take()
		last := named(spans, "server")[len(named(spans, "server"))-1]
		var ofLast tracetest.SpanStubs
		for _, span := range spans {
			if span.SpanContext.TraceID() == last.SpanContext.TraceID() {
				ofLast = append(ofLast, span)
			}
		}
		if got := names(ofLast); got != test.spans {
			t.Errorf("%s: the spans are %s, want %s", test.name, got, test.spans)
			continue
		}
		request := named(ofLast, "idempotency")[0]
		if request.Parent.SpanID() != last.SpanContext.SpanID() || request.SpanKind != trace.SpanKindInternal {
			t.Errorf("%s: the request's span is not below the server's", test.name)
		}
		for _, span := range ofLast {
			if strings.HasPrefix(span.Name, "idempotency ") {
				if span.Parent.SpanID() != request.SpanContext.SpanID() || span.StartTime.Before(request.StartTime) || span.EndTime.After(request.EndTime) || span.EndTime.Before(span.StartTime) {
					t.Errorf("%s: %s is not within the request's span", test.name, span.Name)
				}
			}
		}
		got := attributes(request)
		if got["idempotency.outcome"] != test.outcome || len(got["idempotency.attempt"]) != 36 {
			t.Errorf("%s: %v", test.name, got)
		}
		for name, want := range test.more {
			if got[name] != want {
				t.Errorf("%s: %s is %q, want %q", test.name, name, got[name], want)
			}
		}
		want := sdktrace.Status{}
		if test.failed != "" {
			want = sdktrace.Status{Code: codes.Error, Description: test.failed}
		}
		if request.Status != want {
			t.Errorf("%s: status %+v, want %+v", test.name, request.Status, want)
		}
	}
}

// A replay's span is linked to the server's span of the original attempt, in whatever trace that
// is.
func TestReplayLinksToTheOriginalAttempt(t *testing.T) {
	t.Parallel()
	o := observe(t, sdktrace.AlwaysSample(), otelobserve.TraceID)
	o.Replay(fixture.Transfers)
	spans := o.take()
	first, requests := named(spans, "server")[0].SpanContext, named(spans, "idempotency")
	if len(requests[0].Links) != 0 {
		t.Errorf("the original is linked to %v", requests[0].Links)
	}
	if links := requests[1].Links; len(links) != 1 || links[0].SpanContext.TraceID() != first.TraceID() || links[0].SpanContext.SpanID() != first.SpanID() {
		t.Errorf("links %+v, want one to %v", links, first)
	}
	if got := attributes(requests[1])["idempotency.original.trace_id"]; got != first.TraceID().String() || requests[1].SpanContext.TraceID() == first.TraceID() {
		t.Errorf("the original's trace is %s, want %s, and another than the replay's", got, first.TraceID())
	}

	// A bare trace id, as the middleware records it by itself, has no span to link to.
	bare := observe(t, sdktrace.AlwaysSample(), nil)
	const parent = "4bf92f3577b34da6a3ce929d0e0e4736"
	key := bare.NewKey()
	for _, outcome := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed} {
		bare.Send(fixture.Transfers, key, "pay", key, outcome, "Traceparent", "00-"+parent+"-00f067aa0ba902b7-01")
	}
	replay := named(bare.take(), "idempotency")[1]
	if got := attributes(replay)["idempotency.original.trace_id"]; got != parent || len(replay.Links) != 0 {
		t.Errorf("the original's trace is %q with the links %v", got, replay.Links)
	}

	// A value that another function recorded is not shown.
	own := observe(t, sdktrace.AlwaysSample(), func(*http.Request) string { return fixture.Canary })
	own.Replay(fixture.Transfers)
	if replay := named(own.take(), "idempotency")[1]; attributes(replay)["idempotency.original.trace_id"] != "" || len(replay.Links) != 0 {
		t.Errorf("%+v", replay)
	}
}

func TestTraceID(t *testing.T) {
	t.Parallel()
	const header = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	r := httptest.NewRequest(http.MethodPost, "/", nil)
	if got := otelobserve.TraceID(r); got != "" {
		t.Errorf("without a trace: %q", got)
	}
	r.Header.Set("Traceparent", fixture.Canary)
	if got := otelobserve.TraceID(r); got != "" {
		t.Errorf("of a bad header: %q", got)
	}
	r.Header.Set("Traceparent", header)
	if got := otelobserve.TraceID(r); got != header {
		t.Errorf("of a client's: %q", got)
	}
	span := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}})
	r = r.WithContext(trace.ContextWithSpanContext(r.Context(), span))
	if got, want := otelobserve.TraceID(r), "00-01000000000000000000000000000000-0200000000000000-00"; got != want || len(got) > idempotency.TraceIDBytesMax {
		t.Errorf("of the server's: %q, want %q", got, want)
	}
}

// Conflicts, waits, refusals and lost keys are events or spans, and a conflict is no failure.
func TestEventsAndWaits(t *testing.T) {
	t.Parallel()
	o := observe(t, sdktrace.AlwaysSample(), otelobserve.TraceID)
	o.Conflict(1)
	spans := o.take()
	claim := named(spans, "idempotency claim")[1]
	if got := attributes(claim)["error.type"]; got != "in-progress" || claim.Status.Code == codes.Error {
		t.Errorf("the conflict's claim: %s, %v", got, claim.Status)
	}
	o.Wait(func() bool { return o.sum("idempotency.requests.waiting") == 1 })
	if waits := named(o.take(), "idempotency wait"); len(waits) != 1 || !waits[0].EndTime.After(waits[0].StartTime) {
		t.Errorf("waits: %v", waits)
	}
	o.LoseKey()
	var events []string
	for _, span := range named(o.take(), "idempotency") {
		for _, event := range span.Events {
			events = append(events, event.Name)
		}
	}
	if !slices.Equal(events, []string{"idempotency.lost_key"}) {
		t.Errorf("events of the request: %q", events)
	}
	o.LoseReply()
	o.take()
	o.Complete(1)
	events = nil
	for _, span := range named(o.take(), "idempotency") {
		for _, event := range span.Events {
			events = append(events, event.Name)
			for _, a := range event.Attributes {
				events = append(events, a.Value.String())
			}
		}
	}
	if want := []string{"idempotency.effect", "charge", "done", "true", "true"}; !slices.Equal(events, want) {
		t.Errorf("events of a request that was taken over: %q, want %q", events, want)
	}
	if o.sum("idempotency.take_overs") != 1 || o.sum("idempotency.effects") != 2 {
		t.Errorf("%v taken over, %v calls", o.sum("idempotency.take_overs"), o.sum("idempotency.effects"))
	}
	o.Refuse()
	events = nil
	for _, span := range named(o.take(), "server") {
		for _, event := range span.Events {
			for _, a := range event.Attributes {
				if a.Key == "idempotency.reason" {
					events = append(events, a.Value.AsString())
				}
			}
		}
	}
	if want := []string{"key-missing", "key-invalid", "scope", "body-too-large", "replay-denied"}; !slices.Equal(events, want) {
		t.Errorf("refused: %q, want %q", events, want)
	}
}

// If nothing is sampled there are no spans, and the metrics are the same.
func TestMetricsCountWhatIsNotSampled(t *testing.T) {
	t.Parallel()
	o := observe(t, sdktrace.NeverSample(), otelobserve.TraceID)
	o.Replay(fixture.Transfers)
	o.Conflict(2)
	o.LoseCommit(true)
	o.LoseKey()
	o.Refuse()
	if spans := o.take(); len(spans) != 0 {
		t.Errorf("spans: %s", names(spans))
	}
	for name, want := range map[string]int64{
		"idempotency.requests": 2 + 3 + 1 + 2 + 2, "idempotency.requests.active": 0, "idempotency.duplicates": 1 + 2 + 1,
		"idempotency.resolved": 1, "idempotency.lost_keys": 1, "idempotency.refused": 5, "idempotency.request.duration": 10,
		"idempotency.step.duration": 3*6 + 4 + 1, // the executed ones, the duplicates, the look-up
	} {
		if got := o.sum(name); got != want {
			t.Errorf("%s is %d, want %d", name, got, want)
		}
	}
}

// sum returns the sum of a metric's points: its values, or the counts of a histogram.
func (o *observed) sum(name string) (sum int64) {
	for _, metric := range o.collect().ScopeMetrics[0].Metrics {
		if metric.Name != name {
			continue
		}
		switch data := metric.Data.(type) {
		case metricdata.Sum[int64]:
			for _, point := range data.DataPoints {
				sum += point.Value
			}
		case metricdata.Histogram[float64]:
			for _, point := range data.DataPoints {
				sum += int64(point.Count)
			}
		}
	}
	return sum
}

func (o *observed) collect() metricdata.ResourceMetrics {
	var all metricdata.ResourceMetrics
	if err := o.reader.Collect(context.Background(), &all); err != nil {
		panic(err)
	}
	if len(all.ScopeMetrics) == 0 {
		all.ScopeMetrics = make([]metricdata.ScopeMetrics, 1)
	}
	return all
}

// No span and no metric ever contains data that a client sent or got.
func TestNoCanaryInSpansAndMetrics(t *testing.T) {
	t.Parallel()
	o := observe(t, sdktrace.AlwaysSample(), otelobserve.TraceID)
	o.Replay(fixture.Transfers)
	o.Decline()
	o.Forget()
	o.Fail()
	o.Mismatch()
	o.LoseKey()
	o.Conflict(1)
	o.Unavailable(1)
	o.LoseCommit(true)
	o.LoseDatabase()
	o.Corrupt()
	o.Refuse()
	var text strings.Builder
	spans := o.take()
	for _, span := range spans {
		all := slices.Clone(span.Attributes)
		for _, event := range span.Events {
			all = append(all, event.Attributes...)
			_, _ = fmt.Fprintln(&text, event.Name)
		}
		for _, l := range span.Links {
			all = append(all, l.Attributes...)
		}
		_, _ = fmt.Fprintln(&text, span.Name, span.Status)
		for _, a := range all {
			_, _ = fmt.Fprintln(&text, a.Key, a.Value.String())
		}
	}
	_, _ = fmt.Fprintf(&text, "%+v", o.collect())
	if got := text.String(); strings.Contains(got, fixture.Canary) || !strings.Contains(got, "outcome-unknown") || !strings.Contains(got, "/transfers") {
		t.Errorf("of %d spans: %s", len(spans), got)
	}
}

func TestNewPanicsWhereOptionsCannotWork(t *testing.T) {
	t.Parallel()
	defer func() {
		if recover() == nil {
			t.Error("it does not panic")
		}
	}()
	otelobserve.New(&otelobserve.Options{LostKeys: lostkey.Options{Window: -1}})
}
