// Package nats publishes to and consumes from NATS JetStream, with the library nats.go.
//
//	client, err := nats.Connect("nats://nats-1:4222", nil)
//	...
//	err = client.CreateTopic(ctx, "bank-events", nil)
//	...
//	go relay.New(store.Outbox(), client.Publisher(), nil).Run(ctx)
//
// # Topics
//
// A topic has a number of partitions, and each of them is a stream of its own: partition 3 of the
// topic bank.events is the stream bank+events+3, with the subject bank.events.3. So the sequence of
// a partition has no gaps by itself, and if a limit of the stream deletes messages unread, their
// exact number is known. The number of partitions is fixed when a topic is made, and noted in the
// streams' metadata.
//
// A server that crashes may lose messages that it has confirmed, unless the stream has replicas or
// the server is configured with sync_interval: always.
//
// # Publishing
//
// A message goes to the subject of its partition, which a hash of its key chooses, or of its id if
// it has no key. Its id is the header Nats-Msg-Id, its key the header Message-Key, percent-encoded.
// The stream drops a copy that comes within its duplicate window (2 minutes by default), and
// confirms it as a duplicate. A later copy is kept: a consumer that records ids drops it. Keep the
// window above relay.Options.PublishTimeout, so that the stream also drops a copy that a broken
// connection delivers late.
//
// # Consuming
//
//	consumer.New("statements", store.Inbox(), client.Source("statements", "bank-events"), handle, nil)
//
// The offset of a message is its sequence in the stream, and the database has the offset at which a
// partition goes on. Nothing is acknowledged: a source reads with ephemeral consumers of the
// server, which have neither AckWait nor MaxDeliver. So the server never gives a message up, sends
// none again because its handler is slow, and no ack can come too late. After a restart of the
// server the source makes new consumers. If there is a gap in the sequence, the source looks in the
// stream: messages that were lost on the way are read again.
//
// NATS has no groups that share partitions. Instead each member of a group publishes on the subject
// idempotency.members.GROUP.TOPIC that it lives, and which partitions it has. So the members share
// the partitions without a lock, and nothing is stored. The costs are:
//
//   - a message of some 100 bytes per member and topic, 5 times within SessionTimeout, and the
//     right to publish and subscribe to that subject,
//   - a pause at the start: a member listens for a fifth of SessionTimeout before it begins,
//   - if a member was paused or cut off, two members may have one partition for a short time. The
//     database refuses the later commit, and both begin again.
//
// Besides, a source needs the rights for $JS.API.STREAM.INFO, $JS.API.STREAM.MSG.GET and
// $JS.API.CONSUMER of the topic's streams, and a publisher for the subjects and
// $JS.API.STREAM.INFO.
package nats

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/paidonce/idempotency/message"
)

// Partitions of a topic.
const (
	PartitionsDefault = 8
	PartitionsMax     = 1024
)

// partitionsKey is the key in a stream's metadata that has the topic's number of partitions.
const partitionsKey = "idempotency.partitions"

// Options tune a [Client]. Nil and the zero value are the defaults.
type Options struct {
	// Nats has further options of nats.go for each of its connections: nats.UserCredentials,
	// nats.Secure, nats.ReconnectWait. Options that this package sets itself have no effect here: it
	// reconnects without end and without a buffer.
	Nats []nats.Option

	// SessionTimeout is the time after which the other members of a group take the partitions of a
	// silent member. A member begins to consume a fifth of it after its start. Defaults to 15
	// seconds.
	SessionTimeout time.Duration

	// RebalanceTimeout is the time for which a call of the receiver may go on in a partition that
	// another member should have. Then its context ends. It must be above Options.BatchTimeout of
	// the consumer. Defaults to 60 seconds.
	RebalanceTimeout time.Duration

	// Logger gets the log: missing rights, and errors of sources that do not end them. Defaults to
	// slog.Default().
	Logger *slog.Logger
}

// Client is a NATS cluster. It is safe for concurrent use, and has nothing to close: a [Publisher]
// is closed by its own Close.
type Client struct {
	options Options
	nats    nats.Options
}

// Connect returns a client of a cluster. Servers are the URLs of some of its servers, separated by
// commas. Connect opens no connection, so a server that is away is no error. It fails if an option
// or a URL is invalid, and panics if a timeout is negative.
func Connect(servers string, opts *Options) (*Client, error) {
	c := new(Client)
	if opts != nil {
		c.options = *opts
	}
	if c.options.SessionTimeout < 0 || c.options.RebalanceTimeout < 0 {
		panic("idempotency/broker/nats: no option may be negative")
	}
	c.options.SessionTimeout = cmp.Or(c.options.SessionTimeout, 15*time.Second)
	c.options.RebalanceTimeout = cmp.Or(c.options.RebalanceTimeout, 60*time.Second)
	c.nats = nats.GetDefaultOptions()
	c.nats.Name = "idempotency"
	c.nats.FlusherTimeout = writeMax
	c.nats.AsyncErrorCB = func(_ *nats.Conn, _ *nats.Subscription, err error) {
		if errors.Is(err, nats.ErrPermissionViolation) { // the call itself only gets a timeout
			c.logger().Warn("idempotency: NATS denies a right", "error", err)
		}
	}
	for _, option := range c.options.Nats {
		if option == nil {
			continue
		}
		if err := option(&c.nats); err != nil {
			return nil, fmt.Errorf("connect to nats: %w", err)
		}
	}
	for server := range strings.SplitSeq(servers, ",") {
		server = strings.TrimSpace(server)
		if u, err := url.Parse(server); err != nil || u.Host == "" {
			// The URL itself may have a password.
			return nil, errors.New("connect to nats: a server has no valid URL: pass URLs like nats://host:4222, separated by commas")
		}
		c.nats.Servers = append(c.nats.Servers, server)
	}
	c.nats.AllowReconnect, c.nats.MaxReconnect, c.nats.RetryOnFailedConnect = true, -1, true
	// Otherwise messages of an outage would be sent after their Publish had failed.
	c.nats.ReconnectBufSize = -1
	c.nats.NoEcho = false              // a member needs its own beats
	c.nats.IgnoreAuthErrorAbort = true // rights may come back
	return c, nil
}

func (c *Client) logger() *slog.Logger { return cmp.Or(c.options.Logger, slog.Default()) }

// conn is a connection that reconnects by itself.
type conn struct {
	nats   *nats.Conn
	js     jetstream.JetStream
	dialer *dialer
}

// conn returns a connection, which may not be connected yet. The library takes no context: if it
// returns after ctx has ended, the connection is closed.
func (c *Client) conn(ctx context.Context) (*conn, error) {
	options := c.nats
	one := &conn{dialer: &dialer{dial: options.CustomDialer}}
	if one.dialer.dial == nil {
		one.dialer.dial = &net.Dialer{Timeout: options.Timeout}
	}
	options.CustomDialer = one.dialer
	connected := make(chan error, 1)
	go func() {
		var err error
		if one.nats, err = options.Connect(); err == nil {
			one.js, err = jetstream.New(one.nats)
		}
		connected <- err
	}()
	select {
	case err := <-connected:
		return one, err
	case <-ctx.Done():
		one.dialer.close()
		go func() {
			if err := <-connected; err == nil {
				one.close()
			}
		}()
		return nil, fmt.Errorf("no server is reached: %w", ctx.Err())
	}
}

// close closes the connection without sending what is still in its buffers.
func (c *conn) close() {
	c.dialer.close()
	c.nats.Close()
}

// dialer dials the connections of one conn. It closes them without the library, which would flush
// its buffer first.
type dialer struct {
	dial nats.CustomDialer

	mu     sync.Mutex
	closed bool
	last   net.Conn
}

// Dial implements nats.CustomDialer.
func (d *dialer) Dial(network, address string) (net.Conn, error) {
	one, err := d.dial.Dial(network, address)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		_ = one.Close()
		return nil, net.ErrClosed
	}
	d.last = one
	return one, nil
}

func (d *dialer) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	if d.last != nil {
		_ = d.last.Close()
	}
}

// TopicOptions tune a topic that is made. Nil and the zero value are the defaults.
type TopicOptions struct {
	// Partitions is the number of partitions, at most 1024 ([PartitionsMax]). It bounds the number of
	// processes that share the topic. It can't be changed later. Defaults to 8.
	Partitions int

	// Stream has the other settings of each partition's stream: Replicas, MaxAge, MaxBytes,
	// Duplicates, Storage. Name, subjects and retention policy are set by this package.
	Stream jetstream.StreamConfig
}

// CreateTopic makes a topic. If it is there already, CreateTopic changes nothing, so each process may
// call it when it starts. It fails if the topic has another number of partitions.
func (c *Client) CreateTopic(ctx context.Context, topic string, opts *TopicOptions) error {
	var o TopicOptions
	if opts != nil {
		o = *opts
	}
	if o.Partitions == 0 {
		o.Partitions = PartitionsDefault
	}
	if o.Partitions < 0 || o.Partitions > PartitionsMax {
		return fmt.Errorf("create a topic: it must have 1 to %d partitions", PartitionsMax)
	}
	if err := checkTopic(topic); err != nil {
		return fmt.Errorf("create a topic: %w", err)
	}
	one, err := c.conn(ctx)
	if err != nil {
		return fmt.Errorf("create a topic: %w", err)
	}
	defer one.close()
	if err := one.ready(ctx); err != nil {
		return fmt.Errorf("create a topic: %w", err)
	}
	// The first partition is made last: if its stream is there, the topic is, and has its number.
	stream, err := one.js.Stream(ctx, streamName(topic, 0))
	if err == nil {
		err = o.fits(stream)
	} else if errors.Is(err, jetstream.ErrStreamNotFound) {
		err = nil
	}
	if err != nil {
		return fmt.Errorf("create a topic: %w", err)
	}
	for number := o.Partitions - 1; number >= 0; number-- {
		if err := one.createStream(ctx, topic, number, &o); err != nil {
			return fmt.Errorf("create a topic: partition %d: %w", number, err)
		}
	}
	return nil
}

// createStream makes the stream of a partition, unless it is there.
func (c *conn) createStream(ctx context.Context, topic string, number int, o *TopicOptions) error {
	config := o.Stream
	config.Name, config.Subjects, config.Retention = streamName(topic, number), []string{subjectOf(topic, number)}, jetstream.LimitsPolicy
	config.Metadata = maps.Clone(config.Metadata)
	if config.Metadata == nil {
		config.Metadata = map[string]string{}
	}
	config.Metadata[partitionsKey] = strconv.Itoa(o.Partitions)
	_, err := c.js.CreateStream(ctx, config)
	if !errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
		return err
	}
	stream, err := c.js.Stream(ctx, config.Name)
	if err != nil {
		return err
	}
	return o.fits(stream)
}

// fits returns an error if the topic of this stream has another number of partitions.
func (o *TopicOptions) fits(stream jetstream.Stream) error {
	has, err := partitionsOf(stream.CachedInfo())
	if err == nil && has != o.Partitions {
		err = fmt.Errorf("the topic has %d partitions, not %d: the number is fixed, so ask for %d, or publish to a new topic", has, o.Partitions, has)
	}
	return err
}

// ready blocks until there is a connection.
func (c *conn) ready(ctx context.Context) error {
	for !c.nats.IsConnected() {
		select {
		case <-ctx.Done():
			return fmt.Errorf("no server is reached: %w", ctx.Err())
		case <-time.After(connectInterval):
		}
	}
	return nil
}

// writeMax is the time for which a write may hang before the connection counts as broken.
const writeMax = 5 * time.Second

const connectInterval = 20 * time.Millisecond

// errForeign: a stream has the name of a partition, but is none.
var errForeign = errors.New("the stream was not made by CreateTopic")

// partitionsOf returns the number of partitions of the topic that a stream belongs to.
func partitionsOf(info *jetstream.StreamInfo) (int, error) {
	n, err := strconv.Atoi(info.Config.Metadata[partitionsKey])
	if err != nil || n < 1 || n > PartitionsMax {
		return 0, fmt.Errorf("%w: the metadata of %s has no valid %s", errForeign, info.Config.Name, partitionsKey)
	}
	return n, nil
}

// partitions returns a topic's number of partitions. The error is jetstream.ErrStreamNotFound if
// there is no such topic.
func (c *conn) partitions(ctx context.Context, topic string) (int, error) {
	stream, err := c.js.Stream(ctx, streamName(topic, 0))
	if err != nil {
		return 0, err
	}
	return partitionsOf(stream.CachedInfo())
}

// streamName returns the name of a partition's stream. A dot can't be in it.
func streamName(topic string, number int) string {
	return strings.ReplaceAll(topic, ".", "+") + "+" + strconv.Itoa(number)
}

func subjectOf(topic string, number int) string { return topic + "." + strconv.Itoa(number) }

// checkTopic returns an error if no subject can have the topic's name.
func checkTopic(topic string) error {
	if err := (&message.Message{Topic: topic}).Validate(); err != nil {
		return err
	}
	if strings.HasPrefix(topic, ".") || strings.HasSuffix(topic, ".") || strings.Contains(topic, "..") {
		return errors.New("a subject of NATS begins and ends with no dot, and has no two in a row: rename the topic")
	}
	return nil
}

// partitionOf returns the partition of a message among n. It must never change: another function
// would move keys to other partitions, and their messages would lose their order. Copies of a
// message are in one partition.
func partitionOf(m *message.Message, n int) int {
	by := m.Key
	if by == nil {
		by = []byte(m.ID)
	}
	sum := sha256.Sum256(by)
	return int(binary.BigEndian.Uint64(sum[:8]) % uint64(n)) //nolint:gosec // below n
}
