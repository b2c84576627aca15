package promobserve_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/observe/internal/fixture"
	promobserve "github.com/paidonce/idempotency/observe/prometheus"
	"github.com/paidonce/idempotency/relay"
)

// waitingSource is for tests that call Receive themselves.
type waitingSource struct{}

func (waitingSource) Run(ctx context.Context, _ consumer.Receiver) error { <-ctx.Done(); return nil }

// receive has a consumer receive messages until all are settled.
func receive(t *testing.T, c *consumer.Consumer, partition int32, deliveries ...consumer.Delivery) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); len(deliveries) > 0; {
		settled, pause := c.Receive(t.Context(), consumer.Partition{Source: "transfers", Number: partition}, deliveries)
		if deliveries = deliveries[settled:]; time.Now().After(deadline) {
			t.Fatal("the messages are not settled")
		}
		time.Sleep(min(pause, 10*time.Millisecond))
	}
}

func delivery(offset int64, id int, body string) consumer.Delivery {
	return consumer.Delivery{Offset: offset, Message: message.Message{ID: fmt.Sprintf("00000000-0000-8000-8000-%012d", id), Topic: "transfers", Key: []byte(body), Body: []byte(body)}}
}

// speak publishes and consumes messages, so that every metric of messages has a cause.
func (o *observed) speak(t *testing.T) {
	t.Helper()
	exec := func(sql string) {
		t.Helper()
		if _, err := o.Pool.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	publish := func(key string, bodies ...string) {
		t.Helper()
		result := idempotency.NewEngine(o.Store, nil).Do(t.Context(), idempotency.Request{Key: idempotency.Key{Scope: "acme", Value: key}, Fingerprint: idempotency.NewFingerprintV1("POST", "/", "", "", nil)}, func(ctx context.Context) (*idempotency.Answer, error) {
			for i, body := range bodies {
				if err := message.Publish(ctx, fmt.Sprint("m", i), message.Message{Topic: "transfers", Key: []byte("k"), Body: []byte(body)}); err != nil {
					return nil, err
				}
			}
			return &idempotency.Answer{Status: 201}, nil
		})
		if result.Err != nil {
			t.Fatal(result.Err)
		}
	}
	drain := func(results map[string]error) {
		t.Helper()
		box := o.Store.Outbox()
		shards, err := box.Waiting(t.Context())
		if err != nil || len(shards) != 1 {
			t.Fatalf("%v, %v", shards, err)
		}
		started := time.Now()
		drained, err := box.Drain(t.Context(), shards[0], relay.Limits{Messages: 100, Bytes: 1 << 20}, func(_ context.Context, all []message.Message) []error {
			errs := make([]error, len(all))
			for i := range all {
				if errs[i] = results[string(all[i].Body)]; i > 0 && errs[i-1] != nil {
					errs[i] = errors.New("one in front of it failed")
				}
			}
			return errs
		})
		o.messages.OnDrain(shards[0], drained, time.Since(started), err)
	}
	publish("published", "a", "b")
	drain(map[string]error{"b": errors.New(fixture.Canary)})
	drain(nil)
	publish("refused", "large", "behind")
	drain(map[string]error{"large": fmt.Errorf("%w: %s", relay.ErrRefused, fixture.Canary)})
	exec("UPDATE message_outbox SET refused = 'too large', created_at = now() - interval '90 seconds' WHERE refused IS NOT NULL")
	exec("INSERT INTO message_outbox (created_at, shard, message_id, topic, headers, body) VALUES (now() - interval '90 seconds', 0, gen_random_uuid(), 't', '', '')")

	ledger := consumer.New("ledger", o.Store.Inbox(), waitingSource{}, func(_ context.Context, m *consumer.Delivery) error {
		switch string(m.Body) {
		case "reject":
			return consumer.Reject(errors.New(fixture.Canary))
		case "later":
			return consumer.Later(time.Hour)
		}
		return nil
	}, &consumer.Options{OnBatch: o.messages.OnBatch, Logger: slog.New(slog.DiscardHandler)})
	first := delivery(0, 0, "first")
	receive(t, ledger, 0, first, delivery(1, 1, "reject"), delivery(2, 2, "later"), delivery(3, 3, "later"))
	receive(t, ledger, 0, first)                                                    // delivered again
	receive(t, ledger, 1, delivery(0, 0, "first"), delivery(1, 0, "other content")) // published twice, and an id that was used twice
	receive(t, ledger, 1, delivery(2, 4, "executed"))
	for _, err := range []error{consumer.ErrFenced, consumer.ErrHeld} {
		o.messages.OnBatch(consumer.BatchEnd{Consumer: "ledger", Err: err, Duplicates: 7})
	}
	exec("UPDATE message_parked SET parked_at = now() - interval '90 seconds', not_before = CASE WHEN state = 1 THEN now() - interval '90 seconds' END")
	exec("UPDATE message_offsets SET updated_at = now() - interval '90 seconds', deaths = 1")
	o.unread = errors.New(fixture.Canary)
	scrape(t, o.registry)
	o.unread = nil

	text := scrape(t, o.registry)
	wantLines(t, text,
		`idempotency_messages_published_total{result="published"} 2`, `idempotency_messages_published_total{result="failed"} 2`,
		`idempotency_messages_published_total{result="refused"} 1`, `idempotency_message_publish_duration_seconds_count 3`,
		`idempotency_messages_consumed_total{consumer="ledger",outcome="executed"} 2`, `idempotency_messages_consumed_total{consumer="ledger",outcome="duplicate"} 1`,
		`idempotency_messages_consumed_total{consumer="ledger",outcome="redelivered"} 1`, `idempotency_messages_consumed_total{consumer="ledger",outcome="parked"} 2`,
		`idempotency_messages_consumed_total{consumer="ledger",outcome="dead"} 1`, `idempotency_messages_consumed_total{consumer="ledger",outcome="mismatch"} 1`,
		`idempotency_message_batches_total{consumer="ledger",result="fenced"} 1`, `idempotency_message_batches_total{consumer="ledger",result="held"} 1`,
		`idempotency_messages_outbox 2`, `idempotency_messages_outbox_refused 1`,
		`idempotency_messages_waiting 1`, `idempotency_messages_behind 1`, `idempotency_messages_dead 2`, `idempotency_messages_partitions 2`,
	)
	for _, metric := range []string{"outbox_oldest_seconds", "oldest_dead_seconds", "oldest_due_seconds", "moved_age_seconds", "oldest_begun_seconds"} {
		if s := value(find(t, o.registry, "idempotency_messages_"+metric)); s < 89 || s > 1000 {
			t.Errorf("%s is %v, not about 90 seconds", metric, s)
		}
	}
	if strings.Contains(text, fixture.Canary) {
		t.Error("the scrape holds an error's text")
	}
}

// Past ConsumersMax names share a series.
func TestManyConsumersShareASeries(t *testing.T) {
	t.Parallel()
	registry := prometheus.NewRegistry()
	messages := promobserve.NewMessages(registry)
	for n := range promobserve.ConsumersMax + 2 {
		messages.OnBatch(consumer.BatchEnd{Consumer: fmt.Sprint("c", n), Executed: 1})
	}
	wantLines(t, scrape(t, registry), `idempotency_messages_consumed_total{consumer="other",outcome="executed"} 2`, `idempotency_messages_consumed_total{consumer="c99",outcome="executed"} 1`)
}
