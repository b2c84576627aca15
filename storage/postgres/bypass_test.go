package postgres_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres"
)

type connRewriter struct{ conn *pgx.Conn }

func (r *connRewriter) RewriteQuery(_ context.Context, conn *pgx.Conn, sql string, _ []any) (string, []any, error) {
	r.conn = conn
	return sql, nil, nil
}

// Ways around the guard that reads the handler's SQL.
func TestGuardCannotBeWalkedAround(t *testing.T) {
	t.Parallel()
	simple := func(c *pgxpool.Config) { c.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeSimpleProtocol }
	for name, c := range map[string]struct {
		configure func(*pgxpool.Config)
		attack    func(ctx context.Context, tx pgx.Tx) error
	}{
		"a rewriter behind result formats": {nil, func(ctx context.Context, tx pgx.Tx) error {
			rows, err := tx.Query(ctx, "SELECT 1", pgx.QueryResultFormats{1}, rewriter("COMMIT"))
			rows.Close()
			return errors.Join(err, rows.Err())
		}},
		"half a character": {nil, func(ctx context.Context, tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, "SET LOCAL client_encoding = 'SJIS'"); err != nil {
				t.Error(err)
			}
			_, err := tx.Exec(ctx, "SELECT E'\x83\x5c'; commit; begin; select '1'")
			return err
		}},
		"a string over two statements of a batch": {simple, func(ctx context.Context, tx pgx.Tx) error {
			batch := &pgx.Batch{}
			batch.Queue("SELECT '")
			batch.Queue("'; commit; begin; select '")
			batch.Queue("'")
			return tx.SendBatch(ctx, batch).Close()
		}},
	} {
		b := setup(t, &setupOptions{configure: c.configure})
		b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
			effect(ctx, t)
			if err := c.attack(ctx, tx); !errors.Is(err, postgres.ErrSealed) {
				t.Errorf("%s: %v, want ErrSealed", name, err)
			}
			var r connRewriter
			if _, _ = tx.Exec(ctx, "SELECT 1", &r); r.conn != nil {
				t.Error("a rewriter is given the connection")
			}
			return 500
		})
		if n := b.effects(t); n != 0 {
			t.Errorf("%s: %d effects, want none", name, n)
		}
	}
}

// If the handler's code panics inside a callback, the transaction is rolled back at once.
func TestPanicInACallbackIsRolledBackAtOnce(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	started := time.Now()
	want(t, b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
		batch := &pgx.Batch{}
		batch.Queue("SELECT 1").QueryRow(func(pgx.Row) error { panic("callback") })
		_ = tx.SendBatch(ctx, batch).Close()
		return 201
	}), idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
	if d := time.Since(started); d > 500*time.Millisecond {
		t.Errorf("it took %v", d)
	}
}
