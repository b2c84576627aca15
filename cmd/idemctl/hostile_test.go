package main

import (
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

// hostile is text that a terminal would obey: it moves the cursor, sets the title, reverses the
// writing direction.
const hostile = "ac\u009b2J\u009d0;title\u009c\u202eme\x7f"

// A scope, a header, a trace, a reason or an application's name can't control the operator's
// terminal, with --json or without.
func TestWhatOthersWroteMovesNoCursor(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.do(t, "k")
	if err := idempotency.ValidateScope(hostile); err != nil {
		t.Fatal(err)
	}
	b.Exec(t, `UPDATE idempotency_keys SET scope = $1, trace_id = $1, headers = decode('01000000010000000158000000010000000a', 'hex') || convert_to($2, 'UTF8')`, hostile, "\u202eabc\u009b1")
	b.Exec(t, `INSERT INTO idempotency_audit (action, actor, reason, scope, key, attempt_id, status, record_created_at, record_expires_at)
		SELECT 'expire', $1, $1, scope, key, attempt_id, status, created_at, expires_at FROM idempotency_keys`, hostile)
	finish := b.running(t, "held")
	defer finish()
	for _, args := range [][]string{
		{"key", "list"}, {"key", "get", hostile, "k"}, {"key", "get", "--body", hostile, "k"}, {"key", "get", "acme", "held"},
		{"key", "watch", hostile, "k", "--for", "1ms"}, {"stats"}, {"top", "--count", "1"}, {"doctor"}, {"migrate", "status"}, {"gc"},
		{"key", "expire", hostile, "k", "--reason", hostile, "--actor", hostile, "--yes"},
		{"key", "get", "\x1b]0;title\x07", "k"}, {"key", "get", hostile, "k", hostile}, {"--schema", "no_such_schema", "key", "get", hostile, "k"},
	} {
		for _, args := range [][]string{args, append([]string{"--json"}, args...)} {
			r := b.idemctl(t, args...)
			for _, r := range r.stdout + r.stderr {
				if r != '\n' && !unicode.IsPrint(r) {
					t.Errorf("%q prints %U", args, r)
				}
			}
			if strings.HasPrefix(strings.Join(args, " "), "--json key get "+hostile+" k") && len(args) == 5 {
				if got := object[struct{ Scope string }](t, r); got.Scope != hostile {
					t.Errorf("the scope reads %q", got.Scope)
				}
			}
		}
	}
}

// A migration that waits prints the session that it waits for, and an application's name can't
// control the terminal there either.
func TestMigrationThatWaitsSaysForWhom(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ctx := t.Context()
	conn, err := b.Pool.Acquire(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	var pid string
	if err := conn.QueryRow(ctx, "SELECT pg_backend_pid()::text FROM set_config('application_name', $1, false)", "a\x1b[2Jreport").Scan(&pid); err != nil {
		t.Fatal(err)
	}
	tx, err := conn.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(ctx, "LOCK TABLE idempotency_audit IN ACCESS SHARE MODE"); err != nil {
		t.Fatal(err)
	}
	ended := make(chan result, 1)
	go func() { ended <- b.idemctl(t, "migrate", "down", "--to", "2", "--yes") }()
	const waits = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'idemctl' AND wait_event_type = 'Lock' AND datname = current_database()"
	await := func(waiting bool) {
		for deadline := time.Now().Add(waitMax); b.Count(t, waits) > 0 != waiting; {
			if time.Now().After(deadline) {
				t.Fatalf("that it waits: never %v", waiting)
			}
		}
	}
	for range 2 { // the first try times out
		await(true)
		await(false)
	}
	if err := tx.Rollback(ctx); err != nil {
		t.Fatal(err)
	}
	r := <-ended
	if r.code != 0 {
		t.Errorf("exit code %d\n%s", r.code, r.stderr)
	}
	wantText(t, r.stderr, "migration 3 down waits for", "process "+pid, "requests go on")
	if strings.ContainsRune(r.stderr, 0x1b) {
		t.Errorf("it prints control characters: %q", r.stderr)
	}
	if version, err := migrations.Version(ctx, postgres.New(b.Pool, nil), nil); version != 2 || err != nil {
		t.Errorf("version is %d, %v", version, err)
	}
}
