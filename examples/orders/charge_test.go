package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/internal/pgtest"
)

// waitMax limits each wait. It is long because the machine may be loaded.
const waitMax = 60 * time.Second

// The payment service charges the card and its answer is lost: 504, and so the shop answers 503.
// The client keeps the key, and its retry is charged once.
func TestLostAnswerOfThePaymentServiceChargesOnce(t *testing.T) {
	t.Parallel()
	b := openShop(t)
	router, _ := newRouter(b.shop, b.store)
	server := httptest.NewServer(router)
	t.Cleanup(server.Close)
	once := &http.Client{Transport: client.New(nil, &client.Options{Honours: client.Everywhere, AttemptsMax: 1})}
	order := func() *http.Request {
		r := newOrder("token-of-acme", "flaky")
		r.URL.Scheme, r.URL.Host = "http", server.Listener.Addr().String()
		return r
	}

	response, err := once.Do(order())
	if err == nil {
		_ = response.Body.Close()
		t.Fatalf("it was answered %d", response.StatusCode)
	}
	var unanswered *client.Error
	if !errors.As(err, &unanswered) || !errors.Is(err, client.ErrUnknown) || errors.Is(err, client.ErrNotExecuted) {
		t.Fatalf("%v, want ErrUnknown", err)
	}
	if unanswered.Status != http.StatusServiceUnavailable || unanswered.Last != idempotency.OutcomeUnknown || !unanswered.Accepted {
		t.Errorf("the last answer is %d %s, accepted: %v; want 503 unknown, accepted", unanswered.Status, unanswered.Last, unanswered.Accepted)
	}
	if charges, err := b.charges(t.Context()); err != nil || len(charges) != 1 {
		t.Errorf("%+v, %v", charges, err)
	}

	ctx := client.WithKey(t.Context(), unanswered.Key.Value)
	for deadline := time.Now().Add(waitMax); ; time.Sleep(10 * time.Millisecond) {
		if response, err = once.Do(order().WithContext(ctx)); err == nil {
			break
		}
		if !errors.Is(err, client.ErrUnknown) || time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	_ = response.Body.Close()
	if got := response.Header.Get("Idempotency-Status"); response.StatusCode != http.StatusCreated || got != string(idempotency.OutcomeExecuted) {
		t.Errorf("the same order again: %d %s, want 201 executed", response.StatusCode, got)
	}
	if err := b.checkBooks(t.Context(), 1); err != nil {
		t.Error(err)
	}
}

// childVariable makes the test binary a shop that takes one order: "<database>|<payment service>".
const childVariable = "PAIDONCE_ORDERS_CHILD"

// child takes one order. It returns only if it was not killed.
func child() int {
	ctx := context.Background()
	databaseURL, payments, _ := strings.Cut(os.Getenv(childVariable), "|")
	store, err := open(ctx, databaseURL)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	ids, _, err := leaseIDs(ctx, store.Pool())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	router, _ := newRouter(&shop{pool: store.Pool(), ids: ids, charge: newCharge(payments, paymentTimeout)}, store)
	w := httptest.NewRecorder()
	router.ServeHTTP(w, keyed(newOrder("token-of-acme", "card")))
	fmt.Fprintf(os.Stderr, "it was answered %d %s\n", w.Code, w.Body)
	return 1
}

func keyed(r *http.Request) *http.Request {
	r.Header.Set("Idempotency-Key", "k")
	return r
}

// A shop is killed with kill -9 while the payment service has its request, and nobody retries. The
// price changes, and the completer of another process ends the order: it is charged once, and the
// charged amount is booked.
func TestKilledShopsOrderIsCompleted(t *testing.T) {
	t.Parallel()
	for name, charged := range map[string]bool{"before the card is charged": false, "after the card was charged": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			processes := make(chan *os.Process, 1)
			service := newPaymentService()
			payments := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Method == http.MethodPost {
					select {
					case process := <-processes:
						if charged {
							service.ServeHTTP(httptest.NewRecorder(), r)
						}
						_ = process.Kill()
						panic(http.ErrAbortHandler)
					default: // it was killed
					}
				}
				service.ServeHTTP(w, r)
			}))
			t.Cleanup(payments.Close)
			databaseURL := pgtest.Database(t)
			b := openShopOn(t, databaseURL, payments.URL)

			command := exec.CommandContext(t.Context(), os.Args[0])
			command.Env = append(os.Environ(), childVariable+"="+databaseURL+"|"+payments.URL)
			var output strings.Builder
			command.Stderr = &output
			if err := command.Start(); err != nil {
				t.Fatal(err)
			}
			processes <- command.Process
			if err := command.Wait(); err == nil || command.ProcessState.Exited() {
				t.Fatalf("it was not killed: %v\n%s", err, &output)
			}
			if charges, err := b.charges(t.Context()); err != nil || (len(charges) == 1) != charged {
				t.Errorf("%+v, %v", charges, err)
			}
			b.exec(t, "UPDATE shop.stock SET price = 500")
			b.exec(t, "UPDATE idempotency_open SET next_at = now()") // the lease of a process that died runs out
			router, idem := newRouter(b.shop, b.store)
			b.complete(t, idem.Completer(nil))

			if err := b.checkBooks(t.Context(), 1); err != nil {
				t.Error(err)
			}
			w := httptest.NewRecorder()
			router.ServeHTTP(w, keyed(newOrder("token-of-acme", "card")))
			if got := w.Header().Get("Idempotency-Status"); w.Code != http.StatusCreated || got != string(idempotency.OutcomeReplayed) || !strings.Contains(w.Body.String(), `"total":900`) {
				t.Errorf("a client that asks after all: %d %s %s, want 201 replayed and the old price", w.Code, got, w.Body)
			}
		})
	}
}

// The payment service is slow, and has the requests of all clients at the same time, although the
// pool has four connections: a call holds none.
func TestSlowPaymentServiceHoldsNoConnection(t *testing.T) {
	t.Parallel()
	const clients = 12
	service := newPaymentService()
	var mu sync.Mutex
	waiting := map[string]bool{}
	together := make(chan struct{})
	payments := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			mu.Lock()
			waiting[r.Header.Get("Idempotency-Key")] = true
			if len(waiting) == clients {
				select {
				case <-together:
				default:
					close(together)
				}
			}
			mu.Unlock()
			<-together
		}
		service.ServeHTTP(w, r)
	}))
	t.Cleanup(payments.Close)
	database, err := url.Parse(pgtest.Database(t))
	if err != nil {
		t.Fatal(err)
	}
	query := database.Query()
	query.Set("pool_max_conns", "4")
	database.RawQuery = query.Encode()
	b := openShopOn(t, database.String(), payments.URL)
	b.shop.charge = newCharge(payments.URL, waitMax)
	router, idem := newRouter(b.shop, b.store)

	ctx, cancel := context.WithTimeout(t.Context(), waitMax)
	defer cancel()
	var orders sync.WaitGroup
	for i := range clients {
		orders.Go(func() {
			for ctx.Err() == nil {
				r := newOrder("token-of-acme", fmt.Sprintf("card-%d", i))
				r.Header.Set("Idempotency-Key", fmt.Sprintf("k-%d", i))
				w := httptest.NewRecorder()
				router.ServeHTTP(w, r)
				if w.Header().Get("Idempotency-Status") != string(idempotency.OutcomeNotExecuted) {
					return // else it got no connection in time, because the others were reserving too
				}
			}
		})
	}
	select {
	case <-together:
	case <-ctx.Done():
		t.Error("they were not at the payment service together")
	}
	orders.Wait()
	b.complete(t, idem.Completer(nil))
	if err := b.checkBooks(t.Context(), clients); err != nil {
		t.Error(err)
	}
}

func (b *testBundle) exec(t *testing.T, sql string) {
	t.Helper()
	if _, err := b.shop.pool.Exec(t.Context(), sql); err != nil {
		t.Fatal(err)
	}
}

// complete runs the completer until no order is open.
func (b *testBundle) complete(t *testing.T, completer *idempotency.Completer) {
	t.Helper()
	for deadline := time.Now().Add(waitMax); ; time.Sleep(10 * time.Millisecond) {
		var open int
		if err := b.shop.pool.QueryRow(t.Context(), "SELECT count(*) FROM idempotency_open").Scan(&open); err != nil {
			t.Fatal(err)
		}
		if open == 0 {
			return
		}
		if _, err := completer.Once(t.Context()); err != nil || time.Now().After(deadline) {
			t.Fatalf("%d orders are open: %v", open, err)
		}
	}
}
