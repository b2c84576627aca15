// Package kafka publishes to and consumes from Kafka, with the library franz-go.
//
//	client, err := kafka.Connect([]string{"kafka-1:9092"}, nil)
//	...
//	publisher := client.Publisher()
//	defer publisher.Close()
//	go relay.New(store.Outbox(), publisher, nil).Run(ctx)
//
//	source := client.Source("ledger", "transfers")
//	err = consumer.New("ledger", store.Inbox(), source, project, nil).Run(ctx)
//
// Kafka's own exactly-once transactions are neither needed nor used: the ids and positions in
// PostgreSQL make the effect of each message happen once.
//
// # Publishing
//
// A message becomes a record of its topic. The key chooses the partition as Kafka's own clients do,
// the header message-id has the id, and each value of Message.Header is a header. The producer is
// idempotent and waits for all replicas in sync (acks=all). To lose no confirmed message when a
// broker is lost, a topic needs a replication factor of 3 and min.insync.replicas of 2. The
// publisher creates no topics: a message for a topic that does not exist is refused
// (relay.ErrRefused).
//
// The order of a key is that of its partition. If partitions are added to a topic, keys move to
// other partitions, and later messages of a key may overtake those that are not consumed yet.
//
// # Consuming
//
// The members of a group share the partitions of its topics, and PostgreSQL has the offset at which
// each partition goes on. For operators this means:
//
//   - After a restore of PostgreSQL, messages are read again from the restored offset on. The
//     broker must keep messages for longer than the age of the oldest backup that may be restored.
//   - Resetting the group's offsets at the broker (kafka-consumer-groups --reset-offsets) changes
//     nothing. Set next_offset in message_offsets, while the consumer is stopped.
//   - If the broker has deleted messages that were not read, or a topic was deleted and recreated,
//     the source stops with an error instead of going on at another offset.
//   - New partitions of a topic move keys to other partitions, so a message may be handled before
//     older ones of its key. Stop the relays, let the consumers reach the end of the topic, add the
//     partitions, and start the relays.
//   - Compaction deletes messages that were not read, and no consumer can notice. Topics need
//     cleanup.policy=delete.
//   - The group's offsets at the broker are for tools that show the lag. They follow the settled
//     messages by up to 5 seconds.
//   - While a consumer can't handle a partition, at most 4 MiB or 10,000 messages of it are in
//     memory, and one more fetch of 1 MiB, measured before it is decompressed.
//
// Messages of other producers are consumed too. Their id is the header message-id, or ce_id
// (CloudEvents), or id (Debezium's outbox). Without any of them the id is made of the topic, its
// id, the partition and the offset. Such an id recognizes a record that is delivered twice, but not
// a message that its producer sent as two records. Headers that HTTP does not allow (a name that is
// not a token, control characters in a value, more than 64 KiB in all) are left out.
//
// Transactions of other producers are respected: only committed messages are delivered.
//
// # Versions
//
// The tests run on Apache Kafka 4.4.0, with classic groups and with KIP-848, and on kfake, the
// broker of franz-go's own tests. Tests that need a certain error of the broker run only on kfake.
// No other version is tested; CONTRIBUTING.md says how to run the suite of brokers on a cluster of
// yours.
package kafka

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
)

// Options tune a [Client]. Nil and the zero value are the defaults.
type Options struct {
	// Kgo has further options of franz-go for each of its clients: kgo.DialTLSConfig, kgo.SASL,
	// kgo.WithLogger, hooks. An option that this package sets itself, such as acks, has no effect
	// here.
	Kgo []kgo.Opt

	// InstanceID makes each source a static member of its group (KIP-345): if the process comes back
	// within SessionTimeout, it gets its partitions without a rebalance. Each process of the consumer
	// needs an id of its own, such as the name of a StatefulSet's pod. Without one, a member that ends
	// leaves the group. If ServerAssigned is set, and a process was killed, its id is free only when
	// its session has ended: until then Run returns UNRELEASED_INSTANCE_ID.
	InstanceID string

	// ServerAssigned lets the broker assign the partitions (KIP-848, Kafka 4.0). An older broker makes
	// the source a member of a classic group with cooperative rebalances, as without the option.
	ServerAssigned bool

	// SessionTimeout is the time after which the broker gives the partitions of a silent member to
	// others. If ServerAssigned is set, the broker decides it. Defaults to 45 seconds.
	SessionTimeout time.Duration

	// RebalanceTimeout is the time that the broker gives a member to hand partitions over. Calls of
	// the receiver that are under way get it, less two heartbeats; then their context ends. It must be
	// above Options.BatchTimeout of the consumer. Defaults to 60 seconds.
	RebalanceTimeout time.Duration

	// Logger gets the log of sources: errors that do not end them. Defaults to slog.Default().
	Logger *slog.Logger
}

// Client is a Kafka cluster. It is safe for concurrent use, and has nothing to close: a [Publisher]
// is closed by its own Close, and a source's connections end with its Run.
type Client struct {
	kgoOptions []kgo.Opt
	options    Options
}

// Connect returns a client of a cluster. The brokers are host:port of some of its brokers, which
// name the others. Connect opens no connection, so a broker that is away is no error. It fails if
// an option is invalid, or if brokers is empty, and panics if a timeout is negative.
func Connect(brokers []string, opts *Options) (*Client, error) {
	if len(brokers) == 0 {
		return nil, errors.New("connect to kafka: no broker is given: pass host:port of at least one")
	}
	c := new(Client)
	if opts != nil {
		c.options = *opts
	}
	if c.options.SessionTimeout < 0 || c.options.RebalanceTimeout < 0 {
		panic("idempotency/broker/kafka: no option may be negative")
	}
	c.options.SessionTimeout = cmp.Or(c.options.SessionTimeout, 45*time.Second)
	c.options.RebalanceTimeout = cmp.Or(c.options.RebalanceTimeout, 60*time.Second)
	// Telemetry would delay the end of a client by up to a second.
	c.kgoOptions = append(slices.Clone(c.options.Kgo), kgo.SeedBrokers(brokers...), kgo.DisableClientMetrics())
	one, err := c.kgo()
	if err != nil {
		return nil, fmt.Errorf("connect to kafka: %w", err)
	}
	one.Close()
	return c, nil
}

// kgo returns a client of the library. It has this package's options too.
func (c *Client) kgo(opts ...kgo.Opt) (*kgo.Client, error) {
	return kgo.NewClient(append(c.kgoOptions[:len(c.kgoOptions):len(c.kgoOptions)], opts...)...)
}

// member returns the library's options for a member of a group.
func (c *Client) member() []kgo.Opt {
	opts := []kgo.Opt{kgo.SessionTimeout(c.options.SessionTimeout), kgo.HeartbeatInterval(c.heartbeat()), kgo.RebalanceTimeout(c.options.RebalanceTimeout)}
	if c.options.InstanceID != "" {
		opts = append(opts, kgo.InstanceID(c.options.InstanceID))
	}
	if c.options.ServerAssigned {
		opts = append(opts, kgo.ServerSideBalancer())
	}
	return opts
}

// heartbeat is Kafka's own 3 seconds, or less for a short session.
func (c *Client) heartbeat() time.Duration {
	return min(3*time.Second, c.options.SessionTimeout/10)
}

// revokeMax is the time for which a call of the receiver may go on in a partition that is taken
// away. The member learns of that up to a heartbeat late.
func (c *Client) revokeMax() time.Duration {
	return max(c.options.RebalanceTimeout-2*c.heartbeat(), c.options.RebalanceTimeout/2)
}

func (c *Client) logger() *slog.Logger {
	return cmp.Or(c.options.Logger, slog.Default())
}
