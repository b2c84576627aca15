package postgres_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgserver"
	"github.com/paidonce/idempotency/storage/postgres"
)

// An INSERT that succeeds may have written no row, or another one than was sent. Without its record
// nothing is committed, and the error names the remedy. Once the table is repaired the same
// connections work again.
func TestRecordThatIsNotKeptIsNotExecuted(t *testing.T) {
	t.Parallel()
	trigger := func(body string) string {
		return "CREATE FUNCTION change() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN " + body +
			" END $$; CREATE TRIGGER change BEFORE INSERT ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION change()"
	}
	const dropTrigger, dropRule = "DROP TRIGGER change ON idempotency_keys", "DROP RULE change ON idempotency_keys"
	modes := map[string]func(*pgxpool.Config){
		"prepared": func(*pgxpool.Config) {},
		"as text":  func(c *pgxpool.Config) { c.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeExec },
	}
	for name, c := range map[string]struct{ sick, mend string }{
		"a trigger drops it":                 {trigger("RETURN NULL;"), dropTrigger},
		"a trigger drops some":               {trigger("IF octet_length(NEW.body) > 1 THEN RETURN NULL; END IF; RETURN NEW;"), dropTrigger},
		"a trigger changes its key":          {trigger("NEW.key = lower(NEW.key); RETURN NEW;"), dropTrigger},
		"a trigger changes its scope":        {trigger("NEW.scope = 'all'; RETURN NEW;"), dropTrigger},
		"a trigger changes its fingerprint":  {trigger("NEW.fingerprint = sha256('x'); RETURN NEW;"), dropTrigger},
		"a trigger changes its attempt":      {trigger("NEW.attempt_id = gen_random_uuid(); RETURN NEW;"), dropTrigger},
		"a trigger puts it into a child":     {"CREATE TABLE child () INHERITS (idempotency_keys); " + trigger("INSERT INTO public.child VALUES (NEW.*); RETURN NULL;"), dropTrigger},
		"a rule drops it":                    {"CREATE RULE change AS ON INSERT TO idempotency_keys DO INSTEAD NOTHING", dropRule},
		"a rule puts it into another table":  {"CREATE TABLE other (LIKE idempotency_keys); CREATE RULE change AS ON INSERT TO idempotency_keys DO INSTEAD INSERT INTO other VALUES (NEW.*)", dropRule},
		"a rule drops it under a condition":  {"CREATE RULE change AS ON INSERT TO idempotency_keys WHERE NEW.status >= 200 DO INSTEAD NOTHING", dropRule},
		"a rule that was there at the start": {"CREATE RULE change AS ON INSERT TO idempotency_keys DO INSTEAD NOTHING", dropRule},
	} {
		for mode, configure := range modes {
			t.Run(name+", "+mode, func(t *testing.T) {
				t.Parallel()
				b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) {
					c.MaxConns = 1
					configure(c)
				}})
				want(t, b.do(t, request("warm", ""), pay(t, 500)), idempotency.OutcomeNotExecuted, "")
				b.exec(t, c.sick)
				if strings.Contains(name, "at the start") {
					b.pool.Reset()
				}
				for _, status := range []int{201, 402, 201} {
					result := b.do(t, request(fmt.Sprint("KEY", status), ""), pay(t, status))
					want(t, result, idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
					if result.Err == nil || !strings.Contains(result.Err.Error(), "idemctl doctor") {
						t.Errorf("%d: %v names no remedy", status, result.Err)
					}
				}
				// Without a key nothing is recorded, and nothing can be missing.
				want(t, b.do(t, request("", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
				if effects, records := b.effects(t), b.count(t, "SELECT count(*) FROM idempotency_keys"); effects != 1 || records != 0 {
					t.Errorf("%d effects and %d records, want one and none", effects, records)
				}
				b.exec(t, c.mend)
				for _, status := range []int{201, 402} {
					for _, outcome := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed, idempotency.OutcomeReplayed} {
						want(t, b.do(t, request(fmt.Sprint("KEY", status), ""), pay(t, status)), outcome, "")
					}
				}
				if effects, records := b.effects(t), b.count(t, "SELECT count(*) FROM idempotency_keys"); effects != 2 || records != 2 {
					t.Errorf("%d effects and %d records once it was mended, want two of each", effects, records)
				}
			})
		}
	}
}

// A request is answered executed only when its commit is on the disk. A trigger that is deferred to
// COMMIT can't change that.
func TestDeferredTriggerDoesNotLoosenTheCommit(t *testing.T) {
	t.Parallel()
	server, err := pgserver.Start(t.Context(), &pgserver.Options{Settings: map[string]string{
		"fsync": "off", "wal_writer_delay": "10s", "autovacuum": "off", "checkpoint_timeout": "1h", "bgwriter_lru_maxpages": "0",
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Stop() })
	b := setup(t, &setupOptions{database: server.URL()})
	unflushed := func() int { return b.count(t, "SELECT pg_current_wal_insert_lsn() - pg_current_wal_flush_lsn()") }
	b.exec(t, `CREATE FUNCTION loosen() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM set_config('synchronous_commit', 'off', true); RETURN NULL; END $$;
		CREATE CONSTRAINT TRIGGER loosen AFTER INSERT ON effects DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION loosen()`)
	for _, key := range []string{"a", "", "b", "", "c"} {
		want(t, b.do(t, request(key, ""), func(ctx context.Context, tx pgx.Tx) int {
			if _, err := tx.Exec(ctx, "SET LOCAL synchronous_commit = off"); err != nil {
				t.Error(err)
			}
			effect(ctx, t)
			return 201
		}), idempotency.OutcomeExecuted, "")
		if n := unflushed(); n >= 64 {
			t.Errorf("key %q: %d B of WAL are not on the disk when executed is told", key, n)
		}
	}
}

// A deferred trigger runs before the record. If it changes client_encoding, the server would read
// another scope from the same bytes, and the retry would pay again.
func TestDeferredTriggerDoesNotMoveTheRecord(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.exec(t, `CREATE FUNCTION move() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM set_config('client_encoding', 'LATIN1', true); RETURN NULL; END $$;
		CREATE CONSTRAINT TRIGGER move AFTER INSERT ON effects DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION move()`)
	req := request("k", "")
	req.Key.Scope = "Zo\u00eb"
	for range 2 {
		want(t, b.do(t, req, pay(t, 201)), idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
	}
	if n := b.effects(t); n != 0 {
		t.Errorf("paid %d times", n)
	}
}

// If a COMMIT's wait for the standbys is canceled, a warning is the only sign. A deferred trigger
// can't hide it.
func TestF20DeferredTriggerDoesNotHideTheWarning(t *testing.T) {
	t.Parallel()
	config := configOfOwnServer(t)
	b := setup(t, &setupOptions{database: config.ConnString()})
	b.exec(t, `CREATE FUNCTION hush() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM set_config('client_min_messages', 'error', true); RETURN NULL; END $$;
		CREATE CONSTRAINT TRIGGER hush AFTER INSERT ON effects DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION hush()`)
	setStandbys(t, b.pool, "nobody")
	defer setStandbys(t, b.pool, "")
	engine := idempotency.NewEngine(b.store, &idempotency.Options{Timeouts: idempotency.Timeouts{Resolve: 10 * time.Millisecond}})
	for _, key := range []string{"k", ""} {
		done := make(chan idempotency.Result, 1)
		go func() {
			done <- engine.Do(context.Background(), request(key, ""), func(ctx context.Context) (*idempotency.Answer, error) {
				effect(ctx, t)
				return answer(201), nil
			})
		}()
		cancelWaiting(t, b.pool)
		want(t, <-done, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
	}
}

// Constraints and triggers that were deferred to COMMIT run before it, and fail the request as they
// would inside it. A decline has undone them by then.
func TestDeferredErrorsMeanWhatTheyMeanAtCommit(t *testing.T) {
	t.Parallel()
	for state, reason := range map[string]idempotency.Reason{
		"23503": idempotency.ReasonHandlerFailed, "P0001": idempotency.ReasonHandlerFailed, "25006": idempotency.ReasonHandlerFailed, "42501": idempotency.ReasonHandlerFailed,
		"0A000": idempotency.ReasonHandlerFailed, "22012": idempotency.ReasonHandlerFailed,
		"40001": idempotency.ReasonUnavailable, "53100": idempotency.ReasonUnavailable, "57014": idempotency.ReasonUnavailable, "08006": idempotency.ReasonUnavailable,
	} {
		t.Run(state, func(t *testing.T) {
			t.Parallel()
			b := setup(t, nil)
			b.exec(t, `CREATE FUNCTION fault() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE SQLSTATE '`+state+`'; END $$;
				CREATE CONSTRAINT TRIGGER fault AFTER INSERT ON effects DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fault()`)
			for _, key := range []string{"k", ""} {
				result := b.do(t, request(key, ""), pay(t, 201))
				// It proves nothing, and there is no record to look for.
				if key == "" && state == "08006" {
					want(t, result, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
					continue
				}
				want(t, result, idempotency.OutcomeNotExecuted, reason)
				if result.Err == nil || strings.Contains(result.Err.Error(), "doctor") || strings.Contains(result.Err.Error(), "GRANT") {
					t.Errorf("the trigger's error is taken for the record's: %v", result.Err)
				}
			}
			want(t, b.do(t, request("declined", ""), pay(t, 402)), idempotency.OutcomeExecuted, "")
			if n := b.effects(t); n != 0 {
				t.Errorf("%d effects", n)
			}
		})
	}
}

// If the transaction is not the claim's, the outcome stays unknown, even if one of its deferred
// triggers fails: the first transaction may have committed.
func TestLostTransactionWithAFailingConstraintIsUnknown(t *testing.T) {
	t.Parallel()
	for _, key := range []string{"k", ""} {
		b := setup(t, nil)
		b.exec(t, `CREATE FUNCTION fault() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$;
			CREATE CONSTRAINT TRIGGER fault AFTER INSERT ON effects DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (NEW.name = 'bad') EXECUTE FUNCTION fault()`)
		want(t, b.do(t, request(key, ""), func(ctx context.Context, tx pgx.Tx) int {
			effect(ctx, t)
			if _, err := postgres.RawConn(tx).Exec(ctx, "COMMIT; BEGIN; INSERT INTO effects (name) VALUES ('bad')"); err != nil {
				t.Error(err)
			}
			return 201
		}), idempotency.OutcomeUnknown, idempotency.ReasonTransactionLost)
		if n := b.effects(t); n != 1 {
			t.Errorf("%d effects, want the first one", n)
		}
	}
}

// syncs counts the Sync messages that a connection sends.
type syncs struct {
	net.Conn
	sent *atomic.Int64
}

func (c syncs) Write(p []byte) (int, error) {
	for rest := p; len(rest) >= 5; rest = rest[min(len(rest), 1+int(binary.BigEndian.Uint32(rest[1:]))):] {
		if rest[0] == 'S' {
			c.sent.Add(1)
		}
	}
	return c.Conn.Write(p)
}

// A record that may arrive in part is sent after a Sync, so that PostgreSQL's timeout runs while it
// waits for the rest. Nothing else changes: an error before the Sync fails the record after it,
// whatever transaction is open.
func TestLongRecordIsSentBehindASync(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ bytes, syncs int }{{postgres.TogetherBytesMax, 1}, {postgres.TogetherBytesMax + 1, 2}, {1 << 20, 2}} {
		t.Run(fmt.Sprint(c.bytes), func(t *testing.T) {
			t.Parallel()
			sent := new(atomic.Int64)
			b := setup(t, &setupOptions{configure: func(config *pgxpool.Config) {
				dial := config.ConnConfig.DialFunc
				config.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
					conn, err := dial(ctx, network, address)
					return syncs{conn, sent}, err
				}
			}})
			b.exec(t, `CREATE FUNCTION fault() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$;
				CREATE CONSTRAINT TRIGGER fault AFTER INSERT ON effects DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (NEW.name = 'bad') EXECUTE FUNCTION fault()`)
			engine := idempotency.NewEngine(b.store, nil)
			do := func(key string, handler func(ctx context.Context)) idempotency.Result {
				return engine.Do(context.Background(), request(key, ""), func(ctx context.Context) (*idempotency.Answer, error) {
					handler(ctx)
					sent.Store(0)
					const headers = 2 // without one: version and count
					return &idempotency.Answer{Status: 201, Body: bytes.Repeat([]byte("x"), c.bytes-headers)}, nil
				})
			}
			want(t, do("k", func(ctx context.Context) { effect(ctx, t) }), idempotency.OutcomeExecuted, "")
			if n := int(sent.Load()); n != c.syncs {
				t.Errorf("%d Syncs, want %d", n, c.syncs)
			}
			if again := do("k", func(context.Context) { t.Error("it ran again") }); again.Outcome != idempotency.OutcomeReplayed || len(again.Answer.Body) != c.bytes-2 {
				t.Errorf("%s: %v", again.Outcome, again.Err)
			}
			want(t, do("deferred", func(ctx context.Context) {
				if _, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO effects (name) VALUES ('bad')"); err != nil {
					t.Error(err)
				}
			}), idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
			for _, sql := range []string{"COMMIT", "COMMIT; BEGIN", "COMMIT; BEGIN; INSERT INTO effects (name) VALUES ('bad')"} {
				want(t, do(fmt.Sprint("lost", len(sql)), func(ctx context.Context) {
					if _, err := postgres.RawConn(postgres.Tx(ctx)).Exec(ctx, sql); err != nil {
						t.Error(err)
					}
				}), idempotency.OutcomeUnknown, idempotency.ReasonTransactionLost)
			}
			if effects, records := b.effects(t), b.count(t, "SELECT count(*) FROM idempotency_keys"); effects != 1 || records != 1 {
				t.Errorf("%d effects and %d records, want one of each", effects, records)
			}
		})
	}
}

// If a handler takes another role, or makes its transaction read-only, PostgreSQL refuses the
// record. That is a failure of the handler, not an outage, and the log names the remedy.
func TestHandlerThatForbidsTheRecordFails(t *testing.T) {
	t.Parallel()
	role := "tenant_" + strings.ToLower(idempotency.NewAttemptID().String()[:8])
	for name, c := range map[string]struct {
		sql    []string
		says   string // empty: it is executed
		writes bool   // it may still write
	}{
		"a role":                     {[]string{"SET LOCAL ROLE " + role}, "RESET ROLE", true},
		"a role, and back":           {[]string{"SET LOCAL ROLE " + role, "INSERT INTO effects (name) VALUES ('x')", "RESET ROLE"}, "", true},
		"READ ONLY":                  {[]string{"SET TRANSACTION READ ONLY"}, "read-only", false},
		"transaction_read_only":      {[]string{"SET LOCAL transaction_read_only = on"}, "read-only", false},
		"READ ONLY after its writes": {[]string{"INSERT INTO effects (name) VALUES ('x')", "SET TRANSACTION READ ONLY"}, "read-only", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, nil)
			b.exec(t, "DO $$ BEGIN CREATE ROLE "+role+"; EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END $$")
			b.exec(t, "GRANT INSERT ON effects TO "+role+"; GRANT USAGE ON SEQUENCE effects_id_seq TO "+role)
			// The role itself is removed with the server.
			t.Cleanup(func() { b.exec(t, "DROP OWNED BY "+role) })
			run := func(key string, status int, write bool) idempotency.Result {
				return b.do(t, request(key, ""), func(ctx context.Context, tx pgx.Tx) int {
					for _, sql := range c.sql {
						if _, err := tx.Exec(ctx, sql); err != nil {
							t.Error(err)
						}
					}
					if _, err := tx.Exec(ctx, "INSERT INTO effects (name) VALUES ('x')"); write && (err == nil) != c.writes {
						t.Errorf("a write after it: %v", err)
					}
					return status
				})
			}
			quiet := func(key string, status int) idempotency.Result {
				return b.do(t, request(key, ""), func(ctx context.Context, tx pgx.Tx) int {
					for _, sql := range c.sql {
						if _, err := tx.Exec(ctx, sql); err != nil {
							t.Error(err)
						}
					}
					return status
				})
			}
			for _, result := range []idempotency.Result{run("k", 201, true), quiet("k", 201)} {
				if c.says == "" {
					if result.Outcome != idempotency.OutcomeExecuted && result.Outcome != idempotency.OutcomeReplayed {
						t.Errorf("%s: %v", result.Outcome, result.Err)
					}
					continue
				}
				want(t, result, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
				if result.Err == nil || !strings.Contains(result.Err.Error(), c.says) {
					t.Errorf("%v does not say %q", result.Err, c.says)
				}
			}
			// A decline begins a new transaction, and a request without a key writes no record that
			// could be refused.
			want(t, quiet("declined", 402), idempotency.OutcomeExecuted, "")
			want(t, quiet("", 201), idempotency.OutcomeExecuted, "")
		})
	}
}

// NOTIFY belongs to the transaction: it is sent with a 201, and not after a rollback or on a
// replay. LISTEN belongs to the session, and is refused.
func TestNotifyIsOfTheTransactionAndListenIsRefused(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	b := setup(t, nil)
	listener, err := pgx.ConnectConfig(ctx, b.pool.Config().ConnConfig.Copy())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close(ctx) }()
	if _, err := listener.Exec(ctx, "LISTEN paid"); err != nil {
		t.Fatal(err)
	}
	for _, status := range []int{402, 503, 201, 201} {
		b.do(t, request(fmt.Sprint(status), ""), func(ctx context.Context, tx pgx.Tx) int {
			if _, err := tx.Exec(ctx, "LISTEN paid"); err == nil || !strings.Contains(err.Error(), "LISTEN is refused") {
				t.Errorf("LISTEN: %v", err)
			}
			if _, err := tx.Exec(ctx, "SELECT pg_notify('paid', $1)", fmt.Sprint(status)); err != nil {
				t.Error(err)
			}
			return status
		})
	}
	if _, err := b.pool.Exec(ctx, "NOTIFY paid, 'last'"); err != nil {
		t.Fatal(err)
	}
	var told []string
	for len(told) == 0 || told[len(told)-1] != "last" {
		n, err := listener.WaitForNotification(ctx)
		if err != nil {
			t.Fatal(err)
		}
		told = append(told, n.Payload)
	}
	if got := fmt.Sprint(told); got != "[201 last]" {
		t.Errorf("told %s", got)
	}
}

// COMMIT runs the query of a cursor WITH HOLD after the record, so the query could change the
// settings of that COMMIT.
func TestCursorThatOutlivesTheTransactionIsRefused(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	want(t, b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
		if _, err := tx.Exec(ctx, "DECLARE c CURSOR WITH HOLD FOR SELECT set_config('synchronous_commit', 'off', true)"); err == nil || !strings.Contains(err.Error(), "WITH HOLD is refused") {
			t.Errorf("WITH HOLD: %v", err)
		}
		for _, sql := range []string{"DECLARE c CURSOR FOR SELECT 1", "FETCH ALL FROM c"} {
			if _, err := tx.Exec(ctx, sql); err != nil {
				t.Error(err)
			}
		}
		return 201
	}), idempotency.OutcomeExecuted, "")
}

// A migration makes plans stale on every connection of a pool. PostgreSQL reports that before it
// executes anything, so the request starts again, on a connection with new plans.
func TestPlanThatAMigrationMadeStaleStartsAgain(t *testing.T) {
	t.Parallel()
	const conns = 4
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns, c.MinConns = conns, conns }})
	runs := make(chan struct{}, 100)
	round := func(name string, status int) {
		// In the first runs all hold a connection at once, and in the second runs again: otherwise
		// a quick request would leave its new connection to a slow one.
		var arrived [2]atomic.Int64
		together := [2]chan struct{}{make(chan struct{}), make(chan struct{})}
		var group sync.WaitGroup
		for i := range conns {
			group.Go(func() {
				run := 0
				want(t, b.do(t, request(fmt.Sprint(name, i), ""), func(ctx context.Context, tx pgx.Tx) int {
					runs <- struct{}{}
					if run < len(together) {
						if arrived[run].Add(1) == conns {
							close(together[run])
						}
						select {
						case <-together[run]:
						case <-ctx.Done():
							t.Errorf("%d requests came to run %d", arrived[run].Load(), run+1)
						}
					}
					run++
					rows, err := tx.Query(ctx, "SELECT * FROM effects WHERE id = $1", int64(1))
					if err == nil {
						_, err = pgx.CollectRows(rows, pgx.RowToMap)
					}
					if err != nil {
						return 500
					}
					effect(ctx, t)
					return status
				}), idempotency.OutcomeExecuted, "")
			})
		}
		group.Wait()
	}
	round("warm", 201)
	b.exec(t, "ALTER TABLE effects ADD COLUMN added text")
	made := b.pool.Stat().NewConnsCount()
	round("commit", 201)
	if n := b.pool.Stat().NewConnsCount() - made; n < conns {
		t.Errorf("%d of %d connections with a stale plan were replaced", n, conns)
	}
	b.exec(t, "ALTER TABLE effects ADD COLUMN more text")
	round("decline", 402)
	if n := b.effects(t); n != 2*conns {
		t.Errorf("%d effects, want %d", n, 2*conns)
	}
	if n := len(runs); n != 5*conns {
		t.Errorf("%d runs, want %d", n, 5*conns)
	}
}

// 0A000 stands for many unsupported features. A second run would not support them either.
func TestWhatIsNotSupportedIsTriedOnce(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	runs := 0
	want(t, b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
		runs++
		_, _ = tx.Exec(ctx, "DO $$ BEGIN RAISE SQLSTATE '0A000' USING MESSAGE = 'cached plan must not change result type'; END $$")
		return 201
	}), idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
	if runs != 1 {
		t.Errorf("%d runs, want 1", runs)
	}
}

// The service may have a trigger that copies records into a table with the same names. Its errors
// mean neither a lost race nor a lost transaction.
func TestErrorOfATriggersOwnTableIsNotOurs(t *testing.T) {
	t.Parallel()
	for name, archive := range map[string]string{
		"its primary key": "(scope text, key text, CONSTRAINT idempotency_keys_pkey PRIMARY KEY (scope, key)); INSERT INTO archive.idempotency_keys VALUES ('acme', 'k')",
		"its column":      "(scope text, key text, created_at timestamptz NOT NULL)",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, nil)
			b.exec(t, "CREATE SCHEMA archive; CREATE TABLE archive.idempotency_keys "+archive+`;
				CREATE FUNCTION archive() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO archive.idempotency_keys (scope, key) VALUES (NEW.scope, NEW.key); RETURN NULL; END $$;
				CREATE TRIGGER archive AFTER INSERT ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION archive()`)
			runs := 0
			want(t, b.do(t, request("k", ""), func(ctx context.Context, _ pgx.Tx) int {
				runs++
				effect(ctx, t)
				return 201
			}), idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
			if runs != 1 || b.effects(t) != 0 {
				t.Errorf("%d runs and %d effects, want 1 and none", runs, b.effects(t))
			}
		})
	}
}
