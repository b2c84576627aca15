package operator_test

import (
	"context"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgserver"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// levels returns the worst level of each check, and all findings as text.
func levels(findings []operator.Finding) (worst map[string]operator.Level, text string) {
	worst = map[string]operator.Level{}
	for _, f := range findings {
		if worst[f.Check] != operator.LevelFail && (worst[f.Check] == "" || f.Level != operator.LevelOK) {
			worst[f.Check] = f.Level
		}
		text += string(f.Level) + " " + f.Check + ": " + f.What + " -> " + f.Remedy + "\n"
	}
	return worst, text
}

// On a healthy server the doctor reports each check as fine, in order, and names no remedy. The
// server keeps its commits on disk.
func TestDoctorOnAServerOfItsOwn(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "starts a PostgreSQL of its own")
	server, err := pgserver.Start(t.Context(), &pgserver.Options{Settings: map[string]string{"synchronous_commit": "on"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	b := testservice.On(t, server.URL(), nil)
	if err := migrations.Up(t.Context(), b.Store, nil); err != nil {
		t.Fatal(err)
	}
	findings := operator.New(b.Store, nil).Doctor(t.Context())
	var checks []string
	for _, f := range findings {
		checks = append(checks, f.Check)
		if f.Level != operator.LevelOK || f.Remedy != "" || f.What == "" {
			t.Errorf("%+v", f)
		}
	}
	if !reflect.DeepEqual(checks, operator.Checks()) {
		t.Errorf("checks are %v, want %v", checks, operator.Checks())
	}

	// COMMIT would wait for a missing standby: the statements below must not.
	b.Exec(t, "ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
	b.Exec(t, "SELECT pg_reload_conf()")
	for deadline := time.Now().Add(30 * time.Second); b.Text(t, "SHOW synchronous_standby_names") != "nobody"; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the setting does not arrive")
		}
	}
	if worst, text := levels(operator.New(b.Store, nil).Doctor(t.Context())); worst["replication"] != operator.LevelFail || !strings.Contains(text, "none is connected") {
		t.Errorf("without its synchronous standby:\n%s", text)
	}
}

// Each fault is found by its check, with a remedy, and nothing else is.
func TestDoctorFindsWhatIsWrong(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		sql    string
		check  string
		level  operator.Level
		says   string // of the finding or of its remedy
		others []string
	}{
		"nothing":       {"", "durability", operator.LevelFail, "fsync is off", nil}, // of the tests' server
		"no table":      {"DROP TABLE idempotency_keys", "schema", operator.LevelFail, "run the migrations", []string{"index", "rights", "attempts", "reaper", "vacuum", "bloat"}},
		"old":           {"UPDATE idempotency_migrations SET version = 1", "schema", operator.LevelFail, "version 1", nil},
		"without 3":     {"UPDATE idempotency_migrations SET version = 2", "schema", operator.LevelWarn, "services work", nil},
		"unlogged":      {"ALTER TABLE idempotency_keys SET UNLOGGED", "schema", operator.LevelFail, "SET LOGGED", nil},
		"no key":        {"ALTER TABLE idempotency_keys DROP CONSTRAINT idempotency_keys_pkey", "index", operator.LevelFail, "ADD CONSTRAINT idempotency_keys_pkey", []string{"schema"}},
		"no column":     {"ALTER TABLE idempotency_keys DROP COLUMN headers", "schema", operator.LevelFail, "no column headers", nil},
		"a rule":        {"CREATE RULE skip AS ON INSERT TO idempotency_keys DO INSTEAD NOTHING", "schema", operator.LevelFail, "DROP RULE skip", nil},
		"a trigger":     {noTrigger + "BEFORE INSERT ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION skip()", "schema", operator.LevelFail, "DISABLE TRIGGER skip", nil},
		"an AFTER one":  {noTrigger + "AFTER INSERT ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION skip()", "schema", operator.LevelWarn, "AFTER triggers run with each record: skip", nil},
		"a child":       {"CREATE TABLE archive () INHERITS (idempotency_keys)", "schema", operator.LevelFail, "ALTER TABLE archive NO INHERIT", nil},
		"invalid index": {"UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'idempotency_keys_pkey'::regclass", "index", operator.LevelFail, "REINDEX", nil},
		"collation":     {`ALTER TABLE idempotency_keys ALTER COLUMN key TYPE text COLLATE "default"`, "index", operator.LevelFail, "collation C", nil},
		"more indexes":  {"CREATE INDEX ON idempotency_keys (created_at)", "index", operator.LevelWarn, "1 more indexes", nil},
		"asynchronous":  {"ALTER DATABASE %s SET synchronous_commit = off", "durability", operator.LevelFail, "synchronous_commit is off", nil},
		"isolation":     {"ALTER DATABASE %s SET default_transaction_isolation = 'repeatable read'", "isolation", operator.LevelWarn, "repeatable read", nil},
		"read only":     {"ALTER DATABASE %s SET default_transaction_read_only = on", "primary", operator.LevelWarn, "read-only", nil},
		"no autovacuum": {"ALTER TABLE idempotency_keys SET (autovacuum_enabled = false)", "vacuum", operator.LevelFail, "RESET (autovacuum_enabled)", nil},
		"no reaper": {`INSERT INTO idempotency_keys (created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)
			VALUES (now(), now() - interval '11 minutes', 200, 1, gen_random_uuid(), 'canary', 'canary', sha256('x'), '\x0100', '')`, "reaper", operator.LevelWarn, "gc", nil},
		"a reaper that comes": {`INSERT INTO idempotency_keys (created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)
			VALUES (now(), now() - interval '9 minutes', 200, 1, gen_random_uuid(), 'canary', 'canary', sha256('x'), '\x0100', '')`, "reaper", operator.LevelOK, "1 records are expired", nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, nil)
			if test.sql != "" {
				b.Exec(t, strings.Replace(test.sql, "%s", b.Pool.Config().ConnConfig.Database, 1))
			}
			pool, err := pgxpool.New(t.Context(), b.URL) // not through Configure, as an operator's
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(pool.Close)
			findings := operator.New(postgres.New(pool, nil), nil).Doctor(t.Context())
			worst, text := levels(findings)
			if worst[test.check] != test.level || !strings.Contains(text, test.says) || strings.Contains(text, "canary") {
				t.Errorf("want %s %s with %q:\n%s", test.level, test.check, test.says, text)
			}
			expected := append([]string{"durability", test.check}, test.others...)
			for _, f := range findings {
				remedy := f.Remedy != "" || strings.Contains(f.What, "see the check schema")
				if f.Level != operator.LevelOK && (!remedy || !contains(expected, f.Check)) {
					t.Errorf("unexpected: %+v", f)
				}
			}
			if n := strings.Count(text, "run the migrations"); n > 1 {
				t.Errorf("one cause is reported %d times:\n%s", n, text)
			}
		})
	}
}

const noTrigger = "CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$; CREATE TRIGGER skip "

func contains(all []string, one string) bool {
	return strings.Contains(" "+strings.Join(all, " ")+" ", " "+one+" ")
}

func TestDoctorWhereNobodyAnswers(t *testing.T) {
	t.Parallel()
	pool, err := pgxpool.New(t.Context(), "postgres://u:canary@127.0.0.1:1/x")
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	findings := operator.New(postgres.New(pool, nil), nil).Doctor(t.Context())
	if len(findings) != 1 || findings[0].Check != "server" || findings[0].Level != operator.LevelFail || findings[0].Remedy == "" || strings.Contains(findings[0].What, "canary") {
		t.Errorf("%+v", findings)
	}
}

// A standby is no place for a service, and the doctor examines it all the same. (On a standby:
// package faults.)

func TestStatsCountWhatThereIs(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	if s, err := b.operator.Stats(t.Context()); err != nil || s.Live.Rows != 0 || s.Expired.Rows != 0 || !s.OldestCreated.IsZero() || s.OldestExpired != 0 || s.InFlight != 0 {
		t.Errorf("of an empty table: %+v, %v", s, err)
	}
	b.plant(t, "acme", 100)
	b.Exec(t, "UPDATE idempotency_keys SET expires_at = now() - interval '1 hour' WHERE key LIKE '%7'")
	finish := b.Running(t, key("canary"))
	tx, err := b.Pool.Begin(t.Context()) // another session's lock, on the same database
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), "SELECT pg_advisory_xact_lock(42)"); err != nil {
		t.Fatal(err)
	}
	s, err := b.operator.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if s.Live != (operator.Count{Rows: 90}) || s.Expired != (operator.Count{Rows: 10}) || s.InFlight != 1 || len(s.Holders) != 1 || s.Holders[0].State != "idle in transaction" {
		t.Errorf("%+v", s)
	}
	if s.OldestExpired.Round(time.Minute) != time.Hour || time.Since(s.OldestCreated).Round(10*time.Second) != 100*time.Second || s.TableBytes == 0 || s.IndexBytes == 0 || s.AuditBytes == 0 || s.EventsBytes == 0 {
		t.Errorf("%+v", s)
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Error(err)
	}
	finish()
	if err := migrations.DownTo(t.Context(), b.Store, postgres.SchemaVersion, nil); err != nil {
		t.Fatal(err)
	}
	if s, err := b.operator.Stats(t.Context()); err != nil || s.AuditBytes != 0 || s.EventsBytes != 0 || s.Live.Rows != 91 {
		t.Errorf("before migration 3: %+v, %v", s, err)
	}
}

// GC deletes exactly the rows that are old enough.
func TestGC(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.plant(t, "acme", 100)
	b.Exec(t, "UPDATE idempotency_keys SET expires_at = now() - interval '1 second' WHERE key LIKE '%7'")
	b.Exec(t, `INSERT INTO idempotency_events (at, duration_us, outcome, attempts, scope, key)
		SELECT now() - n * interval '1 day', 1, 'replayed', 1, 'acme', 'k' FROM generate_series(0, 99) AS n`)
	b.Exec(t, `INSERT INTO idempotency_audit (at, action, actor, reason, scope, key, attempt_id, status, record_created_at, record_expires_at)
		SELECT now() - n * interval '1 day', 'delete', 'alice', 'r', 'acme', 'k', gen_random_uuid(), 201, now(), now() FROM generate_series(0, 9) AS n`)
	b.Exec(t, `CREATE TABLE archive () INHERITS (idempotency_events); INSERT INTO archive SELECT * FROM ONLY idempotency_events`)
	for _, test := range []struct {
		options *operator.GCOptions
		want    operator.GCResult
	}{
		{&operator.GCOptions{EventsAgeMax: -1}, operator.GCResult{Records: 10}},
		{nil, operator.GCResult{Events: 70}}, // those of 30 days and more
		{&operator.GCOptions{AuditAgeMax: 5 * 24 * time.Hour}, operator.GCResult{Audit: 5}},
		{&operator.GCOptions{EventsAgeMax: 24 * time.Hour}, operator.GCResult{Events: 29}},
	} {
		var told []operator.GCProgress
		if test.options != nil {
			test.options.Progress = func(p operator.GCProgress) { told = append(told, p) }
		}
		got, err := b.operator.GC(t.Context(), test.options)
		if err != nil || got != test.want {
			t.Errorf("%+v: %+v, %v; want %+v", test.options, got, err, test.want)
		}
		if test.options != nil && (len(told) == 0 || told[0].Table != "idempotency_keys" || told[0].Pages != told[0].Of || told[0].Deleted != test.want.Records) {
			t.Errorf("progress %+v", told)
		}
	}
	if n := b.Count(t, "SELECT count(*) FROM archive"); n != 100 {
		t.Errorf("%d rows in a child of the history, want 100", n)
	}
	b.Exec(t, "DROP TABLE archive")
	if n := b.Count(t, "SELECT count(*) FROM idempotency_keys"); n != 90 {
		t.Errorf("%d records are left, want 90", n)
	}
	_, err := b.operator.GC(t.Context(), &operator.GCOptions{AuditAgeMax: -1})
	wantError(t, err, operator.ErrInvalid)
	if err := migrations.DownTo(t.Context(), b.Store, postgres.SchemaVersion, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := b.operator.GC(t.Context(), &operator.GCOptions{AuditAgeMax: time.Hour}); err != nil {
		t.Errorf("before migration 3: %v", err)
	}
}

// The timeline has all events in order: the record, the lock, the acts. (Of requests: package
// history.)
func TestTimelineOfARecord(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	k := key("canary")
	kinds := func() (kinds []string) {
		t.Helper()
		events, err := b.operator.Timeline(t.Context(), k)
		if err != nil {
			t.Fatal(err)
		}
		for i, e := range events {
			kinds = append(kinds, string(e.Kind))
			if i > 0 && e.At.Before(events[i-1].At) {
				t.Errorf("%v comes after %v", e, events[i-1])
			}
			if !e.Attempt.IsZero() == (e.Kind == operator.EventRunning) || (e.Actor == "alice" && e.Reason == "ticket 7" && e.Role != "") != strings.HasPrefix(string(e.Kind), "act-") {
				t.Errorf("%+v", e)
			}
		}
		return kinds
	}
	want := func(want ...string) {
		t.Helper()
		if got := kinds(); strings.Join(got, " ") != strings.Join(want, " ") {
			t.Errorf("timeline is %v, want %v", got, want)
		}
	}
	want()
	finish := b.Running(t, k)
	want("running")
	finish()
	want("recorded", "expires")
	if _, err := b.operator.Expire(t.Context(), k, act); err != nil {
		t.Fatal(err)
	}
	want("recorded", "expired", "act-expire")
	if _, err := b.operator.Delete(t.Context(), k, act); err != nil {
		t.Fatal(err)
	}
	want("act-expire", "act-delete")
	b.do(t, k, 201)
	want("act-expire", "act-delete", "recorded", "expires")
	b.Exec(t, `INSERT INTO idempotency_audit (action, actor, reason, scope, key, attempt_id, status, record_created_at, record_expires_at)
		SELECT 'delete', 'alice', 'ticket 7', 'acme', 'many', gen_random_uuid(), 201, now(), now() FROM generate_series(1, $1)`, operator.EventsMax+1)
	k = key("many")
	if got := kinds(); len(got) != operator.EventsMax {
		t.Errorf("%d events, want %d", len(got), operator.EventsMax)
	}
	_, err := b.operator.Timeline(t.Context(), idempotency.Key{Value: "canary"})
	wantError(t, err, operator.ErrInvalid)
	if err := migrations.DownTo(t.Context(), b.Store, postgres.SchemaVersion, nil); err != nil {
		t.Fatal(err)
	}
	k = key("canary")
	want("recorded", "expires")
}

// The doctor's GRANTs, run unchanged, fix all findings of its check of rights.
func TestDoctorsGrantsAreEnough(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	o := b.role(t)
	granted := 0
	for range 2 { // without SELECT it reports only that
		for _, f := range o.Doctor(t.Context()) {
			if f.Check == "rights" && f.Level != operator.LevelOK {
				b.Exec(t, strings.TrimSuffix(f.Remedy, " (if it should)"))
				granted++
			}
		}
	}
	for _, f := range o.Doctor(t.Context()) {
		if f.Check == "rights" && f.Level != operator.LevelOK {
			t.Errorf("after the remedies: %+v", f)
		}
	}
	if granted != 5 {
		t.Errorf("%d remedies, want those of look, delete, expire, history and other sessions", granted)
	}
}

// The rights of the package's documentation suffice, and each is needed for the calls that the
// documentation names.
func TestLeastPrivilege(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	looks := []string{"SELECT ON idempotency_keys", "SELECT ON idempotency_audit", "SELECT ON idempotency_events", "SELECT ON idempotency_migrations"}
	full := append([]string{"DELETE ON idempotency_keys", "UPDATE (expires_at) ON idempotency_keys", "INSERT ON idempotency_audit", "DELETE ON idempotency_events", "pg_monitor"}, looks...)
	finish := b.Running(t, key("running"))
	defer finish()
	for _, name := range []string{"who looks", "an operator"} {
		b.do(t, key("canary"), 201)
		o := b.role(t, looks...)
		if name == "an operator" {
			o = b.role(t, full...)
		}
		ctx := context.Background()
		for what, do := range map[string]func() error{
			"get":      func() error { _, err := o.Get(ctx, key("canary")); return err },
			"body":     func() error { _, err := o.Body(ctx, key("canary")); return err },
			"list":     func() error { _, err := o.List(ctx, operator.Filter{}, operator.Page{}); return err },
			"recent":   func() error { _, err := o.Recent(ctx, 0); return err },
			"timeline": func() error { _, err := o.Timeline(ctx, key("canary")); return err },
			"stats":    func() error { _, err := o.Stats(ctx); return err },
			"version":  func() error { _, _, err := o.Version(ctx); return err },
		} {
			if err := do(); err != nil {
				t.Errorf("%s, %s: %v", name, what, err)
			}
		}
		state, err := o.Get(ctx, key("running"))
		if err != nil || state.Holder == nil || state.Holder.PID == 0 || (state.Holder.State != "") != (name == "an operator") {
			t.Errorf("%s sees of another session: %+v, %v", name, state.Holder, err)
		}
		for _, what := range []struct {
			name string
			do   func() error
		}{
			{"gc", func() error { _, err := o.GC(ctx, nil); return err }},
			{"expire", func() error { _, err := o.Expire(ctx, key("canary"), act); return err }},
			{"delete", func() error { _, err := o.Delete(ctx, key("canary"), act); return err }},
		} {
			err := what.do()
			if (err == nil) != (name == "an operator") || err != nil && !strings.Contains(err.Error(), "42501") {
				t.Errorf("%s, %s: %v", name, what.name, err)
			}
		}
	}
	if got := strings.Count(b.audits(t), ";"); got != 1 {
		t.Errorf("audit: %s", b.audits(t))
	}
}

// A statement that takes too long is cut off, and its error says so without naming the key.
func TestStatementsAreBounded(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.do(t, key("canary"), 201)
	// A new connection of the other pool would prepare statements, and wait for the lock.
	pool, err := pgxpool.New(t.Context(), b.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	o := operator.New(postgres.New(pool, nil), &operator.Options{StatementTimeout: 50 * time.Millisecond})
	tx, err := b.Pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.Background()) }()
	if _, err := tx.Exec(t.Context(), "LOCK TABLE idempotency_keys IN ACCESS EXCLUSIVE MODE"); err != nil {
		t.Fatal(err)
	}
	for what, do := range map[string]func() error{
		"get": func() error { _, err := o.Get(t.Context(), key("canary")); return err },
		"list": func() error {
			_, err := o.List(t.Context(), operator.Filter{Scope: "acme"}, operator.Page{})
			return err
		},
		"stats":  func() error { _, err := o.Stats(t.Context()); return err },
		"delete": func() error { _, err := o.Delete(t.Context(), key("canary"), act); return err },
	} {
		if err := do(); err == nil || !strings.Contains(err.Error(), "57014") || !strings.Contains(err.Error(), "took longer") {
			t.Errorf("%s: %v", what, err)
		} else {
			wantError(t, err, err)
		}
	}
}

func TestVersion(t *testing.T) {
	t.Parallel()
	b := testservice.On(t, pgtest.Database(t), nil)
	o := operator.New(b.Store, nil)
	want := func(version uint, dirty bool) {
		t.Helper()
		if got, gotDirty, err := o.Version(t.Context()); got != version || gotDirty != dirty || err != nil {
			t.Errorf("version %d, %t, %v; want %d, %t", got, gotDirty, err, version, dirty)
		}
	}
	want(0, false)
	if n := b.Count(t, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"); n != 0 {
		t.Errorf("it made %d tables", n)
	}
	if err := migrations.Up(t.Context(), b.Store, nil); err != nil {
		t.Fatal(err)
	}
	want(operator.SchemaVersion, false)
	b.Exec(t, "UPDATE idempotency_migrations SET dirty = true")
	want(operator.SchemaVersion, true)
	b.Exec(t, "DELETE FROM idempotency_migrations")
	want(0, false)
}

func TestOptionsThatCannotWorkPanic(t *testing.T) {
	t.Parallel()
	pool, err := pgxpool.New(t.Context(), "postgres://nobody@127.0.0.1:1/x")
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	for name, make := range map[string]func(){
		"no store":      func() { operator.New(nil, nil) },
		"statement":     func() { operator.New(postgres.New(pool, nil), &operator.Options{StatementTimeout: time.Microsecond}) },
		"call":          func() { operator.New(postgres.New(pool, nil), &operator.Options{CallTimeout: 5*time.Second - 1}) },
		"rows examined": func() { operator.New(postgres.New(pool, nil), &operator.Options{RowsExaminedMax: -1}) },
		"scan time":     func() { operator.New(postgres.New(pool, nil), &operator.Options{ScanTimeMax: -1}) },
	} {
		func() {
			defer func() {
				if text, _ := recover().(string); !strings.HasPrefix(text, "idempotency/") {
					t.Errorf("%s: panic %q", name, text)
				}
			}()
			make()
		}()
	}
}
