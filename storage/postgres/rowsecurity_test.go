package postgres_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres"
)

// role makes a role with the rights and no others, and returns its name.
func (b *testBundle) role(t *testing.T, grants ...string) string {
	t.Helper()
	name := "test_" + strings.ReplaceAll(uuid.NewString(), "-", "")
	b.exec(t, "CREATE ROLE "+name+" LOGIN PASSWORD '"+name+"'")
	t.Cleanup(func() {
		b.exec(t, "DROP OWNED BY "+name)
		b.exec(t, "DROP ROLE "+name)
	})
	for _, grant := range grants {
		b.exec(t, "GRANT "+grant+" TO "+name)
	}
	return name
}

// as returns a store on the same database, with connections of the role's.
func (b *testBundle) as(t *testing.T, role string, opts *postgres.Options, configure ...func(*pgxpool.Config)) *testBundle {
	t.Helper()
	config, err := pgxpool.ParseConfig(b.pool.Config().ConnString())
	if err != nil {
		t.Fatal(err)
	}
	config.ConnConfig.User, config.ConnConfig.Password = role, role
	postgres.Configure(config, opts)
	for _, change := range configure {
		change(config)
	}
	pool, err := pgxpool.NewWithConfig(context.Background(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return &testBundle{pool: pool, store: postgres.New(pool, opts), wire: &wire{}}
}

// rightsOfAService and of a reaper are those of docs/guarantees.md, and what the tests' handlers need.
var (
	rightsOfAService = []string{"SELECT, INSERT ON idempotency_keys", "SELECT ON idempotency_migrations", "SELECT, INSERT ON effects", "USAGE ON SEQUENCE effects_id_seq"}
	rightsOfAReaper  = []string{"SELECT, DELETE ON idempotency_keys"}
)

// Both remedies of Check's are run, and Check finds nothing after either.
func TestCheckFindsRowSecurity(t *testing.T) {
	t.Parallel()
	for _, table := range []string{"idempotency_keys", "idempotency_migrations"} {
		for way := range 2 {
			t.Run(table+[]string{" DISABLE", " BYPASSRLS"}[way], func(t *testing.T) {
				t.Parallel()
				owner := setup(t, nil)
				role := owner.role(t, rightsOfAService...)
				b := owner.as(t, role, nil)
				if err := b.store.Check(t.Context()); err != nil {
					t.Fatal(err)
				}
				owner.exec(t, "ALTER TABLE "+table+" ENABLE ROW LEVEL SECURITY")
				err := b.store.Check(t.Context())
				_, text, ok := strings.Cut(err.Error(), postgres.ErrRowSecurity.Error()+": ")
				remedies := strings.Split(text, ", or ")
				if !errors.Is(err, postgres.ErrRowSecurity) || errors.Is(err, postgres.ErrSchemaOutdated) || !ok || len(remedies) != 2 {
					t.Fatalf("got %v", err)
				}
				if err := owner.store.Check(t.Context()); err != nil {
					t.Errorf("for the owner, who sees all: %v", err)
				}
				owner.exec(t, remedies[way])
				if err := b.store.Check(t.Context()); err != nil {
					t.Errorf("after %s: %v", remedies[way], err)
				}
			})
		}
	}
}

// A reaper that may not see all deletes what it sees, and says that there may be more.
func TestReaperSaysThatRowsMayBeHidden(t *testing.T) {
	t.Parallel()
	owner := setup(t, nil)
	role := owner.role(t, rightsOfAReaper...)
	b := owner.as(t, role, nil, func(c *pgxpool.Config) { c.MaxConns = 1 })
	for _, key := range []string{"seen", "hidden"} {
		want(t, owner.do(t, request(key, ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	}
	owner.exec(t, "UPDATE idempotency_keys SET expires_at = now() - interval '1 second'")
	owner.exec(t, "ALTER TABLE idempotency_keys ENABLE ROW LEVEL SECURITY")
	owner.exec(t, "CREATE POLICY p ON idempotency_keys USING (key = 'seen')")
	if n, err := b.store.DeleteExpired(t.Context()); n != 1 || !errors.Is(err, postgres.ErrRowSecurity) || !strings.Contains(err.Error(), "BYPASSRLS") {
		t.Errorf("%d deleted, %v", n, err)
	}
	if _, err := b.store.Statistics(t.Context()); !errors.Is(err, postgres.ErrRowSecurity) {
		t.Errorf("statistics of what is seen: %v", err)
	}
	owner.exec(t, "ALTER ROLE "+role+" BYPASSRLS") // its connection has plans that were made before
	if stats, err := b.store.Statistics(t.Context()); stats.Records != 1 || err != nil {
		t.Errorf("%+v, %v", stats, err)
	}
	if n, err := b.store.DeleteExpired(t.Context()); n != 1 || err != nil {
		t.Errorf("%d deleted, %v", n, err)
	}
}
