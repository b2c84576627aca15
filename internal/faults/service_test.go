package faults_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

// service takes payments: POST / with a key is one row in payments. It is a net/http server with
// the middleware, a pool and a store, as users have.
type service struct {
	pool     *pgxpool.Pool
	store    *postgres.Store
	upstream *upstream
	front    *httptest.Server

	// lost gets the service's answer if the client's connection was cut instead (see payUnheard).
	lost chan reply
}

type serviceOptions struct {
	store      *postgres.Options
	middleware *middleware.Options
	pool       func(*pgxpool.Config) // changes the pool's config
	// handling runs in the handler after its INSERT, before it answers.
	handling func(ctx context.Context, key string)
	memo     string // stored with each payment
}

// upstream is the target of a service's connections. A fail-over changes it under the pool, as a
// name or a virtual address does.
type upstream struct{ url atomic.Pointer[string] }

func (u *upstream) set(databaseURL string) { u.url.Store(&databaseURL) }
func (u *upstream) get() string            { return *u.url.Load() }

func (u *upstream) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	return dial(ctx, u.get())
}

// dial connects to the server of a URL.
func dial(ctx context.Context, databaseURL string) (net.Conn, error) {
	config, err := pgconn.ParseConfig(databaseURL)
	if err != nil {
		return nil, err
	}
	network, address := pgconn.NetworkAddress(config.Host, config.Port)
	return (&net.Dialer{}).DialContext(ctx, network, address)
}

// serve migrates the database and starts a service on it.
func serve(t *testing.T, databaseURL string, opts *serviceOptions) *service {
	t.Helper()
	migrateUp(t, databaseURL)
	return serveOn(t, databaseURL, opts)
}

// migrateUp makes the tables, on connections of their own.
func migrateUp(t *testing.T, databaseURL string) {
	t.Helper()
	config, err := pgxpool.ParseConfig(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	config.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeExec // a pooler may be in between
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	if err := migrations.Up(t.Context(), postgres.New(pool, nil), nil); err != nil {
		t.Fatal(err)
	}
	const payments = "CREATE TABLE IF NOT EXISTS payments (id bigserial PRIMARY KEY, key text NOT NULL, memo text)"
	if _, err := pool.Exec(t.Context(), payments); err != nil {
		t.Fatal(err)
	}
	if _, err := pool.Exec(t.Context(), "ALTER TABLE payments ALTER memo SET STORAGE EXTERNAL"); err != nil {
		t.Fatal(err)
	}
}

// serveOn starts a service on a database that has the tables.
func serveOn(t *testing.T, databaseURL string, opts *serviceOptions) *service {
	t.Helper()
	s := newService(t, databaseURL, opts)
	t.Cleanup(s.close)
	return s
}

func newService(t *testing.T, databaseURL string, opts *serviceOptions) *service {
	t.Helper()
	if opts == nil {
		opts = &serviceOptions{}
	}
	s := &service{upstream: &upstream{}, lost: make(chan reply, 1)}
	s.upstream.set(databaseURL)
	var store postgres.Options
	if opts.store != nil {
		store = *opts.store
	}
	store.PoolConfig = func(config *pgxpool.Config) {
		config.ConnConfig.DialFunc = s.upstream.dial
		if opts.pool != nil {
			opts.pool(config)
		}
	}
	s.store = testservice.Open(t, databaseURL, &store)
	s.pool = s.store.Pool()

	var o middleware.Options
	if opts.middleware != nil {
		o = *opts.middleware
	}
	o.Logger = slog.New(slog.NewTextHandler(&testLog{t}, &slog.HandlerOptions{Level: slog.LevelError}))
	scope := func(*http.Request) (string, error) { return "acme", nil }
	payments := middleware.New(s.store, scope, &o).Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		key := r.Header.Get("Idempotency-Key")
		var id int64
		err := postgres.Tx(r.Context()).QueryRow(r.Context(),
			"INSERT INTO payments (key, memo) VALUES ($1, $2) RETURNING id", key, opts.memo).Scan(&id)
		if opts.handling != nil {
			opts.handling(r.Context(), key)
		}
		if err != nil {
			http.Error(w, "the payment failed", http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		fmt.Fprintf(w, `{"payment":%d,"nonce":%q}`, id, uuid.NewString())
	}))
	s.front = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Cut") == "" {
			payments.ServeHTTP(w, r)
			return
		}
		heard := httptest.NewRecorder()
		payments.ServeHTTP(heard, r)
		s.lost <- reply{heard.Code, heard.Header().Get("Idempotency-Status"), heard.Body.String()}
		panic(http.ErrAbortHandler) // hangs up without an answer
	}))
	return s
}

func (s *service) close() {
	s.front.CloseClientConnections()
	s.front.Close()
	s.pool.Close()
}

// testLog keeps the service's log with the test that made it.
type testLog struct{ t *testing.T }

func (l *testLog) Write(p []byte) (int, error) {
	if l.t.Context().Err() == nil { // t.Log panics after the test
		l.t.Log("service:", strings.TrimSpace(string(p)))
	}
	return len(p), nil
}

// reply is the answer that a client gets. A lost one is zero.
type reply struct {
	status  int
	outcome string // Idempotency-Status
	body    string
}

func (r reply) String() string {
	if r.status == 0 {
		return "no reply"
	}
	return fmt.Sprintf("%d %s", r.status, r.outcome)
}

// is reports whether the reply has this status and outcome.
func (r reply) is(status int, outcome string) bool { return r.status == status && r.outcome == outcome }

const payTimeout = 40 * time.Second

// pay sends one payment once, on a new connection: nothing resends it unseen. It may be called by
// any goroutine.
func (s *service) pay(key string) (reply, error) { return send(s.front.URL, key) }

// send sends a payment with these headers set.
func send(address, key string, headers ...string) (reply, error) {
	ctx, cancel := context.WithTimeout(context.Background(), payTimeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, address, io.NopCloser(strings.NewReader(`{"amount":1250}`)))
	if err != nil {
		return reply{}, err
	}
	request.Header.Set("Idempotency-Key", key)
	for _, name := range headers {
		request.Header.Set(name, "1")
	}
	transport := &http.Transport{DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	response, err := transport.RoundTrip(request)
	if err != nil {
		return reply{}, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return reply{response.StatusCode, response.Header.Get("Idempotency-Status"), string(body)}, err
}

// mustPay sends a payment and wants this answer.
func (s *service) mustPay(t *testing.T, key string, status int, outcome string) reply {
	t.Helper()
	got, err := s.pay(key)
	if err != nil {
		t.Fatalf("pay: %v", err)
	}
	if !got.is(status, outcome) {
		t.Fatalf("pay: %v, want %d %s; body %s", got, status, outcome, got.body)
	}
	return got
}

// payUnheard sends a payment, loses the reply, and returns the service's answer.
func (s *service) payUnheard(t *testing.T, key string) reply {
	t.Helper()
	if got, err := send(s.front.URL, key, "Cut"); err == nil {
		t.Fatalf("the reply was not lost: %v", got)
	}
	return <-s.lost
}

// payments counts the key's payments on the server to which the service's connections lead now.
func (s *service) payments(t *testing.T, key string) int {
	t.Helper()
	return count(t, s.upstream.get(), "SELECT count(*) FROM payments WHERE key = $1", key)
}

// records counts the key's records.
func (s *service) records(t *testing.T, key string) int {
	t.Helper()
	return count(t, s.upstream.get(), "SELECT count(*) FROM idempotency_keys WHERE scope = 'acme' AND key = $1", key)
}

func (s *service) onePayment(t *testing.T, keys ...string) {
	t.Helper()
	for _, key := range keys {
		if payments, records := s.payments(t, key), s.records(t, key); payments != 1 || records != 1 {
			t.Errorf("key %s has %d payments and %d records, want one of each", key, payments, records)
		}
	}
}

// hostOf returns the folder of the server's socket, or its host.
func hostOf(t *testing.T, databaseURL string) string {
	t.Helper()
	config, err := pgconn.ParseConfig(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	return config.Host
}

// Queries on separate connections.

func query(t *testing.T, databaseURL string, dest any, sql string, arguments ...any) {
	t.Helper()
	if err := tryQuery(databaseURL, dest, sql, arguments...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

func tryQuery(databaseURL string, dest any, sql string, arguments ...any) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, databaseURL)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conn.Close(ctx)) }()
	if dest == nil {
		_, err = conn.Exec(ctx, sql, arguments...)
		return err
	}
	return conn.QueryRow(ctx, sql, arguments...).Scan(dest)
}

func execute(t *testing.T, databaseURL, sql string, arguments ...any) {
	t.Helper()
	query(t, databaseURL, nil, sql, arguments...)
}

func count(t *testing.T, databaseURL, sql string, arguments ...any) (n int) {
	t.Helper()
	query(t, databaseURL, &n, sql, arguments...)
	return n
}

// await polls the database until the condition is true.
func await(t *testing.T, databaseURL, what, condition string, arguments ...any) {
	t.Helper()
	var holds bool
	var err error
	for begin := time.Now(); time.Since(begin) < awaitMax; time.Sleep(10 * time.Millisecond) {
		if err = tryQuery(databaseURL, &holds, "SELECT "+condition, arguments...); err == nil && holds {
			return
		}
	}
	t.Fatalf("%s: not within %v (%v)", what, awaitMax, err)
}

// awaitMax is for the slowest of machines: a condition becomes true in milliseconds, or never.
const awaitMax = time.Minute
