package idempotency

import (
	"context"
	"errors"
	"runtime"
	"testing"
	"time"
)

// Lines returns how many lines there are, of requests that may wait, and how many wait in them.
func Lines(e *Engine) (lines, followers int) {
	e.lines.mu.Lock()
	defer e.lines.mu.Unlock()
	return len(e.lines.byKey), e.lines.followers
}

// mustEnter is enter where there is room.
func (l *lines) mustEnter(key Key) *place {
	p, ok := l.enter(key, 3)
	if !ok {
		panic("no room")
	}
	return p
}

// A follower whose turn it becomes in the moment in which its client is gone begins nothing, and hands its turn on. Which of
// the two it notices first is chance, so it is tried until both were.
func TestTurnThatComesTooLateIsHandedOn(t *testing.T) {
	t.Parallel()
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	for range 100 {
		l, key := newLines(), Key{Scope: "acme", Value: "k"}
		first, late, next := l.mustEnter(key), l.mustEnter(key), l.mustEnter(key)
		first.leave(&Result{Outcome: OutcomeExecuted})
		result, settled := follow(canceled, &Request{Key: key}, late, time.Now().Add(time.Hour), &trace{})
		if !settled || result.Outcome != OutcomeInProgress || !errors.Is(result.Err, context.Canceled) {
			t.Fatalf("settled: %t, %s, %v", settled, result.Outcome, result.Err)
		}
		late.leave(&result)
		told, err := next.wait(t.Context(), time.Now().Add(time.Hour))
		if told != nil || err != nil || !next.leads {
			t.Fatalf("the next was told %v, %v", told, err)
		}
		next.leave(&Result{})
		if len(l.byKey) != 0 || l.followers != 0 {
			t.Fatalf("%d lines, %d followers", len(l.byKey), l.followers)
		}
	}
}

// A record that comes in the moment in which the wait ends is an answer all the same.
func TestAnswerThatComesAtTheLastMomentIsTaken(t *testing.T) {
	t.Parallel()
	for range 100 {
		l, key := newLines(), Key{Scope: "acme", Value: "k"}
		first, late := l.mustEnter(key), l.mustEnter(key)
		req := &Request{Key: key, Fingerprint: FingerprintOf(100, nil)}
		first.leave(&Result{Outcome: OutcomeReplayed, Record: &Record{Fingerprint: req.Fingerprint}})
		result, settled := follow(t.Context(), req, late, time.Now(), &trace{})
		late.leave(&result)
		if !settled || result.Outcome != OutcomeReplayed || len(l.byKey) != 0 {
			t.Fatalf("settled: %t, %s, %d lines", settled, result.Outcome, len(l.byKey))
		}
	}
}

// exiting is a tracer that ends the goroutine when a request begins to wait.
type exiting struct{ Tracer }

func (exiting) TraceWaitStart(context.Context) { runtime.Goexit() }

// If a tracer ends a follower's goroutine, the follower leaves its line, even if its turn comes at
// that moment: otherwise all later requests would wait for it.
func TestFollowerWhoseTracerExitsLeavesItsLine(t *testing.T) {
	t.Parallel()
	for name, turn := range map[string]bool{"in the line": false, "its turn": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l, key := newLines(), Key{Scope: "acme", Value: "k"}
			first, late, next := l.mustEnter(key), l.mustEnter(key), l.mustEnter(key)
			end := func() { first.leave(&Result{Outcome: OutcomeExecuted}) }
			gone := make(chan struct{})
			go func() {
				defer close(gone)
				defer late.leave(&Result{})
				if turn {
					end()
				}
				follow(t.Context(), &Request{Key: key}, late, time.Now().Add(time.Hour), &trace{tracer: exiting{}})
			}()
			<-gone
			if !turn {
				end()
			}
			told, err := next.wait(t.Context(), time.Now())
			if told != nil || err != nil || !next.leads {
				t.Fatalf("the next was told %v, %v", told, err)
			}
			next.leave(&Result{})
			if len(l.byKey) != 0 || l.followers != 0 {
				t.Errorf("%d lines, %d followers", len(l.byKey), l.followers)
			}
		})
	}
}
