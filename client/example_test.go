package client_test

import (
	"context"
	"errors"
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

// The reply of the first attempt is lost after the transfer was made. The caller gets one answer,
// for one transfer.
func Example() {
	var transfers atomic.Int64
	server := bankOf(1, &transfers)
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
	fmt.Println("transfers:", transfers.Load(), "key:", len(client.KeyFrom(response)), "characters")
	// Output:
	// 201 replayed transfer 1
	// transfers: 1 key: 36 characters
}

// bankOf is a service that loses its first replies after its handler ran. It counts the transfers.
func bankOf(lost int64, transfers *atomic.Int64) *httptest.Server {
	transfer := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusCreated)
		_, _ = fmt.Fprintf(w, "transfer %d", transfers.Add(1))
	})
	account := func(*http.Request) (string, error) { return "acme", nil }
	idempotent := middleware.New(memory.New(nil), account, nil).Handler(transfer)
	var requests atomic.Int64
	return httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if requests.Add(1) <= lost {
			idempotent.ServeHTTP(httptest.NewRecorder(), r)
			panic(http.ErrAbortHandler)
		}
		idempotent.ServeHTTP(w, r)
	}))
}

// No answer came in time. The caller keeps the key, and continues with it later: the transfer is
// not made again.
func ExampleWithKey() {
	var transfers atomic.Int64
	server := bankOf(1, &transfers)
	defer server.Close()
	httpClient := &http.Client{Transport: client.New(nil, &client.Options{Honours: client.Everywhere, AttemptsMax: 1})}

	_, err := httpClient.Post(server.URL, "text/plain", strings.NewReader("pay"))
	var unanswered *client.Error
	if !errors.Is(err, client.ErrUnknown) || !errors.As(err, &unanswered) {
		fmt.Println(err)
		return
	}
	key := unanswered.Key.Value // kept beside its purpose

	later := client.WithKey(context.Background(), key)
	r, err := http.NewRequestWithContext(later, http.MethodPost, server.URL, strings.NewReader("pay"))
	if err != nil {
		fmt.Println(err)
		return
	}
	r.Header.Set("Content-Type", "text/plain")
	response, err := httpClient.Do(r)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = response.Body.Close() }()
	fmt.Println(response.StatusCode, response.Header.Get("Idempotency-Status"), client.KeyFrom(response) == key, transfers.Load())
	// Output: 201 replayed true 1
}
