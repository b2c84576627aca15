package faults_test

import (
	"testing"
	"time"

	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/internal/pgtest"
)

// commitHalfOpen returns a service whose COMMIT of key-1 never arrives while PostgreSQL still waits for it.
func commitHalfOpen(t *testing.T, resolve time.Duration) *commitService {
	opts := commitPatience(500*time.Millisecond, resolve)
	opts.middleware.Timeouts.Handler = time.Second
	opts.store.IdleInTransactionTimeout = idleInTransaction
	opts.pool = commitPool
	s := commitServe(t, opts)
	s.harm("key-1", pgfault.Fault{Kind: pgfault.HalfOpen})
	return s
}

const idleInTransaction = 6 * time.Second // the least with a Timeouts.Handler of a second

func TestF12HalfOpenIsUnknownUntilPostgreSQLEndsTheSession(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "waits until PostgreSQL ends a session that is silent")
	s := commitHalfOpen(t, 500*time.Millisecond)

	started := time.Now()
	s.mustPay(t, "key-1", 503, "unknown")
	s.wantHit(t, pgfault.HalfOpen, 1)
	refused := 0
	for ; ; time.Sleep(50 * time.Millisecond) {
		got, err := s.pay("key-1")
		if err != nil {
			t.Fatal(err)
		}
		took := time.Since(started)
		if got.is(201, "executed") {
			if took < idleInTransaction {
				t.Errorf("it ran again after %v, while the first attempt could still commit", took)
			}
			s.settled(t, "key-1", got)
			break
		}
		if !got.is(409, "in-progress") || took > idleInTransaction+awaitMax {
			t.Fatalf("a retry got %v after %v", got, took)
		}
		refused++
	}
	if refused == 0 {
		t.Error("no retry met the open session")
	}
}

func TestF12HalfOpenIsNotExecutedOncePostgreSQLEndedTheSession(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "waits until PostgreSQL ends a session that is silent")
	s := commitHalfOpen(t, 30*time.Second)

	started := time.Now()
	s.mustPay(t, "key-1", 503, "not-executed")
	if took := time.Since(started); took < idleInTransaction {
		t.Errorf("it was said after %v, while the attempt could still commit", took)
	}
	s.wantHit(t, pgfault.HalfOpen, 1)
	if n := s.paid(t, "key-1"); n != 0 {
		t.Fatalf("%d payments after not-executed", n)
	}
	s.settled(t, "key-1", s.mustPay(t, "key-1", 201, "executed"))
}
