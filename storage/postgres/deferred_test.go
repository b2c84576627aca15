package postgres_test

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres"
)

// deferEffect defers the write that must happen once.
func deferEffect(ctx context.Context, t *testing.T) {
	t.Helper()
	if err := postgres.DeferExec(ctx, "INSERT INTO effects (name) VALUES ($1)", "deferred"); err != nil {
		t.Errorf("defer: %v", err)
	}
}

// deferred defers one statement and answers 201.
func deferred(t *testing.T, sql string, args ...any) func(context.Context, pgx.Tx) int {
	return func(ctx context.Context, _ pgx.Tx) int {
		t.Helper()
		if err := postgres.DeferExec(ctx, sql, args...); err != nil {
			t.Errorf("%s: %v", sql, err)
		}
		return 201
	}
}

// encodings are the modes that differ in how they encode and prepare deferred statements.
func encodings() map[string]*setupOptions {
	all := modes()
	return map[string]*setupOptions{"default mode": all["default mode"], "cache describe": all["cache describe"], "exec mode": all["exec mode"]}
}

// modes are the ways in which the tests of round trips send statements.
func modes() map[string]*setupOptions {
	mode := func(m pgx.QueryExecMode) func(*pgxpool.Config) {
		return func(c *pgxpool.Config) { c.ConnConfig.DefaultQueryExecMode = m }
	}
	return map[string]*setupOptions{
		"default mode":     {},
		"exec mode":        {configure: mode(pgx.QueryExecModeExec)},
		"describe":         {configure: mode(pgx.QueryExecModeDescribeExec)},
		"cache describe":   {configure: mode(pgx.QueryExecModeCacheDescribe)},
		"simple protocol":  {configure: mode(pgx.QueryExecModeSimpleProtocol)},
		"without settings": {cold: true},
		"pooler":           {store: &postgres.Options{TransactionPooling: true}, configure: mode(pgx.QueryExecModeExec)},
		"pooler, describe": {store: &postgres.Options{TransactionPooling: true}, configure: mode(pgx.QueryExecModeCacheDescribe)},
	}
}

// Deferred statements are committed if and only if the answer keeps the handler's writes, in the
// order of the calls and after all other statements.
func TestDeferredStatementsShareTheFateOfTheAnswer(t *testing.T) {
	t.Parallel()
	for name, opts := range modes() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, opts)
			for _, c := range []struct {
				key     string
				status  int
				outcome idempotency.Outcome
				effects int
			}{
				{"paid", 201, idempotency.OutcomeExecuted, 3},
				{"paid", 201, idempotency.OutcomeReplayed, 0},
				{"declined", 402, idempotency.OutcomeExecuted, 0},
				{"forgotten", 500, idempotency.OutcomeNotExecuted, 0},
				{"", 201, idempotency.OutcomeExecuted, 3},
				{"", 402, idempotency.OutcomeNotExecuted, 0},
			} {
				b.exec(t, "DELETE FROM effects")
				result := b.do(t, request(c.key, ""), func(ctx context.Context, tx pgx.Tx) int {
					for i, name := range []string{"second", "third"} {
						if err := postgres.DeferExec(ctx, "INSERT INTO effects (name, attempt_id) SELECT $1, NULL WHERE $2 = (SELECT count(*) FROM effects)", name, i+1); err != nil {
							t.Error(err)
						}
					}
					if n := b.effects(t); n != 0 {
						t.Errorf("%d effects while the handler runs", n)
					}
					if _, err := tx.Exec(ctx, "INSERT INTO effects (name) VALUES ('first')"); err != nil {
						t.Error(err)
					}
					return c.status
				})
				if result.Outcome != c.outcome || b.effects(t) != c.effects {
					t.Errorf("key %q, %d: %q with %d effects, want %q with %d: %v", c.key, c.status, result.Outcome, b.effects(t), c.outcome, c.effects, result.Err)
				}
			}
			if n := b.count(t, "SELECT count(*) FROM idempotency_keys"); n != 2 {
				t.Errorf("%d records, want those of the payment and of the decline", n)
			}
		})
	}
}

// A handler with deferred statements costs one round trip less than the same handler between BEGIN
// and COMMIT, which sends them as one batch.
func TestDeferredStatementsSaveARoundTrip(t *testing.T) {
	t.Parallel()
	const insert = "INSERT INTO effects (name) VALUES ($1)"
	for name, opts := range modes() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := context.Background()
			o := *opts
			o.configure = func(c *pgxpool.Config) {
				c.MaxConns, c.MinConns = 1, 1
				if opts.configure != nil {
					opts.configure(c)
				}
			}
			b := setup(t, &o)
			engine := idempotency.NewEngine(b.store, nil)
			cost := func(do func()) int {
				before := b.wire.Count()
				do()
				return b.wire.Count() - before
			}
			plain := func() {
				tx, err := b.pool.Begin(ctx)
				if err != nil {
					t.Fatal(err)
				}
				statements(ctx, t, tx)
				var last pgx.Batch
				last.Queue(insert, "a")
				last.Queue(insert, "b")
				if err := tx.SendBatch(ctx, &last).Close(); err != nil {
					t.Fatal(err)
				}
				if err := tx.Commit(ctx); err != nil {
					t.Fatal(err)
				}
			}
			keyed := func(key string, status int, outcome idempotency.Outcome) func() {
				return func() {
					result := engine.Do(ctx, request(key, ""), func(ctx context.Context) (*idempotency.Answer, error) {
						statements(ctx, t, postgres.Tx(ctx))
						if err := errors.Join(postgres.DeferExec(ctx, insert, "a"), postgres.DeferExec(ctx, insert, "b")); err != nil {
							t.Error(err)
						}
						return answer(status), nil
					})
					want(t, result, outcome, result.Reason)
				}
			}
			cost(plain)                                                     // warms the connection up
			first := cost(keyed("first", 201, idempotency.OutcomeExecuted)) // learns the statement
			bare := cost(plain)
			if o.store == nil && name != "describe" && bare != handlerStatements+3 {
				t.Fatalf("a plain transaction costs %d round trips: the count is wrong", bare)
			}
			bare = handlerStatements + 3
			if name == "describe" { // pgx describes each statement each time
				bare += handlerStatements
			}
			if most := bare; first > most {
				t.Errorf("the first request with a deferred statement costs %d round trips, want at most %d", first, most)
			}
			for _, c := range []struct {
				name string
				do   func()
				want int
			}{
				{"fresh request", keyed("fresh", 201, idempotency.OutcomeExecuted), bare - 1},
				{"without a key", keyed("", 201, idempotency.OutcomeExecuted), bare - 1},
				{"decline", keyed("declined", 402, idempotency.OutcomeExecuted), bare - 1},
				{"forgotten answer", keyed("forgotten", 500, idempotency.OutcomeNotExecuted), bare - 1},
				{"replay", keyed("fresh", 201, idempotency.OutcomeReplayed), 1},
			} {
				if got := cost(c.do); got != c.want {
					t.Errorf("%s: %d round trips, want %d", c.name, got, c.want)
				}
			}
		})
	}
}

// COMMIT follows a deferred statement in the same flush, so a statement that touches too few or too
// many rows fails the flush.
func TestDeferredStatementThatTouchesAnotherNumberOfRowsIsNotExecuted(t *testing.T) {
	t.Parallel()
	const update, insert, remove = "UPDATE effects SET name = 'changed' WHERE name = $1", "INSERT INTO effects (name) SELECT $1 FROM effects", "DELETE FROM effects WHERE name = $1"
	for name, opts := range encodings() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, opts)
			for _, c := range []struct {
				sql     string
				args    []any
				touches int // rows, of those called one, two and two
			}{
				{update, []any{"none"}, 0}, {update, []any{"one"}, 1}, {update, []any{"two"}, 2},
				{remove, []any{"none"}, 0}, {remove, []any{"one"}, 1}, {remove, []any{"two"}, 2},
				{insert, []any{"new"}, 3}, {insert + " LIMIT 1;", []any{"new"}, 1}, {insert + " WHERE false -- none", []any{"new"}, 0},
				{update + " RETURNING id, name", []any{"two"}, 2},
				{"SELECT FROM effects WHERE name = $1 FOR UPDATE", []any{"two"}, 2}, {"SELECT pg_notify('c', $1)", []any{"x"}, 1},
			} {
				for rows := range postgres.Rows(4) {
					b.exec(t, "TRUNCATE effects")
					b.exec(t, "INSERT INTO effects (name) VALUES ('one'), ('two'), ('two')")
					for _, key := range []string{fmt.Sprint(c.sql, c.args, rows), ""} {
						args := append([]any{rows}, c.args...)
						if rows == 1 && key != "" {
							args = c.args // the default
						}
						if len(key) > 255 {
							t.Fatal(key)
						}
						req := request(strings.Map(func(r rune) rune {
							if r <= ' ' || r == ',' || r == '"' {
								return '_'
							}
							return r
						}, key), "")
						before := b.effectNames(t)
						result := b.do(t, req, deferred(t, c.sql, args...))
						if int(rows) == c.touches {
							want(t, result, idempotency.OutcomeExecuted, "")
							break // the rows have changed by now
						}
						want(t, result, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
						if result.Err == nil || !strings.Contains(result.Err.Error(), "22012") || !strings.Contains(result.Err.Error(), "deferred statement 1 touched another number of rows") {
							t.Errorf("%s: %v names neither SQLSTATE nor remedy", c.sql, result.Err)
						}
						if now := b.effectNames(t); now != before {
							t.Errorf("%s with %d rows: %s became %s", c.sql, rows, before, now)
						}
					}
				}
				want(t, b.do(t, request("", ""), deferred(t, c.sql, append([]any{postgres.AnyRowsUnchecked}, c.args...)...)), idempotency.OutcomeExecuted, "")
			}
		})
	}
}

func (b *testBundle) effectNames(t *testing.T) string {
	t.Helper()
	return b.text(t, "SELECT coalesce(string_agg(id || name, ' ' ORDER BY id), '') FROM effects")
}

// If a trigger drops a row, that is found too, and the role needs no right to read the row that it
// writes.
func TestDeferredStatementIsCountedByWhatWasWritten(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.exec(t, `CREATE TABLE ledger (name text);
		CREATE FUNCTION drop() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF NEW.name = 'dropped' THEN RETURN NULL; END IF; RETURN NEW; END $$;
		CREATE TRIGGER drop BEFORE INSERT ON ledger FOR EACH ROW EXECUTE FUNCTION drop();
		CREATE ROLE writer_`+b.database(t)+`; GRANT INSERT ON ledger TO writer_`+b.database(t)+`; GRANT SELECT, INSERT ON idempotency_keys TO writer_`+b.database(t))
	t.Cleanup(func() { b.exec(t, "DROP OWNED BY writer_"+b.database(t)); b.exec(t, "DROP ROLE writer_"+b.database(t)) })
	for name, outcome := range map[string]idempotency.Outcome{"kept": idempotency.OutcomeExecuted, "dropped": idempotency.OutcomeNotExecuted} {
		result := b.do(t, request(name, ""), func(ctx context.Context, tx pgx.Tx) int {
			if _, err := tx.Exec(ctx, "SET LOCAL ROLE writer_"+b.database(t)); err != nil {
				t.Error(err)
			}
			return deferred(t, "INSERT INTO ledger VALUES ($1)", name)(ctx, tx)
		})
		want(t, result, outcome, result.Reason)
	}
	if n := b.count(t, "SELECT count(*) FROM ledger"); n != 1 {
		t.Errorf("%d rows, want the one that was kept", n)
	}
}

func (b *testBundle) database(t *testing.T) string {
	t.Helper()
	return b.text(t, "SELECT current_database()")
}

// The place of an error in the flush decides: an error of a deferred statement is never about the
// record.
func TestErrorsOfDeferredStatementsAreTheirOwn(t *testing.T) {
	t.Parallel()
	for state, reason := range map[string]idempotency.Reason{
		"23505": idempotency.ReasonHandlerFailed, "23502": idempotency.ReasonHandlerFailed, "P0001": idempotency.ReasonHandlerFailed,
		"25006": idempotency.ReasonHandlerFailed, "42501": idempotency.ReasonHandlerFailed, "0A000": idempotency.ReasonHandlerFailed, "22012": idempotency.ReasonHandlerFailed,
		"40001": idempotency.ReasonUnavailable, "40P01": idempotency.ReasonUnavailable, "53100": idempotency.ReasonUnavailable, "55P03": idempotency.ReasonUnavailable, "57014": idempotency.ReasonUnavailable,
	} {
		t.Run(state, func(t *testing.T) {
			t.Parallel()
			isolations := []pgx.TxIsoLevel{pgx.ReadCommitted}
			if state == "23505" || state == "40001" {
				isolations = append(isolations, pgx.RepeatableRead)
			}
			for _, isolation := range isolations {
				b := setup(t, &setupOptions{store: &postgres.Options{Isolation: isolation}})
				b.exec(t, `CREATE FUNCTION fault() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
						RAISE SQLSTATE '`+state+`' USING SCHEMA = 'public', TABLE = 'idempotency_keys', CONSTRAINT = 'idempotency_keys_pkey', COLUMN = 'created_at', MESSAGE = 'secret';
					END $$;
					CREATE TRIGGER fault BEFORE INSERT ON effects FOR EACH ROW WHEN (NEW.name = 'bad') EXECUTE FUNCTION fault()`)
				for _, key := range []string{"k", ""} {
					runs := 0
					result := b.do(t, request(key, ""), func(ctx context.Context, _ pgx.Tx) int {
						runs++
						deferEffect(ctx, t)
						return deferred(t, "INSERT INTO effects (name) VALUES ($1)", "bad")(ctx, nil)
					})
					want(t, result, idempotency.OutcomeNotExecuted, reason)
					if result.Err == nil || !strings.Contains(result.Err.Error(), state) || !strings.Contains(result.Err.Error(), "deferred statement 2") ||
						strings.Contains(result.Err.Error(), "secret") || strings.Contains(result.Err.Error(), "doctor") || strings.Contains(result.Err.Error(), "GRANT") {
						t.Errorf("%v: want its SQLSTATE and its place, no data, and no remedy for the record", result.Err)
					}
					if again := state[:2] == "40"; again != (runs == 4) || !again && runs != 1 {
						t.Errorf("%d runs", runs)
					}
				}
				want(t, b.do(t, request("declined", ""), func(ctx context.Context, _ pgx.Tx) int {
					deferred(t, "INSERT INTO effects (name) VALUES ($1)", "bad")(ctx, nil)
					return 402
				}), idempotency.OutcomeExecuted, "")
				if n := b.effects(t); n != 0 {
					t.Errorf("%d effects", n)
				}
			}
		})
	}
}

// A unique constraint of the service's own may have the name of the record's primary key. If it
// refuses a row, that is no lost race: no other attempt has the key.
func TestDuplicateOfADeferredStatementIsNoLostRace(t *testing.T) {
	t.Parallel()
	for _, deferrable := range []string{"", " DEFERRABLE INITIALLY DEFERRED"} {
		b := setup(t, nil)
		b.exec(t, `CREATE SCHEMA other; CREATE TABLE other.idempotency_keys (name text, CONSTRAINT idempotency_keys_pkey UNIQUE (name)`+deferrable+`)`)
		b.exec(t, "INSERT INTO other.idempotency_keys VALUES ('taken')")
		runs := 0
		result := b.do(t, request("k", ""), func(ctx context.Context, _ pgx.Tx) int {
			runs++
			return deferred(t, "INSERT INTO other.idempotency_keys VALUES ($1)", "taken")(ctx, nil)
		})
		want(t, result, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
		if runs != 1 {
			t.Errorf("%d runs", runs)
		}
	}
}

// A request that starts again collects its deferred statements again.
func TestDeferredStatementsAreCollectedInEachRun(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.exec(t, `CREATE SEQUENCE tries;
		CREATE FUNCTION fault() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF nextval('tries') < 3 THEN RAISE SQLSTATE '40001'; END IF; RETURN NEW; END $$;
		CREATE TRIGGER fault BEFORE INSERT ON effects FOR EACH ROW WHEN (NEW.name = 'last') EXECUTE FUNCTION fault()`)
	runs := 0
	want(t, b.do(t, request("k", ""), func(ctx context.Context, _ pgx.Tx) int {
		runs++
		deferEffect(ctx, t)
		return deferred(t, "INSERT INTO effects (name) VALUES ($1)", "last")(ctx, nil)
	}), idempotency.OutcomeExecuted, "")
	if n := b.effects(t); runs != 3 || n != 2 {
		t.Errorf("%d runs and %d effects, want 3 and 2", runs, n)
	}
}

// A statement that can't be counted, ends the transaction or is no single statement is refused, and
// the request fails, even if the handler ignores the error.
func TestStatementsThatAreNotDeferred(t *testing.T) {
	t.Parallel()
	for name, opts := range encodings() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, opts)
			for i, c := range []struct {
				sql  string
				args []any
				says string
			}{
				{"COMMIT", nil, "COMMIT"},
				{"INSERT INTO effects (name) VALUES ('a'); COMMIT", nil, "several"},
				{"LISTEN c", nil, "LISTEN"},
				{"SET LOCAL synchronous_commit = off", nil, "INSERT, UPDATE, DELETE or SELECT"},
				{"SET ROLE nobody", nil, "INSERT, UPDATE, DELETE or SELECT"},
				{"COPY effects FROM STDIN", nil, "INSERT, UPDATE, DELETE or SELECT"},
				{"CALL f()", nil, "INSERT, UPDATE, DELETE or SELECT"},
				{"", nil, "INSERT, UPDATE, DELETE or SELECT"},
				{"MERGE INTO effects USING effects AS e ON true WHEN MATCHED THEN DELETE", []any{postgres.AnyRowsUnchecked}, "INSERT, UPDATE, DELETE or SELECT"},
				{"WITH gone AS (DELETE FROM effects RETURNING 1) SELECT FROM gone", []any{postgres.AnyRowsUnchecked}, "WITH"},
				{"INSERT INTO effects (name) VALUES ('a') RETURNING 1) SELECT FROM (SELECT 1", nil, "parentheses"},
				{"INSERT INTO effects (name) VALUES ('open", nil, "does not end"},
				{"INSERT INTO effects (name) VALUES ($1)", nil, "1 parameters and 0 arguments"},
				{"INSERT INTO effects (name) VALUES ($1)", []any{"a", "b"}, "1 parameters and 2 arguments"},
				{"INSERT INTO effects (name) VALUES ($1)", []any{"a", postgres.Rows(1)}, "in front of"},
				{"INSERT INTO effects (name) VALUES ($1)", []any{postgres.Rows(-2), "a"}, "Rows is -2"},
				{"INSERT INTO effects (name) VALUES ($1)", []any{pgx.QueryExecModeExec, "a"}, "QueryExecMode"},
				{"INSERT INTO effects (name) VALUES ($1)", []any{struct{ s string }{"secret"}}, "encode"},
				{"INSERT INTO effects (name) VALUES (@name)", []any{pgx.StrictNamedArgs{"other": "secret"}}, "rewrite"},
			} {
				result := b.do(t, request(fmt.Sprint("k", i), ""), func(ctx context.Context, _ pgx.Tx) int {
					if err := postgres.DeferExec(ctx, c.sql, c.args...); err == nil || !strings.Contains(err.Error(), c.says) {
						t.Errorf("%s: error %v, want one about %q", c.sql, err, c.says)
					}
					effect(ctx, t) // the transaction is not aborted
					return 201
				})
				want(t, result, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
				if result.Err == nil || strings.Contains(result.Err.Error(), "secret") {
					t.Errorf("%s: %v", c.sql, result.Err)
				}
				want(t, b.do(t, request(fmt.Sprint("declined", i), ""), func(ctx context.Context, _ pgx.Tx) int {
					_ = postgres.DeferExec(ctx, c.sql, c.args...) // checked above
					return 402
				}), idempotency.OutcomeExecuted, "")
			}
			if n := b.effects(t); n != 0 {
				t.Errorf("%d effects", n)
			}
		})
	}
}

// DeferExec accepts text and arguments as pgx does.
func TestTextAndArgumentsOfDeferredStatements(t *testing.T) {
	t.Parallel()
	for name, opts := range encodings() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, opts)
			b.exec(t, "CREATE TABLE \"returning\" (n numeric, t timestamptz, a text[], j jsonb, u uuid, s text, b bytea)")
			at := time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC)
			names := []string{"a", "b"}
			want(t, b.do(t, request("k", ""), func(ctx context.Context, _ pgx.Tx) int {
				for _, err := range []error{
					postgres.DeferExec(ctx, `;; /* all ( */ insert into "returning" (n, t, a, j, u, s, b) -- )
						values ($1, $2, $3, ($4)::jsonb, $5, E'\'returning ;' || $$)$$ || $6, $7) ; ; -- RETURNING`,
						int64(12), at, names, `{"k": "v"}`, "6ba7b810-9dad-11d1-80b4-00c04fd430c8", nil, []byte{0, 1}),
					postgres.DeferExec(ctx, `UPDATE "returning" SET s = @s`, postgres.Rows(1), pgx.NamedArgs{"s": "returning"}),
					postgres.DeferExec(ctx, `UPDATE "returning" AS r SET n = r.n + 1 FROM (SELECT 1 AS one) AS x WHERE x.one = $1 returning *, r.n`, 1),
					postgres.DeferExec(ctx, `DELETE FROM "returning"`+" WHERE false", postgres.Rows(0)),
					postgres.DeferExec(ctx, `SELECT 1`),
				} {
					if err != nil {
						t.Error(err)
					}
				}
				names[0] = "changed" // it is encoded already
				return 201
			}), idempotency.OutcomeExecuted, "")
			if n := b.count(t, `SELECT count(*) FROM "returning" WHERE n = 13 AND t = $1 AND a = '{a,b}' AND j = '{"k":"v"}' AND s = 'returning' AND b = '\x0001'`, at); n != 1 {
				t.Error("the row is not what was deferred")
			}
		})
	}
}

// Options.DeferredMax is the maximum number of statements that a request may defer.
func TestDeferredMax(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ option, most int }{{0, 64}, {3, 3}} {
		b := setup(t, &setupOptions{store: &postgres.Options{DeferredMax: c.option}})
		for _, n := range []int{c.most, c.most + 1} {
			result := b.do(t, request(fmt.Sprint("k", n), ""), func(ctx context.Context, _ pgx.Tx) int {
				for i := range n {
					if err := postgres.DeferExec(ctx, "INSERT INTO effects (name) VALUES ($1)", "a"); (err != nil) != (i >= c.most) {
						t.Errorf("statement %d: %v", i, err)
					}
				}
				return 201
			})
			if n > c.most {
				want(t, result, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
			} else {
				want(t, result, idempotency.OutcomeExecuted, "")
			}
		}
		if n := b.effects(t); n != c.most {
			t.Errorf("%d effects, want %d", n, c.most)
		}
	}
	defer func() {
		if text := fmt.Sprint(recover()); !strings.Contains(text, "Options.DeferredMax is -1") {
			t.Errorf("panic %s", text)
		}
	}()
	postgres.New(setup(t, nil).pool, &postgres.Options{DeferredMax: -1})
}

// Statements that were deferred while a nested transaction was open are undone with it.
func TestNestedTransactionUndoesWhatWasDeferredInIt(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	want(t, b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
		insert := func(name string) {
			if err := postgres.DeferExec(ctx, "INSERT INTO effects (name) VALUES ($1)", name); err != nil {
				t.Error(err)
			}
		}
		for i, commit := range []bool{true, false, true} {
			nested, err := tx.Begin(ctx)
			if err != nil {
				t.Fatal(err)
			}
			insert(fmt.Sprintf("%d%v", i, commit))
			if !commit {
				if err := postgres.DeferExec(ctx, "no SQL"); err == nil {
					t.Error("deferred")
				}
			}
			end := nested.Rollback
			if commit {
				end = nested.Commit
			}
			if err := end(ctx); err != nil {
				t.Error(err)
			}
		}
		insert("outside")
		return 201
	}), idempotency.OutcomeExecuted, "")
	if names := b.effectNames(t); names != "10true 22true 3outside" {
		t.Errorf("effects %q", names)
	}
}

// The transaction is for one goroutine at a time, for DeferExec too. A statement that comes too
// late changes nothing. One that comes in between fails the request, even if its error is ignored.
func TestDeferExecIsForOneGoroutineAtATime(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	insert := func(ctx context.Context) error {
		return postgres.DeferExec(ctx, "INSERT INTO effects (name) VALUES ('late')")
	}
	want(t, b.do(t, request("busy", ""), func(ctx context.Context, tx pgx.Tx) int {
		rows, err := tx.Query(ctx, "SELECT generate_series(1, 3)")
		if err != nil {
			t.Fatal(err)
		}
		if err := insert(ctx); !errors.Is(err, postgres.ErrBusy) {
			t.Errorf("between rows: %v", err)
		}
		rows.Close()
		return 201
	}), idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
	want(t, b.do(t, request("callback", ""), func(ctx context.Context, tx pgx.Tx) int {
		var batch pgx.Batch
		batch.Queue("SELECT 1").QueryRow(func(pgx.Row) error {
			if err := insert(ctx); !errors.Is(err, postgres.ErrBusy) {
				t.Errorf("in a callback: %v", err)
			}
			return nil
		})
		_ = tx.SendBatch(ctx, &batch).Close() // the callback did not scan
		return 201
	}), idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
	for i := range 20 {
		const goroutines = 8
		var late context.Context
		var busy atomic.Int64
		before := b.effects(t)
		result := b.do(t, request(fmt.Sprint("at-once", i), ""), func(ctx context.Context, _ pgx.Tx) int {
			late = ctx
			var done sync.WaitGroup
			for range goroutines {
				done.Go(func() {
					if err := insert(ctx); errors.Is(err, postgres.ErrBusy) {
						busy.Add(1)
					} else if err != nil {
						t.Error(err)
					}
				})
			}
			done.Wait()
			return 201
		})
		if err := insert(late); !errors.Is(err, postgres.ErrSealed) {
			t.Errorf("after the handler: %v", err)
		}
		added := b.effects(t) - before
		if executed := result.Outcome == idempotency.OutcomeExecuted; executed != (busy.Load() == 0) || executed && added != goroutines || !executed && added != 0 {
			t.Errorf("%d of %d were busy: %q with %d effects: %v", busy.Load(), goroutines, result.Outcome, added, result.Err)
		}
	}
}

func TestDeferExecOutsideAHandlerPanics(t *testing.T) {
	t.Parallel()
	defer func() {
		if err, ok := recover().(idempotency.UsageError); !ok || !strings.Contains(string(err), "DeferExec outside an idempotent handler") {
			t.Errorf("panic %v", err)
		}
	}()
	_ = postgres.DeferExec(context.Background(), "SELECT 1")
}

// After DerivedKey a failed deferred statement leaves the request unknown, like any other end
// without a record.
func TestDeferredStatementThatFailsAfterDerivedKeyIsUnknown(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	want(t, b.do(t, request("k", ""), func(ctx context.Context, _ pgx.Tx) int {
		idempotency.DerivedKey(ctx, "charge")
		return deferred(t, "DELETE FROM effects")(ctx, nil)
	}), idempotency.OutcomeUnknown, idempotency.ReasonCallUnknown)
}

// The look-up of a lost COMMIT finds deferred statements and record together, or neither.
func TestLostCommitWithDeferredStatementsIsResolved(t *testing.T) {
	t.Parallel()
	for _, reached := range []bool{true, false} {
		var armed atomic.Bool
		b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) {
			dial := c.ConnConfig.DialFunc
			c.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
				conn, err := dial(ctx, network, address)
				return &lossyConn{Conn: conn, armed: &armed, reached: reached}, err
			}
		}})
		result := b.do(t, request("k", ""), func(ctx context.Context, _ pgx.Tx) int {
			deferEffect(ctx, t)
			armed.Store(true)
			return 201
		})
		if reached {
			want(t, result, idempotency.OutcomeExecuted, "")
		} else {
			want(t, result, idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
		}
		effects, records := b.effects(t), b.count(t, "SELECT count(*) FROM idempotency_keys")
		if effects != records || (effects == 1) != reached {
			t.Errorf("reached %v: %d effects and %d records", reached, effects, records)
		}
	}
}

// lossyConn loses the next flush once it is armed, or loses the reply if the flush should reach the
// server.
type lossyConn struct {
	net.Conn
	armed   *atomic.Bool
	reached bool
	lost    atomic.Bool
}

func (c *lossyConn) Write(p []byte) (int, error) {
	if c.armed.CompareAndSwap(true, false) {
		c.lost.Store(true)
		if !c.reached {
			_ = c.Close() // everything after it fails
		}
	}
	return c.Conn.Write(p)
}

func (c *lossyConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.lost.Load() {
		return 0, errors.New("the reply is lost")
	}
	return n, err
}

// In a transaction that is not the claim's, an error of a deferred statement proves nothing: the
// claim's transaction may have committed.
func TestLostTransactionWithAFailingDeferredStatementIsUnknown(t *testing.T) {
	t.Parallel()
	for _, key := range []string{"k", ""} {
		b := setup(t, nil)
		want(t, b.do(t, request(key, ""), func(ctx context.Context, tx pgx.Tx) int {
			effect(ctx, t)
			deferred(t, "DELETE FROM effects WHERE name = 'none'")(ctx, tx)
			if _, err := postgres.RawConn(tx).Exec(ctx, "COMMIT; BEGIN"); err != nil {
				t.Error(err)
			}
			return 201
		}), idempotency.OutcomeUnknown, idempotency.ReasonTransactionLost)
		if n := b.effects(t); n != 1 {
			t.Errorf("%d effects, want the first one", n)
		}
	}
}

// A deferred statement that changes the encoding can't move the record to another key.
func TestDeferredStatementDoesNotMoveTheRecord(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	req := request("k", "")
	req.Key.Scope = "Zo\u00eb"
	for range 2 {
		want(t, b.do(t, req, func(ctx context.Context, _ pgx.Tx) int {
			deferEffect(ctx, t)
			return deferred(t, "SELECT set_config('client_encoding', 'LATIN1', true)")(ctx, nil)
		}), idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
	}
	if n := b.effects(t); n != 0 {
		t.Errorf("paid %d times", n)
	}
}

// The record comes after deferred statements, so they can't weaken its settings, and the work that
// they leave to COMMIT runs before it.
func TestDeferredStatementsRunBeforeTheRecord(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.exec(t, `CREATE TABLE seen (at text, setting text);
		CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.seen VALUES (TG_TABLE_NAME, current_setting('synchronous_commit')); RETURN NEW; END $$;
		CREATE CONSTRAINT TRIGGER see AFTER INSERT ON effects DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION see();
		CREATE TRIGGER see AFTER INSERT ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION see()`)
	want(t, b.do(t, request("k", ""), func(ctx context.Context, _ pgx.Tx) int {
		deferEffect(ctx, t)
		return deferred(t, "SELECT set_config('synchronous_commit', 'off', true)")(ctx, nil)
	}), idempotency.OutcomeExecuted, "")
	var seen string
	if err := b.pool.QueryRow(context.Background(), "SELECT string_agg(at || ' ' || setting, ', ') FROM seen").Scan(&seen); err != nil || seen != "effects off, idempotency_keys on" {
		t.Errorf("%q, %v", seen, err)
	}
}

// Parameters that may arrive in part are sent after a Sync, as a long record is. An error before
// the Sync fails everything after it.
func TestLongDeferredStatementsAreSentBehindASync(t *testing.T) {
	t.Parallel()
	sent := new(atomic.Int64)
	b := setup(t, &setupOptions{configure: func(config *pgxpool.Config) {
		dial := config.ConnConfig.DialFunc
		config.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dial(ctx, network, address)
			return syncs{conn, sent}, err
		}
	}})
	b.exec(t, `ALTER TABLE effects ADD CHECK (name !~ '^bad')`)
	const most = postgres.TogetherBytesMax - 40 // headers and body of the record
	for i, c := range []struct {
		lengths []int
		syncs   int
	}{
		{[]int{1}, 1}, {[]int{100, 100, 100}, 1}, {[]int{most - 1}, 1}, {[]int{postgres.TogetherBytesMax}, 2},
		{[]int{postgres.TogetherBytesMax + 1}, 3}, {[]int{300, 300}, 2}, {[]int{1 << 20, 1, 1 << 20}, 5}, {[]int{1, 1 << 20}, 3},
	} {
		for _, start := range []string{"good", "bad"} {
			key := fmt.Sprint(start, i)
			result := b.do(t, request(key, ""), func(ctx context.Context, _ pgx.Tx) int {
				for j, length := range c.lengths {
					name := strings.Repeat("x", length)
					if j == 0 && length >= 3 && start == "bad" {
						name = "bad" + name[3:]
					}
					deferred(t, "INSERT INTO effects (name) VALUES ($1)", name)(ctx, nil)
				}
				sent.Store(0)
				return 201
			})
			if c.lengths[0] >= 3 && start == "bad" {
				want(t, result, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
				if result.Err == nil || !strings.Contains(result.Err.Error(), "23514") {
					t.Errorf("%v: %v", c.lengths, result.Err)
				}
				continue
			}
			want(t, result, idempotency.OutcomeExecuted, "")
			if n := int(sent.Load()); n != c.syncs {
				t.Errorf("%v: %d Syncs, want %d", c.lengths, n, c.syncs)
			}
		}
	}
	if n := b.count(t, "SELECT count(*) FROM effects WHERE name ~ '^bad'"); n != 0 {
		t.Errorf("%d rows of failed requests", n)
	}
}

// A warning of a deferred statement, or of a trigger that was deferred to COMMIT, is not taken for
// that of a COMMIT that did not wait.
func TestWarningOfADeferredStatementIsItsOwn(t *testing.T) {
	t.Parallel()
	config := configOfOwnServer(t)
	b := setup(t, &setupOptions{database: config.ConnString()})
	b.exec(t, `CREATE TABLE watched (name text);
		CREATE FUNCTION warn() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE WARNING 'low'; RETURN NEW; END $$;
		CREATE TRIGGER warn BEFORE INSERT ON effects FOR EACH ROW EXECUTE FUNCTION warn();
		CREATE CONSTRAINT TRIGGER warn AFTER INSERT ON watched DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION warn()`)
	setStandbys(t, b.pool, "nobody")
	defer setStandbys(t, b.pool, "")
	engine := idempotency.NewEngine(b.store, &idempotency.Options{Timeouts: idempotency.Timeouts{Resolve: 10 * time.Millisecond}})
	trigger := func(ctx context.Context, tx pgx.Tx) int {
		if _, err := tx.Exec(ctx, "INSERT INTO watched VALUES ('a')"); err != nil {
			t.Error(err)
		}
		return 201
	}
	statement := deferred(t, "INSERT INTO effects (name) VALUES ('deferred')")
	for _, c := range []struct {
		key     string
		handler func(context.Context, pgx.Tx) int
	}{{"statement", statement}, {"", statement}, {"trigger", trigger}, {"", trigger}} {
		done := make(chan idempotency.Result, 1)
		go func() {
			done <- engine.Do(context.Background(), request(c.key, ""), func(ctx context.Context) (*idempotency.Answer, error) {
				return answer(c.handler(ctx, postgres.Tx(ctx))), nil
			})
		}()
		for b.count(t, "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'") == 0 {
			time.Sleep(time.Millisecond)
		}
		setStandbys(t, b.pool, "") // releases it without a warning
		want(t, <-done, idempotency.OutcomeExecuted, "")
		setStandbys(t, b.pool, "nobody")
	}
}

// A connection remembers a bounded number of texts, and prepares a text again if the server no
// longer has it.
func TestDeferredTextsAreBounded(t *testing.T) {
	t.Parallel()
	// Cold: otherwise a statement of ours would fail first.
	b := setup(t, &setupOptions{cold: true, configure: func(c *pgxpool.Config) { c.MaxConns = 1 }})
	for i := range postgres.DeferredTextsMax + 20 {
		want(t, b.do(t, request(fmt.Sprint("k", i), ""), deferred(t, fmt.Sprintf("INSERT INTO effects (name) VALUES ('%d')", i))), idempotency.OutcomeExecuted, "")
	}
	if n := b.count(t, "SELECT count(*) FROM pg_prepared_statements WHERE name LIKE 'idempotency_deferred%'"); n != postgres.DeferredTextsMax {
		t.Errorf("%d statements are prepared, want %d", n, postgres.DeferredTextsMax)
	}
	b.exec(t, "DEALLOCATE ALL")
	last := fmt.Sprintf("INSERT INTO effects (name) VALUES ('%d')", postgres.DeferredTextsMax+20-1)
	want(t, b.do(t, request("after", ""), deferred(t, last)), idempotency.OutcomeExecuted, "")
}

// A new text never pushes out one that the same request has deferred already.
func TestDeferredTextsOfOneRequestMayExceedTheBound(t *testing.T) {
	t.Parallel()
	const texts = postgres.DeferredTextsMax + 20
	b := setup(t, &setupOptions{store: &postgres.Options{DeferredMax: texts}, configure: func(c *pgxpool.Config) { c.MaxConns = 1 }})
	for round := range 3 { // the second meets a full connection
		runs := 0
		result := b.do(t, request(fmt.Sprint("k", round), ""), func(ctx context.Context, tx pgx.Tx) int {
			runs++
			for i := range texts {
				deferred(t, fmt.Sprintf("INSERT INTO effects (name) VALUES ('%d of %d')", i, round))(ctx, tx)
			}
			return 201
		})
		want(t, result, idempotency.OutcomeExecuted, "")
		if n := b.effects(t); n != (round+1)*texts || runs != 1 {
			t.Errorf("%d effects after %d requests, %d runs of the last", n, round+1, runs)
		}
	}
}

// panickingArgument panics when it is encoded.
type panickingArgument struct{}

func (panickingArgument) Value() (driver.Value, error) { panic("no value") }

// If an argument of a statement panics, the statement is missing, so the request fails even if the
// handler recovers.
func TestDeferExecThatPanicsFailsTheRequest(t *testing.T) {
	t.Parallel()
	for name, opts := range encodings() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, opts)
			for _, key := range []string{"k", ""} {
				result := b.do(t, request(key, ""), func(ctx context.Context, _ pgx.Tx) int {
					deferEffect(ctx, t)
					func() {
						defer func() {
							if recover() == nil {
								t.Error("no panic")
							}
						}()
						_ = postgres.DeferExec(ctx, "INSERT INTO effects (name) VALUES ($1)", panickingArgument{})
					}()
					return 201
				})
				want(t, result, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
				if n := b.effects(t); n != 0 {
					t.Errorf("key %q: %d effects", key, n)
				}
			}
		})
	}
}

// A migration may change the type of a column under a statement that connections have prepared.
func TestDeferredStatementIsPreparedAgainAfterItsTypesChanged(t *testing.T) {
	t.Parallel()
	for name, opts := range encodings() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := *opts
			o.configure = func(c *pgxpool.Config) {
				if opts.configure != nil {
					opts.configure(c)
				}
				c.MaxConns = 1
			}
			b := setup(t, &o)
			b.exec(t, "CREATE TABLE prices (price int)")
			for i, change := range []string{"SELECT", "ALTER TABLE prices ALTER price TYPE jsonb USING to_jsonb(price)"} {
				b.exec(t, change)
				want(t, b.do(t, request(fmt.Sprint("k", i), ""), deferred(t, "INSERT INTO prices (price) VALUES ($1)", "5")), idempotency.OutcomeExecuted, "")
			}
			if n := b.count(t, "SELECT count(*) FROM prices WHERE price = '5'"); n != 2 {
				t.Errorf("%d prices", n)
			}
		})
	}
}

// A statement that a nested transaction deferred and undid does not count as sent behind a Sync.
func TestNestedTransactionUndoesTheSyncOfWhatWasDeferredInIt(t *testing.T) {
	t.Parallel()
	sent := new(atomic.Int64)
	b := setup(t, &setupOptions{configure: func(config *pgxpool.Config) {
		dial := config.ConnConfig.DialFunc
		config.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dial(ctx, network, address)
			return syncs{conn, sent}, err
		}
	}})
	want(t, b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
		insert := func(length int) {
			deferred(t, "INSERT INTO effects (name) VALUES ($1)", strings.Repeat("x", length))(ctx, tx)
		}
		insert(postgres.TogetherBytesMax - 50)
		nested, err := tx.Begin(ctx)
		if err != nil {
			t.Fatal(err)
		}
		insert(100)
		if err := nested.Rollback(ctx); err != nil {
			t.Error(err)
		}
		insert(100)
		sent.Store(0)
		return 201
	}), idempotency.OutcomeExecuted, "")
	if n := sent.Load(); n != 2 {
		t.Errorf("%d Syncs, want 2", n)
	}
}
