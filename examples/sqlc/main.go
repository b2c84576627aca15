// Command sqlc shows generated queries inside an idempotent handler. Those for pgx take the
// transaction by WithTx; those for database/sql find it in the context. No query changes.
//
//	go run ./examples/sqlc
package main

import (
	"context"
	"crypto/rand"
	"database/sql"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"

	"github.com/paidonce/idempotency/examples/sqlc/ledger"
	"github.com/paidonce/idempotency/examples/sqlc/ledgersql"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/sqldb"
)

//go:embed ledger/schema.sql
var schema string

func main() { start("sqlc", "127.0.0.1:8083", run) }

func run(ctx context.Context, address string) error {
	url, stop, err := databaseURL(ctx)
	if err != nil {
		return err
	}
	defer stop()
	store, err := open(ctx, url)
	if err != nil {
		return err
	}
	defer store.Close()

	db := sqldb.Open(store, nil) // once, for all queries that were generated for database/sql
	defer func() { _ = db.Close() }()
	b := &bank{queries: ledger.New(store.Pool()), sqlQueries: ledgersql.New(db)}
	idem := middleware.New(store, accountID, nil)
	mux := http.NewServeMux()
	mux.Handle("POST /transfers", idem.Handler(http.HandlerFunc(b.transfer)))
	mux.Handle("POST /deposits", idem.Handler(http.HandlerFunc(b.deposit)))
	mux.HandleFunc("GET /transfers", b.transfers)
	return serve(ctx, address, mux, greet)
}

// open connects to the database and migrates it.
func open(ctx context.Context, url string) (*postgres.Store, error) {
	store, err := postgres.Open(ctx, url, nil)
	if err != nil {
		return nil, err
	}
	if err = migrations.Up(ctx, store, nil); err == nil {
		_, err = store.Pool().Exec(ctx, schema)
	}
	if err != nil {
		store.Close()
		return nil, err
	}
	return store, nil
}

// accountID returns the account that your authentication, mounted outside, has found. If it is
// empty the answer is 401.
func accountID(r *http.Request) (string, error) { return r.Header.Get("Account"), nil }

type bank struct {
	queries    *ledger.Queries    // on the pool
	sqlQueries *ledgersql.Queries // on the transaction of each call's context
}

// transfer writes, so its queries run in the middleware's transaction. Queries on the pool would be
// refused here, because a rollback would not undo their writes.
func (b *bank) transfer(w http.ResponseWriter, r *http.Request) {
	var t struct {
		To     string
		Amount int64
	}
	if err := json.NewDecoder(r.Body).Decode(&t); err != nil || t.Amount <= 0 {
		http.Error(w, "send to and a positive amount", http.StatusBadRequest)
		return
	}
	ctx, from := r.Context(), r.Header.Get("Account")
	queries := b.queries.WithTx(postgres.Tx(ctx))

	accounts, err := queries.MoveMoney(ctx, ledger.MoveMoneyParams{Payer: from, Payee: t.To, Amount: t.Amount})
	overdrawn := func(account ledger.MoveMoneyRow) bool { return account.Name == from && account.Balance < 0 }
	switch {
	case err != nil:
		http.Error(w, "the transfer failed", http.StatusInternalServerError)
		return
	case len(accounts) != 2:
		http.Error(w, "there is no such account", http.StatusNotFound)
		return
	case slices.ContainsFunc(accounts, overdrawn):
		http.Error(w, "there is not enough money", http.StatusPaymentRequired) // the move is undone
		return
	}
	transfer, err := queries.CreateTransfer(ctx, ledger.CreateTransferParams{Payer: from, Payee: t.To, Amount: t.Amount})
	if err != nil {
		http.Error(w, "the transfer failed", http.StatusInternalServerError)
		return
	}
	writeJSON(w, http.StatusCreated, transfer)
}

// deposit uses queries that sqlc generated for database/sql. They run in the middleware's transaction
// because they get the request's context.
func (b *bank) deposit(w http.ResponseWriter, r *http.Request) {
	var d struct{ Amount int64 }
	if err := json.NewDecoder(r.Body).Decode(&d); err != nil || d.Amount <= 0 {
		http.Error(w, "send a positive amount", http.StatusBadRequest)
		return
	}
	account, err := b.sqlQueries.Deposit(r.Context(), ledgersql.DepositParams{Name: r.Header.Get("Account"), Balance: d.Amount})
	switch {
	case errors.Is(err, sql.ErrNoRows):
		http.Error(w, "there is no such account", http.StatusNotFound)
	case err != nil:
		http.Error(w, "the deposit failed", http.StatusInternalServerError)
	default:
		writeJSON(w, http.StatusCreated, account)
	}
}

// transfers only reads, so it needs no key and no transaction: the same queries, on the pool.
func (b *bank) transfers(w http.ResponseWriter, r *http.Request) {
	transfers, err := b.queries.ListTransfers(r.Context(), r.Header.Get("Account"))
	if err != nil {
		http.Error(w, "the transfers can't be read", http.StatusInternalServerError)
		return
	}
	writeJSON(w, http.StatusOK, transfers)
}

func writeJSON(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // a client that is gone will retry
}

// greet prints lines to try. It prints the same line twice on purpose: both have the same key.
func greet(url string) {
	curl := fmt.Sprintf(`curl -i %s/transfers -H 'Account: alice' -H 'Idempotency-Key: %s' -d '{"to":"bob","amount":1250}'`, url, rand.Text())
	fmt.Printf(`sqlc is at %s

Send a transfer: 201, Idempotency-Status: executed
  %s
Send it again: 201, Idempotency-Status: replayed, and the same bytes
  %s
There is one:
  curl %s/transfers -H 'Account: alice'
A deposit, by queries for database/sql:
  curl -i %s/deposits -H 'Account: alice' -H 'Idempotency-Key: %s' -d '{"amount":500}'
`, url, curl, curl, url, url, rand.Text())
}
