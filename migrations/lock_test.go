package migrations_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"time"

	migratepgx "github.com/golang-migrate/migrate/v4/database/pgx/v5"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

// reader locks every table as pg_dump does, ACCESS SHARE, until release is called.
func (b *testBundle) reader(t *testing.T) (pid int, release func()) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), b.with(t, "application_name", "report"))
	if err != nil {
		t.Fatal(err)
	}
	// pg_class begins the transaction on an empty schema too.
	for _, table := range append([]string{"pg_class"}, b.tables(t)...) {
		sql := "LOCK TABLE " + table + " IN ACCESS SHARE MODE"
		if table == "pg_class" {
			sql = "BEGIN"
		}
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	release = sync.OnceFunc(func() { _ = conn.Close(context.Background()) })
	t.Cleanup(release)
	return int(conn.PgConn().PID()), release
}

// load sends requests, each with a new key, until stop is called. All must be executed; stop
// returns their number.
func (b *testBundle) load(t *testing.T) (stop func() int64) {
	t.Helper()
	const clients = 3
	engine := idempotency.NewEngine(postgres.New(b.pool, nil), nil)
	var executed atomic.Int64
	var stopped atomic.Bool
	var running, warm sync.WaitGroup
	warm.Add(clients)
	for range clients {
		running.Go(func() {
			for first := true; !stopped.Load(); first = false {
				got := do(t.Context(), engine, uuid.NewString(), 201)
				if got.Outcome != idempotency.OutcomeExecuted {
					t.Errorf("a request is %s, %v", got.Outcome, got.Err)
				}
				executed.Add(1)
				if first {
					warm.Done()
				}
			}
		})
	}
	warm.Wait()
	return func() int64 {
		stopped.Store(true)
		running.Wait()
		return executed.Load()
	}
}

// A long reader such as pg_dump delays a migration, but the migration never delays requests for
// long.
func TestEachMigrationBehindAReaderLetsRequestsGoOn(t *testing.T) {
	t.Parallel()
	for version := uint(1); version <= migrations.Latest; version++ {
		for _, up := range []bool{true, false} {
			t.Run(fmt.Sprintf("%d up %v", version, up), func(t *testing.T) {
				t.Parallel()
				b := setup(t)
				b.up(t, nil)
				from, to := version, version-1
				if up {
					from, to = to, from
				}
				if err := migrations.DownTo(t.Context(), b.on(b.pool), from, nil); err != nil {
					t.Fatal(err)
				}
				pid, release := b.reader(t)
				stop := func() int64 { return 1 }
				if from > 0 { // below there is no table for requests
					stop = b.load(t)
				}
				waiting, migrated := make(chan migrations.Waiting, 100), make(chan error, 1)
				options := &migrations.Options{Waiting: func(w migrations.Waiting) { waiting <- w }}
				if testing.Short() {
					options.LockTimeout = 500 * time.Millisecond
				}
				go func() {
					if up {
						options.Files, options.VersionTable = upTo(t, to), versionTable
						migrated <- migrations.Up(t.Context(), b.on(b.pool), options)
						return
					}
					migrated <- migrations.DownTo(t.Context(), b.on(b.pool), to, options)
				}()
				done := false
				for tries := 0; tries < 2 && !done; {
					select {
					case err := <-migrated:
						if done = true; err != nil {
							t.Error(err)
						}
					case w := <-waiting:
						tries = w.Tries
						wantWaitsFor(t, w, pid)
					case <-time.After(waitMax):
						t.Fatal("it neither ends nor says what it waits for")
					}
				}
				if executed := stop(); executed == 0 {
					t.Error("no request was executed")
				}
				release()
				if !done {
					if err := <-migrated; err != nil {
						t.Error(err)
					}
				}
				b.wantVersion(t, nil, to)
			})
		}
	}
}

// upTo returns this package's files up to a version.
func upTo(t *testing.T, version uint) fstest.MapFS {
	t.Helper()
	entries, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	files := fstest.MapFS{}
	for _, entry := range entries {
		var number uint
		if _, err := fmt.Sscanf(entry.Name(), "%06d_", &number); err != nil || number > version || !strings.HasSuffix(entry.Name(), ".sql") {
			continue
		}
		data, err := os.ReadFile(entry.Name())
		if err != nil {
			t.Fatal(err)
		}
		files[entry.Name()] = &fstest.MapFile{Data: data}
	}
	return files
}

func wantWaitsFor(t *testing.T, w migrations.Waiting, pid int) {
	t.Helper()
	for _, blocker := range w.Blockers {
		if blocker.PID == pid {
			if text := blocker.String(); !strings.Contains(text, fmt.Sprint(pid)) || !strings.Contains(text, "report, idle in transaction") {
				t.Errorf("the blocker is told as %q", text)
			}
			return
		}
	}
	t.Errorf("%s waits for %v, want process %d among them", w.What, w.Blockers, pid)
}

// A migration that waits for a table ends with its context, and leaves no lock, no waiting
// statement and no dirty schema.
func TestMigrationThatWaitsEndsWithItsContext(t *testing.T) {
	t.Parallel()
	files := fstest.MapFS{
		"000001_create_one.up.sql": {Data: []byte("CREATE TABLE one (id bigint)")},
		"000002_alter_one.up.sql":  {Data: []byte("CREATE TABLE two (id bigint); ALTER TABLE one ADD COLUMN amount bigint")},
	}
	own := &migrations.Options{VersionTable: "service_migrations", Files: fstest.MapFS{"000001_create_one.up.sql": files["000001_create_one.up.sql"]}}
	for name, lockTimeout := range map[string]time.Duration{"in a try": time.Minute, "between two": 500 * time.Millisecond} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			b.up(t, own)
			pid, release := b.reader(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			options := &migrations.Options{VersionTable: own.VersionTable, Files: files, LockTimeout: lockTimeout}
			if lockTimeout < time.Second {
				options.Waiting = func(migrations.Waiting) { cancel() }
			}
			ended := make(chan error, 1)
			go func() { ended <- migrations.Up(ctx, b.on(b.pool), options) }()
			if lockTimeout > time.Second {
				b.awaitWaiting(t, true)
				cancel()
			}
			select {
			case err := <-ended:
				if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "migration 2 up") {
					t.Errorf("error is %v", err)
				}
				if lockTimeout < time.Second && !strings.Contains(err.Error(), fmt.Sprintf("process %d", pid)) {
					t.Errorf("the error does not say who held the table: %v", err)
				}
			case <-time.After(waitMax):
				t.Fatal("it still waits")
			}
			b.awaitWaiting(t, false)
			b.wantVersion(t, own, 1)
			b.wantTables(t, "public.one", "public.service_migrations")
			release()
			b.up(t, &migrations.Options{VersionTable: own.VersionTable, Files: files})
			b.wantVersion(t, own, 2)
		})
	}
}

// waits returns the migration's next call of Waiting.
func waits(t *testing.T, told <-chan migrations.Waiting, migrated <-chan error) (w migrations.Waiting) {
	t.Helper()
	select {
	case w = <-told:
	case err := <-migrated:
		t.Fatalf("it does not wait: %v", err)
	case <-time.After(waitMax):
		t.Fatal("it says nothing")
	}
	return w
}

// awaitWaiting waits until a session waits for ACCESS EXCLUSIVE, or until none does.
func (b *testBundle) awaitWaiting(t *testing.T, want bool) {
	t.Helper()
	for deadline := time.Now().Add(waitMax); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		waiting := b.strings(t, `SELECT pid::text FROM pg_locks WHERE NOT granted AND mode = 'AccessExclusiveLock'
			AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`)
		if len(waiting) > 0 == want {
			return
		}
	}
	t.Fatalf("somebody waits for a table: never %v", want)
}

// If a reader ends before LockTimeout, the first try succeeds. If it takes longer, Waiting is
// called, and the migration tries again.
func TestLockTimeoutOfAMigration(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		timeout time.Duration
		tries   bool
	}{{time.Minute, false}, {time.Millisecond, true}} {
		b := setup(t)
		b.up(t, nil)
		_, release := b.reader(t)
		told := make(chan migrations.Waiting, 1000)
		migrated := make(chan error, 1)
		go func() {
			migrated <- migrations.DownTo(t.Context(), b.on(b.pool), 2, &migrations.Options{
				LockTimeout: test.timeout, Waiting: func(w migrations.Waiting) { told <- w },
			})
		}()
		if test.tries {
			for pause := test.timeout; pause <= 8*test.timeout; pause *= 2 { // twice as long each time
				if w := waits(t, told, migrated); w.Pause != pause || w.What != "migration 5 down" {
					t.Errorf("%s waits for %v, want %v", w.What, w.Pause, pause)
				}
			}
			if w := waits(t, told, migrated); w.Pause != 8*test.timeout || w.Tries != 5 {
				t.Errorf("after %d tries the pause is %v", w.Tries, w.Pause)
			}
		} else {
			b.awaitWaiting(t, true)
		}
		release()
		if err := <-migrated; err != nil {
			t.Error(err)
		}
		if !test.tries && len(told) != 0 {
			t.Errorf("it gave up before %v: %+v", test.timeout, <-told)
		}
		b.wantVersion(t, nil, 2)
	}
	b := setup(t)
	for _, timeout := range []time.Duration{-time.Second, time.Millisecond - 1} {
		if err := migrations.Up(t.Context(), b.on(b.pool), &migrations.Options{LockTimeout: timeout}); err == nil || !strings.Contains(err.Error(), "at least a millisecond") {
			t.Errorf("LockTimeout %v: %v", timeout, err)
		}
	}
}

// A request that waits for a table and holds another can deadlock with the migration. PostgreSQL
// may then end the migration, which tries again.
func TestMigrationThatADeadlockEndsComesAgain(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(t, "CREATE TABLE one (id bigint); CREATE TABLE two (id bigint)")
	conn, err := pgx.Connect(t.Context(), b.url)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.Background()) }()
	if _, err := conn.Exec(t.Context(), "BEGIN; SET LOCAL deadlock_timeout = '10min'; INSERT INTO two VALUES (1)"); err != nil {
		t.Fatal(err)
	}
	pool := open(t, b.url, func(config *pgxpool.Config) { config.ConnConfig.RuntimeParams["deadlock_timeout"] = "10ms" })
	told, migrated := make(chan migrations.Waiting, 100), make(chan error, 1)
	own := &migrations.Options{
		VersionTable: "service_migrations", LockTimeout: 2 * time.Second, Waiting: func(w migrations.Waiting) { told <- w },
		Files: fstest.MapFS{"000001_alter_both.up.sql": {Data: []byte("ALTER TABLE one ADD COLUMN a bigint; ALTER TABLE two ADD COLUMN a bigint")}},
	}
	go func() { migrated <- migrations.Up(t.Context(), b.on(pool), own) }()
	b.awaitWaiting(t, true)
	// The migration holds this table, and releases it.
	if _, err := conn.Exec(t.Context(), "INSERT INTO one VALUES (1)"); err != nil {
		t.Fatal(err)
	}
	waits(t, told, migrated)
	if _, err := conn.Exec(t.Context(), "COMMIT"); err != nil {
		t.Fatal(err)
	}
	if err := <-migrated; err != nil {
		t.Error(err)
	}
	b.wantVersion(t, own, 1)
}

// Each file of this package runs in one transaction with its version, so it is applied whole or not
// at all: no file contains a statement that ends a transaction.
func TestEachFileIsOneTransaction(t *testing.T) {
	t.Parallel()
	b := setup(t)
	conn, err := pgx.Connect(t.Context(), b.url)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.Background()) }()
	var names []string
	for version := 1; version <= migrations.Latest; version++ {
		for name := range upTo(t, uint(version)) {
			if strings.HasPrefix(name, fmt.Sprintf("%06d_", version)) && strings.HasSuffix(name, ".up.sql") {
				names = append(names, name)
			}
		}
	}
	for i := len(names) - 1; i >= 0; i-- {
		names = append(names, strings.TrimSuffix(names[i], ".up.sql")+".down.sql")
	}
	for _, name := range names {
		sql, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		var before, after string
		for _, step := range []struct {
			sql string
			to  *string
		}{{sql: "BEGIN"}, {"SELECT pg_current_xact_id()::text", &before}, {sql: string(sql)}, {"SELECT pg_current_xact_id()::text", &after}, {sql: "COMMIT"}} {
			if step.to != nil {
				err = conn.QueryRow(t.Context(), step.sql).Scan(step.to)
			} else {
				_, err = conn.PgConn().Exec(t.Context(), step.sql).ReadAll()
			}
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		if before != after {
			t.Errorf("%s ends its transaction", name)
		}
	}
}

// The migrate program and this package wait for each other.
func TestUpWaitsForTheMigrateProgram(t *testing.T) {
	t.Parallel()
	b := setup(t)
	address := strings.Replace(b.with(t, "x-migrations-table", versionTable), "postgres://", "pgx5://", 1)
	program, err := (&migratepgx.Postgres{}).Open(address)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = program.Close() }()
	if err := program.Lock(); err != nil {
		t.Fatal(err)
	}
	told, migrated := make(chan migrations.Waiting, 100), make(chan error, 1)
	go func() {
		migrated <- migrations.Up(t.Context(), b.on(b.pool), &migrations.Options{Waiting: func(w migrations.Waiting) { told <- w }})
	}()
	select {
	case w := <-told:
		if w.What != "another migration" || len(w.Blockers) != 1 || w.Blockers[0].PID == 0 {
			t.Errorf("it waits for %+v", w)
		}
	case err := <-migrated:
		t.Errorf("it did not wait: %v", err)
		return
	}
	if err := program.Unlock(); err != nil {
		t.Fatal(err)
	}
	if err := <-migrated; err != nil {
		t.Error(err)
	}
}

// CREATE INDEX CONCURRENTLY can't run in a transaction, and waits for all other transactions,
// however long they take.
func TestFileThatCantBeATransaction(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(t, "CREATE TABLE transfers (id bigint)")
	conn, err := pgx.Connect(t.Context(), b.url)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.Background()) }()
	if _, err := conn.Exec(t.Context(), "BEGIN; INSERT INTO transfers VALUES (1)"); err != nil {
		t.Fatal(err)
	}
	const lockTimeout = 50 * time.Millisecond
	own := &migrations.Options{VersionTable: "service_migrations", LockTimeout: lockTimeout, Files: fstest.MapFS{
		"000001_create_index.up.sql": {Data: []byte("CREATE INDEX CONCURRENTLY transfers_id_idx ON transfers (id)")},
		"000002_alter_table.up.sql":  {Data: []byte("SELECT set_config('test.timeout', current_setting('lock_timeout'), false); CREATE TABLE told AS SELECT current_setting('lock_timeout') AS lock_timeout")},
	}}
	migrated := make(chan error, 1)
	go func() { migrated <- migrations.Up(t.Context(), b.on(b.pool), own) }()
	longWait := `SELECT (now() - query_start > interval '200 ms')::text FROM pg_stat_activity WHERE query LIKE 'CREATE INDEX CONCURRENTLY%' AND wait_event_type = 'Lock'`
	// Wait until the statement has waited for four times as long as LockTimeout.
	for deadline := time.Now().Add(waitMax); ; time.Sleep(5 * time.Millisecond) {
		if long := b.strings(t, longWait); len(long) > 0 && long[0] == "true" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("it does not wait")
		}
	}
	if _, err := conn.Exec(t.Context(), "COMMIT"); err != nil {
		t.Fatal(err)
	}
	if err := <-migrated; err != nil {
		t.Error(err)
	}
	b.wantVersion(t, own, 2)
	if valid := b.strings(t, "SELECT indisvalid::text FROM pg_index WHERE indexrelid = 'transfers_id_idx'::regclass"); len(valid) != 1 || valid[0] != "true" {
		t.Errorf("the index is valid: %v", valid)
	}
	if got := b.strings(t, "SELECT lock_timeout FROM told"); len(got) != 1 || got[0] != "50ms" {
		t.Errorf("the next migration's lock_timeout is %v", got)
	}
}
