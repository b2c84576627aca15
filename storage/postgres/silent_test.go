package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/relay"
	"github.com/paidonce/idempotency/storage/postgres"
)

// A connection that falls silent (its machine is gone, and no packet says so) holds no relay and no
// consumer for longer than Options.StatementTimeout, whichever of their statements meets it.
func TestSilentConnectionHoldsNoRelayAndNoConsumer(t *testing.T) {
	t.Parallel()
	database := testservice.Database(t, "")
	network, address, err := pgfault.Upstream(database)
	if err != nil {
		t.Fatal(err)
	}
	proxy, err := pgfault.Start(pgfault.Options{Network: network, Address: address})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		proxy.SetPaused(false)
		_ = proxy.Close()
	})
	direct := testservice.On(t, database, nil)
	silent := testservice.On(t, proxy.URL(database), &postgres.Options{StatementTimeout: 200 * time.Millisecond}).Store
	published := 0
	publish := func() {
		published++
		if result := direct.Engine.Do(t.Context(), testservice.Request(idempotency.Key{Scope: "acme", Value: fmt.Sprint(published)}), func(ctx context.Context) (*idempotency.Answer, error) {
			return &idempotency.Answer{Status: 201}, message.Publish(ctx, "made", message.Message{Topic: "t", Key: []byte("k")})
		}); result.Outcome != idempotency.OutcomeExecuted {
			t.Fatalf("%+v", result)
		}
	}
	publish()
	shards, err := direct.Store.Outbox().Waiting(t.Context())
	if err != nil || len(shards) != 1 {
		t.Fatalf("shards %v, %v", shards, err)
	}
	inbox, outbox, queue, p := silent.Inbox(), silent.Outbox(), silent.Queue("t"), consumer.Partition{Source: "t"}
	// drain drains the shard. The connection falls silent, and each message has this result of the
	// broker. A transaction of a call before may still hold the shard.
	drain := func(ctx context.Context, result error) error {
		for {
			d, err := outbox.Drain(ctx, shards[0], relay.Limits{Messages: 10, Bytes: 1 << 20}, func(_ context.Context, messages []message.Message) []error {
				proxy.SetPaused(true)
				return slices.Repeat([]error{result}, len(messages))
			})
			if err != nil || !d.Held {
				return errors.Join(err, d.Err)
			}
		}
	}
	for name, call := range map[string]func(ctx context.Context) error{
		"outbox, waiting": func(ctx context.Context) error { _, err := outbox.Waiting(ctx); return err },
		"outbox, drain":   func(ctx context.Context) error { return drain(ctx, nil) },
		"outbox, silent after the broker's confirmation": func(ctx context.Context) error {
			proxy.SetPaused(false)
			return drain(ctx, nil)
		},
		"outbox, silent while nothing is confirmed": func(ctx context.Context) error {
			proxy.SetPaused(false)
			return drain(ctx, errors.New("later"))
		},
		"inbox, position":      func(ctx context.Context) error { _, err := inbox.Position(ctx, "ledger", p); return err },
		"inbox, count death":   func(ctx context.Context) error { _, err := inbox.CountDeath(ctx, "ledger", p); return err },
		"inbox, forgive death": func(ctx context.Context) error { return inbox.ForgiveDeath(ctx, "ledger", p) },
		"inbox, due":           func(ctx context.Context) error { _, err := inbox.Due(ctx, "ledger", true, 1); return err },
		"inbox, begin parked": func(ctx context.Context) error {
			_, _, err := inbox.BeginParked(ctx, &consumer.ParkedClaim{Consumer: "ledger", ID: "id"})
			return err
		},
		"inbox, repark": func(ctx context.Context) error {
			return inbox.Repark(ctx, "ledger", 1, &consumer.Park{Delivery: &consumer.Delivery{}})
		},
		"queue, waiting": func(ctx context.Context) error { return postgres.QueueWaiting(ctx, queue) },
		"queue, read":    func(ctx context.Context) error { return postgres.QueueRead(ctx, queue, shards[0]) },
	} {
		proxy.SetPaused(false)
		publish()                                                     // the DELETE of a call before may arrive only now
		for try := 0; silent.Pool().Ping(t.Context()) != nil; try++ { // a connection that was cut by the call before
			if try == 100 {
				t.Fatal("no connection")
			}
		}
		proxy.SetPaused(true)
		ended := make(chan error, 1)
		go func() { ended <- call(context.WithoutCancel(t.Context())) }()
		select {
		case err := <-ended:
			if err == nil {
				t.Errorf("%s: no error", name)
			}
		case <-time.After(30 * time.Second):
			t.Errorf("%s: it does not end", name)
			proxy.SetPaused(false)
			<-ended
		}
	}
}
