package boltintent_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/client/boltintent"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/memory"
)

// A process dies while it waits for an answer. The next one finds the intent, and learns its
// outcome.
func ExampleOpen() {
	var transfers atomic.Int64
	server := bank(&transfers)
	defer server.Close()
	folder, err := os.MkdirTemp("", "intents")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = os.RemoveAll(folder) }()
	start := func() (*client.Transport, *boltintent.Store) {
		intents, err := boltintent.Open(filepath.Join(folder, "intents"), nil)
		if err != nil {
			panic(err)
		}
		return client.New(nil, &client.Options{Honours: client.Everywhere, AttemptsMax: 1, Intents: intents, IntentHeaders: []string{"Account"}}), intents
	}
	pay := func(transport *client.Transport) error {
		r, err := http.NewRequest(http.MethodPost, server.URL, strings.NewReader("pay"))
		if err != nil {
			return err
		}
		r.Header.Set("Account", "acme") // it selects the account, and is kept
		response, err := (&http.Client{Transport: transport}).Do(r)
		if err == nil {
			_ = response.Body.Close()
		}
		return err
	}

	transport, intents := start()
	fmt.Println("unknown:", errors.Is(pay(transport), client.ErrUnknown))
	_ = intents.Close() // the process is gone

	transport, intents = start()
	defer func() { _ = intents.Close() }()
	report, err := transport.Resume(context.Background(), func(_ context.Context, r *client.Resumed) error {
		if r.Err != nil {
			return nil // it stays, for the next time
		}
		body, err := io.ReadAll(r.Response.Body)
		fmt.Println(r.Response.Header.Get("Idempotency-Status"), string(body))
		return err
	})
	fmt.Println(report.Settled, report.Kept, err, transfers.Load())
	// Output:
	// unknown: true
	// replayed transfer 1 of acme
	// 1 0 <nil> 1
}

// bank is a service that loses its first reply after its handler ran. It counts the transfers.
func bank(transfers *atomic.Int64) *httptest.Server {
	transfer := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusCreated)
		_, _ = fmt.Fprintf(w, "transfer %d of %s", transfers.Add(1), r.Header.Get("Account"))
	})
	account := func(r *http.Request) (string, error) { return r.Header.Get("Account"), nil }
	idempotent := middleware.New(memory.New(nil), account, nil).Handler(transfer)
	var requests atomic.Int64
	return httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if requests.Add(1) == 1 {
			idempotent.ServeHTTP(httptest.NewRecorder(), r)
			panic(http.ErrAbortHandler)
		}
		idempotent.ServeHTTP(w, r)
	}))
}
