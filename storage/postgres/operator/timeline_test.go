package operator_test

import (
	"strings"
	"testing"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// The timeline has all events in order: the record, the lock, the acts. (Of requests: package
// history.)
func TestTimelineOfARecord(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	k := key("canary")
	kinds := func() (kinds []string) {
		t.Helper()
		events, err := b.operator.Timeline(t.Context(), k)
		if err != nil {
			t.Fatal(err)
		}
		for i, e := range events {
			kinds = append(kinds, string(e.Kind))
			if i > 0 && e.At.Before(events[i-1].At) {
				t.Errorf("%v comes after %v", e, events[i-1])
			}
			if !e.Attempt.IsZero() == (e.Kind == operator.EventRunning) || (e.Actor == "alice" && e.Reason == "ticket 7" && e.Role != "") != strings.HasPrefix(string(e.Kind), "act-") {
				t.Errorf("%+v", e)
			}
		}
		return kinds
	}
	want := func(want ...string) {
		t.Helper()
		if got := kinds(); strings.Join(got, " ") != strings.Join(want, " ") {
			t.Errorf("timeline is %v, want %v", got, want)
		}
	}
	want()
	finish := b.Running(t, k)
	want("running")
	finish()
	want("recorded", "expires")
	if _, err := b.operator.Expire(t.Context(), k, act); err != nil {
		t.Fatal(err)
	}
	want("recorded", "expired", "act-expire")
	if _, err := b.operator.Delete(t.Context(), k, act); err != nil {
		t.Fatal(err)
	}
	want("act-expire", "act-delete")
	b.do(t, k, 201)
	want("act-expire", "act-delete", "recorded", "expires")
	b.Exec(t, `INSERT INTO idempotency_audit (action, actor, reason, scope, key, attempt_id, status, record_created_at, record_expires_at)
		SELECT 'delete', 'alice', 'ticket 7', 'acme', 'many', gen_random_uuid(), 201, now(), now() FROM generate_series(1, $1)`, operator.EventsMax+1)
	k = key("many")
	if got := kinds(); len(got) != operator.EventsMax {
		t.Errorf("%d events, want %d", len(got), operator.EventsMax)
	}
	_, err := b.operator.Timeline(t.Context(), idempotency.Key{Value: "canary"})
	wantError(t, err, operator.ErrInvalid)
	if err := migrations.DownTo(t.Context(), b.Store, postgres.SchemaVersion, nil); err != nil {
		t.Fatal(err)
	}
	k = key("canary")
	want("recorded", "expires")
}
