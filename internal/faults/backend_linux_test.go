package faults_test

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/internal/pgserver"
	"github.com/paidonce/idempotency/internal/pgtest"
)

// commitSlowly makes COMMIT of a payment slow if its key begins with "slow", so that the backend
// can be ended during COMMIT.
const commitSlowly = `
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.3); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON payments DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
	WHEN (NEW.key LIKE 'slow%') EXECUTE FUNCTION slow()`

// commitEnd is how and when a backend ends.
type commitEnd struct {
	prefix string // of the keys
	kind   pgfault.Kind
	end    func(pid uint32) error
}

// endBackends sends payments for a while, and ends the backend of each around its COMMIT. It
// requires that every answer is true, and that each key has one payment in the end. It returns the
// counts of the first answers.
func (s *commitService) endBackends(t *testing.T, lasts time.Duration, ends ...commitEnd) map[string]int {
	t.Helper()
	answers := map[string]int{}
	for i, begin := 0, time.Now(); i < len(ends) || time.Since(begin) < lasts; i++ {
		end := ends[i%len(ends)]
		key := fmt.Sprintf("%s-%04d", end.prefix, i)
		s.harmBackend(t, key, end)
		first, err := s.pay(key)
		if err != nil {
			t.Fatal(err)
		}
		answers[end.prefix+": "+first.String()]++
		switch {
		case first.is(201, "executed"):
			s.awaitPaid(t, key, 1)
		case first.is(503, "not-executed"):
			s.awaitPaid(t, key, 0)
		case first.is(503, "unknown"):
		default:
			t.Fatalf("%s: %v", key, first)
		}
		got := s.retry(t, key)
		if first.is(201, "executed") && got.body != first.body {
			t.Fatalf("%s: the replay says %s, the first answer %s", key, got.body, first.body)
		}
		s.awaitPaid(t, key, 1)
	}
	t.Log(answers)
	return answers
}

// harmBackend ends the backend in the given way when the key's first COMMIT passes.
func (s *commitService) harmBackend(t *testing.T, key string, end commitEnd) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults[key] = commitFault{Fault: pgfault.Fault{Kind: end.kind}, hook: func(pid uint32) {
		if err := end.end(pid); err != nil {
			t.Errorf("%s: end the backend: %v", key, err)
		}
	}}
}

// retry sends the payment again until its answer is final.
func (s *commitService) retry(t *testing.T, key string) reply {
	t.Helper()
	for begin := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		got, err := s.pay(key)
		switch {
		case err != nil:
			t.Fatal(err)
		case got.is(201, "executed"), got.is(201, "replayed"):
			return got
		case !strings.HasPrefix(got.String(), "503 ") && !got.is(409, "in-progress") || time.Since(begin) > time.Minute:
			t.Fatalf("%s: a retry got %v after %v", key, got, time.Since(begin))
		}
	}
}

// awaitPaid waits until the key has that many payments. PostgreSQL may be restarting.
func (s *commitService) awaitPaid(t *testing.T, key string, want int) {
	t.Helper()
	n := 0
	for begin := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		err := tryQuery(s.direct, &n, "SELECT count(*) FROM payments WHERE key = $1", key)
		if err == nil {
			break
		}
		if time.Since(begin) > time.Minute {
			t.Fatal(err)
		}
	}
	if n != want {
		t.Fatalf("%s: %d payments, want %d", key, n, want)
	}
}

func TestF06BackendTerminatedDuringCommit(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "ends a session in each of many COMMITs")
	s := commitServe(t, commitPatience(0, 30*time.Second))
	execute(t, s.direct, commitSlowly)
	terminate := func(wait time.Duration) func(pid uint32) error {
		return func(pid uint32) error {
			return tryQuery(s.direct, nil, "SELECT pg_terminate_backend($1, $2)", int32(pid), wait.Milliseconds())
		}
	}
	answers := s.endBackends(t, 5*time.Second,
		commitEnd{"before", pgfault.CallBefore, terminate(10 * time.Second)},
		commitEnd{"slow", pgfault.CallAfter, terminate(0)},
		commitEnd{"race", pgfault.CallAfter, terminate(0)},
	)
	if answers["before: 503 not-executed"] == 0 {
		t.Error("no backend ended before its COMMIT")
	}
	if answers["slow: 503 not-executed"] == 0 {
		t.Error("no backend ended in its COMMIT")
	}
}

// TestF06BackendKilledDuringCommit: PostgreSQL restarts all of itself when one of its processes is
// killed.
func TestF06BackendKilledDuringCommit(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "starts a PostgreSQL of its own, whose backends it kills")
	server, err := pgserver.Start(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	s := commitServeOn(t, server.URL(), commitPatience(0, 30*time.Second))
	execute(t, s.direct, commitSlowly)
	kill := func(pid uint32) error { return syscall.Kill(int(pid), syscall.SIGKILL) }
	answers := s.endBackends(t, 8*time.Second,
		commitEnd{"before", pgfault.CallBefore, kill},
		commitEnd{"slow", pgfault.CallAfter, kill},
		commitEnd{"race", pgfault.CallAfter, kill},
	)
	if answers["before: 503 not-executed"]+answers["slow: 503 not-executed"] == 0 {
		t.Error("no backend was killed before its COMMIT was done")
	}
}
