package main

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres"
)

// A shop that has lost its node number makes no order, charges no card, and can say so.
func TestOrderWithoutALeaseIsNotExecuted(t *testing.T) {
	t.Parallel()
	shop, _ := openShop(t)
	ids, release, err := leaseIDs(t.Context(), shop.pool)
	if err != nil {
		t.Fatal(err)
	}
	release()
	shop.ids = ids
	r := newOrder("token-of-acme", "good")
	r.Header.Set("Idempotency-Key", "k")
	w := httptest.NewRecorder()
	newRouter(shop, postgres.New(shop.pool, nil)).ServeHTTP(w, r)
	if got := w.Header().Get("Idempotency-Status"); w.Code != http.StatusServiceUnavailable || got != string(idempotency.OutcomeNotExecuted) {
		t.Errorf("%d %s, want 503 not-executed", w.Code, got)
	}
	if charged, err := countCharges(t.Context(), shop.payments.url); err != nil || charged != 0 {
		t.Errorf("%d charges, %v", charged, err)
	}
}
