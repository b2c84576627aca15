package kafka_test

import (
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/paidonce/idempotency/broker/brokertest"
	"github.com/paidonce/idempotency/broker/kafka"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/internal/kafkaserver"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/relay"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// brokersVariable names the brokers of a real cluster. If it is set, the conformance suite runs on
// it too.
const brokersVariable = "KAFKA_BROKERS"

// broker is the Kafka broker of a test, on ports of its own: kfake, which runs in this process, or
// Apache Kafka if PAIDONCE_KAFKA_JARS names its jars.
type broker struct {
	brokers []string
	apache  *kafkaserver.Server // nil: kfake

	mu      sync.Mutex
	cluster *kfake.Cluster
	options []kfake.Opt
}

// groupConfigs are the broker's for groups.
func groupConfigs() map[string]string {
	return map[string]string{
		"group.initial.rebalance.delay.ms": "0", "group.consumer.heartbeat.interval.ms": "100", "group.consumer.session.timeout.ms": "3000",
		"group.consumer.min.heartbeat.interval.ms": "50", "group.consumer.min.session.timeout.ms": "500",
	}
}

// startBroker starts a broker that ends with the test.
func startBroker(t *testing.T) *broker {
	t.Helper()
	if os.Getenv(kafkaserver.JarsVariable) == "" {
		return startFake(t)
	}
	dir := t.TempDir()
	server, err := kafkaserver.Start(t.Context(), dir, &kafkaserver.Options{Settings: groupConfigs()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		server.Kill()
		if text, err := os.ReadFile(server.LogPath()); t.Failed() {
			t.Logf("%s has: %s, %v", server.LogPath(), text, err)
		}
	})
	return &broker{brokers: []string{server.Address()}, apache: server}
}

// startFake starts kfake, for a test that needs a fault of its own or a look inside. If the tests
// run on Apache Kafka, this one is skipped.
func startFake(t *testing.T) *broker {
	t.Helper()
	if os.Getenv(kafkaserver.JarsVariable) != "" {
		t.Skip("NOT RUN on Apache Kafka: this needs a fault that only kfake can have; it runs without " + kafkaserver.JarsVariable)
	}
	b := &broker{options: []kfake.Opt{
		kfake.DataDir(t.TempDir()), kfake.SyncWrites(), kfake.NumBrokers(1),
		kfake.GroupMinSessionTimeout(100 * time.Millisecond), kfake.BrokerConfigs(groupConfigs()),
	}}
	cluster, err := kfake.NewCluster(b.options...)
	if err != nil {
		t.Fatal(err)
	}
	b.cluster, b.brokers = cluster, cluster.ListenAddrs()
	t.Cleanup(func() { b.now().Close() })
	return b
}

// now is kfake as it runs now.
func (b *broker) now() *kfake.Cluster {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.cluster
}

// restart ends the broker and starts it again with its data, on its ports. Apache Kafka is killed.
func (b *broker) restart(t *testing.T) {
	t.Helper()
	if b.apache != nil {
		if err := b.apache.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.cluster.Close()
	var ports []int
	for _, address := range b.brokers {
		_, port, _ := net.SplitHostPort(address)
		number, _ := strconv.Atoi(port)
		ports = append(ports, number)
	}
	var err error
	for range 100 { // somebody else's connection may have the port for a moment
		var cluster *kfake.Cluster
		if cluster, err = kfake.NewCluster(append(b.options[:len(b.options):len(b.options)], kfake.Ports(ports...))...); err == nil {
			b.cluster = cluster
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatal(err)
}

// assigned returns the number of partitions that each member of a group, of either protocol, is to
// have.
func (b *broker) assigned(t *testing.T, group string) (partitions []int) {
	t.Helper()
	client := kadm.NewClient(admin(t, b.brokers))
	defer client.Close()
	eventually(t, "the group is described", func() bool { // after a restart the broker does not know it yet
		if described, err := client.DescribeConsumerGroups(t.Context(), group); err == nil && described[group].Err == nil {
			for _, m := range described[group].Members {
				n := 0
				for _, numbers := range m.TargetAssignment {
					n += len(numbers)
				}
				partitions = append(partitions, n)
			}
			return true
		}
		described, err := client.DescribeGroups(t.Context(), group)
		if err != nil || described.Error() != nil {
			return false
		}
		for _, m := range described[group].Members {
			n := 0
			if assigned, ok := m.Assigned.AsConsumer(); ok {
				for _, topic := range assigned.Topics {
					n += len(topic.Partitions)
				}
			}
			partitions = append(partitions, n)
		}
		return true
	})
	return partitions
}

// It logs the broker on which the other tests run, and checks that it is the wanted one.
func TestBrokerIsApacheKafka(t *testing.T) {
	t.Parallel()
	if os.Getenv(kafkaserver.JarsVariable) == "" {
		t.Skip("the tests run on kfake. ", kafkaserver.ErrNoJars)
	}
	b := startBroker(t)
	all, err := kadm.NewClient(admin(t, b.brokers)).ApiVersions(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	all.Each(func(v kadm.BrokerApiVersions) {
		if guess := v.VersionGuess(); !strings.Contains(guess, "v4.") {
			t.Errorf("the broker is Kafka %s", guess)
		} else {
			t.Logf("the broker is Apache Kafka %s, by its requests", guess)
		}
	})
}

// admin returns a client for the tests' own requests.
func admin(t *testing.T, brokers []string, opts ...kgo.Opt) *kgo.Client {
	t.Helper()
	client, err := kgo.NewClient(append(opts, kgo.SeedBrokers(brokers...), kgo.DisableClientMetrics(), kgo.MetadataMinAge(50*time.Millisecond))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	return client
}

// createTopic creates a topic with the suite's number of partitions, and waits until it is there.
func createTopic(t *testing.T, brokers []string, topic string, configs map[string]*string) {
	t.Helper()
	client := kadm.NewClient(admin(t, brokers))
	created, err := client.CreateTopic(t.Context(), brokertest.Partitions, 1, configs, topic)
	if err == nil {
		err = created.Err
	}
	if err != nil {
		t.Fatalf("create the topic: %v", err)
	}
	eventually(t, "the topic is there", func() bool {
		offsets, err := client.ListEndOffsets(t.Context(), topic)
		return err == nil && offsets.Error() == nil && len(offsets[topic]) == brokertest.Partitions
	})
}

func newTopic() string { return "topic-" + uuid.NewString() }

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(60 * time.Second); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// records returns all records of a topic, each partition in its order.
func records(t *testing.T, brokers []string, topic string) []*kgo.Record {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	offsets := kadm.NewClient(admin(t, brokers))
	starts, err := offsets.ListStartOffsets(ctx, topic)
	if err != nil {
		t.Fatal(err)
	}
	ends, err := offsets.ListEndOffsets(ctx, topic)
	if err != nil {
		t.Fatal(err)
	}
	begin := map[string]map[int32]kgo.Offset{topic: {}}
	left := map[int32]int64{}
	ends.Each(func(end kadm.ListedOffset) {
		if start, _ := starts.Lookup(topic, end.Partition); start.Offset < end.Offset {
			begin[topic][end.Partition], left[end.Partition] = kgo.NewOffset().At(start.Offset), end.Offset
		}
	})
	var all []*kgo.Record
	reader := admin(t, brokers, kgo.ConsumePartitions(begin))
	for len(left) > 0 {
		fetches := reader.PollFetches(ctx)
		if err := fetches.Err(); err != nil {
			t.Fatal(err)
		}
		fetches.EachRecord(func(r *kgo.Record) {
			all = append(all, r)
			if r.Offset+1 >= left[r.Partition] {
				delete(left, r.Partition)
			}
		})
	}
	slices.SortStableFunc(all, func(a, b *kgo.Record) int { return int(a.Partition - b.Partition) })
	return all
}

// read returns the messages of a topic by the rules of the wire, not by the code under test.
func read(t *testing.T, brokers []string, topic string) map[int32][]consumer.Delivery {
	t.Helper()
	all := map[int32][]consumer.Delivery{}
	for _, r := range records(t, brokers, topic) {
		d := consumer.Delivery{Message: message.Message{Topic: r.Topic, Key: r.Key, Body: r.Value, Header: map[string][]string{}}, Offset: r.Offset, Time: r.Timestamp}
		for _, h := range r.Headers {
			if h.Key == "message-id" {
				d.ID = string(h.Value)
			} else {
				d.Header[h.Key] = append(d.Header[h.Key], string(h.Value))
			}
		}
		all[r.Partition] = append(all[r.Partition], d)
	}
	return all
}

// timeouts of members. They are as long as a loaded machine may stop a process.
type timeouts struct{ session, rebalance time.Duration }

var (
	ownTimeouts   = timeouts{session: 3 * time.Second, rebalance: 6 * time.Second}
	theirTimeouts = timeouts{session: 6 * time.Second, rebalance: 10 * time.Second} // brokers take no shorter session by default
)

// connect returns a client behind a network.
func connect(t *testing.T, brokers []string, network *brokertest.Network, with func(o *kafka.Options)) *kafka.Client {
	t.Helper()
	o := &kafka.Options{
		Kgo: []kgo.Opt{
			kgo.Dialer(network.DialContext), kgo.RetryBackoffFn(func(int) time.Duration { return 20 * time.Millisecond }),
			kgo.MetadataMinAge(50 * time.Millisecond),
		},
		SessionTimeout: ownTimeouts.session, RebalanceTimeout: ownTimeouts.rebalance, Logger: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	if with != nil {
		with(o)
	}
	client, err := kafka.Connect(brokers, o)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

func publisher(t *testing.T, brokers []string, network *brokertest.Network) *kafka.Publisher {
	t.Helper()
	p := connect(t, brokers, network, nil).Publisher()
	t.Cleanup(func() {
		network.Mend()
		p.Close()
	})
	return p
}

// harness returns the suite's harness for these brokers.
func harness(brokers []string, times timeouts, with func(o *kafka.Options)) *brokertest.Harness {
	network := new(brokertest.Network)
	timely := func(o *kafka.Options) {
		o.SessionTimeout, o.RebalanceTimeout = times.session, times.rebalance
		if with != nil {
			with(o)
		}
	}
	return &brokertest.Harness{
		Network: network,
		Topic: func(t *testing.T) string {
			topic := newTopic()
			createTopic(t, brokers, topic, nil)
			return topic
		},
		Publisher: func(t *testing.T) relay.Publisher { return publisher(t, brokers, network) },
		Source: func(t *testing.T, consumer string, topics ...string) (consumer.Source, *brokertest.Network) {
			network := new(brokertest.Network)
			return connect(t, brokers, network, timely).Source(groupOf(consumer, topics[0]), topics...), network
		},
		SourceNetwork: true,
		Read:          func(t *testing.T, topic string) map[int32][]consumer.Delivery { return read(t, brokers, topic) },
		Trim: func(t *testing.T, topic string) {
			client := kadm.NewClient(admin(t, brokers))
			ends, err := client.ListEndOffsets(t.Context(), topic)
			if err != nil {
				t.Fatal(err)
			}
			deleted, err := client.DeleteRecords(t.Context(), ends.Offsets())
			if err == nil {
				err = deleted.Error()
			}
			if err != nil {
				t.Fatal(err)
			}
		},
		Recreate: func(t *testing.T, topic string) {
			client := kadm.NewClient(admin(t, brokers))
			deleted, err := client.DeleteTopic(t.Context(), topic)
			if err == nil {
				err = deleted.Err
			}
			if err != nil {
				t.Fatal(err)
			}
			// The controller has deleted it, and a loaded broker may still take messages for it.
			eventually(t, "the former topic is away", func() bool {
				left, err := client.ListTopics(t.Context(), topic)
				return err == nil && errors.Is(left[topic].Err, kerr.UnknownTopicOrPartition)
			})
			createTopic(t, brokers, topic, nil)
		},
		Session:   times.session,
		Rebalance: times.rebalance,
	}
}

func groupOf(consumer, topic string) string { return consumer + " of " + topic }

func TestConformance(t *testing.T) {
	t.Parallel()
	for name, with := range protocols {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			brokertest.Run(t, brokertest.Features{NoPublisher: name != "classic"}, func(t *testing.T) *brokertest.Harness {
				b := startBroker(t)
				h := harness(b.brokers, ownTimeouts, with)
				h.Restart = b.restart
				h.Rebalancing = func(t *testing.T, consumer, topic string) {
					eventually(t, "a partition is taken away", func() bool {
						shares := b.assigned(t, groupOf(consumer, topic))
						// The other member may get it in a later rebalance. During one, no member has any.
						return len(shares) == 2 && max(shares[0], shares[1]) < brokertest.Partitions && shares[0]+shares[1] > 0
					})
				}
				return h
			})
		})
	}
}

// protocols are those of a group.
var protocols = map[string]func(o *kafka.Options){
	"classic": nil,
	"KIP-848": func(o *kafka.Options) { o.ServerAssigned = true },
}

func TestConformanceOfRealBrokers(t *testing.T) {
	t.Parallel()
	brokers := os.Getenv(brokersVariable)
	if brokers == "" {
		t.Skipf("NOT RUN: set %s to host:port of the brokers of a Kafka cluster for tests", brokersVariable)
	}
	for name, with := range protocols {
		t.Run(name, func(t *testing.T) {
			brokertest.Run(t, brokertest.Features{NoPublisher: name != "classic"}, func(*testing.T) *brokertest.Harness { return harness(strings.Split(brokers, ","), theirTimeouts, with) })
		})
	}
}

func randomBytes(t *testing.T, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return b
}
