package endtoend_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/relay"
	"github.com/paidonce/idempotency/storage/postgres"
)

const (
	keyPrefix = "account-"
	clients   = 8
	// copyDelay is the time between a message and its copy. It is longer than streamWindow.
	copyDelay = time.Second
)

// load makes the requests that publish, in steps that the proof allows: so each fault meets
// messages.
type load struct {
	plan      *plan
	engine    *idempotency.Engine
	allowed   atomic.Int64
	next      atomic.Int64
	published atomic.Int64 // requests that are executed
	again     atomic.Int64 // tries of requests that were not the last one
}

// run makes all requests, each until it is executed.
func (l *load) run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var all sync.WaitGroup
	for range clients {
		all.Go(func() {
			for {
				number := l.next.Add(1) - 1
				if number >= int64(l.plan.Messages) {
					return
				}
				for l.allowed.Load() <= number && ctx.Err() == nil {
					sleep(ctx, 2*time.Millisecond)
				}
				if err := l.request(ctx, int(number)); err != nil {
					cancel(err)
				}
				if ctx.Err() != nil {
					return
				}
				l.published.Add(1)
			}
		})
	}
	all.Wait()
	return context.Cause(ctx)
}

// request makes one payment as a client does: it retries until it knows that it was executed.
func (l *load) request(ctx context.Context, number int) error {
	key := idempotency.Key{Scope: "clients", Value: "request-" + strconv.Itoa(number)}
	request := idempotency.Request{Key: key, Fingerprint: idempotency.NewFingerprintV1("POST", "/moves", "", "", []byte(key.Value))}
	for ; ctx.Err() == nil; sleep(ctx, 20*time.Millisecond) {
		result := l.engine.Do(ctx, request, func(ctx context.Context) (*idempotency.Answer, error) {
			m := moved{Number: number, Key: keyPrefix + strconv.Itoa(number%l.plan.Keys)}
			// The row's lock makes the order of the key.
			if err := postgres.Tx(ctx).QueryRow(ctx, "UPDATE accounts SET version = version + 1 WHERE key = $1 RETURNING version", m.Key).Scan(&m.Version); err != nil {
				return nil, err
			}
			body, err := json.Marshal(m)
			if err != nil {
				return nil, err
			}
			return &idempotency.Answer{Status: 201}, message.Publish(ctx, "moved", message.Message{Topic: topic, Key: []byte(m.Key), Body: body})
		})
		switch result.Outcome {
		case idempotency.OutcomeExecuted, idempotency.OutcomeReplayed:
			return nil
		case idempotency.OutcomeMismatch:
			return fmt.Errorf("request %d: %w", number, result.Err)
		}
		l.again.Add(1)
	}
	return ctx.Err()
}

// twice is a publisher that publishes some messages once more under the same id, each after
// copyDelay.
type twice struct {
	relay.Publisher
	plan *plan

	mu      sync.Mutex
	waiting []message.Message
	due     []time.Time
	seen    map[int]bool
	copies  int // confirmed
}

func newTwice(p relay.Publisher, plan *plan) *twice {
	return &twice{Publisher: p, plan: plan, seen: map[int]bool{}}
}

// Publish implements relay.Publisher.
func (t *twice) Publish(ctx context.Context, messages []message.Message) []error {
	results := t.Publisher.Publish(ctx, messages)
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range messages {
		var m moved
		if results[i] != nil || json.Unmarshal(messages[i].Body, &m) != nil || m.Number%(t.plan.Messages/t.plan.Twins) != 0 || t.seen[m.Number] {
			continue
		}
		t.seen[m.Number] = true
		t.waiting, t.due = append(t.waiting, messages[i]), append(t.due, time.Now().Add(copyDelay))
	}
	return results
}

// confirmed returns the number of copies that the broker has.
func (t *twice) confirmed() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.copies
}

// run publishes the copies until ctx ends.
func (t *twice) run(ctx context.Context) {
	for ; ctx.Err() == nil; sleep(ctx, 20*time.Millisecond) {
		t.mu.Lock()
		n := 0
		for n < len(t.due) && time.Now().After(t.due[n]) {
			n++
		}
		batch := t.waiting[:n:n]
		t.waiting, t.due = t.waiting[n:], t.due[n:]
		t.mu.Unlock()
		if n == 0 {
			continue
		}
		publishing, cancel := context.WithTimeout(ctx, publishTimeout)
		results := t.Publisher.Publish(publishing, batch)
		cancel()
		t.mu.Lock()
		for i, err := range results {
			if err == nil {
				t.copies++
			} else {
				t.waiting, t.due = append(t.waiting, batch[i]), append(t.due, time.Now())
			}
		}
		t.mu.Unlock()
	}
}

const publishTimeout = 5 * time.Second

// runRelay runs the relay until ctx ends.
func runRelay(ctx context.Context, store *postgres.Store, p relay.Publisher) {
	relay.New(store.Outbox(), p, &relay.Options{
		PublishTimeout: publishTimeout, PauseMax: 500 * time.Millisecond, Logger: slog.New(slog.DiscardHandler),
	}).Run(ctx)
}
