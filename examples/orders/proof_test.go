package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/idempotencytest"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/storage/postgres"
)

func TestMain(m *testing.M) {
	// The proof causes failures, which the middleware logs.
	slog.SetDefault(slog.New(slog.DiscardHandler))
	pgtest.Main(m)
}

func TestOrdersOutliveCrashes(t *testing.T) {
	t.Parallel()
	shop, store := openShop(t)
	idempotencytest.Run(t, idempotencytest.Config{
		Store:    store,
		New:      func(store idempotency.Store) http.Handler { return newRouter(shop, store) },
		Request:  func(n int) *http.Request { return newOrder("token-of-acme", fmt.Sprintf("card-%d", n)) },
		Declined: func(int) *http.Request { return newOrder("token-of-acme", "empty") },
		Other:    func(n int) *http.Request { return newOrder("token-of-globex", fmt.Sprintf("card-%d", n)) },
		Invariant: func(ctx context.Context, told idempotencytest.Told) error {
			return checkBooks(ctx, shop, len(told.Acknowledged))
		},
	})
}

const stocked = 1_000_000

// openShop returns a shop with enough tea and the store of its records, on its own database and
// payment service.
func openShop(t *testing.T) (*shop, *postgres.Store) {
	t.Helper()
	store, err := open(t.Context(), pgtest.Database(t))
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
	payments, stop, err := servePayments()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(); http.DefaultClient.CloseIdleConnections() })
	return &shop{pool: store.Pool(), ids: ids, payments: &paymentClient{url: payments}}, store
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

// checkBooks checks that each acknowledged order is there once, with its payment, its goods and its
// charge, and nothing else. A client gives up only if it is proven that its order was not executed,
// and so not charged either.
func checkBooks(ctx context.Context, shop *shop, acknowledged int) error {
	orders, err := query(ctx, shop.pool, "SELECT count(*) FROM shop.orders")
	if err != nil {
		return err
	}
	paid, err := query(ctx, shop.pool, "SELECT count(*) FROM shop.orders JOIN shop.payments ON order_id = id AND amount = total")
	if err != nil {
		return err
	}
	tea, err := query(ctx, shop.pool, "SELECT quantity FROM shop.stock WHERE sku = 'tea'")
	if err != nil {
		return err
	}
	charged, err := countCharges(ctx, shop.payments.url)
	if err != nil {
		return err
	}
	if orders != acknowledged || paid != acknowledged || tea != stocked-2*acknowledged || charged != acknowledged {
		return fmt.Errorf("%d orders were acknowledged; there are %d, %d of them paid, %d charges, and %d of %d tea is left",
			acknowledged, orders, paid, charged, tea, stocked)
	}
	return nil
}

func query(ctx context.Context, pool *pgxpool.Pool, sql string) (n int, err error) {
	err = pool.QueryRow(ctx, sql).Scan(&n)
	return n, err
}

// countCharges asks the payment service how many cards it has charged.
func countCharges(ctx context.Context, url string) (n int, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url+"/charges", nil)
	if err != nil {
		return 0, err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return 0, err
	}
	defer func() { _ = response.Body.Close() }()
	var charges []charge
	err = json.NewDecoder(response.Body).Decode(&charges)
	for _, c := range charges {
		if c.State == "charged" {
			n++
		}
	}
	return n, err
}
