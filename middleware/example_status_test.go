package middleware_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"time"

	"github.com/paidonce/idempotency/effect"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/middleware"
)

// The processor's reply is lost. A client that prefers not to wait gets 202 with the address of its
// operation, which has the answer once the completer has made it.
func ExampleNewStatus() {
	ctx := context.Background()
	store, closeStore := testservice.Example(ctx, "")
	defer closeStore()

	calls := 0
	charge := effect.New("charge", effect.Effect[int, string]{
		Do: func(context.Context, string, int) (string, error) {
			if calls++; calls == 1 {
				return "", errors.New("connection reset by peer")
			}
			return "ch_1", nil
		},
	})
	topUp := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, err := charge.Call(r.Context(), 900)
		if err != nil {
			return // not settled: the request stays open
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		_, _ = fmt.Fprintf(w, `{"charge":%q}`, id)
	})
	secret := bytes.Repeat([]byte("x"), middleware.StatusSecretBytesMin) // a service reads random bytes from its settings
	operations := middleware.NewStatus("/v1/operations/", secret)
	idem := middleware.New(store, exampleAccount, &middleware.Options{Resumable: "topup/1", Accepted: operations})
	mux := http.NewServeMux()
	mux.Handle("POST /v1/topups", idem.Handler(topUp))
	mux.Handle("GET /v1/operations/{id}", operations)

	r := httptest.NewRequest(http.MethodPost, "/v1/topups", strings.NewReader(`{"amount":900}`))
	r.Header.Set("Account", "acme")
	r.Header.Set("Idempotency-Key", "8e03978e")
	r.Header.Set("Prefer", "respond-async")
	accepted := httptest.NewRecorder()
	mux.ServeHTTP(accepted, r)
	fmt.Println(accepted.Code, accepted.Header().Get("Idempotency-Status"))

	completer := idem.Completer(nil) // a service calls its Run
	r = httptest.NewRequest(http.MethodGet, accepted.Header().Get("Location"), nil)
	r.Header.Set("Account", "acme")
	poll := httptest.NewRecorder()
	for range 600 { // until it is due
		if completed, err := completer.Once(ctx); err != nil || completed > 0 {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	mux.ServeHTTP(poll, r)
	_, answer, _ := strings.Cut(poll.Body.String(), `"status"`)
	fmt.Print(poll.Code, ` {"id":"...","status"`, answer)
	// Output:
	// 202 pending
	// 200 {"id":"...","status":"done","answer":{"status":201,"body":{"charge":"ch_1"}}}
}
