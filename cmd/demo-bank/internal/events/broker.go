// Package events takes the bank's messages to Kafka, and runs their consumers.
//
//   - broker.go is the broker: a given one, or one inside this process
//   - consumers.go has the consumers, and the relay
//   - naive.go has the same consumers without an inbox
//   - shown.go has both kinds again, for the page that kills them
package events

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/paidonce/idempotency/broker/kafka"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/message"
)

const (
	// Partitions is the number of partitions of a topic that this package makes.
	Partitions = 4

	// volatileID is the id of a cluster that keeps its topics in memory only. The next one has the
	// same address, and other topics under the same names.
	volatileID = "demo-bank-volatile"

	sessionTimeout   = 6 * time.Second // the shortest that brokers allow by default
	rebalanceTimeout = 12 * time.Second
	batchTimeout     = 8 * time.Second // shorter than the time that a rebalance leaves a batch
	askTimeout       = 5 * time.Second // of one request to the broker
	pauseMax         = 2 * time.Second // between two requests
)

// Broker is a Kafka cluster that has the bank's topic. It is safe for concurrent use.
type Broker struct {
	addresses []string
	inside    *kfake.Cluster // nil if the broker is a given one
	client    *kafka.Client
	publisher *kafka.Publisher
	kgo       *kgo.Client
	admin     *kadm.Client
	instance  string
	logger    *slog.Logger
}

var _ bank.Broker = (*Broker)(nil)

// Start starts a broker inside this process. It keeps its log in the folder dir, or in memory if dir
// is empty. It listens on the port if that is free, and otherwise on any free one. For instance see
// [Connect].
func Start(dir string, port int, instance string, logger *slog.Logger) (*Broker, error) {
	options := []kfake.Opt{
		kfake.NumBrokers(1), kfake.SeedTopics(Partitions, bank.Topic),
		kfake.BrokerConfigs(map[string]string{"group.initial.rebalance.delay.ms": "0"}),
	}
	if dir == "" {
		options = append(options, kfake.ClusterID(volatileID))
	} else {
		options = append(options, kfake.DataDir(dir))
	}
	cluster, err := kfake.NewCluster(append(options, kfake.Ports(port))...)
	if err != nil && port != 0 {
		cluster, err = kfake.NewCluster(append(options, kfake.Ports(0))...)
	}
	if err != nil {
		return nil, fmt.Errorf("the broker inside can't start: %w", err)
	}
	b, err := Connect(cluster.ListenAddrs(), instance, logger)
	if err != nil {
		cluster.Close()
		return nil, err
	}
	b.inside = cluster
	return b, nil
}

// Connect returns the cluster of these brokers. Each address is host:port. It opens no connection.
//
// instance, from [Instance], makes the consumers of this process static members of their groups:
// after a crash the next process of this name goes on at once. If it is empty, a crash holds all
// members up until the broker misses the dead one, after 6 seconds.
func Connect(addresses []string, instance string, logger *slog.Logger) (*Broker, error) {
	client, err := kafka.Connect(addresses, &kafka.Options{
		InstanceID: instance, SessionTimeout: sessionTimeout, RebalanceTimeout: rebalanceTimeout, Logger: logger,
	})
	if err != nil {
		return nil, fmt.Errorf("the brokers can't be used: %w: mend --brokers", err)
	}
	b := &Broker{addresses: addresses, client: client, publisher: client.Publisher(), instance: instance, logger: logger}
	if b.kgo, err = b.newClient(); err != nil {
		return nil, fmt.Errorf("the brokers can't be used: %w: mend --brokers", err)
	}
	b.admin = kadm.NewClient(b.kgo)
	return b, nil
}

// Instance returns the name of the process that listens on this address, or "" if the address has
// no fixed port.
func Instance(address string) string {
	if Port(address) == 0 {
		return ""
	}
	host, err := os.Hostname()
	if err != nil {
		return ""
	}
	return strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' {
			return r
		}
		return '-'
	}, host+"-"+address)
}

func (b *Broker) newClient(options ...kgo.Opt) (*kgo.Client, error) {
	return kgo.NewClient(append(options, kgo.SeedBrokers(b.addresses...), kgo.DisableClientMetrics())...)
}

// Close closes the connections, and ends the broker if it is inside.
func (b *Broker) Close() {
	b.publisher.Close()
	b.kgo.Close()
	if b.inside != nil {
		b.inside.Close()
	}
}

// Addresses returns host:port of the brokers.
func (b *Broker) Addresses() []string { return b.addresses }

// Inside implements [bank.Broker].
func (b *Broker) Inside() bool { return b.inside != nil }

// Port returns the port of an address, or 0.
func Port(address string) int {
	_, text, err := net.SplitHostPort(address)
	if err != nil {
		return 0
	}
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return 0
	}
	return int(port)
}

// Ready makes the topic unless it exists. It tries until it has succeeded or ctx has ended, and
// returns ctx's error.
func (b *Broker) Ready(ctx context.Context) error {
	for try := 0; ; try++ {
		err := b.makeTopic(ctx)
		if err == nil || ctx.Err() != nil {
			return ctx.Err()
		}
		if try == 0 {
			b.logger.WarnContext(ctx, "the broker does not answer, and is asked until it does; meanwhile messages wait: start it, or mend --brokers", "error", err)
		}
		pause(ctx, try)
	}
}

// pause blocks before the next try.
func pause(ctx context.Context, try int) {
	limit := min(100*time.Millisecond<<min(try, 10), pauseMax)
	select {
	case <-ctx.Done():
	case <-time.After(limit/2 + rand.N(limit/2)):
	}
}

func (b *Broker) makeTopic(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	_, err := b.admin.CreateTopic(ctx, Partitions, -1, nil, bank.Topic)
	if errors.Is(err, kerr.TopicAlreadyExists) {
		return nil
	}
	return err
}

// Publish implements [bank.Broker].
func (b *Broker) Publish(ctx context.Context, m message.Message) error {
	return b.publisher.Publish(ctx, []message.Message{m})[0]
}

// Ends implements [bank.Broker].
func (b *Broker) Ends(ctx context.Context) (source string, ends map[int32]int64, err error) {
	metadata, err := b.admin.Metadata(ctx, bank.Topic)
	if err != nil {
		return "", nil, fmt.Errorf("ask for the topic: %w", err)
	}
	listed, err := b.admin.ListEndOffsets(ctx, bank.Topic)
	if err == nil {
		err = listed.Error()
	}
	if err != nil {
		return "", nil, fmt.Errorf("ask for the end of the topic: %w", err)
	}
	ends = map[int32]int64{}
	listed.Each(func(o kadm.ListedOffset) { ends[o.Partition] = o.Offset })
	source = bank.Topic
	if metadata.Cluster == volatileID {
		source = ofIncarnation(bank.Topic, metadata.Topics[bank.Topic].ID)
	}
	return source, ends, nil
}

// Joined reports whether the group of each of the bank's consumers has this number of members, and
// has assigned the partitions to them.
func (b *Broker) Joined(ctx context.Context, processes int) bool {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	groups, err := b.admin.DescribeGroups(ctx, bank.StatementsConsumer, bank.NoticesConsumer)
	for _, g := range groups {
		if g.Err != nil || g.State != "Stable" || len(g.Members) != processes {
			return false
		}
	}
	return err == nil && len(groups) > 0
}

// Committed implements [bank.Broker].
func (b *Broker) Committed(ctx context.Context, group string) (map[int32]int64, error) {
	responses, err := b.admin.FetchOffsets(ctx, group)
	switch {
	case errors.Is(err, kerr.GroupIDNotFound):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("ask for the offsets of a group: %w", err)
	}
	committed := map[int32]int64{}
	responses.Each(func(o kadm.OffsetResponse) {
		if o.Topic == bank.Topic && o.Err == nil {
			committed[o.Partition] = o.At
		}
	})
	return committed, nil
}

// Members returns the number of members of a consumer's group, or 0 while it assigns the
// partitions.
func (b *Broker) Members(ctx context.Context, group string) (int, error) {
	described, err := b.admin.DescribeGroups(ctx, group)
	if err == nil {
		err = described.Error()
	}
	if errors.Is(err, kerr.GroupIDNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("ask for the members of a group: %w", err)
	}
	if g := described[group]; g.State == "Stable" {
		return len(g.Members), nil
	}
	return 0, nil
}

// source returns the source of a consumer.
func (b *Broker) source(consumer string) consumer.Source {
	return source{b, b.client.Source(consumer, bank.Topic)}
}

// source is a source of package kafka. The positions in a volatile cluster mean nothing in the next
// one, so the topic's id is a part of the source's name there.
type source struct {
	broker *Broker
	kafka  *kafka.Source
}

// Run implements [consumer.Source].
func (s source) Run(ctx context.Context, receiver consumer.Receiver) error {
	for try := 0; ; try++ {
		metadata, err := s.broker.admin.BrokerMetadata(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			pause(ctx, try)
			continue
		}
		if metadata.Cluster == volatileID {
			receiver = volatile{receiver}
		}
		return s.kafka.Run(ctx, receiver)
	}
}

type volatile struct{ consumer.Receiver }

// Assigned implements [consumer.Receiver].
func (v volatile) Assigned(ctx context.Context, p consumer.Partition) (int64, error) {
	p.Source = ofIncarnation(p.Source, p.Incarnation)
	return v.Receiver.Assigned(ctx, p)
}

// Receive implements [consumer.Receiver].
func (v volatile) Receive(ctx context.Context, p consumer.Partition, deliveries []consumer.Delivery) (int, time.Duration) {
	p.Source = ofIncarnation(p.Source, p.Incarnation)
	return v.Receiver.Receive(ctx, p, deliveries)
}

func ofIncarnation(topic string, id [16]byte) string {
	return topic + "@" + hex.EncodeToString(id[:])
}
