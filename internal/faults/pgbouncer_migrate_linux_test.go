package faults_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

// A migration sets search_path, timeouts and a lock for its session. A pooler that shares server
// connections would pass them on to other clients: Up detects it before it changes anything.
func TestF31MigrationThroughAPoolerThatHandsConnectionsOnIsRefused(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		settings    string
		connections int
		others      int // clients that use the pooler meanwhile
	}{
		"transaction mode":                   {"pool_mode = transaction", 8, 0},
		"transaction mode, beside others":    {"pool_mode = transaction", 8, 6},
		"transaction mode, round robin":      {"pool_mode = transaction\nserver_round_robin = 1", 8, 3},
		"transaction mode, one connection":   {"pool_mode = transaction", 1, 0},
		"transaction mode, settings ignored": {"pool_mode = transaction\nignore_startup_parameters = search_path,lock_timeout,statement_timeout", 8, 0},
		"statement mode":                     {"pool_mode = statement", 8, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := startBouncerIn(t, test.settings, test.connections, nil)
			stop := b.busy(t, test.others)
			pool := b.open(t)
			for call, migrate := range map[string]func(context.Context, migrations.Store, *migrations.Options) error{"Up": migrations.Up, "Down": migrations.Down} {
				err := migrate(t.Context(), postgres.New(pool, &postgres.Options{Schema: "payments"}), nil)
				if !errors.Is(err, migrations.ErrPoolerInBetween) || !strings.Contains(err.Error(), "connect to PostgreSQL itself") {
					t.Errorf("%s: %v; want ErrPoolerInBetween, and what to do", call, err)
				}
			}
			if version, err := migrations.Version(t.Context(), postgres.New(pool, &postgres.Options{Schema: "payments"}), nil); version != 0 || err != nil {
				t.Errorf("a look at the version, which holds nothing: %d, %v", version, err)
			}
			stop()
			if n := count(t, b.direct, "SELECT count(*) FROM pg_namespace WHERE nspname = 'payments'"); n != 0 {
				t.Error("the schema was made")
			}
			b.nothingIsLeft(t, test.connections)

			// The remedy.
			direct, err := pgxpool.New(t.Context(), b.direct)
			if err != nil {
				t.Fatal(err)
			}
			defer direct.Close()
			if err := migrations.Up(t.Context(), postgres.New(direct, &postgres.Options{Schema: "payments"}), nil); err != nil {
				t.Errorf("on PostgreSQL itself: %v", err)
			}
		})
	}
}

// In session mode a client has a server connection to itself. It is reset before the next client
// gets it, by us if not by the pooler. A plain proxy is no pooler.
func TestF31MigrationThroughAPoolerInSessionMode(t *testing.T) {
	t.Parallel()
	for name, settings := range map[string]string{"as it comes": "", "which resets nothing": "\nserver_reset_query ="} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const connections = 8
			b := startBouncerIn(t, "pool_mode = session"+settings, connections, nil)
			stop := b.busy(t, 3)
			pool := b.open(t)
			for range 3 {
				if err := migrations.Up(t.Context(), postgres.New(pool, &postgres.Options{Schema: "payments"}), nil); err != nil {
					t.Error(err)
				}
			}
			stop()
			b.nothingIsLeft(t, connections)
			proxied, err := pgxpool.New(t.Context(), b.proxy.URL(b.direct))
			if err != nil {
				t.Fatal(err)
			}
			defer proxied.Close()
			if err := migrations.Down(t.Context(), postgres.New(proxied, &postgres.Options{Schema: "payments"}), nil); err != nil {
				t.Errorf("through a proxy: %v", err)
			}
		})
	}
}

func (b *bouncer) open(t *testing.T) *pgxpool.Pool {
	t.Helper()
	pool, err := pgxpool.New(t.Context(), b.url+"&default_query_exec_mode=exec")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return pool
}

// busy lets clients use the pooler until stop is called.
func (b *bouncer) busy(t *testing.T, clients int) (stop func()) {
	t.Helper()
	var stopped atomic.Bool // canceling a context could make PgBouncer cancel another client's statement
	var running sync.WaitGroup
	for range clients {
		conn, err := pgx.Connect(t.Context(), b.url+"&default_query_exec_mode=exec")
		if err != nil {
			t.Fatal(err)
		}
		running.Go(func() {
			defer func() { _ = conn.Close(context.Background()) }()
			for !stopped.Load() {
				if _, err := conn.Exec(context.Background(), "SELECT pg_sleep(0.001)"); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	stop = sync.OnceFunc(func() { stopped.Store(true); running.Wait() })
	t.Cleanup(stop)
	return stop
}

// nothingIsLeft checks server connections as other clients get them, and all locks.
func (b *bouncer) nothingIsLeft(t *testing.T, connections int) {
	t.Helper()
	const settings = `SELECT string_agg(name || '=' || setting, ' ' ORDER BY name) FROM pg_settings WHERE name IN
		('statement_timeout', 'lock_timeout', 'idle_in_transaction_session_timeout', 'search_path')`
	var want string
	query(t, b.direct, &want, settings)
	for range connections {
		conn, err := pgx.Connect(t.Context(), b.url+"&default_query_exec_mode=simple_protocol")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(context.WithoutCancel(t.Context()))
		var got string
		if err := conn.QueryRow(t.Context(), settings).Scan(&got); err != nil {
			t.Fatal(err)
		}
		if got != want {
			t.Errorf("another client finds %s, want %s", got, want)
		}
	}
	if n := count(t, b.direct, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"); n != 0 {
		t.Errorf("%d advisory locks are left", n)
	}
}
