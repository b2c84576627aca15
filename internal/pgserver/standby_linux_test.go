package pgserver

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func startStandby(t *testing.T, primary *Server, opts *Options) *Server {
	t.Helper()
	s, err := Standby(t.Context(), primary, opts)
	if errors.Is(err, ErrNoBaseBackup) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Errorf("Stop: %v", err)
		}
	})
	return s
}

func TestStandbyFollowsUntilItIsPromoted(t *testing.T) {
	t.Parallel()
	primary := startServer(t, nil)
	execute(t, primary.URL(), "CREATE TABLE payment (state text)")
	standby := startStandby(t, primary, nil)
	if got := queryText(t, standby.URL(), "SELECT pg_is_in_recovery()::text"); got != "true" {
		t.Fatalf("in recovery: %s", got)
	}

	// A commit that waits for the standby to have applied it is there at once.
	for begin := time.Now(); queryText(t, primary.URL(), "SELECT count(*)::text FROM pg_stat_replication WHERE state = 'streaming'") != "1"; {
		if time.Since(begin) > 10*time.Second {
			t.Fatal("the standby does not follow")
		}
	}
	execute(t, primary.URL(), "ALTER SYSTEM SET synchronous_standby_names = 'walreceiver'")
	execute(t, primary.URL(), "SELECT pg_reload_conf()")
	for begin := time.Now(); queryText(t, primary.URL(), "SELECT count(*)::text FROM pg_stat_replication WHERE sync_state = 'sync'") != "1"; {
		if time.Since(begin) > 10*time.Second {
			t.Fatal("the standby is not synchronous")
		}
	}
	execute(t, primary.URL()+"&synchronous_commit=remote_apply", "INSERT INTO payment VALUES ('paid')")
	if got := queryText(t, standby.URL(), "SELECT state FROM payment"); got != "paid" {
		t.Errorf("state = %q", got)
	}

	primary.Kill()
	if running(primary.PID()) {
		t.Error("the primary runs after Kill")
	}
	if err := standby.Promote(t.Context()); err != nil {
		t.Fatal(err)
	}
	execute(t, standby.URL(), "INSERT INTO payment VALUES ('paid again')")
	if err := standby.Promote(t.Context()); err == nil {
		t.Error("a primary was promoted")
	}
}

func TestKilledServerRecoversOnItsData(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(folder(t), "data")
	s := startServer(t, &Options{DataDir: dir})
	execute(t, s.URL(), "CREATE TABLE payment AS SELECT 'paid' AS state")
	s.Kill()
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	again := startServer(t, &Options{DataDir: dir})
	if got := queryText(t, again.URL(), "SELECT state FROM payment"); got != "paid" {
		t.Errorf("state = %q", got)
	}
}

func TestStandbyNeedsAFolderWithoutData(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(folder(t), "data")
	primary := startServer(t, nil)
	if err := startServer(t, &Options{DataDir: dir}).Stop(); err != nil {
		t.Fatal(err)
	}
	s, err := Standby(t.Context(), primary, &Options{DataDir: dir})
	if err == nil {
		_ = s.Stop()
	}
	if err == nil || !strings.Contains(err.Error(), "has data already") {
		t.Errorf("err = %v", err)
	}
}

func TestEnvReachesPostgres(t *testing.T) {
	t.Parallel()
	s := startServer(t, &Options{Env: []string{"PAIDONCE_TEST_ENV=here", "TZ=Asia/Tokyo"}})
	execute(t, s.URL(), "CREATE TABLE seen (value text)")
	execute(t, s.URL(), "COPY seen FROM PROGRAM 'echo $PAIDONCE_TEST_ENV $TZ'")
	if got := queryText(t, s.URL(), "SELECT value FROM seen"); got != "here Asia/Tokyo" {
		t.Errorf("environment %q", got)
	}
	if got := queryText(t, s.URL(), "SHOW TimeZone"); strings.Contains(got, "Tokyo") {
		t.Errorf("initdb had it too: TimeZone is %s", got)
	}
}
