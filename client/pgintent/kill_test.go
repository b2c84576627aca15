package pgintent_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/client/pgintent"
	"github.com/paidonce/idempotency/internal/pgtest"
)

// childVariable makes the test binary a client that pays once: "<server's URL> <database>
// <AttemptsMax>". It prints "pays" and, if it is not killed, the result.
const childVariable = "PAIDONCE_PGINTENT_CHILD"

func payAsChild(arguments []string) int {
	ctx := context.Background()
	config, err := pgxpool.ParseConfig(arguments[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, "child:", err)
		return 2
	}
	config.ConnConfig.RuntimeParams["application_name"] = childVariable
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		fmt.Fprintln(os.Stderr, "child:", err)
		return 2
	}
	attempts, _ := strconv.Atoi(arguments[2]) // 0: the default
	transport := client.New(nil, &client.Options{Honours: client.Everywhere, AttemptsMax: attempts, Intents: pgintent.New(pool, nil)})
	_, _ = os.Stdout.WriteString("pays\n") // the parent reads until the kill
	r, err := http.NewRequestWithContext(client.WithNewKey(ctx, "order-1"), http.MethodPost, arguments[0], strings.NewReader("body"))
	if err == nil {
		_, err = transport.RoundTrip(r)
	}
	ended := fmt.Sprintf("unknown %t, taken %t, not executed %t\n",
		errors.Is(err, client.ErrUnknown), errors.Is(err, client.ErrIntentTaken), errors.Is(err, client.ErrNotExecuted))
	_, _ = os.Stdout.WriteString(ended)
	return 0
}

// startChild starts a client in a process of its own, and returns it with the lines that it prints.
func startChild(t *testing.T, server, database string, attemptsMax int) (*exec.Cmd, *bufio.Scanner) {
	t.Helper()
	command := exec.Command(os.Args[0])
	command.Env = append(os.Environ(), fmt.Sprintf("%s=%s %s %d", childVariable, server, database, attemptsMax))
	command.Stderr = os.Stderr
	stdout, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = command.Process.Kill() // it may have ended
		_ = command.Wait()
	})
	lines := bufio.NewScanner(stdout)
	if !lines.Scan() || lines.Text() != "pays" {
		t.Fatalf("the child says %q", lines.Text())
	}
	return command, lines
}

// TestKilledInSave: a client is killed with kill -9 while PostgreSQL is busy with its INSERT.
// Nothing was sent. If the row is kept all the same, the next process sends it, once. If not, it is
// never sent, and was never reported as paid.
func TestKilledInSave(t *testing.T) {
	t.Parallel()
	for name, kept := range map[string]bool{"PostgreSQL goes on": true, "PostgreSQL ends the session": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := t.Context()
			database := pgtest.Database(t)
			pool := setupOn(t, database)
			var arrived atomic.Int64
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				arrived.Add(1)
				w.Header().Set("Idempotency-Status", "executed")
			}))
			defer server.Close()
			lock, err := pool.Begin(ctx)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = lock.Rollback(context.WithoutCancel(ctx)) }() // it may have been committed
			if _, err := lock.Exec(ctx, "LOCK TABLE idempotency_intents IN EXCLUSIVE MODE"); err != nil {
				t.Fatal(err)
			}
			command, _ := startChild(t, server.URL, database, 0)
			await := func(condition string) {
				t.Helper()
				for begin := time.Now(); ; time.Sleep(5 * time.Millisecond) {
					var holds bool
					err := pool.QueryRow(ctx, `SELECT `+condition+` FROM pg_stat_activity WHERE application_name = $1 AND datname = current_database()`, childVariable).Scan(&holds)
					if err != nil {
						t.Fatal(err)
					}
					if holds {
						return
					}
					if time.Since(begin) > 30*time.Second {
						t.Fatalf("it never came to %s", condition)
					}
				}
			}
			await("count(*) FILTER (WHERE wait_event_type = 'Lock') = 1")
			if err := command.Process.Kill(); err != nil { // kill -9
				t.Fatal(err)
			}
			_ = command.Wait() // it was killed
			if !kept {
				if _, err := pool.Exec(ctx, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1 AND datname = current_database()", childVariable); err != nil {
					t.Fatal(err)
				}
				await("count(*) = 0")
			}
			if err := lock.Commit(ctx); err != nil {
				t.Fatal(err)
			}
			await("count(*) = 0") // the session has noticed
			if arrived.Load() != 0 {
				t.Errorf("%d requests were sent before the intent was saved", arrived.Load())
			}
			want := 0
			if kept {
				want = 1
			}
			for life := range 2 {
				transport := client.New(nil, &client.Options{
					Honours: client.Everywhere, Intents: pgintent.New(pool, &pgintent.Options{PendingAfter: time.Microsecond}),
				})
				report, err := transport.Resume(ctx, nil)
				if err != nil || report.Settled != want*(1-life) || report.Kept != 0 {
					t.Errorf("life %d: %+v, %v", life, report, err)
				}
			}
			if arrived.Load() != int64(want) {
				t.Errorf("%d requests arrived, want %d", arrived.Load(), want)
			}
		})
	}
}
