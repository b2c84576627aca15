package postgres_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres"
)

// Code written for job queues ends with pg_advisory_unlock_all. The key is locked for the transaction, and stays so.
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

// A session that PostgreSQL ended under its handler is unavailable, whatever the handler makes of its errors.
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

// Pools that reset their sessions take our statements with them, also while many requests run.
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
