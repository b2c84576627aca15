package relay_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/relay"
	"github.com/paidonce/idempotency/storage/postgres"
)

// recorder is a Publisher that keeps its messages. The brokers' own tests are in broker/.
type recorder struct {
	mu     sync.Mutex
	got    []message.Message
	result func(m *message.Message) error // nil: all are confirmed
	after  func(context.Context)          // called after the broker's confirmation and before Publish returns
}

func (p *recorder) Publish(ctx context.Context, messages []message.Message) []error {
	p.mu.Lock()
	after := p.after
	results := make([]error, len(messages))
	failed := map[string]bool{}
	for i := range messages {
		m := &messages[i]
		if p.result != nil {
			results[i] = p.result(m)
		}
		if m.Key != nil && failed[string(m.Key)] && results[i] == nil {
			results[i] = errors.New("one before it failed")
		}
		if results[i] == nil {
			p.got = append(p.got, *m)
		} else {
			failed[string(m.Key)] = true
		}
	}
	p.mu.Unlock()
	if after != nil {
		after(ctx)
	}
	return results
}

// bodies returns the bodies that the broker got, in its order.
func (p *recorder) bodies() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := make([]string, len(p.got))
	for i, m := range p.got {
		all[i] = string(m.Body)
	}
	return strings.Join(all, " ")
}

func publish(t *testing.T, s *testservice.Service, key, body string) {
	t.Helper()
	result := s.Engine.Do(t.Context(), testservice.Request(idempotency.Key{Scope: "acme", Value: body}), func(ctx context.Context) (*idempotency.Answer, error) {
		m := message.Message{Topic: "t", Body: []byte(body), Header: map[string][]string{"A": {"1", "2"}}}
		if key != "" {
			m.Key = []byte(key)
		}
		return &idempotency.Answer{Status: 201}, message.Publish(ctx, "made", m)
	})
	if result.Outcome != idempotency.OutcomeExecuted {
		t.Fatalf("%+v", result)
	}
}

// run runs a relay until the test ends or stop is called.
func run(t *testing.T, outbox relay.Outbox, p relay.Publisher, opts *relay.Options) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { relay.New(outbox, p, opts).Run(ctx) })
	stop = func() {
		cancel()
		running.Wait()
	}
	t.Cleanup(stop)
	return stop
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

func empty(t *testing.T, s *testservice.Service) func() bool {
	return func() bool { return s.Count(t, "SELECT count(*) FROM message_outbox") == 0 }
}

// A message arrives at the broker as it was published, and is deleted from the outbox.
func TestRelayPublishesAndDeletes(t *testing.T) {
	t.Parallel()
	s := testservice.New(t, nil)
	publish(t, s, "k", "before") // by another process, or before a restart
	p := new(recorder)
	run(t, s.Store.Outbox(), p, &relay.Options{Interval: 10 * time.Second})
	eventually(t, "the outbox is empty", empty(t, s))
	for i := range 20 { // a nudge for each: the next look is seconds away
		publish(t, s, "k", fmt.Sprint(i))
		eventually(t, "the outbox is empty", empty(t, s))
	}
	if len(p.got) != 21 || p.got[0].Topic != "t" || string(p.got[0].Key) != "k" || string(p.got[0].Body) != "before" || fmt.Sprint(p.got[0].Header) != "map[A:[1 2]]" {
		t.Errorf("%d messages, the first %+v", len(p.got), p.got[0])
	}
	if len(p.got[0].ID) != 36 || p.got[0].ID == p.got[1].ID {
		t.Errorf("ids %q and %q", p.got[0].ID, p.got[1].ID)
	}
}

// A message that the broker refuses stays in the outbox: later ones of its key wait, and others are
// published. Once the operator retries it, the later ones follow in their order.
func TestRefusedMessageHoldsItsKey(t *testing.T) {
	t.Parallel()
	s := testservice.New(t, nil)
	refuses := true
	p := new(recorder)
	p.result = func(m *message.Message) error {
		if refuses && string(m.Body) == "a1" {
			return fmt.Errorf("%w: too large\x00\xff", relay.ErrRefused)
		}
		return nil
	}
	for _, m := range []string{"a1", "a2", "b1"} {
		publish(t, s, m[:1], m)
	}
	publish(t, s, "", "none")
	run(t, s.Store.Outbox(), p, &relay.Options{Interval: 10 * time.Millisecond, OnDrain: func(int, relay.Drained, time.Duration, error) {}})
	eventually(t, "the others are published", func() bool { return s.Count(t, "SELECT count(*) FROM message_outbox") == 2 })
	publish(t, s, "a", "a3")
	publish(t, s, "b", "b2")
	eventually(t, "b2 is published", func() bool {
		return strings.Contains(p.bodies(), "b2") && s.Count(t, "SELECT count(*) FROM message_outbox") == 3
	})
	if got := s.Text(t, "SELECT string_agg(convert_from(body, 'UTF8') || ':' || COALESCE(refused, ''), ' ' ORDER BY id) FROM message_outbox"); got != "a1:broker refuses the message: too large � a2: a3:" {
		t.Errorf("the outbox has %q", got)
	}
	p.mu.Lock()
	refuses = false
	p.mu.Unlock()
	s.Exec(t, "UPDATE message_outbox SET refused = NULL")
	eventually(t, "the outbox is empty", empty(t, s))
	if got := p.bodies(); strings.Index(got, "a1") > strings.Index(got, "a2") || strings.Index(got, "a2") > strings.Index(got, "a3") {
		t.Errorf("published %q", got)
	}
}

// A refused message of the longest key holds those behind it, and nothing else of its shard.
func TestRefusedMessageWithALongKeyHoldsItsKey(t *testing.T) {
	t.Parallel()
	s := testservice.New(t, nil)
	p := new(recorder)
	p.result = func(m *message.Message) error {
		if string(m.Body) == "a1" {
			return relay.ErrRefused
		}
		return nil
	}
	key := make([]byte, message.KeyBytesMax) // which does not shrink
	_, _ = rand.NewChaCha8([32]byte{}).Read(key)
	for _, m := range []string{"a1", "a2"} {
		publish(t, s, string(key), m)
	}
	for i := range 50 {
		publish(t, s, "", fmt.Sprint(i))
	}
	run(t, s.Store.Outbox(), p, &relay.Options{Interval: 10 * time.Millisecond, OnDrain: func(int, relay.Drained, time.Duration, error) {}})
	eventually(t, "the others are published", func() bool { return s.Count(t, "SELECT count(*) FROM message_outbox") == 2 })
	if n := len(strings.Fields(p.bodies())); n != 50 {
		t.Errorf("%d messages published, want 50", n)
	}
}

// While the broker is away nothing is lost, parked or reordered.
func TestOutageOfTheBrokerParksNothing(t *testing.T) {
	t.Parallel()
	s := testservice.New(t, nil)
	away := true
	p := new(recorder)
	p.result = func(*message.Message) error {
		if away {
			return errors.New("away")
		}
		return nil
	}
	tried := make(chan struct{}, 100)
	var log lockedBuffer
	run(t, s.Store.Outbox(), p, &relay.Options{Interval: time.Millisecond, PauseMax: 10 * time.Millisecond, Logger: slog.New(slog.NewTextHandler(&log, nil)), OnDrain: func(_ int, d relay.Drained, _ time.Duration, _ error) {
		if d.Failed > 0 {
			select {
			case tried <- struct{}{}:
			default:
			}
		}
	}})
	for i := range 5 {
		publish(t, s, "k", fmt.Sprint(i))
	}
	for range 3 {
		<-tried
	}
	if n := s.Count(t, "SELECT count(*) FROM message_outbox WHERE refused IS NULL"); n != 5 {
		t.Errorf("%d messages are in the outbox", n)
	}
	p.mu.Lock()
	away = false
	p.mu.Unlock()
	eventually(t, "the outbox is empty", empty(t, s))
	if got := p.bodies(); got != "0 1 2 3 4" {
		t.Errorf("published %q", got)
	}
	if text := log.String(); !strings.Contains(text, "they stay in the outbox") || !strings.Contains(text, "error=away") {
		t.Errorf("OnDrain silences the log: %s", text)
	}
}

// lockedBuffer is a log that several goroutines write.
type lockedBuffer struct {
	mu   sync.Mutex
	text strings.Builder
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// A message may draw its id first and be committed last, when one with a higher id is published and
// deleted already.
func TestMessageThatIsCommittedLateIsNotSkipped(t *testing.T) {
	t.Parallel()
	s := testservice.New(t, nil)
	// The message "late" waits for its COMMIT, with its id, until the lock is free.
	s.Exec(t, "CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END'")
	s.Exec(t, "CREATE TRIGGER late AFTER INSERT ON message_outbox FOR EACH ROW WHEN (NEW.body = 'late') EXECUTE FUNCTION late()")
	holder, err := s.Pool.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Release()
	if _, err := holder.Exec(t.Context(), "SELECT pg_advisory_lock(1)"); err != nil {
		t.Fatal(err)
	}
	var publishing sync.WaitGroup
	publishing.Go(func() { publish(t, s, "k", "late") })
	eventually(t, "it has its id, and waits", func() bool {
		return s.Count(t, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'") == 1
	})
	publish(t, s, "k", "early")
	p := new(recorder)
	outbox := s.Store.Outbox()
	drain(t, outbox, p.Publish)
	if got := p.bodies(); got != "early" {
		t.Errorf("published %q", got)
	}
	if _, err := holder.Exec(t.Context(), "SELECT pg_advisory_unlock(1)"); err != nil {
		t.Fatal(err)
	}
	publishing.Wait()
	drain(t, outbox, p.Publish)
	if got := p.bodies(); got != "early late" || !empty(t, s)() {
		t.Errorf("published %q", got)
	}
}

// drain empties each shard once.
func drain(t *testing.T, outbox relay.Outbox, publish func(context.Context, []message.Message) []error) {
	t.Helper()
	for shard := range postgres.OutboxShards {
		if _, err := outbox.Drain(t.Context(), shard, relay.Limits{Messages: 100, Bytes: 1 << 20}, publish); err != nil {
			t.Fatal(err)
		}
	}
}

// Until the broker has confirmed a message it is in the outbox: a relay may die at any time.
func TestMessageStaysUntilItIsConfirmed(t *testing.T) {
	t.Parallel()
	s := testservice.New(t, nil)
	outbox, confirms := s.Store.Outbox(), false
	publish(t, s, "k", "one")
	broker := func(context.Context, []message.Message) []error {
		if empty(t, s)() { // as another session sees it
			t.Error("the message is deleted before it is confirmed")
		}
		if !confirms {
			return []error{errors.New("away")}
		}
		return []error{nil}
	}
	drain(t, outbox, broker)
	if empty(t, s)() {
		t.Error("a message that was not confirmed is deleted")
	}
	confirms = true
	drain(t, outbox, broker)
	if !empty(t, s)() {
		t.Error("a message that was confirmed is not deleted")
	}
}

// If a relay dies between the broker's confirmation and the deletion, the message is published
// again under the same id.
func TestDeathBetweenConfirmationAndDeletionPublishesAgain(t *testing.T) {
	t.Parallel()
	s := testservice.New(t, nil)
	p := new(recorder)
	p.after = func(context.Context) {
		p.mu.Lock()
		p.after = nil
		p.mu.Unlock()
		s.Exec(t, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'")
	}
	publish(t, s, "k", "one")
	run(t, s.Store.Outbox(), p, &relay.Options{Interval: 10 * time.Millisecond, OnDrain: func(int, relay.Drained, time.Duration, error) {}})
	eventually(t, "the outbox is empty", empty(t, s))
	if len(p.got) != 2 || p.got[0].ID != p.got[1].ID {
		t.Errorf("published %+v", p.got)
	}
}

// A stop lets the batch under way end: nothing is published twice because of it.
func TestStopEndsTheBatchUnderWay(t *testing.T) {
	t.Parallel()
	s := testservice.New(t, nil)
	publishing, release := make(chan struct{}), make(chan struct{})
	p := &recorder{after: func(ctx context.Context) {
		close(publishing)
		<-release
		if ctx.Err() != nil {
			t.Error("the publisher's context ended with the relay's")
		}
	}}
	publish(t, s, "k", "one")
	stop := run(t, s.Store.Outbox(), p, nil)
	<-publishing
	go func() {
		time.Sleep(20 * time.Millisecond)
		close(release)
	}()
	stop()
	if n := s.Count(t, "SELECT count(*) FROM message_outbox"); n != 0 || len(p.got) != 1 {
		t.Errorf("%d messages are left, %d were published", n, len(p.got))
	}
}

// A batch ends at its limits. A message that is larger than all of Bytes is published too, by
// itself.
func TestBatchesAreBounded(t *testing.T) {
	t.Parallel()
	s := testservice.New(t, nil)
	var batches []string
	outbox := s.Store.Outbox()
	for _, body := range []string{"a", "bb", "ccccc", "d", "e", "f"} {
		publish(t, s, "k", body)
	}
	for {
		ended := true
		shards, err := outbox.Waiting(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, shard := range shards {
			if _, err := outbox.Drain(t.Context(), shard, relay.Limits{Messages: 2, Bytes: 3}, func(_ context.Context, messages []message.Message) []error {
				batch := ""
				for _, m := range messages {
					batch += string(m.Body)
				}
				batches, ended = append(batches, batch), false
				return make([]error, len(messages))
			}); err != nil {
				t.Fatal(err)
			}
		}
		if ended {
			break
		}
	}
	if got := strings.Join(batches, " "); got != "abb ccccc de f" {
		t.Errorf("batches %q", got)
	}
}

// Eight writers, four relays: nothing is lost, nothing is published twice, and each key keeps the
// order of its commits, whatever a long transaction of somebody else does to the horizon.
func TestRelaysLoseNothingAndKeepTheOrder(t *testing.T) {
	t.Parallel()
	const writers, each, keys, relays = 8, 100, 20, 4
	s := testservice.New(t, &postgres.Options{PoolConfig: func(c *pgxpool.Config) { c.MaxConns = writers + relays*2 }})
	s.Exec(t, "CREATE TABLE aggregates (id int PRIMARY KEY, version int NOT NULL)")
	s.Exec(t, "INSERT INTO aggregates SELECT g, 0 FROM generate_series(0, $1::int - 1) AS g", keys)

	unrelated, err := s.Pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer unrelated.Rollback(context.Background()) //nolint:errcheck // it only holds the horizon back
	if _, err := unrelated.Exec(t.Context(), "INSERT INTO effects (name) VALUES ('unrelated')"); err != nil {
		t.Fatal(err)
	}

	p := new(recorder)
	for range relays {
		run(t, s.Store.Outbox(), p, &relay.Options{Interval: 5 * time.Millisecond, AtOnce: 2, BatchMessages: 10, OnDrain: func(_ int, _ relay.Drained, _ time.Duration, err error) {
			if err != nil {
				t.Error(err)
			}
		}})
	}
	var writing sync.WaitGroup
	for w := range writers {
		writing.Go(func() {
			for i := range each {
				s.Engine.Do(t.Context(), testservice.Request(idempotency.Key{Scope: "acme", Value: fmt.Sprint(w, "-", i)}), func(ctx context.Context) (*idempotency.Answer, error) {
					id, version := rand.IntN(keys), 0
					if err := postgres.Tx(ctx).QueryRow(ctx, "UPDATE aggregates SET version = version + 1 WHERE id = $1 RETURNING version", id).Scan(&version); err != nil {
						return nil, err
					}
					if i%40 == 0 {
						time.Sleep(30 * time.Millisecond)
					}
					return &idempotency.Answer{Status: 201}, message.Publish(ctx, "made", message.Message{Topic: "t", Key: []byte(strconv.Itoa(id)), Body: []byte(strconv.Itoa(version))})
				})
			}
		})
	}
	writing.Wait()
	eventually(t, "the outbox is empty", empty(t, s))

	next := map[string]int{}
	for _, m := range p.got {
		next[string(m.Key)]++
		if want := strconv.Itoa(next[string(m.Key)]); string(m.Body) != want {
			t.Fatalf("key %s: version %s came where %s was due", m.Key, m.Body, want)
		}
	}
	if made := s.Count(t, "SELECT sum(version) FROM aggregates"); made == 0 || len(p.got) != made {
		t.Errorf("%d messages were made, %d published", made, len(p.got))
	}
}

// Two services in one database. With one outbox, the relay of either publishes the messages of
// both, each once and in the order of its key. With a schema of its own a service has its own
// outbox: no message of the other one reaches its broker. If a client sends one key to both, there
// are two messages.
func TestTwoServicesInOneDatabase(t *testing.T) {
	t.Parallel()
	for _, schema := range []string{"public", "billing"} {
		t.Run("second service in schema "+schema, func(t *testing.T) {
			t.Parallel()
			const each, keys = 60, 5
			orders := testservice.New(t, nil)
			billing := testservice.On(t, orders.URL, &postgres.Options{Schema: schema})
			if err := migrations.Up(t.Context(), billing.Store, nil); err != nil {
				t.Fatal(err)
			}
			brokers := map[string]*recorder{"orders": new(recorder), "billing": new(recorder)}
			if schema == "public" {
				brokers["billing"] = brokers["orders"] // services that share the outbox share the broker
			}
			run(t, orders.Store.Outbox(), brokers["orders"], &relay.Options{BatchMessages: 7})
			run(t, billing.Store.Outbox(), brokers["billing"], &relay.Options{BatchMessages: 7})
			engines := map[string]*idempotency.Engine{
				"orders":  orders.Engine.With(&idempotency.Options{Service: "orders"}),
				"billing": billing.Engine.With(&idempotency.Options{Service: "billing"}),
			}
			var writing sync.WaitGroup
			for name, engine := range engines {
				writing.Go(func() {
					for i := range each {
						key := idempotency.Key{Scope: "acme", Value: strconv.Itoa(i)}
						if schema == "public" {
							key.Value = name + key.Value // they share the table of keys too
						}
						if result := engine.Do(t.Context(), testservice.Request(key), func(ctx context.Context) (*idempotency.Answer, error) {
							return &idempotency.Answer{Status: 201}, message.Publish(ctx, "made", message.Message{Topic: "t", Key: []byte(name + strconv.Itoa(i%keys)), Body: []byte(strconv.Itoa(i))})
						}); result.Outcome != idempotency.OutcomeExecuted {
							t.Errorf("%s: %+v", name, result)
						}
					}
				})
			}
			writing.Wait()
			eventually(t, "both outboxes are empty", func() bool {
				return empty(t, orders)() && billing.Count(t, "SELECT count(*) FROM "+schema+".message_outbox") == 0
			})

			got := brokers["orders"].got
			if schema != "public" {
				for name, p := range brokers {
					for _, m := range p.got {
						if !strings.HasPrefix(string(m.Key), name) {
							t.Errorf("the broker of %s got a message of key %s", name, m.Key)
						}
					}
				}
				got = append(got, brokers["billing"].got...)
			}
			ids, last := map[string]bool{}, map[string]int{}
			for _, m := range got {
				ids[m.ID] = true
				i, _ := strconv.Atoi(string(m.Body))
				if before, ok := last[string(m.Key)]; ok && i <= before {
					t.Errorf("key %s: %d came behind %d", m.Key, i, before)
				}
				last[string(m.Key)] = i
			}
			if len(got) != 2*each || len(ids) != 2*each {
				t.Errorf("%d messages with %d ids were published, want %d", len(got), len(ids), 2*each)
			}
		})
	}
}

// While a relay publishes messages, no other one publishes any of their shard.
func TestRelayLeavesWhatIsUnderWayAlone(t *testing.T) {
	t.Parallel()
	s := testservice.New(t, nil)
	publish(t, s, "k", "one")
	limits := relay.Limits{Messages: 10, Bytes: 1 << 20}
	outbox := s.Store.Outbox()
	shards, err := outbox.Waiting(t.Context())
	if err != nil || len(shards) != 1 {
		t.Fatalf("shards %v, %v", shards, err)
	}
	first, err := outbox.Drain(t.Context(), shards[0], limits, func(ctx context.Context, messages []message.Message) []error {
		publish(t, s, "k", "two") // of the same key
		other, err := s.Store.Outbox().Drain(ctx, shards[0], limits, func(context.Context, []message.Message) []error {
			t.Error("another relay publishes what is under way")
			return nil
		})
		if err != nil || !other.Held {
			t.Errorf("%+v, %v", other, err)
		}
		return make([]error, len(messages))
	})
	if err != nil || first.Published != 1 {
		t.Errorf("%+v, %v", first, err)
	}
	if n := s.Count(t, "SELECT count(*) FROM message_outbox"); n != 1 {
		t.Errorf("%d messages are left", n)
	}
}

// Somebody's transaction is open all the time. No message waits for its end, nor for the rows that
// can't be vacuumed because of it. A message of the transaction itself leaves after its COMMIT,
// though others of its shard with higher ids have left before.
func TestLongTransactionDelaysNoMessage(t *testing.T) {
	t.Parallel()
	const messages = 40
	s := testservice.New(t, nil)
	p := new(recorder)
	run(t, s.Store.Outbox(), p, nil)
	tx, err := s.Pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(context.Background()) //nolint:errcheck // after COMMIT
	if _, err := tx.Exec(t.Context(), "SET LOCAL idle_in_transaction_session_timeout = 0"); err != nil {
		t.Fatal(err)
	}
	// As a handler's that stops between its last flush and COMMIT.
	if _, err := tx.Exec(t.Context(), `INSERT INTO message_outbox (created_at, shard, message_id, topic, key, headers, body)
		SELECT now(), s, gen_random_uuid(), 't', 'long', decode('0100', 'hex'), 'long' FROM generate_series(0, 15) AS s`); err != nil {
		t.Fatal(err)
	}
	for i := range messages {
		publish(t, s, "k", fmt.Sprint(i))
		eventually(t, "it is published while the transaction is open", func() bool {
			p.mu.Lock()
			defer p.mu.Unlock()
			return len(p.got) == i+1
		})
	}
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the outbox is empty", empty(t, s))
	if len(p.got) != messages+16 {
		t.Errorf("%d messages were published", len(p.got))
	}
}

// Eight writers, and four relays; the relays' sessions are killed while they publish. A message is
// published twice only if it was in the outbox at a kill, none is lost, and the first copies of a
// key keep their order.
func TestOnlyAKillPublishesTwice(t *testing.T) {
	t.Parallel()
	const writers, each, keys, relays, kills = 8, 30, 10, 4, 3
	s := testservice.New(t, &postgres.Options{PoolConfig: func(c *pgxpool.Config) { c.MaxConns = writers + relays*2 }})
	s.Exec(t, "CREATE TABLE aggregates (id int PRIMARY KEY, version int NOT NULL)")
	s.Exec(t, "INSERT INTO aggregates SELECT g, 0 FROM generate_series(0, $1::int - 1) AS g", keys)
	twice := map[string]bool{} // whether a message may be published twice
	var mu sync.Mutex
	batches, killed := 0, 0
	p := new(recorder)
	p.after = func(context.Context) {
		mu.Lock()
		defer mu.Unlock()
		if batches++; batches%7 != 0 || killed == kills {
			return
		}
		killed++
		// Relays publish, and writers hold no lock of a shard, so none of them is killed.
		rows, err := s.Pool.Query(context.Background(), `SELECT pg_terminate_backend(a.pid) FROM pg_stat_activity AS a WHERE a.datname = current_database() AND a.state = 'idle in transaction'
			AND a.query LIKE 'SELECT id, message_id::text%'`)
		if err == nil {
			rows.Close()
			rows, err = s.Pool.Query(context.Background(), "SELECT message_id::text FROM message_outbox")
		}
		if err != nil {
			t.Error(err)
			return
		}
		for rows.Next() {
			var id string
			if err := rows.Scan(&id); err != nil {
				t.Error(err)
			}
			twice[id] = true
		}
	}
	for range relays {
		run(t, s.Store.Outbox(), p, &relay.Options{Interval: 5 * time.Millisecond, PauseMax: 5 * time.Millisecond, AtOnce: 2, BatchMessages: 5, Logger: slog.New(slog.DiscardHandler)})
	}
	var writing sync.WaitGroup
	for w := range writers {
		writing.Go(func() {
			for i := range each {
				s.Engine.Do(t.Context(), testservice.Request(idempotency.Key{Scope: "acme", Value: fmt.Sprint(w, "-", i)}), func(ctx context.Context) (*idempotency.Answer, error) {
					id, version := rand.IntN(keys), 0
					if err := postgres.Tx(ctx).QueryRow(ctx, "UPDATE aggregates SET version = version + 1 WHERE id = $1 RETURNING version", id).Scan(&version); err != nil {
						return nil, err
					}
					return &idempotency.Answer{Status: 201}, message.Publish(ctx, "made", message.Message{Topic: "t", Key: []byte(strconv.Itoa(id)), Body: []byte(strconv.Itoa(version))})
				})
			}
		})
	}
	writing.Wait()
	eventually(t, "the outbox is empty", empty(t, s))

	seen, next := map[string]int{}, map[string]int{}
	for _, m := range p.got {
		if seen[m.ID]++; seen[m.ID] > 1 {
			if !twice[m.ID] {
				t.Errorf("message %s of key %s was published twice, and no kill met it", m.Body, m.Key)
			}
			continue
		}
		next[string(m.Key)]++
		if want := strconv.Itoa(next[string(m.Key)]); string(m.Body) != want {
			t.Errorf("key %s: version %s came where %s was due", m.Key, m.Body, want)
		}
	}
	if made := s.Count(t, "SELECT sum(version) FROM aggregates"); made == 0 || len(seen) != made {
		t.Errorf("%d messages were made, %d published", made, len(seen))
	}
	if killed != kills || len(p.got) == len(seen) {
		t.Errorf("%d kills, %d messages were published twice", killed, len(p.got)-len(seen))
	}
}
