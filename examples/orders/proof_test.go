package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/idempotencytest"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/postgres"
)

func TestMain(m *testing.M) {
	// The proof causes failures, which the middleware logs.
	slog.SetDefault(slog.New(slog.DiscardHandler))
	if os.Getenv(childVariable) != "" {
		os.Exit(child())
	}
	pgtest.Main(m)
}

func TestOrdersOutliveCrashes(t *testing.T) {
	t.Parallel()
	b := openShop(t)
	var idem *middleware.Middleware
	idempotencytest.Run(t, idempotencytest.Config{
		Store: b.store,
		New: func(store idempotency.Store) (handler http.Handler) {
			handler, idem = newRouter(b.shop, store)
			return b.raisePrices(handler)
		},
		Resume:   func(ctx context.Context, key idempotency.Key) idempotency.Result { return idem.Resume(ctx, key) },
		Request:  func(n int) *http.Request { return newOrder("token-of-acme", cardOf(n)) },
		Declined: func(int) *http.Request { return newOrder("token-of-acme", "empty") },
		Other:    func(n int) *http.Request { return newOrder("token-of-globex", cardOf(n)) },
		Invariant: func(ctx context.Context, told idempotencytest.Told) error {
			return b.checkBooks(ctx, len(told.Acknowledged))
		},
	})
}

// cardOf returns another card for each order. The answer to the first charge of every fourth is
// lost.
func cardOf(n int) string {
	if n%4 == 1 {
		return fmt.Sprintf("flaky-%d", n)
	}
	return fmt.Sprintf("card-%d", n)
}

const stocked = 1_000_000

// testBundle is a shop with enough tea, the store of its records, and its payment service.
type testBundle struct {
	shop     *shop
	store    *postgres.Store
	payments string // URL
}

// openShop opens a shop on a database and a payment service of its own.
func openShop(t *testing.T) *testBundle {
	t.Helper()
	payments, stop, err := servePayments()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	return openShopOn(t, pgtest.Database(t), payments)
}

func openShopOn(t *testing.T, databaseURL, payments string) *testBundle {
	t.Helper()
	store, err := open(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Close)
	if _, err := store.Pool().Exec(t.Context(), "UPDATE shop.stock SET quantity = $1 WHERE sku = 'tea'", stocked); err != nil {
		t.Fatal(err)
	}
	ids, release, err := leaseIDs(t.Context(), store.Pool())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(release)
	return &testBundle{&shop{pool: store.Pool(), ids: ids, charge: newCharge(payments, paymentTimeout)}, store, payments}
}

// raisePrices raises the price before each request.
func (b *testBundle) raisePrices(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := b.shop.pool.Exec(r.Context(), "UPDATE shop.stock SET price = price + 1 WHERE sku = 'tea'"); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func newOrder(token, card string) *http.Request {
	body := fmt.Sprintf(`{"sku":"tea","quantity":2,"card":%q}`, card)
	r, err := http.NewRequest(http.MethodPost, "/orders", strings.NewReader(body))
	if err != nil {
		panic(err) // a constant
	}
	r.Header.Set("Authorization", "Bearer "+token)
	return r
}

// checkBooks checks that each acknowledged order exists once, with its goods, and with a payment
// equal to the charge. Nothing else may exist, neither in the shop nor at the payment service.
func (b *testBundle) checkBooks(ctx context.Context, acknowledged int) error {
	count := func(sql string) (n int, err error) {
		err = b.shop.pool.QueryRow(ctx, sql).Scan(&n)
		return n, err
	}
	orders, err := count("SELECT count(*) FROM shop.orders JOIN shop.payments ON order_id = id AND amount = total")
	if err != nil {
		return err
	}
	unpaid, err := count("SELECT count(*) FROM shop.orders WHERE NOT EXISTS (SELECT FROM shop.payments WHERE order_id = id AND amount = total)")
	if err != nil {
		return err
	}
	tea, err := count("SELECT quantity FROM shop.stock WHERE sku = 'tea'")
	if err != nil {
		return err
	}
	rows, err := b.shop.pool.Query(ctx, "SELECT charge, amount FROM shop.payments")
	if err != nil {
		return err
	}
	booked, charged := map[string]int64{}, map[string]int64{}
	var name string
	var amount int64
	if _, err := pgx.ForEachRow(rows, []any{&name, &amount}, func() error { booked[name] = amount; return nil }); err != nil {
		return err
	}
	charges, err := b.charges(ctx)
	if err != nil {
		return err
	}
	for _, c := range charges {
		if c.State == "charged" {
			charged[c.Name] = c.Amount
		}
	}
	if orders != acknowledged || unpaid != 0 || tea != stocked-2*acknowledged || len(booked) != acknowledged || !maps.Equal(booked, charged) {
		return fmt.Errorf("%d orders were acknowledged; there are %d, and %d that are not paid, %d payments of %d charges, equal: %v, and %d of %d tea is left",
			acknowledged, orders, unpaid, len(booked), len(charged), maps.Equal(booked, charged), tea, stocked)
	}
	return nil
}

// charges asks the payment service for all of its charges.
func (b *testBundle) charges(ctx context.Context) (charges []charge, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, b.payments+"/charges", nil)
	if err != nil {
		return nil, err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, err
	}
	defer func() { _ = response.Body.Close() }()
	return charges, json.NewDecoder(response.Body).Decode(&charges)
}
