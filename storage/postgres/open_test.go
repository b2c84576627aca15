package postgres_test

import (
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
	b := &testBundle{pool: store.Pool(), store: store}
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
		"unlogged": {"ALTER TABLE idempotency_effects SET UNLOGGED; ALTER TABLE idempotency_open SET UNLOGGED; ALTER TABLE idempotency_keys SET UNLOGGED", postgres.ErrTableUnlogged},
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
