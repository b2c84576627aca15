package nats_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/broker/brokertest"
	"github.com/paidonce/idempotency/broker/nats"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/internal/restoretest"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/relay"
	"github.com/paidonce/idempotency/storage/postgres"
)

// The tests in this file are of whole chains: a request's message, the relay, NATS, and a consumer
// on PostgreSQL.

// books is the database of a consumer, which inserts the body of each message into effects.
type books struct {
	*testservice.Service
	mu   sync.Mutex
	ends []consumer.BatchEnd
}

func newBooks(t *testing.T) *books {
	return &books{Service: testservice.New(t, &postgres.Options{PoolConfig: func(c *pgxpool.Config) { c.MaxConns = 24 }})}
}

// running is a consumer that runs.
type running struct {
	cancel context.CancelFunc
	ended  chan struct{}
	err    error // of Run, once ended is closed
}

// stop ends the consumer in order.
func (r *running) stop(t *testing.T) {
	t.Helper()
	r.cancel()
	if err := r.wait(t); err != nil {
		t.Errorf("the consumer ended: %v", err)
	}
}

// wait waits for the end of the consumer, and returns its error.
func (r *running) wait(t *testing.T) error {
	t.Helper()
	select {
	case <-r.ended:
		return r.err
	case <-time.After(time.Minute):
		t.Fatal("the consumer did not end")
		return nil
	}
}

// project runs a consumer until the test ends or it is stopped.
func (b *books) project(t *testing.T, source consumer.Source, o consumer.Options, before func(ctx context.Context, d *consumer.Delivery) error) *running {
	t.Helper()
	o.Logger, o.BatchTimeout = slog.New(slog.DiscardHandler), cmp.Or(o.BatchTimeout, 4*time.Second)
	o.OnBatch = func(end consumer.BatchEnd) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.ends = append(b.ends, end)
	}
	c := consumer.New("books", b.Store.Inbox(), source, func(ctx context.Context, d *consumer.Delivery) error {
		if before != nil {
			if err := before(ctx, d); err != nil {
				return err
			}
		}
		_, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO effects (name) VALUES ($1)", string(d.Body))
		return err
	}, &o)
	ctx, cancel := context.WithCancel(t.Context())
	r := &running{cancel: cancel, ended: make(chan struct{})}
	go func() {
		defer close(r.ended)
		r.err = c.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-r.ended
	})
	return r
}

// sum returns a sum over all batches.
func (b *books) sum(of func(end *consumer.BatchEnd) int) (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := range b.ends {
		n += of(&b.ends[i])
	}
	return n
}

// waitEffects waits for n effects, and fails the test if one is there twice.
func (b *books) waitEffects(t *testing.T, n int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d effects are there", n), func() bool { return b.Count(t, "SELECT count(*) FROM effects") >= n })
	if all, different := b.Count(t, "SELECT count(*) FROM effects"), b.Count(t, "SELECT count(DISTINCT name) FROM effects"); all != n || different != n {
		t.Errorf("%d effects, %d of them different: want %d", all, different, n)
	}
}

// collect returns a function for project's before, which keeps the messages.
func collect(got chan<- consumer.Delivery) func(context.Context, *consumer.Delivery) error {
	return func(_ context.Context, d *consumer.Delivery) error {
		got <- *d
		return nil
	}
}

func duplicates(e *consumer.BatchEnd) int { return e.Duplicates }

// pay runs a request that publishes a message.
func pay(t *testing.T, s *testservice.Service, topic, key, body string) {
	t.Helper()
	result := s.Engine.Do(t.Context(), testservice.Request(idempotency.Key{Scope: "acme", Value: key}), func(ctx context.Context) (*idempotency.Answer, error) {
		return &idempotency.Answer{Status: 201}, message.Publish(ctx, "made", message.Message{Topic: topic, Key: []byte("account"), Body: []byte(body)})
	})
	if result.Outcome != idempotency.OutcomeExecuted {
		t.Fatalf("%+v", result)
	}
}

// publishing is a publisher that does something after the broker has confirmed.
type publishing struct {
	relay.Publisher
	confirmed func()
}

func (p *publishing) Publish(ctx context.Context, messages []message.Message) []error {
	results := p.Publisher.Publish(ctx, messages)
	p.confirmed()
	return results
}

// drain runs a relay until the outbox is empty.
func drain(t *testing.T, s *testservice.Service, p relay.Publisher) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		relay.New(s.Store.Outbox(), p, &relay.Options{Interval: 10 * time.Millisecond, Logger: slog.New(slog.DiscardHandler)}).Run(ctx)
	})
	eventually(t, "the outbox is empty", func() bool { return s.Count(t, "SELECT count(*) FROM message_outbox") == 0 })
	cancel()
	running.Wait()
}

// numbered returns n messages with their number as body, of 20 keys.
func numbered(topic string, from, to int) (all []message.Message) {
	for i := from; i < to; i++ {
		all = append(all, message.Message{ID: fmt.Sprint("id-", i), Topic: topic, Key: fmt.Append(nil, "key", i%20), Body: []byte(strconv.Itoa(i))})
	}
	return all
}

func publishAll(t *testing.T, p relay.Publisher, all []message.Message) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for _, err := range p.Publish(ctx, all) {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func (b *broker) newTopic(t *testing.T, opts nats.TopicOptions) string {
	t.Helper()
	topic := newTopic()
	b.createTopic(t, topic, opts)
	return topic
}

// The relay dies between the confirmation and the deletion from the outbox. The stream drops
// the copy, which is no failure.
func TestRelayDiesBetweenConfirmationAndDeletion(t *testing.T) {
	t.Parallel()
	n, b := startBroker(t), newBooks(t)
	topic := n.newTopic(t, nats.TopicOptions{})
	pay(t, b.Service, topic, "key", "payment")
	died := false
	p := n.publisher(t, nil)
	drain(t, b.Service, &publishing{p, func() {
		if !died {
			died = true
			b.Exec(t, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'")
		}
	}})
	if kept := n.count(t, topic); kept != 1 || p.Duplicates() != 1 {
		t.Errorf("%d messages are kept, %d were dropped", kept, p.Duplicates())
	}
	b.project(t, n.connect(t, nil).Source("books", topic), consumer.Options{}, nil)
	b.waitEffects(t, 1)
}

// A payment is published, and its database is lost: the promoted replica does not
// have it. The client's retry pays and publishes again, after the stream's window, so the stream
// keeps both. The id is the same, so the consumer drops the copy.
func TestPaymentThatIsPublishedAndLost(t *testing.T) {
	t.Parallel()
	n, b := startBroker(t), newBooks(t)
	topic := n.newTopic(t, nats.TopicOptions{Stream: jetstream.StreamConfig{Duplicates: 100 * time.Millisecond}})
	p := n.publisher(t, nil)
	eventually(t, "a copy is kept", func() bool { // by the primary, then by replicas
		s := testservice.New(t, nil)
		pay(t, s, topic, "key", "payment")
		drain(t, s, p)
		time.Sleep(150 * time.Millisecond)
		return n.count(t, topic) == 2
	})
	b.project(t, n.connect(t, nil).Source("books", topic), consumer.Options{}, nil)
	eventually(t, "the copy is dropped", func() bool { return b.sum(duplicates) == 1 })
	b.waitEffects(t, 1)
}

// The server has nothing by which it could decide. Its consumers acknowledge
// nothing, so there is no offset that is committed too early, no AckWait that a slow handler
// outlives, and no MaxDeliver after which the server goes silent.
func TestTheServerDecidesNothing(t *testing.T) {
	t.Parallel()
	const all = 60
	n, b := startBroker(t), newBooks(t)
	topic := n.newTopic(t, nats.TopicOptions{})
	publishAll(t, n.publisher(t, nil), numbered(topic, 0, all))
	inHandler := make(chan struct{}, all)
	r := b.project(t, n.connect(t, nil).Source("books", topic), consumer.Options{}, func(ctx context.Context, _ *consumer.Delivery) error {
		select {
		case inHandler <- struct{}{}:
		default:
		}
		<-ctx.Done() // until BatchTimeout: nothing is committed
		return ctx.Err()
	})
	<-inHandler
	consumers := 0
	for _, stream := range n.streams(t, topic) {
		list := stream.ListConsumers(t.Context())
		for info := range list.Info() {
			consumers++
			if c := info.Config; c.AckPolicy != jetstream.AckNonePolicy || c.Durable != "" || c.MaxDeliver > 0 || info.NumAckPending != 0 {
				t.Errorf("consumer %+v", c)
			}
		}
		if list.Err() != nil {
			t.Error(list.Err())
		}
	}
	if consumers == 0 {
		t.Error("no consumer is seen")
	}
	r.cancel()
	_ = r.wait(t)
	if effects := b.Count(t, "SELECT count(*) FROM effects"); effects != 0 {
		t.Errorf("%d effects", effects)
	}
	// What was delivered has no effect yet, and is delivered again.
	b.project(t, n.connect(t, nil).Source("books", topic), consumer.Options{}, nil)
	b.waitEffects(t, all)
}

// A message fails more often than any usual MaxDeliver, and another one takes longer than the
// session. The first is dead in the end, in PostgreSQL, and blocks nothing; the second runs once.
func TestPoisonAndASlowHandler(t *testing.T) {
	t.Parallel()
	const all, attempts = 60, 7
	n, b := startBroker(t), newBooks(t)
	topic := n.newTopic(t, nats.TopicOptions{})
	publishAll(t, n.publisher(t, nil), numbered(topic, 0, all))
	var failed, slow atomic.Int32
	b.project(t, n.connect(t, nil).Source("books", topic), consumer.Options{AttemptsInPlace: attempts, AttemptsMax: attempts, BatchTimeout: time.Minute}, func(ctx context.Context, d *consumer.Delivery) error {
		switch string(d.Body) {
		case "7":
			failed.Add(1)
			return errors.New("poison")
		case "8":
			slow.Add(1)
			select {
			case <-time.After(sessionTimeout + sessionTimeout/5):
			case <-ctx.Done():
			}
		}
		return ctx.Err()
	})
	// Behind the poison wait those of its key: 27 and 47.
	b.waitEffects(t, all-3)
	eventually(t, "it is dead", func() bool {
		return b.Text(t, "SELECT string_agg(convert_from(body, 'UTF8') || ':' || state, ' ' ORDER BY position) FROM message_parked") == "7:3 27:2 47:2"
	})
	if failed.Load() != attempts || slow.Load() != 1 {
		t.Errorf("the poison ran %d times, the slow one %d", failed.Load(), slow.Load())
	}
}

// A limit or a purge has deleted messages unread. The consumer stops with an error that has their
// number. It goes on at the offset that an operator sets.
func TestTrimmedTopicStopsTheConsumer(t *testing.T) {
	t.Parallel()
	n, b := startBroker(t), newBooks(t)
	topic := n.newTopic(t, nats.TopicOptions{Partitions: 1, Stream: jetstream.StreamConfig{MaxMsgs: 30}})
	p := n.publisher(t, nil)
	source := func() consumer.Source { return n.connect(t, nil).Source("books", topic) }
	publishAll(t, p, numbered(topic, 0, 10))
	r := b.project(t, source(), consumer.Options{}, nil)
	b.waitEffects(t, 10)
	r.stop(t)
	publishAll(t, p, numbered(topic, 10, 60)) // 30 to 59 are left
	err := b.project(t, source(), consumer.Options{}, nil).wait(t)
	if !errors.Is(err, consumer.ErrTrimmed) || !strings.Contains(err.Error(), "20 messages") || !strings.Contains(err.Error(), "set next_offset of the partition in message_offsets to 31") {
		t.Fatalf("%v", err)
	}
	b.waitEffects(t, 10)
	b.Exec(t, "UPDATE message_offsets SET next_offset = 31")
	r = b.project(t, source(), consumer.Options{}, nil)
	b.waitEffects(t, 40)

	// The same while the consumer runs: it handles the messages that it holds first.
	purge := func(t *testing.T) {
		if err := n.streams(t, topic)[0].Purge(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	r.stop(t)
	var once sync.Once
	r = b.project(t, source(), consumer.Options{}, func(ctx context.Context, d *consumer.Delivery) error {
		once.Do(func() {
			publishAll(t, p, numbered(topic, 61, 400)) // more than it fetches ahead, and than the limit
			purge(t)
			publishAll(t, p, numbered(topic, 400, 401))
		})
		return nil
	})
	publishAll(t, p, numbered(topic, 60, 61))
	if err := r.wait(t); !errors.Is(err, consumer.ErrTrimmed) {
		t.Errorf("%v", err)
	}
	if last := b.Count(t, "SELECT count(*) FROM effects WHERE name = '400'"); last != 0 {
		t.Error("what came behind the gap was handled")
	}
	if first := b.Count(t, "SELECT count(*) FROM effects WHERE name = '60'"); first != 1 {
		t.Error("what was held was not handled")
	}
}

// A topic that was recreated has other offsets. And a server that has lost messages would
// give their offsets to others.
func TestTopicThatIsAnotherStopsTheConsumer(t *testing.T) {
	t.Parallel()
	n, b := startBroker(t), newBooks(t)
	topic := n.newTopic(t, nats.TopicOptions{Partitions: 1})
	p := n.publisher(t, nil)
	source := func() consumer.Source { return n.connect(t, nil).Source("books", topic) }
	publishAll(t, p, numbered(topic, 0, 10))
	r := b.project(t, source(), consumer.Options{}, nil)
	b.waitEffects(t, 10)
	r.stop(t)

	b.Exec(t, "UPDATE message_offsets SET next_offset = 13")
	err := b.project(t, source(), consumer.Options{}, nil).wait(t)
	if err == nil || !strings.Contains(err.Error(), "12 was consumed, and its last one is 10") || !strings.Contains(err.Error(), "set next_offset of the partition in message_offsets to 11") {
		t.Errorf("%v", err)
	}
	b.Exec(t, "UPDATE message_offsets SET next_offset = 11")

	r = b.project(t, source(), consumer.Options{}, nil)
	n.deleteTopic(t, topic)
	n.createTopic(t, topic, nats.TopicOptions{Partitions: 1})
	publishAll(t, p, numbered(topic, 10, 30))
	if err := r.wait(t); !errors.Is(err, consumer.ErrRecreated) {
		t.Errorf("%v", err)
	}
	b.waitEffects(t, 10)
	b.Exec(t, "DELETE FROM message_offsets")
	b.project(t, source(), consumer.Options{}, nil)
	b.waitEffects(t, 30)
}

// A message that an operator deleted by itself is skipped.
func TestDeletedMessageIsSkipped(t *testing.T) {
	t.Parallel()
	n, b := startBroker(t), newBooks(t)
	topic := n.newTopic(t, nats.TopicOptions{Partitions: 1})
	publishAll(t, n.publisher(t, nil), numbered(topic, 0, 40))
	stream := n.streams(t, topic)[0]
	for _, sequence := range []uint64{11, 20, 21} {
		if err := stream.DeleteMsg(t.Context(), sequence); err != nil {
			t.Fatal(err)
		}
	}
	b.project(t, n.connect(t, nil).Source("books", topic), consumer.Options{}, nil)
	b.waitEffects(t, 37)
}

// All faults together: three members come, go, and are paused past their session;
// messages are published twice; the server restarts. Each message has one effect, in the order of
// its key.
func TestEachMessageHasOneEffect(t *testing.T) {
	t.Parallel()
	total, twice, faults := 2000, 100, 8
	if testing.Short() {
		total, twice, faults = 400, 20, 4
	}
	const members = 3
	n, b := startBroker(t), newBooks(t)
	// Copies come behind the window, so that all are delivered.
	topic := n.newTopic(t, nats.TopicOptions{Stream: jetstream.StreamConfig{Duplicates: 100 * time.Millisecond}})
	p := n.publisher(t, nil)
	publishAll(t, p, numbered(topic, 0, total/2))

	start := func() (*brokertest.Network, *running) {
		network := new(brokertest.Network)
		r := b.project(t, n.connect(t, network).Source("books", topic), consumer.Options{BatchMax: 10}, func(context.Context, *consumer.Delivery) error {
			time.Sleep(rand.N(4 * time.Millisecond))
			return nil
		})
		t.Cleanup(network.Mend) // before the consumer's own
		return network, r
	}
	networks, runs := make([]*brokertest.Network, members), make([]*running, members)
	for i := range members {
		networks[i], runs[i] = start()
	}
	published := total / 2
	for i := range faults {
		done := b.Count(t, "SELECT count(*) FROM effects")
		at := rand.N(members)
		switch i % 4 {
		case 0, 2: // a member goes, and another one comes
			runs[at].stop(t)
			networks[at], runs[at] = start()
		case 1:
			n.restart(t)
		case 3: // a pause past the session, in the middle of a batch, say
			networks[at].Stop()
			time.Sleep(sessionTimeout)
			networks[at].Mend()
		}
		publishAll(t, p, numbered(topic, 0, twice)[i*twice/faults:(i+1)*twice/faults]) // once more
		publishAll(t, p, numbered(topic, published, published+total/2/faults))
		published += total / 2 / faults
		eventually(t, "they go on", func() bool { return b.Count(t, "SELECT count(*) FROM effects") > min(done+10, published-1) })
	}
	b.waitEffects(t, total)
	if got := b.Count(t, "SELECT count(*) FROM (SELECT name::int AS n, lag(name::int) OVER (PARTITION BY name::int % 20 ORDER BY id) AS before FROM effects) AS e WHERE before > n"); got != 0 {
		t.Errorf("%d effects are out of the order of their key", got)
	}
	copies := n.count(t, topic) - total // that the window did not catch
	if copies+int(p.Duplicates()) < twice {
		t.Errorf("%d copies are kept, and %d were dropped by the server", copies, p.Duplicates())
	}
	eventually(t, "all copies are dropped", func() bool { return b.sum(duplicates) >= copies })
	t.Logf("%d copies, %d dropped by the server, %d duplicates, %d redelivered", copies, p.Duplicates(), b.sum(duplicates), b.sum(func(e *consumer.BatchEnd) int { return e.Redelivered }))
}

// The database is restored to an earlier time. The server keeps no offset that could be
// ahead of it.
func TestRestoredBaseBackup(t *testing.T) {
	t.Parallel()
	n := startBroker(t)
	topic := n.newTopic(t, nats.TopicOptions{Stream: jetstream.StreamConfig{Duplicates: 100 * time.Millisecond}})
	restoretest.Run(t, restoretest.Broker{
		Topic: topic, Publisher: n.publisher(t, nil),
		Source: func() consumer.Source { return n.connect(t, nil).Source("books", topic) },
		Log:    func() []consumer.Delivery { return slices.Concat(slices.Collect(maps.Values(n.read(t, topic)))...) },
	})
}
