package pgserver

import (
	"context"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

func startStandby(t *testing.T, primary *Server, opts *Options) *Server {
	t.Helper()
	s, err := Standby(t.Context(), primary, opts)
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

	// A commit that waits until the standby has applied it is visible there at once.
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

// The copy is made while files are written, made and removed, and while WAL that it needs could be
// recycled.
func TestStandbyOfABusyServerHasEverythingThatWasCommitted(t *testing.T) {
	t.Parallel()
	primary := startServer(t, &Options{Settings: map[string]string{"fsync": "off", "wal_recycle": "off", "min_wal_size": "32MB"}})
	execute(t, primary.URL(), "CREATE TABLE payment (n int PRIMARY KEY, filler text)")
	execute(t, primary.URL(), "CREATE DATABASE another")
	ctx, cancel := context.WithCancel(t.Context())
	var busy sync.WaitGroup
	defer busy.Wait()
	defer cancel()
	written := make(chan struct{})
	busy.Go(func() {
		conn, err := pgx.Connect(t.Context(), primary.URL())
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close(context.WithoutCancel(ctx))
		for n := 0; ctx.Err() == nil; n++ {
			if n == 20 {
				close(written)
			}
			for _, sql := range []string{
				"INSERT INTO payment SELECT " + strconv.Itoa(n) + ", repeat('x', 5000)",
				"CREATE TABLE brief AS SELECT generate_series(1, 1000) AS n",
				"DROP TABLE brief",
				"SELECT pg_switch_wal()",
				"CHECKPOINT",
			} {
				if _, err := conn.Exec(t.Context(), sql); err != nil {
					t.Error(err)
					return
				}
			}
		}
	})
	<-written
	standby := startStandby(t, primary, &Options{Settings: map[string]string{"fsync": "off"}})
	cancel()
	busy.Wait()
	const sum = "SELECT count(*) || ' ' || md5(string_agg(n || filler, ',' ORDER BY n)) FROM payment"
	want := queryText(t, primary.URL(), sum)
	for begin := time.Now(); queryText(t, standby.URL(), sum) != want; {
		if time.Since(begin) > 20*time.Second {
			t.Fatalf("the standby has %s, the primary %s", queryText(t, standby.URL(), sum), want)
		}
	}
	if left := queryText(t, primary.URL(), "SELECT count(*)::text FROM pg_replication_slots"); left != "0" {
		t.Errorf("%s replication slots are left", left)
	}
	primary.Kill()
	if err := standby.Promote(t.Context()); err != nil {
		t.Fatal(err)
	}
	execute(t, strings.Replace(standby.URL(), "/postgres?", "/another?", 1), "CREATE TABLE brief ()")
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
