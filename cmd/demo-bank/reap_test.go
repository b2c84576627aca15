//go:build unix

package main

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/internal/crashpoint"
	"github.com/paidonce/idempotency/internal/pgtest"
)

// pay sends transfers with one prefix of keys, and returns their answers.
func pay(t *testing.T, url, kind string, count int, outcome string) (bodies []string) {
	t.Helper()
	client := newClient(t)
	for n := range count {
		response, body, err := post(client, url, fmt.Sprintf("%s-%d", kind, n), crashBody)
		if err != nil {
			t.Fatal(err)
		}
		if got := response.Header.Get("Idempotency-Status"); response.StatusCode != http.StatusCreated || got != outcome {
			t.Fatalf("transfer %s-%d: %d %s %s, want 201 %s", kind, n, response.StatusCode, got, body, outcome)
		}
		bodies = append(bodies, string(body))
	}
	return bodies
}

// expired counts the expired records and the others.
func expired(t *testing.T, db *pgxpool.Pool) (over, live int) {
	t.Helper()
	err := db.QueryRow(t.Context(), `
		SELECT count(*) FILTER (WHERE expires_at < clock_timestamp()), count(*) FILTER (WHERE expires_at >= clock_timestamp())
		FROM idempotency_keys`).Scan(&over, &live)
	if err != nil {
		t.Fatal(err)
	}
	return over, live
}

// TestF04KilledInTheReapersBatch: a bank dies while PostgreSQL executes its reaper's DELETE, which
// is then undone. The next bank's reaper deletes the expired records and no others.
func TestF04KilledInTheReapersBatch(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "kills and restarts a bank")
	const count = 10
	database := pgtest.Database(t)
	first := bankOn(t, "", database, "--reap-interval", "1h")
	live := pay(t, first.url, "live", count, "executed")
	pay(t, first.url, "old", count, "executed")
	first.kill()
	db := connect(t, database)
	if _, err := db.Exec(t.Context(), `
		UPDATE idempotency_keys SET created_at = created_at - interval '2 days', expires_at = expires_at - interval '2 days'
		WHERE key LIKE 'old-%'`); err != nil {
		t.Fatal(err)
	}

	// The DELETE must wait, so that it certainly runs when the bank dies. It can't wait for a lock,
	// because the reaper's lock_timeout is short, nor in a BEFORE ROW trigger, because then no bank
	// starts.
	if _, err := db.Exec(t.Context(), `
		CREATE FUNCTION wait_for_the_test() RETURNS trigger LANGUAGE plpgsql AS
		$$ BEGIN WHILE NOT pg_try_advisory_xact_lock_shared(4711) LOOP PERFORM pg_sleep(0.01); END LOOP; RETURN NULL; END $$;
		CREATE TRIGGER wait_for_the_test AFTER DELETE ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION wait_for_the_test()`); err != nil {
		t.Fatal(err)
	}
	tx, err := db.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.Background()) }() // the pool's Close waits for it
	if _, err := tx.Exec(t.Context(), `SELECT pg_advisory_xact_lock(4711)`); err != nil {
		t.Fatal(err)
	}
	dying := start(t, crashCommand("reaper_batch:1", database, "--reap-interval", "1h"))
	dying.diesAt("reaper_batch")
	eventually(t, "PostgreSQL has the DELETE of the dead bank, and ends it", func() bool {
		// Outside of tx, which would always see the activity of its first query.
		ended := 0
		err := db.QueryRow(t.Context(), `
			SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
			WHERE datname = current_database() AND query ~ 'DELETE FROM' AND wait_event = 'PgSleep' AND pid <> pg_backend_pid()`).Scan(&ended)
		if err != nil {
			t.Fatal(err)
		}
		return ended == 1
	})
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if over, left := expired(t, db); over != count || left != count {
		t.Fatalf("after the batch was undone there are %d expired records and %d others, want %d of each", over, left, count)
	}

	next := bankOn(t, "", database, "--reap-interval", "50ms")
	eventually(t, "the next reaper goes on", func() bool {
		over, _ := expired(t, db)
		return over == 0
	})
	replayed := pay(t, next.url, "live", count, "replayed")
	for n := range live {
		if live[n] != replayed[n] {
			t.Errorf("live-%d was answered %s, and now %s", n, live[n], replayed[n])
		}
	}
	pay(t, next.url, "old", count, "executed") // its record is deleted: a new run
}

// TestACrashPointCountsKeyedTransfersAlone: no other request counts towards the crash point.
func TestACrashPointCountsKeyedTransfersAlone(t *testing.T) {
	t.Parallel()
	for _, point := range []string{"after_body", "after_begin", "mid_handler", "after_handler", "before_commit", "after_commit", "half_response"} {
		t.Run(point, func(t *testing.T) {
			t.Parallel()
			p := bankOn(t, point+":2", pgtest.Database(t))
			others := func(round string) {
				client := newClient(t)
				for path, body := range map[string]string{
					"/v1/accounts":              `{"id":"` + round + `","currency":"EUR","opening_balance":5}`,
					"/v1/orders":                `{"account":"alice","sku":"coffee","quantity":1}`,
					"/v1/unprotected/transfers": crashBody,
				} {
					response, content, err := postTo(client, p.url+path, round+path, body)
					if err != nil || response.StatusCode != http.StatusCreated {
						t.Errorf("%s: %v %s", path, err, content)
					}
				}
			}
			others("before")
			if first := settle(t, p.url); first.status != http.StatusCreated || first.outcome != "executed" {
				t.Errorf("the first transfer got %d %s %s", first.status, first.outcome, first.body)
			}
			others("between")
			if _, _, err := post(newClient(t), p.url, "another", crashBody); err == nil {
				t.Error("the second transfer got its answer")
			}
			p.diesAt(point)
		})
	}
}

// TestACrashPointThatIsNoneIsRefused: a bank that ignored an unknown point would not die, and every
// test of it would pass.
func TestACrashPointThatIsNoneIsRefused(t *testing.T) {
	t.Parallel()
	line := failsAs(t, 1, crashCommand("nowhere:1", "postgres://nobody@127.0.0.1:1/none"))
	if !strings.Contains(line, crashpoint.BankVariable) || !strings.Contains(line, "after_body") {
		t.Errorf("a crash point that does not exist: %s", line)
	}
}
