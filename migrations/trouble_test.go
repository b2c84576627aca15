package migrations_test

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

// If the context ends in the middle, the migration under way is undone, and no other begins.
// Another Up continues from there.
func TestUpThatIsStoppedLeavesNothing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ctx, cancel := context.WithCancel(t.Context())
	own := &migrations.Options{VersionTable: "service_migrations", Files: stoppingFS{
		FS: fstest.MapFS{
			"000001_create_one.up.sql": {Data: []byte("CREATE TABLE one (id bigint); SELECT pg_sleep(0.2)")},
			"000002_create_two.up.sql": {Data: []byte("CREATE TABLE two (id bigint)")},
		},
		name: "000001_create_one.up.sql", stop: cancel,
	}}
	if err := migrations.Up(ctx, b.on(b.pool), own); !errors.Is(err, context.Canceled) {
		t.Errorf("error is %v; want context.Canceled", err)
	}
	version, err := migrations.Version(t.Context(), b.on(b.pool), own)
	if version != 0 || err != nil {
		t.Errorf("it stopped at version %d, %v", version, err)
	}
	b.wantTables(t)
	b.up(t, own)
	b.wantVersion(t, own, 2)
}

// stoppingFS calls stop when a file is opened.
type stoppingFS struct {
	fs.FS
	name string
	stop func()
}

func (f stoppingFS) Open(name string) (fs.File, error) {
	if name == f.name {
		f.stop()
	}
	return f.FS.Open(name)
}

// A role that may not migrate leaves no connection behind, however far it came.
func TestUpThatFailsLeavesNoConnection(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(t, "REVOKE CREATE ON SCHEMA public FROM PUBLIC") // PostgreSQL 14 grants it
	for _, schema := range []string{"public", "payments"} {
		b.schema = schema
		var openNow atomic.Int64
		config := b.role(t).Config()
		dial := config.ConnConfig.DialFunc
		config.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dial(ctx, network, address)
			if err != nil {
				return nil, err
			}
			openNow.Add(1)
			return &countedConn{Conn: conn, openNow: &openNow}, nil
		}
		pool, err := pgxpool.NewWithConfig(t.Context(), config)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(pool.Close)
		if err := migrations.Up(t.Context(), b.on(pool), nil); err == nil {
			t.Error("it may migrate")
		}
		if n := openNow.Load(); n != 0 {
			t.Errorf("%d connections are left open", n)
		}
	}
}

// countedConn counts itself out when it is closed first.
type countedConn struct {
	net.Conn
	openNow *atomic.Int64
	closed  atomic.Bool
}

func (c *countedConn) Close() error {
	if !c.closed.Swap(true) {
		c.openNow.Add(-1)
	}
	return c.Conn.Close()
}

// The schema too is made by one of those who start together.
func TestSchemaFromManyProcessesAtOnce(t *testing.T) {
	t.Parallel()
	b := setup(t)
	rounds := 20
	if testing.Short() {
		rounds = 2
	}
	for i := range rounds {
		b.schema = "payments_" + strconv.Itoa(i)
		b.upAtOnce(t, nil)
	}
}

// Who waits for another's migration waits longer than a request does for a lock.
func TestUpOutlastsTheLockTimeoutOfThePool(t *testing.T) {
	t.Parallel()
	b := setup(t)
	pool := open(t, b.url, func(config *pgxpool.Config) {
		postgres.Configure(config, &postgres.Options{LockTimeout: 50 * time.Millisecond})
	})
	own := &migrations.Options{VersionTable: "service_migrations", Files: fstest.MapFS{
		"000001_wait.up.sql": {Data: []byte("SELECT pg_sleep(0.5)")},
	}}
	errs := make(chan error)
	for range 2 {
		go func() { errs <- migrations.Up(t.Context(), b.on(pool), own) }()
	}
	for range 2 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

// A wait for another's migration ends with the context.
func TestUpStopsWaiting(t *testing.T) {
	t.Parallel()
	b := setup(t)
	reached, release := make(chan struct{}), make(chan struct{})
	own := &migrations.Options{VersionTable: "service_migrations", Files: stoppingFS{
		FS:   fstest.MapFS{"000001_wait.up.sql": {Data: []byte("SELECT 1")}},
		name: "000001_wait.up.sql", stop: func() { close(reached); <-release },
	}}
	first := make(chan error)
	go func() { first <- migrations.Up(t.Context(), b.on(b.pool), own) }()
	<-reached
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	second := make(chan error, 1)
	go func() {
		second <- migrations.Up(ctx, b.on(b.pool), &migrations.Options{VersionTable: "service_migrations", Files: fstest.MapFS{
			"000001_wait.up.sql": {Data: []byte("SELECT 1")},
		}})
	}()
	select {
	case err := <-second:
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error is %v; want context.DeadlineExceeded", err)
		}
	case <-time.After(5 * time.Second):
		t.Error("it still waits")
	}
	close(release)
	if err := <-first; err != nil {
		t.Error(err)
	}
}

// A service that is rolled back finds a schema of a later release, and must start.
func TestUpOnALaterSchema(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.up(t, nil)
	b.exec(t, "UPDATE idempotency_migrations SET version = $1", migrations.Latest+1)
	b.up(t, nil)
	b.wantVersion(t, nil, migrations.Latest+1)
	wantKeeps(t, b.pool, nil)
	b.exec(t, "UPDATE idempotency_migrations SET dirty = true")
	if err := migrations.Up(t.Context(), b.on(b.pool), nil); !errors.Is(err, migrations.ErrDirty) {
		t.Errorf("on a later schema that is dirty: %v", err)
	}
}

// The migrate program marks the schema dirty before it runs a file, and may be killed then or
// later. The SQL in Up's error finds the version from the objects in the schema.
func TestDirtySchemaOfTheMigrateProgram(t *testing.T) {
	t.Parallel()
	for there := range uint(migrations.Latest) + 1 {
		b := setup(t)
		b.schema = "pay's"
		b.up(t, nil)
		if err := migrations.DownTo(t.Context(), b.on(b.pool), there, nil); err != nil {
			t.Fatal(err)
		}
		for _, marked := range []int{max(int(there), 1), min(int(there)+1, migrations.Latest)} { // on the way down, or up; killed before the file, or after it
			b.exec(t, `DELETE FROM "pay's".idempotency_migrations`)
			b.exec(t, `INSERT INTO "pay's".idempotency_migrations VALUES ($1, true)`, marked)
			err := migrations.Up(t.Context(), b.on(b.pool), nil)
			if !errors.Is(err, migrations.ErrDirty) {
				t.Fatalf("marked as %d: %v", marked, err)
			}
			b.exec(t, strings.Split(err.Error(), "`")[1])
			b.wantVersion(t, nil, there)
		}
		b.up(t, nil)
		b.wantVersion(t, nil, migrations.Latest)
	}
	b := setup(t)
	b.up(t, nil)
	b.exec(t, "UPDATE idempotency_migrations SET dirty = true")
	if err := postgres.New(b.pool, nil).Check(t.Context()); !errors.Is(err, postgres.ErrSchemaOutdated) || !strings.Contains(err.Error(), "idemctl migrate up") {
		t.Errorf("Check says %v", err)
	}
}

// If somebody dropped the table of records, or lost the version of one that is there, Up says so
// instead of finding nothing to do or failing in CREATE TABLE, and the SQL in its error mends it.
func TestUpNoticesThatTableAndVersionDoNotFit(t *testing.T) {
	t.Parallel()
	for name, sick := range map[string]string{
		"no table":         "DROP TABLE pay.idempotency_keys",
		"no version":       "DELETE FROM pay.idempotency_migrations",
		"no version table": "DROP TABLE pay.idempotency_migrations",
	} {
		for there := uint(1); there <= migrations.Latest; there++ {
			t.Run(name+" of version "+strconv.Itoa(int(there)), func(t *testing.T) {
				t.Parallel()
				b := setup(t)
				b.schema = "pay"
				b.up(t, nil)
				if err := migrations.DownTo(t.Context(), b.on(b.pool), there, nil); err != nil {
					t.Fatal(err)
				}
				b.exec(t, sick)
				err := migrations.Up(t.Context(), b.on(b.pool), nil)
				if !errors.Is(err, migrations.ErrVersionUntrue) {
					t.Fatalf("got %v, want ErrVersionUntrue", err)
				}
				b.exec(t, strings.Split(err.Error(), "`")[1])
				if name != "no table" {
					b.wantVersion(t, nil, there)
				}
				b.up(t, nil)
				b.wantVersion(t, nil, migrations.Latest)
				if err := postgres.New(b.pool, &postgres.Options{Schema: "pay"}).Check(t.Context()); errors.Is(err, postgres.ErrSchemaOutdated) {
					t.Errorf("after the remedy: %v", err)
				}
			})
		}
	}
}
