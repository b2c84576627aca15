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

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

// Open comes before the first migration. Until then a request fails closed: its handler does not
// run.
func TestOpenThenMigrateThenPay(t *testing.T) {
	t.Parallel()
	store, err := postgres.Open(t.Context(), pgtest.Database(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Close)
	b := &testBundle{pool: store.Pool(), store: store, wire: &wire{}}
	b.exec(t, "CREATE TABLE effects (id bigserial PRIMARY KEY, name text NOT NULL, attempt_id uuid)")
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
	if n := b.effects(t); n != 0 {
		t.Errorf("%d effects before the migrations", n)
	}
	if err := store.Check(t.Context()); !errors.Is(err, postgres.ErrSchemaOutdated) || !strings.Contains(err.Error(), "run the migrations") {
		t.Errorf("check before the migrations: %v", err)
	}
	if err := migrations.Up(t.Context(), store, nil); err != nil {
		t.Fatal(err)
	}
	if err := store.Check(t.Context()); err != nil {
		t.Errorf("check after the migrations: %v", err)
	}
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeReplayed, "")
	if n := b.effects(t); n != 1 {
		t.Errorf("%d effects, want 1", n)
	}
}

// A connection that was made before the tables has nothing prepared. The first migration ends it.
func TestConnectionsAreMadeAnewAfterTheFirstMigration(t *testing.T) {
	t.Parallel()
	store, err := postgres.Open(t.Context(), pgtest.Database(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	b := &testBundle{pool: store.Pool()}
	const prepared = "SELECT count(*) FROM pg_prepared_statements WHERE name LIKE 'idempotency_%' AND statement LIKE '%INSERT INTO%'"
	if n := b.count(t, prepared); n != 0 {
		t.Errorf("%d of our INSERTs are prepared before the migrations", n)
	}
	for range 2 { // the second changes nothing, and ends no connection
		if err := migrations.Up(t.Context(), store, nil); err != nil {
			t.Fatal(err)
		}
		if n := b.count(t, prepared); n == 0 {
			t.Error("our INSERT is not prepared")
		}
	}
	if n := store.Pool().Stat().NewConnsCount(); n != 2 {
		t.Errorf("%d connections were made, want 2", n)
	}
}

// Errors name the remedy. None has a part of the address, which may be the password.
func TestOpenNamesTheRemedyAndNotTheAddress(t *testing.T) {
	t.Parallel()
	const secret = "c0rrect-horse"
	server := pgtest.TLS(t)
	good, err := url.Parse(server.TLSURL("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	with := func(change func(*url.URL)) string {
		changed := *good
		change(&changed)
		return changed.String()
	}
	silent, err := net.Listen("tcp", "127.0.0.1:0") // accepts, and never answers
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = silent.Close() })
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := closed.Addr().String()
	_ = closed.Close()

	quick := &postgres.Options{AcquireTimeout: 500 * time.Millisecond, StatementTimeout: 500 * time.Millisecond}
	for name, c := range map[string]struct {
		address string
		opts    *postgres.Options
		says    string
	}{
		"not an address":          {"payments at " + secret, nil, "postgres://user:password@host"},
		"a password with a /":     {"postgres://samuel:" + secret + "/@db/payments", nil, "%2F"},
		"a password with a %":     {"postgres://samuel:%zz" + secret + "@db/payments", nil, "%2F"},
		"a pool size of none":     {"postgres://samuel:" + secret + "@db/payments?pool_max_conns=none", nil, "can't be parsed"},
		"another password":        {with(func(u *url.URL) { u.User = url.UserPassword(good.User.Username(), secret) }), nil, "pg_hba.conf"},
		"another role":            {with(func(u *url.URL) { u.User = url.UserPassword("samuel", secret) }), nil, "pg_hba.conf"},
		"no such database":        {with(func(u *url.URL) { u.Path = "/samuels-payments" }), nil, "CREATE DATABASE"},
		"no such setting":         {with(func(u *url.URL) { u.RawQuery += "&pay_day=1" }), nil, "TransactionPooling"},
		"nobody listens":          {"postgres://samuel:" + secret + "@" + nobody + "/payments", nil, "the server runs"},
		"nobody answers":          {"postgres://samuel:" + secret + "@" + silent.Addr().String() + "/payments?sslmode=disable", quick, "in time"},
		"a server without TLS":    {"postgres://samuel:" + secret + "@" + nobody + "/payments?sslmode=require", nil, "sslmode"},
		"settings said twice":     {with(func(u *url.URL) { u.RawQuery += "&statement_timeout=3000" }), nil, "Options.StatementTimeout"},
		"sessions without an end": {with(func(u *url.URL) { u.RawQuery += "&idle_in_transaction_session_timeout=0" }), nil, "Configure"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			store, err := postgres.Open(t.Context(), c.address, c.opts)
			if err == nil {
				store.Close()
				t.Fatal("it is open")
			}
			text := err.Error()
			if !strings.HasPrefix(text, "open: ") || !strings.Contains(text, c.says) {
				t.Errorf("got %q, want it to say %q", text, c.says)
			}
			password, _ := good.User.Password()
			for _, hidden := range []string{secret, password, "samuel", "payments?"} {
				if strings.Contains(text, hidden) {
					t.Errorf("%q has %q", text, hidden)
				}
			}
		})
	}
}

// A database that can't keep the promises is refused, unless only the migrations are missing.
func TestOpenRefusesWhatCheckFinds(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		sql  string
		want error
	}{
		"unlogged": {"ALTER TABLE idempotency_keys SET UNLOGGED", postgres.ErrTableUnlogged},
		"a rule":   {"CREATE RULE skip AS ON INSERT TO idempotency_keys DO INSTEAD NOTHING", postgres.ErrTableUnsafe},
		"old":      {"UPDATE idempotency_migrations SET version = 1", nil},
		"dirty":    {"UPDATE idempotency_migrations SET dirty = true", nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, nil)
			b.exec(t, c.sql)
			store, err := postgres.Open(t.Context(), b.pool.Config().ConnString(), &postgres.Options{PoolConfig: func(config *pgxpool.Config) {
				config.ConnConfig.RuntimeParams["application_name"] = "opened"
			}})
			if !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			if err == nil {
				store.Close()
			}
			// Its pool is closed in either case.
			b.awaitNone(t, "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'opened' AND datname = current_database()")
		})
	}
}

// Close closes the pool that Open made, and no other.
func TestCloseLeavesTheCallersPoolOpen(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.store.Close()
	if err := b.pool.Ping(t.Context()); err != nil {
		t.Errorf("the caller's pool: %v", err)
	}
	store, err := postgres.Open(t.Context(), b.pool.Config().ConnString(), nil)
	if err != nil {
		t.Fatal(err)
	}
	store.Close()
	store.Close()
	if err := store.Pool().Ping(t.Context()); err == nil {
		t.Error("the store's own pool is open")
	}
}

// PoolConfig comes before Configure, which keeps its hooks and completes it.
func TestOpenCallsPoolConfig(t *testing.T) {
	t.Parallel()
	connects := make(chan struct{}, 10)
	store, err := postgres.Open(t.Context(), pgtest.Database(t), &postgres.Options{Schema: "payments", PoolConfig: func(config *pgxpool.Config) {
		config.MaxConns = 3
		config.BeforeConnect = func(context.Context, *pgx.ConnConfig) error { connects <- struct{}{}; return nil }
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	if got := store.Pool().Config().MaxConns; got != 3 {
		t.Errorf("the pool has %d connections at most", got)
	}
	if store.Schema() != "payments" {
		t.Errorf("the schema is %s", store.Schema())
	}
	<-connects
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
			if err := migrations.Up(t.Context(), postgres.New(b.pool, nil), nil); err != nil { // in public too
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
