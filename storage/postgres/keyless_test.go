package postgres_test

import (
	"context"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgfault"
)

// A handler can't make COMMIT skip the wait for the disk, even if nothing is recorded.
func TestKeylessCommitWaitsForTheDisk(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	if _, err := b.pool.Exec(context.Background(), `
		CREATE TABLE seen (setting text);
		CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.seen VALUES (current_setting('synchronous_commit')); RETURN NULL; END $$;
		CREATE CONSTRAINT TRIGGER see AFTER INSERT ON effects DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION see()`); err != nil {
		t.Fatal(err)
	}
	want(t, b.do(t, request("", ""), func(ctx context.Context, tx pgx.Tx) int {
		effect(ctx, t)
		if _, err := tx.Exec(ctx, "SET LOCAL synchronous_commit = off"); err != nil {
			t.Error(err)
		}
		return 201
	}), idempotency.OutcomeExecuted, "")
	if n := b.count(t, "SELECT count(*) FROM seen WHERE setting = 'on'"); n != 1 {
		t.Errorf("synchronous_commit was on at %d of 1 commits", n)
	}
}

func TestKeylessRequestHasATransactionAndNoRecord(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	keyless := idempotency.Request{Key: idempotency.Key{Scope: "acme"}}
	want(t, b.do(t, keyless, pay(t, 201)), idempotency.OutcomeExecuted, "")
	want(t, b.do(t, keyless, pay(t, 201)), idempotency.OutcomeExecuted, "")
	want(t, b.do(t, keyless, pay(t, 402)), idempotency.OutcomeNotExecuted, "")
	want(t, b.do(t, keyless, pay(t, 500)), idempotency.OutcomeNotExecuted, "")
	if effects, records := b.effects(t), b.count(t, "SELECT count(*) FROM idempotency_keys"); effects != 2 || records != 0 {
		t.Errorf("%d effects and %d records, want 2 and 0", effects, records)
	}
}

// Without a key there is nothing to look for: unknown at once, and no connection is made for it.
func TestLostReplyOfAKeylessCommitIsUnknown(t *testing.T) {
	t.Parallel()
	var connections atomic.Int64
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) {
		c.MaxConns = 1
		counted(c, &connections)
		through(t, c.ConnConfig, func(pgfault.Commit) pgfault.Fault { return pgfault.Fault{Kind: pgfault.CutAfter} })
	}})
	want(t, b.do(t, request("", ""), pay(t, 201)), idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
	if n := connections.Load(); n != 1 {
		t.Errorf("%d connections were made, want the pool's alone", n)
	}
	if n := b.effects(t); n != 1 {
		t.Errorf("%d effects, want 1", n)
	}
}

// Requests without a key have nothing in common: none waits for or blocks another.
func TestKeylessRequestsRunSideBySide(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	keyless := idempotency.Request{Key: idempotency.Key{Scope: "acme"}}
	want(t, b.do(t, keyless, func(ctx context.Context, _ pgx.Tx) int {
		effect(ctx, t)
		want(t, b.do(t, keyless, pay(t, 201)), idempotency.OutcomeExecuted, "")
		return 201
	}), idempotency.OutcomeExecuted, "")
	if n := b.effects(t); n != 2 {
		t.Errorf("%d effects, want 2", n)
	}
}
