package kafka

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	"github.com/paidonce/idempotency/consumer"
)

const (
	// leaveMax bounds each of the last requests of a member, which tell the broker its offsets and
	// that it leaves. Without them others get its partitions a session later.
	leaveMax = 3 * time.Second
	askMax   = 10 * time.Second // one question about topics or offsets
	// topicsInterval is the time between two looks for topics that were recreated.
	topicsInterval = 5 * time.Second
	pauseMax       = 5 * time.Second // between tries
	errorPause     = time.Second     // of a partition that the broker does not deliver
	fetchWait      = 250 * time.Millisecond
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
// Each consumer has a group of its own. The group's offsets at the broker are for tools that show
// the lag: they follow the settled messages, and a partition never begins at them.
func (c *Client) Source(group string, topics ...string) *Source {
	if group == "" || len(topics) == 0 || slices.Contains(topics, "") {
		panic("idempotency/broker/kafka: Source needs a group and at least one topic")
	}
	return &Source{client: c, group: group, topics: slices.Clone(topics)}
}

// Run implements [consumer.Source]. An outage of the broker is no error: Run tries until ctx ends.
// These errors end it:
//
//   - consumer.ErrTrimmed, with the number of messages that were deleted unread,
//   - consumer.ErrRecreated, which the receiver returns for a topic that was recreated,
//   - the broker has lost messages that were consumed (by an unclean election, say),
//   - another process joins with the same Options.InstanceID, or the broker refuses the options.
func (s *Source) Run(ctx context.Context, receiver consumer.Receiver) error {
	for try := 0; ; try++ {
		began := time.Now()
		err := s.join(ctx, receiver)
		if ctx.Err() != nil {
			return nil
		}
		again := new(rejoinError)
		if !errors.As(err, &again) {
			return fmt.Errorf("consume from kafka: %w", err)
		}
		if time.Since(began) > topicsInterval {
			try = 0
		}
		s.client.logger().Warn("idempotency: a member joins its group again", "group", s.group, "reason", again.reason)
		sleep(ctx, try)
	}
}

// rejoinError ends a member that can go on as a new one.
type rejoinError struct{ reason string }

func (e *rejoinError) Error() string { return e.reason }

// sleep pauses before the next try.
func sleep(ctx context.Context, try int) {
	limit := min(100*time.Millisecond<<min(try, 10), pauseMax)
	select {
	case <-ctx.Done():
	case <-time.After(limit/2 + rand.N(limit/2+1)):
	}
}

// member is one membership in the group, with connections of its own.
type member struct {
	source   *Source
	log      *slog.Logger
	kgo      *kgo.Client
	receiver consumer.Receiver
	ctx      context.Context
	end      context.CancelCauseFunc // ends the membership; the first cause counts
	look     chan string             // names of topics that may have been recreated

	mu      sync.Mutex
	left    bool
	ids     map[string]kadm.TopicID // as they were when first seen
	workers map[place]*worker
	told    string // the last error in the log
}

type place struct {
	topic  string
	number int32
}

// join makes a member of the group, which lives until ctx ends or it can't go on. It returns the
// reason.
func (s *Source) join(ctx context.Context, receiver consumer.Receiver) error {
	m := &member{source: s, log: s.client.logger(), receiver: receiver, look: make(chan string, 1), ids: map[string]kadm.TopicID{}, workers: map[place]*worker{}}
	m.ctx, m.end = context.WithCancelCause(ctx)
	defer m.end(nil)
	m.mu.Lock() // the library may call our functions before it returns the client
	client, err := s.client.kgo(append(s.client.member(),
		kgo.ConsumerGroup(s.group), kgo.ConsumeTopics(s.topics...), kgo.FetchIsolationLevel(kgo.ReadCommitted()), kgo.FetchMaxWait(fetchWait),
		// PostgreSQL has the offset at which a partition goes on, and nothing skips a message.
		kgo.AdjustFetchOffsetsFn(m.assign), kgo.ConsumeResetOffset(kgo.NoResetOffset()),
		// Only offsets that are settled are committed, for tools.
		kgo.AutoCommitMarks(),
		// Polled messages are with their workers before a partition can be taken away and given back.
		kgo.BlockRebalanceOnPoll(),
		kgo.OnPartitionsRevoked(func(_ context.Context, _ *kgo.Client, lost map[string][]int32) {
			m.stop(m.of(lost), s.client.revokeMax())
			m.commit()
		}),
		kgo.OnPartitionsLost(func(_ context.Context, _ *kgo.Client, lost map[string][]int32) { m.stop(m.of(lost), 0) }),
	)...)
	m.kgo = client
	m.mu.Unlock()
	if err != nil {
		return err
	}
	var looking sync.WaitGroup
	looking.Go(m.watchTopics)
	for m.ctx.Err() == nil {
		m.take(client.PollFetches(m.ctx))
		client.AllowRebalance()
	}
	m.leave()
	looking.Wait()
	return context.Cause(m.ctx)
}

// leave stops all workers and leaves the group, which commits the settled offsets.
func (m *member) leave() {
	m.mu.Lock()
	m.left = true
	var all []*worker
	for _, w := range m.workers {
		all = append(all, w)
	}
	m.mu.Unlock()
	m.stop(all, m.source.client.revokeMax())
	ctx, cancel := context.WithTimeout(context.Background(), leaveMax)
	defer cancel()
	id, _ := m.kgo.GroupMetadata()
	_ = m.kgo.LeaveGroupContext(ctx) // at worst the broker notices by itself
	m.releaseInstance(ctx, id)
	m.kgo.Close()
	m.kgo.AllowRebalance() // Close has polled, and a goroutine of the library's would wait for ever
}

// releaseInstance tells a broker that assigns the partitions (Options.ServerAssigned) to give this
// member's InstanceID to the next one. The library's own request to leave does not have the id, so
// Kafka 4.4 refuses it, and would refuse the next member until this one's session has ended. (So it
// is with franz-go 1.22.3; kfake takes the request.)
func (m *member) releaseInstance(ctx context.Context, memberID string) {
	o := &m.source.client.options
	if o.InstanceID == "" || !o.ServerAssigned || memberID == "" {
		return
	}
	request := kmsg.NewPtrConsumerGroupHeartbeatRequest()
	request.Group, request.MemberID, request.InstanceID = m.source.group, memberID, &o.InstanceID
	request.MemberEpoch = -2 // a static member that comes back
	_, _ = request.RequestWith(ctx, m.kgo)
}

// commit tells the broker the settled offsets.
func (m *member) commit() {
	ctx, cancel := context.WithTimeout(context.Background(), leaveMax)
	defer cancel()
	if err := m.kgo.CommitMarkedOffsets(ctx); err != nil {
		m.log.Debug("idempotency: the offsets at the broker, which are for tools, are older than those in the database", "group", m.source.group, "error", err)
	}
}

// assign replaces the group's offsets by those of the receiver, and starts the partitions' workers.
func (m *member) assign(ctx context.Context, offsets map[string]map[int32]kgo.Offset) (map[string]map[int32]kgo.Offset, error) {
	for topic, numbers := range offsets {
		id, err := m.topicID(ctx, topic)
		if err != nil {
			return nil, err
		}
		for number := range numbers {
			partition := consumer.Partition{Source: topic, Number: number, Incarnation: id}
			at, err := m.begin(ctx, partition)
			if err != nil {
				return nil, err
			}
			numbers[number] = kgo.NewOffset().At(at) // the library's -2 is FromOldest
			if err := m.start(partition, at); err != nil {
				return nil, err
			}
		}
	}
	return offsets, nil
}

// begin returns the receiver's offset for a partition. If the receiver can't say, it asks again.
func (m *member) begin(ctx context.Context, partition consumer.Partition) (int64, error) {
	for try := 0; ; try++ {
		at, err := m.receiver.Assigned(ctx, partition)
		switch {
		case err == nil:
			return at, nil
		case errors.Is(err, consumer.ErrRecreated):
			m.end(err)
			return 0, err
		case ctx.Err() != nil:
			return 0, ctx.Err()
		}
		m.trouble("the consumer has no position yet", err)
		sleep(ctx, try)
	}
}

// start starts the worker of a partition. If there is one already, it got no message: the group
// changed while the library asked for its offset.
func (m *member) start(partition consumer.Partition, at int64) error {
	w := newWorker(m, partition, at)
	m.mu.Lock()
	left, former := m.left, m.workers[w.place()]
	if !left {
		m.workers[w.place()] = w
	}
	m.mu.Unlock()
	if left {
		return errors.New("the member has left")
	}
	if former != nil {
		former.halt()
		<-former.ended
	}
	go w.run()
	return nil
}

// of takes the workers of these partitions out of the member.
func (m *member) of(partitions map[string][]int32) []*worker {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []*worker
	for topic, numbers := range partitions {
		for _, number := range numbers {
			if w := m.workers[place{topic, number}]; w != nil {
				all = append(all, w)
				delete(m.workers, w.place())
			}
		}
	}
	return all
}

// stop ends workers: none begins another call. The contexts of the calls under way end after this
// time.
func (m *member) stop(workers []*worker, most time.Duration) {
	for _, w := range workers {
		w.halt()
	}
	late := time.NewTimer(most)
	defer late.Stop()
	for _, w := range workers {
		select {
		case <-w.ended:
			continue
		case <-late.C:
		}
		for _, w := range workers {
			w.cancel()
		}
		break
	}
	for _, w := range workers {
		<-w.ended
		w.cancel()
	}
}

// take passes fetched messages to the workers.
func (m *member) take(fetches kgo.Fetches) {
	for _, fetch := range fetches {
		for _, topic := range fetch.Topics {
			for _, p := range topic.Partitions {
				m.mu.Lock()
				w := m.workers[place{topic.Topic, p.Partition}]
				m.mu.Unlock()
				switch {
				case w == nil: // taken away, or an error of the group
				case len(p.Records) > 0 && w.partition.Incarnation != [16]byte{} && topic.TopicID != [16]byte{} && topic.TopicID != w.partition.Incarnation:
					m.end(&rejoinError{"a topic was recreated"})
					return
				default:
					w.add(p.Records)
				}
				if p.Err != nil {
					if w != nil {
						w.rest()
					}
					m.failed(topic.Topic, w, p.Err)
				}
			}
		}
	}
}

// failed handles an error of a partition, or of the group if w is nil.
func (m *member) failed(topic string, w *worker, err error) {
	var lost *kgo.ErrDataLoss
	switch {
	case m.ctx.Err() != nil || errors.Is(err, context.Canceled) || errors.Is(err, kgo.ErrClientClosed):
	case w != nil && errors.Is(err, kerr.OffsetOutOfRange):
		if !w.hasFailed() {
			w.fail(m.outOfRange(w))
		}
	case errors.As(err, &lost):
		m.end(lostError(lost.Topic, lost.Partition, lost.ConsumedTo, lost.ResetTo))
	case errors.Is(err, kerr.UnknownTopicID) || errors.Is(err, kerr.UnknownTopicOrPartition):
		m.trouble("a topic is not there", err)
		select {
		case m.look <- topic:
		default:
		}
	case isFinal(err):
		m.end(err)
	default:
		m.trouble("it is tried again", err)
	}
}

// isFinal reports whether a new member would get the same error. If an instance was fenced, a new
// member would fence the other one.
func isFinal(err error) bool {
	for _, final := range []error{kerr.FencedInstanceID, kerr.UnreleasedInstanceID, kerr.InvalidSessionTimeout, kerr.InvalidGroupID, kerr.InconsistentGroupProtocol} {
		if errors.Is(err, final) {
			return true
		}
	}
	return false
}

// outOfRange returns the reason for which the broker does not have the next message of a partition.
func (m *member) outOfRange(w *worker) error {
	ctx, cancel := context.WithTimeout(m.ctx, askMax)
	defer cancel()
	admin, topic, number, next := kadm.NewClient(m.kgo), w.partition.Source, w.partition.Number, w.next
	starts, err := admin.ListStartOffsets(ctx, topic)
	if err != nil {
		return &rejoinError{err.Error()}
	}
	ends, err := admin.ListEndOffsets(ctx, topic)
	if err != nil {
		return &rejoinError{err.Error()}
	}
	start, hasStart := starts.Lookup(topic, number)
	end, hasEnd := ends.Lookup(topic, number)
	switch {
	case !hasStart || !hasEnd || start.Err != nil || end.Err != nil || next < 0:
	case next < start.Offset:
		return fmt.Errorf("%w: %d messages of %s, partition %d: the oldest one that the broker has is %d, and %d was due: to go on without them, set next_offset of the partition in message_offsets to %d",
			consumer.ErrTrimmed, start.Offset-next, topic, number, start.Offset, next, start.Offset)
	case next > end.Offset:
		return lostError(topic, number, next, end.Offset)
	}
	return &rejoinError{"an offset was out of range for a moment"}
}

func lostError(topic string, number int32, consumed, end int64) error {
	return fmt.Errorf("the broker has lost messages of %s, partition %d: offset %d was consumed, and its log ends at %d: find out which are lost, then set next_offset of the partition in message_offsets to %d",
		topic, number, consumed, end, end)
}

// topicID returns the id of a topic; zero if the broker has none.
func (m *member) topicID(ctx context.Context, topic string) (kadm.TopicID, error) {
	m.mu.Lock()
	id, ok := m.ids[topic]
	m.mu.Unlock()
	if ok {
		return id, nil
	}
	found, err := m.topics(ctx, topic)
	if err != nil {
		return id, err
	}
	if err := found[topic].Err; err != nil {
		return id, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ids[topic] = found[topic].ID
	return found[topic].ID, nil
}

func (m *member) topics(ctx context.Context, topics ...string) (kadm.TopicDetails, error) {
	ctx, cancel := context.WithTimeout(ctx, askMax)
	defer cancel()
	found, err := kadm.NewClient(m.kgo).Metadata(ctx, topics...)
	if err != nil {
		return nil, err
	}
	return found.Topics, nil
}

// watchTopics ends the member if a topic was recreated: the library would go on with the former id,
// which no broker knows any more.
func (m *member) watchTopics() {
	for {
		unknown := ""
		select {
		case <-m.ctx.Done():
			return
		case unknown = <-m.look:
		case <-time.After(topicsInterval):
		}
		found, err := m.topics(m.ctx, m.source.topics...)
		if err != nil {
			m.trouble("the topics are not known", err)
			continue
		}
		m.mu.Lock()
		for topic, detail := range found {
			known, ok := m.ids[topic]
			if detail.Err == nil && ok && (topic == unknown || detail.ID != known) {
				m.end(&rejoinError{"a topic was recreated"})
			}
		}
		m.mu.Unlock()
	}
}

// trouble logs an error that does not end the member, unless the last one was the same.
func (m *member) trouble(what string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if text := what + err.Error(); m.ctx.Err() == nil && text != m.told {
		m.told = text
		m.log.Warn("idempotency: consuming from Kafka: "+what, "group", m.source.group, "error", err)
	}
}
