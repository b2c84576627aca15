package operator_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

var act = operator.Act{Actor: "alice", Reason: "ticket 7"}

// audits returns the rows of the audit table, oldest first.
func (b *testBundle) audits(t testing.TB) string {
	t.Helper()
	return b.Text(t, "SELECT COALESCE(string_agg(concat_ws(' ', action, actor, reason, scope, key, attempt_id, status), '; ' ORDER BY id), '') FROM idempotency_audit")
}

func TestDeleteLetsARetryRunAgain(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	k := key("canary")
	b.do(t, k, 201)
	b.do(t, key("other"), 201)
	record, err := b.operator.Delete(t.Context(), k, act)
	if err != nil || record.Key != k || record.Status != 201 {
		t.Fatalf("%+v, %v", record, err)
	}
	if got, want := b.audits(t), "delete alice ticket 7 acme canary "+record.Attempt.String()+" 201"; got != want {
		t.Errorf("audit is %q, want %q", got, want)
	}
	if result := b.do(t, k, 201); result.Outcome != idempotency.OutcomeExecuted {
		t.Errorf("a retry is %s", result.Outcome)
	}
	if result := b.do(t, key("other"), 201); result.Outcome != idempotency.OutcomeReplayed {
		t.Errorf("a retry of another key is %s", result.Outcome)
	}
}

// An expired record counts until the reaper deletes it; then its key is new.
func TestExpireLeavesTheRecordToTheReaper(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	k := key("canary")
	b.do(t, k, 201)
	record, err := b.operator.Expire(t.Context(), k, act)
	if err != nil || record.Expired {
		t.Fatalf("%+v, %v", record, err)
	}
	if got, want := b.audits(t), "expire alice ticket 7 acme canary "+record.Attempt.String()+" 201"; got != want {
		t.Errorf("audit is %q, want %q", got, want)
	}
	state, err := b.operator.Get(t.Context(), k)
	if err != nil || !state.Record.Expired || state.Record.Attempt != record.Attempt {
		t.Fatalf("%+v, %v", state.Record, err)
	}
	if result := b.do(t, k, 201); result.Outcome != idempotency.OutcomeReplayed {
		t.Errorf("before the reaper came a retry is %s", result.Outcome)
	}
	again, err := b.operator.Expire(t.Context(), k, act)
	if err != nil || !again.ExpiresAt.Equal(state.Record.ExpiresAt) {
		t.Errorf("expired once more: %v, %v, want %v", again.ExpiresAt, err, state.Record.ExpiresAt)
	}
	if later, err := b.operator.Get(t.Context(), k); err != nil || !later.Record.ExpiresAt.Equal(state.Record.ExpiresAt) {
		t.Errorf("its time has moved to %v", later.Record.ExpiresAt)
	}
	if _, err := b.operator.GC(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if result := b.do(t, k, 201); result.Outcome != idempotency.OutcomeExecuted {
		t.Errorf("afterwards a retry is %s", result.Outcome)
	}
}

// An act takes neither the key from a running attempt, nor the record from a retry that reads it.
func TestActOnARunningAttempt(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	k := key("canary")
	finish := b.Running(t, k)
	_, err := b.operator.Delete(t.Context(), k, act)
	wantError(t, err, operator.ErrInProgress)
	_, err = b.operator.Expire(t.Context(), k, act)
	wantError(t, err, operator.ErrInProgress)
	if result := finish(); result.Outcome != idempotency.OutcomeExecuted {
		t.Fatal(result.Err)
	}
	if got := b.audits(t); got != "" {
		t.Errorf("audit is %q", got)
	}
	if result := b.do(t, k, 201); result.Outcome != idempotency.OutcomeReplayed {
		t.Errorf("a retry is %s", result.Outcome)
	}
}

func TestActOnTheRecordOfAnotherAttempt(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	k := key("canary")
	b.do(t, k, 201)
	first, err := b.operator.Delete(t.Context(), k, act)
	if err != nil {
		t.Fatal(err)
	}
	b.do(t, k, 201)
	named := act
	named.Attempt = first.Attempt
	_, err = b.operator.Delete(t.Context(), k, named)
	wantError(t, err, operator.ErrChanged)
	_, err = b.operator.Expire(t.Context(), k, named)
	wantError(t, err, operator.ErrChanged)
	state, err := b.operator.Get(t.Context(), k)
	if err != nil || state.Record.Expired {
		t.Fatalf("%+v, %v", state.Record, err)
	}
	named.Attempt = state.Record.Attempt
	if _, err := b.operator.Delete(t.Context(), k, named); err != nil {
		t.Error(err)
	}
}

func TestActOnWhatIsNotThere(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.do(t, key("other"), 201)
	_, err := b.operator.Delete(t.Context(), key("canary"), act)
	wantError(t, err, operator.ErrNotFound)
	_, err = b.operator.Expire(t.Context(), key("canary"), act)
	wantError(t, err, operator.ErrNotFound)
	if got := b.audits(t); got != "" {
		t.Errorf("audit is %q", got)
	}
}

// The act and its row in the audit table are one commit.
func TestNothingIsDoneThatIsNotAudited(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	k := key("canary")
	b.do(t, k, 201)
	b.Exec(t, "ALTER TABLE idempotency_audit ADD CONSTRAINT full_disk CHECK (false)")
	for name, do := range map[string]func(context.Context, idempotency.Key, operator.Act) (operator.Record, error){"delete": b.operator.Delete, "expire": b.operator.Expire} {
		if _, err := do(t.Context(), k, act); err == nil || !strings.Contains(err.Error(), "23514") {
			t.Errorf("%s: %v", name, err)
		} else {
			wantError(t, err, err)
		}
	}
	b.Exec(t, "DROP TABLE idempotency_audit")
	for name, do := range map[string]func(context.Context, idempotency.Key, operator.Act) (operator.Record, error){"delete": b.operator.Delete, "expire": b.operator.Expire} {
		if _, err := do(t.Context(), k, act); err == nil || !strings.Contains(err.Error(), "run the migrations") {
			t.Errorf("%s without the table: %v", name, err)
		}
	}
	state, err := b.operator.Get(t.Context(), k)
	if err != nil || state.Record == nil || state.Record.Expired {
		t.Errorf("the record is %+v, %v", state.Record, err)
	}
}

// A statement that succeeds may have written no row. If the audit row or the change of the record
// is missing, the act is undone and returns an error that says so.
func TestActThatWritesNothingIsRefused(t *testing.T) {
	t.Parallel()
	const skip = "CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$; CREATE TRIGGER skip BEFORE "
	for name, c := range map[string]struct{ sql, says string }{
		"trigger on the audit table":   {skip + "INSERT ON idempotency_audit FOR EACH ROW EXECUTE FUNCTION skip()", "no row was written to public.idempotency_audit"},
		"rule on the audit table":      {"CREATE RULE skip AS ON INSERT TO idempotency_audit DO INSTEAD NOTHING", "no row was written to public.idempotency_audit"},
		"trigger that keeps records":   {skip + "DELETE OR UPDATE ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION skip()", "the record stays"},
		"rules that keep records":      {"CREATE RULE d AS ON DELETE TO idempotency_keys DO INSTEAD NOTHING; CREATE RULE u AS ON UPDATE TO idempotency_keys DO INSTEAD NOTHING", "the record stays"},
		"record lies in a child table": {"CREATE TABLE archive () INHERITS (idempotency_keys); WITH gone AS (DELETE FROM idempotency_keys RETURNING *) INSERT INTO archive SELECT * FROM gone", "the record stays"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, nil)
			b.do(t, key("k"), 201)
			b.Exec(t, c.sql)
			for action, act1 := range map[string]func(context.Context, idempotency.Key, operator.Act) (operator.Record, error){"expire": b.operator.Expire, "delete": b.operator.Delete} {
				if _, err := act1(t.Context(), key("k"), act); err == nil || !strings.Contains(err.Error(), c.says) {
					t.Errorf("%s: %v, want %q", action, err, c.says)
				}
			}
			if got := b.Text(t, "SELECT count(*) || ' ' || count(*) FILTER (WHERE expires_at > now()) FROM idempotency_keys"); got != "1 1" {
				t.Errorf("records, and live ones: %s", got)
			}
			if got := b.audits(t); got != "" {
				t.Errorf("audit is %q", got)
			}
		})
	}
}

func TestActsSayWhoAndWhy(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.do(t, key("canary"), 201)
	for name, bad := range map[string]operator.Act{
		"nobody":            {Reason: "why"},
		"blank":             {Actor: " ", Reason: "why"},
		"no reason":         {Actor: "alice"},
		"blank reason":      {Actor: "alice", Reason: "\t"},
		"long actor":        {Actor: strings.Repeat("x", operator.ActorBytesMax+1), Reason: "why"},
		"long reason":       {Actor: "alice", Reason: strings.Repeat("x", operator.ReasonBytesMax+1)},
		"not UTF-8":         {Actor: "\xff", Reason: "why"},
		"NUL in the reason": {Actor: "alice", Reason: "\x00"},
	} {
		if _, err := b.operator.Delete(t.Context(), key("canary"), bad); err == nil {
			t.Errorf("%s: no error", name)
		} else {
			wantError(t, err, operator.ErrInvalid)
		}
	}
	longest := operator.Act{Actor: strings.Repeat("x", operator.ActorBytesMax), Reason: strings.Repeat("y", operator.ReasonBytesMax)}
	if _, err := b.operator.Delete(t.Context(), key("canary"), longest); err != nil {
		t.Errorf("the longest: %v", err)
	}
	_, err := b.operator.Delete(t.Context(), idempotency.Key{Scope: "acme", Value: "canary canary"}, act)
	wantError(t, err, operator.ErrInvalid)
}

// Concurrent operators and requests: each act that reports success changed one record, and no two
// requests ran at the same time.
func TestActsAndRequestsAtOnce(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	k := key("canary")
	const rounds, workers = 40, 3
	b.Engine.Do(t.Context(), testservice.Request(k), b.effect) // so that there is something to delete
	var all sync.WaitGroup
	for range workers { // repeated, because a round may meet another one
		all.Go(func() {
			for range rounds {
				for b.Engine.Do(context.Background(), testservice.Request(k), b.effect).Outcome == idempotency.OutcomeInProgress {
				}
			}
		})
		all.Go(func() {
			for range rounds {
				for err := operator.ErrInProgress; errors.Is(err, operator.ErrInProgress); {
					_, err = b.operator.Delete(context.Background(), k, act) // whatever the key's state
				}
			}
		})
	}
	all.Wait()
	effects, acts := b.Count(t, "SELECT count(*) FROM effects"), b.Count(t, "SELECT count(*) FROM idempotency_audit")
	left := b.Count(t, "SELECT count(*) FROM idempotency_keys")
	if effects != acts+left || acts == 0 {
		t.Errorf("%d effects, %d deleted and %d left", effects, acts, left)
	}
	if n := b.Count(t, "SELECT count(DISTINCT attempt_id) FROM idempotency_audit"); n != acts {
		t.Errorf("%d acts hit %d attempts", acts, n)
	}
}

// stopAt stops a program before a statement until the test continues it.
type stopAt struct {
	prefix  string
	stopped chan struct{}
	resume  chan struct{}
	once    sync.Once
}

func (s *stopAt) TraceQueryStart(ctx context.Context, _ *pgx.Conn, data pgx.TraceQueryStartData) context.Context {
	if strings.HasPrefix(data.SQL, s.prefix) {
		s.once.Do(func() { close(s.stopped) })
		<-s.resume
	}
	return ctx
}

func (s *stopAt) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

// If a program is stopped in the middle of an act, for example by Ctrl-Z, the key becomes free and
// the act is not done.
func TestStoppedActGivesTheKeyBack(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.do(t, key("k"), 201)
	config, err := pgxpool.ParseConfig(b.URL)
	if err != nil {
		t.Fatal(err)
	}
	stop := &stopAt{prefix: "DELETE", stopped: make(chan struct{}), resume: make(chan struct{})}
	config.ConnConfig.Tracer = stop
	pool, err := pgxpool.NewWithConfig(t.Context(), config) // not through Configure, as idemctl's
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	acted := make(chan error, 1)
	go func() {
		_, err := operator.New(postgres.New(pool, nil), &operator.Options{StatementTimeout: time.Second, CallTimeout: time.Second}).
			Delete(t.Context(), key("k"), operator.Act{Actor: "alice", Reason: "a test"})
		acted <- err
	}()
	<-stop.stopped
	const held = "SELECT count(*)::text FROM pg_locks WHERE locktype = 'advisory' AND granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
	if n := b.Text(t, held); n != "1" {
		t.Errorf("%s keys are held, want 1", n)
	}
	for deadline := time.Now().Add(time.Minute); b.Text(t, held) != "0"; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Error("the key is held for as long as the program is stopped")
			break
		}
	}
	close(stop.resume)
	if err := <-acted; err == nil {
		t.Error("the act was done by a session that had ended")
	}
	if n := b.Text(t, "SELECT count(*)::text FROM idempotency_keys"); n != "1" {
		t.Errorf("%s records, want 1", n)
	}
}
