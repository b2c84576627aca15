package idempotency_test

import (
	"context"
	"errors"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/memory"
)

// hooked is a store that counts its claims and calls hooks around the end of an attempt.
type hooked struct {
	counted
	before func(step idempotency.Step) // Commit, Decline, Rollback or Resolve begins; may be nil
	// Called after Commit or Decline; may be nil. An error replaces its result.
	after func(step idempotency.Step) error
}

func (h *hooked) Begin(ctx context.Context, claim *idempotency.Claim) (idempotency.Attempt, *idempotency.Record, error) {
	attempt, record, err := h.counted.Begin(ctx, claim)
	if attempt != nil {
		attempt = &hookedAttempt{attempt, h}
	}
	return attempt, record, err
}

func (h *hooked) Resolve(ctx context.Context, claim *idempotency.Claim) (*idempotency.Record, error) {
	h.call(idempotency.StepResolve)
	return h.counted.Resolve(ctx, claim)
}

func (h *hooked) call(step idempotency.Step) {
	if h.before != nil {
		h.before(step)
	}
}

type hookedAttempt struct {
	idempotency.Attempt
	store *hooked
}

func (a *hookedAttempt) Commit(ctx context.Context, answer *idempotency.Answer) error {
	return a.end(idempotency.StepCommit, func() error { return a.Attempt.Commit(ctx, answer) })
}

func (a *hookedAttempt) Decline(ctx context.Context, answer *idempotency.Answer) error {
	return a.end(idempotency.StepDecline, func() error { return a.Attempt.Decline(ctx, answer) })
}

func (a *hookedAttempt) Rollback(ctx context.Context) error {
	a.store.call(idempotency.StepRollback)
	return a.Attempt.Rollback(ctx)
}

func (a *hookedAttempt) end(step idempotency.Step, end func() error) error {
	a.store.call(step)
	err := end()
	if a.store.after != nil && err == nil {
		err = a.store.after(step)
	}
	return err
}

func hook(store idempotency.Store) *hooked { return &hooked{counted: counted{Store: store}} }

// wantCopy sends a duplicate of the request, and requires its outcome and its number of claims.
func wantCopy(t *testing.T, engine *idempotency.Engine, store *hooked, req idempotency.Request, outcome idempotency.Outcome, claims int64) {
	t.Helper()
	before := store.begun.Load()
	result := engine.Do(t.Context(), req, func(context.Context) (*idempotency.Answer, error) {
		t.Error("the handler of a copy ran")
		return nil, errOther
	})
	if n := store.begun.Load() - before; result.Outcome != outcome || n != claims {
		t.Errorf("a copy: %s, %v, after %d claims; want %s after %d", result.Outcome, result.Err, n, outcome, claims)
	}
	if outcome == idempotency.OutcomeInProgress && (result.Reason != idempotency.ReasonInProgress || !errors.Is(result.Err, idempotency.ErrInProgress)) {
		t.Errorf("a copy: %s, %v", result.Reason, result.Err)
	}
}

// A duplicate of a request that runs in this process costs the store nothing, whatever its options
// and fingerprint are. Another key, another process and a request without a key are not affected.
func TestDuplicateOfWhatRunsHereAsksNoStore(t *testing.T) {
	t.Parallel()
	store := hook(memory.New(nil))
	engine := idempotency.NewEngine(store, nil)
	other := keyed("k")
	other.Fingerprint = otherFingerprint
	result := engine.Do(t.Context(), keyed("k"), func(context.Context) (*idempotency.Answer, error) {
		wantCopy(t, engine, store, keyed("k"), idempotency.OutcomeInProgress, 0)
		wantCopy(t, engine, store, other, idempotency.OutcomeInProgress, 0)
		wantCopy(t, engine.With(&idempotency.Options{InFlightMax: 2}), store, keyed("k"), idempotency.OutcomeInProgress, 0)
		wantCopy(t, idempotency.NewEngine(store, nil), store, keyed("k"), idempotency.OutcomeInProgress, 1)
		otherScope := keyed("k")
		otherScope.Key.Scope = "initech"
		if result := engine.Do(t.Context(), otherScope, answering(201)); result.Outcome != idempotency.OutcomeExecuted {
			t.Errorf("another scope: %s", result.Outcome)
		}
		return &idempotency.Answer{Status: 201}, nil
	})
	if result.Outcome != idempotency.OutcomeExecuted || idempotency.Running(engine) != 0 {
		t.Errorf("%s, %d keys are left", result.Outcome, idempotency.Running(engine))
	}
	wantCopy(t, engine, store, keyed("k"), idempotency.OutcomeReplayed, 1)
	wantCopy(t, engine, store, other, idempotency.OutcomeMismatch, 1)

	keyless := idempotency.Request{Key: idempotency.Key{Scope: "acme"}}
	engine.Do(t.Context(), keyless, func(context.Context) (*idempotency.Answer, error) {
		if result := engine.Do(t.Context(), keyless, answering(201)); result.Outcome != idempotency.OutcomeExecuted || idempotency.Running(engine) != 0 {
			t.Errorf("without a key: %s, %d keys", result.Outcome, idempotency.Running(engine))
		}
		return &idempotency.Answer{Status: 201}, nil
	})
}

// A duplicate that is answered from memory is seen by the tracer, which sees no claim, because
// there was none. It counts as in flight until it is answered, so InFlightMax bounds it too.
func TestDuplicateOfWhatRunsHereIsTraced(t *testing.T) {
	t.Parallel()
	tape := &tape{}
	engine := idempotency.NewEngine(memory.New(nil), nil)
	engine.Do(t.Context(), keyed("k"), func(context.Context) (*idempotency.Answer, error) {
		engine.With(&idempotency.Options{Tracer: tape}).Do(t.Context(), keyed("k"), answering(201))
		if got := strings.Join(tape.lines, ", "); got != "start, end in-progress" {
			t.Errorf("traced %s", got)
		}
		if end := tape.end; end.Attempts != 0 || end.Attempt != (idempotency.AttemptID{}) || end.Result.Reason != idempotency.ReasonInProgress {
			t.Errorf("end %+v", end)
		}
		result := engine.With(&idempotency.Options{InFlightMax: 1}).Do(t.Context(), keyed("k"), answering(201))
		if result.Reason != idempotency.ReasonUnavailable || !errors.Is(result.Err, idempotency.ErrInFlightExceeded) {
			t.Errorf("over InFlightMax: %s, %v", result.Reason, result.Err)
		}
		return &idempotency.Answer{Status: 201}, nil
	})
}

// However a handler ends, its key has left memory before the end of the transaction begins: from
// then on a duplicate calls the store, and a retry after the end gets the outcome of the request.
func TestKeyLeavesMemoryBeforeTheTransactionEnds(t *testing.T) {
	t.Parallel()
	exits := func(context.Context) (*idempotency.Answer, error) { runtime.Goexit(); return nil, nil }
	for name, test := range map[string]struct {
		run   idempotency.RunFunc
		step  idempotency.Step
		retry idempotency.Outcome
	}{
		"commits":            {answering(201), idempotency.StepCommit, idempotency.OutcomeReplayed},
		"declines":           {answering(402), idempotency.StepDecline, idempotency.OutcomeReplayed},
		"is forgotten":       {answering(500), idempotency.StepRollback, idempotency.OutcomeExecuted},
		"fails":              {failing(errOther), idempotency.StepRollback, idempotency.OutcomeExecuted},
		"refuses":            {failing(&idempotency.Refusal{Reason: "quota"}), idempotency.StepRollback, idempotency.OutcomeExecuted},
		"panics":             {panicking("value"), idempotency.StepRollback, idempotency.OutcomeExecuted},
		"aborts":             {panicking(http.ErrAbortHandler), idempotency.StepRollback, idempotency.OutcomeExecuted},
		"ends its goroutine": {exits, idempotency.StepRollback, idempotency.OutcomeExecuted},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			store := hook(memory.New(nil))
			engine := idempotency.NewEngine(store, nil)
			ends := 0
			store.before = func(step idempotency.Step) {
				if ends++; step != test.step {
					t.Errorf("ended by %s", step)
				}
				store.before = nil
				wantCopy(t, engine, store, keyed("k"), idempotency.OutcomeInProgress, 1)
			}
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				engine.Do(t.Context(), keyed("k"), func(ctx context.Context) (*idempotency.Answer, error) {
					wantCopy(t, engine, store, keyed("k"), idempotency.OutcomeInProgress, 0)
					return test.run(ctx)
				})
			}()
			<-ended
			if ends != 1 || idempotency.Running(engine) != 0 {
				t.Errorf("%d ends, %d keys are left", ends, idempotency.Running(engine))
			}
			if result := engine.Do(t.Context(), keyed("k"), answering(201)); result.Outcome != test.retry {
				t.Errorf("the retry: %s, want %s", result.Outcome, test.retry)
			}
		})
	}
}

// If a tracer ends the goroutine, the key leaves memory all the same.
func TestKeyLeavesMemoryIfTheTracerExits(t *testing.T) {
	t.Parallel()
	for _, step := range []idempotency.Step{idempotency.StepClaim, idempotency.StepHandler, idempotency.StepCommit} {
		engine := idempotency.NewEngine(memory.New(nil), &idempotency.Options{Tracer: &hooks{after: step, exits: true}})
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			engine.Do(t.Context(), keyed("k"), answering(201))
		}()
		<-ended
		if n := idempotency.Running(engine); n != 0 {
			t.Errorf("%s: %d keys are left", step, n)
		}
	}
}

// All duplicates of a recorded key are replays, including those that arrive after COMMIT while its
// reply is late, or lost and being looked up.
func TestRecordedKeyIsNeverInProgressFromMemory(t *testing.T) {
	t.Parallel()
	const copies = 64
	for name, lost := range map[string]error{"late": nil, "lost": idempotency.ErrUnknown} {
		for _, status := range []int{201, 402} {
			store := hook(memory.New(nil))
			engine := idempotency.NewEngine(store, nil)
			send := func(when string) {
				for range copies {
					if result := engine.Do(t.Context(), keyed("k"), answering(201)); result.Outcome != idempotency.OutcomeReplayed || result.Answer.Status != status {
						t.Fatalf("a copy %s, reply %s: %s, %v", when, name, result.Outcome, result.Err)
					}
				}
			}
			store.after = func(idempotency.Step) error { send("before the reply to COMMIT"); return lost }
			store.before = func(step idempotency.Step) {
				if step == idempotency.StepResolve {
					send("while it is looked for")
				}
			}
			if result := engine.Do(t.Context(), keyed("k"), answering(status)); result.Outcome != idempotency.OutcomeExecuted {
				t.Fatalf("%s: %s, %v", name, result.Outcome, result.Err)
			}
			send("after the answer")
		}
	}
}

// A decline gives up its claim before it records the answer. An attempt that claims the key in
// between must not hide the record while its handler runs.
func TestDeclinedKeyIsNotHiddenByTheAttemptThatClaimedIt(t *testing.T) {
	t.Parallel()
	store := hook(scripted(turn{})) // which grants every claim
	engine := idempotency.NewEngine(store, nil)
	running, release := make(chan struct{}), make(chan struct{})
	ended := make(chan struct{})
	store.before = func(step idempotency.Step) {
		store.before = nil
		go func() {
			defer close(ended)
			engine.Do(t.Context(), keyed("k"), func(context.Context) (*idempotency.Answer, error) {
				close(running)
				<-release
				return nil, errOther
			})
		}()
		<-running
		wantCopy(t, engine, store, keyed("k"), idempotency.OutcomeInProgress, 0)
	}
	if result := engine.Do(t.Context(), keyed("k"), answering(402)); result.Outcome != idempotency.OutcomeExecuted {
		t.Fatalf("%s, %v", result.Outcome, result.Err)
	}
	if n := idempotency.Running(engine); n != 0 {
		t.Errorf("%d keys are in memory after the decline", n)
	}
	close(release)
	<-ended
}

// A request that is started again is in memory during each of its runs, and not in between.
func TestKeyIsInMemoryInEachRun(t *testing.T) {
	t.Parallel()
	store := hook(scripted(turn{end: idempotency.ErrNotSerializable}, turn{seal: idempotency.ErrNotSerializable}, turn{}))
	engine := idempotency.NewEngine(store, nil)
	var held []int
	look := func() { held = append(held, idempotency.Running(engine)) }
	store.before = func(idempotency.Step) { look() }
	runs := 0
	result := engine.Do(t.Context(), keyed("k"), func(context.Context) (*idempotency.Answer, error) {
		runs++
		look()
		wantCopy(t, engine, store, keyed("k"), idempotency.OutcomeInProgress, 0)
		return &idempotency.Answer{Status: 201}, nil
	})
	if result.Outcome != idempotency.OutcomeExecuted || runs != 3 {
		t.Errorf("%s, %v, %d runs", result.Outcome, result.Err, runs)
	}
	for i, n := range held { // a run and its end, alternately
		if n != (i+1)%2 {
			t.Errorf("%d keys in memory at step %d of %v", n, i, held)
		}
	}
}

// A handler that hangs keeps its key in memory until its deadline. From then on the store is called.
// If the store has granted the key to another attempt, the first one's late return leaves that
// alone.
func TestHandlerThatHangsKeepsItsKeyUntilItsDeadline(t *testing.T) {
	t.Parallel()
	const timeout = 3 * time.Second
	synctest.Test(t, func(t *testing.T) {
		b := setupWait(t, scripted(turn{}), func(o *idempotency.Options) { o.Wait, o.Timeouts.Handler = 0, timeout })
		hanging, release := blocking(201)
		b.send(t.Context(), keyed("k"), hanging)
		b.sleep(timeout - time.Nanosecond)
		b.send(t.Context(), keyed("k"), answering(201)).want(t, "just before the deadline", idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
		if n := b.store.begun.Load(); n != 1 {
			t.Errorf("%d claims before the deadline", n)
		}
		b.sleep(time.Nanosecond)
		second, releaseSecond := blocking(201)
		granted := b.send(t.Context(), keyed("k"), second)
		if n := b.store.begun.Load(); n != 2 || granted.done {
			t.Errorf("%d claims at the deadline; the second is done: %t", n, granted.done)
		}
		release()
		synctest.Wait()
		b.send(t.Context(), keyed("k"), answering(201)).want(t, "while the second runs", idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
		if n := b.store.begun.Load(); n != 2 {
			t.Errorf("%d claims while the second runs", n)
		}
		releaseSecond()
		b.settle()
	})
}

// Two routes with one key, of which only one waits, see each other's running handlers in memory.
func TestWaitAndNoWaitOnOneKey(t *testing.T) {
	t.Parallel()
	for name, runnerWaits := range map[string]bool{"the route that runs waits": true, "the route that runs does not wait": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				b := setupWait(t, nil)
				atOnce := b.engine.With(nil)
				runner := atOnce
				if runnerWaits {
					runner = b.engine
				}
				run, release := blocking(201)
				first := b.sendTo(t.Context(), runner, keyed("k"), run)
				b.sleep(time.Second)
				for range 8 {
					b.sendTo(t.Context(), atOnce, keyed("k"), run).want(t, "at once", idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
				}
				waiting := b.sendMany(8, keyed("k"), run)
				hasty := b.sendTo(t.Context(), b.engine.With(&idempotency.Options{Wait: time.Second}), keyed("k"), run)
				b.sleep(2 * time.Second)
				hasty.want(t, "hasty", idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
				if n := b.store.begun.Load(); n != 1 || hasty.after != time.Second {
					t.Errorf("%d claims while the handler runs; the hasty one waited %v", n, hasty.after)
				}
				release()
				b.settle()
				first.want(t, "first", idempotency.OutcomeExecuted, "")
				for _, waiter := range waiting {
					waiter.want(t, "waiting", idempotency.OutcomeReplayed, "")
				}
				if n := b.store.begun.Load(); n != 2 || b.runs.Load() != 1 {
					t.Errorf("%d claims, %d runs", n, b.runs.Load())
				}
			})
		})
	}
}
