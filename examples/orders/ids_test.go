package main

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/paidonce/idempotency"
)

// A shop that has lost its node number makes no order, charges no card, and can say so.
func TestOrderWithoutALeaseIsNotExecuted(t *testing.T) {
	t.Parallel()
	b := openShop(t)
	ids, release, err := leaseIDs(t.Context(), b.shop.pool)
	if err != nil {
		t.Fatal(err)
	}
	release()
	b.shop.ids = ids
	r := newOrder("token-of-acme", "good")
	r.Header.Set("Idempotency-Key", "k")
	w := httptest.NewRecorder()
	router, _ := newRouter(b.shop, b.store)
	router.ServeHTTP(w, r)
	if got := w.Header().Get("Idempotency-Status"); w.Code != http.StatusServiceUnavailable || got != string(idempotency.OutcomeNotExecuted) {
		t.Errorf("%d %s, want 503 not-executed", w.Code, got)
	}
	if charges, err := b.charges(t.Context()); err != nil || len(charges) != 0 {
		t.Errorf("%+v, %v", charges, err)
	}
}
