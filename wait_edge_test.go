package idempotency_test

import (
	"context"
	"errors"
	"fmt"
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
		// The third's wait ends at the same moment as the second's attempt: it may find the key
		// free or not.
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
