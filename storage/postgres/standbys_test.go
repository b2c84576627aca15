package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgserver"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

// configOfOwnServer returns the config of a pool on a separate PostgreSQL, because the test changes
// its settings.
func configOfOwnServer(t *testing.T) *pgxpool.Config {
	t.Helper()
	if os.Getenv("PAIDONCE_TEST_DATABASE_URL") != "" {
		t.Skip("it changes the settings of a server of its own")
	}
	server, err := pgserver.Start(t.Context(), &pgserver.Options{Settings: map[string]string{"fsync": "off"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Stop() })
	config, err := pgxpool.ParseConfig(server.URL())
	if err != nil {
		t.Fatal(err)
	}
	return config
}

// migrated returns a store with its tables, on a pool of this config.
func migrated(t *testing.T, config *pgxpool.Config) *postgres.Store {
	t.Helper()
	postgres.Configure(config, nil)
	pool, err := pgxpool.NewWithConfig(context.Background(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	store := postgres.New(pool, nil)
	if err := migrations.Up(context.Background(), store, nil); err != nil {
		t.Fatal(err)
	}
	return store
}

// If a COMMIT's wait for the standbys is canceled, it succeeds with a warning. No request is
// answered from it before the standbys have it: a fail-over would lose it.
func TestF20NoAnswerBeforeTheStandbysHaveIt(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "starts a primary and a standby of its own")
	ctx := context.Background()
	config := configOfOwnServer(t)
	var told atomic.Int64
	config.ConnConfig.OnNotice = func(_ *pgconn.PgConn, notice *pgconn.Notice) {
		if notice.Code == "01000" {
			told.Add(1)
		}
	}
	admin := migrated(t, config).Pool()
	// The barrier needs no right that a service's role does not have.
	if _, err := admin.Exec(ctx, "CREATE ROLE service LOGIN; GRANT SELECT, INSERT ON idempotency_keys TO service"); err != nil {
		t.Fatal(err)
	}
	service := config.Copy()
	service.ConnConfig.User = "service"
	// The session's own settings don't weaken COMMIT either.
	service.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, "SET synchronous_commit = local; SET client_min_messages = error")
		return err
	}
	pool, err := pgxpool.NewWithConfig(ctx, service)
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	store := postgres.New(pool, nil)

	begin := func(key string) (idempotency.Attempt, *idempotency.Record, error) {
		short, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		return store.Begin(short, claimOf(request(key, "")))
	}
	setStandbys(t, admin, "nobody")
	attempts := map[string]idempotency.Attempt{}
	for _, key := range []string{"commit", "decline", "keyless", "again"} {
		name := key
		if key == "keyless" {
			name = ""
		}
		attempt, _, err := begin(name)
		if err != nil {
			t.Fatal(err)
		}
		attempts[key] = attempt
	}
	ends := map[string]func(idempotency.Attempt, context.Context, *idempotency.Answer) error{
		"commit": idempotency.Attempt.Commit, "decline": idempotency.Attempt.Decline, "keyless": idempotency.Attempt.Commit,
	}
	for key, end := range ends {
		done := make(chan error, 1)
		if key == "keyless" { // a COMMIT that wrote nothing does not wait
			if _, err := postgres.Tx(attempts[key].Context(ctx)).Exec(ctx, "SELECT pg_logical_emit_message(true, 'test', '')"); err != nil {
				t.Fatal(err)
			}
		}
		go func() { done <- end(attempts[key], ctx, answer(201)) }()
		cancelWaiting(t, admin)
		if err := <-done; !errors.Is(err, idempotency.ErrUnknown) {
			t.Errorf("%s: error %v, want ErrUnknown", key, err)
		}
	}
	if told.Load() == 0 {
		t.Error("the config's own notice handler was not told")
	}
	attempts["again"].Rollback(ctx)

	resolve := func(key string, wait time.Duration) resolution {
		short, cancel := context.WithTimeout(ctx, wait)
		defer cancel()
		record, err := store.Resolve(short, claimOf(request(key, "")))
		return resolution{record, err}
	}
	for _, key := range []string{"commit", "decline"} {
		resolve(key, time.Second).wantUnknown(t)
		later := make(chan resolution, 1)
		go func() { later <- resolve(key, 3*time.Second) }()
		cancelWaiting(t, admin) // of the barrier: that COMMIT proves nothing either
		(<-later).wantUnknown(t)

		replay := make(chan error, 1)
		go func() {
			_, record, err := begin(key)
			if record != nil {
				t.Error("a record was replayed that the standbys don't have")
			}
			replay <- err
		}()
		cancelWaiting(t, admin)
		if err := <-replay; !errors.Is(err, idempotency.ErrUnknown) {
			t.Errorf("replay of the %s: error %v, want ErrUnknown", key, err)
		}
	}
	setStandbys(t, admin, "")
	for _, key := range []string{"commit", "decline"} {
		resolve(key, time.Minute).wantBody(t, "done")
		if _, record, err := begin(key); err != nil || record == nil {
			t.Errorf("replay of the %s: record %v, error %v", key, record != nil, err)
		}
	}
	resolve("again", time.Minute).wantAbsent(t)
}

// setStandbys sets synchronous_standby_names, and returns when it is in effect on the whole server.
func setStandbys(t *testing.T, pool *pgxpool.Pool, names string) {
	t.Helper()
	ctx := context.Background()
	for _, sql := range []string{"ALTER SYSTEM SET synchronous_standby_names = '" + names + "'", "SELECT pg_reload_conf()"} {
		if _, err := pool.Exec(ctx, sql); err != nil {
			t.Fatal(err)
		}
	}
	// The checkpointer passes the setting on at a time of its own, so the test repeats a COMMIT
	// until it behaves accordingly.
	conn, err := pgx.ConnectConfig(ctx, pool.Config().ConnConfig)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(ctx) }()
	for deadline := time.Now().Add(time.Minute); ; {
		if time.Now().After(deadline) {
			t.Fatal("the server does not take the setting")
		}
		done := make(chan error, 1)
		go func() {
			_, err := conn.Exec(ctx, "SELECT pg_logical_emit_message(true, 'test', '')")
			done <- err
		}()
		waits := false
		for wait := true; wait; {
			select {
			case err := <-done:
				if err != nil {
					t.Fatal(err)
				}
				wait = false
			case <-time.After(10 * time.Millisecond):
				waits = cancelWaiters(t, pool) || waits
			}
		}
		if waits == (names != "") {
			return
		}
	}
}

// cancelWaiters cancels the waits for a standby and reports whether there was one.
func cancelWaiters(t *testing.T, pool *pgxpool.Pool) bool {
	t.Helper()
	var n int
	if err := pool.QueryRow(context.Background(), "SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity WHERE wait_event = 'SyncRep'").Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n > 0
}

// cancelWaiting cancels the next wait for a standby.
func cancelWaiting(t *testing.T, pool *pgxpool.Pool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !cancelWaiters(t, pool); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("no COMMIT waits for a standby")
		}
	}
}

// If COMMIT waits for no standby, a warning of the service's own means nothing: no look-up follows.
func TestWarningWithoutStandbysIsNoDoubt(t *testing.T) {
	t.Parallel()
	var connections atomic.Int64
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) {
		c.MaxConns = 1
		counted(c, &connections)
	}})
	if _, err := b.pool.Exec(context.Background(), `
		CREATE FUNCTION warn() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE WARNING 'low funds'; RETURN NULL; END $$;
		CREATE CONSTRAINT TRIGGER warn AFTER INSERT ON effects DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION warn()`); err != nil {
		t.Fatal(err)
	}
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeReplayed, "")
	if n := connections.Load(); n != 1 {
		t.Errorf("%d connections were made, want the pool's alone", n)
	}
}

// If COMMIT waits for a standby that has it, everything is as without one: a warning of the
// service's own means nothing, and no look-up follows.
func TestWarningsOfTheServiceAreClearedUp(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	if os.Getenv("PAIDONCE_TEST_DATABASE_URL") != "" {
		t.Skip("it needs a standby")
	}
	primary, err := pgserver.Start(ctx, &pgserver.Options{Settings: map[string]string{"fsync": "off"}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = primary.Stop() }()
	standby, err := pgserver.Standby(ctx, primary, &pgserver.Options{Settings: map[string]string{"fsync": "off"}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = standby.Stop() }()
	config, err := pgxpool.ParseConfig(primary.URL())
	if err != nil {
		t.Fatal(err)
	}
	var connections atomic.Int64
	counted(config, &connections)
	config.MaxConns = 1
	store := migrated(t, config)
	pool := store.Pool()
	if _, err := pool.Exec(ctx, `
		CREATE TABLE effects (name text);
		CREATE FUNCTION say() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
			IF NEW.name = 'warning' THEN RAISE WARNING 'low funds'; ELSE RAISE NOTICE 'low funds'; END IF; RETURN NULL; END $$;
		CREATE CONSTRAINT TRIGGER say AFTER INSERT ON effects DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION say()`); err != nil {
		t.Fatal(err)
	}
	for _, sql := range []string{"ALTER SYSTEM SET synchronous_standby_names = 'walreceiver'", "SELECT pg_reload_conf()"} {
		if _, err := pool.Exec(ctx, sql); err != nil {
			t.Fatal(err)
		}
	}
	for set := ""; set == ""; {
		if err := pool.QueryRow(ctx, "SHOW synchronous_standby_names").Scan(&set); err != nil {
			t.Fatal(err)
		}
	}
	engine := idempotency.NewEngine(store, nil)
	for name, c := range map[string]struct {
		key   string
		sql   string
		looks int64
	}{
		"a warning at COMMIT":          {"k0", "INSERT INTO effects VALUES ('warning')", 0},
		"a notice at COMMIT":           {"k1", "INSERT INTO effects VALUES ('notice')", 0},
		"a warning before COMMIT":      {"k2", "DO $$ BEGIN RAISE WARNING 'low funds'; END $$", 0},
		"none, after an earlier one's": {"k3", "SELECT 1", 0},
	} {
		before := connections.Load()
		run := func(ctx context.Context) (*idempotency.Answer, error) {
			_, err := postgres.Tx(ctx).Exec(ctx, c.sql)
			return answer(201), err
		}
		want(t, engine.Do(ctx, request(c.key, ""), run), idempotency.OutcomeExecuted, "")
		// A warning that is left over on the connection does not affect a replay's barrier either.
		if _, err := pool.Exec(ctx, "DO $$ BEGIN RAISE WARNING 'low funds'; END $$"); err != nil {
			t.Error(err)
		}
		want(t, engine.Do(ctx, request(c.key, ""), run), idempotency.OutcomeReplayed, "")
		if n := connections.Load() - before; n != c.looks {
			t.Errorf("%s: %d looks, want %d", name, n, c.looks)
		}
	}
}

// Standbys may be named while a request runs. Then COMMIT waits for them although the claim found
// none, and a canceled wait is no answer either.
func TestF20StandbysNamedAfterTheClaimAreWaitedFor(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	config := configOfOwnServer(t)
	store := migrated(t, config)
	pool := store.Pool()
	for name, end := range map[string]func(idempotency.Attempt, context.Context, *idempotency.Answer) error{
		"commit": idempotency.Attempt.Commit, "decline": idempotency.Attempt.Decline,
	} {
		setStandbys(t, pool, "")
		attempt, _, err := store.Begin(ctx, claimOf(request(name, "")))
		if err != nil {
			t.Fatal(err)
		}
		setStandbys(t, pool, "nobody")
		done := make(chan error, 1)
		go func() { done <- end(attempt, ctx, answer(201)) }()
		cancelWaiting(t, pool)
		if err := <-done; !errors.Is(err, idempotency.ErrUnknown) {
			t.Errorf("%s: error %v, want ErrUnknown", name, err)
		}
	}
}

// If a claim sees the record, and its barrier fails until no restart is left, the request is not
// reported as not executed: the record may be its own. Here the barrier's function fails as the
// victim of a deadlock does.
func TestF20RecordThatWasSeenIsNotForgottenByRestarts(t *testing.T) {
	t.Parallel()
	config := configOfOwnServer(t)
	b := setup(t, &setupOptions{database: config.ConnString()})
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	setStandbys(t, b.pool, "nobody")
	defer setStandbys(t, b.pool, "")
	const inSystem = "SET LOCAL allow_system_table_mods = on; SET LOCAL synchronous_commit = local;"
	// From PostgreSQL 17 on the function has a fourth argument, and need not be renamed.
	const rename = `DO $$ BEGIN IF to_regprocedure('pg_catalog.%[1]s(boolean, text, text)') IS NOT NULL THEN
		ALTER FUNCTION pg_catalog.%[1]s(boolean, text, text) RENAME TO %[2]s; END IF; END $$;`
	b.exec(t, inSystem+fmt.Sprintf(rename, "pg_logical_emit_message", "real_emit_message")+`
		CREATE FUNCTION pg_catalog.pg_logical_emit_message(boolean, text, text) RETURNS pg_lsn LANGUAGE plpgsql AS $$ BEGIN RAISE SQLSTATE '40001'; END $$`)
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
	b.exec(t, inSystem+"DROP FUNCTION pg_catalog.pg_logical_emit_message(boolean, text, text);"+fmt.Sprintf(rename, "real_emit_message", "pg_logical_emit_message"))
	if n := b.effects(t); n != 1 {
		t.Errorf("%d effects, want 1", n)
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
