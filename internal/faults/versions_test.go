package faults_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/migrations"
)

// Both versions are real programs (testdata/payments). The new one is built from these sources and
// brings a migration that they don't have yet, with one more column. The old one is built from the
// commit before the last change of the library, as during a deployment. If there is no history, as
// in a shallow clone, the old one is built from these sources too, and only the schema differs.
func TestF30KeysCrossVersionsThroughAMigration(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "builds older versions of the library")
	oldProgram, newProgram := buildPrograms(t)
	f := &versions{url: pgtest.Database(t), files: newerMigrations(t)}
	execute(t, f.url, "CREATE TABLE payments (id bigserial PRIMARY KEY, key text NOT NULL)")
	oldURL := f.start(t, oldProgram, "-name=old")()
	answers := map[string]string{"paid-by-old": f.want(t, oldURL, "paid-by-old", "executed")}

	// The new version migrates while the old one runs a payment and receives others.
	release := f.hold(t)
	held := f.sendHeld(oldURL, "held-by-old")
	f.awaitHeld(t)
	load := f.loadUntilStopped(oldURL)
	newStarts := f.start(t, newProgram, "-name=new", "-migrations="+f.files)
	await(t, f.url, "the migration waits for the payment",
		"EXISTS (SELECT FROM pg_stat_activity WHERE query LIKE '%ALTER TABLE%' AND wait_event_type = 'Lock' AND pid <> pg_backend_pid())")
	release()
	answers["held-by-old"] = f.settled(t, held)
	newURL := newStarts()
	loaded := load(t)
	if column := count(t, f.url, "SELECT count(*) FROM information_schema.columns WHERE column_name = 'note'"); column != 1 {
		t.Fatal("nothing was migrated")
	}

	// Keys cross over, both ways.
	answers["paid-by-new"] = f.want(t, newURL, "paid-by-new", "executed")
	f.replayed(t, newURL, answers)
	f.replayed(t, newURL, loaded)
	f.replayed(t, oldURL, answers)
	for _, side := range []struct{ holder, other string }{{oldURL, newURL}, {newURL, oldURL}} {
		key := "held-again-" + side.holder[len(side.holder)-4:]
		release := f.hold(t)
		held := f.sendHeld(side.holder, key)
		f.awaitHeld(t)
		if got, err := send(side.other, key); err != nil || !got.is(409, "in-progress") {
			t.Errorf("the other version's key in progress: %v, %v", got, err)
		}
		release()
		answers[key] = f.settled(t, held)
		f.replayed(t, side.other, map[string]string{key: answers[key]})
	}
	for n := range 30 { // duplicates at once, one to each
		key := fmt.Sprintf("both-%d", n)
		answers[key] = f.payAtBoth(t, key, oldURL, newURL)
	}

	// A service that is rolled back starts on the newer schema.
	rolledBack := f.start(t, oldProgram, "-name=rolled-back")()
	f.replayed(t, rolledBack, answers)
	answers["rolled-back"] = f.want(t, rolledBack, "rolled-back", "executed")
	f.replayed(t, newURL, answers)

	// A fingerprint function that the others don't have: they can't compare, and neither pay nor
	// replay.
	ownURL := f.start(t, newProgram, "-name=own", "-fingerprint=101")()
	f.replayed(t, ownURL, answers) // it still has the built-in one
	own := f.want(t, ownURL, "own-fingerprint", "executed")
	for _, address := range []string{oldURL, newURL} {
		if got, err := send(address, "own-fingerprint"); err != nil || !got.is(503, "unknown") {
			t.Errorf("a fingerprint that the version does not know: %v, %v", got, err)
		}
	}
	answers["own-fingerprint"] = own
	f.replayed(t, ownURL, map[string]string{"own-fingerprint": own})

	const wrong = `SELECT count(*) FROM (SELECT key, count(*) AS n FROM payments GROUP BY key) AS p
		FULL JOIN idempotency_keys USING (key) WHERE n IS DISTINCT FROM 1 OR scope IS NULL`
	if n := count(t, f.url, wrong); n != 0 {
		t.Errorf("%d keys don't have one payment and one record", n)
	}
	if paid := count(t, f.url, "SELECT count(*) FROM payments"); paid != len(answers)+len(loaded) {
		t.Errorf("%d payments of %d keys", paid, len(answers)+len(loaded))
	}
}

// versions are programs on one database.
type versions struct{ url, files string }

// start runs a program; ready waits until it serves, and returns its address.
func (f *versions) start(t *testing.T, program string, arguments ...string) (ready func() string) {
	t.Helper()
	cmd := exec.Command(program, append(arguments, "-database="+f.url)...)
	var output bytes.Buffer
	cmd.Stderr = &output
	stdin, err := cmd.StdinPipe() // it ends with its input, and so with this process
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = stdin.Close()
		kill := time.AfterFunc(awaitMax, func() { _ = cmd.Process.Kill() })
		defer kill.Stop()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("%s %v:\n%s", filepath.Base(program), arguments, output.String())
		}
	})
	return func() string {
		t.Helper()
		line, err := bufio.NewReader(stdout).ReadString('\n')
		if err != nil {
			t.Fatalf("%s %v does not start: %v", filepath.Base(program), arguments, err)
		}
		return strings.TrimSpace(line)
	}
}

// want sends a payment, wants 201 with that outcome, and returns the body.
func (f *versions) want(t *testing.T, address, key, outcome string) string {
	t.Helper()
	got, err := send(address, key)
	if err != nil || !got.is(201, outcome) {
		t.Fatalf("%s: %v, %v, want 201 %s", key, got, err, outcome)
	}
	return got.body
}

// replayed requires that each answer is replayed, byte by byte.
func (f *versions) replayed(t *testing.T, address string, answers map[string]string) {
	t.Helper()
	for key, body := range answers {
		if again := f.want(t, address, key, "replayed"); again != body {
			t.Errorf("%s: replayed %s, first %s", key, again, body)
		}
	}
}

// hold makes the handlers of requests with the header Hold wait until release.
func (f *versions) hold(t *testing.T) (release func()) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), f.url)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(t.Context(), "SELECT pg_advisory_lock(30)"); err != nil {
		t.Fatal(err)
	}
	// Closing the connection releases the lock.
	release = sync.OnceFunc(func() { _ = conn.Close(context.WithoutCancel(t.Context())) })
	t.Cleanup(release)
	return release
}

type answered struct {
	reply reply
	err   error
}

func (f *versions) sendHeld(address, key string) <-chan answered {
	result := make(chan answered, 1)
	go func() {
		got, err := send(address, key, "Hold")
		result <- answered{got, err}
	}()
	return result
}

func (f *versions) awaitHeld(t *testing.T) {
	t.Helper()
	await(t, f.url, "the handler is held", "EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 30 AND NOT granted)")
}

// settled returns the body of a held payment's 201.
func (f *versions) settled(t *testing.T, held <-chan answered) string {
	t.Helper()
	got := <-held
	if got.err != nil || !got.reply.is(201, "executed") {
		t.Fatalf("the held payment: %v, %v", got.reply, got.err)
	}
	return got.reply.body
}

// loadUntilStopped pays one key after another, each until it gets 201; a migration's lock may
// refuse some for a while. stop returns the bodies.
func (f *versions) loadUntilStopped(address string) (stop func(*testing.T) map[string]string) {
	answers := map[string]string{}
	done := make(chan struct{})
	var failed error
	var load sync.WaitGroup
	load.Go(func() {
		deadline := time.Now().Add(awaitMax)
		for n := 0; failed == nil; n++ {
			select {
			case <-done:
				return
			default:
			}
			key := fmt.Sprintf("load-%d", n)
			for {
				got, err := send(address, key)
				if err == nil && got.status == 201 {
					answers[key] = got.body
					time.Sleep(5 * time.Millisecond)
					break
				}
				if err != nil || got.status != 503 && got.status != 409 || time.Now().After(deadline) {
					failed = errors.Join(fmt.Errorf("load: %s: %v", key, got), err)
					return
				}
				time.Sleep(10 * time.Millisecond)
			}
		}
	})
	return func(t *testing.T) map[string]string {
		t.Helper()
		close(done)
		load.Wait()
		if failed != nil || len(answers) == 0 {
			t.Fatalf("load: %d keys, %v", len(answers), failed)
		}
		return answers
	}
}

// payAtBoth sends a key to both versions at once, and returns the one answer.
func (f *versions) payAtBoth(t *testing.T, key string, addresses ...string) string {
	t.Helper()
	results := make(chan answered, len(addresses))
	for _, address := range addresses {
		go func() {
			for begin := time.Now(); ; time.Sleep(time.Millisecond) {
				got, err := send(address, key)
				if err != nil || !got.is(409, "in-progress") || time.Since(begin) > awaitMax {
					results <- answered{got, err}
					return
				}
			}
		}()
	}
	executed, bodies := 0, map[string]bool{}
	body := ""
	for range addresses {
		got := <-results
		if got.err != nil || got.reply.status != 201 {
			t.Errorf("%s: %v, %v", key, got.reply, got.err)
		}
		if got.reply.outcome == "executed" {
			executed++
		}
		body = got.reply.body
		bodies[body] = true
	}
	if executed != 1 || len(bodies) != 1 {
		t.Errorf("%s was executed %d times, and has %d answers", key, executed, len(bodies))
	}
	return body
}

// newerMigrations returns a folder with the migrations of these sources and one more.
func newerMigrations(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	released, err := filepath.Glob("../../migrations/*.sql")
	if err != nil || len(released) == 0 {
		t.Fatalf("migrations: %d, %v", len(released), err)
	}
	for _, file := range released {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(file)), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for direction, text := range map[string]string{
		"up":   "ALTER TABLE idempotency_keys ADD COLUMN note text",
		"down": "ALTER TABLE idempotency_keys DROP COLUMN note",
	} {
		name := fmt.Sprintf("%06d_add_note.%s.sql", migrations.Latest+1, direction)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}
