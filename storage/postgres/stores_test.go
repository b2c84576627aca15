package postgres_test

import (
	"context"
	"errors"
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

// Requests without a key have nothing in common: none waits for or blocks another.
func TestKeylessRequestsRunSideBySide(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	keyless := idempotency.Request{Key: idempotency.Key{Scope: "acme"}}
	want(t, b.do(t, keyless, func(ctx context.Context, _ pgx.Tx) int {
		effect(ctx, t)
		want(t, b.do(t, keyless, pay(t, 201)), idempotency.OutcomeExecuted, "")
		return 201
	}), idempotency.OutcomeExecuted, "")
	if n := b.effects(t); n != 2 {
		t.Errorf("%d effects, want 2", n)
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

// More faults that Check finds. The connection itself simulates a standby and a role without
// rights.
func TestCheckFindsWhatIsWrongToo(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		sql  string
		want error
		says string
	}{
		"a standby": {`CREATE SCHEMA fake; CREATE FUNCTION fake.pg_is_in_recovery() RETURNS boolean LANGUAGE sql AS 'SELECT true';
			SET search_path = fake, public, pg_catalog`, postgres.ErrNotPrimary, "connect to the primary"},
		"no right to see the version": {"SET ROLE pg_monitor", postgres.ErrSchemaOutdated, "GRANT SELECT"},
		"remote_write":                {"SET synchronous_commit = remote_write", postgres.ErrCommitNotDurable, "Configure"},
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

// These are no faults: a newer schema, which an older program must survive; and behind a pooler a
// connection without the settings, which come with each claim.
func TestCheckPassesWhatIsRight(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		sql   string
		store *postgres.Options
	}{
		"a newer schema":  {"UPDATE idempotency_migrations SET version = version + 1", nil},
		"behind a pooler": {"SET synchronous_commit = off", &postgres.Options{TransactionPooling: true}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, &setupOptions{store: c.store, configure: func(c *pgxpool.Config) { c.MaxConns = 1 }})
			if _, err := b.pool.Exec(context.Background(), c.sql); err != nil {
				t.Fatal(err)
			}
			if err := b.store.Check(context.Background()); err != nil {
				t.Error(err)
			}
		})
	}
}

// The reaper uses only the database's clock: it sends no time.
func TestReaperSendsNoTime(t *testing.T) {
	t.Parallel()
	var sent []string
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) {
		c.ConnConfig.Tracer = argumentTracer(func(sql string, arguments []any) {
			if !strings.Contains(sql, "DELETE FROM") {
				return
			}
			for _, argument := range arguments {
				sent = append(sent, fmt.Sprintf("%T", argument))
			}
		})
	}})
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	if _, err := b.store.DeleteExpired(context.Background()); err != nil {
		t.Fatal(err)
	}
	// The first page, the last, and the lock's number.
	if fmt.Sprint(sent) != "[pgx.QueryExecMode string string int64]" {
		t.Errorf("the batch was sent with %v", sent)
	}
}

type argumentTracer func(sql string, arguments []any)

func (f argumentTracer) TraceQueryStart(ctx context.Context, _ *pgx.Conn, data pgx.TraceQueryStartData) context.Context {
	f(data.SQL, data.Args)
	return ctx
}

func (argumentTracer) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

// The server notices a client that vanished: each connection sets keep-alives, except behind a
// pooler.
func TestConfigureAsksForKeepAlives(t *testing.T) {
	t.Parallel()
	for pooling, want := range map[bool][3]string{false: {"30", "10", "3"}, true: {}} {
		config, err := pgxpool.ParseConfig("host=/nowhere")
		if err != nil {
			t.Fatal(err)
		}
		postgres.Configure(config, &postgres.Options{TransactionPooling: pooling})
		params := config.ConnConfig.RuntimeParams
		if got := [3]string{params["tcp_keepalives_idle"], params["tcp_keepalives_interval"], params["tcp_keepalives_count"]}; got != want {
			t.Errorf("pooling %v: keep-alives %q, want %q", pooling, got, want)
		}
	}
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

// A look-up does not use them either, also if the config went through Configure for one, for the
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
	// Statements that are prepared already refer to the table by its number.
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
	want(t, <-duplicate, idempotency.OutcomeInProgress, idempotency.ReasonInProgress) // it held no lock, and saw no record
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeReplayed, "")
}
