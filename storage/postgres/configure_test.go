package postgres_test

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgconn/ctxwatch"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgserver"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// With channel_binding=require the store can connect, and all of its features work on such
// connections.
func TestConfigureKeepsChannelBinding(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	server := pgtest.TLS(t)
	b := setup(t, &setupOptions{database: server.TLSURL("postgres") + "&channel_binding=require"})
	run := func(key string, status int) idempotency.Result { return b.do(t, request(key, ""), pay(t, status)) }
	if err := b.store.Check(ctx); err != nil {
		t.Error(err)
	}
	want(t, run("paid", 201), idempotency.OutcomeExecuted, "")
	want(t, run("paid", 201), idempotency.OutcomeReplayed, "")
	want(t, run("declined", 402), idempotency.OutcomeExecuted, "")
	want(t, run("failed", 500), idempotency.OutcomeNotExecuted, "")
	if n := b.effects(t); n != 1 {
		t.Errorf("%d effects, want 1", n)
	}
	if found := b.resolve(ctx, "paid"); found.err != nil || found.record == nil {
		t.Errorf("the resolver's fresh connection: %v, %v", found.record, found.err)
	}
	b.resolve(ctx, "failed").wantAbsent(t)
	if _, err := b.store.DeleteExpired(ctx); err != nil {
		t.Errorf("reaper: %v", err)
	}
	for _, finding := range operator.New(b.store, nil).Doctor(ctx) {
		if finding.Level == operator.LevelFail {
			t.Errorf("doctor: %s: %s", finding.Check, finding.What)
		}
	}
	if n := b.count(t, "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE datname = current_database() AND NOT ssl"); n != 0 {
		t.Errorf("%d connections without TLS", n)
	}
}

// By default a client binds if it can. Only then does the server notice a man in the middle who
// ends the TLS connection and opens another, if the client does not verify certificates.
func TestChannelBindingIsNotGivenUp(t *testing.T) {
	t.Parallel()
	server := pgtest.TLS(t)
	between := manInTheMiddle(t, server)
	for name, c := range map[string]struct {
		binding string
		refused bool
	}{
		"prefer":  {"", true},
		"require": {"&channel_binding=require", true},
		"disable": {"&channel_binding=disable", false}, // shows that the man in the middle works
	} {
		for _, configured := range []bool{false, true} {
			config, err := pgxpool.ParseConfig(between + c.binding)
			if err != nil {
				t.Fatal(err)
			}
			if configured {
				postgres.Configure(config, nil)
			}
			err = ping(t, config)
			var refused *pgconn.PgError
			if errors.As(err, &refused) != c.refused || c.refused && refused.Code != "28000" || !c.refused && err != nil {
				t.Errorf("%s, configured %v: %v", name, configured, err)
			}
			if !configured {
				continue
			}
			// The resolver connects by itself, with the pool's config.
			pool, err := pgxpool.NewWithConfig(t.Context(), config)
			if err != nil {
				t.Fatal(err)
			}
			for range 10 { // the last try may run out of time
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				_, err = postgres.New(pool, nil).Resolve(ctx, claimOf(request("k", "")))
				cancel()
				if !errors.Is(err, context.DeadlineExceeded) {
					break
				}
			}
			pool.Close()
			if bound := errors.As(err, &refused) && refused.Code == "28000"; bound != c.refused {
				t.Errorf("%s, resolver: %v", name, err)
			}
		}
	}
}

func ping(t *testing.T, config *pgxpool.Config) error {
	t.Helper()
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	return pool.Ping(t.Context())
}

// manInTheMiddle ends TLS with its own certificate and opens another connection to the server. It
// returns the address for a client that verifies nothing.
func manInTheMiddle(t *testing.T, server *pgserver.Server) string {
	t.Helper()
	unused := httptest.NewTLSServer(nil) // for its certificate
	defer unused.Close()
	own := &tls.Config{Certificates: unused.TLS.Certificates}
	upstream, err := pgconn.ParseConfig(server.TLSURL("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	t.Cleanup(func() { _ = listener.Close(); running.Wait() })
	running.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			_, address := pgconn.NetworkAddress(upstream.Host, upstream.Port)
			running.Go(func() { forwardTLS(client, own, address) })
		}
	})
	return "postgres://" + upstream.User + ":" + upstream.Password + "@" + listener.Addr().String() + "/postgres?sslmode=require"
}

// forwardTLS serves one connection of a man in the middle.
func forwardTLS(client net.Conn, own *tls.Config, address string) {
	defer client.Close()
	server, err := net.Dial("tcp", address)
	if err != nil {
		return
	}
	defer server.Close()
	ask := make([]byte, 8) // SSLRequest
	if _, err := io.ReadFull(client, ask); err != nil {
		return
	}
	if _, err := server.Write(ask); err != nil {
		return
	}
	if _, err := io.ReadFull(server, ask[:1]); err != nil {
		return
	}
	if _, err := client.Write(ask[:1]); err != nil {
		return
	}
	in, out := tls.Server(client, own), tls.Client(server, &tls.Config{InsecureSkipVerify: true})
	var both sync.WaitGroup
	both.Go(func() { _, _ = io.Copy(out, in); _ = out.Close() })
	both.Go(func() { _, _ = io.Copy(in, out); _ = in.Close() })
	both.Wait()
}

// The hooks in a service's pool config are still called, with the same arguments as before.
func TestConfigureKeepsTheServicesHooks(t *testing.T) {
	t.Parallel()
	server := pgtest.TLS(t)
	var mu sync.Mutex
	called := map[string]int{}
	note := func(name string) {
		mu.Lock()
		defer mu.Unlock()
		called[name]++
	}
	b := setup(t, &setupOptions{database: server.TLSURL("postgres") + "&channel_binding=require", before: func(c *pgxpool.Config) {
		dial, look, build, watch := c.ConnConfig.DialFunc, c.ConnConfig.LookupFunc, c.ConnConfig.BuildFrontend, c.ConnConfig.BuildContextWatcherHandler
		c.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
			note("DialFunc")
			return dial(ctx, network, address)
		}
		c.ConnConfig.LookupFunc = func(ctx context.Context, host string) ([]string, error) { note("LookupFunc"); return look(ctx, host) }
		c.ConnConfig.AfterNetConnect = func(_ context.Context, _ *pgconn.Config, conn net.Conn) (net.Conn, error) {
			if _, ok := conn.(*tls.Conn); !ok {
				t.Errorf("AfterNetConnect got a %T, want the TLS connection", conn)
			}
			note("AfterNetConnect")
			return conn, nil
		}
		c.ConnConfig.BuildFrontend = func(r io.Reader, w io.Writer) *pgproto3.Frontend { note("BuildFrontend"); return build(r, w) }
		c.ConnConfig.BuildContextWatcherHandler = func(conn *pgconn.PgConn) ctxwatch.Handler { note("BuildContextWatcherHandler"); return watch(conn) }
		c.ConnConfig.ValidateConnect = func(_ context.Context, conn *pgconn.PgConn) error {
			note("ValidateConnect")
			if _, ok := conn.Conn().(*tls.Conn); !ok {
				t.Errorf("the connection is a %T, want the TLS connection", conn.Conn())
			}
			return nil
		}
		c.ConnConfig.OnNotice = func(*pgconn.PgConn, *pgconn.Notice) { note("OnNotice") }
		c.ConnConfig.OnNotification = func(*pgconn.PgConn, *pgconn.Notification) { note("OnNotification") }
		c.ConnConfig.OnPgError = func(_ *pgconn.PgConn, err *pgconn.PgError) bool { note("OnPgError"); return err.Severity != "FATAL" }
		c.ConnConfig.Tracer = hookTracer(note)
		c.BeforeConnect = func(context.Context, *pgx.ConnConfig) error { note("BeforeConnect"); return nil }
		c.AfterConnect = func(context.Context, *pgx.Conn) error { note("AfterConnect"); return nil }
		c.PrepareConn = func(context.Context, *pgx.Conn) (bool, error) { note("PrepareConn"); return true, nil }
		c.AfterRelease = func(*pgx.Conn) bool { note("AfterRelease"); return true }
		c.BeforeClose = func(*pgx.Conn) { note("BeforeClose") }
		c.ConnConfig.RuntimeParams["application_name"] = "the service's"
	}})
	want(t, b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
		if _, err := tx.Exec(ctx, "DO $$ BEGIN RAISE NOTICE 'seen'; END $$"); err != nil {
			t.Error(err)
		}
		var name string
		if err := tx.QueryRow(ctx, "SELECT current_setting('application_name')").Scan(&name); err != nil || name != "the service's" {
			t.Errorf("application_name %q, %v", name, err)
		}
		nested, err := tx.Begin(ctx)
		if err != nil {
			t.Error(err)
			return 500
		}
		if _, err := nested.Exec(ctx, "SELECT 1/0"); err == nil {
			t.Error("a division by zero succeeded")
		}
		if err := nested.Rollback(ctx); err != nil {
			t.Error(err)
		}
		if _, err := tx.Exec(ctx, "SELECT pg_notify('news', '')"); err != nil {
			t.Error(err)
		}
		return 201
	}), idempotency.OutcomeExecuted, "")
	conn, err := b.pool.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, sql := range []string{"LISTEN news", "SELECT pg_notify('news', '')"} {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Error(err)
		}
	}
	conn.Release()
	all := func() {
		mu.Lock()
		defer mu.Unlock()
		for _, name := range strings.Fields("DialFunc LookupFunc AfterNetConnect BuildFrontend BuildContextWatcherHandler ValidateConnect OnNotice " +
			"OnNotification OnPgError BeforeConnect AfterConnect PrepareConn AfterRelease TraceConnectStart TraceQueryStart TraceAcquireStart TraceRelease") {
			if called[name] == 0 {
				t.Errorf("%s was not called", name)
			}
		}
		called = map[string]int{}
	}
	all()
	if found := b.resolve(t.Context(), "k"); found.err != nil || found.record == nil {
		t.Errorf("resolve: %v, %v", found.record, found.err)
	}
	mu.Lock()
	defer mu.Unlock()
	for _, name := range strings.Fields("DialFunc LookupFunc AfterNetConnect BuildFrontend ValidateConnect BeforeConnect AfterConnect PrepareConn TraceConnectStart") {
		if called[name] == 0 {
			t.Errorf("the resolver did not call %s", name)
		}
	}
}

// hookTracer notes the calls of pgx's tracers.
type hookTracer func(name string)

func (h hookTracer) TraceConnectStart(ctx context.Context, _ pgx.TraceConnectStartData) context.Context {
	h("TraceConnectStart")
	return ctx
}
func (h hookTracer) TraceConnectEnd(context.Context, pgx.TraceConnectEndData) {}
func (h hookTracer) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	h("TraceQueryStart")
	return ctx
}
func (h hookTracer) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}
func (h hookTracer) TraceAcquireStart(ctx context.Context, _ *pgxpool.Pool, _ pgxpool.TraceAcquireStartData) context.Context {
	h("TraceAcquireStart")
	return ctx
}
func (h hookTracer) TraceAcquireEnd(context.Context, *pgxpool.Pool, pgxpool.TraceAcquireEndData) {}
func (h hookTracer) TraceRelease(*pgxpool.Pool, pgxpool.TraceReleaseData)                        { h("TraceRelease") }

// Work that a handler left for later still has the values of its context, and may use the pool once
// the handler has returned.
func TestPoolIsFreeOnceTheHandlerReturned(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	var later context.Context
	want(t, b.do(t, request("k", ""), func(ctx context.Context, _ pgx.Tx) int {
		later = context.WithoutCancel(ctx)
		return 201
	}), idempotency.OutcomeExecuted, "")
	if _, err := b.pool.Exec(later, "INSERT INTO effects (name) VALUES ('later')"); err != nil {
		t.Error(err)
	}
}

// Pools that reset their sessions drop our prepared statements too, also while many requests run.
func TestPoolThatResetsItsSessionsServes(t *testing.T) {
	t.Parallel()
	for _, sql := range []string{"DISCARD ALL", "DEALLOCATE ALL", "RESET ALL", "SELECT pg_advisory_unlock_all()"} {
		t.Run(sql, func(t *testing.T) {
			t.Parallel()
			b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) {
				c.MaxConns = 8
				c.AfterRelease = func(conn *pgx.Conn) bool {
					_, err := conn.Exec(context.Background(), sql)
					return err == nil
				}
			}})
			for round := range 3 {
				var group sync.WaitGroup
				for i := range 8 {
					group.Go(func() {
						key := fmt.Sprint(round, "-", i)
						for _, outcome := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed} {
							want(t, b.do(t, request(key, ""), func(ctx context.Context, tx pgx.Tx) int {
								// The argument is text in the SQL: pgx's own prepared statements
								// are gone too.
								if _, err := tx.Exec(ctx, "INSERT INTO effects (name) VALUES ('x')"); err != nil {
									t.Error(err)
								}
								return 201
							}), outcome, "")
						}
					})
				}
				group.Wait()
			}
			if n := b.effects(t); n != 24 {
				t.Errorf("%d effects, want 24", n)
			}
		})
	}
}

// A service's enum works as it is. COPY of a composite type needs its codec, which a connection
// gets in AfterConnect: a handler has no connection to load it from.
func TestTypesOfTheServiceAreRegisteredOnConnect(t *testing.T) {
	t.Parallel()
	type price struct {
		Amount   int64
		Currency string
	}
	for registered, status := range map[bool]int{true: 201, false: 422} {
		t.Run(fmt.Sprint("registered ", registered), func(t *testing.T) {
			t.Parallel()
			b := setup(t, &setupOptions{before: func(config *pgxpool.Config) {
				config.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
					if !registered {
						return nil
					}
					one, err := conn.LoadType(ctx, "price")
					if err == nil {
						conn.TypeMap().RegisterType(one)
					}
					var pgErr *pgconn.PgError
					if errors.As(err, &pgErr) { // before it is created
						return nil
					}
					return err
				}
			}})
			b.exec(t, "CREATE TYPE mood AS ENUM ('ok', 'bad'); CREATE TYPE price AS (amount bigint, currency text); CREATE TABLE orders (m mood, p price)")
			b.pool.Reset()
			want(t, b.do(t, request("enum", ""), func(ctx context.Context, tx pgx.Tx) int {
				if _, err := tx.Exec(ctx, "INSERT INTO orders VALUES ($1)", "ok"); err != nil {
					t.Error(err)
				}
				if _, err := tx.CopyFrom(ctx, pgx.Identifier{"orders"}, []string{"m"}, pgx.CopyFromRows([][]any{{"bad"}})); err != nil {
					t.Error(err)
				}
				rows, _ := tx.Query(ctx, "SELECT m FROM orders ORDER BY m") // the collector returns its error
				if moods, err := pgx.CollectRows(rows, pgx.RowTo[string]); err != nil || fmt.Sprint(moods) != "[ok bad]" {
					t.Errorf("%q, %v", moods, err)
				}
				return 201
			}), idempotency.OutcomeExecuted, "")
			result := b.do(t, request("composite", ""), func(ctx context.Context, tx pgx.Tx) int {
				if _, err := tx.CopyFrom(ctx, pgx.Identifier{"orders"}, []string{"p"}, pgx.CopyFromRows([][]any{{price{1250, "EUR"}}})); err != nil {
					return 422
				}
				return 201
			})
			want(t, result, idempotency.OutcomeExecuted, "")
			copied := b.count(t, "SELECT count(*) FROM orders WHERE (p).amount = 1250 AND (p).currency = 'EUR'")
			if result.Answer == nil || result.Answer.Status != status || (copied == 1) != registered {
				t.Errorf("%v, %d rows were copied", result.Answer, copied)
			}
		})
	}
}

func TestConfigureSetsEachConnection(t *testing.T) {
	t.Parallel()
	traced, connected := atomic.Int64{}, atomic.Int64{}
	b := setup(t, &setupOptions{cold: true, configure: func(c *pgxpool.Config) {
		c.ConnConfig.RuntimeParams["lock_timeout"] = "1234"
		c.ConnConfig.RuntimeParams["synchronous_commit"] = "off"
		c.ConnConfig.Tracer = queryTracer(func() { traced.Add(1) })
		c.AfterConnect = func(context.Context, *pgx.Conn) error { connected.Add(1); return nil }
		postgres.Configure(c, &postgres.Options{StatementTimeout: 2 * time.Second})
	}})
	for name, value := range map[string]string{
		"synchronous_commit": "on", "lock_timeout": "1234ms", "statement_timeout": "2s", "idle_in_transaction_session_timeout": "20s",
	} {
		var got string
		if err := b.pool.QueryRow(context.Background(), "SELECT current_setting($1)", name).Scan(&got); err != nil || got != value {
			t.Errorf("%s is %q (%v), want %q", name, got, err, value)
		}
	}
	if traced.Load() == 0 || connected.Load() == 0 {
		t.Error("the hooks that were there before are not called")
	}
}

// A config that goes through Configure twice, with the same options or others, works as if it had
// gone once.
func TestConfigureTwice(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) {
		postgres.Configure(c, &postgres.Options{Isolation: pgx.Serializable})
		postgres.Configure(c, nil)
	}})
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeReplayed, "")
}

type queryTracer func()

func (f queryTracer) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	f()
	return ctx
}

func (queryTracer) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

// Behind a pooler settings come with each claim and go with its transaction.
func TestTransactionPoolingSetsEachTransaction(t *testing.T) {
	t.Parallel()
	opts := &postgres.Options{TransactionPooling: true, LockTimeout: 1500 * time.Millisecond}
	b := setup(t, &setupOptions{store: opts, configure: func(c *pgxpool.Config) {
		c.MaxConns = 1
		c.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeExec
	}})
	setting := func(ctx context.Context, q interface {
		QueryRow(context.Context, string, ...any) pgx.Row
	}) (value string) {
		if err := q.QueryRow(ctx, "SELECT current_setting('lock_timeout')").Scan(&value); err != nil {
			t.Error(err)
		}
		return value
	}
	for _, key := range []string{"k", ""} {
		want(t, b.do(t, request(key, ""), func(ctx context.Context, tx pgx.Tx) int {
			if got := setting(ctx, tx); got != "1500ms" {
				t.Errorf("lock_timeout is %s in the transaction", got)
			}
			return 201
		}), idempotency.OutcomeExecuted, "")
	}
	if got := setting(context.Background(), b.pool); got != "0" {
		t.Errorf("lock_timeout is %s after the transaction", got)
	}
	if n := b.count(t, "SELECT count(*) FROM pg_prepared_statements"); n != 0 {
		t.Errorf("%d statements are prepared", n)
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

// stopper makes a pool's connections behave as if their process had been stopped: once stop reports
// true for the bytes to be written, the rest is never sent, nothing is received, and nothing is
// closed.
type stopper struct {
	mu   sync.Mutex
	stop func(written []byte) (send int, stopped bool) // nil: everything passes
}

func (s *stopper) arm(stop func([]byte) (int, bool)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stop = stop
}

// configure puts the stopper below a pool's connections. Their sockets are closed when the test
// ends.
func (s *stopper) configure(t *testing.T) func(*pgxpool.Config) {
	return func(config *pgxpool.Config) {
		dial := config.ConnConfig.DialFunc
		config.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dial(ctx, network, address)
			if err != nil {
				return nil, err
			}
			t.Cleanup(func() { _ = conn.Close() })
			return &stoppedConn{Conn: conn, stopper: s}, nil
		}
	}
}

type stoppedConn struct {
	net.Conn
	stopper *stopper
	stopped bool // guarded by stopper.mu
}

func (c *stoppedConn) Write(p []byte) (int, error) {
	c.stopper.mu.Lock()
	defer c.stopper.mu.Unlock()
	if c.stopped {
		return len(p), nil
	}
	if c.stopper.stop != nil {
		if send, stopped := c.stopper.stop(p); stopped {
			c.stopped, c.stopper.stop = true, nil
			_, err := c.Conn.Write(p[:send])
			return len(p), err
		}
	}
	return c.Conn.Write(p)
}

func (c *stoppedConn) Close() error {
	c.stopper.mu.Lock()
	defer c.stopper.mu.Unlock()
	if c.stopped {
		return nil
	}
	return c.Conn.Close()
}

// beforeCommit cuts a flush off before the messages of its last statement: Bind, Execute, Sync, and
// a Parse in front of them if it is not prepared.
func beforeCommit(written []byte) (send int, stopped bool) {
	var starts []int
	for at := 0; at+5 <= len(written); at += 1 + int(binary.BigEndian.Uint32(written[at+1:])) {
		starts = append(starts, at)
	}
	last := len(starts) - 3
	if written[starts[last-1]] == 'P' {
		last--
	}
	return starts[last], true
}

func half(written []byte) (send int, stopped bool) { return len(written) / 2, len(written) > 600 }

// A process that is stopped, on a machine that still answers for it, keeps its key until PostgreSQL
// ends the session. Each case names the first version with a timeout that does; if there is none,
// pg_terminate_backend does.
func TestKeyOfAStoppedProcessIsFreed(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "waits until PostgreSQL ends many sessions that are silent")
	const patience = time.Second
	const long = 1 << 16
	record := func(ctx context.Context, attempt idempotency.Attempt, body int) {
		a := answer(201)
		a.Body = []byte(strings.Repeat("x", body))
		_ = attempt.Seal()
		_ = attempt.Commit(ctx, a) // the stopped process never gets the result
	}
	decline := func(ctx context.Context, attempt idempotency.Attempt) {
		a := answer(402)
		a.Body = []byte(strings.Repeat("x", long))
		_ = attempt.Seal()
		_ = attempt.Decline(ctx, a)
	}
	deferNames := func(ctx context.Context, attempt idempotency.Attempt, names ...string) {
		for _, name := range names {
			if err := postgres.DeferExec(attempt.Context(ctx), "INSERT INTO effects (name) VALUES ($1)", name); err != nil {
				t.Error(err)
			}
		}
		record(ctx, attempt, 1)
	}
	type stopped struct {
		stop    func(written []byte) (send int, stopped bool)
		do      func(ctx context.Context, attempt idempotency.Attempt)
		commits bool // or declines
		// The first major version of PostgreSQL with a timeout that ends the session. 0: none.
		since int
	}
	for name, c := range map[string]stopped{
		"in the handler": {nil, func(context.Context, idempotency.Attempt) {}, false, 14},
		"in the middle of a long record": {half, func(ctx context.Context, attempt idempotency.Attempt) {
			record(ctx, attempt, long)
		}, true, 14},
		"in the middle of a long decline": {half, decline, true, 17},
		"in the middle of a long statement of the handler's": {half, func(ctx context.Context, attempt idempotency.Attempt) {
			_, _ = postgres.Tx(attempt.Context(ctx)).Exec(ctx, "INSERT INTO effects (name) VALUES ($1)", strings.Repeat("x", 1<<20))
		}, false, 14},
		"between the record and COMMIT": {beforeCommit, func(ctx context.Context, attempt idempotency.Attempt) {
			record(ctx, attempt, 1)
		}, true, 17},
		"in the middle of a long deferred statement": {half, func(ctx context.Context, attempt idempotency.Attempt) {
			deferNames(ctx, attempt, "x", strings.Repeat("x", long))
		}, true, 14},
		"between deferred statements": {half, func(ctx context.Context, attempt idempotency.Attempt) {
			deferNames(ctx, attempt, strings.Split(strings.Repeat("x", 30), "")...)
		}, true, 17},
		"in the middle of a batch": {half, func(ctx context.Context, attempt idempotency.Attempt) {
			batch := &pgx.Batch{}
			for range 100 {
				batch.Queue("INSERT INTO effects (name) VALUES ('x')")
			}
			_ = postgres.Tx(attempt.Context(ctx)).SendBatch(ctx, batch).Close()
		}, false, 17},
		"in the middle of a copy": {func(written []byte) (int, bool) { return len(written), written[0] == 'd' },
			func(ctx context.Context, attempt idempotency.Attempt) {
				rows := [][]any{}
				for range 100_000 {
					rows = append(rows, []any{"x"})
				}
				_, _ = postgres.Tx(attempt.Context(ctx)).CopyFrom(ctx, pgx.Identifier{"effects"}, []string{"name"}, pgx.CopyFromRows(rows))
			}, false, 0},
	} {
		for _, pooling := range []bool{false, true} { // which also means that nothing is prepared
			if pooling && !c.commits {
				continue // the handler's own statements
			}
			t.Run(name+map[bool]string{true: ", as through a pooler"}[pooling], func(t *testing.T) {
				t.Parallel()
				s := &stopper{}
				b := setup(t, &setupOptions{store: &postgres.Options{IdleInTransactionTimeout: patience, TransactionPooling: pooling}, configure: s.configure(t)})
				other := setupOther(t, b)
				version := other.count(t, "SELECT current_setting('server_version_num')::int / 10000")
				ctx, cancel := context.WithCancel(context.Background())
				attempt, record, err := b.store.Begin(ctx, claimOf(request("k", "")))
				if err != nil || record != nil {
					t.Fatal(record, err)
				}
				pid := postgres.RawConnOf(attempt).PgConn().PID()
				held := func() bool {
					return other.count(t, "SELECT count(*) FROM pg_locks WHERE pid = $1 AND locktype = 'advisory' AND granted", int(pid)) > 0
				}
				if !held() {
					t.Fatal("the key is not held")
				}
				// A decline gives the key up for a moment, so the session's end is the sign.
				open := func() bool {
					return other.count(t, "SELECT count(*) FROM pg_stat_activity WHERE pid = $1", int(pid)) > 0
				}
				s.arm(c.stop)
				done := make(chan struct{})
				began := time.Now()
				go func() {
					defer close(done)
					c.do(ctx, attempt)
					if !c.commits {
						<-ctx.Done()
						_ = attempt.Rollback(context.Background())
					}
				}()
				t.Cleanup(func() { cancel(); <-done })
				bounded := c.since != 0 && version >= c.since
				limit := 5 * patience
				if bounded {
					limit = time.Minute // the machine may be busy
				}
				for open() && time.Since(began) < limit {
					time.Sleep(20 * time.Millisecond)
				}
				switch took := time.Since(began); {
				case bounded && open():
					t.Fatalf("the key is still held after %v: %s", took, other.text(t, "SELECT concat_ws(' ', state, wait_event, query) FROM pg_stat_activity WHERE pid = $1", int(pid)))
				case bounded && took < patience/2:
					t.Errorf("the key was given up after %v", took)
				case !bounded && !open():
					t.Errorf("PostgreSQL %d ended the session after %v: docs/guarantees.md says that it does not", version, took)
				case !bounded:
					other.count(t, "SELECT count(*) FROM (SELECT pg_terminate_backend($1, 10000)) AS ended", int(pid))
				}
				want(t, other.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
				if n := other.effects(t); n != 1 {
					t.Errorf("%d effects, want 1", n)
				}
			})
		}
	}
}

// setupOther returns another service on the bundle's database.
func setupOther(t *testing.T, b *testBundle) *testBundle {
	t.Helper()
	plain := b.pool.Config().ConnConfig
	config, err := pgxpool.ParseConfig(plain.ConnString())
	if err != nil {
		t.Fatal(err)
	}
	postgres.Configure(config, nil)
	other := &testBundle{}
	if other.pool, err = pgxpool.NewWithConfig(context.Background(), config); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(other.pool.Close)
	other.store = postgres.New(other.pool, nil)
	return other
}

// If a process is stopped while it looks for a lost COMMIT, it holds the key no longer than one
// that runs a handler.
func TestResolverOfAStoppedProcessFreesItsKey(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "waits until PostgreSQL ends sessions that are silent")
	for name, pooling := range map[string]bool{"directly": false, "as through a pooler": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := &stopper{}
			b := setup(t, &setupOptions{store: &postgres.Options{IdleInTransactionTimeout: 2 * time.Second, TransactionPooling: pooling}, configure: s.configure(t)})
			other := setupOther(t, b)
			stopped := make(chan struct{})
			s.arm(func(written []byte) (int, bool) {
				if !strings.Contains(string(written), "ROLLBACK") {
					return 0, false
				}
				close(stopped)
				return 0, true
			})
			found := b.resolveLater(t.Context(), "k")
			<-stopped
			const held = "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE locktype = 'advisory' AND datname = current_database()"
			if n := other.count(t, held); n != 1 {
				t.Errorf("%d keys are held, want 1", n)
			}
			for deadline := time.Now().Add(30 * time.Second); other.count(t, held) > 0; time.Sleep(20 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatal("the key is still held")
				}
			}
			(<-found).wantAbsent(t)
		})
	}
}

// Over TCP the server notices a machine that is gone, whatever the last message was.
func TestServerNoticesAMachineThatIsGone(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{database: pgtest.TLS(t).TLSURL("postgres")})
	for name, want := range map[string]string{"tcp_keepalives_idle": "30", "tcp_keepalives_interval": "10", "tcp_keepalives_count": "3", "tcp_user_timeout": "60000"} {
		if got := b.text(t, "SELECT current_setting($1)", name); got != want && !(name == "tcp_user_timeout" && got == "1min") {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
}

// The server notices a client that vanished: each connection sets keep-alives, except behind a
// pooler.
func TestConfigureAsksForKeepAlives(t *testing.T) {
	t.Parallel()
	for pooling, want := range map[bool][3]string{false: {"30", "10", "3"}, true: {}} {
		config, err := pgxpool.ParseConfig("host=/nowhere")
		if err != nil {
			t.Fatal(err)
		}
		postgres.Configure(config, &postgres.Options{TransactionPooling: pooling})
		params := config.ConnConfig.RuntimeParams
		if got := [3]string{params["tcp_keepalives_idle"], params["tcp_keepalives_interval"], params["tcp_keepalives_count"]}; got != want {
			t.Errorf("pooling %v: keep-alives %q, want %q", pooling, got, want)
		}
	}
}
