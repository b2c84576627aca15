package operator_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// rightsOfAnOperator are those of the package's documentation, and the right to delete audit rows
// by age.
var rightsOfAnOperator = []string{
	"SELECT, DELETE, UPDATE (expires_at) ON idempotency_keys", "SELECT, INSERT, DELETE ON idempotency_audit", "SELECT, DELETE ON idempotency_events",
	"SELECT ON idempotency_migrations", "pg_monitor",
}

// A row that row-level security hides is never reported as absent: each look-up and each act fails
// instead, with the remedy. Each of the doctor's two remedies works.
func TestHiddenRowsAreNotCalledAbsent(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	calls := map[string]func(o *operator.Operator) error{
		"get":  func(o *operator.Operator) error { _, err := o.Get(ctx, key("canary")); return err },
		"body": func(o *operator.Operator) error { _, err := o.Body(ctx, key("canary")); return err },
		"list": func(o *operator.Operator) error {
			_, err := o.List(ctx, operator.Filter{}, operator.Page{})
			return err
		},
		"recent":   func(o *operator.Operator) error { _, err := o.Recent(ctx, 0); return err },
		"timeline": func(o *operator.Operator) error { _, err := o.Timeline(ctx, key("canary")); return err },
		"stats":    func(o *operator.Operator) error { _, err := o.Stats(ctx); return err },
		"version":  func(o *operator.Operator) error { _, _, err := o.Version(ctx); return err },
		"expire":   func(o *operator.Operator) error { _, err := o.Expire(ctx, key("canary"), act); return err },
		"gc": func(o *operator.Operator) error {
			_, err := o.GC(ctx, &operator.GCOptions{AuditAgeMax: time.Hour})
			return err
		},
		"delete": func(o *operator.Operator) error { _, err := o.Delete(ctx, key("canary"), act); return err },
	}
	for _, test := range []struct {
		table, policy string
		fail          string // the calls that must fail
	}{
		{"idempotency_keys", "", "get body list recent timeline stats expire gc delete"},
		// With this policy nothing is deleted.
		{"idempotency_keys", "FOR SELECT USING (true)", "get body list recent timeline stats expire gc delete"},
		{"idempotency_audit", "FOR INSERT WITH CHECK (true)", "timeline expire gc delete"},
		{"idempotency_events", "", "timeline gc"},
		{"idempotency_migrations", "", "version"},
	} {
		for way := range 2 {
			t.Run(strings.Join([]string{test.table, test.policy, []string{"DISABLE", "BYPASSRLS"}[way]}, " "), func(t *testing.T) {
				t.Parallel()
				b := setup(t, nil)
				b.do(t, key("canary"), 201)
				b.Exec(t, "INSERT INTO idempotency_events (at, duration_us, outcome, attempts, scope, key) VALUES (now(), 1, 'replayed', 1, 'acme', 'canary')")
				b.Exec(t, `INSERT INTO idempotency_audit (action, actor, reason, scope, key, attempt_id, status, record_created_at, record_expires_at)
					VALUES ('expire', 'alice', 'r', 'acme', 'canary', gen_random_uuid(), 201, now(), now())`)
				b.Exec(t, "ALTER TABLE "+test.table+" ENABLE ROW LEVEL SECURITY")
				if test.policy != "" {
					b.Exec(t, "CREATE POLICY p ON "+test.table+" "+test.policy)
				}
				o := b.role(t, rightsOfAnOperator...)
				for name, call := range calls {
					err := call(o)
					switch fails := contains(strings.Fields(test.fail), name); {
					case fails:
						wantError(t, err, postgres.ErrRowSecurityActive)
						if err != nil && (!strings.Contains(err.Error(), "DISABLE ROW LEVEL SECURITY") || !strings.Contains(err.Error(), "BYPASSRLS")) {
							t.Errorf("%s names no remedy: %v", name, err)
						}
					case name == "expire" || name == "delete": // one of them may have come first
						if err != nil && !errors.Is(err, operator.ErrNotFound) {
							t.Errorf("%s: %v", name, err)
						}
					case err != nil && !errors.Is(err, operator.ErrNotFound):
						t.Errorf("%s: %v", name, err)
					}
				}
				if n := b.Count(t, "SELECT count(*) FROM idempotency_keys"); n != 1 && contains(strings.Fields(test.fail), "delete") {
					t.Error("the record is gone")
				}
				var remedies []string
				for _, finding := range o.Doctor(ctx) {
					if finding.Check == "row-security" && finding.Level == operator.LevelFail {
						remedies = strings.Split(finding.Remedy, ", or ")
					}
				}
				if len(remedies) != 2 {
					t.Fatalf("the doctor names %d remedies: %q", len(remedies), remedies)
				}
				b.Exec(t, remedies[way])
				b.Engine.Do(ctx, testservice.Request(key("canary")), b.effect) // there again, if it was deleted
				if worst, text := levels(o.Doctor(ctx)); worst["row-security"] != operator.LevelOK {
					t.Errorf("after %s:\n%s", remedies[way], text)
				}
				for name, call := range calls {
					if err := call(o); err != nil && !errors.Is(err, operator.ErrNotFound) {
						t.Errorf("after %s, %s: %v", remedies[way], name, err)
					}
				}
			})
		}
	}
}

// The tables' owner, who sees all rows, runs the doctor, which finds the service that does not.
func TestDoctorFindsTheRoleThatSeesNothing(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.Exec(t, "ALTER TABLE idempotency_keys ENABLE ROW LEVEL SECURITY")
	if worst, text := levels(b.operator.Doctor(t.Context())); worst["row-security"] != operator.LevelOK || !strings.Contains(text, "bypasses") {
		t.Errorf("without a role that it concerns:\n%s", text)
	}
	b.role(t, "SELECT, INSERT ON idempotency_keys")
	worst, text := levels(b.operator.Doctor(t.Context()))
	if worst["row-security"] != operator.LevelFail || !strings.Contains(text, "ALTER ROLE test_") {
		t.Errorf("with a service that sees nothing:\n%s", text)
	}
}
