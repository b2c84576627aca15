package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres"
)

// A handle that outlives its handler does not touch the connection, which may be in other hands by
// then, and neither does a second goroutine while the first one uses it. They would race for the
// settings that the server reports.
func TestHandleReadsTheConnectionInItsTurnOnly(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns = 1 }})
	for name, use := range map[string]func(ctx context.Context, tx pgx.Tx){
		"exec":    func(ctx context.Context, tx pgx.Tx) { _, _ = tx.Exec(ctx, "SELECT 1") },
		"query":   func(ctx context.Context, tx pgx.Tx) { rows, _ := tx.Query(ctx, "SELECT 1"); rows.Close() },
		"prepare": func(ctx context.Context, tx pgx.Tx) { _, _ = tx.Prepare(ctx, "p", "SELECT 1") },
		"batch": func(ctx context.Context, tx pgx.Tx) {
			batch := &pgx.Batch{}
			batch.Queue("SELECT 1")
			_ = tx.SendBatch(ctx, batch).Close()
		},
	} {
		ctx := context.Background()
		var kept pgx.Tx
		var wg sync.WaitGroup
		stop := make(chan struct{})
		set := func(exec func(sql string) error) {
			for i := range 100 {
				if err := exec(fmt.Sprintf("SET TimeZone TO '%d'", i%10)); err != nil && !errors.Is(err, postgres.ErrBusy) {
					t.Errorf("%s: %v", name, err)
				}
			}
		}
		b.do(t, request(name, ""), func(ctx context.Context, tx pgx.Tx) int {
			kept = tx
			wg.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
						use(context.Background(), kept)
					}
				}
			})
			set(func(sql string) error { _, err := tx.Exec(ctx, sql); return err })
			return 500
		})
		set(func(sql string) error { _, err := b.pool.Exec(ctx, sql); return err })
		close(stop)
		wg.Wait()
	}
}

// However a transaction was ended and another one begun, the request is never reported as not
// executed: some step in between always notices.
func TestTransactionThatWasBegunAnewIsUnknown(t *testing.T) {
	t.Parallel()
	for _, status := range []int{201, 402, 500} {
		for _, aborted := range []bool{false, true} {
			t.Run(fmt.Sprint(status, " aborted ", aborted), func(t *testing.T) {
				t.Parallel()
				b := setup(t, nil)
				prepareEnd(t, b)
				result := b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
					effect(ctx, t)
					for _, sql := range []string{"DO $$ BEGIN EXECUTE 'EXECUTE ended'; END $$", "DO $$ BEGIN EXECUTE 'EXECUTE begun'; END $$"} {
						if _, err := tx.Exec(ctx, sql); err != nil {
							t.Error(err)
						}
					}
					if aborted {
						_, _ = tx.Exec(ctx, "SELECT 1/0")
					}
					return status
				})
				want(t, result, idempotency.OutcomeUnknown, idempotency.ReasonTransactionLost)
				if n := b.count(t, "SELECT count(*) FROM idempotency_keys"); n != 0 {
					t.Errorf("%d records, want none", n)
				}
			})
		}
	}
}

// prepareEnd prepares COMMIT and BEGIN on the pool's only connection, as a service's own hook
// might.
func prepareEnd(t *testing.T, b *testBundle) {
	t.Helper()
	ctx := context.Background()
	conns := b.pool.AcquireAllIdle(ctx)
	if len(conns) == 0 {
		conn, err := b.pool.Acquire(ctx)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	for _, conn := range conns {
		for name, sql := range map[string]string{"ended": "COMMIT", "begun": "BEGIN"} {
			if _, err := conn.Conn().PgConn().Prepare(ctx, name, sql, nil); err != nil {
				t.Fatal(err)
			}
		}
		conn.Release()
	}
}

// A handler could get around the seal with EXECUTE of a prepared COMMIT, also from inside a
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

// A rewriter is found behind every option that pgx knows.
func TestRewriterBehindOptionsIsRefused(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	result := b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
		effect(ctx, t)
		for name, option := range map[string]any{
			"mode": pgx.QueryExecModeExec, "simple": pgx.QueryExecModeSimpleProtocol,
			"formats": pgx.QueryResultFormats{0}, "formats by oid": pgx.QueryResultFormatsByOID{},
		} {
			rows, err := tx.Query(ctx, "SELECT 1", option, rewriter("COMMIT"))
			rows.Close()
			if !errors.Is(errors.Join(err, rows.Err()), postgres.ErrSealed) {
				t.Errorf("%s: got %v, want ErrSealed", name, err)
			}
		}
		return 201
	})
	want(t, result, idempotency.OutcomeExecuted, "")
}
