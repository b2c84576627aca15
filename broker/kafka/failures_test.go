package kafka_test

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/twmb/franz-go/pkg/kadm"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/broker/brokertest"
	"github.com/paidonce/idempotency/broker/kafka"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/internal/restoretest"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/relay"
	"github.com/paidonce/idempotency/storage/postgres"
)

// The tests in this file are of whole chains: a request's message, the relay, Kafka, and a consumer
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

// project runs a consumer until the test ends or stop is called.
func (b *books) project(t *testing.T, source consumer.Source, opts *consumer.Options, before func(ctx context.Context)) (stop func()) {
	t.Helper()
	o := consumer.Options{Logger: slog.New(slog.DiscardHandler), BatchTimeout: 3 * time.Second}
	if opts != nil {
		o.BatchMax = opts.BatchMax
	}
	o.OnBatch = func(end consumer.BatchEnd) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.ends = append(b.ends, end)
	}
	c := consumer.New("books", b.Store.Inbox(), source, func(ctx context.Context, d *consumer.Delivery) error {
		if before != nil {
			before(ctx)
		}
		_, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO effects (name) VALUES ($1)", string(d.Body))
		return err
	}, &o)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := c.Run(ctx); err != nil {
			t.Errorf("the consumer ended: %v", err)
		}
	}()
	stop = func() {
		cancel()
		<-ended
	}
	t.Cleanup(stop)
	return stop
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
	b.checkEffects(t, n)
}

func (b *books) checkEffects(t *testing.T, n int) {
	t.Helper()
	if all, different := b.Count(t, "SELECT count(*) FROM effects"), b.Count(t, "SELECT count(DISTINCT name) FROM effects"); all != n || different != n {
		t.Errorf("%d effects, %d of them different: want %d", all, different, n)
	}
}

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

// The relay dies between Kafka's confirmation and the deletion from the outbox. Both copies
// have one id, and the second has no effect.
func TestRelayDiesBetweenConfirmationAndDeletion(t *testing.T) {
	t.Parallel()
	f, b := startBroker(t), newBooks(t)
	topic := newTopic()
	createTopic(t, f.brokers, topic, nil)
	pay(t, b.Service, topic, "key", "payment")
	died := false
	drain(t, b.Service, &publishing{publisher(t, f.brokers, new(brokertest.Network)), func() {
		if !died {
			died = true
			b.Exec(t, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'")
		}
	}})
	copies := records(t, f.brokers, topic)
	if len(copies) != 2 || string(copies[0].Headers[0].Value) != string(copies[1].Headers[0].Value) || copies[0].Headers[0].Key != kafka.IDHeader {
		t.Fatalf("%d records are kept", len(copies))
	}
	b.project(t, source(t, f, "books", topic, nil), nil, nil)
	eventually(t, "the copy is dropped", func() bool { return b.sum(func(e *consumer.BatchEnd) int { return e.Duplicates }) == 1 })
	b.checkEffects(t, 1)
}

// A payment is published, and its database is lost: the promoted replica does not have it.
// The client's retry pays and publishes again. The id is the same, so consumers see it once.
func TestPaymentThatIsPublishedAndLost(t *testing.T) {
	t.Parallel()
	f, b := startBroker(t), newBooks(t)
	topic := newTopic()
	createTopic(t, f.brokers, topic, nil)
	p := publisher(t, f.brokers, new(brokertest.Network))
	for range 2 { // the primary, then the replica
		s := testservice.New(t, nil)
		pay(t, s, topic, "key", "payment")
		drain(t, s, p)
	}
	b.project(t, source(t, f, "books", topic, nil), nil, nil)
	eventually(t, "the copy is dropped", func() bool { return b.sum(func(e *consumer.BatchEnd) int { return e.Duplicates }) == 1 })
	b.checkEffects(t, 1)
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
	for _, err := range p.Publish(t.Context(), all) {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// setCommits sets the group's offsets at the broker, while it has no members.
func setCommits(t *testing.T, f *broker, group string, offsets kadm.Offsets) {
	t.Helper()
	client := kadm.NewClient(admin(t, f.brokers))
	eventually(t, "the offsets are set", func() bool {
		committed, err := client.CommitOffsets(t.Context(), group, offsets)
		return err == nil && committed.Error() == nil
	})
}

// An offset was committed at the broker before the messages had an effect, or a late commit of a
// former member moved it back. The position in PostgreSQL decides.
func TestOffsetsAtTheBrokerDecideNothing(t *testing.T) {
	t.Parallel()
	const n = 200
	f, b := startBroker(t), newBooks(t)
	topic := newTopic()
	createTopic(t, f.brokers, topic, nil)
	p := publisher(t, f.brokers, new(brokertest.Network))
	publishAll(t, p, numbered(topic, 0, n))
	ends, err := kadm.NewClient(admin(t, f.brokers)).ListEndOffsets(t.Context(), topic)
	if err != nil {
		t.Fatal(err)
	}
	setCommits(t, f, "books", ends.Offsets())
	stop := b.project(t, source(t, f, "books", topic, nil), &consumer.Options{BatchMax: 20}, nil)
	b.waitEffects(t, n)
	stop()

	back := kadm.Offsets{}
	for number := range int32(brokertest.Partitions) {
		back.AddOffset(topic, number, 0, -1)
	}
	setCommits(t, f, "books", back)
	publishAll(t, p, numbered(topic, n, 2*n))
	b.project(t, source(t, f, "books", topic, nil), &consumer.Options{BatchMax: 20}, nil)
	b.waitEffects(t, 2*n)
	if again := b.sum(func(e *consumer.BatchEnd) int { return e.Redelivered + e.Duplicates }); again != 0 {
		t.Errorf("%d messages came again", again)
	}
}

// Members are paused past their session in the middle of a batch, and killed,
// and the broker restarts, while copies of messages are published. Each message has one effect.
func TestMembersThatPauseAndDie(t *testing.T) {
	t.Parallel()
	for name, with := range protocols {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const n, members, faults = 1500, 3, 6
			f, b := startBroker(t), newBooks(t)
			topic := newTopic()
			createTopic(t, f.brokers, topic, nil)
			p := publisher(t, f.brokers, new(brokertest.Network))
			publishAll(t, p, numbered(topic, 0, n/2))
			publishAll(t, p, numbered(topic, 0, n/10)) // once more

			start := func() (network *brokertest.Network, stop func()) {
				network = new(brokertest.Network)
				slowly := func(context.Context) { time.Sleep(rand.N(4 * time.Millisecond)) }
				stop = b.project(t, connect(t, f.brokers, network, with).Source("books", topic), &consumer.Options{BatchMax: 10}, slowly)
				t.Cleanup(network.Mend) // before stop
				return network, stop
			}
			var networks []*brokertest.Network
			var stops []func()
			for range members {
				network, stop := start()
				networks, stops = append(networks, network), append(stops, stop)
			}
			for i := range faults {
				done := b.Count(t, "SELECT count(*) FROM effects")
				at := i % members
				switch i % 3 {
				case 0: // a pause past the session
					networks[at].Stop()
					eventually(t, "the member is out of its group", func() bool { return len(f.assigned(t, "books")) < members })
					networks[at].Mend()
				case 1: // a member goes and another comes
					stops[at]()
					networks[at], stops[at] = start()
				case 2:
					f.restart(t)
				}
				from := n/2 + i*n/2/faults
				publishAll(t, p, numbered(topic, from, from+n/2/faults))
				eventually(t, "some go on", func() bool { return b.Count(t, "SELECT count(*) FROM effects") > min(done+20, from) })
			}
			b.waitEffects(t, n)
			if twice := b.Count(t, "SELECT count(*) FROM (SELECT FROM effects GROUP BY name HAVING count(*) > 1) AS twice"); twice != 0 {
				t.Errorf("%d messages had two effects", twice)
			}
		})
	}
}

// The database is restored to an earlier time, and the offsets at the broker are ahead of
// it.
func TestRestoredBaseBackup(t *testing.T) {
	t.Parallel()
	f, topic := startBroker(t), newTopic()
	createTopic(t, f.brokers, topic, nil)
	restoretest.Run(t, restoretest.Broker{
		Topic: topic, Publisher: publisher(t, f.brokers, new(brokertest.Network)),
		Source: func() consumer.Source { return source(t, f, "books", topic, nil) },
		Log: func() []consumer.Delivery {
			return slices.Concat(slices.Collect(maps.Values(read(t, f.brokers, topic)))...)
		},
	})
}
