package postgres_test

import (
	"context"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/internal/deadline"
)

// The engine's contexts end only by time, so the socket's deadline ends their exchanges. After that
// time a connection must be as good as before.
func TestExchangeLeavesNoDeadlineOnItsConnection(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns = 1 }})
	ctx := context.Background()
	begun := deadline.After(ctx, 300*time.Millisecond)
	attempt, _, err := b.store.Begin(begun, claimOf(request("k", "")))
	if err != nil {
		t.Fatal(err)
	}
	<-begun.Done()
	effect(attempt.Context(ctx), t)
	if err := attempt.Seal(); err != nil {
		t.Errorf("the handler's statement outlived the time for the claim, and the attempt did not: %v", err)
	}
	ended := deadline.After(ctx, 300*time.Millisecond)
	if err := attempt.Commit(ended, answer(201)); err != nil {
		t.Error(err)
	}
	<-ended.Done()
	if n := b.effects(t); n != 1 { // on the pool's only connection
		t.Errorf("%d effects, want 1", n)
	}
	if stat := b.pool.Stat(); stat.NewConnsCount() != 1 {
		t.Errorf("%d connections were made, want 1", stat.NewConnsCount())
	}
}
