// Command river shows a job queue inside an idempotent handler. The job is a row of the handler's
// transaction, so there is one for each payment, and none for a request that left nothing. A second
// kind of job ends requests that call another service.
//
//	go run -C examples/river .
package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"github.com/riverqueue/river/rivermigrate"

	"github.com/paidonce/idempotency/effect"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

const workersMax = 4

func main() { start("river", "127.0.0.1:8084", run) }

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
	idem := middleware.New(store, accountID, nil)
	jobs, err := newJobs(store.Pool(), idem)
	if err != nil {
		return err
	}
	handler := newHandler(store, idem, jobs, new(cards).charge)
	if err := jobs.Start(context.WithoutCancel(ctx)); err != nil {
		return err
	}
	err = serve(ctx, address, handler, greet)
	// The requests have ended, so no further job arrives. A job that is not done yet runs after the
	// next start.
	stopping, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
	defer cancel()
	if stopErr := jobs.Stop(stopping); err == nil {
		err = stopErr
	}
	return err
}

// open connects to the database and migrates it: the records, River's tables and the bank's.
func open(ctx context.Context, url string) (*postgres.Store, error) {
	store, err := postgres.Open(ctx, url, nil)
	if err != nil {
		return nil, err
	}
	if err := migrate(ctx, store); err != nil {
		store.Close()
		return nil, err
	}
	return store, nil
}

func migrate(ctx context.Context, store *postgres.Store) error {
	if err := migrations.Up(ctx, store, nil); err != nil {
		return err
	}
	migrator, err := rivermigrate.New(riverpgxv5.New(store.Pool()), nil)
	if err != nil {
		return err
	}
	if _, err := migrator.Migrate(ctx, rivermigrate.DirectionUp, nil); err != nil {
		return err
	}
	_, err = store.Pool().Exec(ctx, schema)
	return err
}

// receipt is the job that notifies the payee of a transfer.
type receipt struct {
	Transfer int64 `json:"transfer"`
}

func (receipt) Kind() string { return "receipt" }

// newJobs returns the queue with its workers. River runs a job again if its worker fails, so the
// number of the transfer keeps the receipt unique.
func newJobs(pool *pgxpool.Pool, idem *middleware.Middleware) (*river.Client[pgx.Tx], error) {
	workers := river.NewWorkers()
	river.AddWorker(workers, resumer(idem))
	river.AddWorker(workers, river.WorkFunc(func(ctx context.Context, job *river.Job[receipt]) error {
		_, err := pool.Exec(ctx, sendReceipt, job.Args.Transfer)
		return err
	}))
	return river.NewClient(riverpgxv5.New(pool), &river.Config{
		Queues:  map[string]river.QueueConfig{river.QueueDefault: {MaxWorkers: workersMax}},
		Workers: workers,
	})
}

const sendReceipt = `
	INSERT INTO river_example.receipts SELECT id, payee, amount FROM river_example.transfers WHERE id = $1
	ON CONFLICT DO NOTHING`

func newHandler(store *postgres.Store, idem *middleware.Middleware, jobs *river.Client[pgx.Tx], charge chargeFunc) http.Handler {
	b := &bank{pool: store.Pool(), jobs: jobs, charge: newCharge(charge)}
	mux := http.NewServeMux()
	topUps := idem.With(func(o *middleware.Options) { o.Resumable = "topup/1" })
	mux.Handle("POST /topups", topUps.Handler(http.HandlerFunc(b.topUp)))
	mux.Handle("POST /transfers", idem.Handler(http.HandlerFunc(b.transfer)))
	mux.HandleFunc("GET /receipts", b.receipts)
	return mux
}

// accountID returns the account that your authentication, mounted outside, has found. If it is
// empty the answer is 401.
func accountID(r *http.Request) (string, error) { return r.Header.Get("Account"), nil }

type bank struct {
	pool   *pgxpool.Pool
	jobs   *river.Client[pgx.Tx]
	charge *effect.Declared[payment, charged]
}

func (b *bank) transfer(w http.ResponseWriter, r *http.Request) {
	var t struct {
		To     string
		Amount int64
	}
	if err := json.NewDecoder(r.Body).Decode(&t); err != nil || t.Amount <= 0 {
		http.Error(w, "send to and a positive amount", http.StatusBadRequest)
		return
	}
	ctx := r.Context()
	tx := postgres.Tx(ctx)
	var id, balance int64
	if err := tx.QueryRow(ctx, moveMoney, r.Header.Get("Account"), t.To, t.Amount).Scan(&id, &balance); err != nil {
		http.Error(w, "the transfer failed", http.StatusInternalServerError)
		return
	}
	// InsertTx, so that a rollback undoes the job too. Insert would use a connection of the pool,
	// and is refused.
	if _, err := b.jobs.InsertTx(ctx, tx, receipt{Transfer: id}, nil); err != nil {
		http.Error(w, "the transfer failed", http.StatusInternalServerError)
		return
	}
	if balance < 0 {
		// The transfer and its job are undone.
		http.Error(w, "there is not enough money", http.StatusPaymentRequired)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusCreated)
	// Ignored: a client that is gone will retry.
	_ = json.NewEncoder(w).Encode(map[string]any{"transfer": id, "to": t.To, "amount": t.Amount})
}

// moveMoney returns the number of the transfer and the payer's balance. It fails if there is no
// such payer or payee.
const moveMoney = `
	WITH payer AS (UPDATE river_example.accounts SET balance = balance - $3::bigint WHERE name = $1 RETURNING name, balance),
	payee AS (UPDATE river_example.accounts SET balance = balance + $3::bigint WHERE name = $2 RETURNING name),
	moved AS (
		INSERT INTO river_example.transfers (payer, payee, amount)
		SELECT payer.name, payee.name, $3 FROM payer, payee RETURNING id)
	SELECT moved.id, payer.balance FROM moved, payer`

const schema = `
	CREATE SCHEMA IF NOT EXISTS river_example;
	CREATE TABLE IF NOT EXISTS river_example.accounts (name text PRIMARY KEY, balance bigint NOT NULL);
	CREATE TABLE IF NOT EXISTS river_example.transfers (
		id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, payer text NOT NULL, payee text NOT NULL, amount bigint NOT NULL);
	CREATE TABLE IF NOT EXISTS river_example.topups (charge text PRIMARY KEY, account text NOT NULL, amount bigint NOT NULL);
	CREATE TABLE IF NOT EXISTS river_example.receipts (transfer bigint PRIMARY KEY, sent_to text NOT NULL, amount bigint NOT NULL);
	INSERT INTO river_example.accounts VALUES ('alice', 10000), ('bob', 0) ON CONFLICT DO NOTHING`

// receipts shows the receipts that were sent.
func (b *bank) receipts(w http.ResponseWriter, r *http.Request) {
	rows, err := b.pool.Query(r.Context(), "SELECT transfer, sent_to, amount FROM river_example.receipts ORDER BY transfer")
	if err != nil {
		http.Error(w, "the receipts can't be read", http.StatusInternalServerError)
		return
	}
	type sent struct {
		Transfer int64  `json:"transfer"`
		SentTo   string `json:"sent_to"`
		Amount   int64  `json:"amount"`
	}
	receipts, err := pgx.CollectRows(rows, pgx.RowToStructByPos[sent])
	if err != nil {
		http.Error(w, "the receipts can't be read", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(receipts)
}

// greet prints lines to try. The first one comes twice, with the same key.
func greet(url string) {
	curl := func(amount int) string {
		return fmt.Sprintf(`curl -i %s/transfers -H 'Account: alice' -H 'Idempotency-Key: %s' -d '{"to":"bob","amount":%d}'`, url, rand.Text(), amount)
	}
	once := curl(1250)
	fmt.Printf(`river is at %s

Send a transfer: 201, Idempotency-Status: executed
  %s
Send it again: 201, Idempotency-Status: replayed, and the same bytes
  %s
Send too much: 402, Idempotency-Status: executed; its job is undone
  %s
There is one receipt:
  curl %s/receipts
Charge a card. The reply of the card's service is lost: 503, Idempotency-Status: unknown
  curl -i %s/topups -H 'Account: alice' -H 'Idempotency-Key: %s' -d '{"card":"card-1","amount":500}'
Send it again after some seconds: a job has brought it to its end. 201, Idempotency-Status: replayed
`, url, once, once, curl(20000), url, url, rand.Text())
}
