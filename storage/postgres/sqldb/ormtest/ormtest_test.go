package ormtest

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	entdialect "entgo.io/ent/dialect"
	entsql "entgo.io/ent/dialect/sql"
	jet "github.com/go-jet/jet/v2/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jmoiron/sqlx"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverdatabasesql"
	"github.com/riverqueue/river/rivermigrate"
	"github.com/uptrace/bun"
	"github.com/uptrace/bun/dialect/pgdialect"
	"go.uber.org/goleak"
	gormpostgres "gorm.io/driver/postgres"
	"gorm.io/gorm"
	"gorm.io/gorm/logger"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/sqldb"
	"github.com/paidonce/idempotency/storage/postgres/sqldb/ormtest/internal/effects"
	"github.com/paidonce/idempotency/storage/postgres/sqldb/ormtest/internal/ent"
	"github.com/paidonce/idempotency/storage/postgres/sqldb/ormtest/internal/ent/effect"
)

func TestMain(m *testing.M) {
	// GORM's cache of prepared statements has a goroutine that nothing ends.
	pgtest.Main(m, goleak.IgnoreTopFunction("gorm.io/gorm/internal/lru.NewLRU[...].func1"))
}

// steps are the calls of a library in a handler. Each inserts rows into effects, one by one.
type steps struct {
	// write inserts a row in the library's shortest way.
	write func(ctx context.Context, name string) error
	// nest inserts name in a transaction that it commits, and name+"-undone" in one that it rolls
	// back: inside of the first one if the library nests them, else before it.
	nest func(ctx context.Context, name string) error
	// names returns the names of the rows that have this one.
	names func(ctx context.Context, name string) ([]string, error)
	// caught inserts a row with the id 1, which exists already, in a transaction. It returns the
	// error.
	caught func(ctx context.Context) error
}

var errUndo = errors.New("undo")

// undone returns nil if the error is errUndo.
func undone(err error) error {
	if errors.Is(err, errUndo) {
		return nil
	}
	return fmt.Errorf("it was not undone: %w", err)
}

// Effect is a row, for the libraries that map a struct.
type Effect struct {
	bun.BaseModel `bun:"table:effects" gorm:"-"`

	ID   int64  `bun:",pk,autoincrement" gorm:"primaryKey"`
	Name string `db:"name"`
}

// TableName is for GORM.
func (Effect) TableName() string { return "effects" }

// job is a job of River's, which is a row of river_job instead of effects.
type job struct {
	Name string `json:"name"`
}

func (job) Kind() string { return "job" }

func must[T any](t *testing.T) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

const insert = "INSERT INTO effects (name) VALUES ($1)"

// in runs f in a sql.Tx, as applications do.
func in(ctx context.Context, db *sql.DB, f func(tx *sql.Tx) error) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	if err := f(tx); err != nil {
		return errors.Join(err, tx.Rollback())
	}
	return tx.Commit()
}

// names reads names as applications do without a library.
func names(ctx context.Context, db *sql.DB, name string) (names []string, err error) {
	rows, err := db.QueryContext(ctx, "SELECT name FROM effects WHERE name = $1", name)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		names = append(names, "")
		if err := rows.Scan(&names[len(names)-1]); err != nil {
			return nil, err
		}
	}
	return names, rows.Err()
}

func namesOf(effects []Effect) (names []string) {
	for _, e := range effects {
		names = append(names, e.Name)
	}
	return names
}

// libraries are all opened on one *sql.DB, outside of any handler.
var libraries = map[string]func(t *testing.T, db *sql.DB) steps{
	"database-sql": func(_ *testing.T, db *sql.DB) steps {
		return steps{
			write: func(ctx context.Context, name string) error {
				_, err := db.ExecContext(ctx, insert, name)
				return err
			},
			nest: func(ctx context.Context, name string) error {
				err := in(ctx, db, func(tx *sql.Tx) error {
					_, err := tx.ExecContext(ctx, insert, name+"-undone")
					return errors.Join(err, errUndo)
				})
				if undone(err) != nil {
					return err
				}
				return in(ctx, db, func(tx *sql.Tx) error {
					_, err := tx.ExecContext(ctx, insert, name)
					return err
				})
			},
			names: func(ctx context.Context, name string) ([]string, error) { return names(ctx, db, name) },
			caught: func(ctx context.Context) error {
				return in(ctx, db, func(tx *sql.Tx) error {
					_, err := tx.ExecContext(ctx, "INSERT INTO effects (id) VALUES ($1)", 1)
					return err
				})
			},
		}
	},
	"sqlx": func(_ *testing.T, plain *sql.DB) steps {
		db := sqlx.NewDb(plain, "pgx")
		return steps{
			write: func(ctx context.Context, name string) error {
				_, err := db.NamedExecContext(ctx, "INSERT INTO effects (name) VALUES (:name)", Effect{Name: name})
				return err
			},
			nest: func(ctx context.Context, name string) error {
				for _, end := range []struct {
					name string
					tx   func(*sqlx.Tx) error
				}{{name + "-undone", (*sqlx.Tx).Rollback}, {name, (*sqlx.Tx).Commit}} {
					tx, err := db.BeginTxx(ctx, nil)
					if err != nil {
						return err
					}
					_, err = tx.ExecContext(ctx, db.Rebind("INSERT INTO effects (name) VALUES (?)"), end.name)
					if err = errors.Join(err, end.tx(tx)); err != nil {
						return err
					}
				}
				return nil
			},
			names: func(ctx context.Context, name string) (names []string, err error) {
				var effects []Effect
				err = db.SelectContext(ctx, &effects, "SELECT id, name FROM effects WHERE name = $1", name)
				return namesOf(effects), err
			},
			caught: func(ctx context.Context) error {
				tx := db.MustBeginTx(ctx, nil)
				_, err := tx.NamedExecContext(ctx, "INSERT INTO effects (id) VALUES (:id)", map[string]any{"id": 1})
				return errors.Join(err, tx.Rollback())
			},
		}
	},
	"gorm":                        gormSteps(gorm.Config{}),
	"gorm-SkipDefaultTransaction": gormSteps(gorm.Config{SkipDefaultTransaction: true}),
	"gorm-PrepareStmt":            gormSteps(gorm.Config{PrepareStmt: true}),
	"ent": func(t *testing.T, db *sql.DB) steps {
		client := ent.NewClient(ent.Driver(entsql.OpenDB(entdialect.Postgres, db)))
		inTx := func(ctx context.Context, f func(tx *ent.Tx) error) error {
			tx, err := client.Tx(ctx)
			if err != nil {
				return err
			}
			if err := f(tx); err != nil {
				return errors.Join(err, tx.Rollback())
			}
			return tx.Commit()
		}
		return steps{
			write: func(ctx context.Context, name string) error {
				return client.Effect.Create().SetName(name).Exec(ctx)
			},
			nest: func(ctx context.Context, name string) error {
				err := inTx(ctx, func(tx *ent.Tx) error {
					return errors.Join(tx.Effect.Create().SetName(name+"-undone").Exec(ctx), errUndo)
				})
				if undone(err) != nil {
					return err
				}
				return inTx(ctx, func(tx *ent.Tx) error { return tx.Effect.Create().SetName(name).Exec(ctx) })
			},
			names: func(ctx context.Context, name string) ([]string, error) {
				return client.Effect.Query().Where(effect.Name(name)).Select(effect.FieldName).Strings(ctx)
			},
			caught: func(ctx context.Context) error {
				return inTx(ctx, func(tx *ent.Tx) error {
					return tx.Effect.Create().SetID(1).SetName("").Exec(ctx)
				})
			},
		}
	},
	"bun": func(t *testing.T, plain *sql.DB) steps {
		db := bun.NewDB(plain, pgdialect.New())
		return steps{
			write: func(ctx context.Context, name string) error {
				_, err := db.NewInsert().Model(&Effect{Name: name}).Exec(ctx)
				return err
			},
			nest: func(ctx context.Context, name string) error {
				return db.RunInTx(ctx, nil, func(ctx context.Context, tx bun.Tx) error {
					err := tx.RunInTx(ctx, nil, func(ctx context.Context, tx bun.Tx) error {
						_, err := tx.NewInsert().Model(&Effect{Name: name + "-undone"}).Exec(ctx)
						return errors.Join(err, errUndo)
					})
					if undone(err) != nil {
						return err
					}
					_, err = tx.NewInsert().Model(&Effect{Name: name}).Exec(ctx)
					return err
				})
			},
			names: func(ctx context.Context, name string) ([]string, error) {
				var effects []Effect
				err := db.NewSelect().Model(&effects).Where("name = ?", name).Scan(ctx)
				return namesOf(effects), err
			},
			caught: func(ctx context.Context) error {
				return db.RunInTx(ctx, nil, func(ctx context.Context, tx bun.Tx) error {
					_, err := tx.NewInsert().Model(&Effect{ID: 1}).Exec(ctx)
					return err
				})
			},
		}
	},
	"go-jet": func(_ *testing.T, db *sql.DB) steps {
		id, name := jet.IntegerColumn("id"), jet.StringColumn("name")
		table := jet.NewTable("", "effects", "", id, name)
		create := func(value string) jet.InsertStatement { return table.INSERT(name).VALUES(value) }
		return steps{
			write: func(ctx context.Context, name string) error {
				_, err := create(name).ExecContext(ctx, db)
				return err
			},
			nest: func(ctx context.Context, name string) error {
				err := in(ctx, db, func(tx *sql.Tx) error {
					_, err := create(name+"-undone").ExecContext(ctx, tx)
					return errors.Join(err, errUndo)
				})
				if undone(err) != nil {
					return err
				}
				return in(ctx, db, func(tx *sql.Tx) error {
					_, err := create(name).ExecContext(ctx, tx)
					return err
				})
			},
			names: func(ctx context.Context, value string) ([]string, error) {
				var names []string
				err := jet.SELECT(name).FROM(table).WHERE(name.EQ(jet.String(value))).QueryContext(ctx, db, &names)
				return names, err
			},
			caught: func(ctx context.Context) error {
				return in(ctx, db, func(tx *sql.Tx) error {
					_, err := table.INSERT(id).VALUES(1).ExecContext(ctx, tx)
					return err
				})
			},
		}
	},
	"sqlc": func(t *testing.T, db *sql.DB) steps {
		queries := must[*effects.Queries](t)(effects.Prepare(t.Context(), db))
		t.Cleanup(func() {
			if err := queries.Close(); err != nil {
				t.Error(err)
			}
		})
		return steps{
			write: func(ctx context.Context, name string) error {
				_, err := queries.CreateEffect(ctx, name)
				return err
			},
			nest: func(ctx context.Context, name string) error {
				err := in(ctx, db, func(tx *sql.Tx) error {
					_, err := queries.WithTx(tx).CreateEffect(ctx, name+"-undone")
					return errors.Join(err, errUndo)
				})
				if undone(err) != nil {
					return err
				}
				return in(ctx, db, func(tx *sql.Tx) error {
					_, err := queries.WithTx(tx).CreateEffect(ctx, name)
					return err
				})
			},
			names: func(ctx context.Context, name string) ([]string, error) { return names(ctx, db, name) },
			caught: func(ctx context.Context) error {
				return in(ctx, db, func(tx *sql.Tx) error {
					_, err := tx.ExecContext(ctx, "INSERT INTO effects (id) VALUES ($1)", 1)
					return err
				})
			},
		}
	},
}

func gormSteps(config gorm.Config) func(t *testing.T, db *sql.DB) steps {
	return func(t *testing.T, conn *sql.DB) steps {
		config := config
		config.Logger = logger.Discard
		db := must[*gorm.DB](t)(gorm.Open(gormpostgres.New(gormpostgres.Config{Conn: conn}), &config))
		return steps{
			write: func(ctx context.Context, name string) error {
				return db.WithContext(ctx).Create(&Effect{Name: name}).Error
			},
			nest: func(ctx context.Context, name string) error {
				return db.WithContext(ctx).Transaction(func(tx *gorm.DB) error {
					err := tx.Transaction(func(tx *gorm.DB) error {
						return errors.Join(tx.Create(&Effect{Name: name + "-undone"}).Error, errUndo)
					})
					if undone(err) != nil {
						return err
					}
					return tx.Create(&Effect{Name: name}).Error
				})
			},
			names: func(ctx context.Context, name string) ([]string, error) {
				var effects []Effect
				err := db.WithContext(ctx).Find(&effects, "name = ?", name).Error
				return namesOf(effects), err
			},
			caught: func(ctx context.Context) error {
				create := func(tx *gorm.DB) error { return tx.Create(&Effect{ID: 1}).Error }
				if config.SkipDefaultTransaction {
					return db.WithContext(ctx).Transaction(create)
				}
				return create(db.WithContext(ctx))
			},
		}
	}
}

// waitMax is long because the machine may be loaded.
const waitMax = 45 * time.Second

type testBundle struct {
	*testservice.Service
	db    *sql.DB
	trips *testservice.RoundTrips
}

func setup(t *testing.T, poolMax int32) *testBundle {
	t.Helper()
	b := &testBundle{}
	b.Service = testservice.New(t, &postgres.Options{AcquireTimeout: waitMax, IdleInTransactionTimeout: waitMax + 10*time.Second, PoolConfig: func(config *pgxpool.Config) {
		config.MaxConns = poolMax
		b.trips = testservice.CountRoundTrips(config)
	}})
	b.db = sqldb.Open(b.Store, nil)
	t.Cleanup(func() {
		if err := b.db.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

// do runs a handler, which returns its status, for a request with this key.
func (b *testBundle) do(t *testing.T, key string, want idempotency.Outcome, handler func(ctx context.Context) int) {
	t.Helper()
	result := b.Engine.Do(t.Context(), testservice.Request(idempotency.Key{Scope: "acme", Value: key}), func(ctx context.Context) (*idempotency.Answer, error) {
		return &idempotency.Answer{Status: handler(ctx)}, nil
	})
	if result.Outcome != want {
		t.Errorf("%s: outcome %q, want %q: %v", key, result.Outcome, want, result.Err)
	}
}

// 201 commits rows and record, 402 the record only, 500 neither; nested transactions are kept or
// undone; and a violation that is caught does not fail the request.
func TestRowsAgreeWithTheAnswer(t *testing.T) {
	t.Parallel()
	for name, open := range libraries {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, 1)
			b.Exec(t, "INSERT INTO effects (name) VALUES ('there')") // with the id 1
			library := open(t, b.db)
			names := "there"
			for run := range 2 { // the second time each text is known
				for _, c := range []struct {
					status  int
					outcome idempotency.Outcome
				}{{500, idempotency.OutcomeNotExecuted}, {402, idempotency.OutcomeExecuted}, {201, idempotency.OutcomeExecuted}} {
					key := fmt.Sprintf("%d-%d", c.status, run)
					b.do(t, key, c.outcome, func(ctx context.Context) int {
						if err := library.write(ctx, key+"-write"); err != nil {
							t.Error(err)
						}
						if err := library.nest(ctx, key+"-nest"); err != nil {
							t.Error(err)
						}
						if got, err := library.names(ctx, key+"-nest"); err != nil || fmt.Sprint(got) != "["+key+"-nest]" {
							t.Errorf("the handler reads %q: %v", got, err)
						}
						if err := library.caught(ctx); err == nil {
							t.Error("a row with the id 1 was inserted again")
						} else if pgErr := new(pgconn.PgError); !errors.As(err, &pgErr) || pgErr.Code != "23505" {
							t.Errorf("the violation is %T: %v", err, err)
						}
						if err := library.write(ctx, key+"-last"); err != nil {
							t.Error(err)
						}
						return c.status
					})
					if c.status == 201 {
						names += " " + key + "-write " + key + "-nest " + key + "-last"
					}
					if got := b.Text(t, "SELECT string_agg(name, ' ' ORDER BY id) FROM effects"); got != names {
						t.Errorf("after %s the effects are %q, want %q", key, got, names)
					}
				}
			}
			if n := b.Count(t, "SELECT count(*) FROM idempotency_keys"); n != 4 {
				t.Errorf("%d records, want 4", n)
			}
		})
	}
}

// The promise: a library costs the round trips of its statements on pgx, and its transactions cost
// none of their own, except for the ROLLBACK of one that is undone.
func TestRoundTripsAreThoseOfPgx(t *testing.T) {
	t.Parallel()
	write := func(ctx context.Context, tx pgx.Tx, names ...string) error {
		for _, name := range names {
			if _, err := tx.Exec(ctx, insert, name); err != nil {
				return err
			}
		}
		return nil
	}
	pgxSteps := steps{
		write: func(ctx context.Context, name string) error { return write(ctx, postgres.Tx(ctx), name) },
		nest: func(ctx context.Context, name string) error {
			tx, err := postgres.Tx(ctx).Begin(ctx)
			if err != nil {
				return err
			}
			if err := errors.Join(write(ctx, tx, name), tx.Rollback(ctx)); err != nil {
				return err
			}
			return write(ctx, postgres.Tx(ctx), name)
		},
	}
	cost := func(t *testing.T, b *testBundle, library steps) (one, nested int) {
		for _, run := range []string{"cold", "colder", "warm"} { // GORM prepares its nested ones later
			before := b.trips.Count()
			b.do(t, "write-"+run, idempotency.OutcomeExecuted, func(ctx context.Context) int {
				if err := library.write(ctx, "x"); err != nil {
					t.Error(err)
				}
				return 201
			})
			one = b.trips.Count() - before
			before = b.trips.Count()
			b.do(t, "nest-"+run, idempotency.OutcomeExecuted, func(ctx context.Context) int {
				if err := library.nest(ctx, "x"); err != nil {
					t.Error(err)
				}
				return 201
			})
			nested = b.trips.Count() - before
		}
		return one, nested
	}
	one, nested := cost(t, setup(t, 1), pgxSteps)
	if one != 3 || nested != 7 { // SAVEPOINT, ROLLBACK TO and RELEASE
		t.Fatalf("pgx: %d and %d round trips, want 3 and 7: the count is wrong", one, nested)
	}
	for name, open := range libraries {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, 1)
			gotOne, gotNested := cost(t, b, open(t, b.db))
			if gotOne != one {
				t.Errorf("one insert: %d round trips, pgx %d", gotOne, one)
			}
			if want := nested - 2; gotNested != want { // SAVEPOINT and RELEASE travel with the inserts
				t.Errorf("nested ones: %d round trips, want %d", gotNested, want)
			}
		})
	}
}

// 200 handlers at once on one *sql.DB, half of them declined: rows and records agree.
func TestManyHandlersOnOneDB(t *testing.T) {
	t.Parallel()
	const handlers = 200
	b := setup(t, 8)
	b.Engine = idempotency.NewEngine(b.Store, &idempotency.Options{Timeouts: idempotency.Timeouts{Handler: waitMax}})
	var opened []steps
	for _, name := range []string{"database-sql", "sqlx", "gorm", "ent", "bun"} {
		opened = append(opened, libraries[name](t, b.db))
	}
	want := 0
	var running sync.WaitGroup
	for i := range handlers {
		library, key := opened[i%len(opened)], fmt.Sprint("key-", i)
		status := 201
		if i/len(opened)%2 == 1 {
			status = 402
		} else {
			want++
		}
		running.Go(func() {
			result := idempotency.Result{Reason: idempotency.ReasonUnavailable}
			for tries := 0; result.Reason == idempotency.ReasonUnavailable && tries < 10; tries++ { // on a loaded machine
				result = b.Engine.Do(t.Context(), testservice.Request(idempotency.Key{Scope: "acme", Value: key}), func(ctx context.Context) (*idempotency.Answer, error) {
					return &idempotency.Answer{Status: status}, errors.Join(library.write(ctx, key), library.nest(ctx, key))
				})
			}
			if result.Outcome != idempotency.OutcomeExecuted {
				t.Errorf("%s: %s: %v", key, result.Outcome, result.Err)
			}
		})
	}
	running.Wait()
	if want != handlers/2 {
		t.Errorf("%d handlers are not declined", want)
	}
	if n := b.Count(t, "SELECT count(*) FROM idempotency_keys"); n != handlers {
		t.Errorf("%d records, want %d", n, handlers)
	}
	if n := b.Count(t, "SELECT count(*) FROM idempotency_keys WHERE status = 201"); n != want {
		t.Errorf("%d records of 201, want %d", n, want)
	}
	// Each handler that was not declined wrote two rows with its key as their name, and no other did.
	if n := b.Count(t, "SELECT count(*) FROM idempotency_keys k JOIN effects e ON e.name = k.key WHERE k.status = 201"); n != 2*want || b.Effects(t) != n {
		t.Errorf("%d rows, %d of them of a handler with 201, want %d", b.Effects(t), n, 2*want)
	}
}

// A job of River's is enqueued if and only if the handler's writes are committed.
func TestRiver(t *testing.T) {
	t.Parallel()
	b := setup(t, 1)
	outside := sqldb.Open(b.Store, &sqldb.Options{Pool: true}) // for the migrations
	t.Cleanup(func() { _ = outside.Close() })
	migrator := must[*rivermigrate.Migrator[*sql.Tx]](t)(rivermigrate.New(riverdatabasesql.New(outside), nil))
	must[*rivermigrate.MigrateResult](t)(migrator.Migrate(t.Context(), rivermigrate.DirectionUp, nil))
	jobs := must[*river.Client[*sql.Tx]](t)(river.NewClient(riverdatabasesql.New(b.db), &river.Config{
		FetchCooldown: time.Hour, FetchPollInterval: time.Hour, // it notifies its workers once in that time, by one more statement
	}))
	for _, run := range []string{"cold", "warm"} {
		before := b.Count(t, "SELECT count(*) FROM river_job")
		for status, outcome := range map[int]idempotency.Outcome{201: idempotency.OutcomeExecuted, 402: idempotency.OutcomeExecuted, 500: idempotency.OutcomeNotExecuted} {
			trips := b.trips.Count()
			b.do(t, fmt.Sprint(run, status), outcome, func(ctx context.Context) int {
				if err := in(ctx, b.db, func(tx *sql.Tx) error {
					_, err := jobs.InsertTx(ctx, tx, job{Name: "receipt"}, nil)
					return err
				}); err != nil {
					t.Error(err)
				}
				if _, err := jobs.Insert(ctx, job{Name: "receipt"}, nil); err != nil { // begins one itself
					t.Error(err)
				}
				return status
			})
			// River reads arrays, so SAVEPOINT is a round trip of its own, in front of the insert.
			if trips = b.trips.Count() - trips; run == "warm" && trips != 6 {
				t.Errorf("two jobs cost %d round trips, want 6", trips)
			}
		}
		if n := b.Count(t, "SELECT count(*) FROM river_job") - before; n != 2 {
			t.Errorf("%s: %d jobs, want 2", run, n)
		}
	}
}
