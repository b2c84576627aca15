// Command consumer is a service that publishes a message for each transfer, and a consumer that
// keeps the statements of accounts from these messages, and handles each once. The queue is a table
// in the same database; package broker/kafka is for Kafka.
//
//	go run ./examples/consumer
package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"
	"sync"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

func run(ctx context.Context, databaseURL, address string) error {
	store, err := postgres.Open(ctx, databaseURL, nil)
	if err != nil {
		return err
	}
	defer store.Close()
	if err := migrations.Up(ctx, store, nil); err != nil {
		return err
	}
	if _, err := store.Pool().Exec(ctx, schema); err != nil {
		return err
	}
	var running sync.WaitGroup
	defer running.Wait() // the batches under way end before the store is closed
	running.Go(func() { postgres.NewReaper(store, nil).Run(ctx) })

	queue := store.Queue("transfers")
	statements := consumer.New("statements", queue, queue, project, nil)
	running.Go(func() { _ = statements.Run(ctx) }) // a queue returns no error

	idem := middleware.New(store, accountID, nil)
	mux := http.NewServeMux()
	mux.Handle("POST /transfers", idem.Handler(http.HandlerFunc(transfer)))
	mux.HandleFunc("GET /statements/{account}", statement(store))
	return serve(ctx, address, mux, greet)
}

func accountID(r *http.Request) (string, error) { return r.Header.Get("Account"), nil }

// Transfer is the body of a request, and of the message about it.
type Transfer struct {
	From   string `json:"from"`
	To     string `json:"to"`
	Amount int64  `json:"amount"`
}

func transfer(w http.ResponseWriter, r *http.Request) {
	var t Transfer
	if err := json.NewDecoder(r.Body).Decode(&t); err != nil || t.To == "" || t.Amount <= 0 {
		http.Error(w, "send to and a positive amount", http.StatusBadRequest)
		return
	}
	ctx := r.Context()
	t.From = r.Header.Get("Account")
	if _, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO consumer.transfers (payer, payee, amount) VALUES ($1, $2, $3)", t.From, t.To, t.Amount); err != nil {
		http.Error(w, "the transfer failed", http.StatusInternalServerError)
		return
	}
	body, _ := json.Marshal(t) // two strings and a number
	// It sends nothing: the message is written with the transfer and the answer, or not at all.
	if err := message.Publish(ctx, "transfer-made", message.Message{Topic: "transfers", Key: []byte(t.From), Body: body}); err != nil {
		http.Error(w, "the transfer can't be published", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusCreated)
	_, _ = w.Write(append(body, '\n'))
}

// project handles one message. Its writes are committed with the deletion of the message, or not at
// all.
func project(ctx context.Context, m *consumer.Delivery) error {
	var t Transfer
	if err := json.Unmarshal(m.Body, &t); err != nil {
		return consumer.Reject(err) // no retry can help: a dead letter at once
	}
	_, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO consumer.entries (account, amount) VALUES ($1, -$3::bigint), ($2, $3)", t.From, t.To, t.Amount)
	return err // tried again; after Options.AttemptsMax a dead letter
}

// statement shows the entries that the consumer has written for an account.
func statement(store *postgres.Store) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		rows, err := store.Pool().Query(r.Context(), "SELECT amount FROM consumer.entries WHERE account = $1 ORDER BY id", r.PathValue("account"))
		if err == nil {
			var amounts []int64
			if amounts, err = pgx.AppendRows([]int64{}, rows, pgx.RowTo[int64]); err == nil {
				w.Header().Set("Content-Type", "application/json")
				_ = json.NewEncoder(w).Encode(amounts)
				return
			}
		}
		http.Error(w, "the statement can't be read", http.StatusInternalServerError)
	}
}

const schema = `
	CREATE SCHEMA IF NOT EXISTS consumer;
	CREATE TABLE IF NOT EXISTS consumer.transfers (id bigserial PRIMARY KEY, payer text NOT NULL, payee text NOT NULL, amount bigint NOT NULL);
	CREATE TABLE IF NOT EXISTS consumer.entries (id bigserial PRIMARY KEY, account text NOT NULL, amount bigint NOT NULL)`

func main() {
	start("consumer", "127.0.0.1:8081", func(ctx context.Context, address string) error {
		url, stop, err := databaseURL(ctx)
		if err != nil {
			return err
		}
		defer stop()
		return run(ctx, url, address)
	})
}

func greet(url string) {
	curl := fmt.Sprintf(`curl -i %s/transfers -H 'Account: alice' -H 'Idempotency-Key: %s' -d '{"to":"bob","amount":1250}'`, url, rand.Text())
	fmt.Printf(`consumer is at %s

Send a transfer: 201, Idempotency-Status: executed
  %s
Send it again: 201, Idempotency-Status: replayed, and the same bytes
  %s
Read what the consumer made of its message: one entry
  curl -i %s/statements/alice
`, url, curl, curl, url)
}
