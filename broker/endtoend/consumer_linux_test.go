package endtoend_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/storage/postgres"
)

const (
	consumerName = "ledger"

	batchMax     = 20
	batchTimeout = 2 * time.Second
	// idleTimeout is the time for which a process that is stopped in a transaction holds its
	// partition.
	idleTimeout = 2500 * time.Millisecond
	// handlerMax makes batches long enough for faults to hit.
	handlerMax = 4 * time.Millisecond
)

// event is a line that a consumer process prints.
type event struct {
	Kind      kind  `json:"kind"`
	Partition int32 `json:"partition"`

	// Of a batch that has ended.
	Duplicates  int    `json:"duplicates,omitempty"`
	Redelivered int    `json:"redelivered,omitempty"`
	Failure     string `json:"failure,omitempty"`
}

type kind string

const (
	assigned kind = "assigned" // the process begins with the partition
	handled  kind = "handled"  // a message's effect is written, and not committed
	ended    kind = "ended"    // a batch, committed or not
)

// Failures of batches.
const (
	failureHeld   = "held"   // another process has the partition
	failureFenced = "fenced" // another process was faster
	failureOther  = "other"  // the database was away, say
)

// moved is the body of a message.
type moved struct {
	Number  int    `json:"number"` // of the request, from 0
	Key     string `json:"key"`
	Version int    `json:"version"` // of the key, from 1
}

// consume is a consumer process.
func (c child) consume(ctx context.Context) error {
	store, err := openStore(ctx, c.DatabaseURL, &postgres.Options{
		IdleInTransactionTimeout: idleTimeout, PoolConfig: func(c *pgxpool.Config) { c.MaxConns = 8 },
	})
	if err != nil {
		return err
	}
	defer store.Close()
	logger := slog.New(slog.NewTextHandler(os.Stderr, nil))
	from, err := c.Source.open(logger)
	if err != nil {
		return err
	}
	tell := teller()
	handle := func(ctx context.Context, d *consumer.Delivery) error {
		var m moved
		if err := json.Unmarshal(d.Body, &m); err != nil {
			return consumer.Reject(err)
		}
		_, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO effects (key, version, process) VALUES ($1, $2, $3)", m.Key, m.Version, c.Number)
		if err == nil {
			tell(event{Kind: handled, Partition: ctx.Value(partitionKey{}).(int32)})
			sleep(ctx, rand.N(handlerMax))
		}
		return err
	}
	return consumer.New(consumerName, store.Inbox(), watchedSource{from, tell}, handle, &consumer.Options{
		BatchMax: batchMax, BatchTimeout: batchTimeout, Logger: logger,
		OnBatch: func(end consumer.BatchEnd) {
			e := event{Kind: ended, Partition: end.Partition.Number}
			switch {
			case end.Err == nil:
				e.Duplicates, e.Redelivered = end.Duplicates, end.Redelivered
			case errors.Is(end.Err, consumer.ErrHeld):
				e.Failure = failureHeld
			case errors.Is(end.Err, consumer.ErrFenced):
				e.Failure = failureFenced
			default:
				e.Failure = failureOther
			}
			tell(e)
		},
	}).Run(ctx)
}

// openStore opens a store. It tries again while the database is away.
func openStore(ctx context.Context, databaseURL string, opts *postgres.Options) (*postgres.Store, error) {
	for {
		store, err := postgres.Open(ctx, databaseURL, opts)
		if err == nil || ctx.Err() != nil {
			return store, err
		}
		fmt.Fprintln(os.Stderr, err)
		sleep(ctx, 50*time.Millisecond)
	}
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// teller returns a function that prints events at once, so that they arrive even if kill -9
// follows.
func teller() func(event) {
	var mu sync.Mutex
	return func(e event) {
		line, err := json.Marshal(e)
		if err != nil {
			panic(err)
		}
		mu.Lock()
		defer mu.Unlock()
		_, _ = os.Stdout.Write(append(line, '\n')) // if nobody reads it, the process ends soon
	}
}

// watchedSource prints which partitions its receiver gets.
type watchedSource struct {
	consumer.Source
	tell func(event)
}

func (s watchedSource) Run(ctx context.Context, receiver consumer.Receiver) error {
	return s.Source.Run(ctx, watchedReceiver{receiver, s.tell})
}

type watchedReceiver struct {
	consumer.Receiver
	tell func(event)
}

func (r watchedReceiver) Assigned(ctx context.Context, p consumer.Partition) (int64, error) {
	at, err := r.Receiver.Assigned(ctx, p)
	if err == nil {
		r.tell(event{Kind: assigned, Partition: p.Number})
	}
	return at, err
}

// partitionKey is the key of a handler's partition in its context.
type partitionKey struct{}

func (r watchedReceiver) Receive(ctx context.Context, p consumer.Partition, deliveries []consumer.Delivery) (int, time.Duration) {
	return r.Receiver.Receive(context.WithValue(ctx, partitionKey{}, p.Number), p, deliveries)
}
