package sqldb_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/sqldb"
)

// 201 commits the rows with the record, 402 keeps only the record, 500 keeps neither.
func TestRowsAreCommittedWithTheAnswer(t *testing.T) {
	t.Parallel()
	b := setup(t, nil, 1)
	for _, c := range []struct {
		status  int
		outcome idempotency.Outcome
		effects string
		records int
	}{
		{201, idempotency.OutcomeExecuted, "201", 1},
		{402, idempotency.OutcomeExecuted, "201", 2},
		{500, idempotency.OutcomeNotExecuted, "201", 2},
	} {
		name := fmt.Sprint(c.status)
		b.want(t, b.do(t, name, func(ctx context.Context) int {
			write(ctx, t, b.db, name)
			return c.status
		}), c.outcome)
		b.wantNames(t, c.effects)
		if n := b.Count(t, "SELECT count(*) FROM idempotency_keys"); n != c.records {
			t.Errorf("%d: %d records, want %d", c.status, n, c.records)
		}
	}
}

// The promise: a call costs the round trips that it costs on postgres.Tx, and a nested transaction
// costs none of its own if it is not undone.
func TestRoundTripsAreThoseOfPgx(t *testing.T) {
	t.Parallel()
	b := setup(t, nil, 1)
	const claimAndCommit = 2
	inTx := func(do func(ctx context.Context, tx *sql.Tx), end func(*sql.Tx) error) func(context.Context) {
		return func(ctx context.Context) {
			tx, err := b.db.BeginTx(ctx, nil)
			if err != nil {
				t.Error(err)
				return
			}
			do(ctx, tx)
			must(t, end(tx))
		}
	}
	one := func(ctx context.Context, tx *sql.Tx) { write(ctx, t, tx, "one") }
	none := func(context.Context, *sql.Tx) {}
	statement, err := b.db.PrepareContext(t.Context(), insert) // once, outside of handlers
	must(t, err)
	defer func() { must(t, statement.Close()) }()
	for _, c := range []struct {
		name    string
		handler func(ctx context.Context)
		want    int
	}{
		{"pgx", func(ctx context.Context) {
			for range 2 {
				_, err := postgres.Tx(ctx).Exec(ctx, insert, "pgx")
				must(t, err)
			}
		}, 2},
		{"database/sql", func(ctx context.Context) {
			write(ctx, t, b.db, "a")
			write(ctx, t, b.db, "b")
		}, 2},
		{"query", func(ctx context.Context) {
			var id int64
			must(t, b.db.QueryRowContext(ctx, insert+" RETURNING id", "q").Scan(&id))
		}, 1},
		{"prepared", func(ctx context.Context) {
			_, err := statement.ExecContext(ctx, "p")
			must(t, err)
		}, 1},
		{"nothing nested", inTx(none, (*sql.Tx).Commit), 0},
		{"nothing undone", inTx(none, (*sql.Tx).Rollback), 0},
		{"nested", inTx(one, (*sql.Tx).Commit), 1},
		{"nested, as a query", inTx(func(ctx context.Context, tx *sql.Tx) {
			var id int64
			must(t, tx.QueryRowContext(ctx, insert+" RETURNING id", "q").Scan(&id))
		}, (*sql.Tx).Commit), 1},
		{"nested and undone", inTx(one, (*sql.Tx).Rollback), 2},
		{"three nested ones", func(ctx context.Context) {
			for range 3 {
				inTx(one, (*sql.Tx).Commit)(ctx)
			}
		}, 3},
		{"savepoints by text", inTx(func(ctx context.Context, tx *sql.Tx) {
			for _, text := range []string{"SAVEPOINT a", "", `savepoint "B";`, "", "ROLLBACK TO SAVEPOINT \"B\"", "release a -- done", ""} {
				if text == "" {
					one(ctx, tx)
					continue
				}
				_, err := tx.ExecContext(ctx, text)
				must(t, err)
			}
		}, (*sql.Tx).Commit), 4},
	} {
		for _, run := range []string{"cold", "colder", "warm"} { // SAVEPOINT is prepared when it first travels with a statement
			got := b.cost(func() {
				b.want(t, b.do(t, c.name+run, func(ctx context.Context) int {
					c.handler(ctx)
					return 201
				}), idempotency.OutcomeExecuted)
			})
			if run == "warm" && got != c.want+claimAndCommit {
				t.Errorf("%s: %d round trips, want %d", c.name, got, c.want+claimAndCommit)
			}
		}
	}
}

// The writes of a nested transaction are kept or undone as in any transaction, on the first run of
// a text and on later ones, which travel with their SAVEPOINT.
func TestNestedTransactionsAreSavepoints(t *testing.T) {
	t.Parallel()
	for _, mode := range modes {
		t.Run(mode.String(), func(t *testing.T) {
			t.Parallel()
			nestedTransactions(t, setupMode(t, nil, 1, mode))
		})
	}
}

func nestedTransactions(t *testing.T, b *testBundle) {
	want := ""
	for run := range 3 {
		b.want(t, b.do(t, fmt.Sprint(run), func(ctx context.Context) int {
			write(ctx, t, b.db, "first")
			tx, err := b.db.BeginTx(ctx, &sql.TxOptions{Isolation: sql.LevelReadCommitted})
			must(t, err)
			write(ctx, t, tx, "undone")
			must(t, tx.Rollback())

			tx, err = b.db.BeginTx(ctx, nil)
			must(t, err)
			write(ctx, t, tx, "kept")
			exec := func(text string) {
				_, err := tx.ExecContext(ctx, text)
				must(t, err)
			}
			exec("SAVEPOINT s")
			write(ctx, t, tx, "undone")
			exec("SAVEPOINT t")
			write(ctx, t, tx, "undone")
			exec("ROLLBACK TO S") // the name is folded, and t is gone with it
			if _, err := tx.ExecContext(ctx, "RELEASE t"); err == nil {
				t.Error("a savepoint outlived the one that it was opened in")
			}
			write(ctx, t, tx, "again")
			exec("ROLLBACK WORK TO SAVEPOINT s") // it is open still
			exec("SAVEPOINT s")                  // hides the first one
			write(ctx, t, tx, "inner")
			exec("RELEASE SAVEPOINT s")
			write(ctx, t, tx, "outer")
			must(t, tx.Commit())

			tx, err = b.db.BeginTx(ctx, nil)
			must(t, err)
			exec2 := func(query string, args ...any) error { _, err := tx.ExecContext(ctx, query, args...); return err }
			write(ctx, t, tx, "undone")
			var pgErr *pgconn.PgError
			if err := exec2("INSERT INTO effects (id, name) VALUES (1, 'taken')"); run > 0 && (!errors.As(err, &pgErr) || pgErr.Code != "23505") {
				t.Errorf("a unique violation: %v", err)
			}
			must(t, tx.Rollback())
			write(ctx, t, b.db, "last")
			return 201
		}), idempotency.OutcomeExecuted)
		want = strings.TrimSpace(want + " first kept inner outer last")
		b.wantNames(t, want)
	}
}

// A statement that fails together with its SAVEPOINT leaves a transaction that Rollback repairs. The
// error is pgx's own: libraries compare its type.
func TestFailureBehindItsSavepointIsUndone(t *testing.T) {
	t.Parallel()
	b := setup(t, nil, 1)
	b.Exec(t, "INSERT INTO effects (id, name) VALUES (1, 'there')")
	const take, taken = "INSERT INTO effects (id, name) VALUES ($1, $2)", "INSERT INTO effects (id, name) VALUES ($1, $2) RETURNING id"
	for run := range 2 {
		b.want(t, b.do(t, fmt.Sprint(run), func(ctx context.Context) int {
			for i, insert := range []string{take, taken} {
				free := 100 + 10*run + i
				for _, id := range []int{free, 1} {
					tx, err := b.db.BeginTx(ctx, nil)
					must(t, err)
					if insert == take {
						_, err = tx.ExecContext(ctx, insert, id, "x")
					} else {
						err = tx.QueryRowContext(ctx, insert, id, "x").Scan(new(int))
					}
					if id == free {
						must(t, err)
						must(t, tx.Commit())
						continue
					}
					if pgErr, ok := err.(*pgconn.PgError); !ok || pgErr.Code != "23505" {
						t.Errorf("run %d: %T %v, want *pgconn.PgError 23505", run, err, err)
					}
					if run == 1 { // a COMMIT of it fails too
						if err := tx.Commit(); err == nil {
							t.Error("a failed transaction was committed")
						}
						return 201
					}
					must(t, tx.Rollback())
				}
			}
			return 201
		}), []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeNotExecuted}[run])
	}
	b.wantNames(t, "there x x")
}

// Whatever would lead around the transaction of the handler, or end it, is refused.
func TestCallsAroundTheTransactionAreRefused(t *testing.T) {
	t.Parallel()
	b := setup(t, nil, 1)
	other := sqldb.Open(testservice.New(t, nil).Store, nil)
	defer func() { must(t, other.Close()) }()
	exec := func(on execer, ctx context.Context, query string, args ...any) error {
		_, err := on.ExecContext(ctx, query, args...)
		return err
	}
	refused := func(what string, err, want error) {
		t.Helper()
		if err == nil || want != nil && !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
	}
	refused("outside", exec(b.db, t.Context(), "SELECT 1"), sqldb.ErrTransactionMissing)
	_, err := b.db.BeginTx(t.Context(), nil)
	refused("BeginTx outside", err, sqldb.ErrTransactionMissing)
	must(t, b.db.PingContext(t.Context()))

	var kept context.Context
	b.want(t, b.do(t, "k", func(ctx context.Context) int {
		kept = ctx
		must(t, b.db.PingContext(ctx))
		refused("without the context", exec(b.db, context.Background(), "SELECT 1"), sqldb.ErrTransactionMissing)
		refused("another store", exec(other, ctx, "SELECT 1"), sqldb.ErrTransactionMissing)
		for _, text := range []string{"COMMIT", "ROLLBACK", "BEGIN", "insert into effects (name) values ('x'); commit", "SAVEPOINT a; COMMIT", "ROLLBACK TO a; COMMIT", "SAVEPOINT"} {
			refused(text, exec(b.db, ctx, text), postgres.ErrSealed)
		}
		refused("ROLLBACK TO nothing", exec(b.db, ctx, "ROLLBACK TO a"), nil)
		for _, opts := range []*sql.TxOptions{{ReadOnly: true}, {Isolation: sql.LevelSerializable}, {Isolation: sql.LevelRepeatableRead}, {Isolation: sql.LevelLinearizable}} {
			_, err := b.db.BeginTx(ctx, opts)
			refused(fmt.Sprint(opts), err, nil)
		}
		refused("a named argument", exec(b.db, ctx, insert, sql.Named("name", "x")), nil)
		refused("an output", exec(b.db, ctx, insert, sql.Out{Dest: new(string)}), nil)

		tx, err := b.db.BeginTx(ctx, nil)
		must(t, err)
		refused("db inside of its sql.Tx", exec(b.db, ctx, "SELECT 1"), postgres.ErrBusy)
		_, err = b.db.BeginTx(ctx, nil)
		refused("BeginTx inside of a sql.Tx", err, postgres.ErrBusy)
		write(context.Background(), t, tx, "inside") // a sql.Tx has its transaction
		must(t, tx.Commit())

		rows, err := b.db.QueryContext(ctx, "SELECT generate_series(1, 3)")
		must(t, err)
		refused("while rows are open", exec(b.db, ctx, "SELECT 1"), postgres.ErrBusy)
		_, err = b.db.BeginTx(ctx, nil)
		refused("BeginTx while rows are open", err, postgres.ErrBusy)
		must(t, rows.Close())
		if _, err := b.db.ExecContext(ctx, "SELECT 1"); err != nil {
			t.Error(err)
		}
		if result, err := b.db.ExecContext(ctx, insert, "last"); err == nil {
			_, err = result.LastInsertId()
			refused("LastInsertId", err, nil)
		}
		return 201
	}), idempotency.OutcomeExecuted)
	refused("after the handler", exec(b.db, context.WithoutCancel(kept), "SELECT 1"), postgres.ErrSealed)
	b.wantNames(t, "inside last")
}

// A sql.Tx or rows that are open when the handler returns fail the request, and the *sql.DB works
// on.
func TestWhatIsLeftOpenIsNotExecuted(t *testing.T) {
	t.Parallel()
	b := setup(t, nil, 1)
	for name, leave := range map[string]func(ctx context.Context) error{
		"sql.Tx": func(ctx context.Context) error {
			tx, err := b.db.BeginTx(ctx, nil)
			write(ctx, t, tx, "x")
			return err
		},
		"sql.Tx without a statement": func(ctx context.Context) error {
			_, err := b.db.BeginTx(ctx, nil)
			return err
		},
		"savepoint": func(ctx context.Context) error {
			_, err := b.db.ExecContext(ctx, "SAVEPOINT a")
			return err
		},
		"rows": func(ctx context.Context) error {
			rows, err := b.db.QueryContext(ctx, "SELECT generate_series(1, 100000)")
			if err == nil {
				rows.Next()
			}
			return errors.Join(err, rows.Err())
		},
	} {
		result := b.do(t, name, func(ctx context.Context) int {
			must(t, leave(ctx))
			return 201
		})
		b.want(t, result, idempotency.OutcomeNotExecuted)
		for again := true; again; again = result.Outcome == idempotency.OutcomeInProgress { // until the server has ended what was cut
			result = b.do(t, name, func(ctx context.Context) int {
				write(ctx, t, b.db, name)
				return 402
			})
		}
		b.want(t, result, idempotency.OutcomeExecuted)
	}
	b.wantNames(t, "")
}

// A context that ends undoes its sql.Tx, and no more.
func TestSQLTxOfAContextThatEndedIsUndone(t *testing.T) {
	t.Parallel()
	b := setup(t, nil, 1)
	b.want(t, b.do(t, "k", func(ctx context.Context) int {
		write(ctx, t, b.db, "kept")
		short, cancel := context.WithCancel(ctx)
		tx, err := b.db.BeginTx(short, nil)
		must(t, err)
		write(ctx, t, tx, "undone")
		cancel()
		b.waitForEnd(t)
		if err := tx.Commit(); err == nil {
			t.Error("it was committed")
		}
		write(ctx, t, b.db, "last")
		return 201
	}), idempotency.OutcomeExecuted)
	b.wantNames(t, "kept last")
}

// With Options.Pool a call outside of handlers uses the pool, each on a connection of its own, and
// gives it back. A call that does not pass the handler's context on escapes, as the documentation
// says; a sql.Tx from outside does not take a handler's calls.
func TestPoolOutsideOfHandlers(t *testing.T) {
	t.Parallel()
	b := setup(t, &sqldb.Options{Pool: true}, 4)
	ctx := t.Context()
	idle := func() {
		t.Helper()
		if n := b.Pool.Stat().AcquiredConns(); n != 0 {
			t.Errorf("%d connections were not given back", n)
		}
	}
	write(ctx, t, b.db, "outside")
	idle()
	tx, err := b.db.BeginTx(ctx, &sql.TxOptions{Isolation: sql.LevelSerializable})
	must(t, err)
	write(ctx, t, tx, "undone")
	must(t, tx.Rollback())
	idle()
	tx, err = b.db.BeginTx(ctx, &sql.TxOptions{ReadOnly: true})
	must(t, err)
	var n int
	must(t, tx.QueryRowContext(ctx, "SELECT count(*) FROM effects").Scan(&n))
	must(t, tx.Commit())
	idle()

	var kept context.Context
	b.want(t, b.do(t, "declined", func(ctx context.Context) int {
		write(ctx, t, b.db, "undone")
		write(context.Background(), t, b.db, "escaped")
		tx, err := b.db.BeginTx(context.Background(), nil)
		must(t, err)
		if _, err := tx.ExecContext(ctx, insert, "apart"); !errors.Is(err, postgres.ErrPoolRefused) {
			t.Errorf("a handler's call on a sql.Tx from outside: %v", err)
		}
		must(t, tx.Rollback())
		kept = ctx
		return 402
	}), idempotency.OutcomeExecuted)
	if _, err := b.db.ExecContext(context.WithoutCancel(kept), insert, "late"); !errors.Is(err, postgres.ErrSealed) {
		t.Errorf("a call after the handler: %v", err)
	}
	idle()
	b.wantNames(t, "outside escaped")
}

// Values are those of pgx's own driver for database/sql, on the first run of a text, and behind a
// SAVEPOINT on later ones.
func TestValuesAreThoseOfPgxsDriver(t *testing.T) {
	t.Parallel()
	for _, mode := range modes {
		t.Run(mode.String(), func(t *testing.T) {
			t.Parallel()
			values(t, setupMode(t, &sqldb.Options{Pool: true}, 2, mode), mode)
		})
	}
}

// The digits after the point are the scale of numbers and times.
func TestScale(t *testing.T) {
	t.Parallel()
	b := setup(t, nil, 1)
	b.want(t, b.do(t, "k", func(ctx context.Context) int {
		for column, want := range map[string]string{
			"1::numeric": "0 0 false", "1::numeric(10,2)": "10 2 true", "1::int4": "0 0 false",
			"now()": "0 6 true", "now()::timestamptz(0)": "0 0 true", "now()::timestamp(3)": "0 3 true", "localtime(2)": "0 2 true",
			"interval '1 s'": "0 6 true", "'1 s'::interval(1)": "0 1 true", "'1 day'::interval day": "0 6 true", "'1 s'::interval second(2)": "0 2 true",
		} {
			rows, err := b.db.QueryContext(ctx, "SELECT "+column)
			must(t, err)
			described, err := rows.ColumnTypes()
			must(t, err)
			precision, scale, ok := described[0].DecimalSize()
			if got := fmt.Sprint(precision, scale, ok); got != want {
				t.Errorf("%s: %s, want %s", column, got, want)
			}
			must(t, rows.Close())
		}
		return 201
	}), idempotency.OutcomeExecuted)
}

func values(t *testing.T, b *testBundle, mode pgx.QueryExecMode) {
	b.Exec(t, "CREATE TYPE mood AS ENUM ('good'); CREATE TYPE pair AS (a int, b text)")
	scalars := []string{
		"true", "1::int2", "2::int4", "3::int8", "4::oid", "1.5::float4", "2.5::float8", "'NaN'::float8", `'\x00ff'::bytea`, "'text'", "'v'::varchar(10)", "'c'::char(3)", "'n'::name",
		"date '2026-02-03'", "date 'infinity'", "timestamp '2026-02-03 04:05:06.789'", "timestamptz '2026-02-03 04:05:06.789Z'", "'{\"a\": 1}'::json", "'{\"a\": 1}'::jsonb", "'<a/>'::xml",
		"'6ba7b810-9dad-11d1-80b4-00c04fd430c8'::uuid", "'good'::mood", "NULL::int8", "NULL::bytea", "''::text", "''::bytea",
	}
	others := []string{
		"1.50::numeric", "0.00::numeric(10,2)", "interval '1 day 2 hours'", "ARRAY[1,2,NULL]", "ARRAY['a','b c']", "'{{1,2},{3,4}}'::int[]", "int4range(1, 5)", "inet '10.0.0.1'",
		"(1, 'x')::pair", "time '04:05:06'", "'(1,2)'::point", "'a'::\"char\"", "B'101'", "money '1.50'",
	}
	read := func(ctx context.Context, on interface {
		QueryContext(context.Context, string, ...any) (*sql.Rows, error)
	}, columns []string) (values []any, types []string) {
		rows, err := on.QueryContext(ctx, "SELECT "+strings.Join(columns, ", "))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { must(t, rows.Close()) }()
		described, err := rows.ColumnTypes()
		must(t, err)
		for _, d := range described {
			length, hasLength := d.Length()
			precision, scale, hasPrecision := d.DecimalSize()
			if strings.HasPrefix(d.DatabaseTypeName(), "TIME") || d.DatabaseTypeName() == "INTERVAL" { // pgx's driver knows it from 5.13 on
				hasPrecision, scale = false, 0
			}
			types = append(types, fmt.Sprint(d.Name(), d.DatabaseTypeName(), hasLength && length < 100, hasPrecision && precision < 100, scale < 100 && scale > 0, d.ScanType() != nil))
		}
		values = make([]any, len(columns))
		into := make([]any, len(columns))
		for i := range values {
			into[i] = &values[i]
		}
		if !rows.Next() {
			t.Fatal(rows.Err())
		}
		must(t, rows.Scan(into...))
		if rows.Next() {
			t.Error("there is another row")
		}
		must(t, rows.Err())
		return values, types
	}
	for name, columns := range map[string][]string{"scalars": scalars, "others": others} {
		wanted, wantedTypes := read(t.Context(), b.db, columns) // by pgx's driver
		b.want(t, b.do(t, name, func(ctx context.Context) int {
			for run := range 3 {
				tx, err := b.db.BeginTx(ctx, nil)
				must(t, err)
				trips := b.trips.Count()
				got, types := read(ctx, tx, columns)
				trips = b.trips.Count() - trips
				must(t, tx.Commit())
				for i, column := range columns {
					same := reflect.DeepEqual(got[i], wanted[i])
					if at, ok := got[i].(time.Time); ok {
						same = at.Equal(wanted[i].(time.Time))
					}
					if !same && column != "'NaN'::float8" {
						t.Errorf("run %d: %s is %T %v, want %T %v", run, column, got[i], got[i], wanted[i], wanted[i])
					}
					// pgx calculates with a modifier that is not there.
					if types[i] != wantedTypes[i] && column != "1.50::numeric" {
						t.Errorf("%s: type %s, want %s", column, types[i], wantedTypes[i])
					}
				}
				if together := name == "scalars"; mode == pgx.QueryExecModeCacheStatement && run == 2 && (trips == 1) != together {
					t.Errorf("%s: %d round trips", name, trips)
				}
			}
			return 201
		}), idempotency.OutcomeExecuted)
	}
}

// A column that got a type that can't be read in binary format is an error, not a wrong value.
func TestColumnThatChangedItsType(t *testing.T) {
	t.Parallel()
	b := setup(t, nil, 2)
	b.Exec(t, "CREATE TABLE prices (price int8); INSERT INTO prices VALUES (7)")
	read := func(key string) (price string, err error) {
		b.do(t, key, func(ctx context.Context) int {
			tx, beginErr := b.db.BeginTx(ctx, nil)
			must(t, beginErr)
			err = tx.QueryRowContext(ctx, "SELECT price FROM prices").Scan(&price)
			_ = tx.Rollback()
			return 500
		})
		return price, err
	}
	for _, key := range []string{"1", "2"} {
		if price, err := read(key); err != nil || price != "7" {
			t.Errorf("it is %s: %v", price, err)
		}
	}
	b.Exec(t, "ALTER TABLE prices ALTER price TYPE numeric")
	for i := range 5 { // a connection finds its plan stale once
		if price, err := read(fmt.Sprint("changed", i)); err == nil && price != "7" {
			t.Errorf("it is %q", price)
		}
	}
}

// Inside a phase calls go to the phase's transaction, and after it to the handler's last one. A
// sql.Tx does not outlive its phase.
func TestCallsGoToThePhaseThatRuns(t *testing.T) {
	t.Parallel()
	b := setup(t, nil, 2)
	fails := true
	run := func(ctx context.Context) (*idempotency.Answer, error) {
		var kept *sql.Tx
		if _, err := postgres.Phase(ctx, "hold", func(pgx.Tx) (int, error) {
			write(ctx, t, b.db, "hold")
			tx, err := b.db.BeginTx(ctx, nil)
			must(t, err)
			write(ctx, t, tx, "nested")
			must(t, tx.Commit())
			return 1, nil
		}); err != nil {
			return nil, err
		}
		b.wantNames(t, "hold nested") // committed
		_, err := postgres.Phase(ctx, "failed", func(pgx.Tx) (int, error) {
			var err error
			kept, err = b.db.BeginTx(ctx, nil)
			must(t, err)
			write(ctx, t, kept, "undone")
			return 0, errors.New("it failed")
		})
		if err == nil {
			t.Error("a phase with an error was committed")
		}
		if fails {
			return nil, err
		}
		return &idempotency.Answer{Status: 201}, nil
	}
	b.Engine.Resumable("topup/1", func(idempotency.Key, []byte) (idempotency.RunFunc, error) { return run, nil })
	req := request("k")
	req.Resumable, req.Stored = "topup/1", func() []byte { return nil }
	b.want(t, b.Engine.Do(t.Context(), req, run), idempotency.OutcomeUnknown)
	b.wantNames(t, "hold nested")
}

// A consumer's handlers write in the transaction that moves the consumer's position.
func TestMessagesAreHandledInTheirTransaction(t *testing.T) {
	t.Parallel()
	b := setup(t, nil, 4)
	b.want(t, b.do(t, "k", func(ctx context.Context) int {
		for _, body := range []string{"paid", "poison", "posted"} {
			must(t, message.Publish(ctx, body, message.Message{Topic: "bookings", Body: []byte(body)}))
		}
		return 201
	}), idempotency.OutcomeExecuted)
	ctx, stop := context.WithCancel(t.Context())
	settled := make(chan struct{}, 10)
	queue := b.Store.Queue("bookings")
	receiver := consumer.New("ledger", queue, queue, func(ctx context.Context, m *consumer.Delivery) error {
		tx, err := b.db.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		write(ctx, t, tx, string(m.Body))
		if string(m.Body) == "poison" {
			return consumer.Reject(errors.Join(errors.New("poison"), tx.Rollback()))
		}
		return tx.Commit()
	}, &consumer.Options{
		OnBatch: func(end consumer.BatchEnd) {
			for range end.Executed + end.Dead {
				settled <- struct{}{}
			}
		},
		Logger: slog.New(slog.DiscardHandler),
	})
	var running sync.WaitGroup
	running.Go(func() { _ = receiver.Run(ctx) })
	for range 3 {
		select {
		case <-settled:
		case <-time.After(60 * time.Second):
			t.Fatal("the messages are not handled")
		}
	}
	stop()
	running.Wait()
	// Without keys they have no order.
	if names := b.Text(t, "SELECT string_agg(name, ' ' ORDER BY name) FROM effects"); names != "paid posted" {
		t.Errorf("effects are %q, want both that are no poison", names)
	}
	if n := b.Count(t, "SELECT count(*) FROM message_parked"); n != 1 {
		t.Errorf("%d dead letters, want 1", n)
	}
}

// noSource is for tests that call Receive themselves.
type noSource struct{}

func (noSource) Run(ctx context.Context, _ consumer.Receiver) error { <-ctx.Done(); return nil }

// A handler that leaves something open has failed, also in a batch: the next message's handler can't
// undo its writes, and does not fail in its place.
func TestNothingIsLeftOpenForTheNextMessage(t *testing.T) {
	t.Parallel()
	for name, leave := range map[string]func(ctx context.Context, b *testBundle) error{
		"savepoint": func(ctx context.Context, b *testBundle) error {
			_, err := b.db.ExecContext(ctx, "SAVEPOINT s")
			return err
		},
		"sql.Tx": func(ctx context.Context, b *testBundle) error {
			_, err := b.db.BeginTx(ctx, nil)
			return err
		},
		"rows": func(ctx context.Context, b *testBundle) error {
			rows, err := b.db.QueryContext(ctx, "SELECT generate_series(1, 100000)")
			if err == nil {
				rows.Next()
			}
			return errors.Join(err, rows.Err())
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, nil, 1)
			left, first, second := false, true, 0
			receiver := consumer.New("ledger", b.Store.Inbox(), noSource{}, func(ctx context.Context, m *consumer.Delivery) error {
				if m.Offset == 1 {
					second++
					_, _ = b.db.ExecContext(ctx, "ROLLBACK TO s") // of its own, it believes
					_, _ = b.db.ExecContext(ctx, "RELEASE s")
					_, err := b.db.ExecContext(ctx, insert, "second")
					return err
				}
				if left = first; left {
					first = false
					must(t, leave(ctx, b))
				}
				if left && name != "savepoint" {
					return nil
				}
				_, err := b.db.ExecContext(ctx, insert, "first")
				return err
			}, &consumer.Options{BatchMax: 2, Logger: slog.New(slog.DiscardHandler)})
			messages := []consumer.Delivery{{Offset: 0, Message: message.Message{ID: "a", Topic: "t"}}, {Offset: 1, Message: message.Message{ID: "b", Topic: "t"}}}
			for settled := 0; settled < len(messages) && !t.Failed(); {
				n, pause := receiver.Receive(t.Context(), consumer.Partition{Source: "t"}, messages[settled:])
				settled += n
				time.Sleep(pause)
			}
			b.wantNames(t, "first second")
			if second != 1 {
				t.Errorf("the second handler ran %d times, want 1", second)
			}
		})
	}
}

// A mistake in a text that has not run before is undone with its sql.Tx too: SAVEPOINT was sent in
// front of it.
func TestMistakeInANewTextIsUndone(t *testing.T) {
	t.Parallel()
	b := setup(t, nil, 1)
	b.want(t, b.do(t, "k", func(ctx context.Context) int {
		for _, run := range []func(tx *sql.Tx) error{
			func(tx *sql.Tx) error { _, err := tx.ExecContext(ctx, "UPDATE effects SET mistake = 1"); return err },
			func(tx *sql.Tx) error { return tx.QueryRowContext(ctx, "SELECT mistake FROM effects").Scan(new(int)) },
		} {
			tx, err := b.db.BeginTx(ctx, nil)
			must(t, err)
			var pgErr *pgconn.PgError
			if err := run(tx); !errors.As(err, &pgErr) || pgErr.Code != "42703" {
				t.Errorf("the mistake is %v", err)
			}
			must(t, tx.Rollback())
		}
		write(ctx, t, b.db, "last")
		return 201
	}), idempotency.OutcomeExecuted)
	b.wantNames(t, "last")
}

// If a text ran before, but can't be prepared on another connection any more, the transaction has
// failed before its savepoint: Rollback says so, and nothing is committed.
func TestTextThatFailsBeforeItsSavepoint(t *testing.T) {
	t.Parallel()
	b := setup(t, nil, 1)
	b.Exec(t, "CREATE TABLE prices (price int8)")
	const change = "UPDATE prices SET price = 1"
	for run, outcome := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeNotExecuted} {
		b.want(t, b.do(t, fmt.Sprint(run), func(ctx context.Context) int {
			tx, err := b.db.BeginTx(ctx, nil)
			must(t, err)
			write(ctx, t, tx, "kept")
			must(t, tx.Commit())
			tx, err = b.db.BeginTx(ctx, nil)
			must(t, err)
			_, err = tx.ExecContext(ctx, change)
			if _, ok := err.(*pgconn.PgError); run == 1 && !ok {
				t.Errorf("it is a %T, want *pgconn.PgError", err)
			}
			if undo := tx.Rollback(); run == 0 && errors.Join(err, undo) != nil || run == 1 && (err == nil || undo == nil) {
				t.Errorf("run %d: %v, then %v", run, err, undo)
			}
			return 201
		}), outcome)
		if run == 0 {
			b.Exec(t, "ALTER TABLE prices RENAME price TO amount")
			b.Pool.Reset() // the next connection has prepared nothing
		}
	}
	b.wantNames(t, "kept")
}

// sentTexts is a tracer that keeps the SQL of savepoints and of effects.
type sentTexts struct {
	mu   sync.Mutex
	sent []string
}

func (s *sentTexts) add(ctx context.Context, text string) context.Context {
	if strings.Contains(text, "SAVEPOINT") || text == insert {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.sent = append(s.sent, strings.Fields(text)[0])
	}
	return ctx
}

func (s *sentTexts) TraceQueryStart(ctx context.Context, _ *pgx.Conn, data pgx.TraceQueryStartData) context.Context {
	return s.add(ctx, data.SQL)
}
func (*sentTexts) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}
func (*sentTexts) TraceBatchStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceBatchStartData) context.Context {
	return ctx
}
func (s *sentTexts) TraceBatchQuery(ctx context.Context, _ *pgx.Conn, data pgx.TraceBatchQueryData) {
	s.add(ctx, data.SQL)
}
func (*sentTexts) TraceBatchEnd(context.Context, *pgx.Conn, pgx.TraceBatchEndData) {}

// A savepoint that is committed is released before the next one: thousands of them don't pile up in
// one transaction. The last one needs no RELEASE, and one without a statement is never sent. Tracers
// of pgx see all of it.
func TestSavepointsDoNotPileUp(t *testing.T) {
	t.Parallel()
	texts := new(sentTexts)
	service := testservice.New(t, &postgres.Options{PoolConfig: func(config *pgxpool.Config) { config.ConnConfig.Tracer = texts }})
	b := &testBundle{Service: service, db: sqldb.Open(service.Store, nil)}
	t.Cleanup(func() { must(t, b.db.Close()) })
	b.want(t, b.do(t, "k", func(ctx context.Context) int {
		for i := range 4 {
			tx, err := b.db.BeginTx(ctx, nil)
			must(t, err)
			if i != 2 {
				write(ctx, t, tx, "x")
			}
			must(t, tx.Commit())
		}
		return 201
	}), idempotency.OutcomeExecuted)
	want := "SAVEPOINT INSERT RELEASE SAVEPOINT INSERT RELEASE SAVEPOINT INSERT"
	if got := strings.Join(texts.sent, " "); got != want {
		t.Errorf("sent %s, want %s", got, want)
	}
}

// A sql.Tx belongs to one handler: a call with the context of another one is refused, or its write
// would be committed by the wrong request.
func TestSQLTxOfAnotherHandlerIsRefused(t *testing.T) {
	t.Parallel()
	b := setup(t, nil, 2)
	b.want(t, b.do(t, "outer", func(outer context.Context) int {
		tx, err := b.db.BeginTx(outer, nil)
		must(t, err)
		b.want(t, b.do(t, "inner", func(inner context.Context) int {
			write(inner, t, b.db, "inner")
			if _, err := tx.ExecContext(inner, insert, "wrong"); !errors.Is(err, postgres.ErrSealed) {
				t.Errorf("the outer handler's sql.Tx: %v", err)
			}
			return 201
		}), idempotency.OutcomeExecuted)
		write(outer, t, tx, "undone")
		must(t, tx.Commit())
		return 402
	}), idempotency.OutcomeExecuted)
	b.wantNames(t, "inner")
}

// An argument that can't be encoded fails its call, and nothing else: not the transaction, and not
// the connection, on later runs of a text too, which travel with their SAVEPOINT.
func TestArgumentThatCantBeEncodedFailsItsCallOnly(t *testing.T) {
	t.Parallel()
	for _, mode := range modes {
		t.Run(mode.String(), func(t *testing.T) {
			t.Parallel()
			b := setupMode(t, nil, 1, mode)
			b.Exec(t, "CREATE TABLE amounts (amount int4)")
			const put = "INSERT INTO amounts VALUES ($1)"
			for _, key := range []string{"cold", "warm"} {
				b.want(t, b.do(t, key, func(ctx context.Context) int {
					for name, run := range map[string]func(tx *sql.Tx, amount int64) error{
						"exec": func(tx *sql.Tx, amount int64) error { _, err := tx.ExecContext(ctx, put, amount); return err },
						"query": func(tx *sql.Tx, amount int64) error {
							return tx.QueryRowContext(ctx, put+" RETURNING 1", amount).Scan(new(int))
						},
					} {
						for _, amount := range []int64{1, 1 << 40} {
							tx, err := b.db.BeginTx(ctx, nil)
							if err != nil {
								t.Error(err)
								return 500
							}
							if err := run(tx, amount); (err == nil) != (amount == 1) {
								t.Errorf("%s %d: %v", name, amount, err)
							}
							if amount == 1 {
								must(t, tx.Commit())
							} else {
								must(t, tx.Rollback())
							}
						}
					}
					write(ctx, t, b.db, key)
					return 201
				}), idempotency.OutcomeExecuted)
			}
			b.wantNames(t, "cold warm")
			if n := b.Count(t, "SELECT count(*) FROM amounts"); n != 4 {
				t.Errorf("%d amounts, want 4", n)
			}
		})
	}
}

// A query that returns no rows leaves the connection free. Its columns are its own still after
// another query.
func TestColumnsOfNoRows(t *testing.T) {
	t.Parallel()
	b := setup(t, nil, 1)
	b.want(t, b.do(t, "k", func(ctx context.Context) int {
		for range 2 {
			rows, err := b.db.QueryContext(ctx, "SELECT id, name FROM effects WHERE false")
			must(t, err)
			var n int
			must(t, b.db.QueryRowContext(ctx, "SELECT 1 AS other").Scan(&n))
			columns, err := rows.Columns()
			must(t, err)
			if got := strings.Join(columns, " "); got != "id name" {
				t.Errorf("columns are %s, want id name", got)
			}
			must(t, rows.Close())
		}
		return 201
	}), idempotency.OutcomeExecuted)
}

// A text that is too long to be remembered goes alone: SAVEPOINT in front of it is one round trip,
// and nothing else is asked.
func TestLongTextGoesAlone(t *testing.T) {
	t.Parallel()
	b := setup(t, nil, 1)
	long := insert + strings.Repeat(" ", 4096)
	for _, key := range []string{"cold", "warm"} {
		b.want(t, b.do(t, key, func(ctx context.Context) int {
			tx, err := b.db.BeginTx(ctx, nil)
			must(t, err)
			trips := b.cost(func() {
				_, err := tx.ExecContext(ctx, long, key)
				must(t, err)
			})
			must(t, tx.Commit())
			if key == "warm" && trips != 2 {
				t.Errorf("%d round trips, want 2", trips)
			}
			return 201
		}), idempotency.OutcomeExecuted)
	}
}

// database/sql undoes a sql.Tx some time after its context has ended. What the handler did meanwhile
// by other means is never undone unseen: the request fails.
func TestContextThatEndedUndoesNothingElse(t *testing.T) {
	t.Parallel()
	b := setup(t, nil, 1)
	for name, other := range map[string]func(ctx context.Context) error{
		"pgx": func(ctx context.Context) error {
			_, err := postgres.Tx(ctx).Exec(ctx, insert, "other")
			return err
		},
		"message": func(ctx context.Context) error {
			return message.Publish(ctx, "m", message.Message{Topic: "bookings"})
		},
		"deferred": func(ctx context.Context) error { return postgres.DeferExec(ctx, insert, "other") },
	} {
		b.want(t, b.do(t, name, func(ctx context.Context) int {
			short, cancel := context.WithCancel(ctx)
			defer cancel()
			tx, err := b.db.BeginTx(short, nil)
			must(t, err)
			must(t, tx.QueryRowContext(ctx, "SELECT 1").Scan(new(int)))
			must(t, other(ctx)) // as if it came after cancel, and before database/sql noticed
			cancel()
			b.waitForEnd(t)
			return 201
		}), idempotency.OutcomeNotExecuted)
	}
	b.wantNames(t, "")
}

// The same while the handler goes on in its own goroutine: a call that succeeded counts if the
// request does.
func TestLateRollbackUndoesNoCallOfTheHandler(t *testing.T) {
	t.Parallel()
	b := setup(t, nil, 1)
	written := 0
	for round := range 50 {
		result := b.do(t, fmt.Sprint(round), func(ctx context.Context) int {
			short, cancel := context.WithCancel(ctx)
			tx, err := b.db.BeginTx(short, nil)
			must(t, err)
			must(t, tx.QueryRowContext(ctx, "SELECT 1").Scan(new(int)))
			cancel()
			time.Sleep(time.Duration(round) * 4 * time.Microsecond) // in front of the Rollback, in it, or after it
			for err = postgres.ErrBusy; errors.Is(err, postgres.ErrBusy); {
				_, err = postgres.Tx(ctx).Exec(ctx, insert, "x")
			}
			must(t, err)
			b.waitForEnd(t)
			return 201
		})
		if result.Outcome == idempotency.OutcomeExecuted {
			written++
		}
		if n := b.Count(t, "SELECT count(*) FROM effects"); n != written {
			t.Fatalf("round %d: %d effects, want %d", round, n, written)
		}
	}
}

// Commit and Rollback of a sql.Tx wait for its calls in other goroutines: none of them is executed
// in the handler's transaction, outside of the nested one.
func TestCallsOfASQLTxShareItsEnd(t *testing.T) {
	t.Parallel()
	b := setup(t, nil, 1)
	want := 0
	for name, end := range map[string]func(tx *sql.Tx, cancel func()) error{
		"commit":   func(tx *sql.Tx, _ func()) error { return tx.Commit() },
		"rollback": func(tx *sql.Tx, _ func()) error { return tx.Rollback() },
		"context":  func(_ *sql.Tx, cancel func()) error { cancel(); return nil },
	} {
		var written atomic.Int64
		b.want(t, b.do(t, name, func(ctx context.Context) int {
			short, cancel := context.WithCancel(ctx)
			defer cancel()
			tx, err := b.db.BeginTx(short, nil)
			must(t, err)
			var calls sync.WaitGroup
			began := make(chan struct{}, 1)
			for range 2 {
				calls.Go(func() {
					for {
						if _, err := tx.ExecContext(ctx, insert, name); errors.Is(err, sql.ErrTxDone) {
							return
						} else if err != nil {
							t.Error(err)
							return
						}
						written.Add(1)
						select {
						case began <- struct{}{}:
						default:
						}
					}
				})
			}
			<-began
			must(t, end(tx, cancel))
			calls.Wait()
			if err := tx.Rollback(); !errors.Is(err, sql.ErrTxDone) {
				t.Errorf("the end of a sql.Tx that has ended: %v", err)
			}
			b.waitForEnd(t)
			return 201
		}), idempotency.OutcomeExecuted)
		if name == "commit" {
			want = int(written.Load())
		}
		if n := b.Count(t, "SELECT count(*) FROM effects WHERE name = 'commit'"); n != want {
			t.Errorf("%s: %d effects, want %d", name, n, want)
		}
		if n := b.Count(t, "SELECT count(*) FROM effects WHERE name <> 'commit'"); n != 0 {
			t.Errorf("%s: %d effects outlived the Rollback", name, n)
		}
	}
}
