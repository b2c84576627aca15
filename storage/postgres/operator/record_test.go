package operator_test

import (
	"context"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

func TestGetTellsWhatTheRecordHolds(t *testing.T) {
	t.Parallel()
	for _, schema := range []string{"public", "payments"} {
		b := setupIn(t, schema, nil)
		k := key("canary")
		b.do(t, k, 201)
		state, err := b.operator.Get(t.Context(), k)
		if err != nil || state.Record == nil || state.Holder != nil {
			t.Fatalf("%+v, %v", state, err)
		}
		r := state.Record
		want := operator.Record{
			Key: k, Status: 201, Fingerprint: testservice.Request(k).Fingerprint, Attempt: r.Attempt, TraceID: "trace-canary", CreatedAt: r.CreatedAt, ExpiresAt: r.ExpiresAt,
			BodyBytes: 4, Header: map[string][]string{"Content-Type": {"text/plain"}, "Vary": {"A", "B"}},
		}
		if !reflect.DeepEqual(*r, want) || r.Attempt.IsZero() || !soon(r.CreatedAt) || !soon(state.Now) || r.ExpiresAt.Sub(r.CreatedAt) < 24*time.Hour {
			t.Errorf("%+v, want %+v", *r, want)
		}
		if body, err := b.operator.Body(t.Context(), k); string(body) != "done" || err != nil {
			t.Errorf("body %q, %v", body, err)
		}
	}
}

func TestGetOfAKeyThatNobodyUsed(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	_, err := b.operator.Get(t.Context(), key("canary"))
	wantError(t, err, operator.ErrNotFound)
	_, err = b.operator.Body(t.Context(), key("canary"))
	wantError(t, err, operator.ErrNotFound)
	_, err = b.operator.Get(t.Context(), idempotency.Key{Scope: "acme", Value: "canary canary"})
	wantError(t, err, operator.ErrInvalid)
}

// While the handler runs there is no record, and the result names the session that holds the key.
func TestGetOfARunningAttempt(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	k := key("canary")
	finish := b.Running(t, k)
	state, err := b.operator.Get(t.Context(), k)
	if err != nil || state.Record != nil || state.Holder == nil {
		t.Fatalf("%+v, %v", state, err)
	}
	if h := state.Holder; h.PID == 0 || !soon(h.Since) || h.Age < 0 || h.State != "idle in transaction" {
		t.Errorf("%+v", h)
	}
	if other, err := b.operator.Get(t.Context(), key("other")); err == nil {
		t.Errorf("another key: %+v", other)
	}
	if result := finish(); result.Outcome != idempotency.OutcomeExecuted {
		t.Fatal(result.Err)
	}
	if state, err := b.operator.Get(t.Context(), k); err != nil || state.Record == nil || state.Holder != nil {
		t.Errorf("afterwards: %+v, %v", state, err)
	}
}

// A record with unreadable headers is shown all the same.
func TestGetOfACorruptRecord(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.do(t, key("canary"), 201)
	b.Exec(t, `UPDATE idempotency_keys SET headers = '\x09'`)
	state, err := b.operator.Get(t.Context(), key("canary"))
	if err != nil || state.Record == nil || state.Record.HeaderErr == nil || state.Record.Header != nil {
		t.Errorf("%+v, %v", state, err)
	}
}

func TestBodyAtItsLimit(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.do(t, key("canary"), 201)
	b.Exec(t, `UPDATE idempotency_keys SET body = convert_to(repeat('x', $1), 'UTF8')`, operator.BodyBytesMax)
	if body, err := b.operator.Body(t.Context(), key("canary")); len(body) != operator.BodyBytesMax || err != nil {
		t.Errorf("%d bytes, %v", len(body), err)
	}
	b.Exec(t, `UPDATE idempotency_keys SET body = body || 'x'`)
	_, err := b.operator.Body(t.Context(), key("canary"))
	wantError(t, err, operator.ErrTooLarge)
}

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
