package migrations_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

// role makes a role that can log in and has the privileges, and returns a pool of its connections.
func (b *testBundle) role(t *testing.T, grants ...string) *pgxpool.Pool {
	t.Helper()
	name := "test_" + strings.ReplaceAll(uuid.NewString(), "-", "")
	b.exec(t, "CREATE ROLE "+name+" LOGIN PASSWORD '"+name+"'")
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), waitMax)
		defer cancel()
		for _, sql := range []string{"DROP OWNED BY " + name, "DROP ROLE " + name} {
			if _, err := b.pool.Exec(ctx, sql); err != nil {
				t.Errorf("%s: %v", sql, err)
			}
		}
	})
	for _, grant := range grants {
		b.exec(t, "GRANT "+grant+" TO "+name)
	}
	return open(t, b.url, func(config *pgxpool.Config) {
		config.ConnConfig.User, config.ConnConfig.Password = name, name
		postgres.Configure(config, nil)
	})
}

// wantDenied requires that a statement is refused because a privilege is missing.
func wantDenied(t *testing.T, pool *pgxpool.Pool, sql string) {
	t.Helper()
	_, err := pool.Exec(t.Context(), sql)
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) || pgErr.Code != "42501" {
		t.Errorf("%s: %v; want SQLSTATE 42501", sql, err)
	}
}

// A service needs only SELECT and INSERT: it never updates or deletes a record.
func TestServiceNeedsOnlySelectAndInsert(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.up(t, nil)
	service := b.role(t, "SELECT, INSERT ON idempotency_keys", "SELECT ON idempotency_migrations")
	wantKeeps(t, service, nil)
	engine := idempotency.NewEngine(postgres.New(service, nil), nil)
	for _, want := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed} {
		if got := do(t.Context(), engine, "declined", 402); got.Outcome != want {
			t.Errorf("a decline is %s, %v; want %s", got.Outcome, got.Err, want)
		}
	}
	if got := do(t.Context(), engine, "forgotten", 503); got.Outcome != idempotency.OutcomeNotExecuted || got.Err != nil {
		t.Errorf("a 503 is %s, %v", got.Outcome, got.Err)
	}
	for _, sql := range []string{
		"UPDATE idempotency_keys SET trace_id = ''", "DELETE FROM idempotency_keys", "TRUNCATE idempotency_keys",
		"DROP TABLE idempotency_keys", "UPDATE idempotency_migrations SET version = 0",
	} {
		wantDenied(t, service, sql)
	}
	if version, err := migrations.Version(t.Context(), b.on(service), nil); version != migrations.Latest || err != nil {
		t.Errorf("the service reads version %d, %v", version, err)
	}
	if err := migrations.Up(t.Context(), b.on(service), nil); err != nil {
		t.Errorf("an Up with nothing to do fails: %v", err)
	}
}

// Without SELECT on the version table a service works, and Check names the missing grant.
func TestCheckNamesTheMissingGrant(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.up(t, nil)
	service := b.role(t, "SELECT, INSERT ON idempotency_keys")
	err := postgres.New(service, nil).Check(t.Context())
	if err == nil || !strings.Contains(err.Error(), "GRANT SELECT ON public.idempotency_migrations") {
		t.Errorf("Check says %v", err)
	}
}

// If a role is not allowed to migrate, the error names the missing privilege, and nothing is half
// made.
func TestUpWithoutPrivilege(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(t, "REVOKE CREATE ON SCHEMA public FROM PUBLIC") // PostgreSQL 14 grants it
	for _, schema := range []string{"public", "payments"} {
		b.schema = schema
		err := migrations.Up(t.Context(), b.on(b.role(t)), nil)
		if err == nil || !strings.HasPrefix(err.Error(), "migrate: ") || !strings.Contains(err.Error(), "42501") {
			t.Errorf("error is %v; want SQLSTATE 42501", err)
		}
	}
	b.wantTables(t)
}

// The reaper needs SELECT and DELETE. It is not allowed to change a record.
func TestReaperNeedsSelectAndDelete(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.up(t, nil)
	engine := idempotency.NewEngine(postgres.New(b.pool, nil), nil)
	for _, key := range []string{"expired", "fresh"} {
		if got := do(t.Context(), engine, key, 201); got.Outcome != idempotency.OutcomeExecuted {
			t.Fatal(got.Err)
		}
	}
	b.exec(t, "UPDATE idempotency_keys SET expires_at = now() - interval '1 second' WHERE key = 'expired'")

	_, err := postgres.New(b.role(t, "SELECT ON idempotency_keys"), nil).DeleteExpired(t.Context())
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) || pgErr.Code != "42501" || !strings.Contains(err.Error(), "GRANT SELECT, DELETE ON") {
		t.Errorf("with SELECT alone: %v; want SQLSTATE 42501 and its remedy", err)
	}
	reaper := b.role(t, "SELECT, DELETE ON idempotency_keys")
	if deleted, err := postgres.New(reaper, nil).DeleteExpired(t.Context()); deleted != 1 || err != nil {
		t.Errorf("%d deleted, %v; want 1", deleted, err)
	}
	if left := b.strings(t, "SELECT key FROM idempotency_keys"); !slices.Equal(left, []string{"fresh"}) {
		t.Errorf("left are %v", left)
	}
	for _, sql := range []string{
		"UPDATE idempotency_keys SET status = 200", "UPDATE idempotency_keys SET trace_id = NULL", "SELECT FROM idempotency_keys FOR UPDATE",
		"INSERT INTO idempotency_keys DEFAULT VALUES", "TRUNCATE idempotency_keys",
	} {
		wantDenied(t, reaper, sql)
	}
}

// A version that row-level security hides is not taken for 0: Down would do nothing, and Version
// would return 0.
func TestHiddenVersionIsNotNone(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.up(t, nil)
	b.exec(t, "ALTER TABLE idempotency_migrations ENABLE ROW LEVEL SECURITY")
	service := b.role(t, "SELECT ON idempotency_migrations")
	for name, err := range map[string]error{
		"Up": migrations.Up(t.Context(), b.on(service), nil), "Down": migrations.Down(t.Context(), b.on(service), nil),
		"Version": func() error { _, err := migrations.Version(t.Context(), b.on(service), nil); return err }(),
	} {
		if err == nil || !strings.Contains(err.Error(), "DISABLE ROW LEVEL SECURITY") {
			t.Errorf("%s: %v", name, err)
		}
	}
	b.exec(t, "ALTER TABLE idempotency_migrations DISABLE ROW LEVEL SECURITY") // the remedy
	if version, err := migrations.Version(t.Context(), b.on(service), nil); version != migrations.Latest || err != nil {
		t.Errorf("after the remedy: version %d, %v", version, err)
	}
}
