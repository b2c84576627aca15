package faults_test

import (
	"bytes"
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

// commitFault is a fault whose hook is told of the backend.
type commitFault struct {
	pgfault.Fault
	hook func(pid uint32)
}

// commitPatience are options that leave a busy machine time for everything but the COMMIT and its resolution.
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

// onCommit finds the key among the parameters of the record's INSERT.
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

// harm says what happens to the key's first COMMIT.
func (s *commitService) harm(key string, fault pgfault.Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults[key] = commitFault{Fault: fault}
}

// wantHit fails the test where the fault did not happen as often as that.
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
