package postgres_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

// U+FF0D and U+2212 are one character in EUC_JP: two accounts would share a record.
func TestEncodingThatMakesOneScopeOfTwoIsRefused(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	admin := setup(t, nil)
	name := "euc_" + strings.ReplaceAll(uuid.NewString(), "-", "")
	create := func(name, how string) string {
		admin.exec(t, "CREATE DATABASE "+name+" "+how)
		t.Cleanup(func() { admin.exec(t, "DROP DATABASE "+name+" WITH (FORCE)") })
		address, err := url.Parse(admin.pool.Config().ConnString())
		if err != nil {
			t.Fatal(err)
		}
		address.Path = "/" + name
		return address.String()
	}
	b := setup(t, &setupOptions{database: create(name, "ENCODING 'EUC_JP' LOCALE 'C' TEMPLATE template0")})
	for _, scope := range []string{"\uff0d", "\u2212"} {
		req := request("k", "")
		req.Key.Scope = scope
		want(t, b.do(t, req, pay(t, 201)), idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
	}
	if n := b.effects(t); n != 0 {
		t.Errorf("%d effects, want none", n)
	}
	err := b.store.Check(ctx)
	if !errors.Is(err, postgres.ErrEncodingUnsafe) {
		t.Fatalf("got %v", err)
	}
	_, remedy, _ := strings.Cut(err.Error(), "CREATE DATABASE ... ")
	b = setup(t, &setupOptions{database: create(name+"_2", remedy)})
	if err := b.store.Check(ctx); err != nil {
		t.Errorf("in a database made as it says: %v", err)
	}
	for i, scope := range []string{"\uff0d", "\u2212"} {
		req := request("k", "")
		req.Key.Scope = scope
		want(t, b.do(t, req, pay(t, 201)), idempotency.OutcomeExecuted, "")
		if n := b.effects(t); n != i+1 {
			t.Errorf("%d effects, want %d", n, i+1)
		}
	}
}

// Check compares a connection with the store's options, whoever made the pool.
func TestCheckFindsAPoolThatWasConfiguredOtherwise(t *testing.T) {
	t.Parallel()
	param := func(name, value string) func(*pgxpool.Config) {
		return func(config *pgxpool.Config) { config.ConnConfig.RuntimeParams[name] = value }
	}
	mode := func(mode pgx.QueryExecMode) func(*pgxpool.Config) {
		return func(config *pgxpool.Config) { config.ConnConfig.DefaultQueryExecMode = mode }
	}
	for name, c := range map[string]struct {
		configured, store *postgres.Options
		after             func(*pgxpool.Config) // after Configure
		want              error
		says              string
	}{
		"statement_timeout":          {nil, &postgres.Options{StatementTimeout: 7 * time.Second}, nil, postgres.ErrNotConfigured, "statement_timeout is 10s, and Options.StatementTimeout says 7s"},
		"lock_timeout":               {&postgres.Options{LockTimeout: time.Second}, nil, nil, postgres.ErrNotConfigured, "lock_timeout is 1s, and Options.LockTimeout says 5s"},
		"idle in transaction":        {nil, &postgres.Options{IdleInTransactionTimeout: 50 * time.Second}, nil, postgres.ErrNotConfigured, "idle_in_transaction_session_timeout is 20s, and Options.IdleInTransactionTimeout says 50s"},
		"synchronous_commit":         {nil, &postgres.Options{SynchronousCommit: "remote_apply"}, nil, postgres.ErrNotConfigured, "synchronous_commit is on, and Options.SynchronousCommit says remote_apply"},
		"a stronger one":             {&postgres.Options{SynchronousCommit: "remote_apply"}, nil, nil, postgres.ErrNotConfigured, "synchronous_commit is remote_apply, and Options.SynchronousCommit says on"},
		"an address of its own":      {nil, nil, param("lock_timeout", "1234"), postgres.ErrNotConfigured, "lock_timeout is 1.234s"},
		"client_encoding":            {nil, nil, param("client_encoding", "LATIN1"), postgres.ErrNotConfigured, "client_encoding is LATIN1"},
		"another schema":             {&postgres.Options{Schema: "payments"}, nil, nil, postgres.ErrNotConfigured, "another schema"},
		"another isolation level":    {nil, &postgres.Options{Isolation: pgx.Serializable}, nil, postgres.ErrNotConfigured, "isolation level"},
		"a pooler's, without one":    {&postgres.Options{TransactionPooling: true}, nil, nil, postgres.ErrSessionUnbounded, "lock_timeout is 0s"},
		"one without, and a pooler":  {nil, &postgres.Options{TransactionPooling: true}, nil, postgres.ErrNotConfigured, "pgx.QueryExecModeExec"},
		"a mode that describes":      {&postgres.Options{TransactionPooling: true}, &postgres.Options{TransactionPooling: true}, mode(pgx.QueryExecModeDescribeExec), postgres.ErrNotConfigured, "pgx.QueryExecModeExec"},
		"a pooler's, for a pooler":   {&postgres.Options{TransactionPooling: true}, &postgres.Options{TransactionPooling: true, LockTimeout: time.Second}, nil, nil, ""},
		"a mode that caches, for it": {&postgres.Options{TransactionPooling: true}, &postgres.Options{TransactionPooling: true}, mode(pgx.QueryExecModeCacheDescribe), nil, ""},
		"the same":                   {&postgres.Options{LockTimeout: time.Second}, &postgres.Options{LockTimeout: time.Second}, nil, nil, ""},
		"both, one after the other":  {&postgres.Options{Schema: "payments"}, nil, func(config *pgxpool.Config) { postgres.Configure(config, nil) }, nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, &setupOptions{store: &postgres.Options{Schema: "payments"}})
			// Migrate the schema public too.
			if err := migrations.Up(t.Context(), postgres.New(b.pool, nil), nil); err != nil {
				t.Fatal(err)
			}
			config, err := pgxpool.ParseConfig(b.pool.Config().ConnString())
			if err != nil {
				t.Fatal(err)
			}
			postgres.Configure(config, c.configured)
			if c.after != nil {
				c.after(config)
			}
			pool, err := pgxpool.NewWithConfig(t.Context(), config)
			if err != nil {
				t.Fatal(err)
			}
			defer pool.Close()
			err = postgres.New(pool, c.store).Check(t.Context())
			if !errors.Is(err, c.want) || err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want %v with %q", err, c.want, c.says)
			}
		})
	}
}

// A server that is too old is refused. The wire says 13 in place of the version that the server
// sends.
func TestCheckRefusesAnOldServer(t *testing.T) {
	t.Parallel()
	old := func(config *pgxpool.Config) {
		dial := config.ConnConfig.DialFunc
		config.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dial(ctx, network, address)
			return &oldServer{conn}, err
		}
	}
	b := setup(t, &setupOptions{configure: old})
	if err := b.store.Check(t.Context()); !errors.Is(err, postgres.ErrServerOutdated) || !strings.Contains(err.Error(), "version 13: upgrade it") {
		t.Errorf("check: %v", err)
	}
	_, err := postgres.Open(t.Context(), b.pool.Config().ConnString(), &postgres.Options{PoolConfig: old})
	if !errors.Is(err, postgres.ErrServerOutdated) {
		t.Errorf("open: %v", err)
	}
}

type oldServer struct{ net.Conn }

func (c *oldServer) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	name := []byte("server_version\x00")
	if at := bytes.Index(p[:n], name); at >= 0 {
		copy(p[at+len(name):n], "13")
	}
	return n, err
}

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
		// The connection itself simulates a standby and a role without rights.
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
