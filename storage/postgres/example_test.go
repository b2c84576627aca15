package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

// A service opens its store, brings the schema up to date, and serves.
func ExampleOpen() {
	ctx := context.Background()
	store, err := postgres.Open(ctx, os.Getenv("DATABASE_URL"), &postgres.Options{
		LockTimeout: 2 * time.Second, // nil options are fine
		PoolConfig:  func(config *pgxpool.Config) { config.MaxConns = 50 },
	})
	if err != nil {
		panic(err)
	}
	defer store.Close()
	if err := migrations.Up(ctx, store, nil); err != nil {
		panic(err)
	}

	account := func(r *http.Request) (string, error) { return r.Header.Get("Account"), nil }
	idem := middleware.New(store, account, nil)
	mux := http.NewServeMux()
	mux.Handle("POST /transfers", idem.Handler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusCreated) })))
}

// A program that has a pool already puts its config through Configure, and checks the store.
func ExampleNew() {
	ctx := context.Background()
	options := &postgres.Options{LockTimeout: 2 * time.Second} // the same for Configure and New
	config, err := pgxpool.ParseConfig(os.Getenv("DATABASE_URL"))
	if err != nil {
		panic(err)
	}
	postgres.Configure(config, options)
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		panic(err)
	}
	defer pool.Close()
	store := postgres.New(pool, options)
	if err := store.Check(ctx); err != nil {
		panic(err)
	}
}

// A handler's writes go through Tx. They are committed with a 2xx answer, and undone with a 4xx or
// 5xx.
func ExampleTx() {
	_ = func(w http.ResponseWriter, r *http.Request) {
		ctx := r.Context()
		tx := postgres.Tx(ctx)
		if _, err := tx.Exec(ctx, "INSERT INTO transfers (payee, amount) VALUES ($1, $2)", "bob", 1250); err != nil {
			http.Error(w, "the transfer failed", http.StatusInternalServerError)
			return
		}
		w.WriteHeader(http.StatusCreated)
	}
}

// A phase is committed before the handler goes on: here the number of an invoice, before it is sent
// to another service. The first run ends after it; the second one gets the same number.
func ExamplePhase() {
	ctx := context.Background()
	store, closeStore := testservice.Example(ctx, "CREATE TABLE invoices (number serial PRIMARY KEY)")
	defer closeStore()

	runs := 0
	run := func(ctx context.Context) (*idempotency.Answer, error) {
		runs++
		number, err := postgres.Phase(ctx, "number", func(tx pgx.Tx) (number int, err error) {
			return number, tx.QueryRow(ctx, "INSERT INTO invoices DEFAULT VALUES RETURNING number").Scan(&number)
		})
		if err != nil {
			return nil, err
		}
		fmt.Println("run", runs, "has invoice", number)
		if runs == 1 {
			return nil, errors.New("the machine was stopped")
		}
		return &idempotency.Answer{Status: http.StatusCreated}, nil
	}
	engine := idempotency.NewEngine(store, nil)
	engine.Resumable("invoice/1", func(idempotency.Key, []byte) (idempotency.RunFunc, error) { return run, nil })
	result := engine.Do(ctx, idempotency.Request{
		Key:         idempotency.Key{Scope: "acme", Value: "invoice-of-may"},
		Fingerprint: idempotency.NewFingerprintV1("POST", "/invoices", "", "", nil),
		Resumable:   "invoice/1", Stored: func() []byte { return nil },
	}, run)
	fmt.Println(result.Outcome)

	completer := idempotency.NewCompleter(engine, nil)
	for runs == 1 {
		if _, err := completer.Once(ctx); err != nil {
			panic(err)
		}
	}
	// Output:
	// run 1 has invoice 1
	// unknown
	// run 2 has invoice 1
}

// Every replica may run a reaper. The program starts it, and stops it by ending its context.
func ExampleReaper() {
	var store *postgres.Store // see Open
	ctx, stop := context.WithCancel(context.Background())
	reaper := postgres.NewReaper(store, &postgres.ReaperOptions{
		OnWalk: func(deleted int64, duration time.Duration, err error) {
			slog.Info("expired records are deleted", "deleted", deleted, "duration", duration, "error", err)
		},
	})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		reaper.Run(ctx)
	}()

	stop()
	<-stopped
}

// The last writes of a handler travel with the record and COMMIT if it does not need their results.
// The balance was locked and checked before, so by now the handler knows its answer.
func ExampleDeferExec() {
	ctx := context.Background()
	store, closeStore := testservice.Example(ctx, "CREATE TABLE accounts (id text PRIMARY KEY, balance bigint NOT NULL); INSERT INTO accounts VALUES ('alice', 1000), ('bob', 0)")
	defer closeStore()

	transfer := func(w http.ResponseWriter, r *http.Request) {
		ctx := r.Context()
		var balance int64
		const look = "SELECT balance FROM accounts WHERE id = $1 FOR NO KEY UPDATE"
		if err := postgres.Tx(ctx).QueryRow(ctx, look, "alice").Scan(&balance); err != nil {
			http.Error(w, "the transfer failed", http.StatusInternalServerError)
			return
		}
		if balance < 250 {
			http.Error(w, "not enough money", http.StatusPaymentRequired)
			return
		}
		// Each must touch one row. An error fails the request even if it is ignored.
		_ = postgres.DeferExec(ctx, "UPDATE accounts SET balance = balance - $2 WHERE id = $1", "alice", 250)
		_ = postgres.DeferExec(ctx, "UPDATE accounts SET balance = balance + $2 WHERE id = $1", r.FormValue("to"), 250)
		w.WriteHeader(http.StatusCreated)
	}

	account := func(*http.Request) (string, error) { return "alice", nil }
	handler := middleware.New(store, account, nil).Handler(http.HandlerFunc(transfer))
	for _, to := range []string{"bob", "bbo"} {
		r := httptest.NewRequest(http.MethodPost, "/transfers?to="+to, nil)
		r.Header.Set("Idempotency-Key", "transfer-to-"+to)
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		fmt.Println(to, w.Code, w.Header().Get("Idempotency-Status"))
	}
	// Output:
	// bob 201 executed
	// bbo 500 not-executed
}
