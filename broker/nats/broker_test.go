package nats_test

import (
	"encoding/json"
	"log/slog"
	"maps"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats-server/v2/server"
	natsgo "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/paidonce/idempotency/broker/brokertest"
	"github.com/paidonce/idempotency/broker/nats"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/relay"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// broker is a NATS server in this process, on a port of its own.
type broker struct {
	mu      sync.Mutex
	options server.Options
	server  *server.Server
}

func startBroker(t *testing.T, with ...func(o *server.Options)) *broker {
	t.Helper()
	b := &broker{options: server.Options{
		Host: "127.0.0.1", Port: server.RANDOM_PORT, JetStream: true, StoreDir: t.TempDir(), JetStreamMaxMemory: 64 << 20, JetStreamMaxStore: 4 << 30,
		NoLog: true, NoSigs: true,
	}}
	for _, one := range with {
		one(&b.options)
	}
	b.start(t)
	b.options.Port = b.server.Addr().(*net.TCPAddr).Port
	t.Cleanup(func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.server.Shutdown()
		b.server.WaitForShutdown()
	})
	return b
}

func (b *broker) start(t *testing.T) {
	t.Helper()
	options := b.options
	one, err := server.NewServer(&options)
	if err != nil {
		t.Fatal(err)
	}
	one.Start()
	if !one.ReadyForConnections(30 * time.Second) {
		t.Fatal("the server is not ready")
	}
	b.server = one
}

// restart ends the server and starts it again with its data, on its port.
func (b *broker) restart(t *testing.T) {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.server.Shutdown()
	b.server.WaitForShutdown()
	b.start(t)
}

func (b *broker) url() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.server.ClientURL()
}

// admin returns a client for the tests' own requests.
func (b *broker) admin(t *testing.T) jetstream.JetStream {
	t.Helper()
	conn, err := natsgo.Connect(b.url(), natsgo.MaxReconnects(-1), natsgo.ReconnectWait(20*time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	js, err := jetstream.New(conn)
	if err != nil {
		t.Fatal(err)
	}
	return js
}

// connect returns a client of the code under test, behind a network, which may be nil.
func (b *broker) connect(t *testing.T, network *brokertest.Network, opts ...natsgo.Option) *nats.Client {
	t.Helper()
	opts = append(opts, natsgo.ReconnectWait(20*time.Millisecond), natsgo.ReconnectJitter(time.Millisecond, time.Millisecond))
	if network != nil {
		opts = append(opts, natsgo.SetCustomDialer(dialer{t, network}))
	}
	client, err := nats.Connect(b.url(), &nats.Options{
		Nats: opts, SessionTimeout: sessionTimeout, RebalanceTimeout: rebalanceTimeout, Logger: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// dialer dials through a network until the test ends.
type dialer struct {
	t       *testing.T
	network *brokertest.Network
}

func (d dialer) Dial(network, address string) (net.Conn, error) {
	return d.network.DialContext(d.t.Context(), network, address)
}

func newTopic() string { return "topic." + uuid.NewString() }

// createTopic makes a topic with the suite's number of partitions, unless opts have another.
func (b *broker) createTopic(t *testing.T, topic string, opts nats.TopicOptions) {
	t.Helper()
	if opts.Partitions == 0 {
		opts.Partitions = brokertest.Partitions
	}
	if err := b.connect(t, nil).CreateTopic(t.Context(), topic, &opts); err != nil {
		t.Fatal(err)
	}
}

func (b *broker) publisher(t *testing.T, network *brokertest.Network) *nats.Publisher {
	t.Helper()
	p := b.connect(t, network).Publisher()
	t.Cleanup(func() {
		if network != nil {
			network.Mend()
		}
		p.Close()
	})
	return p
}

func streamOf(topic string, number string) string {
	return strings.ReplaceAll(topic, ".", "+") + "+" + number
}

// streams returns the streams of a topic by partition, by the rules in the package's documentation.
func (b *broker) streams(t *testing.T, topic string) []jetstream.Stream {
	t.Helper()
	js := b.admin(t)
	var all []jetstream.Stream
	for number := range 100 {
		stream, err := js.Stream(t.Context(), streamOf(topic, strconv.Itoa(number)))
		if err != nil {
			return all
		}
		all = append(all, stream)
	}
	return all
}

// read returns the messages of a topic by the rules in the package's documentation, not by the code
// under test.
func (b *broker) read(t *testing.T, topic string) map[int32][]consumer.Delivery {
	t.Helper()
	all := map[int32][]consumer.Delivery{}
	for number, stream := range b.streams(t, topic) {
		state := stream.CachedInfo().State
		for seq := state.FirstSeq; seq != 0 && seq <= state.LastSeq; seq++ {
			m, err := stream.GetMsg(t.Context(), seq)
			if err != nil {
				t.Fatal(err)
			}
			d := consumer.Delivery{Message: message.Message{Topic: topic, Body: m.Data, Header: map[string][]string{}}, Offset: int64(m.Sequence), Time: m.Time}
			for name, values := range m.Header {
				switch {
				case name == "Nats-Msg-Id":
					d.ID = values[0]
				case name == "Message-Key":
					key, err := url.PathUnescape(values[0])
					if err != nil {
						t.Fatal(err)
					}
					d.Key = []byte(key)
				case !strings.HasPrefix(name, "Nats-"):
					d.Header[name] = values
				}
			}
			all[int32(number)] = append(all[int32(number)], d)
		}
	}
	return all
}

func (b *broker) harness() *brokertest.Harness {
	network := new(brokertest.Network)
	return &brokertest.Harness{
		Network: network,
		Topic: func(t *testing.T) string {
			topic := newTopic()
			b.createTopic(t, topic, nats.TopicOptions{})
			return topic
		},
		Publisher: func(t *testing.T) relay.Publisher { return b.publisher(t, network) },
		Source: func(t *testing.T, consumer string, topics ...string) (consumer.Source, *brokertest.Network) {
			network := new(brokertest.Network)
			return b.connect(t, network).Source(consumer, topics...), network
		},
		SourceNetwork: true,
		Read:          b.read,
		Restart:       b.restart,
		Trim: func(t *testing.T, topic string) {
			for _, stream := range b.streams(t, topic) {
				if err := stream.Purge(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
		},
		Recreate: func(t *testing.T, topic string) {
			b.deleteTopic(t, topic)
			b.createTopic(t, topic, nats.TopicOptions{})
		},
		Rebalancing: b.rebalancing,
		Session:     sessionTimeout,
		Rebalance:   rebalanceTimeout,
	}
}

// rebalancing blocks until two members of a group have heard each other: both have beaten several
// times since both were heard.
func (b *broker) rebalancing(t *testing.T, group, topic string) {
	t.Helper()
	conn, err := natsgo.Connect(b.url())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	beats, err := conn.SubscribeSync("idempotency.members." + strings.ReplaceAll(group, ".", "%2E") + "." + strings.ReplaceAll(topic, ".", "%2E"))
	if err != nil {
		t.Fatal(err)
	}
	const several = 3
	for seen := map[string]int{}; len(seen) < 2 || slices.Min(slices.Collect(maps.Values(seen))) < several; {
		m, err := beats.NextMsg(time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		var beat struct {
			ID string `json:"id"`
		}
		if err := json.Unmarshal(m.Data, &beat); err != nil {
			t.Fatal(err)
		}
		if seen[beat.ID]++; len(seen) < 2 {
			seen[beat.ID] = 1
		}
	}
}

func (b *broker) deleteTopic(t *testing.T, topic string) {
	t.Helper()
	js := b.admin(t)
	for number := range b.streams(t, topic) {
		if err := js.DeleteStream(t.Context(), streamOf(topic, strconv.Itoa(number))); err != nil {
			t.Fatal(err)
		}
	}
}

// The timeouts of members in the tests.
const (
	sessionTimeout   = 3 * time.Second
	rebalanceTimeout = 5 * time.Second
)

func TestConformance(t *testing.T) {
	t.Parallel()
	brokertest.Run(t, brokertest.Features{}, func(t *testing.T) *brokertest.Harness { return startBroker(t).harness() })
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(60 * time.Second); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}
