package brokertest

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/paidonce/idempotency/consumer"
)

// ledger stands for the database of a consumer: positions that are moved by compare-and-set, with
// the messages that were handled.
type ledger struct {
	mu          sync.Mutex
	next        map[position]int64
	incarnation map[position][16]byte
	handled     []consumer.Delivery
	redelivered int // in front of the position
	fenced      int // calls that another process overtook
	changed     chan struct{}
}

type position struct {
	source string
	number int32
}

func newLedger() *ledger {
	return &ledger{next: map[position]int64{}, incarnation: map[position][16]byte{}, changed: make(chan struct{})}
}

// change runs f with the ledger locked, and wakes all calls of waitFor.
func (l *ledger) change(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f()
	close(l.changed)
	l.changed = make(chan struct{})
}

// waitFor blocks until is returns true. It calls is with the ledger locked.
func (l *ledger) waitFor(t *testing.T, what string, is func() bool) {
	t.Helper()
	late := time.After(patience)
	for {
		l.mu.Lock()
		ok, changed := is(), l.changed
		l.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-changed:
		case <-late:
			l.mu.Lock()
			defer l.mu.Unlock()
			t.Fatalf("not within %v: %s: %d messages are handled, %d were delivered again, %d calls were fenced", patience, what, len(l.handled), l.redelivered, l.fenced)
		}
	}
}

func (l *ledger) waitHandled(t *testing.T, n int) {
	t.Helper()
	l.waitFor(t, fmt.Sprintf("%d messages are handled", n), func() bool { return len(l.handled) >= n })
}

// all returns the handled messages, in the order of their commits.
func (l *ledger) all() []consumer.Delivery {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]consumer.Delivery(nil), l.handled...)
}

// at returns the offset of the next message of a partition.
func (l *ledger) at(p position) (next int64, known bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	next, known = l.next[p]
	return next, known
}

// again returns the number of messages that were delivered again after they were settled.
func (l *ledger) again() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.redelivered
}

// begun is a call of Receive before it is settled.
type begun struct {
	ctx        context.Context
	partition  consumer.Partition
	deliveries []consumer.Delivery
}

// process is a process of a consumer: a receiver on a ledger, and a source that runs.
type process struct {
	*ledger
	t        *testing.T
	network  *Network
	batchMax int

	// each, if set, runs in each call. If it returns refuse, the call settles nothing, and returns the
	// pause.
	each func(b *begun) (refuse bool, pause time.Duration)
	// assigned, if set, is called in each Assigned.
	assigned func(p consumer.Partition) error

	running  atomic.Int32
	calls    sync.Map // position: *atomic.Int32
	cancel   context.CancelFunc
	returned chan struct{}
	err      error // of Run, once returned is closed
}

// run runs a source of the consumer on the ledger until the test ends or stop is called.
func (l *ledger) run(t *testing.T, h *Harness, name, topic string, with func(p *process)) *process {
	t.Helper()
	source, network := h.Source(t, name, topic)
	p := &process{ledger: l, t: t, network: network, batchMax: 10, returned: make(chan struct{})}
	if with != nil {
		with(p)
	}
	var ctx context.Context
	ctx, p.cancel = context.WithCancel(t.Context())
	go func() {
		defer close(p.returned)
		p.err = source.Run(ctx, p)
		if n := p.running.Load(); n != 0 {
			t.Errorf("Run returned while %d calls were under way", n)
		}
	}()
	t.Cleanup(func() {
		if network != nil {
			network.Mend()
		}
		p.stop()
	})
	return p
}

// stop ends the process in order.
func (p *process) stop() {
	p.t.Helper()
	p.cancel()
	select {
	case <-p.returned:
	case <-time.After(patience):
		p.t.Errorf("Run did not return within %v after its context had ended", patience)
	}
}

// ends waits for Run to return by itself, and returns its error.
func (p *process) ends() error {
	p.t.Helper()
	select {
	case <-p.returned:
		return p.err
	case <-time.After(patience):
		p.t.Fatalf("Run did not return within %v", patience)
		return nil
	}
}

func (p *process) BatchMax() int { return p.batchMax }

func (p *process) Assigned(_ context.Context, partition consumer.Partition) (int64, error) {
	at := position{partition.Source, partition.Number}
	if p.assigned != nil {
		if err := p.assigned(partition); err != nil {
			return 0, err
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	next, ok := p.next[at]
	switch {
	case !ok:
		return consumer.FromOldest, nil
	case p.incarnation[at] != partition.Incarnation:
		return 0, consumer.ErrRecreated
	}
	return next, nil
}

func (p *process) Receive(ctx context.Context, partition consumer.Partition, deliveries []consumer.Delivery) (settled int, pause time.Duration) {
	at := position{partition.Source, partition.Number}
	p.running.Add(1)
	defer p.running.Add(-1)
	calls, _ := p.calls.LoadOrStore(at, new(atomic.Int32))
	if n := calls.(*atomic.Int32).Add(1); n != 1 {
		p.t.Errorf("%d calls for one partition at a time", n)
	}
	defer calls.(*atomic.Int32).Add(-1)
	if len(deliveries) == 0 {
		p.t.Error("a call without messages")
	}
	for i := range deliveries[:len(deliveries)-1] {
		if deliveries[i].Offset >= deliveries[i+1].Offset {
			p.t.Errorf("offset %d in front of %d", deliveries[i].Offset, deliveries[i+1].Offset)
		}
	}
	deliveries = deliveries[:min(len(deliveries), p.batchMax)]
	p.mu.Lock()
	before, known := p.next[at]
	p.mu.Unlock()
	if p.each != nil {
		if refuse, pause := p.each(&begun{ctx, partition, deliveries}); refuse {
			return 0, pause
		}
	}
	if ctx.Err() != nil { // its transaction is rolled back
		return 0, 0
	}
	p.change(func() {
		if now, still := p.next[at]; now != before || still != known {
			p.fenced++
			pause = time.Millisecond
			return
		}
		for _, d := range deliveries {
			if known && d.Offset < before {
				p.redelivered++
				continue
			}
			p.handled = append(p.handled, d)
			p.next[at], p.incarnation[at] = d.Offset+1, partition.Incarnation
		}
		settled = len(deliveries)
	})
	return settled, pause
}

// stopAfter stops the process after done has returned, and requires that Run returns no error.
func (p *process) stopAfter(done func()) {
	p.t.Helper()
	done()
	p.stop()
	if p.err != nil {
		p.t.Errorf("Run returned %v", p.err)
	}
}
