package faults_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/internal/pgserver"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

const bouncerConnections = 8 // to the server

// With Wait no duplicate gets 409: it waits, and claims through PgBouncer again and again.
func TestF31PgBouncerInTransactionModeIsAsWithoutIt(t *testing.T) {
	t.Parallel()
	for name, mode := range bouncerModes {
		for _, wait := range []time.Duration{0, awaitMax} {
			t.Run(fmt.Sprint(name, ", wait ", wait), func(t *testing.T) {
				t.Parallel()
				const keys, duplicates, clients = 100, 3, 6
				b := startBouncer(t, nil)
				options := &middleware.Options{Wait: wait}
				// Two processes that wait for each other's attempts.
				services := []*service{b.serve(t, mode, options), b.serve(t, mode, options)}
				// All duplicates of a key are sent at once: clients*duplicates requests share eight
				// connections.
				work := make(chan string)
				var clientsDone sync.WaitGroup
				for range clients {
					clientsDone.Go(func() {
						for key := range work {
							payDuplicates(t, services, key, duplicates, wait == 0)
						}
					})
				}
				for n := range keys {
					work <- fmt.Sprintf("key-%d", n)
				}
				close(work)
				clientsDone.Wait()
				if paid := count(t, b.direct, "SELECT count(*) FROM payments"); paid != keys {
					t.Errorf("%d payments of %d keys", paid, keys)
				}
				const parted = "SELECT count(*) FROM payments FULL JOIN idempotency_keys USING (key) WHERE payments.id IS NULL OR scope IS NULL"
				if n := count(t, b.direct, parted); n != 0 {
					t.Errorf("%d payments without a record or records without a payment", n)
				}
				b.settingsAreUntouched(t)
			})
		}
	}
}

// payDuplicates sends a key several times at once, to the services in turn, each until its final
// answer: one executed, the others replayed. If busy is false none may get in-progress.
func payDuplicates(t *testing.T, services []*service, key string, duplicates int, busy bool) {
	replies := make([]reply, duplicates)
	var sent sync.WaitGroup
	for i := range replies {
		sent.Go(func() {
			for begin := time.Now(); time.Since(begin) < awaitMax; time.Sleep(time.Millisecond) {
				got, err := services[i%len(services)].pay(key)
				replies[i] = got
				if err != nil || !busy || !got.is(409, "in-progress") {
					if err != nil {
						t.Errorf("%s: %v", key, err)
					}
					return
				}
			}
		})
	}
	sent.Wait()
	executed := 0
	for _, got := range replies {
		if got.is(201, "executed") {
			executed++
		} else if !got.is(201, "replayed") {
			t.Errorf("%s: %v", key, got)
		}
		if got.body != replies[0].body {
			t.Errorf("%s: two answers, %s and %s", key, got.body, replies[0].body)
		}
	}
	if executed != 1 {
		t.Errorf("%s was executed %d times", key, executed)
	}
}

// If a server is gone in the middle of a COMMIT, PgBouncer reports FATAL 08P01, without an
// untranslated severity. It knows no more than we do, and the store looks the outcome up.
func TestF31PgBouncerLosesItsServerInCommit(t *testing.T) {
	t.Parallel()
	for name, mode := range bouncerModes {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := startBouncer(t, func(commit pgfault.Commit) pgfault.Fault {
				switch {
				case bytes.Contains(commit.Messages, []byte("arrives")) && bytes.Contains(commit.Messages, []byte("INSERT INTO")):
					return pgfault.Fault{Kind: pgfault.CutAfter}
				case bytes.Contains(commit.Messages, []byte("is-cut")) && bytes.Contains(commit.Messages, []byte("INSERT INTO")):
					return pgfault.Fault{Kind: pgfault.CutBefore}
				}
				return pgfault.Fault{}
			})
			seen := &commitErrors{}
			s := b.serve(t, mode, &middleware.Options{Tracer: seen})

			s.mustPay(t, "arrives", 201, "executed")
			s.mustPay(t, "arrives", 201, "replayed")
			if pgErr := seen.last(t); pgErr.Code != "08P01" || pgErr.SeverityUnlocalized != "" {
				t.Errorf("COMMIT failed with %q, severity %q (%q): not PgBouncer's own error",
					pgErr.Code, pgErr.SeverityUnlocalized, pgErr.Severity)
			}
			s.mustPay(t, "is-cut", 503, "not-executed")
			if pgErr := seen.last(t); pgErr.Code != "08P01" || pgErr.SeverityUnlocalized != "" {
				t.Errorf("COMMIT failed with %q, severity %q", pgErr.Code, pgErr.SeverityUnlocalized)
			}
			if payments, records := s.payments(t, "is-cut"), s.records(t, "is-cut"); payments != 0 || records != 0 {
				t.Errorf("not executed, and %d payments and %d records", payments, records)
			}
			s.onePayment(t, "arrives")
			if hits := b.proxy.Hits(); hits[pgfault.CutAfter] != 1 || hits[pgfault.CutBefore] != 1 {
				t.Errorf("faults: %v", hits)
			}
		})
	}
}

var bouncerModes = map[string]pgx.QueryExecMode{
	"exec": pgx.QueryExecModeExec, "cache_describe": pgx.QueryExecModeCacheDescribe,
}

// commitErrors keeps the error of the last COMMIT.
type commitErrors struct {
	mu  sync.Mutex
	err error
}

func (c *commitErrors) TraceRequestStart(ctx context.Context, _ idempotency.RequestStart) context.Context {
	return ctx
}

func (c *commitErrors) TraceStep(_ context.Context, step idempotency.StepEnd) {
	if step.Step == idempotency.StepCommit {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.err = step.Err
	}
}

func (c *commitErrors) TraceRequestEnd(context.Context, idempotency.RequestEnd) {}
func (c *commitErrors) TraceRefused(context.Context, idempotency.Refused)       {}

func (c *commitErrors) last(t *testing.T) *pgconn.PgError {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	var pgErr *pgconn.PgError
	if !errors.As(c.err, &pgErr) {
		t.Fatalf("the last COMMIT's error is %v", c.err)
	}
	return pgErr
}

// bouncer is a PgBouncer in transaction mode, with a proxy between it and the test's own database.
type bouncer struct {
	proxy  *pgfault.Proxy
	url    string // through PgBouncer
	direct string // around it
}

func startBouncer(t *testing.T, onCommit func(pgfault.Commit) pgfault.Fault) *bouncer {
	t.Helper()
	b := startBouncerIn(t, "pool_mode = transaction", bouncerConnections, onCommit)
	migrateUp(t, b.direct)
	return b
}

// startBouncerIn starts a PgBouncer with these settings, in front of an empty database.
func startBouncerIn(t *testing.T, settings string, connections int, onCommit func(pgfault.Commit) pgfault.Fault) *bouncer {
	t.Helper()
	program, err := exec.LookPath("pgbouncer")
	if err != nil {
		program, err = exec.LookPath("/usr/sbin/pgbouncer")
	}
	if err != nil {
		need(t, "there is no pgbouncer", "apt-get install pgbouncer")
	}
	server := pgtest.Server(t)
	b := &bouncer{direct: pgtest.Database(t)}
	network, address, err := pgfault.Upstream(b.direct)
	if err != nil {
		t.Fatal(err)
	}
	b.proxy, err = pgfault.Start(pgfault.Options{Network: network, Address: address, OnCommit: onCommit})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.proxy.Close() })
	upstream, err := url.Parse(b.proxy.URL(b.direct))
	if err != nil {
		t.Fatal(err)
	}

	dir := pgtest.Folder(t)
	config := fmt.Sprintf(`[databases]
* = host=%s port=%s user=postgres
[pgbouncer]
%s
default_pool_size = %d
max_client_conn = 200
auth_type = any
listen_addr =
listen_port = 6432
unix_socket_dir = %s
`, upstream.Hostname(), upstream.Port(), settings, connections, dir)
	file := filepath.Join(dir, "pgbouncer.ini")
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	startProgram(t, asAccountOf(t, server, dir, exec.Command(program, file)))
	query := url.Values{"host": {dir}, "port": {"6432"}, "sslmode": {"disable"}}
	b.url = "postgres://postgres@" + upstream.Path + "?" + query.Encode()
	await(t, b.url+"&default_query_exec_mode=simple_protocol", "pgbouncer answers", "true")
	return b
}

// serve starts a service with connections that lead through PgBouncer. Its payments are counted on
// direct connections.
func (b *bouncer) serve(t *testing.T, mode pgx.QueryExecMode, opts *middleware.Options) *service {
	t.Helper()
	return serveOn(t, b.direct, &serviceOptions{
		store:      &postgres.Options{TransactionPooling: true, AcquireTimeout: 5 * time.Second},
		middleware: opts,
		pool: func(config *pgxpool.Config) {
			config.MaxConns = 2 * bouncerConnections
			config.ConnConfig.DefaultQueryExecMode = mode
			config.ConnConfig.DialFunc = func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx, b.url) }
		},
	})
}

// settingsAreUntouched checks each server connection as another client would get it: the settings
// of a claim ended with its transaction.
func (b *bouncer) settingsAreUntouched(t *testing.T) {
	t.Helper()
	const settings = `SELECT string_agg(name || '=' || setting, ' ' ORDER BY name) FROM pg_settings WHERE name IN
		('synchronous_commit', 'statement_timeout', 'lock_timeout', 'idle_in_transaction_session_timeout', 'transaction_isolation', 'search_path')`
	var want string
	query(t, b.direct, &want, settings)
	pids := map[uint32]bool{}
	for range bouncerConnections { // all held at once
		conn, err := pgx.Connect(t.Context(), b.url+"&default_query_exec_mode=exec")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(context.WithoutCancel(t.Context()))
		tx, err := conn.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var pid uint32
		var got string
		if err := tx.QueryRow(t.Context(), "SELECT pg_backend_pid(), ("+settings+")").Scan(&pid, &got); err != nil {
			t.Fatal(err)
		}
		if pids[pid] = true; got != want {
			t.Errorf("another client finds %s, want %s", got, want)
		}
	}
	if len(pids) != bouncerConnections {
		t.Errorf("looked at %d connections, want %d", len(pids), bouncerConnections)
	}
}

// asAccountOf makes cmd run in dir with the account of the server, which must not be root. dir will
// belong to that account.
func asAccountOf(t *testing.T, server *pgserver.Server, dir string, cmd *exec.Cmd) *exec.Cmd {
	t.Helper()
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		return cmd
	}
	info, err := os.Stat(fmt.Sprintf("/proc/%d", server.PID()))
	if err != nil {
		t.Fatal(err)
	}
	owner := info.Sys().(*syscall.Stat_t)
	if err := os.Chown(dir, int(owner.Uid), int(owner.Gid)); err != nil {
		t.Fatal(err)
	}
	cmd.SysProcAttr.Credential = &syscall.Credential{Uid: owner.Uid, Gid: owner.Gid}
	return cmd
}

// startProgram runs cmd until the test ends. Its output is shown if the test failed.
func startProgram(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	started, ended := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread() // the kernel ends it with the thread that forked it
		defer runtime.UnlockOSThread()
		defer close(ended)
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // fails when it is gone
		<-ended
		if t.Failed() {
			t.Logf("%s:\n%s", cmd.Path, output.String())
		}
	})
}

// A migration sets search_path, timeouts and a lock for its session. A pooler that shares server
// connections would pass them on to other clients: Up detects it before it changes anything.
func TestF31MigrationThroughAPoolerThatHandsConnectionsOnIsRefused(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		settings    string
		connections int
		others      int // clients that use the pooler meanwhile
	}{
		"transaction mode":                   {"pool_mode = transaction", 8, 0},
		"transaction mode, beside others":    {"pool_mode = transaction", 8, 6},
		"transaction mode, round robin":      {"pool_mode = transaction\nserver_round_robin = 1", 8, 3},
		"transaction mode, one connection":   {"pool_mode = transaction", 1, 0},
		"transaction mode, settings ignored": {"pool_mode = transaction\nignore_startup_parameters = search_path,lock_timeout,statement_timeout", 8, 0},
		"statement mode":                     {"pool_mode = statement", 8, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := startBouncerIn(t, test.settings, test.connections, nil)
			stop := b.busy(t, test.others)
			pool := b.open(t)
			for call, migrate := range map[string]func(context.Context, migrations.Store, *migrations.Options) error{"Up": migrations.Up, "Down": migrations.Down} {
				err := migrate(t.Context(), postgres.New(pool, &postgres.Options{Schema: "payments"}), nil)
				if !errors.Is(err, migrations.ErrPoolerInBetween) || !strings.Contains(err.Error(), "connect to PostgreSQL itself") {
					t.Errorf("%s: %v; want ErrPoolerInBetween, and what to do", call, err)
				}
			}
			if version, err := migrations.Version(t.Context(), postgres.New(pool, &postgres.Options{Schema: "payments"}), nil); version != 0 || err != nil {
				t.Errorf("a look at the version, which holds nothing: %d, %v", version, err)
			}
			stop()
			if n := count(t, b.direct, "SELECT count(*) FROM pg_namespace WHERE nspname = 'payments'"); n != 0 {
				t.Error("the schema was made")
			}
			b.nothingIsLeft(t, test.connections)

			// The remedy.
			direct, err := pgxpool.New(t.Context(), b.direct)
			if err != nil {
				t.Fatal(err)
			}
			defer direct.Close()
			if err := migrations.Up(t.Context(), postgres.New(direct, &postgres.Options{Schema: "payments"}), nil); err != nil {
				t.Errorf("on PostgreSQL itself: %v", err)
			}
		})
	}
}

// In session mode a client has a server connection to itself. It is reset before the next client
// gets it, by us if not by the pooler. A plain proxy is no pooler.
func TestF31MigrationThroughAPoolerInSessionMode(t *testing.T) {
	t.Parallel()
	for name, settings := range map[string]string{"as it comes": "", "which resets nothing": "\nserver_reset_query ="} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const connections = 8
			b := startBouncerIn(t, "pool_mode = session"+settings, connections, nil)
			stop := b.busy(t, 3)
			pool := b.open(t)
			for range 3 {
				if err := migrations.Up(t.Context(), postgres.New(pool, &postgres.Options{Schema: "payments"}), nil); err != nil {
					t.Error(err)
				}
			}
			stop()
			b.nothingIsLeft(t, connections)
			proxied, err := pgxpool.New(t.Context(), b.proxy.URL(b.direct))
			if err != nil {
				t.Fatal(err)
			}
			defer proxied.Close()
			if err := migrations.Down(t.Context(), postgres.New(proxied, &postgres.Options{Schema: "payments"}), nil); err != nil {
				t.Errorf("through a proxy: %v", err)
			}
		})
	}
}

func (b *bouncer) open(t *testing.T) *pgxpool.Pool {
	t.Helper()
	pool, err := pgxpool.New(t.Context(), b.url+"&default_query_exec_mode=exec")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return pool
}

// busy lets clients use the pooler until stop is called.
func (b *bouncer) busy(t *testing.T, clients int) (stop func()) {
	t.Helper()
	// No context is canceled: that could make PgBouncer cancel another client's statement.
	var stopped atomic.Bool
	var running sync.WaitGroup
	for range clients {
		conn, err := pgx.Connect(t.Context(), b.url+"&default_query_exec_mode=exec")
		if err != nil {
			t.Fatal(err)
		}
		running.Go(func() {
			defer func() { _ = conn.Close(context.Background()) }()
			for !stopped.Load() {
				if _, err := conn.Exec(context.Background(), "SELECT pg_sleep(0.001)"); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	stop = sync.OnceFunc(func() { stopped.Store(true); running.Wait() })
	t.Cleanup(stop)
	return stop
}

// nothingIsLeft checks server connections as other clients get them, and all locks.
func (b *bouncer) nothingIsLeft(t *testing.T, connections int) {
	t.Helper()
	const settings = `SELECT string_agg(name || '=' || setting, ' ' ORDER BY name) FROM pg_settings WHERE name IN
		('statement_timeout', 'lock_timeout', 'idle_in_transaction_session_timeout', 'search_path')`
	var want string
	query(t, b.direct, &want, settings)
	for range connections {
		conn, err := pgx.Connect(t.Context(), b.url+"&default_query_exec_mode=simple_protocol")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(context.WithoutCancel(t.Context()))
		var got string
		if err := conn.QueryRow(t.Context(), settings).Scan(&got); err != nil {
			t.Fatal(err)
		}
		if got != want {
			t.Errorf("another client finds %s, want %s", got, want)
		}
	}
	if n := count(t, b.direct, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"); n != 0 {
		t.Errorf("%d advisory locks are left", n)
	}
}
