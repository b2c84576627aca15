package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres"
)

// Code written for job queues ends with pg_advisory_unlock_all. The key is locked for the
// transaction, and stays locked.
func TestHandlerThatUnlocksAllKeepsItsKey(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	want(t, b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
		if _, err := tx.Exec(ctx, "SELECT pg_advisory_unlock_all()"); err != nil {
			t.Error(err)
		}
		effect(ctx, t)
		want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
		return 201
	}), idempotency.OutcomeExecuted, "")
	if n := b.effects(t); n != 1 {
		t.Errorf("%d effects, want 1", n)
	}
}

// If PostgreSQL ended the session under its handler, the outcome is unavailable, however the
// handler treats its errors.
func TestSessionThatEndedUnderItsHandlerIsUnavailable(t *testing.T) {
	t.Parallel()
	for name, touch := range map[string]bool{"unseen": false, "seen, and taken for the client's mistake": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, nil)
			want(t, b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
				effect(ctx, t)
				conn := postgres.RawConn(tx).PgConn()
				if _, err := tx.Exec(ctx, "SET LOCAL idle_in_transaction_session_timeout = '50ms'"); err != nil {
					t.Error(err)
				}
				b.awaitNone(t, "SELECT count(*) FROM pg_stat_activity WHERE pid = $1", int(conn.PID()))
				if touch {
					if _, err := tx.Exec(ctx, "INSERT INTO effects (name) VALUES ('late')"); err == nil {
						t.Error("the session goes on")
					}
					return 422
				}
				return 201
			}), idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
			if n := b.effects(t); n != 0 {
				t.Errorf("%d effects, want none", n)
			}
		})
	}
}

// awaitNone waits until a count is 0.
func (b *testBundle) awaitNone(t *testing.T, sql string, arguments ...any) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); b.count(t, sql, arguments...) > 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: still not 0", sql)
		}
	}
}

// Pools that reset their sessions drop our prepared statements too, also while many requests run.
func TestPoolThatResetsItsSessionsServes(t *testing.T) {
	t.Parallel()
	for _, sql := range []string{"DISCARD ALL", "DEALLOCATE ALL", "RESET ALL", "SELECT pg_advisory_unlock_all()"} {
		t.Run(sql, func(t *testing.T) {
			t.Parallel()
			b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) {
				c.MaxConns = 8
				c.AfterRelease = func(conn *pgx.Conn) bool {
					_, err := conn.Exec(context.Background(), sql)
					return err == nil
				}
			}})
			for round := range 3 {
				var group sync.WaitGroup
				for i := range 8 {
					group.Go(func() {
						key := fmt.Sprint(round, "-", i)
						for _, outcome := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed} {
							want(t, b.do(t, request(key, ""), func(ctx context.Context, tx pgx.Tx) int {
								if _, err := tx.Exec(ctx, "INSERT INTO effects (name) VALUES ('x')"); err != nil { // as text: pgx's own are gone too
									t.Error(err)
								}
								return 201
							}), outcome, "")
						}
					})
				}
				group.Wait()
			}
			if n := b.effects(t); n != 24 {
				t.Errorf("%d effects, want 24", n)
			}
		})
	}
}

// Comments, strings and bodies of functions hold semicolons, and are one statement all the same.
func TestSQLWithSemicolonsInItIsOneStatement(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	want(t, b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
		for _, sql := range []string{
			"INSERT INTO effects (name) VALUES ('a') /*action='%2Fpay',traceparent='00-5bd66ef5095369c7b0d1f8f4bd33716a-c532cb4098ac3dd2-01'*/",
			"/* it's; a test */ INSERT INTO effects (name) VALUES ('b')",
			"-- name: CreateEffect :one\nINSERT INTO effects (name) VALUES ('it''s; fine') RETURNING id;\n",
			`INSERT INTO effects (name) VALUES (E'a\'; COMMIT; --') ; -- done; really`,
			"INSERT INTO effects (name) VALUES ($q$ ; COMMIT; $q$)",
			"WITH x AS (INSERT INTO effects (name) VALUES ('w') RETURNING id) SELECT count(*) FROM x;",
			"DO $$ BEGIN PERFORM 1; END $$;",
			`SELECT 1 AS "semi;colon"`,
		} {
			if _, err := tx.Exec(ctx, sql); err != nil {
				t.Errorf("%s: %v", sql, err)
			}
		}
		return 201
	}), idempotency.OutcomeExecuted, "")
	if n := b.effects(t); n != 6 {
		t.Errorf("%d effects, want 6", n)
	}
}

// A handler that sets the mode of its transaction, as helpers do that begin one of their own. The
// isolation level can't be changed any more, and the handler gets an error; the rest it may choose.
func TestHandlerThatSetsItsTransactionsMode(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	for i, c := range []struct {
		sql     string
		outcome idempotency.Outcome
		effects int
	}{
		{"SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", idempotency.OutcomeNotExecuted, 0},
		{"SET TRANSACTION READ WRITE", idempotency.OutcomeExecuted, 1},
		{"SET CONSTRAINTS ALL DEFERRED", idempotency.OutcomeExecuted, 1},
		{"LOCK TABLE effects IN SHARE ROW EXCLUSIVE MODE", idempotency.OutcomeExecuted, 1},
	} {
		before := b.effects(t)
		want(t, b.do(t, request(fmt.Sprint(i), ""), func(ctx context.Context, tx pgx.Tx) int {
			if _, err := tx.Exec(ctx, c.sql); err != nil {
				return 500
			}
			effect(ctx, t)
			return 201
		}), c.outcome, "")
		if n := b.effects(t) - before; n != c.effects {
			t.Errorf("%s: %d effects, want %d", c.sql, n, c.effects)
		}
	}
}

// A service's enum works as it is. COPY of a composite type needs its codec, which a connection
// gets in AfterConnect: a handler has no connection to load it from.
func TestTypesOfTheServiceAreRegisteredOnConnect(t *testing.T) {
	t.Parallel()
	type price struct {
		Amount   int64
		Currency string
	}
	for registered, status := range map[bool]int{true: 201, false: 422} {
		t.Run(fmt.Sprint("registered ", registered), func(t *testing.T) {
			t.Parallel()
			b := setup(t, &setupOptions{before: func(config *pgxpool.Config) {
				config.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
					if !registered {
						return nil
					}
					one, err := conn.LoadType(ctx, "price")
					if err == nil {
						conn.TypeMap().RegisterType(one)
					}
					var pgErr *pgconn.PgError
					if errors.As(err, &pgErr) { // before it is created
						return nil
					}
					return err
				}
			}})
			b.exec(t, "CREATE TYPE mood AS ENUM ('ok', 'bad'); CREATE TYPE price AS (amount bigint, currency text); CREATE TABLE orders (m mood, p price)")
			b.pool.Reset()
			want(t, b.do(t, request("enum", ""), func(ctx context.Context, tx pgx.Tx) int {
				if _, err := tx.Exec(ctx, "INSERT INTO orders VALUES ($1)", "ok"); err != nil {
					t.Error(err)
				}
				if _, err := tx.CopyFrom(ctx, pgx.Identifier{"orders"}, []string{"m"}, pgx.CopyFromRows([][]any{{"bad"}})); err != nil {
					t.Error(err)
				}
				rows, _ := tx.Query(ctx, "SELECT m FROM orders ORDER BY m") // the collector returns its error
				if moods, err := pgx.CollectRows(rows, pgx.RowTo[string]); err != nil || fmt.Sprint(moods) != "[ok bad]" {
					t.Errorf("%q, %v", moods, err)
				}
				return 201
			}), idempotency.OutcomeExecuted, "")
			result := b.do(t, request("composite", ""), func(ctx context.Context, tx pgx.Tx) int {
				if _, err := tx.CopyFrom(ctx, pgx.Identifier{"orders"}, []string{"p"}, pgx.CopyFromRows([][]any{{price{1250, "EUR"}}})); err != nil {
					return 422
				}
				return 201
			})
			want(t, result, idempotency.OutcomeExecuted, "")
			copied := b.count(t, "SELECT count(*) FROM orders WHERE (p).amount = 1250 AND (p).currency = 'EUR'")
			if result.Answer == nil || result.Answer.Status != status || (copied == 1) != registered {
				t.Errorf("%v, %d rows were copied", result.Answer, copied)
			}
		})
	}
}

// pgx's own helpers work on the handler's transaction: only a nested one that fails or panics is
// undone.
func TestHelpersOfPgxWork(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	insert := func(ctx context.Context, tx pgx.Tx, name string) {
		if _, err := tx.Exec(ctx, "INSERT INTO effects (name) VALUES (@name)", pgx.NamedArgs{"name": name}); err != nil {
			t.Error(err)
		}
	}
	failed := errors.New("it failed")
	want(t, b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
		insert(ctx, tx, "outer")
		if err := pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error {
			insert(ctx, tx, "undone")
			_, _ = tx.Exec(ctx, "SELECT 1/0") // the rollback to the savepoint clears it
			return failed
		}); !errors.Is(err, failed) {
			t.Errorf("a nested one that fails: %v", err)
		}
		func() {
			defer func() {
				if recover() != failed {
					t.Error("the panic did not go on")
				}
			}()
			_ = pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error {
				insert(ctx, tx, "undone")
				panic(failed)
			})
		}()
		if err := pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error {
			return pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error {
				insert(ctx, tx, "inner")
				return nil
			})
		}); err != nil {
			t.Error(err)
		}
		rows, _ := tx.Query(ctx, "SELECT name FROM effects") // the collector returns its error
		if _, err := pgx.CollectExactlyOneRow(rows, pgx.RowTo[string]); !errors.Is(err, pgx.ErrTooManyRows) {
			t.Errorf("CollectExactlyOneRow: %v", err)
		}
		rows, _ = tx.Query(ctx, "SELECT name FROM effects ORDER BY id")
		var names []string
		var name string
		if _, err := pgx.ForEachRow(rows, []any{&name}, func() error { names = append(names, name); return nil }); err != nil {
			t.Error(err)
		}
		if got := fmt.Sprint(names); got != "[outer inner]" {
			t.Errorf("effects are %s", got)
		}
		return 201
	}), idempotency.OutcomeExecuted, "")
	if n := b.effects(t); n != 2 {
		t.Errorf("%d effects, want 2", n)
	}
}

// If two goroutines use the transaction at once, one is refused. The writes that were not refused
// are committed.
func TestTwoGoroutinesOnOneTransaction(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	written := 0
	want(t, b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
		var errs [2]error
		var group sync.WaitGroup
		for i := range errs {
			group.Go(func() { _, errs[i] = tx.Exec(ctx, "INSERT INTO effects (name) SELECT 'x' FROM pg_sleep(0.1)") })
		}
		group.Wait()
		for _, err := range errs {
			switch {
			case err == nil:
				written++
			case !errors.Is(err, postgres.ErrBusy):
				t.Error(err)
			}
		}
		return 201
	}), idempotency.OutcomeExecuted, "")
	if n := b.effects(t); n != written || written == 0 {
		t.Errorf("%d effects, and %d were written without an error", n, written)
	}
}
