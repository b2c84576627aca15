package lostkey_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"

	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/observe/lostkey"
	"github.com/paidonce/idempotency/storage/memory"
)

// A client that makes a new key for each try pays twice, and is found.
func ExampleNew() {
	detector := lostkey.New(&lostkey.Options{OnLost: func(_ context.Context, event lostkey.Event) {
		fmt.Println("lost its key:", event.Route)
	}})
	account := func(*http.Request) (string, error) { return "acme", nil }
	idem := middleware.New(memory.New(nil), account, &middleware.Options{Tracer: detector})
	mux := http.NewServeMux()
	mux.Handle("POST /transfers", idem.Handler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusCreated) })))

	for _, key := range []string{"try-1", "try-1", "try-2"} {
		r := httptest.NewRequest(http.MethodPost, "/transfers", strings.NewReader(`{"amount":1250}`))
		r.Header.Set("Idempotency-Key", key)
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, r)
		fmt.Println(key, w.Header().Get("Idempotency-Status"))
	}
	// Output:
	// try-1 executed
	// try-1 replayed
	// lost its key: POST /transfers
	// try-2 executed
}
