package operator_test

import (
	"testing"
	"time"

	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// A standby is no place for a service, and the doctor examines it all the same. (On a standby:
// package faults.)

func TestStatsCountWhatThereIs(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	if s, err := b.operator.Stats(t.Context()); err != nil || s.Live.Rows != 0 || s.Expired.Rows != 0 || !s.OldestCreated.IsZero() || s.OldestExpired != 0 || s.InFlight != 0 {
		t.Errorf("of an empty table: %+v, %v", s, err)
	}
	b.plant(t, "acme", 100)
	b.Exec(t, "UPDATE idempotency_keys SET expires_at = now() - interval '1 hour' WHERE key LIKE '%7'")
	finish := b.Running(t, key("canary"))
	tx, err := b.Pool.Begin(t.Context()) // another session's lock, on the same database
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), "SELECT pg_advisory_xact_lock(42)"); err != nil {
		t.Fatal(err)
	}
	s, err := b.operator.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if s.Live != (operator.Count{Rows: 90}) || s.Expired != (operator.Count{Rows: 10}) || s.InFlight != 1 || len(s.Holders) != 1 || s.Holders[0].State != "idle in transaction" {
		t.Errorf("%+v", s)
	}
	if s.OldestExpired.Round(time.Minute) != time.Hour || time.Since(s.OldestCreated).Round(10*time.Second) != 100*time.Second || s.TableBytes == 0 || s.IndexBytes == 0 || s.AuditBytes == 0 || s.EventsBytes == 0 {
		t.Errorf("%+v", s)
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Error(err)
	}
	finish()
	if err := migrations.DownTo(t.Context(), b.Store, postgres.SchemaVersion, nil); err != nil {
		t.Fatal(err)
	}
	if s, err := b.operator.Stats(t.Context()); err != nil || s.AuditBytes != 0 || s.EventsBytes != 0 || s.Live.Rows != 91 {
		t.Errorf("before migration 3: %+v, %v", s, err)
	}
}
