package postgres_test

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
)

// In another client_encoding the server reads another scope out of the same bytes: the look-up misses, the primary key
// does not conflict, and the handler pays again.
func TestHandlersEncodingCannotHideTheRecord(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	req := request("k", "")
	req.Key.Scope = "café"
	set := func(sql string) func(context.Context, pgx.Tx) int {
		return func(ctx context.Context, tx pgx.Tx) int {
			effect(ctx, t)
			if _, err := tx.Exec(ctx, sql); err != nil {
				t.Error(err)
			}
			return 201
		}
	}
	t.Run("of this transaction", func(t *testing.T) {
		t.Parallel()
		b := setup(t, nil)
		want(t, b.do(t, req, set("SET LOCAL client_encoding = 'LATIN1'")), idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
		want(t, b.do(t, req, pay(t, 201)), idempotency.OutcomeExecuted, "")
		want(t, b.do(t, req, pay(t, 201)), idempotency.OutcomeReplayed, "")
		if n := b.effects(t); n != 1 {
			t.Errorf("%d effects, want 1", n)
		}
	})
	t.Run("left on a connection", func(t *testing.T) {
		t.Parallel()
		b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns = 2 }})
		if _, err := b.pool.Exec(ctx, "SET client_encoding = 'LATIN1'"); err != nil {
			t.Fatal(err)
		}
		want(t, b.do(t, req, pay(t, 201)), idempotency.OutcomeExecuted, "")
		busy, err := b.pool.Acquire(ctx) // the one that was just used: the retry gets another
		if err != nil {
			t.Fatal(err)
		}
		defer busy.Release()
		want(t, b.do(t, req, pay(t, 201)), idempotency.OutcomeReplayed, "")
		if n := b.effects(t); n != 1 {
			t.Errorf("%d effects, want 1", n)
		}
	})
}
