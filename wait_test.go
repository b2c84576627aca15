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
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/memory"
)

// waitBundle is an engine with Wait, on a store that counts claims. Tests use it in a bubble of
// synctest, where time advances when all goroutines wait.
type waitBundle struct {
	t      *testing.T
	store  *counted
	engine *idempotency.Engine
	runs   atomic.Int64
	group  sync.WaitGroup
}

// counted is a store that counts its claims, and can block one.
type counted struct {
	idempotency.Store
	begun atomic.Int64
	gate  atomic.Pointer[chan struct{}] // the next claim waits until it is closed
}

func (c *counted) Begin(ctx context.Context, claim *idempotency.Claim) (idempotency.Attempt, *idempotency.Record, error) {
	c.begun.Add(1)
	if gate := c.gate.Swap(nil); gate != nil {
		<-*gate
	}
	return c.Store.Begin(ctx, claim)
}

const waitFor = 10 * time.Second

func setupWait(t *testing.T, store idempotency.Store, change ...func(*idempotency.Options)) *waitBundle {
	if store == nil {
		store = memory.New(nil)
	}
	b := &waitBundle{t: t, store: &counted{Store: store}}
	options := &idempotency.Options{Wait: waitFor}
	for _, f := range change {
		f(options)
	}
	b.engine = idempotency.NewEngine(b.store, options)
	return b
}

// later is a request in progress.
type later struct {
	result idempotency.Result
	after  time.Duration // when it was answered
	done   bool
}

// send sends a request and returns once all goroutines wait.
func (b *waitBundle) send(ctx context.Context, req idempotency.Request, run idempotency.RunFunc) *later {
	return b.sendTo(ctx, b.engine, req, run)
}

func (b *waitBundle) sendTo(ctx context.Context, engine *idempotency.Engine, req idempotency.Request, run idempotency.RunFunc) *later {
	l := &later{}
	b.group.Go(func() {
		started := time.Now()
		l.result = engine.Do(ctx, req, func(ctx context.Context) (*idempotency.Answer, error) {
			b.runs.Add(1)
			return run(ctx)
		})
		l.after, l.done = time.Since(started), true
	})
	synctest.Wait()
	return l
}

// sendMany sends a request n times, each time when the earlier ones wait.
func (b *waitBundle) sendMany(n int, req idempotency.Request, run idempotency.RunFunc) []*later {
	var all []*later
	for range n {
		all = append(all, b.send(b.t.Context(), req, run))
	}
	return all
}

// sleep returns once the time has elapsed and everything due then has happened.
func (b *waitBundle) sleep(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// settle waits for all requests.
func (b *waitBundle) settle() {
	b.t.Helper()
	b.group.Wait()
	if n := b.engine.InFlight(); n != 0 {
		b.t.Errorf("%d requests are in flight", n)
	}
	if n := idempotency.Running(b.engine); n != 0 {
		b.t.Errorf("%d keys are left in memory", n)
	}
	if queues, followers := idempotency.Queues(b.engine); queues != 0 || followers != 0 {
		b.t.Errorf("%d queues are left, and %d followers", queues, followers)
	}
}

func (l *later) want(t *testing.T, name string, outcome idempotency.Outcome, reason idempotency.Reason) {
	t.Helper()
	if l.result.Outcome != outcome || l.result.Reason != reason {
		t.Errorf("%s: %s, %q (%v); want %s, %q", name, l.result.Outcome, l.result.Reason, l.result.Err, outcome, reason)
	}
}

// blocking returns a handler that answers when it is released.
func blocking(status int) (run idempotency.RunFunc, release func()) {
	released := make(chan struct{})
	return func(ctx context.Context) (*idempotency.Answer, error) {
		<-released
		id, _ := idempotency.AttemptIDFrom(ctx)
		return &idempotency.Answer{Status: status, Header: map[string][]string{"Link": {"a"}}, Body: []byte(id.String())}, nil
	}, sync.OnceFunc(func() { close(released) })
}

// However many requests wait for an attempt, it runs once, one of them calls the store for its
// answer, and all get it.
func TestThoseThatWaitGetTheAnswer(t *testing.T) {
	t.Parallel()
	for _, status := range []int{201, 402} {
		synctest.Test(t, func(t *testing.T) {
			b := setupWait(t, nil)
			run, release := blocking(status)
			first := b.send(t.Context(), keyed("k"), run)
			others := b.sendMany(63, keyed("k"), run)
			if b.store.begun.Load() != 1 {
				t.Errorf("%d claims while the first runs", b.store.begun.Load())
			}
			release()
			b.settle()
			first.want(t, "first", idempotency.OutcomeExecuted, "")
			for _, other := range others {
				other.want(t, "other", idempotency.OutcomeReplayed, "")
				if string(other.result.Answer.Body) != string(first.result.Answer.Body) || other.result.Answer != &other.result.Record.Answer || other.after != 0 {
					t.Errorf("answered %q after %v, want %q", other.result.Answer.Body, other.after, first.result.Answer.Body)
				}
			}
			if b.runs.Load() != 1 || b.store.begun.Load() != 2 {
				t.Errorf("%d runs, %d claims", b.runs.Load(), b.store.begun.Load())
			}
		})
	}
}

// Each request's fingerprint is compared with the record that answers it.
func TestAnotherRequestThatWaitedIsAMismatch(t *testing.T) {
	t.Parallel()
	older := keyed("k")
	older.Fingerprint = idempotency.NewFingerprint(100, nil)
	translated := older
	translated.FingerprintAt = func(version int16) (idempotency.Fingerprint, bool) { return fingerprint, version == 1 }
	other := keyed("k")
	other.Fingerprint = otherFingerprint
	synctest.Test(t, func(t *testing.T) {
		b := setupWait(t, nil)
		run, release := blocking(201)
		first := b.send(t.Context(), keyed("k"), run)
		same := b.send(t.Context(), keyed("k"), run) // calls the store
		mismatch := b.send(t.Context(), other, run)
		known := b.send(t.Context(), translated, run)
		unknown := b.send(t.Context(), older, run)
		release()
		b.settle()
		first.want(t, "first", idempotency.OutcomeExecuted, "")
		same.want(t, "the same", idempotency.OutcomeReplayed, "")
		mismatch.want(t, "another request", idempotency.OutcomeMismatch, idempotency.ReasonKeyReused)
		known.want(t, "the same by another function", idempotency.OutcomeReplayed, "")
		unknown.want(t, "one that can't be compared", idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
		if mismatch.result.Answer != nil || mismatch.result.Record != nil || b.runs.Load() != 1 {
			t.Errorf("%+v, %d runs", mismatch.result, b.runs.Load())
		}
	})
}

// A leader with a wrong body causes no mismatch for its followers: only a record does.
func TestWrongRequestInFrontMakesNoMismatchOfTheRightOne(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := setupWait(t, nil)
		b.send(t.Context(), keyed("k"), answering(201)).want(t, "first", idempotency.OutcomeExecuted, "")
		gate := make(chan struct{})
		b.store.gate.Store(&gate)
		wrong := keyed("k")
		wrong.Fingerprint = otherFingerprint
		leader := b.send(t.Context(), wrong, answering(201))
		retry := b.send(t.Context(), keyed("k"), answering(201))
		if retry.done {
			t.Errorf("the retry did not wait: %s", retry.result.Outcome)
		}
		close(gate)
		b.settle()
		leader.want(t, "the wrong one", idempotency.OutcomeMismatch, idempotency.ReasonKeyReused)
		retry.want(t, "the retry", idempotency.OutcomeReplayed, "")
	})
}

// If an attempt leaves no record, one of the waiting requests runs, and the others get its answer.
func TestOneOfThoseThatWaitRunsWhereTheFirstLeavesNothing(t *testing.T) {
	t.Parallel()
	for name, fail := range map[string]idempotency.RunFunc{
		"answers 500":         answering(500),
		"answers 429":         answering(429),
		"fails":               failing(errOther),
		"is refused":          failing(&idempotency.Refusal{Reason: idempotency.ReasonUnavailable}),
		"panics":              panicking("value"),
		"aborts":              panicking(http.ErrAbortHandler),
		"ends its goroutine":  func(context.Context) (*idempotency.Answer, error) { runtime.Goexit(); return nil, nil },
		"takes all its time":  func(ctx context.Context) (*idempotency.Answer, error) { <-ctx.Done(); return nil, ctx.Err() },
		"answers 99, no less": answering(99),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				b := setupWait(t, nil, func(o *idempotency.Options) { o.Timeouts.Handler = 5 * time.Second })
				released := make(chan struct{})
				first := b.send(t.Context(), keyed("k"), func(ctx context.Context) (*idempotency.Answer, error) {
					<-released
					return fail(ctx)
				})
				second, release := blocking(201)
				others := b.sendMany(16, keyed("k"), second)
				close(released)
				b.sleep(5 * time.Second)
				if b.runs.Load() != 2 {
					t.Errorf("%d runs once the first is over, want 2", b.runs.Load())
				}
				release()
				b.settle()
				if first.result.Outcome == idempotency.OutcomeExecuted {
					t.Errorf("first: %s", first.result.Outcome)
				}
				executed := 0
				for i, other := range others {
					if other.result.Outcome == idempotency.OutcomeExecuted {
						executed++
						continue
					}
					other.want(t, fmt.Sprint("other ", i), idempotency.OutcomeReplayed, "")
				}
				if executed != 1 || b.runs.Load() != 2 || b.store.begun.Load() != 3 {
					t.Errorf("%d executed, %d runs, %d claims; want 1, 2, 3", executed, b.runs.Load(), b.store.begun.Load())
				}
			})
		})
	}
}

// If an attempt's outcome is unknown, all waiting requests get unknown: none of them runs, and none
// repeats the long look-up. The handler's error is only in its own result.
func TestUnknownOutcomeIsThatOfAllWhoWait(t *testing.T) {
	t.Parallel()
	for name, turn := range map[string]turn{
		"of a COMMIT":                {end: idempotency.ErrUnknown, resolve: idempotency.ErrUnknown},
		"of a record that changed":   {end: idempotency.ErrUnknown, resolve: idempotency.ErrRecordCorrupt},
		"of a transaction that ends": {seal: idempotency.ErrTransactionLost},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				b := setupWait(t, scripted(turn))
				released := make(chan struct{})
				first := b.send(t.Context(), keyed("k"), func(context.Context) (*idempotency.Answer, error) {
					<-released
					if name == "of a transaction that ends" {
						panic(http.ErrAbortHandler)
					}
					return &idempotency.Answer{Status: 201}, nil
				})
				others := b.sendMany(3, keyed("k"), answering(201))
				close(released)
				b.settle()
				if first.result.Outcome != idempotency.OutcomeUnknown {
					t.Errorf("first: %s", first.result.Outcome)
				}
				for _, other := range others {
					other.want(t, "other", idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
					if !errors.Is(other.result.Err, idempotency.ErrUnknown) || errors.Is(other.result.Err, http.ErrAbortHandler) {
						t.Errorf("other: error %v", other.result.Err)
					}
				}
				if b.runs.Load() != 1 || b.store.begun.Load() != 1 {
					t.Errorf("%d runs, %d claims", b.runs.Load(), b.store.begun.Load())
				}
			})
		})
	}
}

// While another process holds the key, one of the waiting requests calls the store, with growing
// pauses, and holds nothing in between.
func TestLeaderAsksAgainWhileAnotherProcessHoldsTheKey(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		status int
		first  idempotency.Outcome // of the first that waits
		runs   int64
	}{
		"and records it":  {201, idempotency.OutcomeReplayed, 1},
		"and leaves it":   {500, idempotency.OutcomeExecuted, 2},
		"and declines it": {404, idempotency.OutcomeReplayed, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				b := setupWait(t, nil)
				elsewhere := idempotency.NewEngine(b.store.Store, nil)
				run, release := blocking(test.status)
				holder := b.sendTo(t.Context(), elsewhere, keyed("k"), run)
				waiters := b.sendMany(8, keyed("k"), answering(201))
				b.sleep(5 * time.Second)
				// Five seconds of pauses of 250 ms, and a few shorter ones: at least 16, at most
				// 30.
				if n := b.store.begun.Load(); n < 16 || n > 30 {
					t.Errorf("%d claims in 5 s", n)
				}
				release()
				b.sleep(time.Second)
				for _, waiter := range waiters {
					if !waiter.done || waiter.after < 5*time.Second || waiter.after > 5*time.Second+400*time.Millisecond {
						t.Errorf("answered: %t, after %v", waiter.done, waiter.after)
					}
				}
				b.settle()
				waiters[0].want(t, "first", test.first, "")
				for _, waiter := range waiters[1:] {
					waiter.want(t, "other", idempotency.OutcomeReplayed, "")
				}
				if b.runs.Load() != test.runs || !holder.done {
					t.Errorf("%d runs, want %d", b.runs.Load(), test.runs)
				}
			})
		})
	}
}

// Each request has its own wait, counted from its arrival. When the leader's wait ends, its
// followers continue.
func TestEachRequestHasItsOwnWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := setupWait(t, nil)
		patient := b.engine.With(&idempotency.Options{Wait: 3 * waitFor})
		hasty := b.engine.With(&idempotency.Options{Wait: time.Second})
		elsewhere := idempotency.NewEngine(b.store.Store, &idempotency.Options{Timeouts: idempotency.Timeouts{Handler: time.Hour}})
		run, release := blocking(201)
		b.sendTo(t.Context(), elsewhere, keyed("k"), run)
		leader := b.send(t.Context(), keyed("k"), answering(201))
		time.Sleep(time.Second)
		second := b.sendTo(t.Context(), patient, keyed("k"), answering(201))
		third := b.send(t.Context(), keyed("k"), answering(201))
		fourth := b.sendTo(t.Context(), hasty, keyed("k"), answering(201))
		b.sleep(2 * waitFor)
		for name, test := range map[string]struct {
			*later
			after time.Duration
		}{"leader": {leader, waitFor}, "third": {third, waitFor}, "hasty": {fourth, time.Second}} {
			test.want(t, name, idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
			if test.later.after != test.after || !errors.Is(test.result.Err, idempotency.ErrInProgress) {
				t.Errorf("%s: after %v, want %v: %v", name, test.later.after, test.after, test.result.Err)
			}
		}
		if second.done {
			t.Errorf("the second was answered %s after %v", second.result.Outcome, second.after)
		}
		release()
		b.settle()
		second.want(t, "second", idempotency.OutcomeReplayed, "")
		if b.runs.Load() != 1 {
			t.Errorf("%d runs", b.runs.Load())
		}
	})
}

// If a client is gone while its request waits, the wait ends at once, and another request asks the
// store. A request that has begun is finished all the same.
func TestClientThatIsGoneWaitsNoLonger(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := setupWait(t, nil)
		elsewhere := idempotency.NewEngine(b.store.Store, nil)
		run, release := blocking(500)
		b.sendTo(t.Context(), elsewhere, keyed("k"), run)
		var hangUp []context.CancelFunc
		var waiters []*later
		for range 3 {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			hangUp = append(hangUp, cancel)
			waiters = append(waiters, b.send(ctx, keyed("k"), answering(201)))
		}
		for _, gone := range []int{1, 0} { // a follower, and then the leader
			hangUp[gone]()
			synctest.Wait()
			waiters[gone].want(t, "gone", idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
			if !waiters[gone].done || waiters[gone].after != 0 || !errors.Is(waiters[gone].result.Err, context.Canceled) {
				t.Errorf("answered: %t, after %v: %v", waiters[gone].done, waiters[gone].after, waiters[gone].result.Err)
			}
		}
		if b.engine.InFlight() != 1 || waiters[2].done {
			t.Errorf("%d in flight", b.engine.InFlight())
		}
		release()
		b.settle()
		waiters[2].want(t, "the one that stayed", idempotency.OutcomeExecuted, "")

		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		b.send(ctx, keyed("begun"), answering(201)).want(t, "begun", idempotency.OutcomeExecuted, "")
	})
}

// Only requests with the same scope and key wait for each other, and only if their options say so.
func TestWhoDoesNotWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := setupWait(t, nil)
		atOnce := b.engine.With(nil)
		run, release := blocking(201)
		b.send(t.Context(), keyed("k"), run)
		waiter := b.send(t.Context(), keyed("k"), run)
		scope := keyed("k")
		scope.Key.Scope = "globex"
		for name, test := range map[string]struct {
			engine  *idempotency.Engine
			req     idempotency.Request
			outcome idempotency.Outcome
		}{
			"another scope":    {b.engine, scope, idempotency.OutcomeExecuted},
			"another key":      {b.engine, keyed("K"), idempotency.OutcomeExecuted},
			"a joined name":    {b.engine, idempotency.Request{Key: idempotency.Key{Scope: "acm", Value: "ek"}, Fingerprint: fingerprint}, idempotency.OutcomeExecuted},
			"no key":           {b.engine, idempotency.Request{Key: idempotency.Key{Scope: "acme"}}, idempotency.OutcomeExecuted},
			"a route that 409": {atOnce, keyed("k"), idempotency.OutcomeInProgress},
		} {
			got := b.sendTo(t.Context(), test.engine, test.req, answering(201))
			if !got.done || got.after != 0 || got.result.Outcome != test.outcome {
				t.Errorf("%s: answered: %t, %s", name, got.done, got.result.Outcome)
			}
		}
		if waiter.done {
			t.Error("the copy did not wait")
		}
		release()
		b.settle()
		waiter.want(t, "copy", idempotency.OutcomeReplayed, "")

		// Requests without a key do not wait for each other.
		run, release = blocking(201)
		keyless := idempotency.Request{Key: idempotency.Key{Scope: "acme"}}
		b.send(t.Context(), keyless, run)
		b.send(t.Context(), keyless, answering(201)).want(t, "keyless", idempotency.OutcomeExecuted, "")
		release()
		b.settle()
	})
}

// If the attempt that runs belongs to a route that does not wait, its duplicates wait in memory
// too.
func TestAttemptOfARouteThatDoesNotWaitIsWaitedFor(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := setupWait(t, nil)
		run, release := blocking(201)
		b.sendTo(t.Context(), b.engine.With(nil), keyed("k"), run)
		waiters := b.sendMany(4, keyed("k"), run)
		b.sleep(waitFor / 2)
		if b.store.begun.Load() != 1 {
			t.Errorf("%d claims while the handler runs, want that of the route", b.store.begun.Load())
		}
		release()
		b.settle()
		if b.store.begun.Load() != 2 {
			t.Errorf("%d claims, want that of the route and one", b.store.begun.Load())
		}
		for _, waiter := range waiters {
			waiter.want(t, "waiter", idempotency.OutcomeReplayed, "")
		}
	})
}

// Waiting takes nothing from the handler's time.
func TestHandlersTimeBeginsWithItsAttempt(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := setupWait(t, nil, func(o *idempotency.Options) { o.Timeouts.Handler = 6 * time.Second })
		hold := func(ctx context.Context) (*idempotency.Answer, error) {
			deadline, _ := ctx.Deadline()
			if left := time.Until(deadline); left != 6*time.Second {
				t.Errorf("the handler has %v", left)
			}
			time.Sleep(5 * time.Second)
			return &idempotency.Answer{Status: 500}, nil
		}
		for range 3 {
			b.send(t.Context(), keyed("k"), hold)
		}
		b.settle()
		// The third's wait ends at the same moment as the second's attempt: it may or may not find
		// the key free.
		if b.runs.Load() < 2 {
			t.Errorf("%d runs", b.runs.Load())
		}
	})
}

// A waiting request counts as in flight, and is refused over the limit like any other.
func TestThoseThatWaitAreInFlight(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := setupWait(t, nil, func(o *idempotency.Options) { o.InFlightMax = 3 })
		run, release := blocking(201)
		b.sendMany(2, keyed("k"), run)
		b.send(t.Context(), keyed("another"), run)
		refused := b.send(t.Context(), keyed("k"), run)
		if b.engine.InFlight() != 3 || !errors.Is(refused.result.Err, idempotency.ErrInFlightExceeded) {
			t.Errorf("%d in flight; the one over the limit: %s, %v", b.engine.InFlight(), refused.result.Outcome, refused.result.Err)
		}
		release()
		b.settle()
	})
}

// At most half of InFlightMax may wait, whatever they wait for, so that a flood of duplicates
// leaves room.
func TestThoseThatWaitLeaveRoomForOthers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := setupWait(t, nil, func(o *idempotency.Options) { o.InFlightMax = 8 })
		run, release := blocking(201)
		b.sendMany(3, keyed("k"), run)
		b.sendMany(3, keyed("l"), run)
		for range 10 {
			over := b.send(t.Context(), keyed("k"), run)
			over.want(t, "over the limit", idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
			if !over.done || over.after != 0 || !errors.Is(over.result.Err, idempotency.ErrInProgress) {
				t.Errorf("over the limit: answered: %t, %v", over.done, over.result.Err)
			}
		}
		b.send(t.Context(), keyed("m"), answering(201)).want(t, "another request", idempotency.OutcomeExecuted, "")
		if n := b.engine.InFlight(); n != 6 {
			t.Errorf("%d in flight", n)
		}
		release()
		b.settle()

		unlimited := b.engine.With(&idempotency.Options{Wait: waitFor, InFlightMax: -1})
		run, release = blocking(201)
		var all []*later
		for range 20 {
			all = append(all, b.sendTo(t.Context(), unlimited, keyed("n"), run))
		}
		if n := unlimited.InFlight(); n != 20 {
			t.Errorf("%d of 20 in flight", n)
		}
		release()
		b.settle()
		all[19].want(t, "the last", idempotency.OutcomeReplayed, "")
	})
}

// Requests that get the same answer each have a header of their own. They share the body, which is
// never changed.
func TestReplaysOfThoseThatWaitShareNoHeader(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := setupWait(t, nil)
		run, release := blocking(201)
		var replays []*later
		for range 4 {
			replays = append(replays, b.send(t.Context(), keyed("k"), run))
		}
		release()
		b.settle()
		for i, replay := range replays[1:] {
			header := replay.result.Answer.Header
			if !slices.Equal(header["Link"], []string{"a"}) || len(header) != 1 {
				t.Fatalf("replay %d: %v", i, header)
			}
			header["Link"][0] = "b"
			header["Vary"] = append(header["Vary"], "c")
			if replay.result.Record.TraceID != "" || replay.result.Answer != &replay.result.Record.Answer {
				t.Errorf("replay %d is not of a record of its own", i)
			}
			replay.result.Record.TraceID = "d"
		}
	})
}

// The tracer gets an event for each wait.
func TestTracerIsToldOfWaiting(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		wait   time.Duration
		status int
		front  int // others that wait in front
		want   string
		err    error // of the last wait
		waited time.Duration
	}{
		"behind another":              {waitFor, 201, 0, "start, waits, wait, claim, end replayed", nil, time.Second},
		"behind two":                  {waitFor, 201, 1, "start, waits, wait, end replayed", nil, time.Second},
		"then runs":                   {waitFor, 500, 0, "start, waits, wait, claim, handler, commit, end executed", nil, time.Second},
		"until the time is over":      {time.Millisecond, 201, 0, "start, waits, wait, end in-progress", nil, time.Millisecond},
		"elsewhere until it is over":  {time.Millisecond, 0, 0, "start, claim, waits, wait, claim, end in-progress", nil, time.Millisecond},
		"elsewhere, and it goes away": {waitFor, -1, 0, "start, claim, waits, wait, end in-progress", context.Canceled, time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				b := setupWait(t, nil)
				ctx, hangUp := context.WithCancel(t.Context())
				defer hangUp()
				holder := b.engine
				if test.status <= 0 {
					holder = idempotency.NewEngine(b.store.Store, nil)
				}
				b.sendTo(t.Context(), holder, keyed("k"), func(context.Context) (*idempotency.Answer, error) {
					if test.status < 0 {
						time.AfterFunc(time.Millisecond, hangUp)
					}
					time.Sleep(time.Second)
					return &idempotency.Answer{Status: max(test.status, 201)}, nil
				})
				b.sendMany(test.front, keyed("k"), answering(201))
				tape := &tape{}
				b.sendTo(ctx, b.engine.With(&idempotency.Options{Wait: test.wait, Tracer: tape}), keyed("k"), answering(201))
				b.settle()
				if got := strings.Join(tape.lines, ", "); got != test.want {
					t.Errorf("told of %s\nwant %s", got, test.want)
				}
				for _, step := range tape.steps {
					if step.Step == idempotency.StepWait && (step.Duration != test.waited || !errors.Is(step.Err, test.err)) {
						t.Errorf("waited for %v, %v; want %v, %v", step.Duration, step.Err, test.waited, test.err)
					}
				}
			})
		})
	}
}

// Whatever a tracer does, the requests that wait behind its request get their answer.
func TestHookThatPanicsLeavesNobodyWaiting(t *testing.T) {
	t.Parallel()
	for _, exits := range []bool{false, true} {
		for step, want := range map[idempotency.Step]idempotency.Outcome{
			idempotency.StepClaim: idempotency.OutcomeExecuted, idempotency.StepHandler: idempotency.OutcomeExecuted,
			idempotency.StepCommit: idempotency.OutcomeReplayed, idempotency.StepWait: idempotency.OutcomeReplayed,
		} {
			if !exits {
				want = idempotency.OutcomeReplayed
			}
			synctest.Test(t, func(t *testing.T) {
				b := setupWait(t, nil)
				gate := make(chan struct{})
				b.store.gate.Store(&gate)
				if step == idempotency.StepWait {
					b.send(t.Context(), keyed("k"), answering(201))
				}
				hooked := b.engine.With(&idempotency.Options{Wait: waitFor, Tracer: &hooks{after: step, exits: exits}})
				returned := false
				b.group.Go(func() {
					hooked.Do(t.Context(), keyed("k"), answering(201))
					returned = true
				})
				synctest.Wait()
				last := b.send(t.Context(), keyed("k"), answering(201))
				close(gate)
				b.settle()
				last.want(t, string(step), want, "")
				if returned == exits || last.after != 0 {
					t.Errorf("%s: exits: %t, returned: %t; the last was answered after %v", step, exits, returned, last.after)
				}
			})
		}
	}
}

// Many keys and many requests, some of which give up: each key is executed once, and no queue is
// left.
func TestQueuesAreGoneWhenNobodyWaits(t *testing.T) {
	t.Parallel()
	const keys, copies = 20, 40
	engine := idempotency.NewEngine(memory.New(nil), &idempotency.Options{Wait: time.Minute, InFlightMax: -1})
	var executed, replayed [keys]atomic.Int64
	var group sync.WaitGroup
	for i := range keys * copies {
		group.Go(func() {
			key := i % keys
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			if i%3 == 0 { // a client that goes away at some point
				go func() {
					for range i % 50 {
						runtime.Gosched()
					}
					cancel()
				}()
			}
			of := engine
			if i/keys%5 == 0 {
				of = engine.With(&idempotency.Options{Wait: time.Duration(i) * time.Microsecond, InFlightMax: -1})
			}
			result := of.Do(ctx, keyed(fmt.Sprint(key)), func(context.Context) (*idempotency.Answer, error) {
				runtime.Gosched()
				return &idempotency.Answer{Status: []int{500, 201, 402}[i%3]}, nil
			})
			switch result.Outcome {
			case idempotency.OutcomeExecuted:
				executed[key].Add(1)
			case idempotency.OutcomeReplayed:
				replayed[key].Add(1)
			case idempotency.OutcomeInProgress, idempotency.OutcomeNotExecuted:
			default:
				t.Errorf("key %d: %s, %v", key, result.Outcome, result.Err)
			}
		})
	}
	group.Wait()
	for key := range keys {
		if executed[key].Load() != 1 || replayed[key].Load() == 0 {
			t.Errorf("key %d: %d executed, %d replayed", key, executed[key].Load(), replayed[key].Load())
		}
	}
	if queues, followers := idempotency.Queues(engine); queues != 0 || followers != 0 || engine.InFlight() != 0 {
		t.Errorf("%d queues, %d followers, %d in flight", queues, followers, engine.InFlight())
	}
}

func TestLimitsOfWait(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		options idempotency.Options
		ok      bool
	}{
		{idempotency.Options{}, true},
		{idempotency.Options{Wait: 1}, true},
		{idempotency.Options{Wait: -1}, false},
		{idempotency.Options{Wait: idempotency.WaitMax}, true},
		{idempotency.Options{Wait: idempotency.WaitMax + 1}, false},
		{idempotency.Options{Wait: 2*time.Second - 1, TTL: 2 * time.Second}, true},
		{idempotency.Options{Wait: 2 * time.Second, TTL: 2 * time.Second}, false},
	} {
		func() {
			defer func() {
				value := recover()
				text, _ := value.(string)
				if (value == nil) != test.ok || value != nil && !strings.HasPrefix(text, "idempotency: Options.Wait is") {
					t.Errorf("Wait %v, TTL %v: panic %v", test.options.Wait, test.options.TTL, value)
				}
			}()
			engine := idempotency.NewEngine(memory.New(nil), &test.options)
			if engine.Options().Wait != test.options.Wait {
				t.Errorf("Wait %v", engine.Options().Wait)
			}
		}()
	}
}
