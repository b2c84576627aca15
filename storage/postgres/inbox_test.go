package postgres_test

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
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
	const sql = "INSERT INTO effects (name) VALUES ($1)"
	for name, c := range map[string]struct {
		receiver func(b *testBundle) *consumer.Consumer
		ofBatch  func(n int) int
	}{
		"a statement for each message": {
			func(b *testBundle) *consumer.Consumer { return newReceiver(b, 100, insertBody) },
			func(n int) int { return n + 2 },
		},
		"a deferred statement for each message": {
			func(b *testBundle) *consumer.Consumer {
				return newReceiver(b, 100, func(ctx context.Context, m *consumer.Delivery) error {
					return postgres.DeferExec(ctx, sql, string(m.Body))
				})
			},
			func(int) int { return 2 },
		},
		"a statement for all": {
			func(b *testBundle) *consumer.Consumer {
				return consumer.NewBatch("ledger", b.store.Inbox(), noSource{}, func(ctx context.Context, messages []*consumer.Delivery) error {
					var bodies []string
					for _, m := range messages {
						bodies = append(bodies, string(m.Body))
					}
					_, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO effects (name) SELECT unnest($1::text[])", bodies)
					return err
				}, &consumer.Options{BatchMax: 100, Logger: slog.New(slog.DiscardHandler)})
			},
			func(int) int { return 3 },
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns, c.MinConns = 1, 1 }})
			receiver, next := c.receiver(b), 0
			receive := func(n int) int {
				before := b.wire.Count()
				if settled, pause := receiver.Receive(t.Context(), ledgerPartition, deliveries(next, n)); settled != n || pause != 0 {
					t.Fatalf("%d settled, pause %v", settled, pause)
				}
				next += n
				return b.wire.Count() - before
			}
			receive(1) // counts the process, and warms the connection up
			for _, n := range []int{1, 10, 100} {
				if got, want := receive(n), c.ofBatch(n); got != want {
					t.Errorf("%d messages: %d round trips, want %d", n, got, want)
				}
			}
			next -= 111 // all of them again: each batch is found to be redelivered
			if got := receive(100); got != 2 {
				t.Errorf("100 redelivered messages: %d round trips, want 2", got)
			}
			if n := b.count(t, "SELECT count(*) FROM effects"); n != 112 {
				t.Errorf("%d effects", n)
			}
		})
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

// The promise: the server parses and plans nothing for a batch, of one message or of many. It makes
// five plans before it settles for one.
func TestGatePlansOfABatch(t *testing.T) {
	t.Parallel()
	const plansMax, batches = 5, 20
	for _, n := range []int{1, 100} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			t.Parallel()
			b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns, c.MinConns = 1, 1 }})
			receiver := newReceiver(b, n, insertBody)
			for i := range batches {
				if settled, _ := receiver.Receive(t.Context(), ledgerPartition, deliveries(i*n, n)); settled != n {
					t.Fatalf("%d settled", settled)
				}
			}
			rows, err := b.pool.Query(t.Context(), `SELECT statement, generic_plans, custom_plans FROM pg_prepared_statements WHERE name LIKE 'idempotency\_%'`)
			if err != nil {
				t.Fatal(err)
			}
			used := 0
			var text string
			var generic, custom int64
			if _, err := pgx.ForEachRow(rows, []any{&text, &generic, &custom}, func() error {
				if strings.Contains(text, "unnest") || strings.Contains(text, "message_offsets") {
					used++
					if custom > plansMax || generic+custom < batches-1 {
						t.Errorf("%d plans for %d batches: %s", custom, generic+custom, text)
					}
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			if used != 4 {
				t.Errorf("%d statements of a batch are prepared, want 4", used)
			}
		})
	}
}

// A deferred statement fails at COMMIT, which names no message. The message is found by halving the
// batch, so the others run a few times more, and not once for each of them.
func TestPoisonThatFailsAtCommitIsFoundByHalves(t *testing.T) {
	t.Parallel()
	const messages, poison, runsMax = 64, 21, 4 * 64
	b := setup(t, nil)
	runs := 0
	receiver := newReceiver(b, messages, func(ctx context.Context, m *consumer.Delivery) error {
		runs++
		sql := "INSERT INTO effects (name) VALUES ($1)"
		if m.Offset == poison {
			sql = "INSERT INTO effects (name) SELECT $1 WHERE false"
		}
		return postgres.DeferExec(ctx, sql, m.ID)
	})
	all := deliveries(0, messages)
	for i := range all {
		all[i].Key = nil // none waits behind another
	}
	for settled := 0; settled < messages; {
		n, pause := receiver.Receive(t.Context(), ledgerPartition, all[settled:])
		settled += n
		time.Sleep(pause)
	}
	if effects, distinct := b.count(t, "SELECT count(*) FROM effects"), b.count(t, "SELECT count(DISTINCT name) FROM effects"); effects != messages-1 || distinct != messages-1 {
		t.Errorf("%d effects of %d messages, want %d", effects, distinct, messages-1)
	}
	if parked := b.count(t, "SELECT count(*) FROM message_parked WHERE position = $1", poison); parked != 1 || b.count(t, "SELECT count(*) FROM message_parked") != 1 {
		t.Error("the one that fails is not the one that is parked")
	}
	if runs > runsMax {
		t.Errorf("the handler ran %d times for %d messages", runs, messages)
	}
}

// Each message of a batch may defer as many statements as a request, up to 1000 together.
func TestDeferredMaxOfABatch(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ option, messages, each, refusedFrom int }{
		{3, 10, 3, 30},
		{3, 10, 4, 30},
		{0, 20, 50, 1000},
		{0, 20, 51, 1000},
		{1100, 2, 551, 1100}, // more than 1000 for one message are as many for all
	} {
		b := setup(t, &setupOptions{store: &postgres.Options{DeferredMax: c.option}})
		count, refusedAt := 0, -1
		receiver := newReceiver(b, c.messages, func(ctx context.Context, m *consumer.Delivery) error {
			for range c.each {
				if err := postgres.DeferExec(ctx, "INSERT INTO effects (name) VALUES ($1)", m.ID); err != nil {
					if refusedAt < 0 {
						refusedAt = count
					}
					return err
				}
				count++
			}
			return nil
		})
		settled, _ := receiver.Receive(t.Context(), ledgerPartition, deliveries(0, c.messages))
		if c.messages*c.each <= c.refusedFrom {
			if refusedAt >= 0 || settled != c.messages || b.count(t, "SELECT count(*) FROM effects") != c.messages*c.each {
				t.Errorf("%+v: %d settled, statement %d refused", c, settled, refusedAt)
			}
		} else if refusedAt != c.refusedFrom {
			t.Errorf("%+v: statement %d is the first that is refused", c, refusedAt)
		}
	}
}

// The promise: a batch reads only the records of its own messages, however many its consumer has,
// and whatever statistics the server has of the table.
func TestGateRecordsReadByABatch(t *testing.T) {
	t.Parallel()
	const records, batch, readMax = 5000, 100, 300
	b := setup(t, nil)
	b.exec(t, `INSERT INTO idempotency_keys (created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)
		SELECT now(), now() + interval '1 day', 204, 1, gen_random_uuid(), 'message:ledger', gen_random_uuid()::text, sha256('x'), '\x0100', '' FROM generate_series(1, $1)`, records)
	read := int64(-1)
	receiver := newReceiver(b, batch, func(ctx context.Context, m *consumer.Delivery) error {
		if read >= 0 {
			return nil
		}
		// Those of this session that it has not reported yet: at least those of this transaction.
		return postgres.Tx(ctx).QueryRow(ctx, "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relid = 'idempotency_keys'::regclass").Scan(&read)
	})
	all := deliveries(0, batch)
	if settled, _ := receiver.Receive(t.Context(), ledgerPartition, all); settled != batch {
		t.Fatalf("%d settled", settled)
	}
	if read < 0 || read > readMax {
		t.Errorf("a batch of %d messages reads %d of %d records", batch, read, records)
	}
}
