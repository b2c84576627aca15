package kafka_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/broker/brokertest"
	"github.com/paidonce/idempotency/broker/kafka"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/message"
)

// receiver settles the messages that it gets, unless it refuses.
type receiver struct {
	mu     sync.Mutex
	begin  func(p consumer.Partition) int64 // nil: with the oldest
	refuse func(d []consumer.Delivery) bool
	got    []consumer.Delivery
	calls  int
}

func (r *receiver) Assigned(_ context.Context, p consumer.Partition) (int64, error) {
	if r.begin == nil {
		return consumer.FromOldest, nil
	}
	return r.begin(p), nil
}

func (r *receiver) BatchMax() int { return 10 }

func (r *receiver) Receive(_ context.Context, _ consumer.Partition, d []consumer.Delivery) (int, time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls++
	if r.refuse != nil && r.refuse(d) {
		return 0, time.Millisecond
	}
	r.got = append(r.got, d...)
	return len(d), 0
}

// count returns the numbers of messages and calls.
func (r *receiver) count() (messages, calls int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.got), r.calls
}

// consume runs a source until the test ends or stop is called, which returns the error of Run.
func consume(t *testing.T, source consumer.Source, r consumer.Receiver) (stop func() error, returned <-chan struct{}) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	var err error
	go func() {
		defer close(ended)
		err = source.Run(ctx, r)
	}()
	stop = func() error {
		cancel()
		<-ended
		return err
	}
	t.Cleanup(func() { _ = stop() })
	return stop, ended
}

// produce writes records as another client does.
func produce(t *testing.T, brokers []string, records ...*kgo.Record) {
	t.Helper()
	if err := admin(t, brokers, kgo.RecordPartitioner(kgo.ManualPartitioner())).ProduceSync(t.Context(), records...).FirstErr(); err != nil {
		t.Fatal(err)
	}
}

func source(t *testing.T, f *broker, group, topic string, with func(o *kafka.Options)) *kafka.Source {
	t.Helper()
	return connect(t, f.brokers, new(brokertest.Network), with).Source(group, topic)
}

// Messages of other producers: their ids are those of CloudEvents and of Debezium's outbox, or
// their places in the log. Headers that HTTP would not allow are left out.
func TestForeignMessages(t *testing.T) {
	t.Parallel()
	f := startBroker(t)
	topic := newTopic()
	createTopic(t, f.brokers, topic, nil)
	header := func(pairs ...string) (all []kgo.RecordHeader) {
		for i := 0; i < len(pairs); i += 2 {
			all = append(all, kgo.RecordHeader{Key: pairs[i], Value: []byte(pairs[i+1])})
		}
		return all
	}
	metadata, err := kadm.NewClient(admin(t, f.brokers)).Metadata(t.Context(), topic)
	if err != nil {
		t.Fatal(err)
	}
	id := [16]byte(metadata.Topics[topic].ID)
	place := func(offset int) string { return fmt.Sprintf("%s/1/%d/%x", topic, offset, id) }
	large := strings.Repeat("v", message.HeaderBytesMax/2)
	var all []*kgo.Record
	cases := []struct {
		headers []kgo.RecordHeader
		id      string
		kept    string
	}{
		{header("message-id", "ours", "ce_id", "ce", "id", "debezium"), "ours", "map[ce_id:[ce] id:[debezium]]"},
		{header("id", "debezium", "ce_id", "ce"), "ce", "map[ce_id:[ce] id:[debezium]]"},
		{header("id", "debezium"), "debezium", "map[id:[debezium]]"},
		{header("Type", "made"), place(3), "map[Type:[made]]"},
		{nil, place(4), "map[]"},
		{header("message-id", "", "ce_id", "", "id", ""), place(5), "map[ce_id:[] id:[]]"},
		{header("message-id", "first", "message-id", "second"), "first", "map[message-id:[second]]"},
		{header("id", "a", "not a token", "x", "binary", "\x00\x01", "", "no name", "good", "1", "good", "2"), "a", "map[good:[1 2] id:[a]]"},
		{header("id", "b", "A", large, "B", large, "C", "small"), "b", "map[A:[" + large + "] C:[small] id:[b]]"},
	}
	for _, c := range cases {
		all = append(all, &kgo.Record{Topic: topic, Partition: 1, Key: []byte("k"), Headers: c.headers})
	}
	produce(t, f.brokers, all...)
	r := new(receiver)
	consume(t, source(t, f, "foreign", topic, nil), r)
	eventually(t, "all are received", func() bool {
		n, _ := r.count()
		return n == len(cases)
	})
	for i, c := range cases {
		d := r.got[i]
		if d.ID != c.id || fmt.Sprint(d.Header) != c.kept || d.Offset != int64(i) || d.Body != nil {
			t.Errorf("%d: id %q, headers %.200v, offset %d", i, d.ID, d.Header, d.Offset)
		}
		if err := (&idempotency.Answer{Status: idempotency.StatusMin, Header: d.Header}).Validate(); err != nil {
			t.Errorf("%d: %v", i, err)
		}
	}
}

// Messages of a transaction that was aborted are not delivered.
func TestAbortedTransactionsAreNotDelivered(t *testing.T) {
	t.Parallel()
	f := startBroker(t)
	topic := newTopic()
	createTopic(t, f.brokers, topic, nil)
	producer := admin(t, f.brokers, kgo.TransactionalID("other"), kgo.RecordPartitioner(kgo.ManualPartitioner()))
	for i, end := range []kgo.TransactionEndTry{kgo.TryCommit, kgo.TryAbort, kgo.TryCommit} {
		if err := producer.BeginTransaction(); err != nil {
			t.Fatal(err)
		}
		if err := producer.ProduceSync(t.Context(), &kgo.Record{Topic: topic, Value: fmt.Append(nil, i)}).FirstErr(); err != nil {
			t.Fatal(err)
		}
		if err := producer.EndTransaction(t.Context(), end); err != nil {
			t.Fatal(err)
		}
	}
	r := new(receiver)
	consume(t, source(t, f, "committed", topic, nil), r)
	eventually(t, "both are received", func() bool {
		n, _ := r.count()
		return n == 2
	})
	if got := string(r.got[0].Body) + string(r.got[1].Body); got != "02" {
		t.Errorf("received %s", got)
	}
}

// polled counts the bytes that the library has handed over.
type polled struct {
	mu    sync.Mutex
	bytes int
}

func (p *polled) OnFetchRecordUnbuffered(r *kgo.Record, handedOver bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if handedOver {
		p.bytes += len(r.Value)
	}
}

// A partition that makes no progress holds a bounded part of its log in memory, and is fetched on
// once it goes on.
func TestBufferOfAPartitionIsBounded(t *testing.T) {
	t.Parallel()
	const n, size = 200, 100_000
	f := startBroker(t)
	topic := newTopic()
	createTopic(t, f.brokers, topic, nil)
	all := make([]*kgo.Record, n)
	for i := range all { // a fetch is bounded as it is compressed
		all[i] = &kgo.Record{Topic: topic, Partition: 0, Value: randomBytes(t, size)}
	}
	produce(t, f.brokers, all...)
	refusing := true
	r := new(receiver)
	r.refuse = func([]consumer.Delivery) bool { return refusing }
	p := new(polled)
	consume(t, source(t, f, "bounded", topic, func(o *kafka.Options) { o.Kgo = append(o.Kgo, kgo.WithHooks(p)) }), r)
	eventually(t, "it was refused often", func() bool {
		_, calls := r.count()
		return calls > 100
	})
	p.mu.Lock()
	if p.bytes == 0 || p.bytes > 6<<20 {
		t.Errorf("%d bytes of %d are in memory", p.bytes, n*size)
	}
	p.mu.Unlock()
	r.mu.Lock()
	refusing = false
	r.mu.Unlock()
	eventually(t, "all are received", func() bool {
		got, _ := r.count()
		return got == n
	})
}

// A broker that has lost consumed messages, by an unclean election, would give their offsets to
// later messages, which would be dropped as redelivered. So the source ends.
func TestLogEndsBeforeTheConsumer(t *testing.T) {
	t.Parallel()
	f := startBroker(t)
	topic := newTopic()
	createTopic(t, f.brokers, topic, nil)
	produce(t, f.brokers, &kgo.Record{Topic: topic, Partition: 2, Value: []byte("only")})
	stop, returned := consume(t, source(t, f, "lost", topic, nil), &receiver{begin: func(p consumer.Partition) int64 {
		if p.Number == 2 {
			return 5
		}
		return consumer.FromOldest
	}})
	select {
	case <-returned:
	case <-time.After(time.Minute):
		t.Fatal("Run did not return")
	}
	if err := stop(); err == nil || errors.Is(err, consumer.ErrTrimmed) || !strings.Contains(err.Error(), "partition 2: offset 5 was consumed, and its log ends at 1") {
		t.Errorf("Run returned %v", err)
	}
}

// commits returns the offsets of a group at the broker.
func commits(t *testing.T, f *broker, group, topic string) map[int32]int64 {
	t.Helper()
	fetched, err := kadm.NewClient(admin(t, f.brokers)).FetchOffsets(t.Context(), group)
	if err != nil {
		t.Fatal(err)
	}
	all := map[int32]int64{}
	fetched.Each(func(o kadm.OffsetResponse) {
		if o.Topic == topic {
			all[o.Partition] = o.At
		}
	})
	return all
}

// The offsets at the broker are those of settled messages, and a member commits them when it
// leaves: a tool that shows the lag is right then, and never shows too little.
func TestOnlySettledOffsetsAreCommitted(t *testing.T) {
	t.Parallel()
	const n, settled = 40, 20
	for name, with := range protocols {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := startBroker(t)
			topic := newTopic()
			createTopic(t, f.brokers, topic, nil)
			all := make([]*kgo.Record, n)
			for i := range all {
				all[i] = &kgo.Record{Topic: topic, Partition: 1, Value: fmt.Append(nil, i)}
			}
			produce(t, f.brokers, all...)
			r := new(receiver)
			r.refuse = func(d []consumer.Delivery) bool { return d[0].Offset >= settled }
			stop, _ := consume(t, source(t, f, "settled", topic, with), r)
			eventually(t, "the others are refused", func() bool {
				got, calls := r.count()
				return got == settled && calls > 20
			})
			if err := stop(); err != nil {
				t.Fatal(err)
			}
			if got := commits(t, f, "settled", topic); len(got) != 1 || got[1] != settled {
				t.Errorf("committed: %v", got)
			}
		})
	}
}

// epochOf returns the number of the group's rebalances; 0 on Apache Kafka, which tells it to no
// client.
func epochOf(f *broker, group string) int {
	if f.apache != nil {
		return 0
	}
	return int(f.now().GroupInfo(group).Epoch)
}

// A static member that comes back within its session has its partitions without a rebalance. A
// second process with its id would take them from it, and the first from the second: one of them
// ends.
func TestInstanceID(t *testing.T) {
	t.Parallel()
	for name, with := range protocols {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := startBroker(t)
			topic := newTopic()
			createTopic(t, f.brokers, topic, nil)
			static := func(instance string) *kafka.Source {
				return source(t, f, "static", topic, func(o *kafka.Options) {
					if with != nil {
						with(o)
					}
					o.InstanceID, o.SessionTimeout = instance, 30*time.Second
				})
			}
			produce(t, f.brokers, &kgo.Record{Topic: topic, Value: []byte("1")})
			first := new(receiver)
			stop, _ := consume(t, static("a"), first)
			eventually(t, "the first is received", func() bool {
				n, _ := first.count()
				return n == 1
			})
			epoch := epochOf(f, "static")
			if err := stop(); err != nil {
				t.Fatal(err)
			}
			if n := len(f.assigned(t, "static")); n != 1 {
				t.Errorf("the member left: %d members", n)
			}
			again := &receiver{begin: func(consumer.Partition) int64 { return consumer.FromOldest }}
			stop, returned := consume(t, static("a"), again)
			eventually(t, "the first is received again", func() bool {
				n, _ := again.count()
				return n == 1
			})
			if after, n := epochOf(f, "static"), len(f.assigned(t, "static")); after != epoch || n != 1 {
				t.Errorf("epoch %d became %d, with %d members", epoch, after, n)
			}
			stopTwin, returnedTwin := consume(t, static("a"), new(receiver))
			var err error
			select {
			case <-returned:
				err = stop()
			case <-returnedTwin:
				err = stopTwin()
			case <-time.After(time.Minute):
				t.Fatal("two processes have one id")
			}
			if !errors.Is(err, kerr.FencedInstanceID) && !errors.Is(err, kerr.UnreleasedInstanceID) {
				t.Errorf("Run returned %v", err)
			}
		})
	}
}

// A group that the broker refuses for now, for missing rights, is tried again.
func TestMissingRightsAreWaitedFor(t *testing.T) {
	t.Parallel()
	f := startFake(t)
	topic := newTopic()
	createTopic(t, f.brokers, topic, nil)
	produce(t, f.brokers, &kgo.Record{Topic: topic, Value: []byte("1")})
	fault := f.now().Fault(kfake.Fault{Group: "rights", Err: kerr.GroupAuthorizationFailed, Count: -1})
	r := new(receiver)
	consume(t, source(t, f, "rights", topic, nil), r)
	if err := fault.Wait(t.Context(), 3); err != nil {
		t.Fatal(err)
	}
	fault.Remove()
	eventually(t, "the message is received", func() bool {
		n, _ := r.count()
		return n == 1
	})
}

func TestSourceNeedsGroupAndTopic(t *testing.T) {
	t.Parallel()
	client, err := kafka.Connect([]string{"127.0.0.1:1"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string]func(){
		"group": func() { client.Source("", "t") },
		"topic": func() { client.Source("g") },
		"empty": func() { client.Source("g", "t", "") },
		"limit": func() { _, _ = kafka.Connect([]string{"127.0.0.1:1"}, &kafka.Options{SessionTimeout: -1}) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("no panic without a proper %s", name)
				}
			}()
			bad()
		}()
	}
}

// polling runs a function when the library has handed over a record, before the source has it.
type polling func(r *kgo.Record)

func (p polling) OnFetchRecordUnbuffered(r *kgo.Record, handedOver bool) {
	if handedOver {
		p(r)
	}
}

// places is a receiver with positions that several receivers share, as in a database. It fails the
// test if a message is skipped.
type places struct {
	receiver
	t        *testing.T
	assigned func()
	next     *sync.Map // partition: offset
}

func (p *places) Assigned(_ context.Context, partition consumer.Partition) (int64, error) {
	next, _ := p.next.LoadOrStore(partition, int64(0))
	p.assigned()
	return next.(int64), nil
}

func (p *places) Receive(ctx context.Context, partition consumer.Partition, d []consumer.Delivery) (int, time.Duration) {
	settled, pause := p.receiver.Receive(ctx, partition, d)
	if settled > 0 {
		if next, _ := p.next.Load(partition); d[0].Offset > next.(int64) {
			p.t.Errorf("partition %d: offset %d came, %d was due", partition.Number, d[0].Offset, next)
		}
		p.next.Store(partition, d[settled-1].Offset+1)
	}
	return settled, pause
}

// Messages are polled, and before they are with their worker another member gets the partition and
// gives it back. They belong to the former assignment: if they came into the new one, those in
// front of them would be skipped.
func TestPolledMessagesOfAFormerAssignment(t *testing.T) {
	t.Parallel()
	f := startBroker(t)
	topic := newTopic()
	createTopic(t, f.brokers, topic, nil)
	write := func(value string) {
		var all []*kgo.Record
		for number := range int32(brokertest.Partitions) {
			for range 5 {
				all = append(all, &kgo.Record{Topic: topic, Partition: number, Value: []byte(value)})
			}
		}
		produce(t, f.brokers, all...)
	}
	write("first")

	var next sync.Map
	polledSecond := make(chan struct{})
	goOn := make(chan struct{})
	var once sync.Once
	hook := polling(func(r *kgo.Record) {
		if string(r.Value) == "second" {
			once.Do(func() {
				close(polledSecond)
				<-goOn
			})
		}
	})
	var mu sync.Mutex
	assignments := 0
	accept := false
	member := &places{t: t, next: &next, assigned: func() {
		mu.Lock()
		defer mu.Unlock()
		assignments++
	}}
	member.refuse = func([]consumer.Delivery) bool {
		mu.Lock()
		defer mu.Unlock()
		return !accept
	}
	consume(t, source(t, f, "former", topic, func(o *kafka.Options) { o.Kgo = append(o.Kgo, kgo.WithHooks(hook)) }), member)
	eventually(t, "messages of all partitions were refused", func() bool {
		_, calls := member.count() // it calls refuse with its lock
		mu.Lock()
		defer mu.Unlock()
		return assignments == brokertest.Partitions && calls > 50
	})
	write("second")
	<-polledSecond

	heirAssigned := make(chan struct{}, 10)
	heir := &places{t: t, next: &next, assigned: func() { heirAssigned <- struct{}{} }}
	heir.refuse = func([]consumer.Delivery) bool { return true }
	stop, _ := consume(t, source(t, f, "former", topic, nil), heir)
	// While the first member has polled, nothing can be taken from it. If it could, it would be now.
	select {
	case <-heirAssigned:
		_ = stop()
		eventually(t, "the member has it again", func() bool {
			mu.Lock()
			defer mu.Unlock()
			return assignments > brokertest.Partitions
		})
	case <-time.After(ownTimeouts.rebalance / 3):
	}
	mu.Lock()
	accept = true
	mu.Unlock()
	close(goOn)
	_ = stop()
	eventually(t, "all are received", func() bool {
		n, _ := member.count()
		return n >= 2*5*brokertest.Partitions
	})
}

// If the broker does not deliver a partition, the source asks for it about once a second, and goes
// on by itself.
func TestRefusedFetchesArePaced(t *testing.T) {
	t.Parallel()
	f := startFake(t)
	topic := newTopic()
	createTopic(t, f.brokers, topic, nil)
	fault := f.now().Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Fetch}, Topic: topic, Err: kerr.TopicAuthorizationFailed, Count: -1})
	produce(t, f.brokers, &kgo.Record{Topic: topic, Value: []byte("1")})
	r := new(receiver)
	consume(t, source(t, f, "paced", topic, nil), r)
	if err := fault.Wait(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	time.Sleep(500 * time.Millisecond) // in which thousands would be made
	if n := fault.Hits(); n > 50 {
		t.Errorf("%d fetches were refused", n)
	}
	fault.Remove()
	eventually(t, "the message is received", func() bool {
		n, _ := r.count()
		return n == 1
	})
}
