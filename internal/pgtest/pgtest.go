// Package pgtest gives every test a PostgreSQL database of its own.
//
// A package's tests share one PostgreSQL server. The first test that needs it starts it:
//
//	func TestMain(m *testing.M) { pgtest.Main(m) }
//
//	func TestX(t *testing.T) {
//		t.Parallel()
//		url := pgtest.Database(t)
//	}
package pgtest

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"net/url"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/goleak"

	"github.com/paidonce/idempotency/internal/pgserver"
)

const (
	// databaseVariable names a server to use instead of starting one. Its user must be able to
	// create databases.
	databaseVariable = "PAIDONCE_TEST_DATABASE_URL"

	maxConnections = "300"
	startMax       = 2 * time.Minute // a download included
	parallelMin    = 6
	statementMax   = 30 * time.Second
)

// shared is the one cluster of this test binary. A testing.TB has no place for it.
var shared cluster

// Main runs a package's tests, stops the server if a test started it, and exits. It fails if
// goroutines are left that the options don't ignore. With -short at least 6 tests run in parallel,
// unless -parallel is set.
func Main(m *testing.M, leaks ...goleak.Option) { os.Exit(run(m, leaks)) }

func run(m *testing.M, leaks []goleak.Option) (code int) {
	flag.Parse()
	if testing.Short() {
		raiseParallel()
	}
	shared.open()
	code = m.Run()
	if err := shared.close(); err != nil {
		fmt.Fprintln(os.Stderr, "pgtest:", err)
		code = max(code, 1)
	}
	if code != 0 || fuzzing() {
		return code // a failed test leaves goroutines, and the fuzzing engine has its own
	}
	if err := goleak.Find(leaks...); err != nil {
		fmt.Fprintln(os.Stderr, "pgtest:", err)
		return 1
	}
	return code
}

// raiseParallel raises -parallel to parallelMin, unless it is given. Most tests wait for a lock, a
// timeout or a database, and with its default, one test per processor, the processors wait too.
func raiseParallel() {
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "test.parallel" })
	if given || runtime.GOMAXPROCS(0) >= parallelMin {
		return
	}
	if err := flag.Set("test.parallel", strconv.Itoa(parallelMin)); err != nil {
		panic(err) // a test binary has the flag
	}
}

func fuzzing() bool {
	f := flag.Lookup("test.fuzz")
	return f != nil && f.Value.String() != ""
}

// Database creates an empty database and returns its URL. The database and its conns are dropped
// when the test ends. It is safe for parallel tests.
func Database(t testing.TB) string {
	t.Helper()
	return shared.start(t).database(t, "")
}

// Copy is Database for many tests that begin with the same tables. The first call with a name makes
// prepare create them, in a database that every call copies: a copy takes as long as an empty
// database. prepare must close its conns. If it fails, all calls fail with its error.
func Copy(t testing.TB, name string, prepare func(databaseURL string) error) string {
	t.Helper()
	c := shared.start(t)
	template, err := c.template(name, prepare)
	if err != nil {
		t.Fatalf("pgtest: template %q: %v", name, err)
	}
	return c.database(t, template)
}

// database creates a database for a test, as a copy of the template if one is named.
func (c *cluster) database(t testing.TB, template string) string {
	t.Helper()
	name, err := c.create(template)
	if err != nil {
		t.Fatalf("create database: %v", err)
	}
	t.Cleanup(func() {
		if err := c.drop(name); err != nil {
			t.Errorf("drop database: %v", err)
		}
	})
	return c.address(name)
}

func (c *cluster) create(template string) (name string, err error) {
	name = "test_" + strings.ReplaceAll(uuid.NewString(), "-", "")
	create := "CREATE DATABASE " + name
	if template != "" {
		create += " TEMPLATE " + template
	}
	if c.versionNumber >= 150000 {
		create += " STRATEGY FILE_COPY" // the only strategy of 14
	}
	return name, execute(c.adminURL, create)
}

func (c *cluster) drop(name string) error {
	return execute(c.adminURL, "DROP DATABASE IF EXISTS "+name+" WITH (FORCE)")
}

// address returns the URL of a database.
func (c *cluster) address(name string) string {
	address := *c.admin
	address.Path = "/" + name
	return address.String()
}

// template returns the name of the database that Copy copies.
func (c *cluster) template(name string, prepare func(databaseURL string) error) (string, error) {
	c.mu.Lock()
	template, made := c.templates[name]
	if !made {
		template = sync.OnceValues(func() (string, error) {
			database, err := c.create("")
			if err != nil {
				return "", err
			}
			return database, prepare(c.address(database))
		})
		if c.templates == nil {
			c.templates = map[string]func() (string, error){}
		}
		c.templates[name] = template
	}
	c.mu.Unlock()
	return template()
}

// Server returns the server that the tests share. A test that needs to stop or kill PostgreSQL must
// start its own with pgserver.Start instead. The test is skipped if PAIDONCE_TEST_DATABASE_URL
// names a server that we did not start.
func Server(t testing.TB) *pgserver.Server {
	t.Helper()
	server := shared.start(t).server
	if server == nil {
		t.Skipf("%s is set, so there is no server of our own", databaseVariable)
	}
	return server
}

// TLS starts a server for this test that accepts clients over TLS with SCRAM-SHA-256: see
// [pgserver.Options].TLS. It ends with the test. The test is skipped if PAIDONCE_TEST_DATABASE_URL
// names another server.
func TLS(t testing.TB) *pgserver.Server {
	t.Helper()
	Slow(t, "starts a server of its own, for TLS")
	if os.Getenv(databaseVariable) != "" {
		t.Skipf("%s is set, so no server of our own is started", databaseVariable)
	}
	ctx, cancel := context.WithTimeout(context.Background(), startMax)
	defer cancel()
	server, err := pgserver.Start(ctx, &pgserver.Options{TLS: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Errorf("stop: %v", err)
		}
	})
	return server
}

// Slow skips a test under -short. why completes the sentence "This test takes seconds: it ...".
func Slow(t testing.TB, why string) {
	t.Helper()
	if testing.Short() {
		t.Skipf("left out by -short, because it %s", why)
	}
}

// Folder returns a temporary folder for pgserver's DataDir. Unlike t.TempDir, PostgreSQL's account
// may enter it when the tests run as root.
func Folder(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "paidonce-test-")
	if err != nil {
		t.Fatalf("make folder: %v", err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("remove folder: %v", err)
		}
	})
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatalf("make folder: %v", err)
	}
	return dir
}

// Pool opens a pool on a database, with the given settings for its sessions. It is closed when the
// test ends.
func Pool(t testing.TB, databaseURL string, settings map[string]string) *pgxpool.Pool {
	t.Helper()
	config, err := pgxpool.ParseConfig(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	maps.Copy(config.ConnConfig.RuntimeParams, settings)
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatalf("open pool: %v", err)
	}
	t.Cleanup(pool.Close)
	return pool
}

type cluster struct {
	mu       sync.Mutex
	opened   bool
	started  bool
	err      error
	adminURL string
	admin    *url.URL         // adminURL
	server   *pgserver.Server // nil if the server is not ours

	versionNumber int // such as 140023

	templates map[string]func() (database string, err error) // by the name that Copy got
}

func (c *cluster) open() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.opened = true
}

// start returns the running cluster. The first call starts it; if it fails, all calls fail with its
// error.
func (c *cluster) start(t testing.TB) *cluster {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.opened {
		t.Fatal("pgtest is not running: TestMain must call pgtest.Main")
	}
	if !c.started {
		c.started = true
		c.err = c.startOnce()
	}
	if c.err != nil {
		t.Fatalf("pgtest: %v", c.err)
	}
	return c
}

func (c *cluster) startOnce() error {
	if c.adminURL = os.Getenv(databaseVariable); c.adminURL != "" {
		if err := c.connect(databaseVariable); err != nil {
			return fmt.Errorf("%s: %w", databaseVariable, err)
		}
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), startMax)
	defer cancel()
	tempDir := ""
	if testing.Short() {
		// A database is 300 files, and ext4 is slow to make files where others were just removed: a third
		// of storage/postgres' CPU. Without -short the tests write to a disk, as a service does.
		tempDir = memory()
	}
	server, err := pgserver.Start(ctx, &pgserver.Options{
		TempDir: tempDir,
		Settings: map[string]string{
			// The machine does not crash in a test; PostgreSQL may.
			"fsync":              "off",
			"full_page_writes":   "off",
			"synchronous_commit": "on",
			"max_connections":    maxConnections,
		},
		Progress: os.Stderr,
	})
	if err != nil {
		return err
	}
	c.server, c.adminURL = server, server.URL()
	return c.connect("its own")
}

func (c *cluster) close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.opened = false
	if c.server != nil {
		return c.server.Stop()
	}
	var errs []error
	for _, template := range c.templates {
		if name, _ := template(); name != "" { // a test has reported the error
			errs = append(errs, c.drop(name))
		}
	}
	return errors.Join(errs...)
}

// connect asks the server for its version and prints it.
func (c *cluster) connect(server string) (err error) {
	if c.admin, err = url.Parse(c.adminURL); err != nil {
		return err
	}
	return withConnection(c.adminURL, func(ctx context.Context, conn *pgx.Conn) error {
		var version string
		const ask = "SELECT current_setting('server_version'), current_setting('server_version_num')::int"
		if err := conn.QueryRow(ctx, ask).Scan(&version, &c.versionNumber); err != nil {
			return err
		}
		fmt.Fprintf(os.Stderr, "pgtest: PostgreSQL %s (%s)\n", version, server)
		return nil
	})
}

func execute(databaseURL, statement string) error {
	return withConnection(databaseURL, func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, statement)
		return err
	})
}

// withConnection calls f with a conn of its own. CREATE DATABASE needs no pool, and a pool would
// live as long as the tests.
func withConnection(databaseURL string, f func(context.Context, *pgx.Conn) error) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), statementMax)
	defer cancel()
	conn, err := pgx.Connect(ctx, databaseURL)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conn.Close(ctx)) }()
	return f(ctx, conn)
}
