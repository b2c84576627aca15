package observe_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/observe"
	"github.com/paidonce/idempotency/observe/lostkey"
	"github.com/paidonce/idempotency/storage/memory"
)

// witness is a tracer that notes its calls.
type witness struct {
	name string
	told *[]string
}

type seenBy struct{}

func (w *witness) tell(ctx context.Context, event string) {
	by, _ := ctx.Value(seenBy{}).(string)
	*w.told = append(*w.told, w.name+" "+event+" after "+by)
}

func (w *witness) TraceRequestStart(ctx context.Context, _ idempotency.RequestStart) context.Context {
	w.tell(ctx, "start")
	by, _ := ctx.Value(seenBy{}).(string)
	return context.WithValue(ctx, seenBy{}, by+w.name)
}
func (w *witness) TraceStep(ctx context.Context, step idempotency.StepEnd) {
	w.tell(ctx, string(step.Step))
}
func (w *witness) TraceRequestEnd(ctx context.Context, _ idempotency.RequestEnd) {
	w.tell(ctx, "end")
}
func (w *witness) TraceRefused(ctx context.Context, _ idempotency.Refused) { w.tell(ctx, "refused") }

// patient is a witness that also gets the starts of waits.
type patient struct{ witness }

func (p *patient) TraceWaitStart(ctx context.Context) { p.tell(ctx, "waits") }

func (p *patient) TraceEffect(ctx context.Context, _ idempotency.EffectEnd) { p.tell(ctx, "calls") }

func TestJoinTellsEachInOrder(t *testing.T) {
	t.Parallel()
	var told []string
	a, b := &witness{"a", &told}, &patient{witness{"b", &told}}
	tracer := observe.Join(nil, a, nil, b)
	ctx := tracer.TraceRequestStart(context.Background(), idempotency.RequestStart{})
	tracer.TraceStep(ctx, idempotency.StepEnd{Step: idempotency.StepClaim})
	tracer.(idempotency.WaitTracer).TraceWaitStart(ctx)
	tracer.(idempotency.EffectTracer).TraceEffect(ctx, idempotency.EffectEnd{})
	tracer.TraceRequestEnd(ctx, idempotency.RequestEnd{})
	tracer.TraceRefused(context.Background(), idempotency.Refused{})
	want := []string{
		"a start after ", "b start after a", "a claim after ab", "b claim after ab", "b waits after ab", "b calls after ab",
		"a end after ab", "b end after ab", "a refused after ", "b refused after ",
	}
	if !slices.Equal(told, want) {
		t.Errorf("told %q\nwant %q", told, want)
	}
}

func TestJoinOfFew(t *testing.T) {
	t.Parallel()
	var told []string
	a := &witness{"a", &told}
	if got := observe.Join(); got != nil {
		t.Errorf("of none: %v", got)
	}
	if got := observe.Join(nil, nil); got != nil {
		t.Errorf("of nil: %v", got)
	}
	if got := observe.Join(nil, a); got != idempotency.Tracer(a) {
		t.Errorf("of one: %v", got)
	}
}

// The label of an error is the sentinel that it wraps, and never its text.
func TestErrorKind(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		err  error
		want string
	}{
		{nil, ""},
		{idempotency.ErrInProgress, "in-progress"},
		{idempotency.ErrUnavailable, "unavailable"},
		{idempotency.ErrNotSerializable, "serialization"},
		{idempotency.ErrAborted, "aborted"},
		{idempotency.ErrKeyRecorded, "key-recorded"},
		{idempotency.ErrTransactionLost, "transaction-lost"},
		{idempotency.ErrUnknown, "unknown"},
		{idempotency.ErrRecordCorrupt, "record-corrupt"},
		{errors.New("canary"), "other"},
		{&idempotency.PanicError{Value: "canary"}, "other"},
		{fmt.Errorf("commit: %w: %w", idempotency.ErrUnknown, idempotency.ErrUnavailable), "unknown"},
		{errors.Join(idempotency.ErrUnavailable, fmt.Errorf("resolve: %w", idempotency.ErrUnknown)), "unknown"},
	} {
		if got := observe.ErrorKind(test.err); got != test.want {
			t.Errorf("%v: %q, want %q", test.err, got, test.want)
		}
	}
}

func TestOutcomeTellsDeclinedFromExecuted(t *testing.T) {
	t.Parallel()
	end := idempotency.RequestEnd{Result: idempotency.Result{Outcome: idempotency.OutcomeExecuted}}
	if got := observe.Outcome(end); got != idempotency.OutcomeExecuted {
		t.Error(got)
	}
	end.Declined = true
	if got := observe.Outcome(end); got != "declined" {
		t.Error(got)
	}
}

// Events that need attention are warnings, all others are at debug level, and neither contain a
// client's data.
func TestLogWritesEventsWithoutSecrets(t *testing.T) {
	t.Parallel()
	var buffer bytes.Buffer
	log := observe.NewLog(slog.New(slog.NewTextHandler(&buffer, &slog.HandlerOptions{Level: slog.LevelDebug})))
	detector := lostkey.New(&lostkey.Options{OnLost: log.LostKey})
	engine := idempotency.NewEngine(memory.New(nil), &idempotency.Options{Tracer: observe.Join(log, detector)})
	do := func(key, body string, run idempotency.RunFunc) {
		engine.Do(context.Background(), idempotency.Request{
			Key: idempotency.Key{Scope: "canary-scope", Value: key}, Fingerprint: idempotency.NewFingerprint(100, []byte(body)),
			TraceID: "canary-trace", Route: "POST /transfers",
		}, run)
	}
	answering := func(status int) idempotency.RunFunc {
		return func(context.Context) (*idempotency.Answer, error) {
			return &idempotency.Answer{Status: status, Body: []byte("canary-answer"), Header: map[string][]string{"Etag": {"canary-header"}}}, nil
		}
	}
	for _, step := range []struct {
		do   func()
		want []string // parts of lines, in order
	}{
		{func() { do("canary-1", "canary-a", answering(201)) }, []string{`level=DEBUG msg="idempotency: request settled" route="POST /transfers" outcome=executed`}},
		{func() { do("canary-1", "canary-a", answering(201)) }, []string{"level=DEBUG msg=\"idempotency: request settled\" route=\"POST /transfers\" outcome=replayed"}},
		{func() { do("canary-1", "canary-b", answering(201)) }, []string{"level=WARN msg=\"idempotency: request settled\" route=\"POST /transfers\" outcome=mismatch reason=key-reused"}},
		{func() { do("canary-2", "canary-a", answering(201)) }, []string{"level=WARN msg=\"idempotency: the same request came with another key\" route=\"POST /transfers\"", "outcome=executed"}},
		{func() { do("canary-3", "canary-c", answering(402)) }, []string{"level=DEBUG msg=\"idempotency: request settled\" route=\"POST /transfers\" outcome=declined"}},
		{func() {
			do("canary-4", "canary-d", func(context.Context) (*idempotency.Answer, error) { panic("canary-panic") })
		},
			[]string{"level=DEBUG msg=\"idempotency: step\" step=handler error=other", "level=WARN msg=\"idempotency: request settled\" route=\"POST /transfers\" outcome=not-executed reason=handler-failed error=other"}},
		{func() {
			log.TraceRefused(context.Background(), idempotency.Refused{Route: "POST /transfers", Reason: idempotency.ReasonKeyInvalid, Status: 400, Err: errors.New("canary")})
		},
			[]string{"level=DEBUG msg=\"idempotency: request refused\" route=\"POST /transfers\" reason=key-invalid status=400"}},
		{func() {
			log.TraceRefused(context.Background(), idempotency.Refused{Reason: idempotency.ReasonReplayDenied, Status: 403})
		}, []string{"level=WARN", "reason=replay-denied status=403"}},
		{func() {
			log.TraceStep(context.Background(), idempotency.StepEnd{Step: idempotency.StepResolve, Duration: time.Second})
		}, []string{"level=WARN", "step=resolve"}},
	} {
		buffer.Reset()
		step.do()
		text := buffer.String()
		if strings.Contains(text, "canary") {
			t.Errorf("written: %s", text)
		}
		rest := text
		for _, want := range step.want {
			_, after, found := strings.Cut(rest, want)
			if !found {
				t.Errorf("written: %s\nwant %s", text, want)
			}
			rest = after
		}
	}
	buffer.Reset()
	quiet := observe.NewLog(slog.New(slog.NewTextHandler(&buffer, nil)))
	quiet.TraceRequestEnd(context.Background(), idempotency.RequestEnd{Result: idempotency.Result{Outcome: idempotency.OutcomeExecuted}})
	if buffer.Len() > 0 {
		t.Errorf("a request that went well is written at the level of information: %s", buffer.String())
	}
}

func TestNewLogWithoutALoggerPanics(t *testing.T) {
	t.Parallel()
	defer func() {
		if recover() == nil {
			t.Error("it does not panic")
		}
	}()
	observe.NewLog(nil)
}
