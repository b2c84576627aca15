package postgres_test

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres"
)

// handlerStatements is the number of statements that the handler of this test sends, one after
// another.
const handlerStatements = 3

func statements(ctx context.Context, t *testing.T, tx pgx.Tx) {
	for range handlerStatements {
		if _, err := tx.Exec(ctx, "INSERT INTO effects (name) VALUES ($1)", "transfer"); err != nil {
			t.Error(err)
		}
	}
}

// The promise: a keyed request costs no more round trips than its handler in a plain transaction.
func TestRoundTripsAreThoseOfAPlainTransaction(t *testing.T) {
	t.Parallel()
	for name, opts := range map[string]*setupOptions{
		"default mode":     {},
		"exec mode":        {configure: func(c *pgxpool.Config) { c.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeExec }},
		"simple protocol":  {configure: func(c *pgxpool.Config) { c.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeSimpleProtocol }},
		"without settings": {cold: true},
		"pooler":           {store: &postgres.Options{TransactionPooling: true}, configure: func(c *pgxpool.Config) { c.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeExec }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := context.Background()
			inner := opts.configure
			o := *opts
			o.configure = func(c *pgxpool.Config) {
				c.MaxConns, c.MinConns = 1, 1
				if inner != nil {
					inner(c)
				}
			}
			b := setup(t, &o)
			engine := idempotency.NewEngine(b.store, nil)

			plain := func() {
				tx, err := b.pool.Begin(ctx)
				if err != nil {
					t.Fatal(err)
				}
				statements(ctx, t, tx)
				if err := tx.Commit(ctx); err != nil {
					t.Fatal(err)
				}
			}
			keyed := func(key string, status int, want idempotency.Outcome) func() {
				return func() {
					result := engine.Do(ctx, request(key, ""), func(ctx context.Context) (*idempotency.Answer, error) {
						statements(ctx, t, postgres.Tx(ctx))
						return answer(status), nil
					})
					if result.Outcome != want {
						t.Fatalf("outcome %q, want %q: %v", result.Outcome, want, result.Err)
					}
				}
			}
			cost := func(do func()) int {
				before := b.wire.Count()
				do()
				return b.wire.Count() - before
			}
			cost(plain) // warms the connection up

			bare := cost(plain)
			if bare != handlerStatements+2 {
				t.Fatalf("a plain transaction costs %d round trips: the count is wrong", bare)
			}
			const executed, notExecuted, replayed = idempotency.OutcomeExecuted, idempotency.OutcomeNotExecuted, idempotency.OutcomeReplayed
			elsewhere := func(key string) func() { // another process recorded it
				return func() {
					keyed(key, 201, executed)()
					postgres.ForgetRecentKey(b.store, request(key, "").Key)
				}
			}
			reaped := func(key string) func() {
				return func() {
					keyed(key, 201, executed)()
					if _, err := b.pool.Exec(ctx, "DELETE FROM idempotency_keys WHERE key = $1", key); err != nil {
						t.Fatal(err)
					}
				}
			}
			for _, c := range []struct {
				name   string
				before func()
				do     func()
				want   int
			}{
				{"fresh request", nil, keyed("fresh", 201, executed), bare},
				{"decline", nil, keyed("declined", 402, executed), bare},
				{"forgotten answer", nil, keyed("forgotten", 500, notExecuted), bare},
				{"replay", nil, keyed("fresh", 201, replayed), 1},
				{"replay again", nil, keyed("fresh", 201, replayed), 1},
				{"replay of a decline", nil, keyed("declined", 402, replayed), 1},
				{"replay of another process's answer", elsewhere("elsewhere"), keyed("elsewhere", 201, replayed), 2},
				{"the same again", nil, keyed("elsewhere", 201, replayed), 1},
				{"fresh request of a reaped key", reaped("reaped"), keyed("reaped", 201, executed), bare + 1},
				{"its replay", nil, keyed("reaped", 201, replayed), 1},
				{"forgotten answer of a reaped key", reaped("again"), keyed("again", 500, notExecuted), bare + 1},
				{"fresh request once the recent key was found wrong", nil, keyed("again", 201, executed), bare},
			} {
				if c.before != nil {
					c.before()
				}
				if got := cost(c.do); got != c.want {
					t.Errorf("%s: %d round trips, want %d", c.name, got, c.want)
				}
			}
		})
	}
}

func TestRoundTripsOfAConflictAreTwo(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	b := setup(t, nil)
	engine := idempotency.NewEngine(b.store, nil)
	anotherProcess := idempotency.NewEngine(b.store, nil)

	// Two warm connections: one to hold the key, one to be refused on.
	warm := make([]*pgxpool.Conn, 2)
	for i := range warm {
		warm[i], _ = b.pool.Acquire(ctx)
	}
	for _, conn := range warm {
		conn.Release()
	}
	result := engine.Do(ctx, request("k", ""), func(context.Context) (*idempotency.Answer, error) {
		before := b.wire.Count()
		conflict := anotherProcess.Do(ctx, request("k", ""), func(context.Context) (*idempotency.Answer, error) {
			t.Error("the handler ran twice")
			return answer(201), nil
		})
		if got := b.wire.Count() - before; got != 2 || conflict.Outcome != idempotency.OutcomeInProgress {
			t.Errorf("%d round trips and %q, want 2 and in-progress", got, conflict.Outcome)
		}
		return answer(201), nil
	})
	if result.Outcome != idempotency.OutcomeExecuted {
		t.Fatal(result)
	}
}
