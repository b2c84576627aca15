package relay_test

import (
	"context"
	"fmt"
	"sync"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/relay"
)

// printer is a broker that prints its messages. Real ones are in broker/.
type printer struct{ published chan int }

func (p printer) Publish(_ context.Context, messages []message.Message) []error {
	for _, m := range messages {
		fmt.Printf("%s %s: %s\n", m.Topic, m.Key, m.Body)
	}
	p.published <- len(messages)
	return make([]error, len(messages)) // all of them are confirmed
}

// Each replica of a service runs a relay beside its HTTP server.
func Example() {
	ctx, stop := context.WithCancel(context.Background())
	store, closeStore := testservice.Example(ctx, "")
	defer closeStore()
	broker := printer{make(chan int)}
	var running sync.WaitGroup
	running.Go(func() { relay.New(store.Outbox(), broker, nil).Run(ctx) })
	defer running.Wait() // the batch under way ends before the store is closed
	defer stop()

	request := idempotency.Request{Key: idempotency.Key{Scope: "acme", Value: "8e03978e"}}
	request.Fingerprint = idempotency.NewFingerprintV1("POST", "/transfers", "", "application/json", []byte(`{"amount":1250}`))
	result := idempotency.NewEngine(store, nil).Do(ctx, request, func(ctx context.Context) (*idempotency.Answer, error) {
		for _, body := range []string{"made", "booked"} {
			if err := message.Publish(ctx, body, message.Message{Topic: "transfers", Key: []byte("alice"), Body: []byte(body)}); err != nil {
				return nil, err
			}
		}
		fmt.Println("nothing is sent before COMMIT")
		return &idempotency.Answer{Status: 201}, nil
	})
	<-broker.published
	fmt.Println(result.Outcome)
	// Output:
	// nothing is sent before COMMIT
	// transfers alice: made
	// transfers alice: booked
	// executed
}
