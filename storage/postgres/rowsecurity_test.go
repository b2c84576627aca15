package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/storage/postgres"
)

// role creates a role with only these rights, and returns its name.
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

// as returns a store on the same database, with connections of the role.
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
	return &testBundle{pool: pool, store: postgres.New(pool, opts)}
}

// rightsOfAService and rightsOfAReaper are those of docs/guarantees.md, and those of the tests'
// handlers.
var (
	rightsOfAService = []string{"SELECT, INSERT ON idempotency_keys", "SELECT ON idempotency_migrations", "SELECT, INSERT ON effects", "USAGE ON SEQUENCE effects_id_seq"}
	rightsOfAReaper  = []string{"SELECT, DELETE ON idempotency_keys"}
)

// Check finds nothing after either of its two remedies.
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
				_, text, ok := strings.Cut(err.Error(), postgres.ErrRowSecurityActive.Error()+": ")
				remedies := strings.Split(text, ", or ")
				if !errors.Is(err, postgres.ErrRowSecurityActive) || errors.Is(err, postgres.ErrSchemaOutdated) || !ok || len(remedies) != 2 {
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

// A reaper from which policies may hide rows deletes those it sees, and reports that there may be
// more.
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
	if n, err := b.store.DeleteExpired(t.Context()); n != 1 || !errors.Is(err, postgres.ErrRowSecurityActive) || !strings.Contains(err.Error(), "BYPASSRLS") {
		t.Errorf("%d deleted, %v", n, err)
	}
	if _, err := b.store.Statistics(t.Context()); !errors.Is(err, postgres.ErrRowSecurityActive) {
		t.Errorf("statistics of what is seen: %v", err)
	}
	owner.exec(t, "ALTER ROLE "+role+" BYPASSRLS") // its connection has older plans
	if stats, err := b.store.Statistics(t.Context()); stats.Records != 1 || err != nil {
		t.Errorf("%+v, %v", stats, err)
	}
	if n, err := b.store.DeleteExpired(t.Context()); n != 1 || err != nil {
		t.Errorf("%d deleted, %v", n, err)
	}
}

// policies let a service record, and hide all records, those of an unnamed tenant, or none.
var policies = map[string]string{
	"insert alone":        "FOR INSERT WITH CHECK (true)",
	"the handler's":       "USING (scope = current_setting('app.tenant', true)) WITH CHECK (true)",
	"none that it denies": "USING (true)",
}

// A claim from which policies may hide the record runs nothing and reports why; a record that it
// sees is replayed. The remedy in its error works, even on connections that were open before.
func TestClaimThatMayNotSeeTheRecordRunsNothing(t *testing.T) {
	t.Parallel()
	for name, policy := range policies {
		for _, remedy := range []string{"ALTER TABLE public.idempotency_keys DISABLE ROW LEVEL SECURITY", "ALTER ROLE ... BYPASSRLS"} {
			for _, known := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s, %s, known %t", name, strings.Fields(remedy)[1], known), func(t *testing.T) {
					t.Parallel()
					owner := setup(t, nil)
					role := owner.role(t, rightsOfAService...)
					b := owner.as(t, role, nil, func(c *pgxpool.Config) { c.MaxConns = 1 })
					recorder := owner
					if known { // to this process, so that it looks before it claims
						recorder = b
					}
					want(t, recorder.do(t, request("recorded", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
					owner.exec(t, "ALTER TABLE idempotency_keys ENABLE ROW LEVEL SECURITY")
					owner.exec(t, "CREATE POLICY p ON idempotency_keys "+policy)
					run := func(context.Context, pgx.Tx) int {
						t.Error("the handler ran")
						return 201
					}
					for _, key := range []string{"recorded", "fresh", "recorded"} {
						if name == "none that it denies" && key == "recorded" {
							want(t, b.do(t, request(key, ""), run), idempotency.OutcomeReplayed, "")
							continue
						}
						result := b.do(t, request(key, ""), run)
						want(t, result, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
						if !errors.Is(result.Err, postgres.ErrRowSecurityActive) || !strings.Contains(result.Err.Error(), remedy) {
							t.Errorf("the log says %v", result.Err)
						}
					}
					owner.exec(t, strings.Replace(remedy, "...", role, 1))
					want(t, b.do(t, request("recorded", ""), run), idempotency.OutcomeReplayed, "")
					want(t, b.do(t, request("fresh", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
					want(t, b.do(t, request("fresh", ""), run), idempotency.OutcomeReplayed, "")
					if n := owner.effects(t); n != 2 {
						t.Errorf("%d effects, want 2", n)
					}
				})
			}
		}
	}
}

// A plan that was made with policies keeps them after ALTER ROLE ... BYPASSRLS, while
// row_security_active reports that none applies: on a connection that met policies no statement
// stays prepared.
func TestPlanWithPoliciesDoesNotOutliveThem(t *testing.T) {
	t.Parallel()
	run := func(context.Context, pgx.Tx) int {
		t.Error("the handler ran")
		return 201
	}
	for name, meet := range map[string]func(t *testing.T, b *testBundle){
		"when it connected": func(t *testing.T, b *testBundle) { b.pool.Reset() },
		"in a claim": func(t *testing.T, b *testBundle) {
			want(t, b.do(t, request("seen", ""), run), idempotency.OutcomeReplayed, "")
		},
		"in a look before the claim": func(t *testing.T, b *testBundle) {
			want(t, b.do(t, request("seen", ""), run), idempotency.OutcomeReplayed, "")
			want(t, b.do(t, request("seen", ""), run), idempotency.OutcomeReplayed, "")
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			owner := setup(t, nil)
			role := owner.role(t, rightsOfAService...)
			b := owner.as(t, role, nil, func(c *pgxpool.Config) { c.MaxConns = 1 })
			for _, key := range []string{"seen", "hidden"} {
				want(t, owner.do(t, request(key, ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
			}
			b.count(t, "SELECT 1") // connected before
			owner.exec(t, "ALTER TABLE idempotency_keys ENABLE ROW LEVEL SECURITY")
			owner.exec(t, "CREATE POLICY p ON idempotency_keys USING (key = 'seen')")
			meet(t, b)
			b.count(t, "SELECT 1") // connected while they apply
			owner.exec(t, "ALTER ROLE "+role+" BYPASSRLS")
			want(t, b.do(t, request("hidden", ""), run), idempotency.OutcomeReplayed, "")
		})
	}
}

// If row-level security hides the record of a lost COMMIT, the outcome is unknown. A retry finds it
// once it is visible again.
func TestLostCommitThatMayNotBeSeenIsUnknown(t *testing.T) {
	t.Parallel()
	owner := setup(t, nil)
	role := owner.role(t, rightsOfAService...)
	owner.exec(t, "ALTER TABLE idempotency_keys ENABLE ROW LEVEL SECURITY")
	owner.exec(t, "ALTER ROLE "+role+" BYPASSRLS")
	var lost atomic.Bool
	b := owner.as(t, role, nil, func(c *pgxpool.Config) {
		lose := onLost(pgfault.Fault{Kind: pgfault.CutAfter})
		through(t, c.ConnConfig, func(commit pgfault.Commit) pgfault.Fault {
			lost.Store(true)
			return lose(commit)
		})
		c.BeforeConnect = func(context.Context, *pgx.ConnConfig) error {
			if lost.Swap(false) { // committed, and the resolver comes
				owner.exec(t, "ALTER ROLE "+role+" NOBYPASSRLS")
			}
			return nil
		}
	})
	result := b.do(t, request("lost", ""), pay(t, 201))
	want(t, result, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
	if !errors.Is(result.Err, postgres.ErrRowSecurityActive) {
		t.Errorf("the log says %v", result.Err)
	}
	owner.exec(t, "ALTER ROLE "+role+" BYPASSRLS")
	want(t, b.do(t, request("lost", ""), pay(t, 201)), idempotency.OutcomeReplayed, "")
	if n := owner.effects(t); n != 1 {
		t.Errorf("%d effects, want 1", n)
	}
}

// Above READ COMMITTED an attempt that leaves no record looks again before it reports not-executed.
// If row-level security may hide the record, the outcome is unknown.
func TestLookAgainThatMayNotSeeIsUnknown(t *testing.T) {
	t.Parallel()
	owner := setup(t, nil)
	role := owner.role(t, rightsOfAService...)
	owner.exec(t, "ALTER TABLE idempotency_keys ENABLE ROW LEVEL SECURITY")
	b := owner.as(t, role, &postgres.Options{Isolation: pgx.RepeatableRead})
	for _, status := range []int{500, 201} {
		owner.exec(t, "ALTER ROLE "+role+" BYPASSRLS")
		result := b.do(t, request(fmt.Sprint(status), ""), func(ctx context.Context, tx pgx.Tx) int {
			owner.exec(t, "ALTER ROLE "+role+" NOBYPASSRLS")
			if status == 201 { // which then can't commit
				if _, err := tx.Exec(ctx, "SET LOCAL client_encoding = 'LATIN1'"); err != nil {
					t.Error(err)
				}
			}
			return status
		})
		want(t, result, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
		if !errors.Is(result.Err, postgres.ErrRowSecurityActive) {
			t.Errorf("%d: the log says %v", status, result.Err)
		}
	}
}
