package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres"
)

// Text that would end the transaction is refused before it is sent, on every way to send SQL, and
// the transaction goes on unharmed.
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

// The last check: a transaction that was ended around the seal is reported neither as executed nor
// as not executed.
func TestLostTransactionIsUnknown(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		sql    string
		status int
	}{
		"replaced, 201": {"commit; begin", 201},
		"replaced, 402": {"commit; begin", 402},
		"ended, 201":    {"commit", 201},
		"ended, 402":    {"commit", 402},
		"ended, 500":    {"commit", 500},
	} {
		for _, key := range []string{"k", ""} {
			t.Run(name+" key "+key, func(t *testing.T) {
				t.Parallel()
				b := setup(t, nil)
				result := b.do(t, request(key, ""), func(ctx context.Context, tx pgx.Tx) int {
					effect(ctx, t)
					if _, err := postgres.RawConn(tx).Exec(ctx, c.sql); err != nil {
						t.Error(err)
					}
					return c.status
				})
				if key == "" && name == "replaced, 402" {
					return // rolled back; there is no record that could be wrong
				}
				want(t, result, idempotency.OutcomeUnknown, idempotency.ReasonTransactionLost)
				if n := b.count(t, "SELECT count(*) FROM idempotency_keys"); n != 0 {
					t.Errorf("%d records, want none", n)
				}
			})
		}
	}
}

// An SQL error that the handler ignores leaves an aborted transaction, which no 2xx can commit.
func TestSwallowedErrorIsNotExecuted(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	for name, swallow := range map[string]func(tx pgx.Tx){
		"exec":      func(tx pgx.Tx) { _, _ = tx.Exec(ctx, "SELECT 1/0") },
		"query":     func(tx pgx.Tx) { rows, _ := tx.Query(ctx, "SELECT 1/0"); rows.Close() },
		"query row": func(tx pgx.Tx) { _ = tx.QueryRow(ctx, "SELECT 1/0").Scan(new(int)) },
		"batch": func(tx pgx.Tx) {
			batch := &pgx.Batch{}
			batch.Queue("SELECT 1/0")
			_ = tx.SendBatch(ctx, batch).Close()
		},
		"batch callback": func(tx pgx.Tx) {
			batch := &pgx.Batch{}
			batch.Queue("SELECT 1/0").QueryRow(func(row pgx.Row) error { _ = row.Scan(new(int)); return nil })
			_ = tx.SendBatch(ctx, batch).Close()
		},
		"copy": func(tx pgx.Tx) {
			_, _ = tx.CopyFrom(ctx, pgx.Identifier{"effects"}, []string{"name"}, pgx.CopyFromRows([][]any{{nil}}))
		},
		"prepare": func(tx pgx.Tx) { _, _ = tx.Prepare(ctx, "p", "SELECT missing") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, nil)
			result := b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
				effect(ctx, t)
				swallow(tx)
				return 201
			})
			want(t, result, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
			if n := b.effects(t); n != 0 {
				t.Errorf("%d effects, want none", n)
			}
		})
	}
}

// A serialization failure is remembered from every path, whatever the handler answers.
func TestRestartIsRememberedFromEveryPath(t *testing.T) {
	t.Parallel()
	const raise = "DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"
	ctx := context.Background()
	for name, swallow := range map[string]func(tx pgx.Tx){
		"exec":  func(tx pgx.Tx) { _, _ = tx.Exec(ctx, raise) },
		"query": func(tx pgx.Tx) { rows, _ := tx.Query(ctx, raise); rows.Close() },
		"row":   func(tx pgx.Tx) { _ = tx.QueryRow(ctx, raise).Scan() },
		"batch": func(tx pgx.Tx) {
			batch := &pgx.Batch{}
			batch.Queue("SELECT 1")
			batch.Queue(raise)
			_ = tx.SendBatch(ctx, batch).Close()
		},
		"batch callback": func(tx pgx.Tx) {
			batch := &pgx.Batch{}
			batch.Queue(raise).Query(func(rows pgx.Rows) error { rows.Close(); return nil })
			_ = tx.SendBatch(ctx, batch).Close()
		},
		"nested, released in vain": func(tx pgx.Tx) {
			nested, _ := tx.Begin(ctx)
			_, _ = nested.Exec(ctx, raise)
			_ = nested.Commit(ctx)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, nil)
			runs := 0
			result := b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
				effect(ctx, t)
				if runs++; runs == 1 {
					swallow(tx)
				}
				return 201
			})
			want(t, result, idempotency.OutcomeExecuted, "")
			if n := b.effects(t); runs != 2 || n != 1 {
				t.Errorf("%d runs and %d effects, want 2 and 1", runs, n)
			}
		})
	}
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
	b := setup(t, nil)
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
				<-done
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

// A write through the pool would escape the transaction, and a pool full of handlers would wait for
// itself.
func TestPoolIsRefusedToAHandler(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns = 1 }})
	other := setup(t, nil)
	result := b.do(t, request("k", ""), func(ctx context.Context, _ pgx.Tx) int {
		if _, err := b.pool.Exec(ctx, "INSERT INTO effects (name) VALUES ('escaped')"); !errors.Is(err, postgres.ErrPoolRefused) {
			t.Errorf("Exec on the pool: %v", err)
		}
		if _, err := b.pool.Begin(ctx); !errors.Is(err, postgres.ErrPoolRefused) {
			t.Errorf("Begin on the pool: %v", err)
		}
		nested := b.do(t, request("nested", ""), func(context.Context, pgx.Tx) int { return 201 })
		// With another context: no connection is left, and it does not wait forever.
		want(t, nested, idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
		if _, err := other.pool.Exec(ctx, "INSERT INTO effects (name) VALUES ('elsewhere')"); err != nil {
			t.Errorf("another database: %v", err)
		}
		effect(ctx, t)
		return 201
	})
	want(t, result, idempotency.OutcomeExecuted, "")
	if n := b.effects(t); n != 1 {
		t.Errorf("%d effects, want 1", n)
	}
}

// The pool recognizes a handler only by its context. A context without the attempt could belong to
// any code: its writes are committed separately, and stay however the request ends. The README says
// so, and no hook of pgx could prevent it.
func TestPoolIsRefusedToTheHandlersContextAndToNoOther(t *testing.T) {
	t.Parallel()
	for status, outcome := range map[int]idempotency.Outcome{201: idempotency.OutcomeExecuted, 402: idempotency.OutcomeExecuted, 500: idempotency.OutcomeNotExecuted} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			t.Parallel()
			b := setup(t, nil)
			result := b.do(t, request("k", ""), func(ctx context.Context, _ pgx.Tx) int {
				timeout, cancel := context.WithTimeout(ctx, time.Minute)
				defer cancel()
				for name, carrying := range map[string]context.Context{
					"its own": ctx, "one with a timeout": timeout, "one without its end": context.WithoutCancel(ctx),
				} {
					if _, err := b.pool.Exec(carrying, "INSERT INTO effects (name) VALUES ('refused')"); !errors.Is(err, postgres.ErrPoolRefused) {
						t.Errorf("%s: %v, want ErrPoolRefused", name, err)
					}
				}
				if _, err := b.pool.Exec(context.Background(), "INSERT INTO effects (name) VALUES ('escaped')"); err != nil {
					t.Errorf("a context that carries no attempt: %v", err)
				}
				return status
			})
			want(t, result, outcome, "")
			if n := b.count(t, "SELECT count(*) FROM effects WHERE name = 'escaped'"); n != 1 {
				t.Errorf("%d rows escaped, want 1", n)
			}
			if n := b.count(t, "SELECT count(*) FROM effects WHERE name = 'refused'"); n != 0 {
				t.Errorf("%d rows that were refused are there", n)
			}
		})
	}
}

// foreignContext is a context of other code. Its contents may change at any time: printing it at
// that moment would end the process.
type foreignContext struct {
	context.Context
	Values foreignValues
}

type foreignValues struct{ read *atomic.Int64 }

func (v foreignValues) String() string { v.read.Add(1); return "canary" }

// acquires keeps the contexts of Acquires that have ended.
type acquires struct{ ended []context.Context }

func (*acquires) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	return ctx
}
func (*acquires) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}
func (*acquires) TraceAcquireStart(ctx context.Context, _ *pgxpool.Pool, _ pgxpool.TraceAcquireStartData) context.Context {
	return ctx
}

func (a *acquires) TraceAcquireEnd(ctx context.Context, _ *pgxpool.Pool, _ pgxpool.TraceAcquireEndData) {
	a.ended = append(a.ended, ctx)
}

// If a handler or a tracer of the pool prints one of our contexts, it reads no value that others
// put below it.
func TestContextsPrintNothingThatIsNotOurs(t *testing.T) {
	t.Parallel()
	var read atomic.Int64
	tracer := &acquires{}
	b := setup(t, &setupOptions{cold: true, configure: func(c *pgxpool.Config) {
		c.ConnConfig.Tracer = tracer
		postgres.Configure(c, nil)
	}})
	print := func(ctx context.Context) {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%d"} {
			if text := fmt.Sprintf(verb, ctx); strings.Contains(text, "canary") {
				t.Errorf("%s of %T is %q", verb, ctx, text)
			}
		}
	}
	values := foreignValues{&read}
	attempt, _, err := b.store.Begin(t.Context(), claimOf(request("canary", "")))
	if err != nil {
		t.Fatal(err)
	}
	ctx := attempt.Context(foreignContext{t.Context(), values})
	print(ctx)
	if _, err := b.pool.Exec(foreignContext{ctx, values}, "SELECT 1"); !errors.Is(err, postgres.ErrPoolRefused) {
		t.Errorf("Exec on the pool: %v", err)
	}
	print(tracer.ended[len(tracer.ended)-1])
	_ = attempt.Seal()
	if err := attempt.Rollback(t.Context()); err != nil {
		t.Error(err)
	}
	if n := read.Load(); n != 0 {
		t.Errorf("values of others were read %d times", n)
	}
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

// Rows and results that a callback hands to another goroutine work no more once it has returned: the
// connection is used by one goroutine at a time.
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
