package server

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
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
	for _, name := range append(crashpoint.Bank(), crashpoint.BankCalls()...) {
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
	const handlerTimeout, acquireTimeout = 3 * time.Second, time.Second
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
		if took := time.Since(started); took < handlerTimeout || took >= 5*time.Second {
			t.Errorf("the transfer was given up after %v, want %v", took, handlerTimeout)
		}
	}()
	for locked := false; !locked; {
		if err := tx.QueryRow(t.Context(), `SELECT EXISTS (SELECT FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE NOT granted AND datname = current_database())`).Scan(&locked); err != nil {
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

// TestNothingIsShed: with its defaults and right after its start, the bank answers 64 transfers at
// once between the same two accounts, while 200 other clients have sent half of a body.
func TestNothingIsShed(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *Config) { c.PoolSize = PoolSizeDefault })
	const body = `{"from":"alice","to":"bob","amount":1}`
	halves := make([]net.Conn, 200)
	bodies := make([]string, len(halves))
	for i := range halves {
		bodies[i] = fmt.Sprintf(`{"from":"acct-%04d","to":"acct-%04d","amount":1}`, i, i+len(halves))
		conn, err := net.Dial("tcp", strings.TrimPrefix(b.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := fmt.Fprintf(conn, "POST /v1/transfers HTTP/1.1\r\nHost: bank\r\nIdempotency-Key: %s\r\nContent-Length: %d\r\n\r\n%s", uuid.NewString(), len(bodies[i]), bodies[i][:10]); err != nil {
			t.Fatal(err)
		}
		halves[i] = conn
	}
	var group sync.WaitGroup
	barrier := make(chan struct{})
	for range 64 {
		group.Go(func() {
			<-barrier
			for range 4 {
				if r := b.keyed("/v1/transfers", body); r.status != 201 {
					t.Errorf("answer is %d %s", r.status, r.body)
				}
			}
		})
	}
	close(barrier)
	group.Wait()

	// The other halves: each of the slow clients gets its answer.
	for i, conn := range halves {
		if _, err := io.WriteString(conn, bodies[i][10:]); err != nil {
			t.Fatal(err)
		}
	}
	for _, conn := range halves {
		if err := conn.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
			t.Fatal(err)
		}
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		if response.StatusCode != 201 {
			t.Errorf("a slow client's answer is %d", response.StatusCode)
		}
	}
	if got, want := b.balance("bob"), int64(10_000_000+64*4); got != want {
		t.Errorf("bob has %d, want %d", got, want)
	}
	if audit := b.audit(); !audit.OK || audit.Transfers != 64*4+200 {
		t.Errorf("audit is %+v", audit)
	}
}

// TestFundsAreCheckedUnderTheLock: of twenty concurrent transfers of a tenth of the balance, ten
// succeed.
func TestFundsAreCheckedUnderTheLock(t *testing.T) {
	t.Parallel()
	b := setup(t)
	var group sync.WaitGroup
	var mu sync.Mutex
	statuses := map[int]int{}
	for i := range 20 {
		group.Go(func() {
			r := b.keyed("/v1/transfers", fmt.Sprintf(`{"from":"acct-0001","to":"acct-%04d","amount":10000}`, 100+i))
			mu.Lock()
			defer mu.Unlock()
			statuses[r.status]++
		})
	}
	group.Wait()
	if statuses[201] != 10 || statuses[402] != 10 || b.balance("acct-0001") != 0 {
		t.Errorf("statuses are %v, the balance is %d", statuses, b.balance("acct-0001"))
	}
}

// TestStockIsTakenUnderTheLock: of twenty concurrent orders of one item each for the last five,
// five succeed. A retry and a declined order take no stock.
func TestStockIsTakenUnderTheLock(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(`UPDATE products SET stock = 5 WHERE sku = 'mug'`)
	var group sync.WaitGroup
	var mu sync.Mutex
	statuses := map[int]int{}
	for i := range 20 {
		group.Go(func() {
			key := uuid.NewString()
			body := fmt.Sprintf(`{"account":"acct-%04d","sku":"mug","quantity":1}`, i)
			r := b.send("POST", "/v1/orders", body, "Idempotency-Key", key)
			again := b.send("POST", "/v1/orders", body, "Idempotency-Key", key)
			if again.outcome() != "replayed" || again.status != r.status || !bytes.Equal(again.body, r.body) {
				t.Errorf("the answer is %d %s, the retry's %d %s %s", r.status, r.body, again.status, again.outcome(), again.body)
			}
			mu.Lock()
			defer mu.Unlock()
			statuses[r.status]++
		})
	}
	group.Wait()
	if statuses[201] != 5 || statuses[409] != 15 || b.balance("merchant") != 5*1250 {
		t.Errorf("statuses are %v, the merchant has %d", statuses, b.balance("merchant"))
	}
	if audit := b.audit(); !audit.OK || audit.Orders != 5 || audit.Accounts != 1003 {
		t.Errorf("audit is %+v", audit)
	}
}

// TestAnIdleConnectionReadsARefusal: a request that was on its way on an idle connection when the
// bank began to stop is refused, and so known to be not executed.
func TestAnIdleConnectionReadsARefusal(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s := New(Config{Addr: "127.0.0.1:0", DatabaseURL: pgtest.Database(t), PoolSize: 4})
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	<-s.Serving()
	address := strings.TrimPrefix(s.URL(), "http://")
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	reader := bufio.NewReader(conn)
	ask := func(request string) *http.Response {
		t.Helper()
		if _, err := io.WriteString(conn, request); err != nil {
			t.Fatal(err)
		}
		response, err := http.ReadResponse(reader, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, response.Body); err != nil {
			t.Fatal(err)
		}
		return response
	}
	if response := ask("GET /healthz HTTP/1.1\r\nHost: bank\r\n\r\n"); response.StatusCode != 200 {
		t.Fatalf("answer is %d", response.StatusCode)
	}
	cancel()
	for { // until the listener is closed
		other, err := net.Dial("tcp", address)
		if err != nil {
			break
		}
		_ = other.Close()
	}
	response := ask("POST /v1/transfers HTTP/1.1\r\nHost: bank\r\nIdempotency-Key: k\r\nContent-Length: 2\r\n\r\n{}")
	if response.StatusCode != 503 || response.Header.Get("Idempotency-Status") != "not-executed" || response.Header.Get("Retry-After") == "" || !response.Close {
		t.Errorf("answer is %d %v", response.StatusCode, response.Header)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestBigHeadersAreRefused: a key of hundreds of kilobytes never reaches a handler.
func TestBigHeadersAreRefused(t *testing.T) {
	t.Parallel()
	b := setup(t)
	if r := b.send("POST", "/v1/transfers", `{}`, "Idempotency-Key", strings.Repeat("k", headerBytesMax+8192)); r.status != 431 {
		t.Errorf("answer is %d", r.status)
	}
	expectProblem(t, b.send("POST", "/v1/transfers", `{}`, "Idempotency-Key", strings.Repeat("k", 256)), 400, "key-invalid")
}

// safeBuffer is a buffer for a logger and a test at the same time.
type safeBuffer struct {
	mu     sync.Mutex
	buffer bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buffer.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buffer.String()
}

// TestNothingPrivateIsLoggedOrCounted: no log line of any level and no metric contains a key,
// tenant, token or body.
func TestNothingPrivateIsLoggedOrCounted(t *testing.T) {
	t.Parallel()
	var log safeBuffer
	b := setup(t, logTo(&log))
	const canary = "canary4711"
	b.send("POST", "/v1/transfers", `{"from":"alice","to":"bob","amount":1,"reference":"`+canary+`"}`, "Idempotency-Key", canary, "Authorization", "Bearer demo-acme")
	b.send("POST", "/v1/transfers", `{"from":"`+canary+`","to":"bob","amount":1}`, "Idempotency-Key", canary, "Authorization", "Bearer demo-acme")
	b.send("POST", "/v1/transfers", `{`+canary, "Idempotency-Key", canary+"2", "Authorization", "Bearer "+canary)
	b.get("/v1/accounts/" + canary)
	// A handler that fails with a detailed error.
	b.exec(`ALTER TABLE transfers RENAME COLUMN reference TO elsewhere`)
	if r := b.send("POST", "/v1/transfers", `{"from":"alice","to":"bob","amount":1,"reference":"`+canary+`"}`, "Idempotency-Key", canary+"3", "Authorization", "Bearer demo-acme"); r.status != 500 || r.outcome() != "not-executed" || bytes.Contains(r.body, []byte("column")) {
		t.Errorf("answer is %d %s %s", r.status, r.outcome(), r.body)
	}
	b.exec(`ALTER TABLE transfers RENAME COLUMN elsewhere TO reference`)

	b.auditUntil("both consumers have handled the transfer's message", func(a bank.Audit) bool { return a.MessagesConsumed == 2 })
	metrics := string(b.get("/metrics").body)
	for name, text := range map[string]string{"the log": log.String(), "the metrics": metrics} {
		for _, private := range []string{canary, "acme", "Bearer"} {
			if strings.Contains(text, private) {
				t.Errorf("%s has %q in it", name, private)
			}
		}
	}
	for _, want := range []string{"route=/v1/transfers", "status=201", "outcome=executed", "route=/v1/accounts/{id}", "level=WARN"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log does not say %s:\n%s", want, log.String())
		}
	}
	for _, want := range []string{
		`idempotency_requests_total{outcome="executed",reason=""} 1`,
		`idempotency_requests_total{outcome="mismatch",reason="key-reused"} 1`,
		`idempotency_requests_total{outcome="not-executed",reason=""} 1`,
		`idempotency_refused_total{reason="scope"} 1`,
		`idempotency_step_duration_seconds_count{step="commit"} 1`,
		`idempotency_attempts_total 3`,
		`idempotency_requests_in_flight 0`,
		`idempotency_pool_connections_max 16`,
		`idempotency_duplicates_total{outcome="replayed",route="/v1/transfers"} 0`,
		`idempotency_records_live_estimate 3`,
		`idempotency_handler_timeout_seconds 10`,
	} {
		if !strings.Contains(metrics, want+"\n") {
			t.Errorf("the metrics do not say %s", want)
		}
	}
}

// TestThePoolIsFilledAtTheStart: no request waits for a new connection. pgxpool itself would fill a
// reset pool only a minute later.
func TestThePoolIsFilledAtTheStart(t *testing.T) {
	t.Parallel()
	const size = 5
	b := setup(t, func(c *Config) { c.PoolSize = size })
	want := fmt.Sprintf("\nidempotency_pool_connections %d\n", size)
	for until := time.Now().Add(30 * time.Second); !strings.Contains(string(b.get("/metrics").body), want); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatalf("the pool is not full after 30 s")
		}
	}
}
