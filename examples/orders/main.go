// Command orders is a shop with orders that can be retried. Between the reservation of the goods
// and the booking of the payment it calls an outside payment service, which can't be part of a
// transaction.
//
// go run ./examples/orders
package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"

	"github.com/go-chi/chi/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/nodeid"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/middleware/chiroute"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

func main() { start("orders", "127.0.0.1:8082", run) }

func run(ctx context.Context, address string) error {
	url, stop, err := databaseURL(ctx)
	if err != nil {
		return err
	}
	defer stop()
	store, err := open(ctx, url)
	if err != nil {
		return err
	}
	defer store.Close()
	ids, release, err := leaseIDs(ctx, store.Pool())
	if err != nil {
		return err
	}
	defer release()
	payments, closePayments, err := servePayments()
	if err != nil {
		return err
	}
	defer closePayments()

	shop := &shop{pool: store.Pool(), ids: ids, charge: newCharge(payments, paymentTimeout)}
	router, idem := newRouter(shop, store)
	// The completer ends orders that no client retries, including those of a process that died.
	completing, stopCompleting := context.WithCancel(ctx)
	var completer sync.WaitGroup
	completer.Go(func() { idem.Completer(nil).Run(completing) })
	defer completer.Wait()
	defer stopCompleting()
	return serve(ctx, address, router, func(url string) { greet(url, payments) })
}

// newRouter mounts authentication outside and idempotency inside. An unknown caller is refused
// before the key is read. The key belongs to the account that authentication found, not to the
// token: a client with a rotated token still finds its own orders.
func newRouter(shop *shop, store idempotency.Store) (http.Handler, *middleware.Middleware) {
	idem := middleware.New(store, accountOf, &middleware.Options{
		// The handler may call other services, and any replica finds it by this name.
		Resumable: "order/1",
		// chiroute.State lets a handler run again, here or in another process.
		RouterState: chiroute.State,
	})
	r := chi.NewRouter()
	r.Use(authenticate)
	r.With(idem.Handler).Post("/orders", shop.order)
	r.Get("/stock", shop.stock)
	return r, idem
}

// open connects to the database and migrates it.
func open(ctx context.Context, url string) (*postgres.Store, error) {
	store, err := postgres.Open(ctx, url, nil)
	if err != nil {
		return nil, err
	}
	if err = migrations.Up(ctx, store, nil); err == nil {
		_, err = store.Pool().Exec(ctx, schema)
	}
	if err != nil {
		store.Close()
		return nil, err
	}
	return store, nil
}

// leaseIDs leases a node number for this process, on its own connection, until release is called.
func leaseIDs(ctx context.Context, pool *pgxpool.Pool) (ids *nodeid.Source, release func(), err error) {
	ids, err = nodeid.Open(ctx, pool.Config().ConnConfig, slog.Default())
	if err != nil {
		return nil, nil, err
	}
	// Requests in progress still need ids.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var group sync.WaitGroup
	group.Go(func() { ids.Run(ctx) })
	return ids, func() { cancel(); group.Wait() }, nil
}

// servePayments runs the payment service on a port of its own, like another company's service.
func servePayments() (url string, stop func(), err error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	server := &http.Server{Handler: newPaymentService(), ReadTimeout: readTimeout, WriteTimeout: writeTimeout}
	go func() { _ = server.Serve(listener) }() // returns when the server is closed
	return "http://" + listener.Addr().String(), func() { _ = server.Close() }, nil
}

// greet prints lines to try.
func greet(url, payments string) {
	curl := func(card string) string {
		return fmt.Sprintf(`curl -i %s/orders -H 'Authorization: Bearer token-of-acme' -H 'Idempotency-Key: %s' -d '{"sku":"tea","quantity":2,"card":"%s"}'`, url, rand.Text(), card)
	}
	order, declined, flaky := curl("good"), curl("empty"), curl("flaky")
	fmt.Printf(`orders is at %s

Order: 201, Idempotency-Status: executed
  %s
Order again: 201, Idempotency-Status: replayed, and the same bytes
  %s

A card that is declined: 402, executed; the answer is kept, the stock is not touched
  %s

The payment service's answer is lost: 503, unknown, because the card may have been charged
  %s
The same again, a second later: 201, and not charged twice. It goes on without you, too
  %s

What the payment service did, and what is in stock:
  curl %s/charges
  curl %s/stock -H 'Authorization: Bearer token-of-acme'
`, url, order, order, declined, flaky, flaky, payments, url)
}
