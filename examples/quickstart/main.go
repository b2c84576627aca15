// Command quickstart is the smallest service with transfers that can be retried: net/http,
// PostgreSQL and nothing else.
//
//	go run ./examples/quickstart
package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"

	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

func run(ctx context.Context, databaseURL, address string) error {
	store, err := postgres.Open(ctx, databaseURL, nil) // connects, and checks the database
	if err != nil {
		return err
	}
	defer store.Close()
	if err := migrations.Up(ctx, store, nil); err != nil { // creates or upgrades the records' tables
		return err
	}
	if _, err := store.Pool().Exec(ctx, schema); err != nil { // your own tables
		return err
	}
	go postgres.NewReaper(store, nil).Run(ctx) // deletes expired records
	idem := middleware.New(store, accountID, nil)
	mux := http.NewServeMux()
	mux.Handle("POST /transfers", idem.Handler(http.HandlerFunc(transfer)))
	return serve(ctx, address, mux, greet) // an http.Server with timeouts
}

// accountID returns the account that your authentication, mounted outside, found. If empty: 401.
func accountID(r *http.Request) (string, error) { return r.Header.Get("Account"), nil }

func transfer(w http.ResponseWriter, r *http.Request) {
	var t struct {
		To     string
		Amount int64
	}
	if err := json.NewDecoder(r.Body).Decode(&t); err != nil || t.Amount <= 0 {
		http.Error(w, "send to and a positive amount", http.StatusBadRequest)
		return
	}
	tx := postgres.Tx(r.Context()) // its writes commit with the answer, or not at all
	var accounts, balance int64
	err := tx.QueryRow(r.Context(), moveMoney, r.Header.Get("Account"), t.To, t.Amount).Scan(&accounts, &balance)
	switch {
	case err != nil:
		http.Error(w, "the transfer failed", http.StatusInternalServerError) // 5xx: forgotten; a retry runs again
	case accounts != 2:
		http.Error(w, "there is no such account", http.StatusNotFound)
	case balance < 0:
		http.Error(w, "there is not enough money", http.StatusPaymentRequired) // 4xx: recorded; the writes are undone
	default:
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		_ = json.NewEncoder(w).Encode(map[string]any{"to": t.To, "amount": t.Amount, "balance": balance})
	}
}

// moveMoney returns the number of accounts that it found, and the payer's balance.
const moveMoney = `
	WITH moved AS (
		UPDATE quickstart.accounts SET balance = balance + CASE name WHEN $1 THEN -$3::bigint ELSE $3::bigint END
		WHERE name IN ($1, $2) RETURNING name, balance)
	SELECT count(*), coalesce(min(balance) FILTER (WHERE name = $1), 0) FROM moved`

const schema = `
	CREATE SCHEMA IF NOT EXISTS quickstart;
	CREATE TABLE IF NOT EXISTS quickstart.accounts (name text PRIMARY KEY, balance bigint NOT NULL);
	INSERT INTO quickstart.accounts VALUES ('alice', 10000), ('bob', 0) ON CONFLICT DO NOTHING`

func main() {
	start("quickstart", "127.0.0.1:8081", func(ctx context.Context, address string) error {
		url, stop, err := databaseURL(ctx)
		if err != nil {
			return err
		}
		defer stop()
		return run(ctx, url, address)
	})
}

// greet prints lines to try. It prints the same line twice on purpose: both have the same key.
func greet(url string) {
	curl := fmt.Sprintf(`curl -i %s/transfers -H 'Account: alice' -H 'Idempotency-Key: %s' -d '{"to":"bob","amount":1250}'`, url, rand.Text())
	fmt.Printf(`quickstart is at %s

Send a transfer: 201, Idempotency-Status: executed
  %s
Send it again: 201, Idempotency-Status: replayed, and the same bytes
  %s
`, url, curl, curl)
}
