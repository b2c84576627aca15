package faults_test

import (
	"bytes"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/postgres"
)

// commitService is a service behind a proxy that does something to the COMMIT of a key.
type commitService struct {
	*service
	proxy  *pgfault.Proxy
	direct string // URL of the database around the proxy

	mu     sync.Mutex
	faults map[string]commitFault // by key, for its first COMMIT
}

// commitFault is a fault with a hook that gets the backend.
type commitFault struct {
	pgfault.Fault
	hook func(pid uint32)
}

// commitPatience are options that leave a busy machine time for everything but the COMMIT and its
// resolution.
func commitPatience(commit, resolve time.Duration) *serviceOptions {
	return &serviceOptions{
		store:      &postgres.Options{AcquireTimeout: 20 * time.Second},
		middleware: &middleware.Options{Timeouts: idempotency.Timeouts{Commit: commit, Resolve: resolve}},
	}
}

func commitServe(t *testing.T, opts *serviceOptions) *commitService {
	t.Helper()
	return commitServeOn(t, pgtest.Database(t), opts)
}

func commitServeOn(t *testing.T, databaseURL string, opts *serviceOptions) *commitService {
	t.Helper()
	s := &commitService{direct: databaseURL, faults: map[string]commitFault{}}
	network, address, err := pgfault.Upstream(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	s.proxy, err = pgfault.Start(pgfault.Options{Network: network, Address: address, OnCommit: s.onCommit})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.proxy.Close(); err != nil {
			t.Errorf("close the proxy: %v", err)
		}
	})
	migrateUp(t, databaseURL)
	s.service = serveOn(t, s.proxy.URL(databaseURL), opts)
	return s
}

// onCommit returns the fault for the key that it finds among the parameters of the record's INSERT.
func (s *commitService) onCommit(commit pgfault.Commit) pgfault.Fault {
	s.mu.Lock()
	defer s.mu.Unlock()
	for key, fault := range s.faults {
		if bytes.Contains(commit.Messages, []byte(key)) {
			delete(s.faults, key)
			if fault.hook != nil {
				fault.Hook = func() { fault.hook(commit.BackendPID) }
			}
			return fault.Fault
		}
	}
	return pgfault.Fault{}
}

// harm sets the fault for the key's first COMMIT.
func (s *commitService) harm(key string, fault pgfault.Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults[key] = commitFault{Fault: fault}
}

// wantHit fails the test unless the fault happened that many times.
func (s *commitService) wantHit(t *testing.T, kind pgfault.Kind, times int64) {
	t.Helper()
	if n := s.proxy.Hits()[kind]; n != times {
		t.Fatalf("%v happened %d times, want %d", kind, n, times)
	}
}

// paid counts the key's payments, around the proxy.
func (s *commitService) paid(t *testing.T, key string) int {
	t.Helper()
	return count(t, s.direct, "SELECT count(*) FROM payments WHERE key = $1", key)
}

// settled wants one payment and one record of the key, and a replay of this answer.
func (s *commitService) settled(t *testing.T, key string, first reply) {
	t.Helper()
	if records := count(t, s.direct, "SELECT count(*) FROM idempotency_keys WHERE key = $1", key); s.paid(t, key) != 1 || records != 1 {
		t.Fatalf("%d payments and %d records, want one of each", s.paid(t, key), records)
	}
	if again := s.mustPay(t, key, 201, "replayed"); again.body != first.body {
		t.Fatalf("the replay says %s, the first answer %s", again.body, first.body)
	}
}

// commitPool keeps a small pool, so that connections are used again.
func commitPool(config *pgxpool.Config) { config.MaxConns = 4 }

func TestF08CommitThatNeverArrivesIsNotExecuted(t *testing.T) {
	t.Parallel()
	s := commitServe(t, commitPatience(0, 0))
	s.harm("key-1", pgfault.Fault{Kind: pgfault.CutBefore})

	s.mustPay(t, "key-1", 503, "not-executed")
	s.wantHit(t, pgfault.CutBefore, 1)
	if n := s.paid(t, "key-1"); n != 0 {
		t.Fatalf("%d payments after not-executed", n)
	}
	s.settled(t, "key-1", s.mustPay(t, "key-1", 201, "executed"))
}

func TestF09LostReplyToCommitIsExecuted(t *testing.T) {
	t.Parallel()
	s := commitServe(t, commitPatience(0, 0))
	s.harm("key-1", pgfault.Fault{Kind: pgfault.CutAfter})

	first := s.mustPay(t, "key-1", 201, "executed")
	s.wantHit(t, pgfault.CutAfter, 1)
	s.settled(t, "key-1", first)
}

func TestF10SilenceAfterCommitIsExecuted(t *testing.T) {
	t.Parallel()
	const commitTimeout = time.Second
	s := commitServe(t, commitPatience(commitTimeout, 0))
	s.mustPay(t, "warm-up", 201, "executed")
	s.harm("key-1", pgfault.Fault{Kind: pgfault.Silence})

	started := time.Now()
	first := s.mustPay(t, "key-1", 201, "executed")
	if took := time.Since(started); took < commitTimeout {
		t.Errorf("it took %v: a reply came within Timeouts.Commit", took)
	}
	s.wantHit(t, pgfault.Silence, 1)
	s.settled(t, "key-1", first)
}

const lateBy = 2 * time.Second

// TestF11LateCommitIsWaitedFor: the connection is gone, and its COMMIT arrives two seconds later.
// Until then the old backend holds the key's lock, so the record's absence proves nothing.
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

// TestF11CommitLaterThanTheResolverWaitsIsUnknown: the request is never not-executed, and a retry
// with the same key finds the payment.
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

// commitHalfOpen returns a service on which the COMMIT of key-1 never arrives while PostgreSQL
// still waits for it.
func commitHalfOpen(t *testing.T, resolve time.Duration) *commitService {
	opts := commitPatience(500*time.Millisecond, resolve)
	opts.middleware.Timeouts.Handler = time.Second
	opts.store.IdleInTransactionTimeout = idleInTransaction
	opts.pool = commitPool
	s := commitServe(t, opts)
	s.harm("key-1", pgfault.Fault{Kind: pgfault.HalfOpen})
	return s
}

const idleInTransaction = 6 * time.Second // the minimum with a Timeouts.Handler of a second

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

func TestF13SlowNetworkIsExecuted(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name           string
		latency        time.Duration
		bytesPerSecond int
	}{
		{"50ms", 50 * time.Millisecond, 0},
		{"500ms", 500 * time.Millisecond, 0},
		{"10KB a second", 0, 10_000},
		{"200ms and 10KB a second", 200 * time.Millisecond, 10_000},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			opts := commitPatience(0, 0)
			opts.memo = strings.Repeat("m", 5_000) // half a second
			s := commitServe(t, opts)
			s.mustPay(t, "warm-up", 201, "executed") // a new connection prepares its statements one by one
			s.proxy.SetLatency(test.latency)
			s.proxy.SetRate(test.bytesPerSecond)

			started := time.Now()
			first := s.mustPay(t, "key-1", 201, "executed")
			least := 6 * test.latency // claim, INSERT, COMMIT
			if test.bytesPerSecond > 0 {
				least += time.Duration(len(opts.memo)) * time.Second / time.Duration(test.bytesPerSecond)
			}
			if took := time.Since(started); took < least {
				t.Errorf("it took %v, want at least %v", took, least)
			}
			s.settled(t, "key-1", first)
		})
	}
}
