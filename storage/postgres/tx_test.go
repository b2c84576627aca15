package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
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
				err := exec(fmt.Sprintf("SET TimeZone TO '%d'", i%10))
				// Between the steps of the other goroutine's rows or batch, pgx itself says that
				// the connection is busy.
				if err != nil && !errors.Is(err, postgres.ErrBusy) && !strings.Contains(err.Error(), "conn busy") {
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

// Text that would end the transaction is refused wherever a rewriter stands among the arguments,
// even if a backslash hides the end of a string.
func TestHiddenEndOfTheTransactionIsRefused(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	refused := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, postgres.ErrSealed) {
			t.Errorf("%s: got %v, want ErrSealed", what, err)
		}
	}
	result := b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
		effect(ctx, t)
		_, err := tx.Exec(ctx, "SELECT 1", pgx.QueryExecModeExec, rewriter("COMMIT"))
		refused("behind a mode", err)
		batch := &pgx.Batch{}
		batch.Queue("SELECT 1", rewriter("COMMIT"))
		refused("in a batch", tx.SendBatch(ctx, batch).Close())
		if _, err := tx.Exec(ctx, "SET LOCAL standard_conforming_strings = off"); err != nil {
			t.Error(err)
		}
		_, err = tx.Exec(ctx, `SELECT '\';COMMIT;BEGIN;--'`)
		refused("behind a backslash", err)
		_, err = tx.Exec(ctx, `SELECT 'a\'';COMMIT;BEGIN;--'`)
		refused("behind a doubled quote", err)
		return 201
	})
	want(t, result, idempotency.OutcomeExecuted, "")
	if n := b.effects(t); n != 1 {
		t.Errorf("%d effects, want 1", n)
	}
}

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

// awaitNone waits until a count is 0.
func (b *testBundle) awaitNone(t *testing.T, sql string, arguments ...any) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); b.count(t, sql, arguments...) > 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: still not 0", sql)
		}
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

// A handler sets the mode of its transaction, as helpers that begin a transaction of their own do.
// The isolation level can't be changed any more, and the handler gets an error. It may choose the
// rest of the mode.
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

// Text that would end the transaction is refused before it is sent, on every way to send SQL, and
// the transaction continues unharmed.
func TestHandlerCannotEndTheTransaction(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	refused := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, postgres.ErrSealed) {
			t.Errorf("%s: got %v, want ErrSealed", what, err)
		}
	}
	result := b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
		effect(ctx, t)
		refused("Commit", tx.Commit(ctx))
		refused("Rollback", tx.Rollback(ctx))
		for _, sql := range []string{"COMMIT", "insert into effects (name) values ('x'); commit; begin", "/* c */ RoLlBaCk", ";;END", "abort", "PREPARE TRANSACTION 'x'", "SAVEPOINT a"} {
			_, err := tx.Exec(ctx, sql)
			refused("Exec "+sql, err)
			_, err = tx.Exec(ctx, sql, pgx.QueryExecModeSimpleProtocol)
			refused("Exec simple "+sql, err)
			rows, err := tx.Query(ctx, sql)
			refused("Query "+sql, err)
			refused("Query rows "+sql, rows.Err())
			refused("QueryRow "+sql, tx.QueryRow(ctx, sql).Scan())
			_, err = tx.Prepare(ctx, "p", sql)
			refused("Prepare "+sql, err)
			batch := &pgx.Batch{}
			batch.Queue("SELECT 1")
			batch.Queue(sql)
			refused("SendBatch "+sql, tx.SendBatch(ctx, batch).Close())
			_, err = tx.Exec(ctx, "SELECT 1", rewriter(sql))
			refused("rewriter "+sql, err)
			nested, err := tx.Begin(ctx)
			if err != nil {
				t.Error(err)
			}
			_, err = nested.Exec(ctx, sql)
			refused("nested Exec "+sql, err)
			if err := nested.Commit(ctx); err != nil {
				t.Error(err)
			}
		}
		begun := &pgx.Batch{}
		begun.BeginTx(pgx.TxOptions{})
		refused("Batch.BeginTx", tx.SendBatch(ctx, begun).Close())
		if tx.Conn() != nil {
			t.Error("Conn leads around the seal")
		}
		return 201
	})
	want(t, result, idempotency.OutcomeExecuted, "")
	if n := b.effects(t); n != 1 {
		t.Errorf("%d effects, want 1", n)
	}
}

// Behind our guard there is the server's: several statements never go out in one message, in
// whatever mode.
func TestSeveralStatementsNeverGoOutInOneMessage(t *testing.T) {
	t.Parallel()
	for name, mode := range map[string]pgx.QueryExecMode{"default": pgx.QueryExecModeCacheStatement, "simple": pgx.QueryExecModeSimpleProtocol} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.ConnConfig.DefaultQueryExecMode = mode }})
			for _, arguments := range [][]any{{}, {pgx.QueryExecModeSimpleProtocol}, {pgx.NamedArgs{}, pgx.QueryExecModeSimpleProtocol}, {pgx.QueryExecModeSimpleProtocol, pgx.NamedArgs{}}} {
				for _, exec := range []bool{true, false} {
					result := b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
						err := postgres.SendUnadmitted(ctx, tx, exec, "INSERT INTO effects (name) VALUES ('x'); COMMIT; BEGIN", arguments...)
						var pgErr *pgconn.PgError
						if !errors.As(err, &pgErr) || pgErr.Code != "42601" {
							t.Errorf("%v: %v", arguments, err)
						}
						return 201
					})
					want(t, result, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
				}
			}
			if n := b.effects(t); n != 0 {
				t.Errorf("%d effects, want none", n)
			}
		})
	}
}

type rewriter string

func (r rewriter) RewriteQuery(context.Context, *pgx.Conn, string, []any) (string, []any, error) {
	return string(r), nil, nil
}

func TestNestedTransactions(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	insert := func(ctx context.Context, tx pgx.Tx, name string) {
		if _, err := tx.Exec(ctx, "INSERT INTO effects (name) VALUES ($1)", name); err != nil {
			t.Error(err)
		}
	}
	result := b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
		insert(ctx, tx, "outer")
		kept, err := tx.Begin(ctx)
		if err != nil {
			t.Error(err)
		}
		insert(ctx, kept, "kept")
		inner, err := kept.Begin(ctx)
		if err != nil {
			t.Error(err)
		}
		insert(ctx, inner, "undone")
		if _, err := inner.Exec(ctx, "SELECT 1/0"); err == nil { // cleared together with the savepoint
			t.Error("no error")
		}
		if err := inner.Rollback(ctx); err != nil {
			t.Error(err)
		}
		if err := kept.Commit(ctx); err != nil {
			t.Error(err)
		}
		for _, closed := range []pgx.Tx{inner, kept} {
			if err := closed.Commit(ctx); !errors.Is(err, pgx.ErrTxClosed) {
				t.Errorf("Commit of a closed one: %v", err)
			}
			if _, err := closed.Exec(ctx, "SELECT 1"); !errors.Is(err, pgx.ErrTxClosed) {
				t.Errorf("Exec on a closed one: %v", err)
			}
		}
		return 201
	})
	want(t, result, idempotency.OutcomeExecuted, "")
	if n := b.count(t, "SELECT count(*) FROM effects WHERE name IN ('outer', 'kept')"); n != 2 || b.effects(t) != 2 {
		t.Errorf("%d effects of 2", n)
	}
	want(t, b.do(t, request("open", ""), func(ctx context.Context, tx pgx.Tx) int {
		if _, err := tx.Begin(ctx); err != nil {
			t.Error(err)
		}
		return 201
	}), idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
}

// All of pgx.Tx works that can't get around the seal.
func TestTransactionIsAPgxTx(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	type row struct{ Name string }
	result := b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
		n, err := tx.CopyFrom(ctx, pgx.Identifier{"effects"}, []string{"name"}, pgx.CopyFromRows([][]any{{"a"}, {"b"}}))
		if n != 2 || err != nil {
			t.Error(n, err)
		}
		rows, err := tx.Query(ctx, "SELECT name FROM effects WHERE name <> @without ORDER BY 1", pgx.NamedArgs{"without": "c"})
		if err != nil {
			t.Error(err)
		}
		if names, err := pgx.CollectRows(rows, pgx.RowToStructByName[row]); err != nil || len(names) != 2 || names[1].Name != "b" {
			t.Error(names, err)
		}
		if err := tx.QueryRow(ctx, "SELECT name FROM effects WHERE name = 'z'").Scan(new(string)); !errors.Is(err, pgx.ErrNoRows) {
			t.Error(err)
		}
		if err := tx.QueryRow(ctx, "SELECT 'x'").Scan(new(int)); err == nil { // an error only on our side
			t.Error("a text was scanned into a number")
		}
		called := false
		batch := &pgx.Batch{}
		batch.Queue("INSERT INTO effects (name) VALUES ('c')")
		batch.Queue("SELECT count(*) FROM effects").QueryRow(func(row pgx.Row) error {
			called = true
			var n int
			if err := row.Scan(&n); err != nil || n != 3 {
				t.Error(n, err)
			}
			if _, err := tx.Exec(ctx, "SELECT 1"); !errors.Is(err, postgres.ErrBusy) {
				t.Errorf("inside a callback: %v", err)
			}
			return nil
		})
		if err := tx.SendBatch(ctx, batch).Close(); err != nil || !called {
			t.Error(called, err)
		}
		if _, err := tx.Prepare(ctx, "named", "SELECT $1::int + 1"); err != nil {
			t.Error(err)
		}
		var two int
		if err := tx.QueryRow(ctx, "named", 1).Scan(&two); err != nil || two != 2 {
			t.Error(two, err)
		}
		err = pgx.BeginFunc(ctx, tx, func(nested pgx.Tx) error {
			_, err := nested.Exec(ctx, "SELECT 1")
			return err
		})
		if err != nil {
			t.Error(err)
		}
		return 201
	})
	want(t, result, idempotency.OutcomeExecuted, "")
	if n := b.effects(t); n != 3 {
		t.Errorf("%d effects, want 3", n)
	}
	lo := b.do(t, request("lo", ""), func(_ context.Context, tx pgx.Tx) int {
		tx.LargeObjects()
		return 201
	})
	want(t, lo, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
}

func TestRowsLeftOpenAreNotExecuted(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	result := b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
		effect(ctx, t)
		if _, err := tx.Query(ctx, "SELECT generate_series(1, 100000)"); err != nil {
			t.Error(err)
		}
		return 201
	})
	want(t, result, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
	if n := b.effects(t); n != 0 {
		t.Errorf("%d effects, want none", n)
	}
}

// From QueryRow to Scan the transaction is in use. A handler that never scans gets an error.
func TestRowIsOneUseOfTheTransaction(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	result := b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
		effect(ctx, t)
		row := tx.QueryRow(ctx, "SELECT 1")
		if _, err := tx.Exec(ctx, "SELECT 2"); !errors.Is(err, postgres.ErrBusy) {
			t.Errorf("Exec before Scan: %v", err)
		}
		if err := tx.QueryRow(ctx, "SELECT 3").Scan(new(int)); !errors.Is(err, postgres.ErrBusy) {
			t.Errorf("QueryRow before Scan: %v", err)
		}
		var one int
		if err := row.Scan(&one); err != nil || one != 1 {
			t.Errorf("scanned %d, error %v", one, err)
		}
		if err := row.Scan(&one); !errors.Is(err, postgres.ErrSealed) {
			t.Errorf("the second Scan: %v", err)
		}
		func() {
			defer func() { _ = recover() }()
			_ = tx.QueryRow(ctx, "SELECT 4").Scan(panics{})
		}()
		if err := tx.QueryRow(ctx, "SELECT 5").Scan(&one); err != nil || one != 5 {
			t.Errorf("after a Scanner that panics: scanned %d, error %v", one, err)
		}
		return 201
	})
	want(t, result, idempotency.OutcomeExecuted, "")

	var left pgx.Row
	result = b.do(t, request("left", ""), func(ctx context.Context, tx pgx.Tx) int {
		effect(ctx, t)
		left = tx.QueryRow(ctx, "SELECT 1")
		return 201
	})
	want(t, result, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
	if text := fmt.Sprint(result.Err); !strings.Contains(text, "rows, a batch or a copy were left open") {
		t.Errorf("a row that nobody scanned: %s", text)
	}
	if err := left.Scan(new(int)); !errors.Is(err, postgres.ErrSealed) {
		t.Errorf("Scan after the handler: %v", err)
	}
	if n := b.effects(t); n != 1 {
		t.Errorf("%d effects, want 1", n)
	}
}

// panics is a Scanner that panics.
type panics struct{}

func (panics) Scan(any) error { panic("scanned") }

// A use of the transaction after the handler has returned fails, and the answer stands.
func TestTransactionIsSealedWhenTheHandlerReturned(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	var kept pgx.Tx
	want(t, b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
		effect(ctx, t)
		kept = tx
		return 201
	}), idempotency.OutcomeExecuted, "")
	ctx := context.Background()
	if _, err := kept.Exec(ctx, "DELETE FROM effects"); !errors.Is(err, postgres.ErrSealed) {
		t.Errorf("Exec: %v", err)
	}
	if err := kept.QueryRow(ctx, "DELETE FROM effects RETURNING 1").Scan(new(int)); !errors.Is(err, postgres.ErrSealed) {
		t.Errorf("QueryRow: %v", err)
	}
	if _, err := kept.Begin(ctx); !errors.Is(err, postgres.ErrSealed) {
		t.Errorf("Begin: %v", err)
	}
	if _, err := kept.CopyFrom(ctx, pgx.Identifier{"effects"}, []string{"name"}, pgx.CopyFromRows([][]any{{"a"}})); !errors.Is(err, postgres.ErrSealed) {
		t.Errorf("CopyFrom: %v", err)
	}
	if err := kept.SendBatch(ctx, &pgx.Batch{}).Close(); !errors.Is(err, postgres.ErrSealed) {
		t.Errorf("SendBatch: %v", err)
	}
	if n := b.effects(t); n != 1 {
		t.Errorf("%d effects, want 1", n)
	}
}

// For the race detector: a goroutine that the handler left behind still uses the transaction while
// it ends.
func TestGoroutineLeftBehindCannotTouchTheCommit(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{store: &postgres.Options{AcquireTimeout: time.Minute}}) // the machine may be loaded
	for _, c := range []struct {
		name string
		sql  string
	}{
		{"short", "INSERT INTO effects (name) VALUES ($1)"},
		{"long", "SELECT pg_sleep(30) WHERE $1 <> ''"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for i := range 20 {
				var stopped atomic.Bool
				done := make(chan struct{})
				began := make(chan struct{})
				started := time.Now()
				key := fmt.Sprint(c.name, i)
				result := b.do(t, request(key, ""), func(_ context.Context, tx pgx.Tx) int {
					go func() {
						defer close(done)
						close(began)
						for !stopped.Load() {
							if _, err := tx.Exec(context.Background(), c.sql, key); err != nil {
								return
							}
						}
					}()
					<-began
					return 201
				})
				stopped.Store(true)
				select {
				case <-began:
					<-done
				default: // the handler did not run
					t.Fatal(result.Err)
				}
				if result.Outcome == idempotency.OutcomeUnknown {
					t.Errorf("outcome %q: %v", result.Outcome, result.Err)
				}
				if time.Since(started) > 10*time.Second {
					t.Error("the handler's goroutine held the answer up")
				}
			}
		})
	}
	if n := b.count(t, "SELECT count(*) FROM effects WHERE name NOT IN (SELECT key FROM idempotency_keys)"); n != 0 {
		t.Errorf("%d effects without a record", n)
	}
}

// foreignContext is a context of other code. Its contents may change at any time: printing it at
// that moment would end the process.
type foreignContext struct {
	context.Context
	Values foreignValues
}

func TestTxOutsideAHandlerPanics(t *testing.T) {
	t.Parallel()
	defer func() {
		if usage, ok := recover().(idempotency.UsageError); !ok || !strings.HasPrefix(string(usage), "idempotency/postgres: ") {
			t.Errorf("recovered %q", usage)
		}
	}()
	postgres.Tx(context.Background())
}

// A handler can't redirect the record, nor make COMMIT skip the wait for the disk.
func TestHandlerCannotRedirectTheRecord(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	ctx := context.Background()
	if _, err := b.pool.Exec(ctx, "CREATE SCHEMA evil; CREATE TABLE evil.idempotency_keys (LIKE public.idempotency_keys)"); err != nil {
		t.Fatal(err)
	}
	if _, err := b.pool.Exec(ctx, `
		CREATE TABLE seen (setting text);
		CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.seen VALUES (current_setting('synchronous_commit')); RETURN NULL; END $$;
		CREATE CONSTRAINT TRIGGER see AFTER INSERT ON idempotency_keys DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION see()`); err != nil {
		t.Fatal(err)
	}
	for i, status := range []int{201, 402} {
		want(t, b.do(t, request(string(rune('a'+i)), ""), func(ctx context.Context, tx pgx.Tx) int {
			for _, sql := range []string{"SET LOCAL search_path = evil", "SET LOCAL synchronous_commit = off"} {
				if _, err := tx.Exec(ctx, sql); err != nil {
					t.Error(err)
				}
			}
			return status
		}), idempotency.OutcomeExecuted, "")
	}
	if n := b.count(t, "SELECT count(*) FROM public.idempotency_keys"); n != 2 {
		t.Errorf("%d records, want 2", n)
	}
	if n := b.count(t, "SELECT count(*) FROM seen WHERE setting = 'on'"); n != 2 {
		t.Errorf("synchronous_commit was on at %d of 2 commits", n)
	}
}

// runawayScanner hands its rows to a goroutine that outlives it.
type runawayScanner struct {
	began chan struct{}
	ended chan error
}

func (s runawayScanner) ScanRow(rows pgx.Rows) error {
	go func() {
		close(s.began)
		for rows.Next() {
		}
		s.ended <- rows.Err()
	}()
	<-s.began
	time.Sleep(10 * time.Millisecond) // in Next
	return nil
}

// Rows and results that a callback hands to another goroutine no longer work once it has returned:
// the connection is used by one goroutine at a time.
func TestRowsOfACallbackEndWithIt(t *testing.T) {
	t.Parallel()
	const slow = "SELECT pg_sleep(0.05) FROM generate_series(1, 3)"
	b := setup(t, nil)
	for name, scan := range map[string]func(context.Context, pgx.Tx, runawayScanner) error{
		"scanner": func(ctx context.Context, tx pgx.Tx, s runawayScanner) error {
			return tx.QueryRow(ctx, slow).Scan(s)
		},
		"callback of a batch": func(ctx context.Context, tx pgx.Tx, s runawayScanner) error {
			var batch pgx.Batch
			batch.Queue(slow).QueryRow(func(row pgx.Row) error { return row.Scan(s) })
			return tx.SendBatch(ctx, &batch).Close()
		},
	} {
		result := b.do(t, request(strings.ReplaceAll(name, " ", "-"), ""), func(ctx context.Context, tx pgx.Tx) int {
			s := runawayScanner{make(chan struct{}), make(chan error, 1)}
			if err := scan(ctx, tx, s); err != nil {
				t.Logf("%s: %v", name, err)
			}
			if err := <-s.ended; err != nil && !errors.Is(err, postgres.ErrSealed) && !errors.Is(err, postgres.ErrBusy) {
				t.Errorf("%s: %v", name, err)
			}
			effect(ctx, t)
			return 201
		})
		want(t, result, idempotency.OutcomeExecuted, "")
	}
}
