package postgres_test

import (
	"context"
	"fmt"
	"log/slog"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/storage/postgres"
)

// deliveries returns n messages from an offset on.
func deliveries(from, n int) []consumer.Delivery {
	all := make([]consumer.Delivery, n)
	for i := range all {
		id := fmt.Sprintf("00000000-0000-8000-8000-%012d", from+i)
		all[i] = consumer.Delivery{Offset: int64(from + i), Message: message.Message{ID: id, Topic: "t", Key: []byte("k"), Body: []byte(id)}}
	}
	return all
}

// noSource is for tests that call Receive themselves.
type noSource struct{}

func (noSource) Run(ctx context.Context, _ consumer.Receiver) error { <-ctx.Done(); return nil }

func newReceiver(b *testBundle, batch int, handler consumer.Handler) *consumer.Consumer {
	return consumer.New("ledger", b.store.Inbox(), noSource{}, handler, &consumer.Options{BatchMax: batch, Logger: slog.New(slog.DiscardHandler)})
}

func insertBody(ctx context.Context, m *consumer.Delivery) error {
	_, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO effects (name) VALUES ($1)", string(m.Body))
	return err
}

var ledgerPartition = consumer.Partition{Source: "t"}

// The promise: a batch costs the round trips of its handlers, and two.
func TestRoundTripsOfABatch(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns, c.MinConns = 1, 1 }})
	receiver := newReceiver(b, 100, insertBody)
	next := 0
	receive := func(n int) int {
		before := b.wire.count()
		if settled, pause := receiver.Receive(t.Context(), ledgerPartition, deliveries(next, n)); settled != n || pause != 0 {
			t.Fatalf("%d settled, pause %v", settled, pause)
		}
		next += n
		return b.wire.count() - before
	}
	receive(1) // counts the process, and warms the connection up
	for _, n := range []int{1, 10, 100} {
		if got := receive(n); got != n+2 {
			t.Errorf("%d messages: %d round trips, want %d", n, got, n+2)
		}
	}
	next -= 111 // all of them again: one batch after another is found to be redelivered
	if got := receive(100); got != 2 {
		t.Errorf("100 redelivered messages: %d round trips, want 2", got)
	}
	if n := b.count(t, "SELECT count(*) FROM effects"); n != 112 {
		t.Errorf("%d effects", n)
	}
}

// walConsumedBytesMax is the WAL of a message in a batch of 100, without that of its effect: the
// record, its place in the primary key, and a share of the position.
const walConsumedBytesMax = 400

func TestGateWALOfAConsumedMessage(t *testing.T) {
	t.Parallel()
	const messages, batch = 5000, 100
	b := quiet(t)
	receiver := newReceiver(b, batch, insertBody)
	next := 0
	consumed := func() {
		for range messages / batch {
			if settled, _ := receiver.Receive(t.Context(), ledgerPartition, deliveries(next, batch)); settled != batch {
				t.Fatalf("%d settled", settled)
			}
			next += batch
		}
	}
	plain := func() {
		for range messages / batch {
			tx, err := b.pool.Begin(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range deliveries(next, batch) {
				if _, err := tx.Exec(t.Context(), "INSERT INTO effects (name) VALUES ($1)", string(d.Body)); err != nil {
					t.Fatal(err)
				}
			}
			if err := tx.Commit(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	consumed() // so that the pages exist
	plain()
	bare, ours := b.wal(t, plain), b.wal(t, consumed)
	added := (ours - bare) / messages
	t.Logf("WAL of a message: %d B, of its effect alone %d B: %d B more", ours/messages, bare/messages, added)
	if added > walConsumedBytesMax || added < 100 {
		t.Errorf("a message adds %d B of WAL; the limit is %d", added, walConsumedBytesMax)
	}
}

// However the reply to a batch's COMMIT is lost, each message has one effect.
func TestLostCommitOfABatch(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]pgfault.Fault{"cut before": {Kind: pgfault.CutBefore}, "cut after": {Kind: pgfault.CutAfter}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var armed atomic.Bool
			b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) {
				through(t, c.ConnConfig, func(pgfault.Commit) pgfault.Fault {
					if armed.CompareAndSwap(true, false) {
						return fault
					}
					return pgfault.Fault{}
				})
			}})
			receiver := newReceiver(b, 10, insertBody)
			if settled, _ := receiver.Receive(t.Context(), ledgerPartition, deliveries(0, 1)); settled != 1 {
				t.Fatal("the first message is not settled")
			}
			armed.Store(true)
			for settled := 0; settled < 5; {
				n, pause := receiver.Receive(t.Context(), ledgerPartition, deliveries(1+settled, 5-settled))
				settled += n
				time.Sleep(min(pause, 50*time.Millisecond))
			}
			if armed.Load() {
				t.Error("no COMMIT met the fault")
			}
			if n, records := b.count(t, "SELECT count(*) FROM effects"), b.count(t, "SELECT count(*) FROM idempotency_keys"); n != 6 || records != 6 {
				t.Errorf("%d effects and %d records of 6 messages", n, records)
			}
			if next := b.count(t, "SELECT next_offset FROM message_offsets"); next != 6 {
				t.Errorf("the position is %d", next)
			}
		})
	}
}
