package client_test

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"

	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/memory"
)

// The reply of the first attempt is lost after the transfer was made. The caller sees one answer, and one transfer was
// made.
func Example() {
	transfers := 0
	transfer := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		transfers++
		w.WriteHeader(http.StatusCreated)
		_, _ = fmt.Fprintf(w, "transfer %d", transfers)
	})
	account := func(*http.Request) (string, error) { return "acme", nil }
	idempotent := middleware.New(memory.New(nil), account, nil).Handler(transfer)
	var requests atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if requests.Add(1) == 1 {
			idempotent.ServeHTTP(httptest.NewRecorder(), r)
			panic(http.ErrAbortHandler) // the connection breaks, and with it the reply
		}
		idempotent.ServeHTTP(w, r)
	}))
	defer server.Close()

	httpClient := &http.Client{Transport: client.New(nil, &client.Options{Honours: client.Everywhere})}
	response, err := httpClient.Post(server.URL, "application/json", strings.NewReader(`{"amount":1250}`))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = response.Body.Close() }()
	body, _ := io.ReadAll(response.Body) // it is in memory
	fmt.Println(response.StatusCode, response.Header.Get("Idempotency-Status"), string(body))
	fmt.Println("requests:", requests.Load(), "transfers:", transfers, "key:", len(client.KeyFrom(response)), "characters")
	// Output:
	// 201 replayed transfer 1
	// requests: 2 transfers: 1 key: 36 characters
}
