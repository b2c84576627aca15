package postgres_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres"
)

// A handler could get around the seal with EXECUTE of a prepared COMMIT, even from inside a
// function. So the names can't be guessed.
func TestNamesOfPreparedStatementsAreDrawn(t *testing.T) {
	t.Parallel()
	one := func(c *pgxpool.Config) { c.MaxConns = 1 }
	names := func() (names []string) {
		b := setup(t, &setupOptions{configure: one})
		for _, status := range []int{201, 402, 500} {
			b.do(t, request(fmt.Sprint(status), ""), pay(t, status))
		}
		rows, err := b.pool.Query(context.Background(), "SELECT name FROM pg_prepared_statements WHERE name LIKE 'idempotency%'")
		if err == nil {
			names, err = pgx.CollectRows(rows, pgx.RowTo[string])
		}
		if err != nil || len(names) == 0 {
			t.Fatalf("%d statements are prepared: %v", len(names), err)
		}
		return names
	}
	first, second := names(), names()
	for _, name := range first {
		if slices.Contains(second, name) {
			t.Errorf("the name %s is the same in two pools", name)
		}
		if random, ok := strings.CutPrefix(name, "idempotency_"); !ok || len(random) < 26 {
			t.Errorf("the name %s can be guessed", name)
		}
	}
}

// DEALLOCATE ALL by other code, or a pooler's DISCARD ALL, drops our statements.
func TestStatementsThatWereDeallocatedAreSentAsText(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns = 1 }})
	want(t, b.do(t, request("a", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	if n := b.count(t, "SELECT count(*) FROM pg_prepared_statements WHERE name LIKE 'idempotency_%'"); n == 0 {
		t.Fatal("nothing of ours is prepared")
	}
	if _, err := b.pool.Exec(context.Background(), "DEALLOCATE ALL"); err != nil {
		t.Fatal(err)
	}
	// pgx's own statements are gone too; pgx has to mend that.
	idle := func(context.Context, pgx.Tx) int { return 201 }
	want(t, b.do(t, request("b", ""), idle), idempotency.OutcomeExecuted, "")
	want(t, b.do(t, request("b", ""), idle), idempotency.OutcomeReplayed, "")
}

// If the table stays locked for longer than PrepareTimeout, a new connection works without prepared
// statements: it serves requests that need no record, and the others once the lock is gone. If the
// lock is gone in time, the statements are prepared.
func TestConnectionThatCannotPrepareServesAllTheSame(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		timeout  time.Duration
		prepared bool
	}{
		"the lock outlasts the limit": {50 * time.Millisecond, false},
		"the limit outlasts the lock": {time.Minute, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := t.Context()
			b := setup(t, &setupOptions{
				store:     &postgres.Options{PrepareTimeout: test.timeout, AcquireTimeout: 20 * time.Second, LockTimeout: 20 * time.Second},
				configure: func(config *pgxpool.Config) { config.MaxConns = 1 },
			})
			other, err := pgx.Connect(ctx, b.pool.Config().ConnString())
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = other.Close(context.Background()) }()
			if _, err := other.Exec(ctx, "BEGIN; LOCK TABLE idempotency_keys IN ACCESS EXCLUSIVE MODE"); err != nil {
				t.Fatal(err)
			}
			acquired := make(chan error, 1)
			go func() {
				_, err := b.pool.Exec(ctx, "INSERT INTO effects (name) VALUES ('without a key')")
				acquired <- err
			}()
			if test.prepared {
				waits := "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND relation = 'idempotency_keys'::regclass)"
				for waiting := false; !waiting; {
					if err := other.QueryRow(ctx, waits).Scan(&waiting); err != nil {
						t.Fatal(err)
					}
				}
			} else if err := <-acquired; err != nil {
				t.Fatalf("a request without a key: %v", err)
			}
			if _, err := other.Exec(ctx, "COMMIT"); err != nil {
				t.Fatal(err)
			}
			if test.prepared {
				if err := <-acquired; err != nil {
					t.Fatal(err)
				}
			}

			const lookUps = "SELECT count(*) FROM pg_prepared_statements WHERE name LIKE 'idempotency_%' AND statement LIKE '%INSERT INTO%'"
			if n := b.count(t, lookUps); (n == 1) != test.prepared {
				t.Errorf("%d of our INSERTs are prepared; want them prepared %v", n, test.prepared)
			}
			if timeout := b.count(t, "SELECT setting::int FROM pg_settings WHERE name = 'lock_timeout'"); timeout != 20_000 {
				t.Errorf("the connection's lock_timeout is %d ms", timeout)
			}
			engine := idempotency.NewEngine(b.store, nil)
			for _, want := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed} {
				before := b.wire.Count()
				got := engine.Do(ctx, request("k", "body"), func(context.Context) (*idempotency.Answer, error) { return &idempotency.Answer{Status: 201}, nil })
				if got.Outcome != want {
					t.Errorf("outcome is %s, %v; want %s", got.Outcome, got.Err, want)
				}
				if trips := b.wire.Count() - before; trips > 2 {
					t.Errorf("%s in %d round trips", want, trips)
				}
			}
		})
	}
}

// A new connection prepares all statements in one round trip.
func TestPreparingTakesOneRoundTrip(t *testing.T) {
	t.Parallel()
	trips := map[bool]int{}
	for _, cold := range []bool{true, false} {
		b := setup(t, &setupOptions{cold: cold})
		conn, err := b.pool.Acquire(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		trips[cold] = b.wire.Count()
		conn.Release()
	}
	if trips[false] != trips[true]+1 {
		t.Errorf("a connection takes %d round trips, and %d without Configure; want one more", trips[false], trips[true])
	}
}
