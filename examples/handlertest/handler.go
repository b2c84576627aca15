package main

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/postgres"
)

// books is the handler's view of a database. A unit test gives it books in memory.
type books interface {
	// transfer moves money and returns the payer's balance. It returns errNoMoney if that is too
	// low.
	transfer(ctx context.Context, from, to string, amount int64) (balance int64, err error)
}

var errNoMoney = errors.New("there is not enough money")

// newHandler returns the whole service on the caller's store and books.
func newHandler(store idempotency.Store, books books) http.Handler {
	account := func(r *http.Request) (string, error) { return r.Header.Get("Account"), nil }
	idem := middleware.New(store, account, nil)
	mux := http.NewServeMux()
	mux.Handle("POST /transfers", idem.Handler(transferHandler(books)))
	return mux
}

// transferHandler is the handler under test.
func transferHandler(books books) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var t struct {
			To     string
			Amount int64
		}
		if err := json.NewDecoder(r.Body).Decode(&t); err != nil || t.Amount <= 0 {
			http.Error(w, "send to and a positive amount", http.StatusBadRequest)
			return
		}
		balance, err := books.transfer(r.Context(), r.Header.Get("Account"), t.To, t.Amount)
		switch {
		case errors.Is(err, errNoMoney):
			http.Error(w, err.Error(), http.StatusPaymentRequired)
		case err != nil:
			http.Error(w, "the transfer failed", http.StatusInternalServerError)
		default:
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusCreated)
			_ = json.NewEncoder(w).Encode(map[string]any{"to": t.To, "amount": t.Amount, "balance": balance})
		}
	}
}

// postgresBooks are the books in production: they write in the transaction of the middleware.
type postgresBooks struct{}

var _ books = postgresBooks{}

func (postgresBooks) transfer(ctx context.Context, from, to string, amount int64) (balance int64, err error) {
	tx := postgres.Tx(ctx)
	if _, err := tx.Exec(ctx, "UPDATE accounts SET balance = balance + $1 WHERE name = $2", amount, to); err != nil {
		return 0, err
	}
	err = tx.QueryRow(ctx, "UPDATE accounts SET balance = balance - $1 WHERE name = $2 RETURNING balance", amount, from).Scan(&balance)
	if err == nil && balance < 0 {
		err = errNoMoney // the handler answers 4xx, and both writes are undone
	}
	return balance, err
}
