package encrypted_test

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"net/http"
	"net/http/httptest"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/encrypted"
	"github.com/paidonce/idempotency/storage/memory"
)

// A retry gets the answer; a reader of the table can't read it. The memory store is for tests: a
// service uses storage/postgres, and takes the secret from its secret store.
func ExampleNew() {
	key := encrypted.Key{ID: 1}
	_, _ = rand.Read(key.Secret[:]) // never fails
	table := memory.New(nil)
	store := encrypted.New(table, encrypted.Keys{Current: key})

	account := func(*http.Request) (string, error) { return "acme", nil }
	handler := middleware.New(store, account, nil).Handler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = fmt.Fprint(w, "one-time password: 8391")
	}))
	for range 2 {
		r := httptest.NewRequest(http.MethodPost, "/passwords", nil)
		r.Header.Set("Idempotency-Key", "8e03978e")
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		fmt.Println(w.Header().Get("Idempotency-Status"), w.Body.String())
	}
	recorded := table.Records()[idempotency.Key{Scope: "acme", Value: "8e03978e"}].Answer.Body
	fmt.Println("in the table:", bytes.Contains(recorded, []byte("8391")))
	fmt.Println("in a log:", key)
	// Output:
	// executed one-time password: 8391
	// replayed one-time password: 8391
	// in the table: false
	// in a log: key 1
}
