package server

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/internal/crashpoint"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/memory"
	"github.com/paidonce/idempotency/storage/postgres"
)

// TestWithoutACrashPointNothingIsInstalled: if the environment names no point, the pool and the
// middleware are as if crash points did not exist.
func TestWithoutACrashPointNothingIsInstalled(t *testing.T) {
	parse := func() *pgxpool.Config {
		config, err := pgxpool.ParseConfig("postgres://nobody@127.0.0.1:1/none")
		if err != nil {
			t.Fatal(err)
		}
		return config
	}
	function := func(f any) uintptr { return reflect.ValueOf(f).Pointer() }
	same := func(point *CrashPoint) (pool, protect bool, allocations float64) {
		s := New(Config{CrashPoint: point})
		plain, ours := parse(), parse()
		postgres.Configure(plain, storeOptions(&s.config))
		configurePool(ours, &s.config)
		postgres.Configure(ours, storeOptions(&s.config))
		pool = reflect.TypeOf(plain.ConnConfig.Tracer) == reflect.TypeOf(ours.ConnConfig.Tracer) &&
			function(plain.ConnConfig.BuildFrontend) == function(ours.ConnConfig.BuildFrontend)
		idem := middleware.New(memory.New(nil), bank.Tenant, &middleware.Options{Tracer: s.metrics})
		protection := s.protect(idem)
		handler := protection(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusCreated) }))
		allocations = testing.AllocsPerRun(100, func() {
			r := httptest.NewRequest(http.MethodPost, bank.TransfersPath, strings.NewReader("{}"))
			r.Header.Set("Idempotency-Key", "k")
			w := httptest.NewRecorder()
			handler.ServeHTTP(w, r)
			if w.Code != http.StatusCreated {
				t.Fatalf("answer is %d", w.Code)
			}
		})
		return pool, function(protection) == function(idem.Handler), allocations
	}
	point := func(value string) *CrashPoint {
		t.Setenv(crashpoint.BankVariable, value)
		point, err := CrashPointFromEnvironment(io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		return point
	}
	pool, protect, without := same(nil)
	if !pool || !protect {
		t.Errorf("without a crash point the pool is plain: %t, and the middleware: %t", pool, protect)
	}
	// The comparison would notice a point.
	for _, name := range crashpoint.Bank() {
		pool, protect, with := same(point(name + ":1000000"))
		if pool || protect || with <= without {
			t.Errorf("with %s the pool is plain: %t, and the middleware: %t; %v allocations with and %v without", name, pool, protect, with, without)
		}
	}
}

// TestTimeoutsFitTheHandlers: for every allowed handler timeout, a transaction may be idle for
// longer than that but less than a minute, and the write timeout exceeds all steps before the
// answer.
func TestTimeoutsFitTheHandlers(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ handler, wait, idle time.Duration }{
		{HandlerTimeoutMin, 0, HandlerTimeoutMin + 10*time.Second},
		{10 * time.Second, 0, 20 * time.Second},
		{10 * time.Second, idempotency.WaitMax, 20 * time.Second},
		{49 * time.Second, 0, 59 * time.Second},
		{50 * time.Second, 0, 59 * time.Second},
		{HandlerTimeoutMax, idempotency.WaitMax, 59 * time.Second},
	} {
		s := New(Config{HandlerTimeout: test.handler, Wait: test.wait})
		options := storeOptions(&s.config)
		if options.IdleInTransactionTimeout != test.idle {
			t.Errorf("handler timeout %v: a transaction may be idle for %v, want %v", test.handler, options.IdleInTransactionTimeout, test.idle)
		}
		engine := idempotency.NewEngine(memory.New(nil), &idempotency.Options{Timeouts: idempotency.Timeouts{Handler: test.handler}, Wait: test.wait}).Options()
		server := s.httpServer(http.NotFoundHandler())
		parts := server.ReadTimeout + engine.Wait + engine.Timeouts.Handler + engine.Timeouts.Commit + engine.Timeouts.Resolve
		if total := server.WriteTimeout; total <= parts {
			t.Errorf("handler timeout %v: an answer must be written after %v, and its parts take up to %v", test.handler, total, parts)
		}
	}
}

// TestTheLongestHandlerFitsTheStore: a bank starts with either limit; the store does not refuse it.
func TestTheLongestHandlerFitsTheStore(t *testing.T) {
	t.Parallel()
	for _, timeout := range []time.Duration{HandlerTimeoutMax, HandlerTimeoutMin} {
		pool, err := pgxpool.New(context.Background(), "postgres://nobody@127.0.0.1:1/none")
		if err != nil {
			t.Fatal(err)
		}
		defer pool.Close()
		fits := func(timeout time.Duration) (ok bool) {
			defer func() { ok = recover() == nil }()
			s := New(Config{HandlerTimeout: timeout})
			idempotency.NewEngine(postgres.New(pool, storeOptions(&s.config)), &idempotency.Options{Timeouts: idempotency.Timeouts{Handler: timeout}})
			return true
		}
		if !fits(timeout) {
			t.Errorf("the store refuses a handler timeout of %v", timeout)
		}
		if fits(HandlerTimeoutMax + 1) {
			t.Error("HandlerTimeoutMax is less than the store allows")
		}
	}
}

// TestHandlerTimeoutEndsATransferThatWaits: a transfer waits for a locked account, and another
// request waits for its connection.
func TestHandlerTimeoutEndsATransferThatWaits(t *testing.T) {
	t.Parallel()
	const handlerTimeout, acquireTimeout = 1500 * time.Millisecond, 100 * time.Millisecond
	b := setup(t, func(c *Config) {
		c.PoolSize, c.HandlerTimeout, c.AcquireTimeout = 1, handlerTimeout, acquireTimeout
	})
	tx, err := b.db.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.Background()) }()
	if _, err := tx.Exec(t.Context(), `SELECT FROM accounts WHERE id = 'alice' FOR UPDATE`); err != nil {
		t.Fatal(err)
	}
	waiting := make(chan struct{})
	go func() {
		defer close(waiting)
		started := time.Now()
		expectProblem(t, b.keyed("/v1/transfers", `{"from":"alice","to":"bob","amount":1}`), http.StatusServiceUnavailable, "unavailable")
		// Without the handler timeout, lock_timeout would end it after 5 seconds.
		if took := time.Since(started); took < handlerTimeout || took > 4*time.Second {
			t.Errorf("the transfer was given up after %v, want %v", took, handlerTimeout)
		}
	}()
	for locked := false; !locked; {
		if err := tx.QueryRow(t.Context(), `SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)`).Scan(&locked); err != nil {
			t.Fatal(err)
		}
	}
	started := time.Now()
	r := b.keyed("/v1/transfers", `{"from":"bob","to":"acct-0001","amount":1}`)
	expectProblem(t, r, http.StatusServiceUnavailable, "unavailable")
	if took := time.Since(started); r.outcome() != "not-executed" || took < acquireTimeout || took >= handlerTimeout {
		t.Errorf("the transfer without a connection was given up as %s after %v, want %v", r.outcome(), took, acquireTimeout)
	}
	<-waiting
}

// TestWaitReplacesTheConflict: a copy of a transfer in progress gets that transfer's answer, and no
// 409.
func TestWaitReplacesTheConflict(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *Config) { c.Wait = 30 * time.Second })
	tx, err := b.db.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.Background()) }()
	if _, err := tx.Exec(t.Context(), `SELECT FROM accounts WHERE id = 'alice' FOR UPDATE`); err != nil {
		t.Fatal(err)
	}
	replies := make(chan reply, 2)
	for range 2 {
		go func() {
			replies <- b.send(http.MethodPost, "/v1/transfers", `{"from":"alice","to":"bob","amount":1}`, "Idempotency-Key", "k")
		}()
	}
	for deadline := time.Now().Add(20 * time.Second); !strings.Contains(string(b.get("/metrics").body), "idempotency_requests_in_flight 2"); {
		if time.Now().After(deadline) {
			t.Fatal("the copy does not wait")
		}
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	first, second := <-replies, <-replies
	outcomes := first.outcome() + " " + second.outcome()
	if first.status != http.StatusCreated || !bytes.Equal(first.body, second.body) || outcomes != "executed replayed" && outcomes != "replayed executed" {
		t.Errorf("%d %s, %d %s: %s", first.status, first.body, second.status, second.body, outcomes)
	}
	if balance := b.balance("alice"); balance != 10_000_000-1 {
		t.Errorf("alice has %d", balance)
	}
}

// TestTTLIsThatOfTheRecords: the default TTL and a short one, as the answers' headers show them.
func TestTTLIsThatOfTheRecords(t *testing.T) {
	t.Parallel()
	for _, ttl := range []time.Duration{0, time.Minute} {
		b := setup(t, func(c *Config) { c.TTL = ttl })
		want := ttl
		if want == 0 {
			want = 24 * time.Hour
		}
		for range 2 {
			r := b.send(http.MethodPost, "/v1/transfers", `{"from":"alice","to":"bob","amount":1}`, "Idempotency-Key", "k")
			if r.outcome() == "executed" {
				continue
			}
			created, err := time.Parse(time.RFC3339, r.header.Get("Idempotency-Created-At"))
			if err != nil {
				t.Fatal(err)
			}
			expires, err := time.Parse(time.RFC3339, r.header.Get("Idempotency-Expires-At"))
			if err != nil {
				t.Fatal(err)
			}
			if kept := expires.Sub(created); kept < want-2*time.Second || kept > want+10*time.Second {
				t.Errorf("a record counts for %v, want %v", kept, want)
			}
		}
	}
}

// TestLockTimeoutOfTheAddressIsTheStores: a bank starts even if its URL sets another lock_timeout
// than the store's default.
func TestLockTimeoutOfTheAddressIsTheStores(t *testing.T) {
	t.Parallel()
	address, err := url.Parse(pgtest.Database(t))
	if err != nil {
		t.Fatal(err)
	}
	query := address.Query()
	query.Set("lock_timeout", "1500")
	address.RawQuery = query.Encode()
	b := setupOn(t, address.String())
	if r := b.keyed("/v1/transfers", `{"from":"alice","to":"bob","amount":1}`); r.status != http.StatusCreated {
		t.Errorf("transfer: %d %s", r.status, r.body)
	}
}
