package idempotency_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/paidonce/idempotency"
)

// tape is a tracer that notes its calls.
type tape struct {
	lines []string
	steps []idempotency.StepEnd
	start idempotency.RequestStart
	end   idempotency.RequestEnd
}

type tapeKey struct{}

func (p *tape) TraceRequestStart(ctx context.Context, data idempotency.RequestStart) context.Context {
	p.start = data
	p.lines = append(p.lines, "start")
	return context.WithValue(ctx, tapeKey{}, p)
}

func (p *tape) TraceWaitStart(ctx context.Context) { p.add(ctx, "waits") }

func (p *tape) TraceStep(ctx context.Context, data idempotency.StepEnd) {
	p.steps = append(p.steps, data)
	p.add(ctx, string(data.Step))
}

func (p *tape) TraceRequestEnd(ctx context.Context, data idempotency.RequestEnd) {
	p.end = data
	p.add(ctx, "end "+string(data.Result.Outcome))
}

func (p *tape) TraceRefused(ctx context.Context, _ idempotency.Refused) { p.add(ctx, "refused") }

func (p *tape) add(ctx context.Context, line string) {
	if ctx.Value(tapeKey{}) != p {
		line += " outside the request"
	}
	p.lines = append(p.lines, line)
}

func TestTracerIsToldOfEverything(t *testing.T) {
	t.Parallel()
	record := &idempotency.Record{Fingerprint: fingerprint}
	for name, test := range map[string]struct {
		turns    []turn
		run      idempotency.RunFunc
		want     string
		attempts int
		stepErr  error // of the last step
	}{
		"commit":            {[]turn{{}}, answering(201), "start, claim, handler, commit, end executed", 1, nil},
		"decline":           {[]turn{{}}, answering(402), "start, claim, handler, decline, end executed", 1, nil},
		"forget":            {[]turn{{}}, answering(500), "start, claim, handler, rollback, end not-executed", 1, nil},
		"fails":             {[]turn{{}}, failing(errOther), "start, claim, handler, rollback, end not-executed", 1, nil},
		"replay":            {[]turn{{record: record}}, answering(201), "start, claim, end replayed", 1, nil},
		"in progress":       {[]turn{{begin: idempotency.ErrInProgress}}, answering(201), "start, claim, end in-progress", 1, idempotency.ErrInProgress},
		"unknown":           {[]turn{{end: idempotency.ErrUnknown, resolve: idempotency.ErrUnknown}}, answering(201), "start, claim, handler, commit, resolve, end unknown", 1, idempotency.ErrUnknown},
		"resolved":          {[]turn{{end: idempotency.ErrUnknown, resolved: ours}}, answering(201), "start, claim, handler, commit, resolve, end executed", 1, nil},
		"decline, resolved": {[]turn{{end: idempotency.ErrUnknown, resolved: ours}}, answering(402), "start, claim, handler, decline, resolve, end executed", 1, nil},
		"declined in vain":  {[]turn{{end: idempotency.ErrKeyRecorded}, {record: record}}, answering(402), "start, claim, handler, decline, claim, end replayed", 2, nil},
		"again":             {[]turn{{end: idempotency.ErrKeyRecorded}, {record: record}}, answering(201), "start, claim, handler, commit, claim, end replayed", 2, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tape := &tape{}
			store := scripted(test.turns...)
			req := keyed("k")
			req.TraceID, req.Route = "0af7651916cd43dd8448eb211c80319c", "POST /transfers"
			run := func(ctx context.Context) (*idempotency.Answer, error) {
				if ctx.Value(tapeKey{}) != tape {
					t.Error("the tracer's context does not reach the handler")
				}
				return test.run(ctx)
			}
			result := idempotency.NewEngine(store, &idempotency.Options{Tracer: tape}).Do(t.Context(), req, run)
			if got := strings.Join(tape.lines, ", "); got != test.want {
				t.Errorf("told of %s\nwant %s", got, test.want)
			}
			if tape.start.Key != req.Key || tape.start.Fingerprint != req.Fingerprint || tape.start.TraceID != req.TraceID || tape.start.Route != req.Route {
				t.Errorf("start: %+v", tape.start)
			}
			end := tape.end
			if end.Key != req.Key || end.Attempts != test.attempts || end.Result.Outcome != result.Outcome || end.Result.Reason != result.Reason || end.Started.IsZero() || end.Duration < 0 {
				t.Errorf("end: %+v", end)
			}
			if end.Route != req.Route || end.Declined != (name == "decline" || name == "decline, resolved") || end.Resolved != strings.Contains(test.want, "resolve") {
				t.Errorf("end: route %q, declined %t, resolved %t", end.Route, end.Declined, end.Resolved)
			}
			if last := store.begun[len(store.begun)-1].Attempt; end.Attempt != last {
				t.Errorf("end: attempt %v, want the last, %v", end.Attempt, last)
			}
			attempt := -1
			for _, step := range tape.steps {
				if step.Step == idempotency.StepClaim {
					attempt++
				}
				if step.Attempt != store.begun[attempt].Attempt || step.Started.Before(end.Started) || step.Duration < 0 || step.Duration > end.Duration {
					t.Errorf("step: %+v", step)
				}
			}
			if err := tape.steps[len(tape.steps)-1].Err; !errors.Is(err, test.stepErr) {
				t.Errorf("last step: %v, want %v", err, test.stepErr)
			}
		})
	}
}

func TestTracerIsToldOfSheddingAndNotOfInvalidKeys(t *testing.T) {
	t.Parallel()
	tape := &tape{}
	engine := idempotency.NewEngine(scripted(turn{}), &idempotency.Options{Tracer: tape, InFlightMax: 1})
	engine.Do(t.Context(), keyed("outer"), func(ctx context.Context) (*idempotency.Answer, error) {
		engine.Do(ctx, keyed("inner"), answering(201))
		return &idempotency.Answer{Status: 201}, nil
	})
	if got, want := strings.Join(tape.lines, ", "), "start, claim, start, end not-executed, handler, commit, end executed"; got != want {
		t.Errorf("told of %s\nwant %s", got, want)
	}
	tape.lines = nil
	engine.Do(t.Context(), keyed(" "), answering(201))
	if len(tape.lines) != 0 {
		t.Errorf("told of %v", tape.lines)
	}
}

func TestTracersDataShowsNoKey(t *testing.T) {
	t.Parallel()
	tape := &tape{}
	idempotency.NewEngine(scripted(turn{}), &idempotency.Options{Tracer: tape}).Do(t.Context(), keyed("canary"), answering(201))
	if text := fmt.Sprintf("%v %+v %#v", tape.start, tape.end, tape.steps); strings.Contains(text, "canary") {
		t.Errorf("shown: %s", text)
	}
}
