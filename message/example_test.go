package message_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"

	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/postgres"
)

// A handler publishes a message about its transfer. A retry publishes nothing, and neither does a
// transfer that is declined.
func ExamplePublish() {
	ctx := context.Background()
	store, closeStore := testservice.Example(ctx, "CREATE TABLE transfers (account text, amount int)")
	defer closeStore()

	transfer := func(w http.ResponseWriter, r *http.Request) {
		ctx, account := r.Context(), r.Header.Get("Account")
		if _, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO transfers VALUES ($1, 1250)", account); err != nil {
			http.Error(w, "the transfer failed", http.StatusInternalServerError)
			return
		}
		err := message.Publish(ctx, "transfer-made", message.Message{Topic: "transfers", Key: []byte(account), Body: []byte(`{"amount":1250}`)})
		switch {
		case err != nil:
			http.Error(w, "the transfer can't be published", http.StatusInternalServerError)
		case account == "bob":
			http.Error(w, "there is not enough money", http.StatusPaymentRequired) // undoes the write and the message
		default:
			w.WriteHeader(http.StatusCreated)
		}
	}
	idem := middleware.New(store, func(r *http.Request) (string, error) { return r.Header.Get("Account"), nil }, nil)
	handler := idem.Handler(http.HandlerFunc(transfer))
	for _, account := range []string{"alice", "alice", "bob"} { // Alice's client sends its request twice
		r := httptest.NewRequest(http.MethodPost, "/transfers", nil)
		r.Header.Set("Account", account)
		r.Header.Set("Idempotency-Key", "8e03978e")
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		fmt.Println(account, w.Code, w.Header().Get("Idempotency-Status"))
	}
	var keys []string
	if err := store.Pool().QueryRow(ctx, "SELECT array_agg(convert_from(key, 'UTF8')) FROM message_outbox").Scan(&keys); err != nil {
		panic(err)
	}
	fmt.Println("in the outbox:", keys)
	// Output:
	// alice 201 executed
	// alice 201 replayed
	// bob 402 executed
	// in the outbox: [alice]
}
