package kafka_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"sync"
	"time"

	"github.com/twmb/franz-go/pkg/kfake"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/broker/kafka"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/relay"
	"github.com/paidonce/idempotency/storage/postgres"
)

// The README shows this part, and a test compares the two.

func keepStatements(ctx context.Context, store *postgres.Store, client *kafka.Client) error {
	source := client.Source("statements", "transfers") // a consumer group, and its topics
	return consumer.New("statements", store.Inbox(), source, project, nil).Run(ctx)
}

func project(ctx context.Context, m *consumer.Delivery) error {
	var t Transfer
	if err := json.Unmarshal(m.Body, &t); err != nil {
		return consumer.Reject(err) // no retry can help: a dead letter at once
	}
	_, err := postgres.Tx(ctx).Exec(ctx, addEntries, t.From, t.To, t.Amount)
	return err // it runs again, at once or later; after Options.AttemptsMax a dead letter
}

type Transfer struct {
	From, To string
	Amount   int64
}

const addEntries = "INSERT INTO entries (account, amount) VALUES ($1, -$3::bigint), ($2, $3)"

// twice publishes each message twice, as a relay does if it dies before it deletes the messages.
type twice struct{ relay.Publisher }

func (p twice) Publish(ctx context.Context, messages []message.Message) []error {
	p.Publisher.Publish(ctx, messages)
	return p.Publisher.Publish(ctx, messages)
}

// A handler publishes a message in its transaction, a relay takes it to Kafka, and a consumer
// writes to its own table. The client sends its request twice, and the relay publishes the message
// twice: there is one effect.
func Example() {
	ctx, stop := context.WithCancel(context.Background())
	// A Kafka broker in this process, and a PostgreSQL of its own. A service has both elsewhere.
	cluster, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.SeedTopics(3, "transfers"))
	if err != nil {
		log.Fatal(err)
	}
	defer cluster.Close()
	store, closeStore := testservice.Example(ctx, "CREATE TABLE entries (id bigserial, account text, amount bigint)")
	defer closeStore()
	client, err := kafka.Connect(cluster.ListenAddrs(), nil)
	if err != nil {
		log.Fatal(err)
	}
	publisher := client.Publisher()
	defer publisher.Close()
	var running sync.WaitGroup
	defer running.Wait()
	defer stop()
	running.Go(func() { relay.New(store.Outbox(), twice{publisher}, nil).Run(ctx) })
	running.Go(func() {
		if err := keepStatements(ctx, store, client); err != nil {
			log.Print(err)
		}
	})

	transfer := func(ctx context.Context) (*idempotency.Answer, error) { // an HTTP handler does the same
		t := Transfer{"alice", "bob", 1250}
		body, err := json.Marshal(t)
		if err != nil {
			return nil, err
		}
		err = message.Publish(ctx, "transfer-made", message.Message{Topic: "transfers", Key: []byte(t.From), Body: body})
		return &idempotency.Answer{Status: 201}, err
	}
	request := idempotency.Request{Key: idempotency.Key{Scope: "acme", Value: "8e03978e-40d5-43dd-bc93-6894a57f9324"}}
	request.Fingerprint = idempotency.NewFingerprintV1("POST", "/transfers", "", "application/json", []byte(`{"amount":1250}`))
	engine := idempotency.NewEngine(store, nil)
	for range 2 { // the reply was lost, and the client tries again
		fmt.Println(engine.Do(ctx, request, transfer).Outcome)
	}

	copies, entries := 0, ""
	for deadline := time.Now().Add(time.Minute); copies < 2 && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		err := store.Pool().QueryRow(ctx, "SELECT coalesce(sum(greatest(next_offset, 0)), 0), (SELECT coalesce(string_agg(account || ' ' || amount, ', ' ORDER BY id), '') FROM entries) FROM message_offsets").Scan(&copies, &entries)
		if err != nil {
			log.Fatal(err)
		}
	}
	fmt.Printf("%d copies, 1 effect: %s\n", copies, entries)
	// Output:
	// executed
	// replayed
	// 2 copies, 1 effect: alice -1250, bob 1250
}
