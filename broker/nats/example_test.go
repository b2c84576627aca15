package nats_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/broker/nats"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/relay"
	"github.com/paidonce/idempotency/storage/postgres"
)

// A handler publishes a message in its transaction, the relay takes it to NATS, and a consumer
// writes to its own table, once for each message.
func Example() {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	// A NATS server in this process, and a PostgreSQL of its own. A service has both elsewhere.
	folder, err := os.MkdirTemp("", "nats")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(folder) //nolint:errcheck // of an example
	server, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, JetStream: true, StoreDir: folder, NoLog: true, NoSigs: true})
	if err != nil {
		log.Fatal(err)
	}
	server.Start()
	defer server.WaitForShutdown()
	defer server.Shutdown()
	server.ReadyForConnections(time.Minute)
	store, closeStore := testservice.Example(ctx, "CREATE TABLE entries (account text, amount int)")
	defer closeStore()

	client, err := nats.Connect(server.ClientURL(), &nats.Options{SessionTimeout: 5 * time.Second})
	if err != nil {
		log.Fatal(err)
	}
	if err := client.CreateTopic(ctx, "transfers", nil); err != nil {
		log.Fatal(err)
	}
	publisher := client.Publisher()
	defer publisher.Close()
	done := make(chan struct{}, 2)
	go func() {
		relay.New(store.Outbox(), publisher, nil).Run(ctx)
		done <- struct{}{}
	}()

	booked := make(chan string, 1)
	ledger := consumer.New("ledger", store.Inbox(), client.Source("ledger", "transfers"), func(ctx context.Context, d *consumer.Delivery) error {
		_, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO entries VALUES ($1, $2::text::int)", string(d.Key), string(d.Body))
		booked <- string(d.Key) + " " + string(d.Body)
		return err
	}, nil)
	go func() {
		if err := ledger.Run(ctx); err != nil {
			log.Print(err)
		}
		done <- struct{}{}
	}()

	engine := idempotency.NewEngine(store, nil)
	transfer := func(ctx context.Context) (*idempotency.Answer, error) {
		err := message.Publish(ctx, "transfer-made", message.Message{Topic: "transfers", Key: []byte("alice"), Body: []byte("100")})
		return &idempotency.Answer{Status: 201}, err
	}
	request := idempotency.Request{Key: idempotency.Key{Scope: "acme", Value: "8e03978e-40d5-43dd-bc93-6894a57f9324"}}
	request.Fingerprint = idempotency.NewFingerprintV1("POST", "/transfers", "", "application/json", []byte(`{"amount":100}`))
	for range 2 { // the client tries again
		fmt.Println(engine.Do(ctx, request, transfer).Outcome)
	}
	select {
	case entry := <-booked:
		fmt.Println("booked:", entry)
	case <-time.After(time.Minute):
		fmt.Println("nothing arrived")
	}
	stop()
	<-done
	<-done
	// Output:
	// executed
	// replayed
	// booked: alice 100
}
