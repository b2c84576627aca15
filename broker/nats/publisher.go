package nats

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/relay"
)

// KeyHeader is the header of a message that has its key, percent-encoded. It is absent if there is
// none.
const KeyHeader = "Message-Key"

// reservedPrefix begins the headers that the server obeys.
const reservedPrefix = "Nats-"

const (
	connsMax = 4   // kept while no Publish needs them
	atOnce   = 100 // messages of one Publish under way
	// tryMax bounds the wait for one confirmation. After it the message is sent again.
	tryMax   = 2 * time.Second
	retryMax = 500 * time.Millisecond // the longest pause between two tries
)

var errBehind = errors.New("a message of its key before it was not published")

// Publisher publishes messages. It is safe for concurrent use.
type Publisher struct {
	client     *Client
	duplicates atomic.Int64

	mu     sync.Mutex
	idle   []*publishing
	closed bool
}

var _ relay.Publisher = (*Publisher)(nil)

// Publisher returns a publisher for a relay.
func (c *Client) Publisher() *Publisher { return &Publisher{client: c} }

// Duplicates returns the number of messages that the server confirmed as copies of messages that it
// has. A relay published them again: it had died between a confirmation and the deletion of the
// message, say.
func (p *Publisher) Duplicates() int64 { return p.duplicates.Load() }

// Close closes the connections. Messages that are being published are not known to be kept, and
// those that are published later fail.
func (p *Publisher) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, one := range p.idle {
		one.close()
	}
	p.idle = nil
}

// Publish implements [relay.Publisher].
//
// A message is refused for good if it breaks a limit, if it has a header that the server would obey
// (Nats-...) or the header Message-Key, if it is larger than the server's max_payload or the
// stream's limit, if its headers have more than 64 KiB on the wire, or if the topic does not exist.
// It is not refused if the stream is full or a right is missing.
//
// A message is sent again until it is confirmed, the server answers with an error, or ctx ends. So
// an outage of the server is no error until then. After the end of ctx the connection is closed,
// and nothing more is sent. The server may still keep what was sent last.
func (p *Publisher) Publish(ctx context.Context, messages []message.Message) []error {
	results := make([]error, len(messages))
	one, err := p.take(ctx)
	if err != nil {
		for i := range results {
			results[i] = fmt.Errorf("publish to nats: %w", err)
		}
		return results
	}
	stop := context.AfterFunc(ctx, one.dialer.close) // it ends a write that hangs, too
	var waiting sync.WaitGroup
	slots := make(chan struct{}, atOnce)
	for _, indexes := range byOrder(messages) {
		slots <- struct{}{}
		waiting.Go(func() {
			defer func() { <-slots }()
			for at, i := range indexes {
				if at > 0 && results[indexes[at-1]] != nil {
					results[i] = errBehind
				} else {
					results[i] = one.publish(ctx, &messages[i])
				}
			}
		})
	}
	waiting.Wait()
	if stop() {
		p.give(one)
	} else {
		one.close()
	}
	return results
}

// byOrder returns the indexes of the messages. Those of one topic and key are together, in their
// order.
func byOrder(messages []message.Message) [][]int {
	var all [][]int
	at := map[string]int{} // topic and key
	for i := range messages {
		m := &messages[i]
		group := m.Topic + "\x00" + string(m.Key)
		if known, ok := at[group]; ok && m.Key != nil {
			all[known] = append(all[known], i)
			continue
		}
		if m.Key != nil {
			at[group] = len(all)
		}
		all = append(all, []int{i})
	}
	return all
}

// publishing is a connection that one Publish at a time uses.
type publishing struct {
	*conn
	publisher *Publisher

	mu         sync.Mutex
	partitions map[string]int // by topic
}

func (p *Publisher) take(ctx context.Context) (*publishing, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil, errors.New("the publisher is closed")
	}
	if n := len(p.idle); n > 0 {
		defer p.mu.Unlock()
		one := p.idle[n-1]
		p.idle = p.idle[:n-1]
		return one, nil
	}
	p.mu.Unlock()
	one, err := p.client.conn(ctx)
	if err != nil {
		return nil, err
	}
	return &publishing{conn: one, publisher: p, partitions: map[string]int{}}, nil
}

func (p *Publisher) give(one *publishing) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || len(p.idle) == connsMax || one.nats.IsClosed() {
		one.close()
		return
	}
	p.idle = append(p.idle, one)
}

// publish sends a message until it is confirmed, refused, or ctx ends.
func (p *publishing) publish(ctx context.Context, m *message.Message) error {
	if err := check(m); err != nil {
		return fmt.Errorf("%w: %w", relay.ErrRefused, err)
	}
	for try := 0; ; try++ {
		err := p.try(ctx, m)
		switch {
		case err == nil || errors.Is(err, relay.ErrRefused):
			return err
		case ctx.Err() != nil || isAnswer(err) || p.nats.IsClosed():
			return fmt.Errorf("publish to nats: %w", err)
		}
		limit := min(10*time.Millisecond<<min(try, 10), retryMax)
		select {
		case <-ctx.Done():
			return fmt.Errorf("publish to nats: %w: %w", ctx.Err(), err)
		case <-time.After(limit/2 + rand.N(limit/2+1)):
		}
	}
}

// try sends a message once, and waits for its confirmation.
func (p *publishing) try(ctx context.Context, m *message.Message) error {
	ctx, cancel := context.WithTimeout(ctx, tryMax)
	defer cancel()
	n, err := p.partitionsOf(ctx, m.Topic)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return fmt.Errorf("%w: there is no such topic: make it with Client.CreateTopic, then retry the message", relay.ErrRefused)
	}
	if err != nil {
		return err
	}
	number := partitionOf(m, n)
	out := &nats.Msg{Subject: subjectOf(m.Topic, number), Header: header(m), Data: m.Body}
	ack, err := p.js.PublishMsg(ctx, out, jetstream.WithExpectStream(streamName(m.Topic, number)), jetstream.WithRetryAttempts(0))
	var api *jetstream.APIError
	switch {
	case err == nil:
		if ack.Duplicate {
			p.publisher.duplicates.Add(1)
		}
		return nil
	case errors.Is(err, nats.ErrMaxPayload):
		return fmt.Errorf("%w: it is larger than the server's max_payload of %d bytes", relay.ErrRefused, p.nats.MaxPayload())
	case errors.As(err, &api) && api.ErrorCode == errMessageTooLarge:
		return fmt.Errorf("%w: it is larger than max_msg_size of the stream %s", relay.ErrRefused, streamName(m.Topic, number))
	case errors.As(err, &api) && api.ErrorCode == errHeaderTooLarge:
		return fmt.Errorf("%w: its headers, with its id and its key, have more than the 64 KiB that the server takes", relay.ErrRefused)
	default:
		// The topic may be gone, or recreated: the next try finds out. If nobody answers on a subject,
		// that proves nothing: the stream may have no leader at the moment.
		p.mu.Lock()
		delete(p.partitions, m.Topic)
		p.mu.Unlock()
		return err
	}
}

// Codes of the server that the library has no name for.
const (
	errMessageTooLarge jetstream.ErrorCode = 10054 // than the stream's MaxMsgSize
	errHeaderTooLarge  jetstream.ErrorCode = 10097
	errNotAvailable    jetstream.ErrorCode = 10008 // no leader at the moment
)

func (p *publishing) partitionsOf(ctx context.Context, topic string) (int, error) {
	p.mu.Lock()
	n, ok := p.partitions[topic]
	p.mu.Unlock()
	if ok {
		return n, nil
	}
	n, err := p.conn.partitions(ctx, topic)
	if err != nil {
		return 0, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.partitions[topic] = n
	return n, nil
}

// isAnswer reports whether an error is the server's answer, which it would repeat at once. That
// JetStream is not ready is none.
func isAnswer(err error) bool {
	if errors.Is(err, errForeign) {
		return true
	}
	var api *jetstream.APIError
	var js jetstream.JetStreamError
	if errors.As(err, &js) {
		api = js.APIError()
	}
	if api == nil && !errors.As(err, &api) {
		return false
	}
	return api.ErrorCode != errNotAvailable && api.ErrorCode != jetstream.JSErrCodeJetStreamNotEnabled
}

// check returns an error if a message can't be published whatever the server says.
func check(m *message.Message) error {
	if err := m.Validate(); err != nil {
		return err
	}
	if err := checkTopic(m.Topic); err != nil {
		return err
	}
	for name := range m.Header {
		if name == KeyHeader || len(name) >= len(reservedPrefix) && strings.EqualFold(name[:len(reservedPrefix)], reservedPrefix) {
			return fmt.Errorf("it has the header %s, or one that begins with %s, which the server obeys: rename the header", KeyHeader, reservedPrefix)
		}
	}
	return nil
}

// header returns the headers of a message for the server.
func header(m *message.Message) nats.Header {
	all := nats.Header{}
	for name, values := range m.Header {
		all[name] = values
	}
	if m.ID != "" {
		all[jetstream.MsgIDHeader] = []string{m.ID}
	}
	if m.Key != nil {
		all[KeyHeader] = []string{url.PathEscape(string(m.Key))}
	}
	return all
}
