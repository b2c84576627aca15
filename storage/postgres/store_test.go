package postgres_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

// A service that runs without its migrations learns the remedy from its first request.
func TestMissingTableIsUnavailable(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	if _, err := b.pool.Exec(context.Background(), "DROP TABLE idempotency_keys"); err != nil {
		t.Fatal(err)
	}
	result := b.do(t, request("k", ""), pay(t, 201))
	want(t, result, idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
	if text := fmt.Sprint(result.Err); !strings.Contains(text, "run the migrations") {
		t.Errorf("the error names no remedy: %s", text)
	}
}

// The service may start before its first migration; its connections work as soon as the table
// exists.
func TestMigrationAfterConnect(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns = 1 }})
	if err := migrations.Down(ctx, postgres.New(b.pool, nil), nil); err != nil {
		t.Fatal(err)
	}
	b.pool.Reset()
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
	if err := migrations.Up(ctx, postgres.New(b.pool, nil), nil); err != nil {
		t.Fatal(err)
	}
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
}

func TestSchemasAreApart(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{store: &postgres.Options{Schema: "payments"}})
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeReplayed, "")
	if n := b.count(t, "SELECT count(*) FROM payments.idempotency_keys"); n != 1 {
		t.Errorf("%d records, want 1", n)
	}
}

func TestOptionsThatCannotWorkPanic(t *testing.T) {
	t.Parallel()
	pool, err := pgxpool.New(context.Background(), "host=/nowhere")
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	panics := func(do func()) (text string) {
		defer func() { text, _ = recover().(string) }()
		do()
		return ""
	}
	for _, opts := range []*postgres.Options{
		{Schema: "Public"}, {Schema: "a.b"}, {Schema: `a"b`}, {Schema: "1a"}, {Schema: "pg_x"}, {Schema: strings.Repeat("a", 64)},
		{Isolation: "chaos"}, {AcquireTimeout: -1}, {LockTimeout: time.Microsecond}, {PrepareTimeout: time.Microsecond}, {SynchronousCommit: "off"},
		{IdleInTransactionTimeout: postgres.IdleInTransactionTimeoutMax},
	} {
		if text := panics(func() { postgres.New(pool, opts) }); !strings.HasPrefix(text, "idempotency/postgres: ") {
			t.Errorf("%+v: %q", opts, text)
		}
	}
	for _, opts := range []*postgres.Options{nil, {Schema: strings.Repeat("a", 63)}, {Isolation: pgx.Serializable}, {LockTimeout: time.Millisecond}, {PrepareTimeout: time.Millisecond}, {IdleInTransactionTimeout: postgres.IdleInTransactionTimeoutMax - 1}} {
		if text := panics(func() { postgres.New(pool, opts) }); text != "" {
			t.Errorf("%+v: %q", opts, text)
		}
	}
	// The handler's timeout must fit into PostgreSQL's limit for an idle transaction.
	store := postgres.New(pool, nil)
	if text := panics(func() {
		idempotency.NewEngine(store, &idempotency.Options{Timeouts: idempotency.Timeouts{Handler: 16 * time.Second}})
	}); !strings.Contains(text, "IdleInTransactionTimeout") {
		t.Errorf("a handler timeout of 16 s: %q", text)
	}
	if text := panics(func() {
		idempotency.NewEngine(store, &idempotency.Options{Timeouts: idempotency.Timeouts{Handler: 15 * time.Second}})
	}); text != "" {
		t.Errorf("a handler timeout of 15 s: %q", text)
	}
	// The commit's timeout too: from PostgreSQL 17 on the same limit holds for the whole
	// transaction.
	if text := panics(func() {
		idempotency.NewEngine(store, &idempotency.Options{Timeouts: idempotency.Timeouts{Commit: 11 * time.Second}})
	}); !strings.Contains(text, "Timeouts.Commit of 11s") {
		t.Errorf("a commit timeout of 11 s: %q", text)
	}
	if text := panics(func() {
		idempotency.NewEngine(store, &idempotency.Options{Timeouts: idempotency.Timeouts{Commit: 10 * time.Second}})
	}); text != "" {
		t.Errorf("a commit timeout of 10 s: %q", text)
	}
}

// An expired key is a replay while its row exists, and a new run afterwards.
func TestExpiredKey(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	b := setup(t, nil)
	short, long := request("short", ""), request("long", "")
	short.TTL, long.TTL = time.Second, time.Hour
	want(t, b.do(t, short, pay(t, 201)), idempotency.OutcomeExecuted, "")
	want(t, b.do(t, long, pay(t, 201)), idempotency.OutcomeExecuted, "")
	if n, err := b.store.DeleteExpired(ctx); n != 0 || err != nil {
		t.Fatalf("%d deleted before their time, %v", n, err)
	}
	if _, err := b.pool.Exec(ctx, "SELECT pg_sleep(1.1)"); err != nil { // by the clock that counts
		t.Fatal(err)
	}
	want(t, b.do(t, short, pay(t, 201)), idempotency.OutcomeReplayed, "")
	if n, err := b.store.DeleteExpired(ctx); n != 1 || err != nil {
		t.Fatalf("%d deleted, %v", n, err)
	}
	want(t, b.do(t, short, pay(t, 201)), idempotency.OutcomeExecuted, "")
	want(t, b.do(t, long, pay(t, 201)), idempotency.OutcomeReplayed, "")
	if n, err := b.store.DeleteExpired(ctx); n != 0 || err != nil { // the fresh row lives
		t.Fatalf("%d deleted, %v", n, err)
	}
}

// Two stores on one pool differ in their statements; those of one are prepared, those of the other
// are sent as text.
func TestTwoStoresOnOnePool(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	want(t, b.do(t, request("a", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	b.store = postgres.New(b.pool, &postgres.Options{Isolation: pgx.Serializable})
	want(t, b.do(t, request("b", ""), func(ctx context.Context, tx pgx.Tx) int {
		var level string
		if err := tx.QueryRow(ctx, "SHOW transaction_isolation").Scan(&level); err != nil || level != "serializable" {
			t.Errorf("isolation %q, %v", level, err)
		}
		return 201
	}), idempotency.OutcomeExecuted, "")
	want(t, b.do(t, request("a", ""), pay(t, 201)), idempotency.OutcomeReplayed, "")
}

// Two services on one database that pass a key along don't block each other: each has a table of
// its own.
func TestStoresOfTwoSchemasDoNotBlockEachOther(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	ctx := context.Background()
	if err := migrations.Up(ctx, postgres.New(b.pool, &postgres.Options{Schema: "payments"}), nil); err != nil {
		t.Fatal(err)
	}
	other := idempotency.NewEngine(postgres.New(b.pool, &postgres.Options{Schema: "payments"}), nil)
	want(t, b.do(t, request("k", ""), func(context.Context, pgx.Tx) int {
		want(t, other.Do(ctx, request("k", ""), func(context.Context) (*idempotency.Answer, error) {
			return answer(201), nil
		}), idempotency.OutcomeExecuted, "")
		return 201
	}), idempotency.OutcomeExecuted, "")
	for _, table := range []string{"public.idempotency_keys", "payments.idempotency_keys"} {
		if n := b.count(t, "SELECT count(*) FROM "+table); n != 1 {
			t.Errorf("%d records in %s, want 1", n, table)
		}
	}
}

// The transaction can write, whatever the database's default. On a standby, where it can't, the
// claim fails at once.
func TestTransactionIsReadWriteWhateverTheDefault(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) {
		c.ConnConfig.RuntimeParams["default_transaction_read_only"] = "on"
	}})
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	want(t, b.do(t, request("declined", ""), pay(t, 402)), idempotency.OutcomeExecuted, "")
	want(t, b.do(t, request("", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
}

// Stores of two schemas may share a pool: neither uses the prepared statements of the other.
func TestStoresOfTwoSchemasShareAPool(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	ctx := context.Background()
	if err := migrations.Up(ctx, postgres.New(b.pool, &postgres.Options{Schema: "payments"}), nil); err != nil {
		t.Fatal(err)
	}
	payments := postgres.New(b.pool, &postgres.Options{Schema: "payments"})
	for schema, store := range map[string]*postgres.Store{"public": b.store, "payments": payments} {
		engine := idempotency.NewEngine(store, nil)
		for _, outcome := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed} {
			want(t, engine.Do(ctx, request(schema, ""), func(context.Context) (*idempotency.Answer, error) {
				return answer(201), nil
			}), outcome, "")
		}
		if n := b.count(t, "SELECT count(*) FROM "+schema+".idempotency_keys WHERE key = $1", schema); n != 1 {
			t.Errorf("%d records in %s, want 1", n, schema)
		}
	}
}

// A look-up does not use them either, even if the config went through Configure for one, for the
// other, and for the first again.
func TestLookUpIsInTheStoresOwnSchema(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	payments := &postgres.Options{Schema: "payments"}
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) {
		c.MaxConns = 1
		postgres.Configure(c, payments)
		postgres.Configure(c, nil)
	}})
	if err := migrations.Up(ctx, postgres.New(b.pool, &postgres.Options{Schema: "payments"}), nil); err != nil {
		t.Fatal(err)
	}
	b.pool.Reset()
	for range 2 { // recorded, and replayed
		for body, store := range map[string]*postgres.Store{"public": b.store, "payments": postgres.New(b.pool, payments)} {
			for range 2 {
				result := idempotency.NewEngine(store, nil).Do(ctx, request("k", ""), func(context.Context) (*idempotency.Answer, error) {
					return &idempotency.Answer{Status: 201, Body: []byte(body)}, nil
				})
				if result.Answer == nil || string(result.Answer.Body) != body {
					t.Errorf("%s: %+v", body, result)
				}
			}
		}
	}
}

// A pool connects before the first migration, which may run on one of its connections.
func TestPoolConnectsBeforeTheFirstMigration(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	b := setup(t, nil)
	if err := migrations.Down(ctx, postgres.New(b.pool, nil), nil); err != nil {
		t.Fatal(err)
	}
	b.pool.Reset()
	if err := b.pool.Ping(ctx); err != nil {
		t.Error(err)
	}
}

// The same key in another scope is another request.
func TestScopesAreApart(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	for _, scope := range []string{"acme", "globex"} {
		req := request("k", "")
		req.Key.Scope = scope
		want(t, b.do(t, req, pay(t, 201)), idempotency.OutcomeExecuted, "")
		want(t, b.do(t, req, pay(t, 201)), idempotency.OutcomeReplayed, "")
	}
	if n := b.effects(t); n != 2 {
		t.Errorf("%d effects, want 2", n)
	}
}

// The look-up is younger than the lock. A duplicate whose look-up began before the first attempt's
// commit finds nothing; it must not find the lock free afterwards, or its handler runs too. A gate
// in the look-up holds it at that very place.
func TestLookUpIsYoungerThanTheLock(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	ctx := context.Background()
	if _, err := b.pool.Exec(ctx, `
		ALTER TABLE idempotency_keys RENAME TO kept_keys;
		CREATE FUNCTION gate() RETURNS boolean LANGUAGE plpgsql AS $$
		BEGIN PERFORM pg_advisory_lock_shared(42); PERFORM pg_advisory_unlock_shared(42); RETURN true; END $$;
		CREATE VIEW idempotency_keys AS WITH gate AS MATERIALIZED (SELECT gate()) SELECT * FROM kept_keys WHERE EXISTS (SELECT FROM gate);
		CREATE RULE keep AS ON INSERT TO idempotency_keys DO INSTEAD INSERT INTO kept_keys VALUES (NEW.*) RETURNING *`); err != nil {
		t.Fatal(err)
	}
	// Statements that were prepared earlier refer to the table by its number, so they would miss
	// the change.
	b.pool.Reset()
	gate, err := pgx.ConnectConfig(ctx, b.pool.Config().ConnConfig)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = gate.Close(ctx) }()
	duplicate := make(chan idempotency.Result, 1)
	want(t, b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
		effect(ctx, t)
		if _, err := gate.Exec(context.Background(), "SELECT pg_advisory_lock(42)"); err != nil {
			t.Error(err)
		}
		go func() {
			duplicate <- b.do(t, request("k", ""), func(context.Context, pgx.Tx) int {
				t.Error("the handler ran twice")
				return 500
			})
		}()
		for waiting := 0; waiting == 0; {
			if err := tx.QueryRow(ctx, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 42 AND NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())").Scan(&waiting); err != nil {
				t.Error(err)
				break
			}
			time.Sleep(time.Millisecond)
		}
		return 201
	}), idempotency.OutcomeExecuted, "")
	if _, err := gate.Exec(ctx, "SELECT pg_advisory_unlock(42)"); err != nil {
		t.Fatal(err)
	}
	// The duplicate got no lock, and saw no record.
	want(t, <-duplicate, idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeReplayed, "")
}

// Two stores with different schemas share one connection, on which Configure installs its hooks
// twice.
func TestTwoStoresShareAPoolOfOneConnection(t *testing.T) {
	t.Parallel()
	const second = "second"
	b := setup(t, &setupOptions{configure: func(config *pgxpool.Config) {
		config.MaxConns = 1
		postgres.Configure(config, &postgres.Options{Schema: second})
	}})
	if err := migrations.Up(t.Context(), postgres.New(b.pool, &postgres.Options{Schema: second}), nil); err != nil {
		t.Fatal(err)
	}
	stores := []*postgres.Store{b.store, postgres.New(b.pool, &postgres.Options{Schema: second})}
	for round := range 3 {
		outcome := idempotency.OutcomeReplayed
		if round == 0 {
			outcome = idempotency.OutcomeExecuted
		}
		for _, store := range stores {
			engine := idempotency.NewEngine(store, nil)
			for _, key := range []string{"a", "b"} {
				want(t, engine.Do(t.Context(), request(key, "10"), func(ctx context.Context) (*idempotency.Answer, error) {
					effect(ctx, t)
					return answer(201), nil
				}), outcome, "")
			}
		}
	}
	if n := b.effects(t); n != 4 {
		t.Errorf("%d effects of two keys in two stores", n)
	}
}
