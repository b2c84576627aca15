package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/relay"
	"github.com/paidonce/idempotency/storage/postgres"
)

// publishMail makes a request that publishes one message.
func (b *testBundle) publishMail(t *testing.T, engine *idempotency.Engine, topic, key, body string) {
	t.Helper()
	if result := engine.Do(t.Context(), request(topic+"-"+body, ""), func(ctx context.Context) (*idempotency.Answer, error) {
		return answer(201), message.Publish(ctx, "mail", text(topic, key, body))
	}); result.Outcome != idempotency.OutcomeExecuted {
		t.Fatalf("%+v", result)
	}
}

func (b *testBundle) effectsInOrder(t *testing.T) string {
	t.Helper()
	rows, err := b.pool.Query(t.Context(), "SELECT name FROM effects ORDER BY id")
	if err != nil {
		t.Fatal(err)
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(names, " ")
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

// Several processes consume one queue: each message has one effect, in the order of its key, and no
// record and no position are kept. A message that they can't handle is parked, and those of its key
// behind it.
func TestQueueHandlesEachMessageOnce(t *testing.T) {
	t.Parallel()
	for _, size := range []int{1, 20} {
		t.Run(fmt.Sprint("batches of ", size), func(t *testing.T) {
			t.Parallel()
			const messages, keys, processes = 200, 9, 3
			b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns = 30 }})
			engine := idempotency.NewEngine(b.store, nil)
			ctx, stop := context.WithCancel(t.Context())
			var running sync.WaitGroup
			t.Cleanup(running.Wait)
			t.Cleanup(stop)
			var mu sync.Mutex
			heals := false
			handler := func(ctx context.Context, m *consumer.Delivery) error {
				mu.Lock()
				defer mu.Unlock()
				if string(m.Body) == "poison" && !heals {
					return consumer.Reject(errors.New("poison"))
				}
				return insertBody(ctx, m)
			}
			for range processes {
				running.Go(func() {
					queue := b.store.Queue("mails")
					_ = consumer.New("mailer", queue, queue, handler, &consumer.Options{BatchMax: size, ParkedInterval: 5 * time.Millisecond, Logger: slog.New(slog.DiscardHandler)}).Run(ctx)
				})
			}
			made := map[string]int{}
			for range messages {
				key := fmt.Sprint("k", rand.IntN(keys))
				b.publishMail(t, engine, "mails", key, fmt.Sprint(key, ":", made[key]))
				made[key]++
			}
			b.publishMail(t, engine, "mails", "bad", "poison")
			b.publishMail(t, engine, "mails", "bad", "behind")
			b.publishMail(t, engine, "others", "k0", "others")
			eventually(t, "only the other topic is left", func() bool { return b.count(t, "SELECT count(*) FROM message_outbox") == 1 })
			next := map[string]int{}
			for _, name := range strings.Fields(b.effectsInOrder(t)) {
				key, _, _ := strings.Cut(name, ":")
				if want := fmt.Sprint(key, ":", next[key]); name != want {
					t.Fatalf("%s came where %s was due", name, want)
				}
				next[key]++
			}
			if fmt.Sprint(next) != fmt.Sprint(made) {
				t.Errorf("handled %v, want %v", next, made)
			}
			if n := b.count(t, "SELECT count(*) FROM message_parked WHERE consumer = 'mailer'"); n != 2 {
				t.Errorf("%d messages are parked, want the poison and the one behind it", n)
			}
			if n := b.count(t, "SELECT count(*) FROM idempotency_keys WHERE scope LIKE 'message:%'"); n != 0 {
				t.Errorf("%d records of messages", n)
			}
			mu.Lock()
			heals = true
			mu.Unlock()
			b.exec(t, "UPDATE message_parked SET state = 1, attempts = 0, not_before = now() WHERE state = 3")
			eventually(t, "nothing is parked", func() bool { return b.count(t, "SELECT count(*) FROM message_parked") == 0 })
			if got := b.effectsInOrder(t); !strings.HasSuffix(got, "poison behind") {
				t.Errorf("effects end with %q", got[len(got)-40:])
			}
		})
	}
}

// dyingQueue is the queue of a process that is about to die: it takes nothing back.
type dyingQueue struct{ *postgres.Queue }

func (dyingQueue) ForgiveDeath(context.Context, string, consumer.Partition) error {
	return errors.New("the process is dead")
}

// The message of a queue that ends its process is found, and the others are handled.
func TestQueueFindsTheMessageThatKillsItsProcess(t *testing.T) {
	t.Parallel()
	const deathsMax = 20
	b := setup(t, nil)
	engine := idempotency.NewEngine(b.store, nil)
	for _, body := range []string{"a", "killer", "b"} {
		b.publishMail(t, engine, "mails", body, body)
	}
	b.exec(t, "UPDATE message_outbox SET shard = 7")
	handled := func() bool { return b.count(t, "SELECT count(*) FROM message_outbox") == 0 }
	for deaths := 0; !handled(); deaths++ {
		if deaths > deathsMax {
			t.Fatalf("not found after %d deaths", deathsMax)
		}
		ctx, die := context.WithCancel(t.Context())
		queue := dyingQueue{b.store.Queue("mails")}
		var running sync.WaitGroup
		running.Go(func() {
			_ = consumer.New("mailer", queue, queue, func(ctx context.Context, m *consumer.Delivery) error {
				if string(m.Body) == "killer" {
					die() // as far as the database can tell, the process is gone
					return ctx.Err()
				}
				return insertBody(ctx, m)
			}, &consumer.Options{BatchMax: 10, Logger: slog.New(slog.DiscardHandler)}).Run(ctx)
		})
		eventually(t, "the process is dead, or all is handled", func() bool { return ctx.Err() != nil || handled() })
		die()
		running.Wait()
	}
	if got := b.effectsInOrder(t); got != "a b" {
		t.Errorf("effects %q", got)
	}
	if n := b.count(t, "SELECT count(*) FROM message_parked WHERE error = '5 processes ended before it was handled'"); n != 1 {
		t.Errorf("%d messages are parked for the deaths", n)
	}
}

// A message with a lower id that is committed later is handled, and somebody's long
// transaction delays no message.
func TestQueueHandlesAMessageThatIsCommittedLate(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	begin := func(sql string) pgx.Tx {
		tx, err := b.pool.Begin(t.Context())
		if err == nil {
			_, err = tx.Exec(t.Context(), sql)
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = tx.Rollback(context.Background()) })
		return tx
	}
	engine := idempotency.NewEngine(b.store, nil)
	begin("INSERT INTO effects (name) VALUES ('unrelated')")
	b.publishMail(t, engine, "mails", "k", "first")
	late := begin("INSERT INTO message_outbox (created_at, shard, message_id, topic, key, headers, body) SELECT now(), shard, gen_random_uuid(), topic, key, headers, 'late' FROM message_outbox")
	b.publishMail(t, engine, "mails", "k", "second")

	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	t.Cleanup(running.Wait)
	t.Cleanup(stop)
	queue := b.store.Queue("mails")
	running.Go(func() { _ = consumer.New("mailer", queue, queue, insertBody, nil).Run(ctx) })
	eventually(t, "both are handled", func() bool { return b.effectsInOrder(t) == "first second" })
	if err := late.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the late one is handled too", func() bool { return b.effectsInOrder(t) == "first second late" })
}

// A relay leaves the topic of a queue out, and takes the others.
func TestRelayLeavesAQueueOut(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	engine := idempotency.NewEngine(b.store, nil)
	b.publishMail(t, engine, "mails", "k", "mail")
	b.publishMail(t, engine, "events", "k", "event")
	outbox := b.store.Outbox("mails")
	var got []string
	for {
		shards, err := outbox.Waiting(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(shards) == 0 {
			break
		}
		for _, shard := range shards {
			if _, err := outbox.Drain(t.Context(), shard, relay.Limits{Messages: 10, Bytes: 1 << 20}, func(_ context.Context, messages []message.Message) []error {
				for _, m := range messages {
					got = append(got, string(m.Body))
				}
				return make([]error, len(messages))
			}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if fmt.Sprint(got) != "[event]" || b.count(t, "SELECT count(*) FROM message_outbox WHERE topic = 'mails'") != 1 {
		t.Errorf("the relay took %v", got)
	}
}
