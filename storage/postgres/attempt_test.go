package postgres_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/deadline"
	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/internal/pgserver"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/storage/postgres"
)

// With another client_encoding the server reads another scope from the same bytes: the look-up
// misses, the primary key does not conflict, and the handler pays again.
func TestHandlersEncodingCannotHideTheRecord(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	req := request("k", "")
	req.Key.Scope = "café"
	set := func(sql string) func(context.Context, pgx.Tx) int {
		return func(ctx context.Context, tx pgx.Tx) int {
			effect(ctx, t)
			if _, err := tx.Exec(ctx, sql); err != nil {
				t.Error(err)
			}
			return 201
		}
	}
	t.Run("of this transaction", func(t *testing.T) {
		t.Parallel()
		b := setup(t, nil)
		want(t, b.do(t, req, set("SET LOCAL client_encoding = 'LATIN1'")), idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
		want(t, b.do(t, req, pay(t, 201)), idempotency.OutcomeExecuted, "")
		want(t, b.do(t, req, pay(t, 201)), idempotency.OutcomeReplayed, "")
		if n := b.effects(t); n != 1 {
			t.Errorf("%d effects, want 1", n)
		}
	})
	t.Run("left on a connection", func(t *testing.T) {
		t.Parallel()
		b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns = 2 }})
		if _, err := b.pool.Exec(ctx, "SET client_encoding = 'LATIN1'"); err != nil {
			t.Fatal(err)
		}
		want(t, b.do(t, req, pay(t, 201)), idempotency.OutcomeExecuted, "")
		busy, err := b.pool.Acquire(ctx) // the one that was just used: the retry gets another
		if err != nil {
			t.Fatal(err)
		}
		defer busy.Release()
		want(t, b.do(t, req, pay(t, 201)), idempotency.OutcomeReplayed, "")
		if n := b.effects(t); n != 1 {
			t.Errorf("%d effects, want 1", n)
		}
	})
}

// However a transaction was ended and another one begun, the request is never reported as not
// executed: some step in between always notices.
func TestTransactionThatWasBegunAnewIsUnknown(t *testing.T) {
	t.Parallel()
	for _, status := range []int{201, 402, 500} {
		for _, aborted := range []bool{false, true} {
			t.Run(fmt.Sprint(status, " aborted ", aborted), func(t *testing.T) {
				t.Parallel()
				b := setup(t, nil)
				prepareEnd(t, b)
				result := b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
					effect(ctx, t)
					for _, sql := range []string{"DO $$ BEGIN EXECUTE 'EXECUTE ended'; END $$", "DO $$ BEGIN EXECUTE 'EXECUTE begun'; END $$"} {
						if _, err := tx.Exec(ctx, sql); err != nil {
							t.Error(err)
						}
					}
					if aborted {
						_, _ = tx.Exec(ctx, "SELECT 1/0")
					}
					return status
				})
				want(t, result, idempotency.OutcomeUnknown, idempotency.ReasonTransactionLost)
				if n := b.count(t, "SELECT count(*) FROM idempotency_keys"); n != 0 {
					t.Errorf("%d records, want none", n)
				}
			})
		}
	}
}

// prepareEnd prepares COMMIT and BEGIN on the pool's only connection, as a service's own hook
// might.
func prepareEnd(t *testing.T, b *testBundle) {
	t.Helper()
	ctx := context.Background()
	conns := b.pool.AcquireAllIdle(ctx)
	if len(conns) == 0 {
		conn, err := b.pool.Acquire(ctx)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	for _, conn := range conns {
		for name, sql := range map[string]string{"ended": "COMMIT", "begun": "BEGIN"} {
			if _, err := conn.Conn().PgConn().Prepare(ctx, name, sql, nil); err != nil {
				t.Fatal(err)
			}
		}
		conn.Release()
	}
}

// The engine's contexts end only by time, so the socket's deadline ends their exchanges. After that
// time a connection must be as good as before.
func TestExchangeLeavesNoDeadlineOnItsConnection(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns = 1 }})
	ctx := context.Background()
	begun := deadline.After(ctx, 300*time.Millisecond)
	attempt, _, err := b.store.Begin(begun, claimOf(request("k", "")))
	if err != nil {
		t.Fatal(err)
	}
	<-begun.Done()
	effect(attempt.Context(ctx), t)
	if err := attempt.Seal(); err != nil {
		t.Errorf("the handler's statement outlived the time for the claim, and the attempt did not: %v", err)
	}
	ended := deadline.After(ctx, 300*time.Millisecond)
	if err := attempt.Commit(ended, answer(201)); err != nil {
		t.Error(err)
	}
	<-ended.Done()
	if n := b.effects(t); n != 1 { // on the pool's only connection
		t.Errorf("%d effects, want 1", n)
	}
	if stat := b.pool.Stat(); stat.NewConnsCount() != 1 {
		t.Errorf("%d connections were made, want 1", stat.NewConnsCount())
	}
}

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
		// All requests hold a connection at once in their first runs, and again in their second
		// runs. Otherwise a quick request would leave its new connection to a slow one.
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

// If a trigger or a deferred constraint of the service raises an error under our INSERT or COMMIT,
// the error is its own: it fails the handler, and is taken neither for a lost race nor for a lost
// transaction.
func TestErrorsOfTheServiceAtTheEndAreTheHandlersFailure(t *testing.T) {
	t.Parallel()
	for name, sql := range map[string]string{
		"23505 of a trigger": `
			CREATE TABLE audit (name text CONSTRAINT audit_name_key UNIQUE);
			CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.audit VALUES ('a'), ('a'); RETURN NULL; END $$;
			CREATE TRIGGER audit AFTER INSERT ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION audit()`,
		"23502 of a trigger": `
			CREATE TABLE audit (name text NOT NULL);
			CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.audit VALUES (NULL); RETURN NULL; END $$;
			CREATE TRIGGER audit AFTER INSERT ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION audit()`,
		"23505 at COMMIT by a constraint of our name": `
			CREATE SCHEMA other; CREATE TABLE other.names (name text, CONSTRAINT idempotency_keys_pkey UNIQUE (name) DEFERRABLE INITIALLY DEFERRED);
			CREATE FUNCTION twice() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO other.names VALUES ('a'), ('a'); RETURN NULL; END $$;
			CREATE TRIGGER twice AFTER INSERT ON effects FOR EACH ROW EXECUTE FUNCTION twice()`,
		"22012 at COMMIT": `
			CREATE FUNCTION fault() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM 1/0; RETURN NULL; END $$;
			CREATE CONSTRAINT TRIGGER fault AFTER INSERT ON effects DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fault()`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, nil)
			if _, err := b.pool.Exec(context.Background(), sql); err != nil {
				t.Fatal(err)
			}
			runs := 0
			result := b.do(t, request("k", ""), func(ctx context.Context, _ pgx.Tx) int {
				runs++
				effect(ctx, t)
				return 201
			})
			want(t, result, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
			if n := b.effects(t); runs != 1 || n != 0 {
				t.Errorf("%d runs and %d effects, want 1 and none", runs, n)
			}
		})
	}
}

// While the answer of a decline is recorded the key is held: a duplicate gets in-progress, and does
// not run.
func TestDeclineHoldsTheKeyWhileItRecords(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	ctx := context.Background()
	if _, err := b.pool.Exec(ctx, `
		CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NEW; END $$;
		CREATE TRIGGER wait BEFORE INSERT ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION wait()`); err != nil {
		t.Fatal(err)
	}
	gate, err := b.pool.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := gate.Exec(ctx, "SELECT pg_advisory_xact_lock(1)"); err != nil {
		t.Fatal(err)
	}
	done := make(chan idempotency.Result)
	go func() { done <- b.do(t, request("k", ""), pay(t, 402)) }()
	for b.count(t, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'") == 0 {
		time.Sleep(time.Millisecond)
	}
	want(t, b.do(t, request("k", ""), func(context.Context, pgx.Tx) int {
		t.Error("the handler ran while the decline was recorded")
		return 500
	}), idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
	if err := gate.Rollback(ctx); err != nil {
		t.Fatal(err)
	}
	want(t, <-done, idempotency.OutcomeExecuted, "")
}

// COMMIT of an aborted transaction answers ROLLBACK without an error: only the tag COMMIT counts as
// one.
func TestCommitIsReadFromItsTag(t *testing.T) {
	t.Parallel()
	var armed atomic.Bool
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) {
		dial := c.ConnConfig.DialFunc
		c.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dial(ctx, network, address)
			return &otherTag{Conn: conn, armed: &armed}, err
		}
	}})
	want(t, b.do(t, request("warm", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	result := b.do(t, request("k", ""), func(context.Context, pgx.Tx) int {
		armed.Store(true)
		return 201
	})
	want(t, result, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
}

// otherTag replaces the tag of the server's reply to COMMIT by another one of the same length.
type otherTag struct {
	net.Conn
	armed *atomic.Bool
}

func (c *otherTag) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.armed.Load() {
		copy(p, bytes.Replace(p[:n], []byte("C\x00\x00\x00\x0bCOMMIT\x00"), []byte("C\x00\x00\x00\x0bABORTS\x00"), 1))
	}
	return n, err
}

// A COMMIT that was never sent is a definite abort, and never unknown.
func TestCommitThatWasNeverSentIsUnavailable(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(ctx context.Context, conn *pgx.Conn) context.Context{
		"closed": func(ctx context.Context, conn *pgx.Conn) context.Context {
			_ = conn.Close(ctx)
			return ctx
		},
		"busy": func(ctx context.Context, conn *pgx.Conn) context.Context {
			_, _ = conn.Query(ctx, "SELECT generate_series(1, 100000)")
			return ctx
		},
		"late": func(ctx context.Context, _ *pgx.Conn) context.Context {
			ctx, cancel := context.WithCancel(ctx)
			cancel()
			return ctx
		},
	} {
		for step, end := range map[string]func(idempotency.Attempt, context.Context, *idempotency.Answer) error{
			"commit": idempotency.Attempt.Commit, "decline": idempotency.Attempt.Decline,
		} {
			t.Run(name+" "+step, func(t *testing.T) {
				t.Parallel()
				b := setup(t, nil)
				attempt, _, err := b.store.Begin(context.Background(), claimOf(request("k", "")))
				if err != nil {
					t.Fatal(err)
				}
				ctx := spoil(context.Background(), postgres.RawConnOf(attempt))
				if err := end(attempt, ctx, answer(201)); !errors.Is(err, idempotency.ErrUnavailable) || errors.Is(err, idempotency.ErrUnknown) {
					t.Errorf("got %v, want ErrUnavailable", err)
				}
				if n := b.count(t, "SELECT count(*) FROM idempotency_keys"); n != 0 {
					t.Errorf("%d records, want none", n)
				}
				if n := b.pool.Stat().AcquiredConns(); n != 0 {
					t.Errorf("%d connections were not given back", n)
				}
			})
		}
	}
}

// The seal notices an aborted transaction even if no error was seen on the way.
func TestSealSeesAnAbortedTransaction(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	ctx := context.Background()
	attempt, _, err := b.store.Begin(ctx, claimOf(request("k", "")))
	if err != nil {
		t.Fatal(err)
	}
	defer attempt.Rollback(ctx)
	if _, err := postgres.RawConnOf(attempt).Exec(ctx, "SELECT 1/0"); err == nil {
		t.Error("no error")
	}
	if err := attempt.Seal(); !errors.Is(err, idempotency.ErrAborted) {
		t.Errorf("got %v, want ErrAborted", err)
	}
}

// If the connection is gone, unavailable replaces the handler's answer, whatever it is.
func TestAnswerOverADeadConnectionIsUnavailable(t *testing.T) {
	t.Parallel()
	for _, status := range []int{201, 402, 500} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			t.Parallel()
			b := setup(t, nil)
			result := b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
				effect(ctx, t)
				short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
				defer cancel()
				if _, err := tx.Exec(short, "SELECT pg_sleep(5)"); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("got %v", err)
				}
				return status
			})
			want(t, result, idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
		})
	}
}

// A goroutine that nothing wakes keeps its connection: neither the attempt nor the pool ever gets
// it.
func TestGoroutineThatNothingWakesKeepsItsConnection(t *testing.T) {
	t.Parallel()
	for _, status := range []int{201, 402, 500} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			t.Parallel()
			b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns = 1 }})
			entered, release, done := make(chan struct{}), make(chan struct{}), make(chan struct{})
			b.do(t, request("k", ""), func(_ context.Context, tx pgx.Tx) int {
				go func() {
					defer close(done)
					batch := &pgx.Batch{}
					batch.Queue("SELECT 1").QueryRow(func(pgx.Row) error {
						close(entered)
						<-release
						return nil
					})
					for range 50 { // its later use of the connection is not seen
						batch.Queue("SELECT 1")
					}
					_ = tx.SendBatch(context.Background(), batch).Close()
				}()
				<-entered
				// Not by this goroutine, which would order its steps before ours for the race
				// detector.
				time.AfterFunc(postgres.AbandonTimeout+300*time.Millisecond, func() { close(release) })
				return status
			})
			if n := b.pool.Stat().TotalConns(); n != 0 {
				t.Errorf("%d connections in the pool, want none", n)
			}
			want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
			<-done
		})
	}
}

// A wait for a lock that was too long is remembered from every path, including those that parse
// before they send.
func TestLockTimeoutIsRememberedFromEveryPath(t *testing.T) {
	t.Parallel()
	const sql = "INSERT INTO effects (name) VALUES ($1)"
	ctx := context.Background()
	for name, swallow := range map[string]func(tx pgx.Tx){
		"copy": func(tx pgx.Tx) {
			_, _ = tx.CopyFrom(ctx, pgx.Identifier{"effects"}, []string{"name"}, pgx.CopyFromRows([][]any{{"a"}}))
		},
		"prepare": func(tx pgx.Tx) { _, _ = tx.Prepare(ctx, "p", sql) },
		"exec":    func(tx pgx.Tx) { _, _ = tx.Exec(ctx, sql, "a") },
		"query":   func(tx pgx.Tx) { _, _ = tx.Query(ctx, sql, "a") },
		"batch": func(tx pgx.Tx) {
			batch := &pgx.Batch{}
			batch.Queue(sql, "a")
			_, _ = tx.SendBatch(ctx, batch).Exec()
		},
		"batch query": func(tx pgx.Tx) {
			batch := &pgx.Batch{}
			batch.Queue(sql, "a")
			_, _ = tx.SendBatch(ctx, batch).Query()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, &setupOptions{store: &postgres.Options{LockTimeout: 50 * time.Millisecond}})
			holder, err := b.pool.Begin(ctx)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = holder.Rollback(ctx) }()
			if _, err := holder.Exec(ctx, "LOCK TABLE effects"); err != nil {
				t.Fatal(err)
			}
			result := b.do(t, request("k", ""), func(_ context.Context, tx pgx.Tx) int {
				swallow(tx)
				return 201
			})
			want(t, result, idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
		})
	}
}

// A transaction that the handler aborted costs no connection: it is rolled back, and the connection
// is used again.
func TestConnectionOfAnAbortedTransactionIsKept(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns = 1 }})
	want(t, b.do(t, request("warm", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	before := b.pool.Stat().NewConnsCount()
	for i, status := range []int{201, 402, 500} {
		b.do(t, request(fmt.Sprint(i), ""), func(ctx context.Context, tx pgx.Tx) int {
			if _, err := tx.Exec(ctx, "SELECT 1/0"); err == nil {
				t.Error("no error")
			}
			return status
		})
	}
	if n := b.pool.Stat().NewConnsCount() - before; n != 0 {
		t.Errorf("%d connections were made anew, want none", n)
	}
}

// If an error that proves nothing comes in place of COMMIT's reply, the connection is closed, and a
// fresh one looks the outcome up.
func TestConnectionOfAnUnknownOutcomeIsClosed(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	ctx := context.Background()
	if _, err := b.pool.Exec(ctx, `
		CREATE FUNCTION fault() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE SQLSTATE '08006'; END $$;
		CREATE CONSTRAINT TRIGGER fault AFTER INSERT ON effects DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fault()`); err != nil {
		t.Fatal(err)
	}
	var pid uint32
	want(t, b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
		effect(ctx, t)
		pid = postgres.RawConn(tx).PgConn().PID()
		return 201
	}), idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
	for range 2 { // whichever connections the pool has
		conn, err := b.pool.Acquire(ctx)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Release()
		if conn.Conn().PgConn().PID() == pid {
			t.Error("the connection went back to the pool")
		}
	}
}

// If PostgreSQL ended the session under its handler, the outcome is unavailable, however the
// handler treats its errors.
func TestSessionThatEndedUnderItsHandlerIsUnavailable(t *testing.T) {
	t.Parallel()
	for name, touch := range map[string]bool{"unseen": false, "seen, and taken for the client's mistake": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, nil)
			want(t, b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
				effect(ctx, t)
				conn := postgres.RawConn(tx).PgConn()
				if _, err := tx.Exec(ctx, "SET LOCAL idle_in_transaction_session_timeout = '50ms'"); err != nil {
					t.Error(err)
				}
				b.awaitNone(t, "SELECT count(*) FROM pg_stat_activity WHERE pid = $1", int(conn.PID()))
				if touch {
					if _, err := tx.Exec(ctx, "INSERT INTO effects (name) VALUES ('late')"); err == nil {
						t.Error("the session goes on")
					}
					return 422
				}
				return 201
			}), idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
			if n := b.effects(t); n != 0 {
				t.Errorf("%d effects, want none", n)
			}
		})
	}
}

// If another attempt recorded the key, and no restart is left to read the record, the request is
// not reported as not executed.
func TestRecordedKeyIsNeverCalledNotExecuted(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	for name, c := range map[string]struct {
		options idempotency.Options
		wait    time.Duration
		outcome idempotency.Outcome
		reason  idempotency.Reason
	}{
		"no restarts":  {options: idempotency.Options{Restarts: -1}, outcome: idempotency.OutcomeMismatch, reason: idempotency.ReasonKeyReused},
		"no time left": {options: idempotency.Options{Timeouts: idempotency.Timeouts{Handler: 100 * time.Millisecond}}, wait: 200 * time.Millisecond, outcome: idempotency.OutcomeUnknown, reason: idempotency.ReasonOutcomeUnknown},
	} {
		for _, status := range []int{201, 402} {
			key := fmt.Sprint(name[3:], status)
			key = fmt.Sprintf("%x", key)
			result := idempotency.NewEngine(b.store, &c.options).Do(context.Background(), request(key, ""), func(context.Context) (*idempotency.Answer, error) {
				_, err := b.pool.Exec(context.Background(), `INSERT INTO idempotency_keys
					(created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)
					VALUES (now(), now() + interval '1 day', 202, 1, gen_random_uuid(), 'acme', $2, $1, '\x0100', 'theirs')`,
					make([]byte, 32), key)
				if err != nil {
					t.Error(err)
				}
				time.Sleep(c.wait)
				return answer(status), nil
			})
			want(t, result, c.outcome, c.reason)
		}
	}
}

// Above READ COMMITTED the claim can miss another attempt's record. An attempt that leaves no
// record of its own, however it ends and even with no restart left, looks the key up again: the
// record is a replay or a mismatch, and if the look-up fails the outcome is unknown.
func TestEveryEndAboveReadCommittedLooksAgain(t *testing.T) {
	t.Parallel()
	sql := func(sql string, status int) func(context.Context, pgx.Tx) (int, error) {
		return func(ctx context.Context, tx pgx.Tx) (int, error) {
			_, err := tx.Exec(ctx, sql)
			return status, err
		}
	}
	deferExec := func(sql string, status int) func(context.Context, pgx.Tx) (int, error) {
		return func(ctx context.Context, _ pgx.Tx) (int, error) {
			_ = postgres.DeferExec(ctx, sql) // a refused statement fails the commit
			return status, nil
		}
	}
	ends := map[string]struct {
		do     func(ctx context.Context, tx pgx.Tx) (status int, err error)
		cannot bool // it can't look again on its connection
	}{
		"commits":                           {do: sql("SELECT", 201)},
		"declines":                          {do: sql("SELECT", 402)},
		"forgets":                           {do: sql("SELECT", 503)},
		"fails":                             {do: sql("SELECT 1 / 0", 201)},
		"panics":                            {do: func(context.Context, pgx.Tx) (int, error) { panic("handler") }},
		"can't commit its encoding":         {do: sql("SET LOCAL client_encoding = 'LATIN1'", 201)},
		"can't commit its constraint":       {do: sql("INSERT INTO deferred VALUES (1), (1)", 201)},
		"can't commit a deferred statement": {do: deferExec("DELETE FROM again", 201)},
		"can't defer a statement":           {do: deferExec("SET LOCAL lock_timeout = 1", 201)},
		"must start again at a deferred statement": {do: deferExec("INSERT INTO now VALUES (1)", 201)},
		"must start again":                         {do: sql("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$", 201)},
		"must start again at COMMIT":               {do: sql("INSERT INTO again VALUES (1)", 201)},
		"loses its connection":                     {do: sql("SELECT pg_terminate_backend(pg_backend_pid())", 201), cannot: true},
	}
	for _, isolation := range []pgx.TxIsoLevel{pgx.RepeatableRead, pgx.Serializable} {
		b := setup(t, &setupOptions{store: &postgres.Options{Isolation: isolation, AcquireTimeout: 20 * time.Second}})
		b.exec(t, "CREATE TABLE deferred (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
		b.exec(t, "CREATE TABLE again (id int)")
		b.exec(t, "CREATE TABLE now (id int)")
		b.exec(t, "CREATE FUNCTION again() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$")
		b.exec(t, "CREATE TRIGGER again BEFORE INSERT ON now FOR EACH ROW EXECUTE FUNCTION again()")
		b.exec(t, "CREATE CONSTRAINT TRIGGER again AFTER INSERT ON again DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION again()")
		engine := idempotency.NewEngine(b.store, &idempotency.Options{Restarts: -1})
		for name, end := range ends {
			for _, body := range []string{"the same", "another"} {
				// One after another: the serializable transactions must not fail because of each
				// other.
				t.Run(fmt.Sprint(isolation, ", ", name, ", ", body), func(t *testing.T) {
					key := fmt.Sprintf("%x", name+body)
					result := engine.Do(context.Background(), request(key, "the same"), func(ctx context.Context) (*idempotency.Answer, error) {
						effect(ctx, t)
						b.recordElsewhere(t, isolation, request(key, body))
						status, err := end.do(ctx, postgres.Tx(ctx))
						if err != nil {
							return answer(500), nil
						}
						return answer(status), nil
					})
					switch {
					case end.cannot:
						want(t, result, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
					case body == "the same":
						want(t, result, idempotency.OutcomeReplayed, "")
					default:
						want(t, result, idempotency.OutcomeMismatch, idempotency.ReasonKeyReused)
					}
				})
			}
		}
		t.Cleanup(func() {
			if n := b.effects(t); n != 0 {
				t.Errorf("%d effects, want none", n)
			}
		})
	}
}

// recordElsewhere records a request as another attempt does, at the same isolation level.
func (b *testBundle) recordElsewhere(t *testing.T, isolation pgx.TxIsoLevel, req idempotency.Request) {
	t.Helper()
	err := pgx.BeginTxFunc(context.Background(), b.pool, pgx.TxOptions{IsoLevel: isolation}, func(tx pgx.Tx) error {
		if _, err := tx.Exec(context.Background(), "SELECT FROM idempotency_keys WHERE scope = $1 AND key = $2", req.Key.Scope, req.Key.Value); err != nil {
			return err
		}
		_, err := tx.Exec(context.Background(), `INSERT INTO idempotency_keys (created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)
			VALUES (now(), now() + interval '1 day', 202, $1, gen_random_uuid(), $2, $3, $4, '\x0100', 'theirs')`,
			req.Fingerprint.Version, req.Key.Scope, req.Key.Value, req.Fingerprint.Sum[:])
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// Above READ COMMITTED the claim's snapshot may be older than its lock. An attempt that saw nothing
// and then forgets its answer must not report not-executed.
func TestOldSnapshotIsNoProof(t *testing.T) {
	t.Parallel()
	for _, isolation := range []pgx.TxIsoLevel{pgx.RepeatableRead, pgx.Serializable} {
		t.Run(string(isolation), func(t *testing.T) {
			t.Parallel()
			b := setup(t, &setupOptions{
				store:     &postgres.Options{Isolation: isolation, AcquireTimeout: 20 * time.Second},
				configure: func(c *pgxpool.Config) { c.MaxConns = 8 },
			})
			for key := range 300 {
				var runs atomic.Int64
				var wg sync.WaitGroup
				for range 6 {
					wg.Go(func() {
						for {
							run := int64(0)
							result := b.do(t, request(fmt.Sprint(key), ""), func(context.Context, pgx.Tx) int {
								if run = runs.Add(1); run == 1 {
									return 201
								}
								return 500 // runs after the first was recorded, because the lock was free
							})
							if result.Outcome == idempotency.OutcomeNotExecuted {
								t.Errorf("key %d, run %d: %s %v", key, run, result.Outcome, result.Err)
							}
							if result.Outcome != idempotency.OutcomeInProgress {
								return
							}
						}
					})
				}
				wg.Wait()
			}
		})
	}
}

// The last check on a handler that replaced the transaction, for the answers that commit nothing.
func TestReplacedTransactionIsNeverCalledNotExecuted(t *testing.T) {
	t.Parallel()
	for _, status := range []int{500, 429, 0} {
		b := setup(t, nil)
		result := b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
			effect(ctx, t)
			if _, err := postgres.RawConn(tx).Exec(ctx, "commit; begin"); err != nil {
				t.Error(err)
			}
			if status == 0 {
				panic("after the fact")
			}
			return status
		})
		want(t, result, idempotency.OutcomeUnknown, idempotency.ReasonTransactionLost)
	}
}

type faultyTracer struct {
	step           idempotency.Step
	started, ended atomic.Int64
}

func (f *faultyTracer) TraceRequestStart(ctx context.Context, _ idempotency.RequestStart) context.Context {
	f.started.Add(1)
	return ctx
}

func (f *faultyTracer) TraceStep(_ context.Context, s idempotency.StepEnd) {
	if s.Step == f.step {
		panic("tracer")
	}
}
func (f *faultyTracer) TraceRequestEnd(context.Context, idempotency.RequestEnd) { f.ended.Add(1) }
func (f *faultyTracer) TraceRefused(context.Context, idempotency.Refused)       {}

// However a request's goroutine ends, nothing is held and its end is traced.
func TestNothingIsHeldWhereTheGoroutineEnds(t *testing.T) {
	t.Parallel()
	for _, step := range []idempotency.Step{"", idempotency.StepClaim, idempotency.StepHandler, idempotency.StepCommit} {
		b := setup(t, nil)
		tracer := &faultyTracer{step: step}
		done := make(chan struct{})
		go func() {
			defer close(done)
			defer func() { _ = recover() }()
			idempotency.NewEngine(b.store, &idempotency.Options{Tracer: tracer}).Do(context.Background(), request("k", ""), func(context.Context) (*idempotency.Answer, error) {
				if step == "" {
					runtime.Goexit()
				}
				return answer(201), nil
			})
		}()
		<-done
		if n := b.pool.Stat().AcquiredConns(); n != 0 || tracer.started.Load() != tracer.ended.Load() {
			t.Errorf("step %q: %d connections are held, %d requests ended", step, n, tracer.ended.Load())
			b.count(t, "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in transaction%'")
		}
	}
}

// A role that a handler set for the session makes every claim on that connection fail, so the
// connection is closed.
func TestConnectionThatCannotClaimIsNotKept(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns = 1 }})
	if _, err := b.pool.Exec(context.Background(), "SET ROLE pg_read_all_settings"); err != nil {
		t.Fatal(err)
	}
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
}

// not-executed is about the request, not about its key: without a connection the key was not looked
// up. The client's table must not let it give up on this answer if an earlier reply was lost.
func TestNotExecutedIsSaidOfTheRequestAlone(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{
		store:     &postgres.Options{AcquireTimeout: 500 * time.Millisecond},
		configure: func(c *pgxpool.Config) { c.MaxConns = 1 },
	})
	// Connect first: connecting may take longer than this test's short AcquireTimeout.
	if err := b.pool.Ping(context.Background()); err != nil {
		t.Fatal(err)
	}
	// The request is executed, and its reply is lost.
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	busy, err := b.pool.Acquire(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
	busy.Release()
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeReplayed, "")
}

// TestSafeToRetryIsTrueAfterACommittedCommit is the reason for never using pgconn.SafeToRetry. The
// COMMIT is committed, its reply is lost, and pgx reports that nothing was sent: the failed read
// closes the connection, the next read fails with "conn closed", and that counts as safe, whatever
// was sent while the connection was open.
func TestSafeToRetryIsTrueAfterACommittedCommit(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		// Pays and commits; returns pgx's error for the COMMIT.
		commit func(ctx context.Context, tx pgx.Tx) error
	}{
		{"Tx.Commit", func(ctx context.Context, tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, "INSERT INTO payments VALUES (1)"); err != nil {
				return err
			}
			return tx.Commit(ctx)
		}},
		{"a string of statements", func(ctx context.Context, tx pgx.Tx) error {
			_, err := tx.Exec(ctx, "INSERT INTO payments VALUES (1); COMMIT")
			return err
		}},
		{"a pipeline's second result", func(ctx context.Context, tx pgx.Tx) error {
			pipeline := tx.Conn().PgConn().StartPipeline(ctx)
			pipeline.SendQueryParams("INSERT INTO payments VALUES (1)", nil, nil, nil, nil)
			pipeline.SendQueryParams("COMMIT", nil, nil, nil, nil)
			if err := pipeline.Sync(); err != nil {
				return err
			}
			if _, err := pipeline.GetResults(); err == nil || pgconn.SafeToRetry(err) {
				return errors.Join(errors.New("the INSERT's own error is another than it was"), err)
			}
			_, err := pipeline.GetResults()
			_ = pipeline.Close() // says the same
			return err
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			url := pgtest.Database(t)
			network, address, err := pgfault.Upstream(url)
			if err != nil {
				t.Fatal(err)
			}
			proxy, err := pgfault.Start(pgfault.Options{Network: network, Address: address, OnCommit: func(pgfault.Commit) pgfault.Fault {
				return pgfault.Fault{Kind: pgfault.CutAfter}
			}})
			if err != nil {
				t.Fatal(err)
			}
			defer proxy.Close()
			direct := connectTo(t, url)
			if _, err := direct.Exec(t.Context(), "CREATE TABLE payments (amount int)"); err != nil {
				t.Fatal(err)
			}
			tx, err := connectTo(t, proxy.URL(url)).Begin(t.Context())
			if err != nil {
				t.Fatal(err)
			}

			commitErr := test.commit(t.Context(), tx)

			if n := proxy.Hits()[pgfault.CutAfter]; n != 1 {
				t.Fatalf("%d COMMITs were sent, want 1: %v", n, commitErr)
			}
			var payments int
			if err := direct.QueryRow(t.Context(), "SELECT count(*) FROM payments").Scan(&payments); err != nil || payments != 1 {
				t.Fatalf("%d payments (%v), want the one that was committed", payments, err)
			}
			if commitErr == nil || !pgconn.SafeToRetry(commitErr) {
				t.Fatalf("pgconn.SafeToRetry is false of %q, after a COMMIT that was committed: pgx has changed. The store does not ask it "+
					"and stays right (definite in sqlstate.go); read docs/decisions/0008-resolve.md and docs/architecture.md again, which say why", commitErr)
			}
		})
	}
}

func connectTo(t *testing.T, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = conn.Close(ctx) // the test breaks it
		<-conn.PgConn().CleanupDone()
	})
	return conn
}

// The last check: a transaction that was ended around the seal is reported neither as executed nor
// as not executed.
func TestLostTransactionIsUnknown(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		sql    string
		status int
	}{
		"replaced, 201": {"commit; begin", 201},
		"replaced, 402": {"commit; begin", 402},
		"ended, 201":    {"commit", 201},
		"ended, 402":    {"commit", 402},
		"ended, 500":    {"commit", 500},
	} {
		for _, key := range []string{"k", ""} {
			t.Run(name+" key "+key, func(t *testing.T) {
				t.Parallel()
				b := setup(t, nil)
				result := b.do(t, request(key, ""), func(ctx context.Context, tx pgx.Tx) int {
					effect(ctx, t)
					if _, err := postgres.RawConn(tx).Exec(ctx, c.sql); err != nil {
						t.Error(err)
					}
					return c.status
				})
				if key == "" && name == "replaced, 402" {
					return // rolled back; there is no record that could be wrong
				}
				want(t, result, idempotency.OutcomeUnknown, idempotency.ReasonTransactionLost)
				if n := b.count(t, "SELECT count(*) FROM idempotency_keys"); n != 0 {
					t.Errorf("%d records, want none", n)
				}
			})
		}
	}
}

// An SQL error that the handler ignores leaves an aborted transaction, which no 2xx can commit.
func TestSwallowedErrorIsNotExecuted(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	for name, swallow := range map[string]func(tx pgx.Tx){
		"exec":      func(tx pgx.Tx) { _, _ = tx.Exec(ctx, "SELECT 1/0") },
		"query":     func(tx pgx.Tx) { rows, _ := tx.Query(ctx, "SELECT 1/0"); rows.Close() },
		"query row": func(tx pgx.Tx) { _ = tx.QueryRow(ctx, "SELECT 1/0").Scan(new(int)) },
		"batch": func(tx pgx.Tx) {
			batch := &pgx.Batch{}
			batch.Queue("SELECT 1/0")
			_ = tx.SendBatch(ctx, batch).Close()
		},
		"batch callback": func(tx pgx.Tx) {
			batch := &pgx.Batch{}
			batch.Queue("SELECT 1/0").QueryRow(func(row pgx.Row) error { _ = row.Scan(new(int)); return nil })
			_ = tx.SendBatch(ctx, batch).Close()
		},
		"copy": func(tx pgx.Tx) {
			_, _ = tx.CopyFrom(ctx, pgx.Identifier{"effects"}, []string{"name"}, pgx.CopyFromRows([][]any{{nil}}))
		},
		"prepare": func(tx pgx.Tx) { _, _ = tx.Prepare(ctx, "p", "SELECT missing") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, nil)
			result := b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
				effect(ctx, t)
				swallow(tx)
				return 201
			})
			want(t, result, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
			if n := b.effects(t); n != 0 {
				t.Errorf("%d effects, want none", n)
			}
		})
	}
}

// A serialization failure is remembered from every path, whatever the handler answers.
func TestRestartIsRememberedFromEveryPath(t *testing.T) {
	t.Parallel()
	const raise = "DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"
	ctx := context.Background()
	for name, swallow := range map[string]func(tx pgx.Tx){
		"exec":  func(tx pgx.Tx) { _, _ = tx.Exec(ctx, raise) },
		"query": func(tx pgx.Tx) { rows, _ := tx.Query(ctx, raise); rows.Close() },
		"row":   func(tx pgx.Tx) { _ = tx.QueryRow(ctx, raise).Scan() },
		"batch": func(tx pgx.Tx) {
			batch := &pgx.Batch{}
			batch.Queue("SELECT 1")
			batch.Queue(raise)
			_ = tx.SendBatch(ctx, batch).Close()
		},
		"batch callback": func(tx pgx.Tx) {
			batch := &pgx.Batch{}
			batch.Queue(raise).Query(func(rows pgx.Rows) error { rows.Close(); return nil })
			_ = tx.SendBatch(ctx, batch).Close()
		},
		"nested, released in vain": func(tx pgx.Tx) {
			nested, _ := tx.Begin(ctx)
			_, _ = nested.Exec(ctx, raise)
			_ = nested.Commit(ctx)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, nil)
			runs := 0
			result := b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
				effect(ctx, t)
				if runs++; runs == 1 {
					swallow(tx)
				}
				return 201
			})
			want(t, result, idempotency.OutcomeExecuted, "")
			if n := b.effects(t); runs != 2 || n != 1 {
				t.Errorf("%d runs and %d effects, want 2 and 1", runs, n)
			}
		})
	}
}

// State that a handler leaves in its session may fail a later handler that leaves the same. It
// never separates an effect from its record.
func TestWhatAHandlerLeavesInItsSessionPartsNoEffectFromItsRecord(t *testing.T) {
	t.Parallel()
	for _, sql := range []string{
		"CREATE TEMP TABLE batch (id int)", "PREPARE mine AS SELECT 1", "DEALLOCATE ALL", "DISCARD TEMP", "SELECT pg_advisory_lock(1)",
		"CREATE TEMP TABLE idempotency_keys (LIKE public.idempotency_keys)", "SET search_path = pg_temp, public",
	} {
		t.Run(sql, func(t *testing.T) {
			t.Parallel()
			b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns = 1 }})
			other := setupOther(t, b)
			for i := range 6 {
				result := b.do(t, request(fmt.Sprint(i/2), ""), func(ctx context.Context, tx pgx.Tx) int {
					if _, err := tx.Exec(ctx, sql); err != nil {
						return 500
					}
					if _, err := tx.Exec(ctx, "INSERT INTO public.effects (name) VALUES ('x')"); err != nil {
						return 500
					}
					return 201
				})
				effects, records := other.effects(t), other.count(t, "SELECT count(*) FROM idempotency_keys")
				if effects != records || effects > i/2+1 {
					t.Fatalf("request %d, %s: %d effects and %d records", i, result.Outcome, effects, records)
				}
				if known := result.Outcome == idempotency.OutcomeExecuted || result.Outcome == idempotency.OutcomeReplayed; known && records != i/2+1 {
					t.Errorf("request %d is %s, and there are %d records", i, result.Outcome, records)
				}
			}
		})
	}
}

// The Sync before a long record changes no outcome: a failure before it leaves nothing behind, and
// gives the same error as without it.
func TestLongRecordsFailAsShortOnesDo(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		sick    string
		handle  func(t *testing.T, b *testBundle, ctx context.Context, tx pgx.Tx)
		outcome idempotency.Outcome
		reason  idempotency.Reason
		effects int
	}{
		"nothing is wrong": {"SELECT 1", func(*testing.T, *testBundle, context.Context, pgx.Tx) {}, idempotency.OutcomeExecuted, "", 1},
		"a deferred constraint": {"ALTER TABLE effects ADD CONSTRAINT once UNIQUE (name) DEFERRABLE INITIALLY DEFERRED",
			func(t *testing.T, _ *testBundle, ctx context.Context, _ pgx.Tx) { effect(ctx, t) }, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed, 0},
		"a lost race": {"SELECT 1",
			func(t *testing.T, b *testBundle, _ context.Context, _ pgx.Tx) { record(t, b.pool, "k", "", "theirs") }, idempotency.OutcomeReplayed, "", 0},
		"a trigger that drops the record": {"CREATE FUNCTION drop_row() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; CREATE TRIGGER drop_row BEFORE INSERT ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION drop_row()",
			func(*testing.T, *testBundle, context.Context, pgx.Tx) {}, idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable, 0},
		"another transaction": {"SELECT 1", func(t *testing.T, _ *testBundle, ctx context.Context, tx pgx.Tx) {
			for _, sql := range []string{"COMMIT", "BEGIN"} {
				if err := postgres.SendUnadmitted(ctx, tx, true, sql); err != nil {
					t.Error(err)
				}
			}
		}, idempotency.OutcomeUnknown, idempotency.ReasonTransactionLost, 1},
	} {
		var short string // the error with a short record
		for _, length := range []int{1, postgres.TogetherBytesMax + 1} {
			b := setup(t, nil)
			b.exec(t, c.sick)
			result := idempotency.NewEngine(b.store, nil).Do(t.Context(), request("k", ""), func(ctx context.Context) (*idempotency.Answer, error) {
				effect(ctx, t)
				c.handle(t, b, ctx, postgres.Tx(ctx))
				a := answer(201)
				a.Body = []byte(strings.Repeat("x", length))
				return a, nil
			})
			if result.Outcome != c.outcome || result.Reason != c.reason || b.effects(t) != c.effects {
				t.Errorf("%s, %d bytes: %s %q %v, %d effects; want %s %q, %d", name, length, result.Outcome, result.Reason, result.Err, b.effects(t), c.outcome, c.reason, c.effects)
			}
			if text := fmt.Sprint(result.Err); length == 1 {
				short = text
			} else if text != short {
				t.Errorf("%s, %d bytes: error is %q, with a short record %q", name, length, text, short)
			}
		}
	}
}

// Whatever a handler sets, for its transaction or for the pool's only connection: a payment and its
// record are there together, and a retry is replayed.
func TestNoSettingOfAHandlerPartsPaymentAndRecord(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	settings := []string{
		"synchronous_commit = off", "session_replication_role = replica", "lock_timeout = 1", "search_path = pg_temp",
		"default_transaction_read_only = on", "default_transaction_isolation = 'serializable'", "default_transaction_deferrable = on",
		"standard_conforming_strings = off", "DateStyle = 'SQL, DMY'", "TimeZone = 'Asia/Kathmandu'", "IntervalStyle = sql_standard",
		"extra_float_digits = -15", "bytea_output = escape", "transform_null_equals = on", "xmloption = document", "array_nulls = off",
		"quote_all_identifiers = on", "plan_cache_mode = force_generic_plan", "enable_indexscan = off", "constraint_exclusion = on",
		"row_security = off", "client_min_messages = error", "work_mem = 64", "temp_tablespaces = ''", "check_function_bodies = off",
		"lc_messages = 'C'", "application_name = 'x'",
	}
	// A handler might not be done in 1 ms.
	brief := []string{"statement_timeout = 1", "idle_in_transaction_session_timeout = 1"}
	for _, local := range []string{"LOCAL ", ""} {
		for _, setting := range slices.Concat(settings, brief) {
			t.Run(local+setting, func(t *testing.T) {
				t.Parallel()
				b.setsAndPays(t, local+setting, slices.Contains(brief, setting))
			})
		}
	}
}

// setsAndPays pays two keys three times each.
func (b *testBundle) setsAndPays(t *testing.T, setting string, mayFail bool) {
	config := b.pool.Config()
	config.MaxConns = 1
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	engine := idempotency.NewEngine(postgres.New(pool, nil), nil)
	paid := 0
	for _, key := range []string{"first", "second"} {
		want := idempotency.OutcomeExecuted
		for range 3 {
			req := request(key, "10")
			req.Key.Scope = setting
			result := engine.Do(t.Context(), req, func(ctx context.Context) (*idempotency.Answer, error) {
				tx := postgres.Tx(ctx)
				if _, err := tx.Exec(ctx, "SET "+setting); err != nil {
					return nil, err
				}
				if _, err := tx.Exec(ctx, "INSERT INTO public.effects (name) VALUES ($1)", setting); err != nil {
					return nil, err
				}
				return answer(201), nil
			})
			switch {
			case result.Outcome == want:
			case mayFail && result.Outcome == idempotency.OutcomeNotExecuted:
				continue
			default:
				t.Errorf("%s: %s, %v, want %s", key, result.Outcome, result.Err, want)
			}
			if result.Outcome == idempotency.OutcomeExecuted {
				paid++
			}
			want = idempotency.OutcomeReplayed
		}
	}
	if n := b.count(t, "SELECT count(*) FROM effects WHERE name = $1", setting); n != paid {
		t.Errorf("%d payments in the books of %d that were told", n, paid)
	}
	if n := b.count(t, "SELECT count(*) FROM idempotency_keys WHERE scope = $1", setting); n != paid {
		t.Errorf("%d records of %d payments", n, paid)
	}
	if paid < 2 && !mayFail {
		t.Errorf("%d payments of 2 keys", paid)
	}
}
