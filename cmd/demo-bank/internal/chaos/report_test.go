package chaos

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/check"
)

// goodReport returns the report of a run that hit everything and found nothing.
func goodReport() *Report {
	once := func() []Count { return []Count{{Name: "something", Count: 1, Least: 1}, {Name: "beside", Count: 0}} }
	return &Report{
		Profile: "smoke", Seed: 42, Schedule: "0123", Phase: phaseLast,
		Faults: once(), CommitFaults: once(), CrashPoints: once(), Clientele: once(), Answers: once(), Totals: once(),
		Checks: []check.Result{{Name: check.MoneyKept, Title: "money", Seen: 1}, {Name: "run", Title: "run"}},
	}
}

// TestWhatWasNotHitFailsTheRun: a kind of fault, crash point or answer with 0 hits proves nothing.
// Neither does a check that saw nothing, or a run that did not reach its end.
func TestWhatWasNotHitFailsTheRun(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(*Report){
		"a fault":            func(p *Report) { p.Faults[0].Count = 0 },
		"a fault of COMMITs": func(p *Report) { p.CommitFaults[0].Count = 0 },
		"a crash point":      func(p *Report) { p.CrashPoints[0].Count = 0 },
		"a client's fault":   func(p *Report) { p.Clientele[0].Count = 0 },
		"an answer":          func(p *Report) { p.Answers[0].Count = 0 },
		"a total":            func(p *Report) { p.Totals[0].Least = 2 },
		"a check":            func(p *Report) { p.Checks[0].Count = 1 },
		"nothing looked at":  func(p *Report) { p.Checks[0].Seen = 0 },
		"not at its end":     func(p *Report) { p.Phase = "load" },
	} {
		p := goodReport()
		spoil(p)
		p.judge()
		if p.OK() || p.Verdict != "broken" || len(p.Broken) != 1 {
			t.Errorf("%s: the verdict is %s: %v", name, p.Verdict, p.Broken)
		}
	}
	p := goodReport()
	p.judge()
	if !p.OK() || p.Verdict != "ok" || len(p.Found()) > 0 {
		t.Errorf("a good run is %s: %v", p.Verdict, p.Broken)
	}
	p.Checks[0].Count = 3
	if found := p.Found(); len(found) != 1 || found[0] != check.MoneyKept {
		t.Errorf("what was found is %v", found)
	}
}

// TestEveryKindIsRequired: the report requires everything that a profile's schedule and clients do,
// by the same names.
func TestEveryKindIsRequired(t *testing.T) {
	t.Parallel()
	r, err := newRun((&Config{Seed: 1}).full())
	if err != nil {
		t.Fatal(err)
	}
	p := r.report()
	if err := r.close(true); err != nil {
		t.Fatal(err)
	}
	if p.OK() {
		t.Fatal("a run that did nothing is ok")
	}
	lists := map[string][]Count{"faults": p.Faults, "COMMITs": p.CommitFaults, "points": p.CrashPoints, "answers": p.Answers, "clients": p.Clientele}
	for name, want := range map[string]int{"faults": 14, "COMMITs": 10, "points": 9, "answers": 7, "clients": 13} {
		if len(lists[name]) != want {
			t.Errorf("%d kinds of %s are required, want %d: %v", len(lists[name]), name, want, lists[name])
		}
		for _, c := range lists[name] {
			if c.Least < 1 || c.Count != 0 {
				t.Errorf("%s: %+v", name, c)
			}
		}
	}
}

func TestReportIsWritten(t *testing.T) {
	t.Parallel()
	p := goodReport()
	p.Checks = append(p.Checks, check.Result{Name: check.OneEffect, Title: "no doubles", Seen: 5, Count: 2, Examples: []string{"acme/k has two"}})
	p.Faults[0] = Count{Name: "pause", Count: 0, Least: 1}
	p.Kept = "/somewhere"
	p.judge()
	var text, object bytes.Buffer
	if err := p.WriteText(&text); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"seed 42", "schedule 0123", "BROKEN 2 times", "acme/k has two", "pause  at least 1 were wanted", "kept: /somewhere\n", "broken: one effect: no doubles (2)\n"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("the text does not say %q:\n%s", want, text.String())
		}
	}
	if !strings.HasSuffix(text.String(), "\nverdict: broken\n") {
		t.Errorf("the verdict is not its last line:\n%s", text.String())
	}
	if err := p.WriteJSON(&object); err != nil || strings.Count(object.String(), "\n") != 1 {
		t.Fatalf("the JSON is not one line: %v\n%s", err, object.String())
	}
	var back Report
	if err := json.Unmarshal(object.Bytes(), &back); err != nil || back.Verdict != "broken" || back.Seed != 42 || len(back.Checks) != 3 {
		t.Errorf("the JSON is %s: %v", object.String(), err)
	}
}

// TestUnknownHasALimit: one in a thousand, not counting keys with a fault that can make the outcome
// unknown.
func TestUnknownHasALimit(t *testing.T) {
	t.Parallel()
	for _, one := range []struct {
		replies, unknown, exempt int64
		ok                       bool
	}{{100_000, 100, 0, true}, {100_000, 101, 0, false}, {100_000, 500, 420, true}, {1000, 2, 0, true}, {1000, 3, 0, false}, {1000, 3, 1, true}} {
		r := &run{}
		r.tally.replies.Store(one.replies)
		r.tally.unknown.Store(one.unknown)
		r.tally.unknownExempt.Store(one.exempt)
		if got := r.unknownCheck(); got.OK() != one.ok || got.Seen == 0 {
			t.Errorf("%+v: %+v", one, got)
		}
	}
}

// TestMetricsOfAllLives: the counters of a bank's lives add up, and the labels select.
func TestMetricsOfAllLives(t *testing.T) {
	t.Parallel()
	const text = `# HELP go_goroutines Number of goroutines that currently exist.
go_goroutines 12
idempotency_step_failures_total{error="key-recorded",step="commit"} 2
idempotency_step_failures_total{error="unknown",step="commit"} 3
idempotency_step_failures_total{error="unknown",step="decline"} 5
something_else{a="b"} 1e+03
idempotency_step_duration_seconds_bucket{step="commit",le="0.001"} 7
idempotency_step_duration_seconds_count{step="commit"} 70
`
	values, err := parseMetrics(strings.NewReader(text))
	if err != nil || len(values) != 5 || values[metricGoroutines] != 12 {
		t.Fatalf("read %v: %v", values, err)
	}
	if _, err := parseMetrics(strings.NewReader("go_goroutines many\n")); err == nil {
		t.Error("a metric that is no number is read")
	}
	var s scrapes
	s.note(values)
	s.note(values) // the same life, later
	s.endLife()
	s.endLife() // a life that was never scraped
	s.note(values)
	s.endLife()
	s.note(values)
	for _, one := range []struct {
		want   float64
		name   string
		labels []string
	}{
		{6, metricStepFailures, []string{label("step", "commit"), label("error", "key-recorded")}},
		{9, metricStepFailures, []string{label("error", "unknown"), label("step", "commit")}},
		{24, metricStepFailures, []string{label("error", "unknown")}},
		{210, metricSteps, []string{label("step", "commit")}},
		{0, metricSteps, []string{label("step", "com")}},
		{0, metricReaped, nil},
	} {
		if got := s.sum(one.name, one.labels...); got != one.want {
			t.Errorf("%s %v is %v, want %v", one.name, one.labels, got, one.want)
		}
	}
}

// TestEffectsAreReportedApart: the report of a run without effects has none of their fields. With
// effects each stop is required, and the report names the requests left to a person, and why.
func TestEffectsAreReportedApart(t *testing.T) {
	t.Parallel()
	p := goodReport()
	var plain bytes.Buffer
	if err := p.WriteJSON(&plain); err != nil || strings.Contains(plain.String(), "effects\"") || strings.Contains(plain.String(), "take_overs") {
		t.Errorf("%v:\n%s", err, plain.String())
	}
	p.WithEffects = true
	p.Effects = &EffectsReport{
		TopUps: 3, Charges: 2, TakeOvers: 7, Parked: []Count{{Name: "its key may be forgotten", Count: 1}},
		Stops: []Count{{Name: "stop at the intent's COMMIT", Count: 1, Least: 1}},
	}
	p.judge()
	var text, whole bytes.Buffer
	if err := errors.Join(p.WriteText(&text), p.WriteJSON(&whole)); err != nil || !p.OK() {
		t.Errorf("%v: %v", err, p.Broken)
	}
	for _, want := range []string{"with effects", "3 top-ups", "2 charges", "7 take-overs", "left to a person: 1, its key may be forgotten", "stop at the intent's COMMIT"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("it does not say %q:\n%s", want, text.String())
		}
	}
	if !strings.Contains(whole.String(), `"take_overs": 7`) && !strings.Contains(whole.String(), `"take_overs":7`) {
		t.Errorf("the JSON is %s", whole.String())
	}
	p.Effects.Stops[0].Count = 0
	if p.judge(); p.OK() {
		t.Error("a stop that was not made is no fault of the run")
	}
}

// TestWhatIsLeftToAPersonIsExplained: only an answer that the processor repeats for ever, or a key
// that may be forgotten, explains a request that is left to a person.
func TestWhatIsLeftToAPersonIsExplained(t *testing.T) {
	t.Parallel()
	const forgotten = "effect charge: the other service may have forgotten its key, and it was not found"
	for name, test := range map[string]struct {
		parked  string
		age     time.Duration
		forEver bool
		want    bool
	}{
		"the same error for ever":       {"effect charge: the processor answers 400", time.Second, true, true},
		"nothing":                       {"effect charge: the processor answers 400", time.Hour, false, false},
		"a key that is forgotten":       {forgotten, keyLifetime / 10 * 9, false, true},
		"a key that is not forgotten":   {forgotten, keyLifetime/10*9 - time.Second, false, false},
		"a contradiction of long since": {"the answer is a refusal, and effect charge was made and not undone", time.Hour, false, false},
	} {
		r, _ := gatewayOf(t)
		key := check.Key{Scope: "acme", Key: "k"}
		r.left.Open = []check.OpenRequest{{Key: key, Parked: test.parked}}
		r.left.Effects = []check.RecordedEffect{{Key: key, Name: "charge", Kind: idempotency.EffectCall, State: idempotency.EffectIntended, DerivedKey: "derived"}}
		r.left.ages = []time.Duration{test.age}
		if test.forEver {
			r.gateway.calls[callName{"/charges", "derived"}] = &calls{forEver: true}
		}
		r.explain()
		if got := r.left.Open[0].Explained != ""; got != test.want {
			t.Errorf("%s: explained by %q", name, r.left.Open[0].Explained)
		}
		if r.left.parked.get(test.parked) != 1 {
			t.Errorf("%s: it is not counted", name)
		}
	}
}
