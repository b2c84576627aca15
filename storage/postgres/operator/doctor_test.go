package operator_test

import (
	"context"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
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
		// fsync is off on the tests' server.
		"nothing":       {"", "durability", operator.LevelFail, "fsync is off", nil},
		"no table":      {"DROP TABLE idempotency_keys", "schema", operator.LevelFail, "run the migrations", []string{"index", "rights", "attempts", "reaper", "vacuum", "bloat"}},
		"old":           {"UPDATE idempotency_migrations SET version = 1", "schema", operator.LevelFail, "version 1", nil},
		"without 3":     {"UPDATE idempotency_migrations SET version = 2", "schema", operator.LevelWarn, "services work", nil},
		"unlogged":      {"ALTER TABLE idempotency_keys SET UNLOGGED", "schema", operator.LevelFail, "SET LOGGED", nil},
		"no key":        {"ALTER TABLE idempotency_keys DROP CONSTRAINT idempotency_keys_pkey", "index", operator.LevelFail, "ADD CONSTRAINT idempotency_keys_pkey", []string{"schema"}},
		"no column":     {"ALTER TABLE idempotency_keys DROP COLUMN headers", "schema", operator.LevelFail, "no column headers", nil},
		"a rule":        {"CREATE RULE skip AS ON INSERT TO idempotency_keys DO INSTEAD NOTHING", "schema", operator.LevelFail, "DROP RULE skip", nil},
		"a trigger":     {noTrigger + "BEFORE INSERT ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION skip()", "schema", operator.LevelFail, "DISABLE TRIGGER skip", nil},
		"an AFTER one":  {noTrigger + "AFTER INSERT ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION skip()", "schema", operator.LevelWarn, "AFTER triggers run with each record: skip", nil},
		"no guard":      {"DROP TRIGGER idempotency_keys_delete_guard ON idempotency_keys", "schema", operator.LevelFail, "CREATE TRIGGER idempotency_keys_delete_guard", nil},
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
		"no relay":           {outboxRow + "now() - interval '3 minutes', NULL)", "outbox", operator.LevelWarn, "relay", nil},
		"a relay that comes": {outboxRow + "now() - interval '1 minute', NULL)", "outbox", operator.LevelOK, "1 messages wait", nil},
		"refused":            {outboxRow + "now(), 'canary')", "outbox", operator.LevelWarn, "idemctl message outbox", nil},
		"a dead letter":      {parkedRow + "now(), NULL, 3)", "consumers", operator.LevelWarn, "message parked --consumer mails --state dead", nil},
		"an old dead letter": {parkedRow + `now() - interval '8 days', NULL, 3);
			INSERT INTO idempotency_keys (created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)
			VALUES (now(), now() + interval '14 days', 204, 1, gen_random_uuid(), 'message:mails', 'canary', sha256('x'), '\x0100', '')`, "consumers", operator.LevelWarn, "records for 336h", nil},
		"no consumer of what is due": {parkedRow + "now(), now() - interval '11 minutes', 1)", "consumers", operator.LevelWarn, "run consumer mails", nil},
		"a consumer of what is due":  {parkedRow + "now(), now() - interval '9 minutes', 1)", "consumers", operator.LevelOK, "mails: 0 positions, 1 waiting", nil},
		"a batch that never ends":    {offsetsRow + "now() - interval '11 minutes', 1)", "consumers", operator.LevelWarn, "1 processes", nil},
		"a batch that may end":       {offsetsRow + "now() - interval '9 minutes', 1)", "consumers", operator.LevelOK, "mails: 1 positions", nil},
		"an unlogged outbox":         {"ALTER TABLE message_outbox SET UNLOGGED", "schema", operator.LevelFail, "SET LOGGED", nil},
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

const (
	outboxRow  = "INSERT INTO message_outbox (shard, message_id, topic, headers, body, created_at, refused) VALUES (3, gen_random_uuid(), 'canary', '', 'canary', "
	parkedRow  = "INSERT INTO message_parked (position, partition, attempts, consumer, message_id, source, topic, error, headers, body, parked_at, not_before, state) VALUES (0, 0, 1, 'mails', 'canary', 'canary', 'canary', 'canary', '', '', "
	offsetsRow = "INSERT INTO message_offsets (next_offset, incarnation, attempt_id, partition, consumer, source, updated_at, deaths) VALUES (0, gen_random_uuid(), gen_random_uuid(), 0, 'mails', 'transfers', "
)

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
	if granted != 7 {
		t.Errorf("%d remedies, want those of look, delete, expire, history, effects, messages and other sessions", granted)
	}
}

// An ALTER TABLE that waits behind a reader stops every request. The doctor names its process, and
// its remedy helps.
func TestDoctorFindsWhoKeepsRequestsFromTheTable(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		reads bool // a reader holds the table, and the ALTER TABLE waits for it
		says  string
	}{
		"waits": {true, "requests wait behind it"},
		"holds": {false, "requests wait for it"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := t.Context()
			b := setup(t, nil)
			// The other checks wait for the table too.
			o := operator.New(b.Store, &operator.Options{StatementTimeout: 500 * time.Millisecond})
			if worst, text := levels(o.Doctor(ctx)); worst["locks"] != operator.LevelOK {
				t.Errorf("before:\n%s", text)
			}
			reader, other := b.conn(t), b.conn(t)
			if test.reads {
				mustExec(t, reader, "BEGIN; LOCK TABLE idempotency_keys IN ACCESS SHARE MODE")
			}
			mustExec(t, other, "BEGIN")
			ended := make(chan error, 1)
			go func() {
				_, err := other.Exec(context.Background(), "ALTER TABLE idempotency_keys ADD COLUMN more text")
				ended <- err
			}()
			var finding operator.Finding
			for deadline := time.Now().Add(30 * time.Second); finding.Level != operator.LevelFail; {
				if time.Now().After(deadline) {
					t.Fatalf("it is not found: %+v", finding)
				}
				for _, f := range o.Doctor(ctx) {
					if f.Check == "locks" {
						finding = f
					}
				}
			}
			if !strings.Contains(finding.What, test.says) {
				t.Errorf("%+v", finding)
			}
			remedy := regexp.MustCompile(`SELECT pg_\w+\(\d+\)`).FindString(finding.Remedy)
			mustExec(t, b.conn(t), remedy)
			if err := <-ended; (err != nil) != test.reads {
				t.Errorf("ALTER TABLE: %v", err)
			}
			if got := b.do(t, key("k"), 201); got.Outcome != idempotency.OutcomeExecuted {
				t.Errorf("after %s a request is %s, %v", remedy, got.Outcome, got.Err)
			}
			if worst, text := levels(o.Doctor(ctx)); worst["locks"] != operator.LevelOK {
				t.Errorf("after %s:\n%s", remedy, text)
			}
		})
	}
}

func (b *testBundle) conn(t *testing.T) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), b.URL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

func mustExec(t *testing.T, conn *pgx.Conn, sql string) {
	t.Helper()
	if _, err := conn.Exec(t.Context(), sql); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// The tables' owner, who sees all rows, runs the doctor, which finds the service that does not.
func TestDoctorFindsTheRoleThatSeesNothing(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.Exec(t, "ALTER TABLE idempotency_keys ENABLE ROW LEVEL SECURITY")
	if worst, text := levels(b.operator.Doctor(t.Context())); worst["row-security"] != operator.LevelOK || !strings.Contains(text, "bypasses") {
		t.Errorf("without a role that it concerns:\n%s", text)
	}
	b.role(t, "SELECT, INSERT ON idempotency_keys")
	worst, text := levels(b.operator.Doctor(t.Context()))
	if worst["row-security"] != operator.LevelFail || !strings.Contains(text, "ALTER ROLE test_") {
		t.Errorf("with a service that sees nothing:\n%s", text)
	}
}
