package postgres_test

import (
	"context"
	"errors"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgtest"
)

// The look-up before a claim is only a try: if its prepared statement or its connection is gone,
// the claim decides.
func TestReplayOutlivesWhatItsConnectionLost(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns = 1 }})
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	for _, sql := range []string{
		"DEALLOCATE ALL",
		// The type of the result differs from that in the plan.
		"ALTER TABLE idempotency_keys ALTER trace_id TYPE varchar",
		"SELECT pg_terminate_backend(pg_backend_pid())",
		"SELECT 1",
	} {
		_, _ = b.pool.Exec(ctx, sql, pgx.QueryExecModeSimpleProtocol)
		for range 2 {
			want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeReplayed, "")
		}
	}
}

// A missing prepared statement costs one failed look-up on each connection.
func TestLookUpIsSentAsTextOnceItsStatementIsGone(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns = 1 }})
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	var name string
	if err := b.pool.QueryRow(ctx, "SELECT quote_ident(name) FROM pg_prepared_statements WHERE name LIKE 'idempotency%' AND statement LIKE '%pg_is_in_recovery%'").Scan(&name); err != nil {
		t.Fatal(err)
	}
	if _, err := b.pool.Exec(ctx, "DEALLOCATE "+name); err != nil {
		t.Fatal(err)
	}
	for _, roundTrips := range []int{3, 1, 1} { // looked up without success, claimed, rolled back
		before := b.wire.Count()
		want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeReplayed, "")
		if got := b.wire.Count() - before; got != roundTrips {
			t.Errorf("%d round trips, want %d", got, roundTrips)
		}
	}
}

// While COMMIT waits for standbys a replay waits too, even if the key was known before there were
// any.
func TestF20QuickReplayWaitsForTheStandbys(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "starts a PostgreSQL of its own")
	ctx := context.Background()
	config := configOfOwnServer(t)
	store := migrated(t, config)
	pool := store.Pool()
	engine := idempotency.NewEngine(store, nil)
	do := func(key string) idempotency.Result {
		return engine.Do(ctx, request(key, ""), func(context.Context) (*idempotency.Answer, error) { return answer(201), nil })
	}
	want(t, do("k"), idempotency.OutcomeExecuted, "")
	want(t, do("k"), idempotency.OutcomeReplayed, "")
	setStandbys(t, pool, "nobody")
	for range 2 {
		replay := make(chan idempotency.Result, 1)
		go func() { replay <- do("k") }()
		cancelWaiting(t, pool)
		want(t, <-replay, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
	}
	// So does a look that claims nothing.
	lookUp := func(key string) idempotency.Result { return engine.LookUp(ctx, request(key, "")) }
	looked := make(chan idempotency.Result, 1)
	go func() { looked <- lookUp("k") }()
	cancelWaiting(t, pool)
	if result := <-looked; result.Outcome != idempotency.OutcomeUnknown || !errors.Is(result.Err, idempotency.ErrUnknown) {
		t.Errorf("%+v", result)
	}
	if n := pool.Stat().AcquiredConns(); n != 0 {
		t.Errorf("%d connections are held", n)
	}
	setStandbys(t, pool, "")
	for range 2 {
		want(t, do("k"), idempotency.OutcomeReplayed, "")
		want(t, lookUp("k"), idempotency.OutcomeReplayed, "")
	}
}
