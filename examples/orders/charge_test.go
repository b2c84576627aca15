package main

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
)

// The payment service charges the card and its answer is lost: 504, and so the shop answers 503.
// The shop's database has nothing of the order, but that does not prove that the card was not
// charged. The client keeps the key, and its retry is charged once.
func TestLostAnswerOfThePaymentServiceChargesOnce(t *testing.T) {
	t.Parallel()
	shop, store := openShop(t)
	server := httptest.NewServer(newRouter(shop, store))
	t.Cleanup(server.Close)
	once := &http.Client{Transport: client.New(nil, &client.Options{Honours: client.Everywhere, AttemptsMax: 1})}
	order := func() *http.Request {
		r := newOrder("token-of-acme", "flaky")
		r.URL.Scheme, r.URL.Host = "http", server.Listener.Addr().String()
		return r
	}
	books := func(orders, charges int) {
		t.Helper()
		got, err := query(t.Context(), shop.pool, "SELECT count(*) FROM shop.orders")
		if err != nil {
			t.Fatal(err)
		}
		charged, err := countCharges(t.Context(), shop.payments.url)
		if err != nil {
			t.Fatal(err)
		}
		if got != orders || charged != charges {
			t.Errorf("%d orders and %d charges, want %d and %d", got, charged, orders, charges)
		}
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
	if unanswered.Status != http.StatusServiceUnavailable || unanswered.Last != idempotency.OutcomeUnknown {
		t.Errorf("the last answer is %d %s, want the handler's own 503, unknown", unanswered.Status, unanswered.Last)
	}
	books(0, 1)

	r := order()
	if response, err = once.Do(r.WithContext(client.WithKey(t.Context(), unanswered.Key.Value))); err != nil {
		t.Fatal(err)
	}
	_ = response.Body.Close()
	if got := response.Header.Get("Idempotency-Status"); response.StatusCode != http.StatusCreated || got != string(idempotency.OutcomeExecuted) {
		t.Errorf("the same order again: %d %s, want 201 executed", response.StatusCode, got)
	}
	books(1, 1)
}
