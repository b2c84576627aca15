// Package kafka publishes to and consumes from Kafka, with the library franz-go.
//
//	client, err := kafka.Connect([]string{"kafka-1:9092"}, nil)
//	...
//	go relay.New(store.Outbox(), client.Publisher(), nil).Run(ctx)
//
// # Publishing
//
// A message becomes a record of its topic. The key chooses the partition as Kafka's own clients do,
// the header message-id has the id, and each value of Message.Header is a header. The producer is
// idempotent and waits for all replicas in sync (acks=all).
//
// The order of a key is that of its partition: if partitions are added to a topic, Kafka gives keys
// to other partitions, and messages in flight may overtake each other.
package kafka

import (
	"errors"
	"fmt"

	"github.com/twmb/franz-go/pkg/kgo"
)

// Options tune a [Client]. Nil and the zero value are the defaults.
type Options struct {
	// Kgo has more options of franz-go for each of its clients: kgo.DialTLSConfig, kgo.SASL,
	// kgo.WithLogger, hooks. An option that this package sets itself, such as acks, has no effect
	// here.
	Kgo []kgo.Opt
}

// Client is a Kafka cluster. It is safe for concurrent use, and has nothing to close: a [Publisher]
// is closed by its own Close, and a source's connections end with its Run.
type Client struct {
	options []kgo.Opt
}

// Connect returns a client of the cluster that these brokers belong to: host:port of some of them,
// which name the others. It opens no connection, so a broker that is away is no error. It fails if
// an option is invalid, or there is no broker.
func Connect(brokers []string, opts *Options) (*Client, error) {
	if len(brokers) == 0 {
		return nil, errors.New("connect to kafka: no broker is given: pass host:port of at least one")
	}
	c := new(Client)
	if opts != nil {
		c.options = append(c.options, opts.Kgo...)
	}
	// Telemetry would delay the end of a client by up to a second.
	c.options = append(c.options, kgo.SeedBrokers(brokers...), kgo.DisableClientMetrics())
	one, err := c.kgo()
	if err != nil {
		return nil, fmt.Errorf("connect to kafka: %w", err)
	}
	one.Close()
	return c, nil
}

// kgo returns a client of the library. It has this package's options too.
func (c *Client) kgo(opts ...kgo.Opt) (*kgo.Client, error) {
	return kgo.NewClient(append(c.options[:len(c.options):len(c.options)], opts...)...)
}
