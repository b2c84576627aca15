package pgfault

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Proxy is a running proxy. Its methods are safe for concurrent use.
type Proxy struct {
	listener net.Listener
	onCommit func(Commit) Fault
	running  sync.WaitGroup

	commits     atomic.Int64
	connections atomic.Int64 // counted from 1
	hits        [len(kindNames)]atomic.Int64

	latency atomic.Int64 // a time.Duration
	rate    atomic.Int64
	refuse  atomic.Bool
	paused  atomic.Bool // spares the lock below

	mu       sync.Mutex
	network  string
	address  string
	resume   chan struct{} // closed when the pause is over; nil: there is none
	open     map[*connection]struct{}
	closed   bool
	closeErr error
}

// Start starts a proxy on a free port of 127.0.0.1. The upstream is not contacted before a client comes.
func Start(opts Options) (*Proxy, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("start proxy: %w", err)
	}
	p := &Proxy{
		listener: listener, onCommit: opts.OnCommit, network: opts.Network, address: opts.Address,
		open: map[*connection]struct{}{},
	}
	p.running.Add(1)
	go p.accept()
	return p, nil
}

func (p *Proxy) accept() {
	defer p.running.Done()
	for {
		client, err := p.listener.Accept()
		if err != nil {
			if p.isClosed() {
				return
			}
			time.Sleep(time.Millisecond) // no file descriptors: a client that gives up returns one
			continue
		}
		if p.refuse.Load() {
			_ = client.Close()
			continue
		}
		ctx, cancel := context.WithCancel(context.Background())
		c := &connection{proxy: p, client: client, ctx: ctx, cancel: cancel, answers: newAnswers()}
		if !p.add(c) {
			c.cut()
			return
		}
		go func() {
			defer p.running.Done()
			defer p.remove(c)
			c.serve()
		}()
	}
}

// add counts a connection among those open, unless the proxy is closed.
func (p *Proxy) add(c *connection) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	p.open[c] = struct{}{}
	p.running.Add(1)
	return true
}

func (p *Proxy) remove(c *connection) {
	c.cut()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.open, c)
}

func (p *Proxy) isClosed() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.closed
}

// decide asks what happens to a flush with a COMMIT, and counts it.
func (p *Proxy) decide(commit Commit) Fault {
	commit.Number = p.commits.Add(1)
	var fault Fault
	if p.onCommit != nil {
		fault = p.onCommit(commit)
	}
	if fault.Kind < 0 || int(fault.Kind) >= len(p.hits) {
		panic(fmt.Sprintf("pgfault: OnCommit returned the kind %d, which does not exist", fault.Kind))
	}
	p.hits[fault.Kind].Add(1)
	return fault
}

// Hits returns how many COMMITs met each kind of fault, those forwarded included. A kind that none met is left out.
func (p *Proxy) Hits() map[Kind]int64 {
	hits := map[Kind]int64{}
	for kind := range p.hits {
		if n := p.hits[kind].Load(); n > 0 {
			hits[Kind(kind)] = n
		}
	}
	return hits
}

// Connections returns how many connections are open on either side. A half-open one counts until PostgreSQL ends it.
func (p *Proxy) Connections() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.open)
}

// SetLatency delays everything by d on its way to PostgreSQL, and again on its way back. What has been read already is
// not affected. 0: no delay.
func (p *Proxy) SetLatency(d time.Duration) { p.latency.Store(int64(d)) }

// SetRate limits each direction of each connection. 0: no limit.
func (p *Proxy) SetRate(bytesPerSecond int) { p.rate.Store(int64(bytesPerSecond)) }

// SetRefuse closes new connections at once, or stops to.
func (p *Proxy) SetRefuse(refuse bool) { p.refuse.Store(refuse) }

// SetPaused stops everything, in both directions and on new connections too, until it is called with false. Nobody
// sees the other hang up meanwhile.
func (p *Proxy) SetPaused(paused bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case paused && p.resume == nil:
		p.resume = make(chan struct{})
		p.paused.Store(true)
	case !paused && p.resume != nil:
		p.paused.Store(false)
		close(p.resume)
		p.resume = nil
	}
}

// pause returns what is closed when the pause is over, nil where there is none.
func (p *Proxy) pause() <-chan struct{} {
	if !p.paused.Load() {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.resume
}

// CutAll closes both sides of every connection, half-open ones included, and returns how many there were.
func (p *Proxy) CutAll() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.open {
		c.cut()
	}
	return len(p.open)
}

// SetUpstream says where connections lead that are opened from now on.
func (p *Proxy) SetUpstream(network, address string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.network, p.address = network, address
}

func (p *Proxy) upstream() (network, address string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.network, p.address
}

// Close cuts everything and returns when none of the proxy's goroutines is left. It must not be called from OnCommit or a
// Hook. A second call does nothing and returns the same.
func (p *Proxy) Close() error {
	p.mu.Lock()
	if !p.closed {
		p.closed = true
		p.closeErr = p.listener.Close()
	}
	p.mu.Unlock()
	p.CutAll()
	p.running.Wait()
	return p.closeErr
}
