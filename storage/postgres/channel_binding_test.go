package postgres_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http/httptest"
	"strings"
	"sync"
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
