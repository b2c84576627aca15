//go:build unix

package main

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/internal/crashpoint"
	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/internal/pgtest"
)

const (
	crashKey  = "paid-once-4711"
	crashBody = `{"from":"alice","to":"bob","amount":7}`
)

// crashCommand returns a bank that dies at a point, such as after_body:1.
func crashCommand(point, database string, args ...string) *exec.Cmd {
	cmd := command(context.Background(), append([]string{"--addr", "127.0.0.1:0", "--database-url", database, "--pool-size", "4", "--log-level", "ERROR"}, args...)...)
	if point != "" {
		cmd.Env = append(cmd.Env, crashpoint.BankVariable+"="+point)
	}
	return cmd
}

// bankOn starts a bank on a database. It dies at the point, unless that is empty.
func bankOn(t *testing.T, point, database string, args ...string) *program {
	t.Helper()
	return start(t, crashCommand(point, database, args...)).await()
}

// diesAt waits for the end and requires a SIGKILL, after one line on stderr.
func (p *program) diesAt(name string) {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(waitMax):
		p.t.Fatalf("the bank did not die at %s", name)
	}
	status, _ := p.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if !status.Signaled() || status.Signal() != syscall.SIGKILL {
		p.t.Errorf("the bank ended with %v instead of SIGKILL", p.cmd.ProcessState)
	}
	line := "demo-bank: crash point " + name + "\n"
	if text := p.stderr.String(); !strings.HasSuffix(text, line) || strings.Count(text, "crash point") != 1 {
		p.t.Errorf("its last words are not %q:\n%s", line, text)
	}
}

// reply is the final answer to a request.
type reply struct {
	status  int
	outcome string
	body    []byte
}

// settle sends a request until its answer is definite: a session of the dead bank may hold the key
// for a moment.
func settle(t *testing.T, url string) reply {
	t.Helper()
	client := newClient(t)
	var got reply
	eventually(t, "the retry has a definite answer", func() bool {
		response, body, err := post(client, url, crashKey, crashBody)
		if err != nil {
			t.Fatalf("retry: %v", err)
		}
		got = reply{response.StatusCode, response.Header.Get("Idempotency-Status"), body}
		return got.outcome != "in-progress"
	})
	return got
}

// booked counts the transfers and the records of crashKey.
func booked(t *testing.T, db *pgxpool.Pool) (transfers, records int) {
	t.Helper()
	err := db.QueryRow(t.Context(), `
		SELECT (SELECT count(*) FROM transfers WHERE key = $1), (SELECT count(*) FROM idempotency_keys WHERE key = $1)`,
		crashKey).Scan(&transfers, &records)
	if err != nil {
		t.Fatal(err)
	}
	return transfers, records
}

func expectBooked(t *testing.T, db *pgxpool.Pool, want int) {
	t.Helper()
	if transfers, records := booked(t, db); transfers != want || records != want {
		t.Errorf("%d transfers and %d records are in the books, want %d of each", transfers, records, want)
	}
}

// recorded returns the recorded answer's body.
func recorded(t *testing.T, db *pgxpool.Pool) []byte {
	t.Helper()
	var body []byte
	if err := db.QueryRow(t.Context(), `SELECT body FROM idempotency_keys WHERE key = $1`, crashKey).Scan(&body); err != nil {
		t.Fatal(err)
	}
	return body
}

// expectRetry starts a bank on the books of the dead one. The retry must be executed or replayed,
// as outcome says. It must get the recorded answer, so must one more retry, and there must be one
// transfer.
func expectRetry(t *testing.T, database string, db *pgxpool.Pool, outcome string) {
	t.Helper()
	again := bankOn(t, "", database)
	first := settle(t, again.url)
	if first.status != http.StatusCreated || first.outcome != outcome {
		t.Errorf("the retry got %d %s %s, want 201 %s", first.status, first.outcome, first.body, outcome)
	}
	expectBooked(t, db, 1)
	if !bytes.Equal(first.body, recorded(t, db)) {
		t.Errorf("the retry got %s, recorded is %s", first.body, recorded(t, db))
	}
	if second := settle(t, again.url); second.outcome != "replayed" || !bytes.Equal(first.body, second.body) {
		t.Errorf("one more retry got %d %s %s, the first %s", second.status, second.outcome, second.body, first.body)
	}
	expectBooked(t, db, 1)
}

// expectLost requires that a request gets no answer at all.
func expectLost(t *testing.T, url string) {
	t.Helper()
	if response, body, err := post(newClient(t), url, crashKey, crashBody); err == nil {
		t.Errorf("the client of a bank that was to die got an answer: %d %s", response.StatusCode, body)
	}
}

// TestF01KilledBeforeCommit: everything that a transfer did before its COMMIT is undone, and the
// retry executes it.
func TestF01KilledBeforeCommit(t *testing.T) {
	t.Parallel()
	for _, point := range []string{"after_body", "after_begin", "mid_handler", "after_handler", "before_commit"} {
		t.Run(point, func(t *testing.T) {
			t.Parallel()
			database := pgtest.Database(t)
			p := bankOn(t, point+":1", database)
			db := connect(t, database)
			expectLost(t, p.url)
			p.diesAt(point)
			expectBooked(t, db, 0)
			expectRetry(t, database, db, "executed")
		})
	}
}

// faultyBank starts a bank behind a proxy. The bank dies at the point, unless that is empty. The
// proxy calls decide for the COMMIT of crashKey, and forwards all others.
func faultyBank(t *testing.T, point, database string, decide func(p *program) pgfault.Fault) (p *program, proxy *pgfault.Proxy) {
	t.Helper()
	network, address, err := pgfault.Upstream(database)
	if err != nil {
		t.Fatal(err)
	}
	started := make(chan *program, 1)
	proxy, err = pgfault.Start(pgfault.Options{Network: network, Address: address, OnCommit: func(commit pgfault.Commit) pgfault.Fault {
		if !bytes.Contains(commit.Messages, []byte(crashKey)) {
			return pgfault.Fault{}
		}
		return decide(<-started)
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := proxy.Close(); err != nil {
			t.Errorf("close the proxy: %v", err)
		}
	})
	p = bankOn(t, point, proxy.URL(database))
	started <- p
	return p, proxy
}

// TestF02KilledWithCommitOnTheWire: the bank dies before PostgreSQL gets its COMMIT, when it gets
// it, or when it answers. The retry finds the outcome, and there is one transfer.
func TestF02KilledWithCommitOnTheWire(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name    string
		decide  func(p *program) pgfault.Fault
		kind    pgfault.Kind
		arrives bool
		outcome string
	}{
		{"before it arrives", func(p *program) pgfault.Fault {
			return pgfault.Fault{Kind: pgfault.CallBefore, Hook: p.kill}
		}, pgfault.CallBefore, true, "replayed"},
		{"before its reply", func(p *program) pgfault.Fault {
			return pgfault.Fault{Kind: pgfault.CallAfter, Hook: p.kill}
		}, pgfault.CallAfter, true, "replayed"},
		{"and it never arrives", func(p *program) pgfault.Fault {
			p.kill()
			return pgfault.Fault{Kind: pgfault.CutBefore}
		}, pgfault.CutBefore, false, "executed"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			database := pgtest.Database(t)
			p, proxy := faultyBank(t, "", database, test.decide)
			db := connect(t, database)
			expectLost(t, p.url)
			eventually(t, "the COMMIT meets its fault", func() bool { return proxy.Hits()[test.kind] == 1 })
			if test.arrives {
				eventually(t, "PostgreSQL executes the dead bank's COMMIT", func() bool {
					transfers, _ := booked(t, db)
					return transfers == 1
				})
			} else {
				expectBooked(t, db, 0)
			}
			expectRetry(t, database, db, test.outcome)
		})
	}
}

// TestF03KilledAfterCommit: the money has moved, and the client got no answer, or half of it. The
// retry gets the recorded answer.
func TestF03KilledAfterCommit(t *testing.T) {
	t.Parallel()
	t.Run("after_commit", func(t *testing.T) {
		t.Parallel()
		database := pgtest.Database(t)
		p := bankOn(t, "after_commit:1", database)
		db := connect(t, database)
		expectLost(t, p.url)
		p.diesAt("after_commit")
		expectBooked(t, db, 1)
		expectRetry(t, database, db, "replayed")
	})
	t.Run("half_response", func(t *testing.T) {
		t.Parallel()
		database := pgtest.Database(t)
		p := bankOn(t, "half_response:1", database)
		db := connect(t, database)
		response, half, err := post(newClient(t), p.url, crashKey, crashBody)
		p.diesAt("half_response")
		whole := recorded(t, db)
		if err == nil || response == nil || response.StatusCode != http.StatusCreated ||
			len(half) == 0 || len(half) >= len(whole) || !bytes.HasPrefix(whole, half) {
			t.Errorf("the client got %q and %v, want the first half of %q and an error", half, err, whole)
		}
		expectBooked(t, db, 1)
		expectRetry(t, database, db, "replayed")
	})
}

// TestF04KilledWhileResolving: the reply to COMMIT was lost, and the bank dies while it looks for
// the outcome. The retry finds it.
func TestF04KilledWhileResolving(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name    string
		kind    pgfault.Kind
		booked  int
		outcome string
	}{
		{"it was committed", pgfault.CutAfter, 1, "replayed"},
		{"it never arrived", pgfault.CutBefore, 0, "executed"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			database := pgtest.Database(t)
			p, proxy := faultyBank(t, "resolving:1", database, func(*program) pgfault.Fault {
				return pgfault.Fault{Kind: test.kind}
			})
			db := connect(t, database)
			expectLost(t, p.url)
			p.diesAt("resolving")
			eventually(t, "the COMMIT meets its fault", func() bool { return proxy.Hits()[test.kind] == 1 })
			expectBooked(t, db, test.booked)
			expectRetry(t, database, db, test.outcome)
		})
	}
}

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

// expired counts the expired records of requests and the others.
func expired(t *testing.T, db *pgxpool.Pool) (over, live int) {
	t.Helper()
	err := db.QueryRow(t.Context(), `
		SELECT count(*) FILTER (WHERE expires_at < clock_timestamp()), count(*) FILTER (WHERE expires_at >= clock_timestamp())
		FROM idempotency_keys WHERE scope NOT LIKE 'message:%'`).Scan(&over, &live)
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
		// Not in tx: there pg_stat_activity would always show its first content.
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
