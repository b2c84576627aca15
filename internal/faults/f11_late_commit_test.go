package faults_test

import (
	"testing"
	"time"

	"github.com/paidonce/idempotency/internal/pgfault"
)

const lateBy = 2 * time.Second

// TestF11LateCommitIsWaitedFor: the connection is gone, and its COMMIT arrives two seconds later. Until then the old
// backend holds the key's lock, so that its absence proves nothing.
func TestF11LateCommitIsWaitedFor(t *testing.T) {
	t.Parallel()
	s := commitServe(t, commitPatience(0, 30*time.Second))
	s.harm("key-1", pgfault.Fault{Kind: pgfault.LateCommit, Delay: lateBy})

	started := time.Now()
	first := s.mustPay(t, "key-1", 201, "executed")
	if took := time.Since(started); took < lateBy {
		t.Errorf("it took %v: the COMMIT was not late", took)
	}
	s.wantHit(t, pgfault.LateCommit, 1)
	s.settled(t, "key-1", first)
}

// TestF11CommitLaterThanTheResolverWaitsIsUnknown: never not-executed, and the same key finds the payment.
func TestF11CommitLaterThanTheResolverWaitsIsUnknown(t *testing.T) {
	t.Parallel()
	s := commitServe(t, commitPatience(0, lateBy/4))
	s.harm("key-1", pgfault.Fault{Kind: pgfault.LateCommit, Delay: lateBy})

	s.mustPay(t, "key-1", 503, "unknown")
	s.wantHit(t, pgfault.LateCommit, 1)
	for begin := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		switch got, err := s.pay("key-1"); {
		case err != nil:
			t.Fatal(err)
		case got.is(201, "replayed"):
			s.settled(t, "key-1", got)
			return
		case !got.is(409, "in-progress") || time.Since(begin) > awaitMax:
			t.Fatalf("a retry got %v after %v", got, time.Since(begin))
		}
	}
}
