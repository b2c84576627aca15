package nats

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/paidonce/idempotency/consumer"
)

const (
	askMax   = 10 * time.Second // one question about a stream
	pauseMax = 5 * time.Second  // between tries
)

// Source is a subscription to topics. It is safe for concurrent use; each Run is a member of the
// group.
type Source struct {
	client *Client
	group  string
	topics []string
}

var _ consumer.Source = (*Source)(nil)

// Source returns a source of topics. The members of the group share the partitions of the topics.
// Each consumer has a group of its own. Its name must have no white space, no * and no >. Source
// panics if the group or a topic is invalid.
func (c *Client) Source(group string, topics ...string) *Source {
	if group == "" || strings.ContainsAny(group, "*> \t\r\n") || len(topics) == 0 {
		panic("idempotency/broker/nats: Source needs at least one topic, and a group whose name has no spaces, asterisks or angle brackets")
	}
	for _, topic := range topics {
		if err := checkTopic(topic); err != nil {
			panic("idempotency/broker/nats: Source: " + err.Error())
		}
	}
	return &Source{client: c, group: group, topics: slices.Compact(slices.Sorted(slices.Values(topics)))}
}

// Run implements [consumer.Source]. An outage of the server is no error, nor is a topic that is not
// there: Run tries until ctx ends. These errors end it:
//
//   - consumer.ErrTrimmed, with the number of messages that a limit of the stream or a purge has
//     deleted unread,
//   - consumer.ErrRecreated, which the receiver returns for a stream that was recreated,
//   - the server has lost messages that were consumed (it crashed before they were on its disk,
//     say).
//
// A message that was deleted individually is skipped, and logged.
func (s *Source) Run(ctx context.Context, receiver consumer.Receiver) error {
	parent := ctx
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	one, err := s.client.conn(ctx)
	if err == nil {
		var running sync.WaitGroup
		for _, topic := range s.topics {
			running.Go(func() { newMember(ctx, end, s, one, topic, receiver).run() })
		}
		running.Wait()
		one.close()
		err = context.Cause(ctx)
	}
	if parent.Err() != nil {
		return nil
	}
	return fmt.Errorf("consume from nats: %w", err)
}

// sleep pauses before the next try.
func sleep(ctx context.Context, try int) {
	limit := min(50*time.Millisecond<<min(try, 10), pauseMax)
	select {
	case <-ctx.Done():
	case <-time.After(limit/2 + rand.N(limit/2+1)):
	}
}

// stream returns the stream of a partition, with its state.
func (m *member) stream(ctx context.Context, number int) (jetstream.Stream, error) {
	ctx, cancel := context.WithTimeout(ctx, askMax)
	defer cancel()
	return m.conn.js.Stream(ctx, streamName(m.topic, number))
}

// incarnationOf returns the id of a stream: the time at which it was made. A stream that is made
// from a copy of the configuration is another one, and a restored backup may be too.
func incarnationOf(info *jetstream.StreamInfo) (id [16]byte) {
	binary.BigEndian.PutUint64(id[:], uint64(info.Created.UnixNano())) //nolint:gosec // only its bits
	return id
}

// checkStart returns an error if a stream does not have the next message any more, or has lost
// messages in front of it.
func checkStart(info *jetstream.StreamInfo, next uint64) error {
	first, end := max(info.State.FirstSeq, 1), info.State.LastSeq+1
	switch {
	case next < first:
		return fmt.Errorf("%w: %d messages of the stream %s: the oldest one that it has is %d, and %d was due: to go on without them, set next_offset of the partition in message_offsets to %d",
			consumer.ErrTrimmed, first-next, info.Config.Name, first, next, first)
	case next > end:
		return fmt.Errorf("the server has lost messages of the stream %s: %d was consumed, and its last one is %d: find out which are lost, then set next_offset of the partition in message_offsets to %d",
			info.Config.Name, next-1, end-1, end)
	}
	return nil
}

// errRecreated ends the reading of a stream that was recreated. The worker opens the partition
// again.
var errRecreated = errors.New("the stream was recreated")

// ownersOf returns which of these members should have each partition of a topic. All members that
// know of the same ones agree.
func ownersOf(topic string, partitions int, ids []string) []string {
	place := func(id string) string {
		sum := sha256.Sum256([]byte(topic + " " + id)) // in each topic the first one is another
		return string(sum[:])
	}
	ids = slices.SortedFunc(slices.Values(ids), func(a, b string) int { return strings.Compare(place(a), place(b)) })
	owners := make([]string, partitions)
	for number := range owners {
		owners[number] = ids[number%len(ids)]
	}
	return owners
}
