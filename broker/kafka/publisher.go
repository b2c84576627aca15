package kafka

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/relay"
)

// IDHeader is the header of a record that has the message's id.
const IDHeader = "message-id"

// RecordBytesMax is the maximum size of a message as a record: key, body and headers, 10 bytes more
// for each header, and 100 bytes more for the record. With the batch around it, brokers take that
// by default. A larger message is refused. If a topic's max.message.bytes is lower, that counts.
const RecordBytesMax = 1_000_000

const (
	producersMax = 4 // kept while no Publish needs them
	metadataMin  = 250 * time.Millisecond
	// unknownTopicTries is the number of times that the metadata must say that there is no such topic.
	// A topic that was just created is not known to each broker at once.
	unknownTopicTries = 4
)

var errBehind = errors.New("a message of its key before it was not published")

// Publisher publishes messages. It is safe for concurrent use.
type Publisher struct {
	client *Client
	mu     sync.Mutex
	idle   []*producer
	closed bool
}

var _ relay.Publisher = (*Publisher)(nil)

// Publisher returns a publisher for a relay.
func (c *Client) Publisher() *Publisher { return &Publisher{client: c} }

// Close closes the connections. Messages that are being published are not known to be kept, and
// those that are published later fail.
func (p *Publisher) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, one := range p.idle {
		one.kgo.Close()
	}
	p.idle = nil
}

// Publish implements [relay.Publisher].
//
// A message is refused for good if it breaks a limit, if the broker calls it invalid or too large,
// or if the topic does not exist. It is not refused for a missing right.
//
// The producer tries until ctx ends, and an outage of the broker is no error until then. After that
// its connections are closed, so that it sends nothing more. The broker may still keep what was
// sent last. So messages that are published again may arrive twice, but with the same ids, and not
// before the messages in front of them: a consumer that drops copies gets each key in its order.
func (p *Publisher) Publish(ctx context.Context, messages []message.Message) []error {
	b := batch{messages: messages, results: make([]error, len(messages)), failed: map[string]int{}}
	one, err := p.take(ctx)
	if err != nil {
		for i := range messages {
			b.results[i] = fmt.Errorf("publish to kafka: %w", err)
		}
		return b.results
	}
	stop := context.AfterFunc(ctx, one.kgo.Close)
	b.publish(ctx, one)
	if stop() {
		p.give(one)
	}
	return b.results
}

// producer is a client of the library that one Publish at a time uses. It sends nothing outside of
// flush, because of kgo.ManualFlushing: so no message is under way while others of its key are
// still being added.
type producer struct {
	kgo   *kgo.Client
	known map[string]bool // the topics that the library knows: a message of each was confirmed or refused
}

func (p *Publisher) take(ctx context.Context) (*producer, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, errors.New("the publisher is closed")
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if n := len(p.idle); n > 0 {
		one := p.idle[n-1]
		p.idle = p.idle[:n-1]
		return one, nil
	}
	client, err := p.client.kgo(kgo.ManualFlushing(), kgo.MaxBufferedRecords(1<<30), kgo.RequiredAcks(kgo.AllISRAcks()),
		kgo.UnknownTopicRetries(unknownTopicTries), kgo.MetadataMinAge(metadataMin))
	if err != nil {
		return nil, err
	}
	return &producer{kgo: client, known: map[string]bool{}}, nil
}

func (p *Publisher) give(one *producer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || len(p.idle) == producersMax {
		one.kgo.Close()
		return
	}
	p.idle = append(p.idle, one)
}

// batch is the messages of one Publish.
type batch struct {
	messages []message.Message
	results  []error
	failed   map[string]int // by topic and key: the index of the first message that failed
}

// publish publishes all messages. The first one of a topic that was not used yet goes alone: it
// makes the library load the topic's partitions, so that all others are added at once.
func (b *batch) publish(ctx context.Context, one *producer) {
	var heads, rest []int
	first := map[string]int{} // by topic
	for i := range b.messages {
		m := &b.messages[i]
		_, hasFirst := first[m.Topic]
		switch err := check(m); {
		case err != nil:
			b.fail(i, err)
		case b.behind(i):
			b.fail(i, errBehind)
		case hasFirst || one.known[m.Topic]:
			rest = append(rest, i)
		default:
			first[m.Topic] = i
			heads = append(heads, i)
		}
	}
	b.send(ctx, one, heads)
	b.send(ctx, one, slices.DeleteFunc(rest, func(i int) bool {
		topic := b.messages[i].Topic
		if !one.known[topic] { // the error of the first one is that of all
			b.fail(i, b.results[first[topic]])
		}
		return !one.known[topic]
	}))
}

// send publishes the messages with these indexes. If the broker refuses one, it refuses all
// messages in its produce request, and the library fails those behind. Then each half is tried
// again, down to the message itself. The broker keeps no message that it refuses.
func (b *batch) send(ctx context.Context, one *producer, indexes []int) {
	indexes = slices.DeleteFunc(indexes, func(i int) bool {
		if b.behind(i) {
			b.fail(i, errBehind)
		}
		return b.behind(i)
	})
	var refused []int
	for at, err := range one.flush(ctx, b.messages, indexes) {
		i := indexes[at]
		switch topic := b.messages[i].Topic; {
		case err == nil:
			one.known[topic] = true
		case isUnknownTopic(err):
			delete(one.known, topic)
			one.kgo.PurgeTopicsFromProducing(topic) // it may be recreated, with another id
			b.fail(i, fmt.Errorf("%w: there is no such topic: create it, then retry the message", relay.ErrRefused))
		case isRefusal(err) && len(indexes) > 1:
			one.known[topic] = true
			refused = append(refused, i)
		case isRefusal(err):
			one.known[topic] = true
			b.fail(i, fmt.Errorf("%w: %w", relay.ErrRefused, err))
		case ctx.Err() != nil:
			b.fail(i, fmt.Errorf("publish to kafka: the broker has not confirmed it in time: %w", ctx.Err()))
		default:
			b.fail(i, fmt.Errorf("publish to kafka: %w", err))
		}
	}
	switch {
	case len(refused) == len(indexes) && len(refused) > 1:
		b.send(ctx, one, refused[:len(refused)/2])
		b.send(ctx, one, refused[len(refused)/2:])
	case len(refused) > 0:
		b.send(ctx, one, refused)
	}
}

// fail records the error of a message. The later ones of its key are not published.
func (b *batch) fail(i int, err error) {
	b.results[i] = err
	switch m := &b.messages[i]; {
	case m.Key == nil:
	case b.behind(i):
		b.results[i] = errBehind
	default:
		b.failed[group(m)] = i
	}
}

// behind reports whether a message of the same topic and key before this one has failed.
func (b *batch) behind(i int) bool {
	first, ok := b.failed[group(&b.messages[i])]
	return ok && first < i
}

// group returns the topic and key of a message that has an order to keep, or "".
func group(m *message.Message) string {
	if m.Key == nil {
		return ""
	}
	return m.Topic + "\x00" + string(m.Key)
}

// flush sends messages and waits for the broker's answer to each.
func (p *producer) flush(ctx context.Context, messages []message.Message, indexes []int) []error {
	results := make([]error, len(indexes))
	var waiting sync.WaitGroup
	for at, i := range indexes {
		waiting.Add(1)
		// The context of a record would end it only if it was not sent yet. So Publish closes the client.
		p.kgo.Produce(context.WithoutCancel(ctx), record(&messages[i]), func(_ *kgo.Record, err error) {
			results[at] = err
			waiting.Done()
		})
	}
	_ = p.kgo.Flush(ctx) // each message has its own result
	waiting.Wait()
	return results
}

// check returns an error if a message can't be published whatever the broker says.
func check(m *message.Message) error {
	if err := m.Validate(); err != nil {
		return fmt.Errorf("%w: %w", relay.ErrRefused, err)
	}
	size := len(m.Key) + len(m.Body) + 100
	for name, values := range m.Header {
		for _, value := range values {
			size += len(name) + len(value) + 10
		}
	}
	if size > RecordBytesMax {
		return fmt.Errorf("%w: as a record it has %d bytes, over the limit of %d", relay.ErrRefused, size, RecordBytesMax)
	}
	return nil
}

// record returns the record of a message.
func record(m *message.Message) *kgo.Record {
	r := &kgo.Record{Topic: m.Topic, Key: m.Key, Value: m.Body, Headers: []kgo.RecordHeader{{Key: IDHeader, Value: []byte(m.ID)}}}
	for _, name := range slices.Sorted(maps.Keys(m.Header)) {
		for _, value := range m.Header[name] {
			r.Headers = append(r.Headers, kgo.RecordHeader{Key: name, Value: []byte(value)})
		}
	}
	return r
}

func isUnknownTopic(err error) bool {
	return errors.Is(err, kerr.UnknownTopicOrPartition) || errors.Is(err, kerr.UnknownTopicID)
}

// isRefusal reports whether the broker will never take the message, or one that was sent with it.
func isRefusal(err error) bool {
	for _, refusal := range []error{kerr.MessageTooLarge, kerr.RecordListTooLarge, kerr.InvalidRecord, kerr.InvalidTopicException, kerr.PolicyViolation} {
		if errors.Is(err, refusal) {
			return true
		}
	}
	return false
}
