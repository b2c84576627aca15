package nats

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/message"
)

// Members share the partitions evenly, agree whatever they heard of first, and no member has the
// first partition of each topic.
func TestMembersShareThePartitions(t *testing.T) {
	t.Parallel()
	ids := []string{"a", "b", "c"}
	first := map[string]bool{}
	for i := range 20 {
		topic := fmt.Sprint("topic", i)
		owners := ownersOf(topic, 8, ids)
		if other := ownersOf(topic, 8, []string{"c", "b", "a"}); !slices.Equal(owners, other) {
			t.Errorf("%v, and %v", owners, other)
		}
		has := map[string]int{}
		for _, id := range owners {
			has[id]++
		}
		if len(has) != 3 || slices.ContainsFunc(ids, func(id string) bool { return has[id] < 2 || has[id] > 3 }) {
			t.Errorf("%v", has)
		}
		first[owners[0]] = true
	}
	if len(first) != 3 {
		t.Errorf("only %v have a first partition", first)
	}
}

// Two groups, or two topics, never meet on one subject.
func TestSubjectsOfGroupsDiffer(t *testing.T) {
	t.Parallel()
	seen := map[string]string{}
	for _, c := range [][2]string{{"a.b", "c"}, {"a", "b.c"}, {"a%2Eb", "c"}, {"a", "b"}} {
		subject := subjectOfGroup(c[0], c[1])
		if seen[subject] != "" {
			t.Errorf("%v and %s have the subject %s", c, seen[subject], subject)
		}
		seen[subject] = fmt.Sprint(c)
	}
}

// passing is a receiver that passes its messages on, and settles the first one of a call.
type passing struct {
	least int // messages of a call; with less it settles nothing
	calls chan []consumer.Delivery
	goOn  chan struct{}
}

func newPassing(least int) *passing {
	return &passing{least: least, calls: make(chan []consumer.Delivery), goOn: make(chan struct{})}
}

func (p *passing) BatchMax() int { return max(p.least, 1) }

func (p *passing) Assigned(context.Context, consumer.Partition) (int64, error) {
	return consumer.FromOldest, nil
}

func (p *passing) Receive(ctx context.Context, _ consumer.Partition, all []consumer.Delivery) (settled int, pause time.Duration) {
	if len(all) < p.least {
		return 0, time.Millisecond
	}
	select {
	case p.calls <- all:
	case <-ctx.Done(): // the test has ended
		return len(all), 0
	}
	select {
	case <-p.goOn:
		return 1, 0
	case <-ctx.Done():
		return len(all), 0
	}
}

// next waits for a call, and returns its first message's id.
func (p *passing) next(t *testing.T) string {
	t.Helper()
	select {
	case all := <-p.calls:
		return all[0].ID
	case <-time.After(time.Minute):
		t.Fatal("no call began within a minute")
		return ""
	}
}

// startWorker runs the worker of a topic's only partition, of a member that does nothing by itself.
func startWorker(t *testing.T, p *passing) (w *worker, ended <-chan struct{}, publish func(id string)) {
	t.Helper()
	one, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, JetStream: true, StoreDir: t.TempDir(), NoLog: true, NoSigs: true})
	if err != nil {
		t.Fatal(err)
	}
	one.Start()
	t.Cleanup(func() {
		one.Shutdown()
		one.WaitForShutdown()
	})
	if !one.ReadyForConnections(30 * time.Second) {
		t.Fatal("the server is not ready")
	}
	client, err := Connect(one.ClientURL(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := client.CreateTopic(t.Context(), "topic", &TopicOptions{Partitions: 1}); err != nil {
		t.Fatal(err)
	}
	publisher := client.Publisher()
	t.Cleanup(publisher.Close)
	conn, err := client.conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.close)
	ctx, end := context.WithCancelCause(t.Context())
	m := newMember(ctx, end, client.Source("group", "topic"), conn, "topic", p)
	m.partitions, m.heardOf = 1, time.Now().Add(time.Hour) // whatever the machine does
	w = newWorker(m, 0)
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.run()
	}()
	t.Cleanup(func() {
		w.stop(0)
		<-done
		end(nil)
	})
	return w, done, func(id string) {
		t.Helper()
		if err := publisher.Publish(t.Context(), []message.Message{{ID: id, Topic: "topic"}})[0]; err != nil {
			t.Fatal(err)
		}
	}
}

// A process is paused past its session, and goes on. Its worker may be the first to run: it begins
// no call before the member has found out whether it still has the partition.
func TestWorkerOfAPausedMemberBeginsNoCall(t *testing.T) {
	t.Parallel()
	p := newPassing(1)
	w, _, publish := startWorker(t, p)
	heard := func(at time.Time) {
		w.member.mu.Lock()
		defer w.member.mu.Unlock()
		w.member.heardOf = at
	}
	publish("1")
	if id := p.next(t); id != "1" {
		t.Errorf("%s was received", id)
	}
	heard(time.Now().Add(-w.member.livesFor()))
	publish("2")
	p.goOn <- struct{}{}
	select {
	case <-w.member.news: // the worker asks the member to find out
	case <-p.calls:
		t.Fatal("a call began although the member may have lost the partition")
	case <-time.After(time.Minute):
		t.Fatal("the worker did not ask within a minute")
	}
	heard(time.Now().Add(time.Hour))
	if id := p.next(t); id != "2" {
		t.Errorf("%s was received", id)
	}
	p.goOn <- struct{}{}
}

// When its partition is taken away, a worker ends the call under way, and begins no other one with
// the messages that it holds.
func TestWorkerThatIsStoppedBeginsNoOtherCall(t *testing.T) {
	t.Parallel()
	p := newPassing(2)
	w, ended, publish := startWorker(t, p)
	for _, id := range []string{"1", "2", "3"} {
		publish(id)
	}
	if id := p.next(t); id != "1" {
		t.Errorf("%s was received", id)
	}
	w.stop(time.Minute)
	p.goOn <- struct{}{} // "2" is left of its messages
	select {
	case <-ended:
	case <-p.calls:
		t.Fatal("another call began")
	case <-time.After(time.Minute):
		t.Fatal("the worker did not end within a minute")
	}
}

// A member that was paused gives up its partitions with the first of its beats that comes
// back, even if each of them came soon after the one before, and nobody looked meanwhile.
func TestMemberWhoseBeatsComeBackLateIsAlone(t *testing.T) {
	t.Parallel()
	client := &Client{options: Options{SessionTimeout: time.Minute}}
	m := newMember(t.Context(), func(error) {}, &Source{client: client}, nil, "topic", newPassing(0))
	w := newWorker(m, 0)
	m.workers[0] = w
	now := time.Now()
	m.joined, m.heardOf = now.Add(-time.Hour), now.Add(-m.livesFor()) // as long ago as it may be, and a moment
	m.sent[1] = m.heardOf.Add(m.interval())
	m.hear(&nats.Msg{Data: []byte(`{"id":"` + m.id + `","number":1}`)})
	if w.ctx.Err() == nil {
		t.Error("its call goes on")
	}
}

// If two members have one partition, both give it up, even if the other one has done so before this
// one looks.
func TestPartitionThatTwoMembersHaveIsGivenUp(t *testing.T) {
	t.Parallel()
	client := &Client{options: Options{SessionTimeout: time.Minute}}
	m := newMember(t.Context(), func(error) {}, &Source{client: client}, nil, "topic", newPassing(0))
	mine, both := newWorker(m, 0), newWorker(m, 1)
	m.workers[0], m.workers[1] = mine, both
	m.joined, m.heardOf = time.Now(), time.Now()
	m.hear(&nats.Msg{Data: []byte(`{"id":"other","number":1,"has":[1,2]}`)})
	m.hear(&nats.Msg{Data: []byte(`{"id":"other","number":2,"has":[2]}`)})
	if both.ctx.Err() == nil {
		t.Error("the call in the partition of both goes on")
	}
	if mine.ctx.Err() != nil {
		t.Error("the call in the other partition was ended")
	}
}
