package check

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

const ttl = time.Hour

// bundle is the real bank behind its real middleware, in a database of its own, and the history of
// its one client.
type bundle struct {
	t        *testing.T
	url      string
	conn     *pgx.Conn // for the checks; its search_path is the default
	store    *postgres.Store
	handler  http.Handler
	ops      []Operation
	expected []Expectation
	clock    time.Duration
}

type counter struct{ last atomic.Int64 }

func (c *counter) Next() (int64, error) { return c.last.Add(1), nil }

func setup(t *testing.T) *bundle {
	t.Helper()
	b := &bundle{t: t, url: pgtest.Database(t)}
	store, err := postgres.Open(t.Context(), b.url, &postgres.Options{Schema: bank.Schema, PoolConfig: func(config *pgxpool.Config) {
		config.ConnConfig.RuntimeParams["search_path"] = bank.Schema
		config.MaxConns = 3
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Close)
	if err := migrations.Up(t.Context(), store, nil); err != nil {
		t.Fatal(err)
	}
	if err := bank.Migrate(t.Context(), store); err != nil {
		t.Fatal(err)
	}
	b.store = store
	logger := slog.New(slog.DiscardHandler)
	r := chi.NewRouter()
	bank.New(store.Pool(), new(counter), ttl, logger).Mount(r, middleware.New(b.store, bank.Tenant, &middleware.Options{
		TTL: ttl, Logger: logger,
	}).Handler)
	b.handler = r
	b.conn = b.connect()
	return b
}

func (b *bundle) connect() *pgx.Conn {
	b.t.Helper()
	conn, err := pgx.Connect(b.t.Context(), b.url)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { _ = conn.Close(b.t.Context()) }) // dropped with its database anyway
	return conn
}

// send sends a request and adds it to the history.
func (b *bundle) send(asked Operation, path, body string) {
	b.t.Helper()
	r := httptest.NewRequestWithContext(b.t.Context(), http.MethodPost, path, strings.NewReader(body))
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Idempotency-Key", asked.Key)
	r.Header.Set("Authorization", "Bearer demo-"+asked.Scope)
	w := httptest.NewRecorder()
	asked.Sent = b.clock
	b.handler.ServeHTTP(w, r)
	b.clock += time.Millisecond
	asked.Returned, asked.Status, asked.Outcome = b.clock, w.Code, w.Header().Get("Idempotency-Status")
	var answer struct{ ID, Type string }
	if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil {
		b.t.Errorf("%s: answered %d: %v", path, w.Code, err)
	}
	asked.ID = answer.ID
	if _, slug, found := strings.Cut(answer.Type, "#"); found {
		asked.Problem = slug
	}
	asked.Answer = sha256.Sum256(fmt.Appendf(nil, "%d %q %q %s", w.Code, w.Header().Get("Content-Type"), w.Header().Get("Location"), w.Body))
	b.ops = append(b.ops, asked)
}

func (b *bundle) transfer(scope, key string, amount int64, final bool) {
	b.t.Helper()
	b.send(Operation{Scope: scope, Key: key, Request: uint64(amount), From: "acct-0001", To: "acct-0002", Amount: amount, Final: final},
		bank.TransfersPath, fmt.Sprintf(`{"from":"acct-0001","to":"acct-0002","amount":%d}`, amount))
}

func (b *bundle) order(final bool) {
	b.t.Helper()
	b.send(Operation{Scope: "acme", Key: "order", Request: 1, From: "acct-0003", Final: final},
		"/v1/orders", `{"account":"acct-0003","sku":"mug","quantity":2}`)
}

func (b *bundle) account(final bool) {
	b.t.Helper()
	b.send(Operation{Scope: "acme", Key: "account", Request: 1, Amount: 77, Final: final},
		"/v1/accounts", `{"id":"new","currency":"EUR","opening_balance":77}`)
}

// work does a little of everything that a client does, except faults: those exist only in the
// history.
func (b *bundle) work() {
	b.t.Helper()
	for _, final := range []bool{false, true} {
		b.transfer("acme", "k1", 100, final)
		b.transfer("acme", "k2", 200, final)
		b.transfer("globex", "k1", 300, final)
		b.transfer("acme", "declined", 1_000_000_000, final)
		b.order(final)
		b.account(final)
	}
	b.transfer("acme", "k1", 101, false) // a changed body
	lost := b.ops[1]                     // of k2, whose first reply did not come
	lost.Returned, lost.Outcome, lost.Status, lost.ID, lost.Answer = 0, "", 0, "", [32]byte{}
	b.ops[1] = lost
	b.ops = append(b.ops, op(1, 0, 1, "not-executed").with(of("acme", "given up")))
	for _, key := range []string{"k1", "k2", "order", "account"} {
		b.expected = append(b.expected, Expectation{Scope: "acme", Key: key})
	}
	b.expected = append(b.expected, Expectation{Scope: "globex", Key: "k1"},
		Expectation{Scope: "acme", Key: "declined", Declined: true}, Expectation{Scope: "acme", Key: "given up", GivenUp: true})
}

func (b *bundle) exec(sql string, args ...any) {
	b.t.Helper()
	if _, err := b.conn.Exec(b.t.Context(), sql, args...); err != nil {
		b.t.Fatalf("%s: %v", sql, err)
	}
}

func (b *bundle) ledger() []Result {
	b.t.Helper()
	results, err := Ledger(b.t.Context(), b.conn, b.ops, b.expected, ttl)
	if err != nil {
		b.t.Fatal(err)
	}
	return results
}
