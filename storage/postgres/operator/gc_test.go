package operator_test

import (
	"testing"
	"time"

	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// GC deletes exactly the rows that are old enough.
func TestGC(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.plant(t, "acme", 100)
	b.Exec(t, "UPDATE idempotency_keys SET expires_at = now() - interval '1 second' WHERE key LIKE '%7'")
	b.Exec(t, `INSERT INTO idempotency_events (at, duration_us, outcome, attempts, scope, key)
		SELECT now() - n * interval '1 day', 1, 'replayed', 1, 'acme', 'k' FROM generate_series(0, 99) AS n`)
	b.Exec(t, `INSERT INTO idempotency_audit (at, action, actor, reason, scope, key, attempt_id, status, record_created_at, record_expires_at)
		SELECT now() - n * interval '1 day', 'delete', 'alice', 'r', 'acme', 'k', gen_random_uuid(), 201, now(), now() FROM generate_series(0, 9) AS n`)
	b.Exec(t, `CREATE TABLE archive () INHERITS (idempotency_events); INSERT INTO archive SELECT * FROM ONLY idempotency_events`)
	for _, test := range []struct {
		options *operator.GCOptions
		want    operator.GCResult
	}{
		{&operator.GCOptions{EventsAgeMax: -1}, operator.GCResult{Records: 10}},
		{nil, operator.GCResult{Events: 70}}, // those of 30 days and more
		{&operator.GCOptions{AuditAgeMax: 5 * 24 * time.Hour}, operator.GCResult{Audit: 5}},
		{&operator.GCOptions{EventsAgeMax: 24 * time.Hour}, operator.GCResult{Events: 29}},
	} {
		var told []operator.GCProgress
		if test.options != nil {
			test.options.Progress = func(p operator.GCProgress) { told = append(told, p) }
		}
		got, err := b.operator.GC(t.Context(), test.options)
		if err != nil || got != test.want {
			t.Errorf("%+v: %+v, %v; want %+v", test.options, got, err, test.want)
		}
		if test.options != nil && (len(told) == 0 || told[0].Table != "idempotency_keys" || told[0].Pages != told[0].Of || told[0].Deleted != test.want.Records) {
			t.Errorf("progress %+v", told)
		}
	}
	if n := b.Count(t, "SELECT count(*) FROM archive"); n != 100 {
		t.Errorf("%d rows in a child of the history, want 100", n)
	}
	b.Exec(t, "DROP TABLE archive")
	if n := b.Count(t, "SELECT count(*) FROM idempotency_keys"); n != 90 {
		t.Errorf("%d records are left, want 90", n)
	}
	_, err := b.operator.GC(t.Context(), &operator.GCOptions{AuditAgeMax: -1})
	wantError(t, err, operator.ErrInvalid)
	if err := migrations.DownTo(t.Context(), b.Store, postgres.SchemaVersion, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := b.operator.GC(t.Context(), &operator.GCOptions{AuditAgeMax: time.Hour}); err != nil {
		t.Errorf("before migration 3: %v", err)
	}
}
