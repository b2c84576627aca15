package nats

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nuid"

	"github.com/paidonce/idempotency/consumer"
)

// The members of a group tell each other that they live, and which partitions they have: each
// publishes a beat on the group's subject, several times within SessionTimeout. Nothing is stored.
// Members that know of each other agree which of them should have each partition. If another one
// has it, that one hands it over first.
//
// A member that does not get its own beats back gives up its partitions a fifth of SessionTimeout
// before the others take them. If two have a partition all the same, both give it up, and one of
// them begins again. None of this has to be right: the database decides which commit counts.

// beatsPerSession is the number of beats that a member sends within SessionTimeout.
const beatsPerSession = 5

// beat is a member's message to the others.
type beat struct {
	ID     string `json:"id"`
	Number uint64 `json:"number"` // of the member's beats
	Has    []int  `json:"has"`    // partitions
	Left   bool   `json:"left,omitempty"`
}

// subjectOfGroup returns the subject of the beats of a group in a topic.
func subjectOfGroup(group, topic string) string {
	escape := strings.NewReplacer("%", "%25", ".", "%2E").Replace
	return "idempotency.members." + escape(group) + "." + escape(topic)
}

// member is a member of a group in one topic.
type member struct {
	source   *Source
	topic    string
	conn     *conn
	receiver consumer.Receiver
	id       string
	ctx      context.Context
	end      context.CancelCauseFunc // ends the source; the first cause counts
	news     chan struct{}           // for run: something changed
	due      chan struct{}           // for beats: send one now

	mu         sync.Mutex
	partitions int
	workers    map[int]*worker
	peers      map[string]*peer
	number     uint64               // of the last beat
	sent       map[uint64]time.Time // times of the beats that did not come back yet
	heardOf    time.Time            // time at which the last beat that came back was sent
	joined     time.Time            // time at which the first beat came back since the start, or since alone
	told       string               // the last error in the log
}

// peer is another member.
type peer struct {
	seen time.Time
	has  []int
}

func newMember(ctx context.Context, end context.CancelCauseFunc, s *Source, one *conn, topic string, receiver consumer.Receiver) *member {
	return &member{
		source: s, topic: topic, conn: one, receiver: receiver, id: nuid.Next(), ctx: ctx, end: end,
		news: make(chan struct{}, 1), due: make(chan struct{}, 1),
		workers: map[int]*worker{}, peers: map[string]*peer{}, sent: map[uint64]time.Time{},
	}
}

func (m *member) session() time.Duration  { return m.source.client.options.SessionTimeout }
func (m *member) interval() time.Duration { return m.session() / beatsPerSession }

// run makes the member live until the context ends.
func (m *member) run() {
	for try := 0; ; try++ {
		ctx, cancel := context.WithTimeout(m.ctx, askMax)
		n, err := m.conn.partitions(ctx, m.topic)
		cancel()
		if m.ctx.Err() != nil {
			return
		}
		if err == nil {
			m.partitions = n
			break
		}
		m.trouble("a topic is not there, or not known", err)
		sleep(m.ctx, try)
	}
	subscription, err := m.conn.nats.Subscribe(subjectOfGroup(m.source.group, m.topic), m.hear)
	if err != nil {
		m.end(err)
		return
	}
	var beating sync.WaitGroup
	beating.Go(m.beats)
	for m.ctx.Err() == nil {
		m.balance()
		select {
		case <-m.ctx.Done():
		case <-m.news:
		case <-time.After(m.interval() / 2):
		}
	}
	m.stopAll(m.source.client.options.RebalanceTimeout)
	m.leave(&beating)
	_ = subscription.Unsubscribe() // the connection is closed next
}

// stopAll ends all workers: none begins another call. The contexts of the calls under way end after
// this time.
func (m *member) stopAll(most time.Duration) {
	m.mu.Lock()
	all := slices.Collect(maps.Values(m.workers))
	m.mu.Unlock()
	for _, w := range all {
		w.stop(most)
	}
	for _, w := range all {
		<-w.ended
	}
}

// hear takes a beat.
func (m *member) hear(in *nats.Msg) {
	var b beat
	if json.Unmarshal(in.Data, &b) != nil || b.ID == "" {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch known := m.peers[b.ID]; {
	case b.ID == m.id:
		sent, ok := m.sent[b.Number]
		if !ok {
			return
		}
		maps.DeleteFunc(m.sent, func(number uint64, _ time.Time) bool { return number <= b.Number })
		if !m.fresh() { // others may have its partitions, even if run has not looked meanwhile
			m.alone()
		}
		m.heardOf = sent
		if m.joined.IsZero() && m.fresh() {
			m.joined = time.Now()
		}
	case b.Left:
		delete(m.peers, b.ID)
	default:
		m.peers[b.ID] = &peer{time.Now(), b.Has}
		for _, number := range b.Has {
			if w := m.workers[number]; w != nil { // one of the two did not know of the other when it started
				w.stop(0)
			}
		}
		if known == nil {
			wake(m.due) // it should know of this member soon
		}
	}
	wake(m.news)
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// livesFor is the time for which a member counts as living to itself, after it sent a beat that
// came back. To the others it counts as living for longer: by then it has given up its partitions.
func (m *member) livesFor() time.Duration { return m.session() - m.interval() }

func (m *member) fresh() bool { return time.Since(m.heardOf) < m.livesFor() }

func (m *member) mayCall() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.fresh()
}

// beats sends beats. It has a goroutine of its own, because it blocks while the connection hangs.
func (m *member) beats() {
	for m.ctx.Err() == nil {
		m.send(false)
		select {
		case <-m.ctx.Done():
		case <-m.due:
		case <-time.After(m.interval()):
		}
	}
}

func (m *member) send(left bool) {
	m.mu.Lock()
	m.number++
	m.sent[m.number] = time.Now()
	if len(m.sent) > 10*beatsPerSession { // too old for anything
		delete(m.sent, slices.Min(slices.Collect(maps.Keys(m.sent))))
	}
	data, err := json.Marshal(beat{m.id, m.number, slices.Sorted(maps.Keys(m.workers)), left})
	m.mu.Unlock()
	if err == nil {
		err = m.conn.nats.Publish(subjectOfGroup(m.source.group, m.topic), data)
	}
	if err != nil {
		m.trouble("other members do not hear of this one", err)
	}
}

// leave tells the others that this member is gone. Otherwise they notice it a session later.
func (m *member) leave(beating *sync.WaitGroup) {
	const most = 2 * time.Second
	late := time.AfterFunc(most, m.conn.dialer.close) // a connection that hangs
	defer late.Stop()
	beating.Wait() // so that no beat follows the one that says so
	if m.conn.nats.IsConnected() {
		m.send(true)
		_ = m.conn.nats.FlushTimeout(most)
	}
}

// alone gives up all partitions at once: the others have them by now, or will have them.
func (m *member) alone() {
	if m.joined.IsZero() {
		return
	}
	m.joined = time.Time{}
	m.peers = map[string]*peer{}
	for _, w := range m.workers {
		w.stop(0)
	}
}

// balance starts and stops workers, so that the known members share the partitions.
func (m *member) balance() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.fresh() {
		m.alone()
		return
	}
	ids := []string{m.id}
	taken := map[int]bool{}
	for id, p := range m.peers {
		if time.Since(p.seen) >= m.session() {
			delete(m.peers, id)
			continue
		}
		ids = append(ids, id)
		for _, number := range p.has {
			taken[number] = true
		}
	}
	if m.joined.IsZero() || time.Since(m.joined) < m.interval() { // beats of others may still come
		return
	}
	for number, owner := range ownersOf(m.topic, m.partitions, ids) {
		switch w := m.workers[number]; {
		case owner != m.id && w != nil:
			w.stop(m.source.client.options.RebalanceTimeout)
		case owner == m.id && w == nil && !taken[number] && m.ctx.Err() == nil:
			w := newWorker(m, number)
			m.workers[number] = w
			wake(m.due)
			go func() {
				w.run()
				m.ended(w)
			}()
		}
	}
}

// ended takes a worker out, and tells the others.
func (m *member) ended(w *worker) {
	m.mu.Lock()
	delete(m.workers, w.number)
	m.mu.Unlock()
	wake(m.due)
	wake(m.news)
	close(w.ended)
}

// assigned returns the receiver's offset for a partition. If the receiver can't say, it asks again.
func (m *member) assigned(ctx context.Context, partition consumer.Partition) (int64, error) {
	for try := 0; ; try++ {
		at, err := m.receiver.Assigned(ctx, partition)
		switch {
		case err == nil:
			return at, nil
		case errors.Is(err, consumer.ErrRecreated):
			return 0, err
		case ctx.Err() != nil:
			return 0, ctx.Err()
		}
		m.trouble("the consumer has no position yet", err)
		sleep(ctx, try)
	}
}

// open returns a partition as it is now, and the number of the message to begin with. It waits for
// a stream that is not there.
func (m *member) open(ctx context.Context, number int) (consumer.Partition, uint64, error) {
	for try := 0; ; try++ {
		stream, err := m.stream(ctx, number)
		if ctx.Err() != nil {
			return consumer.Partition{}, 0, ctx.Err()
		}
		if err != nil {
			m.trouble("a stream is not there, or not known", err)
			sleep(ctx, try)
			continue
		}
		info := stream.CachedInfo()
		if n, err := partitionsOf(info); err != nil || n != m.partitions {
			return consumer.Partition{}, 0, fmt.Errorf("%w: %s had %d partitions, and has %d now", consumer.ErrRecreated, m.topic, m.partitions, n)
		}
		partition := consumer.Partition{Source: m.topic, Number: int32(number), Incarnation: incarnationOf(info)} //nolint:gosec // at most PartitionsMax
		at, err := m.assigned(ctx, partition)
		if err != nil {
			return partition, 0, err
		}
		if at == consumer.FromOldest {
			return partition, max(info.State.FirstSeq, 1), nil
		}
		return partition, uint64(max(at, 1)), nil //nolint:gosec // not negative
	}
}

// trouble logs an error that does not end the source, unless the last one was the same.
func (m *member) trouble(what string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if text := what + err.Error(); m.ctx.Err() == nil && text != m.told {
		m.told = text
		m.source.client.logger().Warn("idempotency: consuming from NATS: "+what, "group", m.source.group, "topic", m.topic, "error", err)
	}
}
