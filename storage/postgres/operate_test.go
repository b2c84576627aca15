package postgres_test

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

func TestCheckFindsNothingWrong(t *testing.T) {
	t.Parallel()
	for _, opts := range []*postgres.Options{nil, {Schema: "payments"}, {SynchronousCommit: "remote_apply"}} {
		b := setup(t, &setupOptions{store: opts})
		if err := b.store.Check(context.Background()); err != nil {
			t.Error(err)
		}
	}
}

// A pool that was left as pgx makes it lets a handler write around its transaction.
func TestCheckFindsAPoolThatWasNotConfigured(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{cold: true})
	if err := b.store.Check(context.Background()); !errors.Is(err, postgres.ErrNotConfigured) || !strings.Contains(err.Error(), "Configure") {
		t.Errorf("got %v", err)
	}
}

// Check finds each fault and names its remedy.
func TestCheckFindsWhatIsWrong(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		sql  string
		want error
		says string
	}{
		"unlogged":     {"ALTER TABLE idempotency_keys SET UNLOGGED", postgres.ErrTableUnlogged, "SET LOGGED"},
		"missing":      {"DROP TABLE idempotency_keys", postgres.ErrSchemaOutdated, "run the migrations"},
		"old":          {"UPDATE idempotency_migrations SET version = 0", postgres.ErrSchemaOutdated, "version 0"},
		"dirty":        {"UPDATE idempotency_migrations SET dirty = true", postgres.ErrSchemaOutdated, "failed in the middle"},
		"no version":   {"DELETE FROM idempotency_migrations", postgres.ErrSchemaOutdated, "run the migrations"},
		"no versions":  {"DROP TABLE idempotency_migrations", postgres.ErrSchemaOutdated, "run the migrations"},
		"asynchronous": {"SET synchronous_commit = off", postgres.ErrCommitNotDurable, "Configure"},
		"local":        {"SET synchronous_commit = local", postgres.ErrCommitNotDurable, "Configure"},
		"unbounded":    {"SET idle_in_transaction_session_timeout = 0", postgres.ErrSessionUnbounded, "Configure"},
		"long":         {"SET idle_in_transaction_session_timeout = '61s'", postgres.ErrSessionUnbounded, "Configure"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns = 1 }})
			if _, err := b.pool.Exec(context.Background(), c.sql); err != nil {
				t.Fatal(err)
			}
			if err := b.store.Check(context.Background()); !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want %v with %q", err, c.want, c.says)
			}
		})
	}
}

// Check finds a table that may lose, change or scatter records, and the remedy in its error mends
// it.
func TestCheckNamesARemedyThatMendsTheTable(t *testing.T) {
	t.Parallel()
	const trigger = "CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$; CREATE TRIGGER skip BEFORE "
	// The steps of docs/operations.md.
	const plain = `BEGIN;
		ALTER TABLE public.idempotency_keys RENAME TO idempotency_keys_old;
		CREATE TABLE public.idempotency_keys (LIKE public.idempotency_keys_old INCLUDING ALL EXCLUDING INDEXES);
		INSERT INTO public.idempotency_keys SELECT * FROM public.idempotency_keys_old;
		DROP TABLE public.idempotency_keys_old;
		ALTER TABLE public.idempotency_keys ADD CONSTRAINT idempotency_keys_pkey PRIMARY KEY (scope, key);
		COMMIT`
	for name, c := range map[string]struct {
		sick   string
		want   error
		remedy string // in the error's text
		run    string // default: the remedy
	}{
		"a rule": {"CREATE RULE skip AS ON INSERT TO idempotency_keys DO INSTEAD NOTHING", postgres.ErrTableUnsafe, "DROP RULE skip ON public.idempotency_keys", ""},
		"a rule on DELETE, of a name that needs quotes": {`CREATE RULE "keep all" AS ON DELETE TO idempotency_keys DO INSTEAD NOTHING`, postgres.ErrTableUnsafe, `DROP RULE "keep all" ON public.idempotency_keys`, ""},
		"a BEFORE ROW trigger":                          {trigger + "INSERT ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION skip()", postgres.ErrTableUnsafe, "ALTER TABLE public.idempotency_keys DISABLE TRIGGER skip", ""},
		"one that fires always":                         {trigger + "INSERT ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION skip(); ALTER TABLE idempotency_keys ENABLE ALWAYS TRIGGER skip", postgres.ErrTableUnsafe, "ALTER TABLE public.idempotency_keys DISABLE TRIGGER skip", ""},
		"one on DELETE":                                 {trigger + "DELETE ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION skip()", postgres.ErrTableUnsafe, "ALTER TABLE public.idempotency_keys DISABLE TRIGGER skip", ""},
		"a child":                                       {"CREATE TABLE archive () INHERITS (idempotency_keys)", postgres.ErrTableUnsafe, "ALTER TABLE archive NO INHERIT public.idempotency_keys", ""},
		"no primary key":                                {"ALTER TABLE idempotency_keys DROP CONSTRAINT idempotency_keys_pkey", postgres.ErrSchemaOutdated, "ALTER TABLE public.idempotency_keys ADD CONSTRAINT idempotency_keys_pkey PRIMARY KEY (scope, key)", ""},
		"one of another name":                           {"ALTER TABLE idempotency_keys RENAME CONSTRAINT idempotency_keys_pkey TO k", postgres.ErrSchemaOutdated, "ALTER TABLE public.idempotency_keys RENAME CONSTRAINT k TO idempotency_keys_pkey", ""},
		"one on other columns":                          {"ALTER TABLE idempotency_keys DROP CONSTRAINT idempotency_keys_pkey, ADD CONSTRAINT idempotency_keys_pkey PRIMARY KEY (key, attempt_id)", postgres.ErrSchemaOutdated, "ALTER TABLE public.idempotency_keys DROP CONSTRAINT idempotency_keys_pkey, ADD CONSTRAINT idempotency_keys_pkey PRIMARY KEY (scope, key)", ""},
		"one that is deferrable":                        {"ALTER TABLE idempotency_keys DROP CONSTRAINT idempotency_keys_pkey, ADD CONSTRAINT idempotency_keys_pkey PRIMARY KEY (scope, key) DEFERRABLE INITIALLY DEFERRED", postgres.ErrSchemaOutdated, "ALTER TABLE public.idempotency_keys DROP CONSTRAINT idempotency_keys_pkey, ADD CONSTRAINT idempotency_keys_pkey PRIMARY KEY (scope, key)", ""},
		"a column that no record has":                   {"ALTER TABLE idempotency_keys ADD COLUMN \"Pay day\" date NOT NULL", postgres.ErrSchemaOutdated, `ALTER TABLE public.idempotency_keys ALTER COLUMN "Pay day" DROP NOT NULL`, ""},
		"no column headers":                             {"ALTER TABLE idempotency_keys DROP COLUMN headers", postgres.ErrSchemaOutdated, "no column headers", `ALTER TABLE idempotency_keys ADD COLUMN headers bytea NOT NULL`},
		"a partitioned table": {`ALTER TABLE idempotency_keys RENAME TO t; ALTER TABLE t RENAME CONSTRAINT idempotency_keys_pkey TO t_pkey;
			CREATE TABLE idempotency_keys (LIKE t INCLUDING ALL EXCLUDING INDEXES, CONSTRAINT idempotency_keys_pkey PRIMARY KEY (scope, key)) PARTITION BY HASH (scope);
			CREATE TABLE part PARTITION OF idempotency_keys FOR VALUES WITH (MODULUS 1, REMAINDER 0)`, postgres.ErrSchemaOutdated, "docs/operations.md", plain},
		"a view": {"ALTER TABLE idempotency_keys RENAME TO t; CREATE VIEW idempotency_keys AS SELECT * FROM t", postgres.ErrSchemaOutdated, "docs/operations.md", "DROP VIEW idempotency_keys; ALTER TABLE t RENAME TO idempotency_keys"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := context.Background()
			b := setup(t, nil)
			b.exec(t, c.sick)
			b.pool.Reset() // as a service that starts on such a table
			if err := b.store.Check(ctx); !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.remedy) {
				t.Errorf("got %v, want %v with %q", err, c.want, c.remedy)
			}
			if c.run == "" {
				c.run = c.remedy
			}
			b.exec(t, c.run)
			if err := b.store.Check(ctx); err != nil {
				t.Errorf("after the remedy: %v", err)
			}
			want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
			want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeReplayed, "")
		})
	}
}

// Rules and triggers that are disabled, or run after the row is written, are no error.
func TestCheckLeavesHarmlessTriggersAlone(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.exec(t, `CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
		CREATE TRIGGER off BEFORE INSERT ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION nothing();
		ALTER TABLE idempotency_keys DISABLE TRIGGER off;
		CREATE TRIGGER after_row AFTER INSERT ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION nothing();
		CREATE TRIGGER before_statement BEFORE INSERT ON idempotency_keys FOR EACH STATEMENT EXECUTE FUNCTION nothing();
		CREATE RULE off AS ON INSERT TO idempotency_keys DO INSTEAD NOTHING;
		ALTER TABLE idempotency_keys DISABLE RULE off`)
	if err := b.store.Check(context.Background()); err != nil {
		t.Error(err)
	}
}

func TestMissingTableIsUnavailable(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	if _, err := b.pool.Exec(context.Background(), "DROP TABLE idempotency_keys"); err != nil {
		t.Fatal(err)
	}
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
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

func TestConfigureSetsEachConnection(t *testing.T) {
	t.Parallel()
	traced, connected := atomic.Int64{}, atomic.Int64{}
	b := setup(t, &setupOptions{cold: true, configure: func(c *pgxpool.Config) {
		c.ConnConfig.RuntimeParams["lock_timeout"] = "1234"
		c.ConnConfig.RuntimeParams["synchronous_commit"] = "off"
		c.ConnConfig.Tracer = queryTracer(func() { traced.Add(1) })
		c.AfterConnect = func(context.Context, *pgx.Conn) error { connected.Add(1); return nil }
		postgres.Configure(c, &postgres.Options{StatementTimeout: 2 * time.Second})
	}})
	for name, value := range map[string]string{
		"synchronous_commit": "on", "lock_timeout": "1234ms", "statement_timeout": "2s", "idle_in_transaction_session_timeout": "20s",
	} {
		var got string
		if err := b.pool.QueryRow(context.Background(), "SELECT current_setting($1)", name).Scan(&got); err != nil || got != value {
			t.Errorf("%s is %q (%v), want %q", name, got, err, value)
		}
	}
	if traced.Load() == 0 || connected.Load() == 0 {
		t.Error("the hooks that were there before are not called")
	}
}

// A config that goes through Configure twice, with the same options or others, works as if it had
// gone once.
func TestConfigureTwice(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) {
		postgres.Configure(c, &postgres.Options{Isolation: pgx.Serializable})
		postgres.Configure(c, nil)
	}})
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeReplayed, "")
}

type queryTracer func()

func (f queryTracer) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	f()
	return ctx
}

func (queryTracer) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

// Behind a pooler settings come with each claim and go with its transaction.
func TestTransactionPoolingSetsEachTransaction(t *testing.T) {
	t.Parallel()
	opts := &postgres.Options{TransactionPooling: true, LockTimeout: 1500 * time.Millisecond}
	b := setup(t, &setupOptions{store: opts, configure: func(c *pgxpool.Config) {
		c.MaxConns = 1
		c.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeExec
	}})
	setting := func(ctx context.Context, q interface {
		QueryRow(context.Context, string, ...any) pgx.Row
	}) (value string) {
		if err := q.QueryRow(ctx, "SELECT current_setting('lock_timeout')").Scan(&value); err != nil {
			t.Error(err)
		}
		return value
	}
	for _, key := range []string{"k", ""} {
		want(t, b.do(t, request(key, ""), func(ctx context.Context, tx pgx.Tx) int {
			if got := setting(ctx, tx); got != "1500ms" {
				t.Errorf("lock_timeout is %s in the transaction", got)
			}
			return 201
		}), idempotency.OutcomeExecuted, "")
	}
	if got := setting(context.Background(), b.pool); got != "0" {
		t.Errorf("lock_timeout is %s after the transaction", got)
	}
	if n := b.count(t, "SELECT count(*) FROM pg_prepared_statements"); n != 0 {
		t.Errorf("%d statements are prepared", n)
	}
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

func TestReaperRunsUntilItIsStopped(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	ctx, cancel := context.WithCancel(context.Background())
	walks := make(chan error)
	stopped := make(chan struct{})
	reaper := postgres.NewReaper(b.store, &postgres.ReaperOptions{Interval: time.Millisecond, OnWalk: func(_ int64, _ time.Duration, err error) {
		select {
		case walks <- err:
		case <-ctx.Done():
		}
	}})
	go func() {
		defer close(stopped)
		reaper.Run(ctx)
	}()
	if err := <-walks; err != nil {
		t.Error(err)
	}
	if _, err := b.pool.Exec(context.Background(), "ALTER TABLE idempotency_keys RENAME TO elsewhere"); err != nil {
		t.Fatal(err)
	}
	var pgErr *pgconn.PgError
	for err := range walks {
		if errors.As(err, &pgErr) { // reported, and tried again
			break
		}
	}
	if _, err := b.pool.Exec(context.Background(), "ALTER TABLE elsewhere RENAME TO idempotency_keys"); err != nil {
		t.Fatal(err)
	}
	for err := range walks {
		if err == nil {
			break
		}
	}
	cancel()
	<-stopped
}

// DEALLOCATE ALL by other code, or a pooler's DISCARD ALL, drops our statements.
func TestStatementsThatWereDeallocatedAreSentAsText(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns = 1 }})
	want(t, b.do(t, request("a", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	if n := b.count(t, "SELECT count(*) FROM pg_prepared_statements WHERE name LIKE 'idempotency_%'"); n == 0 {
		t.Fatal("nothing of ours is prepared")
	}
	if _, err := b.pool.Exec(context.Background(), "DEALLOCATE ALL"); err != nil {
		t.Fatal(err)
	}
	// pgx's own statements are gone too; pgx has to mend that.
	idle := func(context.Context, pgx.Tx) int { return 201 }
	want(t, b.do(t, request("b", ""), idle), idempotency.OutcomeExecuted, "")
	want(t, b.do(t, request("b", ""), idle), idempotency.OutcomeReplayed, "")
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
