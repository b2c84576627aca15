package sqldb_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"

	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/postgres/sqldb"
)

// The *sql.DB is opened once. In a handler its calls go to the transaction of the request, whoever
// makes them.
func Example() {
	ctx := context.Background()
	store, closeStore := testservice.Example(ctx, "CREATE TABLE transfers (payee text, amount bigint)")
	defer closeStore()
	db := sqldb.Open(store, &sqldb.Options{Pool: true}) // Pool: also for requests without a key
	defer func() { _ = db.Close() }()

	account := func(r *http.Request) (string, error) { return r.Header.Get("Account"), nil }
	transfer := middleware.New(store, account, nil).Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := db.ExecContext(r.Context(), "INSERT INTO transfers VALUES ($1, $2)", "bob", 1250); err != nil {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		if r.Header.Get("Account") == "poor" {
			w.WriteHeader(http.StatusPaymentRequired) // the insert is undone
			return
		}
		w.WriteHeader(http.StatusCreated)
	}))
	for _, account := range []string{"alice", "alice", "poor"} {
		r := httptest.NewRequestWithContext(ctx, http.MethodPost, "/transfers", nil)
		r.Header.Set("Account", account)
		r.Header.Set("Idempotency-Key", "8e03978e")
		w := httptest.NewRecorder()
		transfer.ServeHTTP(w, r)
		fmt.Println(w.Code, w.Header().Get("Idempotency-Status"))
	}
	var transfers int
	if err := db.QueryRowContext(ctx, "SELECT count(*) FROM transfers").Scan(&transfers); err != nil {
		panic(err)
	}
	fmt.Println(transfers, "transfer")
	// Output:
	// 201 executed
	// 201 replayed
	// 402 executed
	// 1 transfer
}
