package faults_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/internal/pgserver"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/middleware"
)

func TestF18DatabaseClockJumps(t *testing.T) {
	t.Parallel()
	const ttl = 2 * time.Hour
	c := startClock(t)
	inHandler, goOn := make(chan string), make(chan struct{})
	var held sync.Map // keys, once
	s := serve(t, c.url, &serviceOptions{
		middleware: &middleware.Options{TTL: ttl},
		handling: func(_ context.Context, key string) {
			if _, again := held.LoadOrStore(key, true); !again && (key == "across-ahead" || key == "across-back") {
				inHandler <- key
				<-goOn
			}
		},
	})
	// across pays while the clock jumps in the middle of the handler.
	across := func(key string, to time.Duration, status int, outcome string) {
		t.Helper()
		replies := make(chan reply, 1)
		go func() {
			got, _ := s.pay(key) // no reply is no 201
			replies <- got
		}()
		select {
		case <-inHandler:
		case <-time.After(awaitMax):
			t.Fatalf("%s does not get to its handler", key)
		}
		c.jump(t, to)
		goOn <- struct{}{}
		if got := <-replies; !got.is(status, outcome) {
			t.Errorf("%s: %v, want %d %s", key, got, status, outcome)
		}
	}
	reap := func(want int64) {
		t.Helper()
		due := count(t, c.url, "SELECT count(*) FROM idempotency_keys WHERE expires_at < clock_timestamp()")
		deleted, err := s.store.DeleteExpired(t.Context())
		if err != nil || deleted != want || int64(due) != want {
			t.Errorf("the reaper deleted %d, %v; %d were due by the database's clock, want %d", deleted, err, due, want)
		}
	}

	first := s.mustPay(t, "before", 201, "executed") // expires at +2 h
	if count(t, c.url, "SELECT current_setting('server_version_num')::int") < 170000 {
		across("across-ahead", time.Hour, 201, "executed") // at +3 h
	} else {
		// transaction_timeout ends it, by the wall clock. Absence proves nothing once half of the
		// TTL has passed.
		across("across-ahead", time.Hour, 503, "unknown")
		s.mustPay(t, "across-ahead", 201, "executed") // at +3 h
	}
	reap(0)
	s.mustPay(t, "ahead", 201, "executed") // at +3 h
	for _, key := range []string{"before", "across-ahead", "ahead"} {
		s.mustPay(t, key, 201, "replayed")
	}

	across("across-back", -time.Hour, 201, "executed") // at +1 h
	reap(0)
	s.mustPay(t, "back", 201, "executed") // at +1 h
	keys := []string{"before", "across-ahead", "ahead", "across-back", "back"}
	for _, key := range keys {
		s.mustPay(t, key, 201, "replayed")
	}
	if again := s.mustPay(t, "before", 201, "replayed"); again.body != first.body {
		t.Errorf("replayed %s, first %s", again.body, first.body)
	}
	s.onePayment(t, keys...)

	c.jump(t, 150*time.Minute)
	reap(3)
	s.mustPay(t, "across-ahead", 201, "replayed")
	s.mustPay(t, "ahead", 201, "replayed")
	s.mustPay(t, "before", 201, "executed") // its record had expired
}

// clock is a PostgreSQL with a wall clock that can be set.
type clock struct {
	url  string
	file string // libfaketime reads it whenever a program asks for the time
}

func startClock(t *testing.T) *clock {
	t.Helper()
	pgtest.Slow(t, "starts a PostgreSQL of its own")
	library := ""
	for _, pattern := range []string{"/usr/lib/*/faketime/libfaketime.so.1", "/usr/lib*/faketime/libfaketime.so.1"} {
		if found, err := filepath.Glob(pattern); err == nil && len(found) > 0 {
			library = found[0]
		}
	}
	if library == "" {
		need(t, "there is no libfaketime", "apt-get install libfaketime")
	}
	c := &clock{file: filepath.Join(pgtest.Folder(t), "clock")}
	c.set(t, 0)
	server, err := pgserver.Start(t.Context(), &pgserver.Options{Settings: fast, Env: []string{
		"LD_PRELOAD=" + library, "FAKETIME_TIMESTAMP_FILE=" + c.file, "FAKETIME_NO_CACHE=1",
		"FAKETIME_DONT_FAKE_MONOTONIC=1", "NO_FAKE_STAT=1", // only the wall clock
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Stop() })
	c.url = server.URL()
	return c
}

func (c *clock) set(t *testing.T, offset time.Duration) {
	t.Helper()
	next := c.file + ".next" // renamed, so that it is never read half-written
	text := strconv.Itoa(int(offset.Seconds()))
	if offset >= 0 {
		text = "+" + text
	}
	if err := os.WriteFile(next, []byte(text+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(next, 0o644); err != nil { // whatever the umask is
		t.Fatal(err)
	}
	if err := os.Rename(next, c.file); err != nil {
		t.Fatal(err)
	}
}

// jump sets the clock this far from the right time, and checks that PostgreSQL follows.
func (c *clock) jump(t *testing.T, offset time.Duration) {
	t.Helper()
	c.set(t, offset)
	var now time.Time
	query(t, c.url, &now, "SELECT clock_timestamp()")
	if wrong := time.Since(now) + offset; wrong.Abs() > 30*time.Second {
		t.Fatalf("the database's clock is %v off, want %v", -time.Since(now), offset)
	}
}

// The process's own clock stands still while its machine is suspended, but the database's runs on.
// When the process looks for a lost COMMIT, the record may have expired and the reaper may have
// deleted it, although only a moment has passed by the process's clock.
func TestF18AbsenceAfterTheMachineWasSuspendedIsNoProof(t *testing.T) {
	t.Parallel()
	c := startClock(t)
	network, address, err := pgfault.Upstream(c.url)
	if err != nil {
		t.Fatal(err)
	}
	lost := make(chan struct{})
	proxy, err := pgfault.Start(pgfault.Options{Network: network, Address: address, OnCommit: func(commit pgfault.Commit) pgfault.Fault {
		if !bytes.Contains(commit.Messages, []byte("lost")) {
			return pgfault.Fault{}
		}
		close(lost)
		return pgfault.Fault{Kind: pgfault.CutAfter}
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = proxy.Close() })
	migrateUp(t, c.url)
	s := serveOn(t, proxy.URL(c.url), &serviceOptions{
		middleware: &middleware.Options{TTL: 2 * time.Hour},
		pool: func(config *pgxpool.Config) {
			config.BeforeConnect = func(context.Context, *pgx.ConnConfig) error {
				select {
				case <-lost: // the resolver's: PostgreSQL has committed
					c.jump(t, 3*time.Hour)
					execute(t, c.url, "DELETE FROM idempotency_keys WHERE expires_at < clock_timestamp()")
				default:
				}
				return nil
			}
		},
	})
	s.mustPay(t, "lost", 503, "unknown")
	if n := count(t, c.url, "SELECT count(*) FROM payments WHERE key = 'lost'"); n != 1 {
		t.Errorf("%d payments, want 1", n)
	}
}
