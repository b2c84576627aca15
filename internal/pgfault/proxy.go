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
	connections atomic.Int64 // total, also the last conn's number
	hits        [len(kindNames)]atomic.Int64

	latency atomic.Int64 // a time.Duration
	rate    atomic.Int64
	refuse  atomic.Bool
	paused  atomic.Bool // avoids the lock below

	mu       sync.Mutex
	network  string
	address  string
	resume   chan struct{} // closed when the pause ends; nil if there is none
	open     map[*connection]struct{}
	closed   bool
	closeErr error
}

// Start starts a proxy on a free port of 127.0.0.1. It contacts the upstream only when a client
// comes.
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
			// No file descriptor is free: a client that gives up returns one.
			time.Sleep(time.Millisecond)
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

// add adds an open conn. It returns false if the proxy is closed.
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

// decide returns the fault of a flush with a COMMIT, and counts it.
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

// Hits returns the number of COMMITs that met each kind of fault, including those forwarded. A kind
// that none met is left out.
func (p *Proxy) Hits() map[Kind]int64 {
	hits := map[Kind]int64{}
	for kind := range p.hits {
		if n := p.hits[kind].Load(); n > 0 {
			hits[Kind(kind)] = n
		}
	}
	return hits
}

// Connections returns the number of conns that are open on either side. A half-open one counts
// until PostgreSQL ends it.
func (p *Proxy) Connections() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.open)
}

// SetLatency delays everything by d on its way to PostgreSQL, and again on its way back. Bytes that
// were read already are not affected. 0 means no delay.
func (p *Proxy) SetLatency(d time.Duration) { p.latency.Store(int64(d)) }

// SetRate limits each direction of each conn. 0 means no limit.
func (p *Proxy) SetRate(bytesPerSecond int) { p.rate.Store(int64(bytesPerSecond)) }

// SetRefuse makes the proxy close new conns at once, or stop doing so.
func (p *Proxy) SetRefuse(refuse bool) { p.refuse.Store(refuse) }

// SetPaused stops everything, in both directions and on new conns too, until it is called with
// false. Meanwhile neither side sees the other hang up.
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

// pause returns a channel that is closed when the pause ends, or nil if there is none.
func (p *Proxy) pause() <-chan struct{} {
	if !p.paused.Load() {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.resume
}

// CutAll closes both sides of every conn, including half-open ones, and returns the number of
// conns.
func (p *Proxy) CutAll() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.open {
		c.cut()
	}
	return len(p.open)
}

// SetUpstream sets the server to which new conns lead from now on.
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

// Close cuts everything and returns when all of the proxy's goroutines have ended. It must not be
// called from OnCommit or a Hook. A second call does nothing and returns the same error.
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
