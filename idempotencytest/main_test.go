package idempotencytest

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/postgres"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// testBundle is a service that pays, in a database of its own.
type testBundle struct {
	pool    *pgxpool.Pool
	store   idempotency.Store
	options middleware.Options
	pay     func(w http.ResponseWriter, r *http.Request, n int, amount int64)
	check   func(ctx context.Context, told Told) error

	unmounted bool // the handler without the middleware

	mu    sync.Mutex
	asked map[int]int // number of requests for each n
	kept  []*keeper
}

func setup(t *testing.T) *testBundle {
	t.Helper()
	service := testservice.New(t, &postgres.Options{PoolConfig: func(config *pgxpool.Config) { config.MaxConns = 10 }})
	service.Exec(t, "CREATE TABLE payments (n bigint NOT NULL, account text NOT NULL)")
	b := &testBundle{pool: service.Pool, store: service.Store, pay: pay, asked: map[int]int{}}
	b.check = b.invariant
	t.Cleanup(b.endKept)
	b.options.Logger = slog.New(slog.DiscardHandler)
	return b
}

func (b *testBundle) config() Config {
	return Config{
		Store: b.store,
		New: func(store idempotency.Store) http.Handler {
			idem := middleware.New(store, func(r *http.Request) (string, error) { return r.Header.Get("Account"), nil }, &b.options)
			if b.unmounted {
				return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { paid(w, 0) })
			}
			mux := http.NewServeMux()
			mux.Handle("POST /payments", idem.Handler(http.HandlerFunc(b.serve)))
			return mux
		},
		Request:   func(n int) *http.Request { return b.request(n, "acme", 100) },
		Declined:  func(n int) *http.Request { return b.request(n, "acme", -1) },
		Other:     func(n int) *http.Request { return b.request(n, "globex", 100) },
		Invariant: b.check,
	}
}

func (b *testBundle) serve(w http.ResponseWriter, r *http.Request) {
	var p struct {
		N      int
		Amount int64
	}
	if err := json.NewDecoder(r.Body).Decode(&p); err != nil {
		http.Error(w, "send n and an amount", http.StatusBadRequest)
		return
	}
	b.pay(w, r, p.N, p.Amount)
}

// left keeps an attempt that is not ended; the test ends it.
func (b *testBundle) left(k *keeper) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.kept = append(b.kept, k)
}

func (b *testBundle) endKept() {
	for _, k := range b.kept {
		if !k.committed {
			_ = k.Attempt.Rollback(context.Background())
		}
	}
}

func (b *testBundle) request(n int, account string, amount int64) *http.Request {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.asked[n]++
	r, err := http.NewRequest(http.MethodPost, "http://service.test/payments", strings.NewReader(fmt.Sprintf(`{"n":%d,"amount":%d}`, n, amount)))
	if err != nil {
		panic(err)
	}
	r.Header.Set("Account", account)
	r.Header.Set("Content-Type", "application/json")
	return r
}

// invariant requires a payment for each acknowledged request, and no other.
func (b *testBundle) invariant(ctx context.Context, told Told) error {
	rows, err := b.pool.Query(ctx, "SELECT n, count(*) FROM payments GROUP BY n")
	if err != nil {
		return err
	}
	got, want := map[int]int{}, map[int]int{}
	var n, count int
	if _, err = pgx.ForEachRow(rows, []any{&n, &count}, func() error { got[n] = count; return nil }); err != nil {
		return err
	}
	for _, answer := range told.Acknowledged {
		want[answer.N]++
	}
	if !maps.Equal(got, want) {
		return fmt.Errorf("payments by request are %v, want %v", got, want)
	}
	return nil
}

// pay is correct: it writes in the transaction, and declines after it has written.
func pay(w http.ResponseWriter, r *http.Request, n int, amount int64) {
	if err := insert(r.Context(), postgres.Tx(r.Context()), n); err != nil {
		http.Error(w, "the payment failed", http.StatusInternalServerError)
		return
	}
	if amount < 0 {
		http.Error(w, "there is not enough money", http.StatusPaymentRequired)
		return
	}
	paid(w, n)
}

func insert(ctx context.Context, db interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}, n int,
) error {
	var inserted int
	return db.QueryRow(ctx, "INSERT INTO payments (n, account) VALUES ($1, 'acme') RETURNING n", n).Scan(&inserted)
}

func paid(w http.ResponseWriter, n int) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Location", fmt.Sprintf("/payments/%d", n))
	w.WriteHeader(http.StatusCreated)
	// The answers of two runs differ.
	_ = json.NewEncoder(w).Encode(map[string]any{"n": n, "at": time.Now()})
}
