package idempotency

import (
	"context"
	"errors"
	"runtime"
	"testing"
	"time"
)

// Queues returns the number of queues, and of the followers in them.
func Queues(e *Engine) (queues, followers int) {
	e.family.queues.mu.Lock()
	defer e.family.queues.mu.Unlock()
	return len(e.family.queues.byKey), e.family.queues.followers
}

// mustEnter is enter if there is room.
func (q *queues) mustEnter(key Key) *place {
	p, ok := q.enter(key, 3)
	if !ok {
		panic("no room")
	}
	return p
}

// If a follower's turn comes at the moment when its client is gone, it begins nothing, and passes
// its turn on. Which of the two it notices first is chance, so the test repeats until both have
// happened.
func TestTurnThatComesTooLateIsHandedOn(t *testing.T) {
	t.Parallel()
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	for range 100 {
		q, key := &queues{}, Key{Scope: "acme", Value: "k"}
		first, late, next := q.mustEnter(key), q.mustEnter(key), q.mustEnter(key)
		first.leave(&Result{Outcome: OutcomeExecuted}, nil)
		result, settled := follow(canceled, &ongoing{Request: Request{Key: key}}, late, time.Now().Add(time.Hour), &trace{})
		if !settled || result.Outcome != OutcomeInProgress || !errors.Is(result.Err, context.Canceled) {
			t.Fatalf("settled: %t, %s, %v", settled, result.Outcome, result.Err)
		}
		late.leave(&result, nil)
		told, err := next.wait(t.Context(), time.Now().Add(time.Hour))
		if told != nil || err != nil || !next.leads {
			t.Fatalf("the next was told %v, %v", told, err)
		}
		next.leave(&Result{}, nil)
		if len(q.byKey) != 0 || q.followers != 0 {
			t.Fatalf("%d queues, %d followers", len(q.byKey), q.followers)
		}
	}
}

// A record that arrives at the moment when the wait ends is still the answer.
func TestAnswerThatComesAtTheLastMomentIsTaken(t *testing.T) {
	t.Parallel()
	for range 100 {
		q, key := &queues{}, Key{Scope: "acme", Value: "k"}
		first, late := q.mustEnter(key), q.mustEnter(key)
		req := &ongoing{Request: Request{Key: key, Fingerprint: NewFingerprint(100, nil)}}
		first.leave(&Result{Outcome: OutcomeReplayed, Record: &Record{Fingerprint: req.Fingerprint}}, nil)
		result, settled := follow(t.Context(), req, late, time.Now(), &trace{})
		late.leave(&result, nil)
		if !settled || result.Outcome != OutcomeReplayed || len(q.byKey) != 0 {
			t.Fatalf("settled: %t, %s, %d queues", settled, result.Outcome, len(q.byKey))
		}
	}
}

// exiting is a tracer that ends the goroutine when a request begins to wait.
type exiting struct{ Tracer }

func (exiting) TraceWaitStart(context.Context) { runtime.Goexit() }

// If a tracer ends a follower's goroutine, the follower leaves its queue, even if its turn comes at
// that moment: otherwise all later requests would wait for it.
func TestFollowerWhoseTracerExitsLeavesItsQueue(t *testing.T) {
	t.Parallel()
	for name, turn := range map[string]bool{"in the queue": false, "its turn": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			q, key := &queues{}, Key{Scope: "acme", Value: "k"}
			first, late, next := q.mustEnter(key), q.mustEnter(key), q.mustEnter(key)
			end := func() { first.leave(&Result{Outcome: OutcomeExecuted}, nil) }
			gone := make(chan struct{})
			go func() {
				defer close(gone)
				defer late.leave(&Result{}, nil)
				if turn {
					end()
				}
				follow(t.Context(), &ongoing{Request: Request{Key: key}}, late, time.Now().Add(time.Hour), &trace{tracer: exiting{}})
			}()
			<-gone
			if !turn {
				end()
			}
			told, err := next.wait(t.Context(), time.Now())
			if told != nil || err != nil || !next.leads {
				t.Fatalf("the next was told %v, %v", told, err)
			}
			next.leave(&Result{}, nil)
			if len(q.byKey) != 0 || q.followers != 0 {
				t.Errorf("%d queues, %d followers", len(q.byKey), q.followers)
			}
		})
	}
}
