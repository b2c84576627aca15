package consumer_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"sync"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/storage/postgres"
)

// A consumer keeps the balances of accounts. The message that it can't read is a dead letter, with
// its reason, and the others go on. The queue is a table here; with a broker the store is
// store.Inbox(), and the source comes from package broker/kafka or broker/nats.
func Example() {
	ctx, stop := context.WithCancel(context.Background())
	store, closeStore := testservice.Example(ctx, "CREATE TABLE balances (account text PRIMARY KEY, amount int)")
	defer closeStore()

	handled := make(chan struct{}, 10)
	book := func(ctx context.Context, m *consumer.Delivery) error {
		var amount int
		if err := json.Unmarshal(m.Body, &amount); err != nil {
			return consumer.Reject(err)
		}
		_, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO balances AS b VALUES ($1, $2) ON CONFLICT (account) DO UPDATE SET amount = b.amount + $2", string(m.Key), amount)
		return err
	}
	queue := store.Queue("bookings")
	balances := consumer.New("balances", queue, queue, book, &consumer.Options{
		OnBatch: func(end consumer.BatchEnd) {
			for range end.Executed + end.Dead {
				handled <- struct{}{}
			}
		},
		Logger: slog.New(slog.DiscardHandler),
	})
	var running sync.WaitGroup
	running.Go(func() { _ = balances.Run(ctx) })
	defer running.Wait() // the batches under way end before the store is closed
	defer stop()

	engine := idempotency.NewEngine(store, nil)
	bodies := []string{"100", `"a lot"`, "50"}
	for i, account := range []string{"alice", "bob", "alice"} {
		request := idempotency.Request{Key: idempotency.Key{Scope: account, Value: fmt.Sprint("key-", i)}}
		request.Fingerprint = idempotency.NewFingerprintV1("POST", "/bookings", "", "application/json", []byte(bodies[i]))
		engine.Do(ctx, request, func(ctx context.Context) (*idempotency.Answer, error) {
			return &idempotency.Answer{Status: 201}, message.Publish(ctx, "booking", message.Message{Topic: "bookings", Key: []byte(account), Body: []byte(bodies[i])})
		})
	}
	for range bodies {
		<-handled
	}
	var balance int
	var dead string
	if err := store.Pool().QueryRow(ctx, "SELECT (SELECT amount FROM balances), convert_from(key, 'UTF8') || ': ' || error FROM message_parked").Scan(&balance, &dead); err != nil {
		panic(err)
	}
	fmt.Println("alice has", balance)
	fmt.Println("dead letter of", dead)
	// Output:
	// alice has 150
	// dead letter of bob: message is rejected: json: cannot unmarshal string into Go value of type int
}

// Together, the messages of a batch are written by one statement.
func ExampleNewBatch() {
	ctx, stop := context.WithCancel(context.Background())
	store, closeStore := testservice.Example(ctx, "CREATE TABLE entries (account text, amount text)")
	defer closeStore()
	handled := make(chan struct{}, 10)
	queue := store.Queue("bookings")
	entries := consumer.NewBatch("entries", queue, queue, func(ctx context.Context, messages []*consumer.Delivery) error {
		var accounts, amounts []string
		for _, m := range messages {
			accounts, amounts = append(accounts, string(m.Key)), append(amounts, string(m.Body))
		}
		_, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO entries SELECT unnest($1::text[]), unnest($2::text[])", accounts, amounts)
		return err
	}, &consumer.Options{BatchMax: 100, OnBatch: func(end consumer.BatchEnd) {
		for range end.Executed {
			handled <- struct{}{}
		}
	}})
	var running sync.WaitGroup
	running.Go(func() { _ = entries.Run(ctx) })
	defer running.Wait()
	defer stop()

	request := idempotency.Request{Key: idempotency.Key{Scope: "acme", Value: "8e03978e"}}
	request.Fingerprint = idempotency.NewFingerprintV1("POST", "/bookings", "", "", nil)
	idempotency.NewEngine(store, nil).Do(ctx, request, func(ctx context.Context) (*idempotency.Answer, error) {
		for _, amount := range []string{"10", "20", "30"} {
			if err := message.Publish(ctx, "booking-"+amount, message.Message{Topic: "bookings", Key: []byte("alice"), Body: []byte(amount)}); err != nil {
				return nil, err
			}
		}
		return &idempotency.Answer{Status: 201}, nil
	})
	for range 3 {
		<-handled
	}
	var amounts string
	if err := store.Pool().QueryRow(ctx, "SELECT string_agg(amount, ' ') FROM entries").Scan(&amounts); err != nil {
		panic(err)
	}
	fmt.Println(amounts)
	// Output: 10 20 30
}
