package idempotency_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/memory"
)

// A recorded key is never reported as not executed, whatever prevents reading the record.
func TestRecordedKeyIsNeverCalledNotExecuted(t *testing.T) {
	t.Parallel()
	lost := turn{end: fmt.Errorf("commit: %w", idempotency.ErrKeyRecorded)}
	for name, test := range map[string]struct {
		opts  idempotency.Options
		turns []turn
	}{
		"the restarts are spent":  {idempotency.Options{Restarts: -1}, []turn{lost}},
		"the time is over":        {idempotency.Options{Timeouts: idempotency.Timeouts{Handler: time.Nanosecond}}, []turn{lost}},
		"the store is gone":       {idempotency.Options{}, []turn{lost, {begin: idempotency.ErrUnavailable}}},
		"then a serialization":    {idempotency.Options{Restarts: 1}, []turn{lost, {begin: idempotency.ErrNotSerializable}}},
		"then an unknown failure": {idempotency.Options{}, []turn{lost, {begin: errOther}}},
	} {
		result := idempotency.NewEngine(scripted(test.turns...), &test.opts).Do(t.Context(), keyed("k"), answering(201))
		if result.Outcome != idempotency.OutcomeUnknown || result.Reason != idempotency.ReasonOutcomeUnknown {
			t.Errorf("%s: %s, %s", name, result.Outcome, result.Reason)
		}
	}
}

// If an answer could not be replayed, the handler fails before anything is recorded.
func TestAnswerThatCannotBeReplayedIsNotRecorded(t *testing.T) {
	t.Parallel()
	header := func(name, value string) map[string][]string { return map[string][]string{name: {value}} }
	for name, test := range map[string]struct {
		answer idempotency.Answer
		want   idempotency.Outcome
	}{
		"lowest status":          {idempotency.Answer{Status: idempotency.StatusMin}, idempotency.OutcomeExecuted},
		"a status too low":       {idempotency.Answer{Status: idempotency.StatusMin - 1}, idempotency.OutcomeNotExecuted},
		"highest status":         {idempotency.Answer{Status: idempotency.StatusMax}, idempotency.OutcomeExecuted},
		"a status too high":      {idempotency.Answer{Status: idempotency.StatusMax + 1}, idempotency.OutcomeNotExecuted},
		"tab and bytes":          {idempotency.Answer{Status: 201, Header: header("X-!#$%&'*+.^_`|~9", "\ta\xff")}, idempotency.OutcomeExecuted},
		"no name":                {idempotency.Answer{Status: 201, Header: header("", "a")}, idempotency.OutcomeNotExecuted},
		"a colon in a name":      {idempotency.Answer{Status: 201, Header: header("A:", "a")}, idempotency.OutcomeNotExecuted},
		"a line break":           {idempotency.Answer{Status: 201, Header: header("A", "a\r\nB: c")}, idempotency.OutcomeNotExecuted},
		"a NUL":                  {idempotency.Answer{Status: 402, Header: header("A", "\x00")}, idempotency.OutcomeNotExecuted},
		"headers at the limit":   {idempotency.Answer{Status: 201, Header: header("A", strings.Repeat("a", idempotency.HeaderBytesMax-1))}, idempotency.OutcomeExecuted},
		"headers over the limit": {idempotency.Answer{Status: 201, Header: header("A", strings.Repeat("a", idempotency.HeaderBytesMax))}, idempotency.OutcomeNotExecuted},
	} {
		store := scripted(turn{})
		policy := &idempotency.Options{Disposition: func(status int) idempotency.Disposition {
			if status == 402 {
				return idempotency.DispositionDecline
			}
			return idempotency.DispositionCommit
		}}
		result := idempotency.NewEngine(store, policy).Do(t.Context(), keyed("k"), func(context.Context) (*idempotency.Answer, error) {
			return &test.answer, nil
		})
		if result.Outcome != test.want {
			t.Errorf("%s: %s, %v", name, result.Outcome, result.Err)
		}
		if result.Outcome == idempotency.OutcomeNotExecuted && (result.Reason != idempotency.ReasonHandlerFailed || store.log() != "begin seal rollback") {
			t.Errorf("%s: %s, steps %q", name, result.Reason, store.log())
		}
	}
}

// A request that can't be compared, or that would have an expired record, is refused before it
// begins.
func TestUnfinishedRequestIsNeverBegun(t *testing.T) {
	t.Parallel()
	request := func(change func(*idempotency.Request)) idempotency.Request {
		r := keyed("k")
		change(&r)
		return r
	}
	for name, test := range map[string]struct {
		request idempotency.Request
		begun   bool
	}{
		"no fingerprint":          {request(func(r *idempotency.Request) { r.Fingerprint = idempotency.Fingerprint{} }), false},
		"keyless, no fingerprint": {idempotency.Request{}, true},
		"a negative TTL":          {request(func(r *idempotency.Request) { r.TTL = -time.Hour }), false},
		"a TTL too short":         {request(func(r *idempotency.Request) { r.TTL = idempotency.TTLMin - 1 }), false},
		"the shortest TTL":        {request(func(r *idempotency.Request) { r.TTL = idempotency.TTLMin }), true},
	} {
		store := scripted(turn{})
		result := idempotency.NewEngine(store, nil).Do(t.Context(), test.request, answering(201))
		if begun := store.log() != ""; begun != test.begun || begun != (result.Outcome == idempotency.OutcomeExecuted) {
			t.Errorf("%s: %s %v, steps %q", name, result.Outcome, result.Err, store.log())
		}
	}
}

// A trace id is no reason to refuse a payment.
func TestTraceIDThatCannotBeRecordedIsLeftOut(t *testing.T) {
	t.Parallel()
	for id, want := range map[string]string{
		"4bf92f35": "4bf92f35", "a\x00": "", "ü": "", "a b": "",
		strings.Repeat("a", idempotency.TraceIDBytesMax):   strings.Repeat("a", idempotency.TraceIDBytesMax),
		strings.Repeat("a", idempotency.TraceIDBytesMax+1): "",
	} {
		store := scripted(turn{})
		request := keyed("k")
		request.TraceID = id
		idempotency.NewEngine(store, nil).Do(t.Context(), request, answering(201))
		if got := store.begun[0].TraceID; got != want {
			t.Errorf("%q was begun as %q, want %q", id, got, want)
		}
	}
}

// If a handler exceeds its time and panics, the operator still learns of the panic.
func TestTimeoutHidesNoPanic(t *testing.T) {
	t.Parallel()
	cause := errors.New("cause")
	engine := idempotency.NewEngine(scripted(turn{}), &idempotency.Options{Timeouts: idempotency.Timeouts{Handler: time.Millisecond}})
	result := engine.Do(t.Context(), keyed("k"), func(ctx context.Context) (*idempotency.Answer, error) {
		<-ctx.Done()
		panic(cause)
	})
	var panicked *idempotency.PanicError
	if result.Reason != idempotency.ReasonUnavailable || !errors.As(result.Err, &panicked) || !errors.Is(result.Err, cause) {
		t.Errorf("%s: %v", result.Reason, result.Err)
	}
}

// hooks is a tracer that counts, and after a step panics or ends its goroutine.
type hooks struct {
	mu     sync.Mutex
	starts int
	ends   []idempotency.RequestEnd
	after  idempotency.Step
	exits  bool
}

func (h *hooks) fail() {
	if h.exits {
		runtime.Goexit()
	}
	panic("a hook of the caller's")
}

func (h *hooks) TraceRequestStart(ctx context.Context, _ idempotency.RequestStart) context.Context {
	h.starts++
	return ctx
}

func (h *hooks) TraceStep(_ context.Context, data idempotency.StepEnd) {
	if data.Step == h.after {
		h.fail()
	}
}

func (h *hooks) TraceRequestEnd(_ context.Context, data idempotency.RequestEnd) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ends = append(h.ends, data)
}

func (h *hooks) TraceRefused(context.Context, idempotency.Refused) {}

// If a tracer panics, the client still gets its answer, and the operator gets the error. If it ends
// its goroutine, nothing stays held. Every start has its end.
func TestTracerThatPanicsChangesNothing(t *testing.T) {
	t.Parallel()
	for _, exits := range []bool{false, true} {
		for _, step := range []idempotency.Step{idempotency.StepClaim, idempotency.StepHandler, idempotency.StepCommit} {
			tracer := &hooks{after: step, exits: exits}
			store := scripted(turn{})
			engine := idempotency.NewEngine(store, &idempotency.Options{Tracer: tracer})
			var result idempotency.Result
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				result = engine.Do(t.Context(), keyed("k"), answering(201))
			}()
			<-ended
			if strings.Count(store.log(), "rollback")+strings.Count(store.log(), "commit") != 1 {
				t.Errorf("%s, exits %t: steps %q", step, exits, store.log())
			}
			if tracer.starts != 1 || len(tracer.ends) != 1 || engine.InFlight() != 0 {
				t.Errorf("%s, exits %t: %d starts, %d ends, %d in flight", step, exits, tracer.starts, len(tracer.ends), engine.InFlight())
			}
			want := idempotency.OutcomeExecuted
			if exits {
				want = idempotency.OutcomeUnknown
			}
			if outcome := tracer.ends[0].Result.Outcome; outcome != want {
				t.Errorf("%s, exits %t: outcome %s", step, exits, outcome)
			}
			if exits {
				continue
			}
			var panicked *idempotency.PanicError
			if result.Outcome != want || result.Answer == nil || !errors.As(result.Err, &panicked) || panicked.Value != "a hook of the caller's" ||
				panicked.Error() != "Tracer panicked with a string" || len(panicked.Stack) == 0 {
				t.Errorf("%s: result %+v", step, result)
			}
		}
	}
}

// The same holds for a tracer's panic at the start, at the end or when a wait begins. It never
// passes for the handler's http.ErrAbortHandler, which an adapter passes on.
func TestTracerThatPanicsAtStartAndEndChangesNothing(t *testing.T) {
	t.Parallel()
	for _, at := range []string{"start", "end"} {
		result := idempotency.NewEngine(memory.New(nil), &idempotency.Options{Tracer: brokenTracer(at)}).Do(t.Context(), keyed("k"), answering(201))
		var panicked *idempotency.PanicError
		if result.Outcome != idempotency.OutcomeExecuted || !errors.As(result.Err, &panicked) || errors.Is(result.Err, http.ErrAbortHandler) {
			t.Errorf("%s: %+v", at, result)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		engine := idempotency.NewEngine(memory.New(nil), &idempotency.Options{Tracer: brokenTracer("wait"), Wait: time.Minute})
		results := make(chan idempotency.Result, 2)
		for range 2 {
			go func() {
				results <- engine.Do(t.Context(), keyed("k"), func(context.Context) (*idempotency.Answer, error) {
					time.Sleep(time.Second) // so that the other waits
					return &idempotency.Answer{Status: 201}, nil
				})
			}()
		}
		for _, want := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed} {
			if result := <-results; result.Outcome != want || (result.Err != nil) != (want == idempotency.OutcomeReplayed) {
				t.Errorf("%s: %+v", want, result)
			}
		}
	})
}

// brokenTracer is the name of the event at which it panics.
type brokenTracer string

func (b brokenTracer) maybe(at string) {
	if string(b) == at {
		panic(http.ErrAbortHandler)
	}
}

func (b brokenTracer) TraceRequestStart(ctx context.Context, _ idempotency.RequestStart) context.Context {
	b.maybe("start")
	return ctx
}
func (b brokenTracer) TraceStep(context.Context, idempotency.StepEnd)          {}
func (b brokenTracer) TraceRequestEnd(context.Context, idempotency.RequestEnd) { b.maybe("end") }
func (b brokenTracer) TraceRefused(context.Context, idempotency.Refused)       {}
func (b brokenTracer) TraceWaitStart(context.Context)                          { b.maybe("wait") }

// If a policy panics, nothing says that the answer is final: the handler's writes are undone, and
// the client gets not-executed.
func TestPolicyThatPanicsFailsTheHandler(t *testing.T) {
	t.Parallel()
	for whose, options := range map[string]idempotency.Options{
		"Options.Disposition": {Disposition: func(int) idempotency.Disposition { panic(http.ErrAbortHandler) }},
		"Options.Reduce":      {Reduce: func(idempotency.Answer) idempotency.Answer { panic(http.ErrAbortHandler) }},
	} {
		for _, status := range []int{201, 402} {
			store := scripted(turn{})
			engine := idempotency.NewEngine(store, &options)
			result := engine.Do(t.Context(), keyed("k"), answering(status))
			if result.Outcome != idempotency.OutcomeNotExecuted || result.Reason != idempotency.ReasonHandlerFailed || store.log() != "begin seal rollback" {
				t.Errorf("%s, %d: %+v, steps %q", whose, status, result, store.log())
			}
			if errors.Is(result.Err, http.ErrAbortHandler) || !strings.Contains(result.Err.Error(), whose+" panicked with a *errors.errorString") || engine.InFlight() != 0 {
				t.Errorf("%s, %d: error %v, %d in flight", whose, status, result.Err, engine.InFlight())
			}
		}
	}
}

// Retries may get less than the first client got.
func TestReduceIsRecordedAndNotAnswered(t *testing.T) {
	t.Parallel()
	reduce := func(answer idempotency.Answer) idempotency.Answer {
		answer.Body = nil
		return answer
	}
	for status, end := range map[int]string{201: "commit", 402: "decline"} {
		store := scripted(turn{})
		result := idempotency.NewEngine(store, &idempotency.Options{Reduce: reduce}).Do(t.Context(), keyed("k"), answering(status))
		if store.log() != "begin seal "+end || len(store.answers) != 1 || len(store.answers[0].Body) != 0 || store.answers[0].Status != status {
			t.Errorf("%d: steps %s recorded %+v", status, store.log(), store.answers)
		}
		if result.Answer == nil || string(result.Answer.Body) != "answer" {
			t.Errorf("%d: the first client got %+v", status, result.Answer)
		}
	}
	store := scripted(turn{})
	spoil := func(answer idempotency.Answer) idempotency.Answer { return idempotency.Answer{Status: 99} }
	result := idempotency.NewEngine(store, &idempotency.Options{Reduce: spoil}).Do(t.Context(), keyed("k"), answering(201))
	if result.Reason != idempotency.ReasonHandlerFailed || store.log() != "begin seal rollback" {
		t.Errorf("a record that can't be replayed: %s, steps %s", result.Reason, store.log())
	}
}

// The look-up of a lost COMMIT has time of its own, however much the handler and COMMIT have used.
func TestResolveHasItsOwnTime(t *testing.T) {
	t.Parallel()
	store := scripted(turn{end: idempotency.ErrUnknown, resolved: ours})
	options := &idempotency.Options{Timeouts: idempotency.Timeouts{Handler: time.Nanosecond, Commit: time.Nanosecond, Resolve: time.Hour}}
	ctx, cancel := context.WithCancel(t.Context())
	run := func(context.Context) (*idempotency.Answer, error) {
		cancel()
		return &idempotency.Answer{Status: 201}, nil
	}
	result := idempotency.NewEngine(store, options).Do(ctx, keyed("k"), run)
	if result.Outcome != idempotency.OutcomeExecuted || store.log() != "begin seal commit resolve" {
		t.Fatalf("%s, steps %s", result.Outcome, store.log())
	}
	deadline, ok := store.ends[1].Deadline()
	if left := time.Until(deadline); !ok || left < 59*time.Minute {
		t.Errorf("resolve has %v left", left)
	}
}

// pickyStore is a store with timeouts that are too short for a handler of more than a minute.
type pickyStore struct{ *script }

func (pickyStore) CheckBudget(handlerTimeout, _ time.Duration) error {
	if handlerTimeout > time.Minute {
		return errors.New("picky: raise the timeout")
	}
	return nil
}

func TestWiringMistakesPanic(t *testing.T) {
	t.Parallel()
	store := scripted(turn{})
	for name, test := range map[string]struct {
		make func()
		want string // the text of the panic; empty if there is none
	}{
		"no store": {func() { idempotency.NewEngine(nil, nil) }, "needs a Store"},
		"negative handler time": {func() {
			idempotency.NewEngine(store, &idempotency.Options{Timeouts: idempotency.Timeouts{Handler: -1}})
		}, "Timeouts.Handler"},
		"negative commit time": {func() { idempotency.NewEngine(store, &idempotency.Options{Timeouts: idempotency.Timeouts{Commit: -1}}) }, "Timeouts.Commit"},
		"negative rollback time": {func() {
			idempotency.NewEngine(store, &idempotency.Options{Timeouts: idempotency.Timeouts{Rollback: -1}})
		}, "Timeouts.Rollback"},
		"TTL under the least": {func() { idempotency.NewEngine(store, &idempotency.Options{TTL: time.Second - 1}) }, "TTL"},
		"least TTL":           {func() { idempotency.NewEngine(store, &idempotency.Options{TTL: time.Second}) }, ""},
		"budget of the store": {func() {
			idempotency.NewEngine(pickyStore{store}, &idempotency.Options{Timeouts: idempotency.Timeouts{Handler: time.Minute}})
		}, ""},
		"over the store's budget": {func() {
			idempotency.NewEngine(pickyStore{store}, &idempotency.Options{Timeouts: idempotency.Timeouts{Handler: time.Minute + 1}})
		}, "raise the timeout"},
		"a relative over the store's budget": {func() {
			idempotency.NewEngine(pickyStore{store}, nil).With(&idempotency.Options{Timeouts: idempotency.Timeouts{Handler: time.Hour}})
		}, "raise the timeout"},
	} {
		func() {
			defer func() {
				value := recover()
				text, _ := value.(string)
				if (value != nil) != (test.want != "") || !strings.Contains(text, test.want) || value != nil && !strings.HasPrefix(text, "idempotency: ") {
					t.Errorf("%s: panic %v, want %q", name, value, test.want)
				}
			}()
			test.make()
		}()
	}
}
