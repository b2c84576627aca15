// Package house is a service with the middleware on a real PostgreSQL, behind a proxy that loses COMMITs, for the tests of
// observers: it makes each thing happen that an observer may be told of. Everything a client sends or gets that must not be
// seen has [Canary] in it.
package house

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

// Canary is in every scope, key, body, header and answer.
const Canary = "canary"

// The routes. Payments waits for its duplicates' answers.
const (
	Transfers = "POST /transfers"
	Payments  = "POST /payments"
)

// Slow is how long a slow handler takes.
const Slow = 45 * time.Millisecond

// Limits of the service.
const (
	PoolMax        = 4
	acquireTimeout = 20 * time.Second       // nothing here is for lack of time, on however busy a machine
	resolveTimeout = 20 * time.Second       // of Transfers
	giveUpTimeout  = 100 * time.Millisecond // of the look for a lost COMMIT of Payments
	bodyBytesMax   = 1000
)

// Options say what observes.
type Options struct {
	Tracer  idempotency.Tracer
	TraceID func(*http.Request) string
	Around  func(http.Handler) http.Handler // of the whole service; nil: nothing
}

// House is one service. Its methods fail the test where something else happens than they are called for. They are used one
// at a time.
type House struct {
	Pool  *pgxpool.Pool
	Store *postgres.Store
	Idem  *middleware.Middleware

	t       testing.TB
	handler http.Handler
	proxy   *pgfault.Proxy
	next    atomic.Pointer[pgfault.Fault] // of the next COMMIT
	gone    bool                          // PostgreSQL is, with the next COMMIT that is cut; set before next
	entered chan struct{}                 // by a handler that holds its key
	release chan struct{}
	keys    int
}

// New returns a service on a database of its own, which ends with the test.
func New(t testing.TB, opts Options) *House {
	t.Helper()
	h := &House{t: t, entered: make(chan struct{}), release: make(chan struct{})}
	database := pgtest.Database(t)
	network, address, err := pgfault.Upstream(database)
	must(t, err)
	h.proxy, err = pgfault.Start(pgfault.Options{Network: network, Address: address, OnCommit: func(pgfault.Commit) pgfault.Fault {
		if fault := h.next.Swap(nil); fault != nil {
			if fault.Kind == pgfault.CutAfter && h.gone {
				h.proxy.SetRefuse(true)
			}
			return *fault
		}
		return pgfault.Fault{}
	}})
	must(t, err)
	t.Cleanup(func() { _ = h.proxy.Close() })
	config, err := pgxpool.ParseConfig(h.proxy.URL(database))
	must(t, err)
	config.MaxConns = PoolMax
	storeOptions := &postgres.Options{AcquireTimeout: acquireTimeout}
	postgres.Configure(config, storeOptions)
	h.Pool, err = pgxpool.NewWithConfig(context.Background(), config)
	must(t, err)
	t.Cleanup(h.Pool.Close)
	must(t, migrations.Up(context.Background(), h.Pool, nil))
	h.exec("CREATE TABLE effects (id bigserial PRIMARY KEY)")
	h.Store = postgres.New(h.Pool, storeOptions)
	h.Idem = middleware.New(h.Store, scope, &middleware.Options{
		Engine:       idempotency.Options{Tracer: opts.Tracer, ResolveTimeout: resolveTimeout, Restarts: -1},
		BodyBytesMax: bodyBytesMax, TraceID: opts.TraceID,
		Logger: slog.New(slog.DiscardHandler),
		AuthorizeReplay: func(r *http.Request, _ *idempotency.Record) error {
			if r.Header.Get("Revoked") != "" {
				return errors.New(Canary)
			}
			return nil
		},
	})
	mux := http.NewServeMux()
	mux.Handle(Transfers, h.Idem.Handler(http.HandlerFunc(h.pay)))
	mux.Handle(Payments, h.Idem.With(func(o *middleware.Options) {
		o.Engine.Wait, o.Engine.ResolveTimeout = 20*time.Second, giveUpTimeout
	}).Handler(http.HandlerFunc(h.pay)))
	h.handler = mux
	if opts.Around != nil {
		h.handler = opts.Around(mux)
	}
	return h
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func scope(r *http.Request) (string, error) {
	if r.Header.Get("Account") == "" {
		return "", errors.New(Canary)
	}
	return r.Header.Get("Account"), nil
}

// pay is the handler. The body's first word says what it does.
func (h *House) pay(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		http.Error(w, "body", http.StatusInternalServerError)
		return
	}
	if _, err := postgres.Tx(r.Context()).Exec(r.Context(), "INSERT INTO effects DEFAULT VALUES"); err != nil {
		http.Error(w, "effect", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Etag", Canary)
	do, _, _ := strings.Cut(string(body), " ")
	switch do {
	case "decline":
		w.WriteHeader(http.StatusPaymentRequired)
	case "forget":
		w.WriteHeader(http.StatusInternalServerError)
	case "call":
		_ = idempotency.DerivedKey(r.Context(), Canary)
		w.WriteHeader(http.StatusGatewayTimeout)
	case "call-and-panic":
		_ = idempotency.DerivedKey(r.Context(), Canary)
		panic(Canary)
	case "panic":
		panic(Canary)
	case "slow":
		time.Sleep(Slow)
	case "hold":
		h.entered <- struct{}{}
		<-h.release
	}
	_, _ = io.WriteString(w, Canary)
}

// NewKey returns a key that nobody has used.
func (h *House) NewKey() string {
	h.keys++
	return fmt.Sprintf("%s-%d", Canary, h.keys)
}

// Send sends a request and wants an outcome. The body is what to do, and a text that makes the request what it is; headers are names
// and values in turn, where "" takes one away.
func (h *House) Send(route, key, do, text string, outcome idempotency.Outcome, headers ...string) *httptest.ResponseRecorder {
	h.t.Helper()
	method, path, _ := strings.Cut(route, " ")
	r := httptest.NewRequest(method, path+"?token="+Canary, strings.NewReader(do+" "+text+" "+Canary))
	r.Header.Set("Account", Canary)
	r.Header.Set("Authorization", "Bearer "+Canary)
	r.Header.Set("Idempotency-Key", key)
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
		if headers[i+1] == "" {
			r.Header.Del(headers[i])
		}
	}
	w := httptest.NewRecorder()
	h.handler.ServeHTTP(w, r)
	if got := w.Header().Get("Idempotency-Status"); got != string(outcome) {
		h.t.Errorf("%s, to %s: %d %s, want %s\n%s", route, do, w.Code, got, outcome, w.Body)
	}
	return w
}

// Execute executes n requests, each its own.
func (h *House) Execute(route string, n int) (keys []string) {
	h.t.Helper()
	for range n {
		key := h.NewKey()
		h.Send(route, key, "pay", key, idempotency.OutcomeExecuted)
		keys = append(keys, key)
	}
	return keys
}

// Replay executes a request, and sends it again.
func (h *House) Replay(route string) {
	h.t.Helper()
	key := h.Execute(route, 1)[0]
	h.Send(route, key, "pay", key, idempotency.OutcomeReplayed)
}

// Decline sends a request whose answer is kept without its writes.
func (h *House) Decline() {
	h.t.Helper()
	key := h.NewKey()
	h.Send(Transfers, key, "decline", key, idempotency.OutcomeExecuted)
}

// Forget sends a request whose handler answers 500.
func (h *House) Forget() {
	h.t.Helper()
	key := h.NewKey()
	h.Send(Transfers, key, "forget", key, idempotency.OutcomeNotExecuted)
}

// Call sends a request to a handler that calls DerivedKey and answers 504, or panics.
func (h *House) Call(panics bool) {
	h.t.Helper()
	body := "call"
	if panics {
		body = "call-and-panic"
	}
	key := h.NewKey()
	h.Send(Transfers, key, body, key, idempotency.OutcomeUnknown)
}

// Fail sends a request whose handler panics.
func (h *House) Fail() {
	h.t.Helper()
	key := h.NewKey()
	h.Send(Transfers, key, "panic", key, idempotency.OutcomeNotExecuted)
}

// Mismatch executes a request, and sends another with its key.
func (h *House) Mismatch() {
	h.t.Helper()
	key := h.Execute(Transfers, 1)[0]
	h.Send(Transfers, key, "pay", "other "+key, idempotency.OutcomeMismatch)
}

// LoseKey executes a request, and sends it again with another key.
func (h *House) LoseKey() {
	h.t.Helper()
	key := h.Execute(Transfers, 1)[0]
	h.Send(Transfers, h.NewKey(), "pay", key, idempotency.OutcomeExecuted)
}

// Hold begins a request whose handler holds its key, calls during, and ends it.
func (h *House) Hold(route string, during func(key string)) {
	h.t.Helper()
	key := h.NewKey()
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.Send(route, key, "hold", key, idempotency.OutcomeExecuted)
	}()
	<-h.entered
	during(key)
	h.release <- struct{}{}
	<-done
}

// Conflict sends a request n times more while it is in progress.
func (h *House) Conflict(n int) {
	h.t.Helper()
	h.Hold(Transfers, func(key string) {
		for range n {
			h.Send(Transfers, key, "hold", key, idempotency.OutcomeInProgress)
		}
	})
}

// Wait sends a request while it is in progress, which waits for its answer; waiting is called meanwhile, until it returns true.
func (h *House) Wait(waiting func() bool) {
	h.t.Helper()
	done := make(chan struct{})
	h.Hold(Payments, func(key string) {
		go func() {
			defer close(done)
			h.Send(Payments, key, "hold", key, idempotency.OutcomeReplayed)
		}()
		for deadline := time.Now().Add(10 * time.Second); !waiting(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				h.t.Error("nobody is seen waiting")
				return
			}
		}
	})
	<-done
}

// Saturate holds every connection of the pool while it calls during.
func (h *House) Saturate(during func()) {
	h.t.Helper()
	for range PoolMax {
		conn, err := h.Pool.Acquire(context.Background())
		must(h.t, err)
		defer conn.Release()
	}
	during()
}

// GiveUp waits for a connection while every one is held, and gives up.
func (h *House) GiveUp() {
	h.t.Helper()
	h.Saturate(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		defer cancel()
		if conn, err := h.Pool.Acquire(ctx); err == nil {
			conn.Release()
			h.t.Error("there was a connection")
		}
	})
}

// Unavailable sends n requests while there is no database.
func (h *House) Unavailable(n int) {
	h.t.Helper()
	h.proxy.SetRefuse(true)
	defer h.proxy.SetRefuse(false)
	for range n {
		h.Pool.Reset() // or the connections that it has go on
		key := h.NewKey()
		h.Send(Transfers, key, "pay", key, idempotency.OutcomeNotExecuted)
	}
}

// LoseCommit sends a request whose COMMIT loses its reply, after it was carried out or before.
func (h *House) LoseCommit(committed bool) {
	h.t.Helper()
	kind, outcome := pgfault.CutBefore, idempotency.OutcomeNotExecuted
	if committed {
		kind, outcome = pgfault.CutAfter, idempotency.OutcomeExecuted
	}
	h.next.Store(&pgfault.Fault{Kind: kind})
	key := h.NewKey()
	h.Send(Transfers, key, "pay", key, outcome)
}

// LoseDatabase sends a request whose COMMIT loses its reply, with the database gone until the outcome is unknown.
func (h *House) LoseDatabase() {
	h.t.Helper()
	h.gone = true
	defer func() {
		h.gone = false
		h.proxy.SetRefuse(false)
	}()
	h.next.Store(&pgfault.Fault{Kind: pgfault.CutAfter})
	key := h.NewKey()
	h.Send(Payments, key, "pay", key, idempotency.OutcomeUnknown)
}

// Corrupt executes a request, plants a header in its record that is never recorded, and sends it again.
func (h *House) Corrupt() {
	h.t.Helper()
	key := h.Execute(Transfers, 1)[0]
	h.exec(`UPDATE idempotency_keys SET headers = '\x01010a5365742d436f6f6b69650178' WHERE key = $1`, key) // Set-Cookie: x
	h.Send(Transfers, key, "pay", key, idempotency.OutcomeUnknown)
}

// Refuse sends a request for each reason of the middleware's own that a client can cause.
func (h *House) Refuse() {
	h.t.Helper()
	key := h.Execute(Transfers, 1)[0]
	for _, refusal := range []struct {
		outcome idempotency.Outcome
		text    string
		headers []string
	}{
		{idempotency.OutcomeNotExecuted, key, []string{"Idempotency-Key", ""}},
		{idempotency.OutcomeNotExecuted, key, []string{"Idempotency-Key", Canary + " " + Canary}},
		{idempotency.OutcomeNotExecuted, key, []string{"Account", ""}},
		{idempotency.OutcomeNotExecuted, strings.Repeat(Canary, bodyBytesMax), nil},
		{idempotency.OutcomeUnknown, key, []string{"Revoked", "yes"}},
	} {
		h.Send(Transfers, key, "pay", refusal.text, refusal.outcome, refusal.headers...)
	}
}

// Expire ends the time of every record, some while ago.
func (h *House) Expire(ago time.Duration) {
	h.t.Helper()
	h.exec("UPDATE idempotency_keys SET expires_at = now() - $1 * interval '1 second'", ago.Seconds())
}

// Settle waits until no connection is held: one that failed goes back a moment after its request was answered.
func (h *House) Settle() {
	h.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); h.Pool.Stat().AcquiredConns() > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			h.t.Fatal("a connection is held")
		}
	}
}

func (h *House) exec(sql string, args ...any) {
	h.t.Helper()
	_, err := h.Pool.Exec(context.Background(), sql, args...)
	must(h.t, err)
}
