package memory_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"

	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/memory"
)

// A unit test of a handler: a retry finds the first answer, and the handler ran once.
func Example() {
	runs := 0
	transfer := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		runs++
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		_, _ = fmt.Fprintf(w, `{"transfer":%d}`, runs)
	})
	store := memory.New(nil)
	account := func(*http.Request) (string, error) { return "acme", nil }
	handler := middleware.New(store, account, nil).Handler(transfer)

	for range 2 {
		r := httptest.NewRequest(http.MethodPost, "/transfers", strings.NewReader(`{"amount":"10.00"}`))
		r.Header.Set("Idempotency-Key", "8e03978e-40d5-43dd-bc93-6894a57f9324")
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		fmt.Println(w.Code, w.Header().Get("Idempotency-Status"), w.Body)
	}
	fmt.Println("runs:", runs, "records:", store.Len())
	// Output:
	// 201 executed {"transfer":1}
	// 201 replayed {"transfer":1}
	// runs: 1 records: 1
}
