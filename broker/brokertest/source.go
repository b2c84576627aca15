package brokertest

import (
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/message"
)

var sourceCases = []aCase{
	{"consume/messages arrive as they were", "key, id, headers and body are as they were published; partition, offset and time are set", sourceNeeds(), receivedAsTheyWere},
	{"consume/order per key", "messages with one topic and key are delivered in their order, each once while nothing fails", sourceNeeds(), receivedInOrder},
	{"consume/begin at the receiver's offset", "a partition begins at the offset that Assigned returns, whatever was consumed before; so a restore of the database rewinds the source", sourceNeeds(), beginsAtTheOffset},
	{"consume/several consumers", "each consumer gets every message, whatever another one has settled", sourceNeeds(), severalConsumers},
	{"consume/not settled", "messages that are not settled are delivered again after the pause, and none behind them meanwhile", sourceNeeds(), notSettled},
	{"consume/pause of one partition", "a partition that is paused for long holds no other up, and goes on by itself", sourceNeeds(), onePaused},
	{"consume/position unknown", "if Assigned fails, it is asked again, and nothing is delivered meanwhile", sourceNeeds(), positionUnknown},
	{"consume/stop", "a stop lets the calls under way end, drops what is buffered, and loses nothing", sourceNeeds(), stopsInOrder},
	{"consume/outage", "an outage of the broker is no error, and what was not settled comes again", sourceNeeds(hasSourceNetwork), sourceOutage},
	{"consume/restart", "a restart of the broker is no error", sourceNeeds(func(_ Features, h *Harness) bool { return h.Restart != nil }), sourceRestart},
	{"consume/members come and go", "each partition is with one member at a time; each message is settled once, in its order", sourceNeeds(hasGroups), membersComeAndGo},
	{"consume/handed over", "a partition that is taken away waits for the call under way, begins no other with what is buffered, and goes to another member", sourceNeeds(hasGroups), handedOver},
	{"consume/call too long", "a call in a partition that is taken away ends with its context before another member has the partition", sourceNeeds(hasGroups, func(_ Features, h *Harness) bool { return h.Rebalance > 0 }), callTooLong},
	{"consume/slow call", "a call that takes longer than a session keeps its partition, and its messages are settled once", sourceNeeds(hasGroups), slowCall},
	{"consume/zombie", "a member that was paused past its session settles nothing twice, and drops what it buffered", sourceNeeds(hasGroups, hasSourceNetwork), zombie},
	{"consume/trimmed", "messages that the broker deleted unread end the source with ErrTrimmed and their number", sourceNeeds(canTrim), trimmed},
	{"consume/trimmed behind what is fetched", "messages that were fetched before the ones behind them were deleted are settled, and then the source ends with ErrTrimmed", sourceNeeds(canTrim, hasSourceNetwork), trimmedBehind},
	{"consume/trimmed before the first message", "a partition without a position begins with the oldest message that is left", sourceNeeds(canTrim), trimmedBefore},
	{"consume/recreated while away", "a topic that was deleted and recreated has another incarnation, and ends the source if the receiver says so", sourceNeeds(canRecreate), recreatedAway},
	{"consume/recreated meanwhile", "a topic that is recreated while it is consumed ends the source too; nothing of it is settled", sourceNeeds(canRecreate), recreatedMeanwhile},
}

func hasGroups(f Features, h *Harness) bool { return !f.NoGroups && h.Session > 0 }
func canTrim(_ Features, h *Harness) bool   { return h.Trim != nil }
func canRecreate(f Features, h *Harness) bool {
	return !f.NoIncarnation && h.Recreate != nil
}
func hasSourceNetwork(f Features, h *Harness) bool { return h.SourceNetwork }

// sourceNeeds returns the reason to skip a case of a source.
func sourceNeeds(has ...func(Features, *Harness) bool) func(Features, *Harness) string {
	return func(f Features, h *Harness) string {
		if f.NoSource {
			return "Features.NoSource"
		}
		for _, one := range has {
			if !one(f, h) {
				return "the broker does not promise this, or the harness can't do it"
			}
		}
		return ""
	}
}

const nameOfConsumer = "ledger"

// publishNumbered publishes n messages of 12 keys, and returns the keys.
func publishNumbered(t *testing.T, h *Harness, topic string, n int) (keys []string) {
	t.Helper()
	for i := range 12 {
		keys = append(keys, fmt.Sprint("key", i))
	}
	publishAll(t, h.Publisher(t), makeMessages(topic, n, keys...))
	return keys
}

// checkOnce checks that n messages were settled, each once, and in the order of their keys.
func checkOnce(t *testing.T, l *ledger, topic string, n int, keys []string) {
	t.Helper()
	got := l.all()
	if len(got) != n || len(firsts(got)) != n {
		t.Errorf("%d messages are settled, %d of them different: want %d", len(got), len(firsts(got)), n)
	}
	sent := makeMessages(topic, n, keys...)
	for _, key := range keys {
		if got, want := bodies(got, key, delivered), bodies(sent, key, published); got != want {
			t.Errorf("key %s: settled %s, published %s", key, got, want)
		}
	}
}

func receivedAsTheyWere(t *testing.T, h *Harness) {
	topic := h.Topic(t)
	sent := map[string]message.Message{}
	for _, m := range []message.Message{
		{ID: "5f0b9fbc-0d31-8a52-9b11-f1d3a7a2b1c4", Key: []byte("k"), Body: []byte(`{"amount":1}`), Header: map[string][]string{"Type": {"made"}, "x-Many": {"1", "", "2 3"}}},
		{ID: "1", Body: []byte("no key")},
		{ID: "2", Key: []byte("\x00\xff binary"), Body: []byte("\x00\xff\n")},
		{ID: "3", Key: []byte("empty"), Body: []byte{}},
		{ID: "4", Key: []byte("large"), Body: []byte(strings.Repeat("x", message.BodyBytesMax))},
	} {
		m.Topic = topic
		sent[m.ID] = m
		publishAll(t, h.Publisher(t), []message.Message{m})
	}
	l := newLedger()
	var incarnations sync.Map
	p := l.run(t, h, nameOfConsumer, topic, func(p *process) {
		p.assigned = func(partition consumer.Partition) error {
			if before, again := incarnations.LoadOrStore(partition.Number, partition.Incarnation); again && before != partition.Incarnation {
				t.Errorf("partition %d has several incarnations", partition.Number)
			}
			if partition.Source != topic {
				t.Errorf("source %q", partition.Source)
			}
			return nil
		}
	})
	l.waitHandled(t, len(sent))
	for _, d := range l.all() {
		m, ok := sent[d.ID]
		if !ok || d.Topic != topic || string(d.Key) != string(m.Key) || (d.Key == nil) != (m.Key == nil) || string(d.Body) != string(m.Body) ||
			!maps.EqualFunc(d.Header, m.Header, func(a, b []string) bool { return fmt.Sprintf("%q", a) == fmt.Sprintf("%q", b) }) {
			t.Errorf("%s arrived with key %q, headers %q and a body of %d bytes", d.ID, d.Key, d.Header, len(d.Body))
		}
		if age := time.Since(d.Time); age < -time.Hour || age > time.Hour {
			t.Errorf("time %v", d.Time)
		}
	}
	p.stop()
	if p.err != nil {
		t.Errorf("Run returned %v", p.err)
	}
}

func receivedInOrder(t *testing.T, h *Harness) {
	const n = 2400
	topic := h.Topic(t)
	l := newLedger()
	keys := publishNumbered(t, h, topic, n/2)
	l.run(t, h, nameOfConsumer, topic, nil)
	l.waitHandled(t, n/2)
	publishAll(t, h.Publisher(t), makeMessages(topic, n, keys...)[n/2:])
	l.waitHandled(t, n)
	checkOnce(t, l, topic, n, keys)
	if n := l.again(); n != 0 {
		t.Errorf("%d messages came again", n)
	}
}

func beginsAtTheOffset(t *testing.T, h *Harness) {
	const n = 300
	topic := h.Topic(t)
	publishNumbered(t, h, topic, n)
	l := newLedger()
	l.run(t, h, nameOfConsumer, topic, nil).stopAfter(func() { l.waitHandled(t, n) })

	// The database is restored to an earlier time: in each partition half of the settled messages is
	// lost.
	restored := newLedger()
	want := map[string]bool{}
	for number, all := range h.Read(t, topic) {
		at := position{topic, number}
		restored.next[at], restored.incarnation[at] = all[len(all)/2].Offset, l.incarnation[at]
		for _, d := range all[len(all)/2:] {
			want[d.ID] = true
		}
	}
	restored.run(t, h, nameOfConsumer, topic, nil).stopAfter(func() { restored.waitHandled(t, len(want)) })
	for _, d := range restored.all() {
		if !want[d.ID] {
			t.Errorf("%s was delivered", d.ID)
		}
	}
	if n := len(restored.all()); n != len(want) {
		t.Errorf("%d messages were delivered, %d were due", n, len(want))
	}
	if n := restored.again(); n != 0 {
		t.Errorf("%d messages in front of the offset were delivered", n)
	}
}

func severalConsumers(t *testing.T, h *Harness) {
	const n = 300
	topic := h.Topic(t)
	keys := publishNumbered(t, h, topic, n)
	names := []string{nameOfConsumer, "notices", "late"}
	ledgers := make([]*ledger, len(names))
	for i, name := range names {
		ledgers[i] = newLedger()
		if name == "late" { // the others have settled all messages
			ledgers[0].waitHandled(t, n)
			ledgers[1].waitHandled(t, n)
		}
		ledgers[i].run(t, h, name, topic, nil)
	}
	for _, l := range ledgers {
		l.waitHandled(t, n)
		checkOnce(t, l, topic, n, keys)
	}
}

func notSettled(t *testing.T, h *Harness) {
	const n, pause = 120, 30 * time.Millisecond
	topic := h.Topic(t)
	keys := publishNumbered(t, h, topic, n)
	l := newLedger()
	var mu sync.Mutex
	refusals := 0
	first := map[position]int64{} // of a call that was refused
	at := map[position]time.Time{}
	l.run(t, h, nameOfConsumer, topic, func(p *process) {
		p.each = func(b *begun) (bool, time.Duration) {
			mu.Lock()
			defer mu.Unlock()
			where := position{b.partition.Source, b.partition.Number}
			if refused, ok := first[where]; ok {
				if b.deliveries[0].Offset != refused {
					t.Errorf("offset %d was delivered, %d was not settled", b.deliveries[0].Offset, refused)
				}
				if since := time.Since(at[where]); since < pause {
					t.Errorf("delivered again after %v, the pause is %v", since, pause)
				}
				delete(first, where)
				return false, 0
			}
			refusals++
			first[where], at[where] = b.deliveries[0].Offset, time.Now()
			return true, pause
		}
	})
	l.waitHandled(t, n)
	checkOnce(t, l, topic, n, keys)
	if refusals < n/12 {
		t.Errorf("%d calls were refused", refusals)
	}
}

func onePaused(t *testing.T, h *Harness) {
	const n = 1200
	topic := h.Topic(t)
	keys := publishNumbered(t, h, topic, n)
	l := newLedger()
	var mu sync.Mutex
	var slow position
	var release atomic.Bool
	l.run(t, h, nameOfConsumer, topic, func(p *process) {
		p.each = func(b *begun) (bool, time.Duration) {
			mu.Lock()
			defer mu.Unlock()
			where := position{b.partition.Source, b.partition.Number}
			if slow == (position{}) {
				slow = where
			}
			return where == slow && !release.Load(), 10 * time.Millisecond
		}
	})
	within(t, "one partition is paused", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return slow != position{}
	})
	l.waitHandled(t, n-len(h.Read(t, topic)[slow.number]))
	if _, ok := l.at(slow); ok {
		t.Error("the paused partition went on")
	}
	release.Store(true)
	l.waitHandled(t, n)
	checkOnce(t, l, topic, n, keys)
}

func positionUnknown(t *testing.T, h *Harness) {
	const n = 60
	topic := h.Topic(t)
	keys := publishNumbered(t, h, topic, n)
	l := newLedger()
	var asked atomic.Int32
	var mu sync.Mutex
	known := map[consumer.Partition]int{}
	l.run(t, h, nameOfConsumer, topic, func(p *process) {
		p.assigned = func(partition consumer.Partition) error {
			mu.Lock()
			defer mu.Unlock()
			asked.Add(1)
			if known[partition]++; known[partition] < 3 {
				return errors.New("the database is away")
			}
			return nil
		}
		p.each = func(b *begun) (bool, time.Duration) {
			mu.Lock()
			defer mu.Unlock()
			if known[b.partition] < 3 {
				t.Error("delivered without a position")
			}
			return false, 0
		}
	})
	l.waitHandled(t, n)
	checkOnce(t, l, topic, n, keys)
}

func stopsInOrder(t *testing.T, h *Harness) {
	const n = 600
	topic := h.Topic(t)
	keys := publishNumbered(t, h, topic, n)
	l := newLedger()
	for len(l.all()) < n {
		inCall, proceed := make(chan struct{}, 100), make(chan struct{})
		p := l.run(t, h, nameOfConsumer, topic, func(p *process) {
			p.batchMax = 50
			p.each = func(b *begun) (bool, time.Duration) {
				select {
				case inCall <- struct{}{}:
				default:
				}
				select {
				case <-proceed:
				case <-b.ctx.Done():
					t.Error("the context of a call ended with the source's")
				}
				return false, 0
			}
		})
		select {
		case <-inCall:
		case <-time.After(patience):
			t.Fatalf("no message is delivered; %d are settled", len(l.all()))
		}
		before := len(l.all())
		p.cancel()
		time.Sleep(100 * time.Millisecond) // in which a source that does not wait would end the call
		close(proceed)
		p.stop()
		if p.err != nil {
			t.Errorf("Run returned %v", p.err)
		}
		if len(l.all()) == before {
			t.Error("the call under way was not settled")
		}
	}
	checkOnce(t, l, topic, n, keys)
	if n := l.again(); n != 0 {
		t.Errorf("%d messages came again", n)
	}
}

func sourceOutage(t *testing.T, h *Harness) {
	const n = 600
	topic := h.Topic(t)
	keys := publishNumbered(t, h, topic, n/2)
	l := newLedger()
	p := l.run(t, h, nameOfConsumer, topic, nil)
	l.waitHandled(t, 1)
	for i, fault := range []func(){p.network.Cut, p.network.Stop, p.network.Cut} {
		fault()
		part := n / 2 / 3
		publishAll(t, h.Publisher(t), makeMessages(topic, n, keys...)[n/2+i*part:n/2+(i+1)*part])
		p.network.Mend()
		l.waitHandled(t, n/2+(i+1)*part)
	}
	checkOnce(t, l, topic, n, keys)
}

func sourceRestart(t *testing.T, h *Harness) {
	const n = 600
	topic := h.Topic(t)
	keys := publishNumbered(t, h, topic, n/2)
	l := newLedger()
	l.run(t, h, nameOfConsumer, topic, nil)
	l.waitHandled(t, 1)
	for i := range 2 {
		h.Restart(t)
		part := n / 2 / 2
		publishAll(t, h.Publisher(t), makeMessages(topic, n, keys...)[n/2+i*part:n/2+(i+1)*part])
		l.waitHandled(t, n/2+(i+1)*part)
	}
	checkOnce(t, l, topic, n, keys)
}

func membersComeAndGo(t *testing.T, h *Harness) {
	const n = 3000
	topic := h.Topic(t)
	keys := publishNumbered(t, h, topic, n)
	l := newLedger()
	o := owners{of: map[consumer.Partition]*process{}}
	var inPartition sync.Map // position: *atomic.Int32, of all members
	slowly := func(p *process) {
		p.each = func(b *begun) (bool, time.Duration) {
			calls, _ := inPartition.LoadOrStore(position{b.partition.Source, b.partition.Number}, new(atomic.Int32))
			if calls.(*atomic.Int32).Add(1) > 1 {
				t.Error("two members have one partition")
			}
			defer calls.(*atomic.Int32).Add(-1)
			time.Sleep(3 * time.Millisecond)
			return false, 0
		}
		o.watch(t, p)
	}
	l.run(t, h, nameOfConsumer, topic, slowly) // one stays
	for settled := 0; settled < n; settled = len(l.all()) {
		p := l.run(t, h, nameOfConsumer, topic, slowly)
		l.waitHandled(t, min(settled+n/12, n))
		q := l.run(t, h, nameOfConsumer, topic, slowly)
		l.waitHandled(t, min(settled+n/6, n))
		p.stop()
		q.stop()
	}
	checkOnce(t, l, topic, n, keys)
}

func slowCall(t *testing.T, h *Harness) {
	const n = 60
	topic := h.Topic(t)
	keys := publishNumbered(t, h, topic, n)
	l := newLedger()
	var slow atomic.Bool
	l.run(t, h, nameOfConsumer, topic, func(p *process) {
		p.each = func(b *begun) (bool, time.Duration) {
			if slow.CompareAndSwap(false, true) {
				select {
				case <-time.After(h.Session + h.Session/2):
				case <-b.ctx.Done():
					t.Error("the context of the call ended")
				}
			}
			return false, 0
		}
	})
	l.waitHandled(t, n)
	checkOnce(t, l, topic, n, keys)
	if n := l.again(); n != 0 {
		t.Errorf("%d messages came again", n)
	}
}

// gate lets the calls of a process wait until it is open, or their context ends.
type gate struct {
	mu     sync.Mutex
	inside map[consumer.Partition]*begun
	open   chan struct{}
}

func newGate() *gate {
	return &gate{inside: map[consumer.Partition]*begun{}, open: make(chan struct{})}
}

func (g *gate) each(b *begun) (bool, time.Duration) {
	g.mu.Lock()
	g.inside[b.partition] = b
	g.mu.Unlock()
	select {
	case <-g.open:
	case <-b.ctx.Done():
	}
	g.mu.Lock()
	delete(g.inside, b.partition)
	g.mu.Unlock()
	return false, 0
}

func (g *gate) count() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.inside)
}

// owners are the processes that have the partitions.
type owners struct {
	mu sync.Mutex
	of map[consumer.Partition]*process
}

// watch fails the case if the process begins a call in a partition that another one got after it.
func (o *owners) watch(t *testing.T, p *process) {
	each := p.each
	p.assigned = func(partition consumer.Partition) error {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.of[partition] = p
		return nil
	}
	p.each = func(b *begun) (bool, time.Duration) {
		o.mu.Lock()
		if o.of[b.partition] != p {
			t.Error("a call began in a partition that another member has got")
		}
		o.mu.Unlock()
		if each == nil {
			return false, 0
		}
		return each(b)
	}
}

// handedOver: while the first member has a call under way in each partition, a second one joins.
// One of the partitions is taken away: the first member begins no other call there, even if it has
// messages buffered.
func handedOver(t *testing.T, h *Harness) {
	const n = 600
	topic := h.Topic(t)
	keys := publishNumbered(t, h, topic, n)
	l := newLedger()
	g := newGate()
	o := owners{of: map[consumer.Partition]*process{}}
	l.run(t, h, nameOfConsumer, topic, func(p *process) {
		p.batchMax = 2
		p.each = func(b *begun) (bool, time.Duration) {
			refuse, pause := g.each(b)
			if b.ctx.Err() != nil {
				t.Error("a call was ended within the time of a rebalance")
			}
			time.Sleep(2 * time.Millisecond)
			return refuse, pause
		}
		o.watch(t, p)
	})
	within(t, "a call is under way in each partition", func() bool { return g.count() == Partitions })
	var got atomic.Int32
	l.run(t, h, nameOfConsumer, topic, func(p *process) {
		o.watch(t, p)
		assigned := p.assigned
		p.assigned = func(partition consumer.Partition) error {
			got.Add(1)
			g.mu.Lock()
			defer g.mu.Unlock()
			if g.inside[partition] != nil {
				t.Error("a partition was given to another member during a call")
			}
			return assigned(partition)
		}
	})
	if h.Rebalancing != nil {
		h.Rebalancing(t, nameOfConsumer, topic)
	}
	close(g.open)
	l.waitHandled(t, n)
	checkOnce(t, l, topic, n, keys)
	within(t, "the second member has a partition", func() bool { return got.Load() > 0 })
}

func callTooLong(t *testing.T, h *Harness) {
	const n = 300
	topic := h.Topic(t)
	keys := publishNumbered(t, h, topic, n)
	l := newLedger()
	g := newGate() // closed until a call was ended by its context
	ended := make(chan struct{}, 10)
	l.run(t, h, nameOfConsumer, topic, func(p *process) {
		p.each = func(b *begun) (bool, time.Duration) {
			refuse, pause := g.each(b)
			select {
			case ended <- struct{}{}:
			default:
			}
			return refuse, pause
		}
	})
	within(t, "a call is under way in each partition", func() bool { return g.count() == Partitions })
	l.run(t, h, nameOfConsumer, topic, func(p *process) {
		p.assigned = func(partition consumer.Partition) error {
			g.mu.Lock()
			defer g.mu.Unlock()
			if g.inside[partition] != nil {
				t.Error("a partition was given to another member during a call")
			}
			return nil
		}
	})
	select {
	case <-ended:
	case <-time.After(patience):
		t.Fatal("no call was ended")
	}
	close(g.open)
	l.waitHandled(t, n)
	checkOnce(t, l, topic, n, keys)
}

func zombie(t *testing.T, h *Harness) {
	const n = 600
	topic := h.Topic(t)
	keys := publishNumbered(t, h, topic, n)
	l := newLedger()
	g := newGate()
	o := owners{of: map[consumer.Partition]*process{}}
	z := l.run(t, h, nameOfConsumer, topic, func(p *process) {
		p.each = g.each
		o.watch(t, p)
	})
	within(t, "a call is under way in each partition", func() bool { return g.count() == Partitions })
	g.mu.Lock()
	var calls []*begun
	for _, b := range g.inside {
		calls = append(calls, b)
	}
	g.mu.Unlock()
	z.network.Stop()
	paused := time.Now()
	heir := l.run(t, h, nameOfConsumer, topic, func(p *process) { o.watch(t, p) })
	l.waitHandled(t, n)                        // the heir has them all
	time.Sleep(h.Session - time.Since(paused)) // the heir may have them before, if it never knew the other one
	z.network.Mend()
	// The member that was paused notices, and ends its calls.
	for _, b := range calls {
		select {
		case <-b.ctx.Done():
		case <-time.After(patience):
			t.Fatal("the call of the zombie was not ended")
		}
	}
	publishAll(t, h.Publisher(t), makeMessages(topic, n+120, keys...)[n:])
	close(g.open)
	l.waitHandled(t, n+120)
	checkOnce(t, l, topic, n+120, keys)
	// Its late commit at the broker, if any, moves nothing back: the next member begins at the end.
	heir.stop()
	z.stop()
	redelivered := l.again()
	publishAll(t, h.Publisher(t), makeMessages(topic, n+240, keys...)[n+120:])
	l.run(t, h, nameOfConsumer, topic, nil)
	l.waitHandled(t, n+240)
	checkOnce(t, l, topic, n+240, keys)
	if n := l.again() - redelivered; n != 0 {
		t.Errorf("%d messages came again", n)
	}
}

func trimmed(t *testing.T, h *Harness) {
	const n = 240
	topic := h.Topic(t)
	keys := publishNumbered(t, h, topic, n)
	l := newLedger()
	l.run(t, h, nameOfConsumer, topic, nil).stopAfter(func() { l.waitHandled(t, n) })
	publishAll(t, h.Publisher(t), makeMessages(topic, 2*n, keys...)[n:])
	lost := h.Read(t, topic)
	h.Trim(t, topic)
	publishAll(t, h.Publisher(t), makeMessages(topic, 3*n, keys...)[2*n:])
	p := l.run(t, h, nameOfConsumer, topic, nil)
	err := p.ends()
	if !errors.Is(err, consumer.ErrTrimmed) {
		t.Fatalf("Run returned %v", err)
	}
	possible := false // the number is that of one partition
	for number, all := range lost {
		left := 0
		for _, d := range all {
			if d.Offset >= l.next[position{topic, number}] {
				left++
			}
		}
		possible = possible || strings.Contains(err.Error(), fmt.Sprint(left)+" messages")
	}
	if !possible {
		t.Errorf("Run returned %v", err)
	}
}

func trimmedBehind(t *testing.T, h *Harness) {
	const n = 240
	topic := h.Topic(t)
	keys := publishNumbered(t, h, topic, n)
	l := newLedger()
	log := h.Read(t, topic)
	for number, all := range log { // a position that the log does not have later
		l.next[position{topic, number}] = all[0].Offset
	}
	var accept atomic.Bool
	var assigned atomic.Int32
	var fetched sync.Map // position: offset of the last message in a call
	p := l.run(t, h, nameOfConsumer, topic, func(p *process) {
		p.batchMax = n // all of a partition are in one call once they are fetched
		p.assigned = func(partition consumer.Partition) error {
			l.change(func() { l.incarnation[position{topic, partition.Number}] = partition.Incarnation })
			assigned.Add(1)
			return nil
		}
		p.each = func(b *begun) (bool, time.Duration) {
			fetched.Store(position{topic, b.partition.Number}, b.deliveries[len(b.deliveries)-1].Offset)
			return !accept.Load(), 5 * time.Millisecond
		}
	})
	within(t, "all messages are fetched", func() bool {
		for number, all := range log {
			if last, _ := fetched.Load(position{topic, number}); last != all[len(all)-1].Offset {
				return false
			}
		}
		return true
	})
	first := assigned.Load()
	p.network.Stop()
	// The first one ends a fetch that is under way. So no fetch has all of those that are deleted.
	second := makeMessages(topic, 2*n, keys...)[n:]
	publishAll(t, h.Publisher(t), second[:1])
	publishAll(t, h.Publisher(t), second[1:])
	h.Trim(t, topic)
	publishAll(t, h.Publisher(t), makeMessages(topic, 3*n, keys...)[2*n:])
	p.network.Mend()
	time.Sleep(time.Second) // in which a source that does not wait would end
	accept.Store(true)
	if err := p.ends(); !errors.Is(err, consumer.ErrTrimmed) {
		t.Fatalf("Run returned %v", err)
	}
	settled := false // those of the first partition that was found trimmed; a fetch was under way
	for number, all := range log {
		settled = settled || l.next[position{topic, number}] > all[len(all)-1].Offset
	}
	switch {
	case settled:
	case assigned.Load() != first:
		t.Log("the machine is too slow: the member lost its session, and what it had fetched")
	default:
		t.Errorf("no partition's messages are settled, but %d", len(l.all()))
	}
}

func trimmedBefore(t *testing.T, h *Harness) {
	const n = 120
	topic := h.Topic(t)
	keys := publishNumbered(t, h, topic, n)
	h.Trim(t, topic)
	publishAll(t, h.Publisher(t), makeMessages(topic, 2*n, keys...)[n:])
	l := newLedger()
	l.run(t, h, nameOfConsumer, topic, nil)
	l.waitHandled(t, n)
	if got := len(l.all()); got != n {
		t.Errorf("%d messages are settled, %d are left", got, n)
	}
}

func recreatedAway(t *testing.T, h *Harness) {
	const n = 120
	topic := h.Topic(t)
	keys := publishNumbered(t, h, topic, n)
	l := newLedger()
	l.run(t, h, nameOfConsumer, topic, nil).stopAfter(func() { l.waitHandled(t, n) })
	h.Recreate(t, topic)
	publishAll(t, h.Publisher(t), makeMessages(topic, 3*n, keys...)[n:]) // more than before
	if err := l.run(t, h, nameOfConsumer, topic, nil).ends(); !errors.Is(err, consumer.ErrRecreated) {
		t.Errorf("Run returned %v", err)
	}
	if got := len(l.all()); got != n {
		t.Errorf("%d messages are settled, %d were in the former topic", got, n)
	}
	// An operator deletes the positions of the former topic: the consumer begins again.
	again := newLedger()
	again.run(t, h, nameOfConsumer, topic, nil)
	again.waitHandled(t, 2*n)
}

func recreatedMeanwhile(t *testing.T, h *Harness) {
	const n = 120
	topic := h.Topic(t)
	keys := publishNumbered(t, h, topic, n)
	l := newLedger()
	p := l.run(t, h, nameOfConsumer, topic, nil)
	l.waitHandled(t, n)
	h.Recreate(t, topic)
	publishAll(t, h.Publisher(t), makeMessages(topic, 3*n, keys...)[n:])
	if err := p.ends(); !errors.Is(err, consumer.ErrRecreated) {
		t.Errorf("Run returned %v", err)
	}
	if got := len(l.all()); got != n {
		t.Errorf("%d messages are settled, %d were in the former topic", got, n)
	}
}
