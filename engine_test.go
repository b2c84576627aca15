package idempotency_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/memory"
)

// script is a store with prescribed results for every step, because no real store fails in all
// these ways on demand. Each attempt takes the next turn; the last one is used again and again.
type script struct {
	turns []turn

	mu      sync.Mutex
	steps   []string
	begun   []idempotency.Claim
	ends    []context.Context // the contexts that Commit, Decline and Rollback got
	answers []*idempotency.Answer
}

// turn has the results of the steps of one attempt.
type turn struct {
	begin  error
	record *idempotency.Record
	seal   error
	end    error // of Commit and Decline

	resolved *idempotency.Record // the record that Resolve finds; ours is the attempt's own
	resolve  error

	resolving func() // called by Resolve
}

// ours stands for the record of the attempt that calls Resolve.
var ours = &idempotency.Record{}

func (s *script) Begin(_ context.Context, claim *idempotency.Claim) (idempotency.Attempt, *idempotency.Record, error) {
	turn := s.turns[min(len(s.begun), len(s.turns)-1)]
	s.begun = append(s.begun, *claim)
	s.took("begin")
	if turn.begin != nil || turn.record != nil {
		return nil, turn.record, turn.begin
	}
	return &scriptAttempt{s, turn}, nil, nil
}

func (s *script) Resolve(ctx context.Context, claim *idempotency.Claim) (*idempotency.Record, error) {
	turn := s.turns[min(len(s.begun), len(s.turns))-1]
	s.took("resolve")
	if turn.resolving != nil {
		turn.resolving()
	}
	s.ends = append(s.ends, ctx)
	if turn.resolved == ours {
		return &idempotency.Record{Attempt: claim.Attempt}, turn.resolve
	}
	return turn.resolved, turn.resolve
}

func (s *script) took(step string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.steps = append(s.steps, step)
}

func (s *script) log() string { return strings.Join(s.steps, " ") }

type scriptAttempt struct {
	*script
	turn turn
}

func (a *scriptAttempt) Context(ctx context.Context) context.Context { return ctx }
func (a *scriptAttempt) Seal() error                                 { a.took("seal"); return a.turn.seal }
func (a *scriptAttempt) Lost() bool                                  { return false }

func (a *scriptAttempt) Commit(ctx context.Context, answer *idempotency.Answer) error {
	return a.end("commit", ctx, answer)
}

func (a *scriptAttempt) Decline(ctx context.Context, answer *idempotency.Answer) error {
	return a.end("decline", ctx, answer)
}

func (a *scriptAttempt) Rollback(ctx context.Context) error {
	_ = a.end("rollback", ctx, nil)
	return nil
}

func (a *scriptAttempt) end(step string, ctx context.Context, answer *idempotency.Answer) error {
	a.took(step)
	a.ends = append(a.ends, ctx)
	a.answers = append(a.answers, answer)
	return a.turn.end
}

func scripted(turns ...turn) *script { return &script{turns: turns} }

var (
	fingerprint      = idempotency.NewFingerprintV1("POST", "/transfers", "", "", nil)
	otherFingerprint = idempotency.NewFingerprintV1("POST", "/orders", "", "", nil)
)

func keyed(value string) idempotency.Request {
	return idempotency.Request{Key: idempotency.Key{Scope: "acme", Value: value}, Fingerprint: fingerprint}
}

// answering returns a handler that answers a status.
func answering(status int) idempotency.RunFunc {
	return func(context.Context) (*idempotency.Answer, error) {
		return &idempotency.Answer{Status: status, Body: []byte("answer")}, nil
	}
}

func failing(err error) idempotency.RunFunc {
	return func(context.Context) (*idempotency.Answer, error) { return nil, err }
}

func panicking(value any) idempotency.RunFunc {
	return func(context.Context) (*idempotency.Answer, error) { panic(value) }
}

// asking returns a handler that calls DerivedKey before it calls run.
func asking(run idempotency.RunFunc) idempotency.RunFunc {
	return func(ctx context.Context) (*idempotency.Answer, error) {
		_ = idempotency.DerivedKey(ctx, "charge")
		return run(ctx)
	}
}

var errOther = errors.New("an error nobody knows")

// TestEveryStepEveryError compares the client's answer after each error at each step, and checks
// that everything that was begun is ended once.
func TestEveryStepEveryError(t *testing.T) {
	t.Parallel()
	const (
		executed    = idempotency.OutcomeExecuted
		replayed    = idempotency.OutcomeReplayed
		inProgress  = idempotency.OutcomeInProgress
		mismatch    = idempotency.OutcomeMismatch
		notExecuted = idempotency.OutcomeNotExecuted
		unknown     = idempotency.OutcomeUnknown

		unavailable    = idempotency.ReasonUnavailable
		failed         = idempotency.ReasonHandlerFailed
		outcomeUnknown = idempotency.ReasonOutcomeUnknown
		lost           = idempotency.ReasonTransactionLost
		keyReused      = idempotency.ReasonKeyReused
		recordCorrupt  = idempotency.ReasonRecordCorrupt
	)
	record := func(f idempotency.Fingerprint) *idempotency.Record {
		return &idempotency.Record{Fingerprint: f, Answer: idempotency.Answer{Status: 201, Body: []byte("recorded")}}
	}
	once := "begin seal "
	for name, test := range map[string]struct {
		turns   []turn
		run     idempotency.RunFunc
		outcome idempotency.Outcome
		reason  idempotency.Reason // empty if there is an answer
		steps   string
		err     error
	}{
		"claim: in progress":         {[]turn{{begin: idempotency.ErrInProgress}}, nil, inProgress, idempotency.ReasonInProgress, "begin", idempotency.ErrInProgress},
		"claim: unavailable":         {[]turn{{begin: idempotency.ErrUnavailable}}, nil, notExecuted, unavailable, "begin", idempotency.ErrUnavailable},
		"claim: aborted":             {[]turn{{begin: idempotency.ErrAborted}}, nil, notExecuted, unavailable, "begin", idempotency.ErrAborted},
		"claim: any error":           {[]turn{{begin: errOther}}, nil, notExecuted, unavailable, "begin", errOther},
		"claim: unreadable record":   {[]turn{{begin: idempotency.ErrUnknown}}, nil, unknown, outcomeUnknown, "begin", idempotency.ErrUnknown},
		"claim: start again":         {[]turn{{begin: idempotency.ErrNotSerializable}, {}}, answering(201), executed, "", "begin begin seal commit", nil},
		"claim: replay":              {[]turn{{record: record(fingerprint)}}, nil, replayed, "", "begin", nil},
		"claim: other request":       {[]turn{{record: record(otherFingerprint)}}, nil, mismatch, idempotency.ReasonKeyReused, "begin", nil},
		"claim: unknown print":       {[]turn{{record: record(idempotency.NewFingerprint(100, nil))}}, nil, unknown, outcomeUnknown, "begin", nil},
		"handler: 201":               {[]turn{{}}, answering(201), executed, "", once + "commit", nil},
		"handler: 303":               {[]turn{{}}, answering(303), executed, "", once + "commit", nil},
		"handler: 402":               {[]turn{{}}, answering(402), executed, "", once + "decline", nil},
		"handler: 429":               {[]turn{{}}, answering(429), notExecuted, "", once + "rollback", nil},
		"handler: 500":               {[]turn{{}}, answering(500), notExecuted, "", once + "rollback", nil},
		"handler: error":             {[]turn{{}}, failing(errOther), notExecuted, failed, once + "rollback", errOther},
		"handler: unavailable":       {[]turn{{}}, failing(idempotency.ErrUnavailable), notExecuted, failed, once + "rollback", idempotency.ErrUnavailable},
		"refused":                    {[]turn{{}}, failing(&idempotency.Refusal{Reason: "over-budget", Err: errOther}), notExecuted, "over-budget", once + "rollback", errOther},
		"refused, serialization":     {[]turn{{seal: idempotency.ErrNotSerializable}, {}}, failing(&idempotency.Refusal{Reason: unavailable}), notExecuted, unavailable, once + "rollback " + once + "rollback", nil},
		"refused without a reason":   {[]turn{{}}, failing(&idempotency.Refusal{Err: errOther}), notExecuted, failed, once + "rollback", errOther},
		"refused in a panic":         {[]turn{{}}, panicking(&idempotency.Refusal{Reason: "over-budget"}), notExecuted, failed, once + "rollback", nil},
		"handler: nothing at all":    {[]turn{{}}, failing(nil), notExecuted, failed, once + "rollback", nil},
		"handler: panic":             {[]turn{{}}, panicking("value"), notExecuted, failed, once + "rollback", nil},
		"handler: abort":             {[]turn{{}}, panicking(http.ErrAbortHandler), notExecuted, failed, once + "rollback", http.ErrAbortHandler},
		"handler: nil panic":         {[]turn{{}}, panicking(nil), notExecuted, failed, once + "rollback", nil},
		"seal: aborted, 201":         {[]turn{{seal: idempotency.ErrAborted}}, answering(201), notExecuted, failed, once + "rollback", idempotency.ErrAborted},
		"seal: aborted, 409":         {[]turn{{seal: idempotency.ErrAborted}}, answering(409), executed, "", once + "decline", nil},
		"seal: aborted, 500":         {[]turn{{seal: idempotency.ErrAborted}}, answering(500), notExecuted, "", once + "rollback", nil},
		"seal: any error, 201":       {[]turn{{seal: errOther}}, answering(201), notExecuted, failed, once + "rollback", errOther},
		"seal: unavailable, 201":     {[]turn{{seal: idempotency.ErrUnavailable}}, answering(201), notExecuted, unavailable, once + "rollback", idempotency.ErrUnavailable},
		"seal: unavailable, 404":     {[]turn{{seal: idempotency.ErrUnavailable}}, answering(404), notExecuted, unavailable, once + "rollback", idempotency.ErrUnavailable},
		"seal: lost, 201":            {[]turn{{seal: idempotency.ErrTransactionLost}}, answering(201), unknown, lost, once + "rollback", idempotency.ErrTransactionLost},
		"seal: lost, 404":            {[]turn{{seal: idempotency.ErrTransactionLost}}, answering(404), unknown, lost, once + "rollback", idempotency.ErrTransactionLost},
		"seal: lost, panic":          {[]turn{{seal: idempotency.ErrTransactionLost}}, panicking("value"), unknown, lost, once + "rollback", idempotency.ErrTransactionLost},
		"seal: start again, 201":     {[]turn{{seal: idempotency.ErrNotSerializable}, {}}, answering(201), executed, "", once + "rollback begin seal commit", nil},
		"seal: start again, 500":     {[]turn{{seal: idempotency.ErrNotSerializable}, {}}, answering(500), notExecuted, "", once + "rollback begin seal rollback", nil},
		"seal: start again, panic":   {[]turn{{seal: idempotency.ErrNotSerializable}, {record: record(fingerprint)}}, panicking("value"), replayed, "", once + "rollback begin", nil},
		"commit: recorded by other":  {[]turn{{end: idempotency.ErrKeyRecorded}, {record: record(fingerprint)}}, answering(201), replayed, "", once + "commit begin", nil},
		"commit: other's request":    {[]turn{{end: idempotency.ErrKeyRecorded}, {record: record(otherFingerprint)}}, answering(201), mismatch, idempotency.ReasonKeyReused, once + "commit begin", nil},
		"commit: start again":        {[]turn{{end: idempotency.ErrNotSerializable}, {}}, answering(201), executed, "", once + "commit begin seal commit", nil},
		"commit: aborted":            {[]turn{{end: idempotency.ErrAborted}}, answering(201), notExecuted, failed, once + "commit", idempotency.ErrAborted},
		"commit: unavailable":        {[]turn{{end: idempotency.ErrUnavailable}}, answering(201), notExecuted, unavailable, once + "commit", idempotency.ErrUnavailable},
		"commit: lost":               {[]turn{{end: idempotency.ErrTransactionLost}}, answering(201), unknown, lost, once + "commit", idempotency.ErrTransactionLost},
		"commit: unknown":            {[]turn{{end: idempotency.ErrUnknown, resolve: idempotency.ErrUnknown}}, answering(201), unknown, outcomeUnknown, once + "commit resolve", idempotency.ErrUnknown},
		"commit: any error":          {[]turn{{end: errOther, resolve: errOther}}, answering(201), unknown, outcomeUnknown, once + "commit resolve", errOther},
		"resolve: ours":              {[]turn{{end: idempotency.ErrUnknown, resolved: ours}}, answering(201), executed, "", once + "commit resolve", nil},
		"resolve: another's":         {[]turn{{end: idempotency.ErrUnknown, resolved: record(fingerprint)}}, answering(201), replayed, "", once + "commit resolve", nil},
		"resolve: another request's": {[]turn{{end: idempotency.ErrUnknown, resolved: record(otherFingerprint)}}, answering(201), mismatch, keyReused, once + "commit resolve", idempotency.ErrUnknown},
		"resolve: absent":            {[]turn{{end: idempotency.ErrUnknown}}, answering(201), notExecuted, unavailable, once + "commit resolve", idempotency.ErrUnknown},
		"resolve: corrupt":           {[]turn{{end: idempotency.ErrUnknown, resolve: idempotency.ErrRecordCorrupt}}, answering(201), unknown, recordCorrupt, once + "commit resolve", idempotency.ErrRecordCorrupt},
		"claim: corrupt record":      {[]turn{{begin: idempotency.ErrRecordCorrupt}}, nil, unknown, recordCorrupt, "begin", idempotency.ErrRecordCorrupt},
		"decline: recorded by other": {[]turn{{end: idempotency.ErrKeyRecorded}, {record: record(fingerprint)}}, answering(402), replayed, "", once + "decline begin", nil},
		"decline: aborted":           {[]turn{{end: idempotency.ErrAborted}}, answering(402), notExecuted, unavailable, once + "decline", idempotency.ErrAborted},
		"decline: start again":       {[]turn{{end: idempotency.ErrNotSerializable}}, answering(402), notExecuted, unavailable, once + "decline", idempotency.ErrNotSerializable},
		"decline: lost":              {[]turn{{end: idempotency.ErrTransactionLost}}, answering(402), unknown, lost, once + "decline", idempotency.ErrTransactionLost},
		"decline: unknown":           {[]turn{{end: idempotency.ErrUnknown}}, answering(402), unknown, outcomeUnknown, once + "decline resolve", idempotency.ErrUnknown},
		"decline: unknown, but ours": {[]turn{{end: idempotency.ErrUnknown, resolved: ours}}, answering(402), executed, "", once + "decline resolve", nil},
		"decline: any error":         {[]turn{{end: errOther, resolve: errOther}}, answering(402), unknown, outcomeUnknown, once + "decline resolve", errOther},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			store := scripted(test.turns...)
			run := test.run
			if run == nil {
				run = func(context.Context) (*idempotency.Answer, error) {
					t.Error("the handler ran")
					return nil, nil
				}
			}
			engine := idempotency.NewEngine(store, nil)
			check := func(result idempotency.Result) {
				t.Helper()
				if result.Outcome != test.outcome || result.Reason != test.reason {
					t.Errorf("%s, %q; want %s, %q (%v)", result.Outcome, result.Reason, test.outcome, test.reason, result.Err)
				}
				if store.log() != test.steps {
					t.Errorf("steps %s, want %s", store.log(), test.steps)
				}
				if answered := test.reason == ""; answered != (result.Answer != nil) {
					t.Errorf("answer %v with reason %q", result.Answer, result.Reason)
				}
				if (result.Record != nil) != (test.outcome == replayed) {
					t.Errorf("record %v, outcome %s", result.Record, result.Outcome)
				}
				if result.Record != nil && (result.Answer != &result.Record.Answer || string(result.Answer.Body) != "recorded") {
					t.Errorf("the replay is %q", result.Answer.Body)
				}
				if test.err != nil && !errors.Is(result.Err, test.err) {
					t.Errorf("error %v, want %v", result.Err, test.err)
				}
				if engine.InFlight() != 0 {
					t.Errorf("%d requests are still in flight", engine.InFlight())
				}
			}
			check(engine.Do(t.Context(), keyed("k"), run))
			if test.run == nil {
				return
			}

			// The same for a handler that calls DerivedKey: without a record its end is unknown,
			// and nothing else differs.
			switch {
			case test.outcome == notExecuted && test.reason == "":
				test.outcome = unknown
			case test.outcome == notExecuted, test.outcome == mismatch:
				test.outcome, test.reason = unknown, idempotency.ReasonCallUnknown
			}
			store = scripted(test.turns...)
			engine = idempotency.NewEngine(store, nil)
			check(engine.Do(t.Context(), keyed("k"), asking(run)))
		})
	}
}

func TestHandlerThatEndsItsGoroutineHoldsNothing(t *testing.T) {
	t.Parallel()
	store := scripted(turn{})
	engine := idempotency.NewEngine(store, nil)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		engine.Do(context.Background(), keyed("k"), func(context.Context) (*idempotency.Answer, error) {
			runtime.Goexit() // as t.FailNow does
			return nil, nil
		})
		t.Error("the goroutine went on")
	}()
	<-ended
	if store.log() != "begin seal rollback" || engine.InFlight() != 0 {
		t.Errorf("steps %s, %d in flight", store.log(), engine.InFlight())
	}
}

// serviceError is a service's error, with the service's text, that implements runtime.Error.
type serviceError string

func (e serviceError) Error() string { return string(e) }
func (serviceError) RuntimeError()   {}

var _ runtime.Error = serviceError("")

func TestPanicIsKeptForTheOperator(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		value any
		text  string
		is    error
	}{
		"string":        {"canary 4111111111111111", "handler panicked with a string", nil},
		"error":         {fmt.Errorf("canary: %w", http.ErrAbortHandler), "handler panicked with a *fmt.wrapError", http.ErrAbortHandler},
		"service's own": {serviceError("canary"), "handler panicked with a idempotency_test.serviceError", nil},
		"runtime error": {nil, "handler panicked: runtime error: index out of range [3] with length 0", nil},
	} {
		run := panicking(test.value)
		if test.value == nil {
			run = func(context.Context) (*idempotency.Answer, error) {
				var none []int
				return &idempotency.Answer{Status: none[len("abc")]}, nil
			}
		}
		result := idempotency.NewEngine(memory.New(nil), nil).Do(t.Context(), keyed("k"), run)
		var panicked *idempotency.PanicError
		if !errors.As(result.Err, &panicked) {
			t.Errorf("%s: error %v", name, result.Err)
			continue
		}
		if panicked.Error() != test.text || strings.Contains(result.Err.Error(), "canary") {
			t.Errorf("%s: text %q, want %q", name, result.Err, test.text)
		}
		if test.value != nil && panicked.Value != test.value {
			t.Errorf("%s: value %v", name, panicked.Value)
		}
		if !strings.Contains(string(panicked.Stack), "engine_test.go") {
			t.Errorf("%s: the stack does not show where:\n%s", name, panicked.Stack)
		}
		if test.is != nil && !errors.Is(result.Err, test.is) {
			t.Errorf("%s: %v is not %v", name, result.Err, test.is)
		}
	}
}

func TestRestartsHaveABudget(t *testing.T) {
	t.Parallel()
	fails := turn{end: idempotency.ErrNotSerializable}
	for _, test := range []struct {
		restarts, failures int
		want               idempotency.Outcome
	}{
		{0, 3, idempotency.OutcomeExecuted}, {0, 4, idempotency.OutcomeNotExecuted}, // the default is 3
		{1, 1, idempotency.OutcomeExecuted}, {1, 2, idempotency.OutcomeNotExecuted},
		{-1, 0, idempotency.OutcomeExecuted}, {-1, 1, idempotency.OutcomeNotExecuted},
	} {
		store := scripted(append(slices.Repeat([]turn{fails}, test.failures), turn{})...)
		result := idempotency.NewEngine(store, &idempotency.Options{Restarts: test.restarts}).Do(t.Context(), keyed("k"), answering(201))
		if result.Outcome != test.want {
			t.Errorf("%d restarts, %d failures: %s, want %s", test.restarts, test.failures, result.Outcome, test.want)
		}
		if test.want == idempotency.OutcomeNotExecuted && (result.Reason != idempotency.ReasonUnavailable || !errors.Is(result.Err, idempotency.ErrNotSerializable)) {
			t.Errorf("%d restarts, %d failures: %s, %v", test.restarts, test.failures, result.Reason, result.Err)
		}
		attempts := map[idempotency.AttemptID]bool{}
		for _, req := range store.begun {
			attempts[req.Attempt] = true
		}
		if len(attempts) != len(store.begun) || attempts[idempotency.AttemptID{}] {
			t.Errorf("%d attempts have %d ids", len(store.begun), len(attempts))
		}
	}
}

func TestRestartsEndWithTheTimeout(t *testing.T) {
	t.Parallel()
	store := scripted(turn{end: idempotency.ErrNotSerializable})
	engine := idempotency.NewEngine(store, &idempotency.Options{Timeouts: idempotency.Timeouts{Handler: time.Millisecond}, Restarts: 1 << 30})
	result := engine.Do(t.Context(), keyed("k"), func(ctx context.Context) (*idempotency.Answer, error) {
		<-ctx.Done()
		return &idempotency.Answer{Status: 201}, nil
	})
	if result.Reason != idempotency.ReasonUnavailable || store.log() != "begin seal commit" {
		t.Errorf("%s, %s", result.Reason, store.log())
	}
}

func TestInFlightMax(t *testing.T) {
	t.Parallel()
	const limit = 3
	store := memory.New(nil)
	engine := idempotency.NewEngine(store, &idempotency.Options{InFlightMax: limit})
	relative := engine.With(&idempotency.Options{InFlightMax: limit + 1})
	running, release := make(chan struct{}), make(chan struct{})
	var group sync.WaitGroup
	hold := func(e *idempotency.Engine, key string) {
		group.Go(func() {
			result := e.Do(context.Background(), keyed(key), func(context.Context) (*idempotency.Answer, error) {
				running <- struct{}{}
				<-release
				return &idempotency.Answer{Status: 201}, nil
			})
			if result.Outcome != idempotency.OutcomeExecuted {
				t.Errorf("key %s, under the limit: %s, %v", key, result.Outcome, result.Err)
			}
		})
		<-running
	}
	for i := range limit {
		hold(engine, fmt.Sprint(i))
	}
	refused := func(e *idempotency.Engine) {
		t.Helper()
		result := e.Do(t.Context(), keyed("refused"), answering(201))
		if result.Reason != idempotency.ReasonUnavailable || result.Outcome != idempotency.OutcomeNotExecuted || !errors.Is(result.Err, idempotency.ErrInFlightExceeded) {
			t.Errorf("over the limit: %s, %s, %v", result.Outcome, result.Reason, result.Err)
		}
	}
	refused(engine)
	hold(relative, "relative") // it has a higher limit, and shares the count
	if engine.InFlight() != limit+1 || relative.InFlight() != limit+1 {
		t.Errorf("%d and %d in flight, want %d", engine.InFlight(), relative.InFlight(), limit+1)
	}
	refused(relative)
	hold(engine.With(&idempotency.Options{InFlightMax: -1}), "unlimited")
	close(release)
	group.Wait()
	if engine.InFlight() != 0 {
		t.Errorf("%d in flight, want none", engine.InFlight())
	}
	if result := engine.Do(t.Context(), keyed("refused"), answering(201)); result.Outcome != idempotency.OutcomeExecuted {
		t.Errorf("a request that was refused is not free: %s", result.Outcome)
	}
}

// A handler's context has the request's values, and does not end when the client is gone.
func TestHandlerContext(t *testing.T) {
	t.Parallel()
	type contextKey struct{}
	ctx, cancel := context.WithCancel(context.WithValue(t.Context(), contextKey{}, "value"))
	cancel()
	store := scripted(turn{end: idempotency.ErrNotSerializable}, turn{})
	engine := idempotency.NewEngine(store, &idempotency.Options{Timeouts: idempotency.Timeouts{Handler: time.Hour, Commit: time.Minute}})
	var first time.Time
	var attempts []idempotency.AttemptID
	result := engine.Do(ctx, keyed("k"), func(ctx context.Context) (*idempotency.Answer, error) {
		deadline, ok := ctx.Deadline()
		if left := time.Until(deadline); !ok || left > time.Hour || left < 59*time.Minute {
			t.Errorf("the handler has %v", left)
		}
		if first.IsZero() {
			first = deadline
		}
		if deadline != first {
			t.Error("each run has a time of its own")
		}
		if ctx.Err() != nil || ctx.Value(contextKey{}) != "value" {
			t.Errorf("error %v, value %v", ctx.Err(), ctx.Value(contextKey{}))
		}
		key, ok := idempotency.KeyFrom(ctx)
		if !ok || key != keyed("k").Key {
			t.Errorf("key %v", key)
		}
		id, _ := idempotency.AttemptIDFrom(ctx)
		attempts = append(attempts, id)
		return &idempotency.Answer{Status: 201}, nil
	})
	if result.Outcome != idempotency.OutcomeExecuted {
		t.Errorf("a client that is gone: %s, %v; want its work finished", result.Outcome, result.Err)
	}
	for i, end := range store.ends {
		deadline, ok := end.Deadline()
		if left := deadline.Sub(first); !ok || left > -58*time.Minute {
			t.Errorf("end %d has the handler's time or none: %v, %v", i, deadline, ok)
		}
		if end.Value(contextKey{}) != "value" {
			t.Errorf("end %d has lost the request's values", i)
		}
		if attempts[i] != store.begun[i].Attempt {
			t.Errorf("run %d knows attempt %v, the store %v", i, attempts[i], store.begun[i].Attempt)
		}
	}
	if len(store.ends) != 2 {
		t.Errorf("%d ends", len(store.ends))
	}
}

// The context of a handler that takes too long ends. If the handler answers all the same, an answer
// to commit is committed, on another context, and one to forget becomes unavailable.
func TestHandlerTimeout(t *testing.T) {
	t.Parallel()
	for status, want := range map[int]struct {
		steps   string
		outcome idempotency.Outcome
		reason  idempotency.Reason
	}{
		201: {"begin seal commit", idempotency.OutcomeExecuted, ""},
		402: {"begin seal decline", idempotency.OutcomeExecuted, ""},
		500: {"begin seal rollback", idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable},
	} {
		store := scripted(turn{})
		engine := idempotency.NewEngine(store, &idempotency.Options{Timeouts: idempotency.Timeouts{Handler: time.Millisecond}})
		result := engine.Do(t.Context(), keyed("k"), func(ctx context.Context) (*idempotency.Answer, error) {
			<-ctx.Done()
			if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
				t.Errorf("the handler's context ended with %v", ctx.Err())
			}
			return &idempotency.Answer{Status: status}, nil
		})
		if store.log() != want.steps || result.Outcome != want.outcome || result.Reason != want.reason {
			t.Errorf("%d: %s, %s, %q; want %s, %s, %q", status, store.log(), result.Outcome, result.Reason, want.steps, want.outcome, want.reason)
		}
		deadline, ok := store.ends[0].Deadline()
		least := 2 * time.Second
		if status != 500 {
			least = 5 * time.Second
		}
		if left := time.Until(deadline); !ok || left > least || left < least/2 {
			t.Errorf("%d: the end has %v, want %v", status, left, least)
		}
	}
}

func TestKeyless(t *testing.T) {
	t.Parallel()
	for status, want := range map[int]string{
		201: "begin seal commit", 402: "begin seal rollback", 500: "begin seal rollback",
	} {
		store := scripted(turn{})
		result := idempotency.NewEngine(store, nil).Do(t.Context(), idempotency.Request{Key: idempotency.Key{Scope: "acme"}}, answering(status))
		outcome := idempotency.OutcomeNotExecuted
		if status == 201 {
			outcome = idempotency.OutcomeExecuted
		}
		if store.log() != want || result.Outcome != outcome || result.Answer == nil || result.Answer.Status != status {
			t.Errorf("%d: steps %s, %s, %v; want %s, %s", status, store.log(), result.Outcome, result.Answer, want, outcome)
		}
	}
	store := scripted(turn{end: idempotency.ErrUnknown})
	result := idempotency.NewEngine(store, nil).Do(t.Context(), idempotency.Request{}, answering(201))
	if result.Outcome != idempotency.OutcomeUnknown {
		t.Errorf("a COMMIT whose reply is lost: %s", result.Outcome)
	}
}

func TestInvalidKeyIsNeverBegun(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		key  idempotency.Key
		want idempotency.Reason
	}{
		{idempotency.Key{Scope: "", Value: "k"}, idempotency.ReasonScope},
		{idempotency.Key{Scope: "acme", Value: "a b"}, idempotency.ReasonKeyInvalid},
	} {
		store := scripted(turn{})
		result := idempotency.NewEngine(store, nil).Do(t.Context(), idempotency.Request{Key: test.key}, answering(201))
		if result.Reason != test.want || result.Outcome != idempotency.OutcomeNotExecuted || store.log() != "" {
			t.Errorf("%s: %s, steps %q", result.Reason, result.Outcome, store.log())
		}
	}
}

func TestDispositionIsThePolicys(t *testing.T) {
	t.Parallel()
	policy := map[int]idempotency.Disposition{500: idempotency.DispositionCommit, 201: idempotency.DispositionDecline, 402: idempotency.DispositionForget}
	for status, want := range map[int]string{500: "commit", 201: "decline", 402: "rollback"} {
		store := scripted(turn{})
		engine := idempotency.NewEngine(store, &idempotency.Options{Disposition: func(answer idempotency.Answer) idempotency.Disposition { return policy[answer.Status] }})
		engine.Do(t.Context(), keyed("k"), answering(status))
		if store.log() != "begin seal "+want {
			t.Errorf("%d: %s, want %s", status, store.log(), want)
		}
	}
}

func TestOptions(t *testing.T) {
	t.Parallel()
	got := idempotency.NewEngine(scripted(turn{}), nil).Options()
	if got.Timeouts.Handler != 10*time.Second || got.Timeouts.Commit != 5*time.Second || got.Timeouts.Rollback != 2*time.Second ||
		got.TTL != 24*time.Hour || got.Restarts != 3 || got.InFlightMax != 512 || got.Disposition == nil || got.Tracer != nil {
		t.Errorf("defaults: %+v", got)
	}
	store := scripted(turn{})
	idempotency.NewEngine(store, &idempotency.Options{TTL: time.Minute}).Do(t.Context(), keyed("k"), answering(201))
	own := keyed("k")
	own.TTL = time.Hour
	idempotency.NewEngine(store, &idempotency.Options{TTL: time.Minute}).Do(t.Context(), own, answering(201))
	if store.begun[0].TTL != time.Minute || store.begun[1].TTL != time.Hour {
		t.Errorf("TTL %v and %v", store.begun[0].TTL, store.begun[1].TTL)
	}
}

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
		policy := &idempotency.Options{Disposition: func(answer idempotency.Answer) idempotency.Disposition {
			if answer.Status == 402 {
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
		"Options.Disposition": {Disposition: func(idempotency.Answer) idempotency.Disposition { panic(http.ErrAbortHandler) }},
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
