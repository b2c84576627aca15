package brokertest

import (
	"context"
	"net"
	"os"
	"sync"
	"syscall"
)

// Network dials connections that can be cut and stopped. The zero value is an open network. It is
// safe for concurrent use.
type Network struct {
	mu      sync.Mutex
	cut     bool
	stopped chan struct{} // nil while packets flow; closed when they flow again
	conns   map[*conn]bool
}

// DialContext connects through the network. It has the form that dialers of libraries have.
func (n *Network) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if n.flows(ctx.Done()) != nil {
		return nil, refused(network)
	}
	one, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cut {
		_ = one.Close()
		return nil, refused(network)
	}
	c := &conn{Conn: one, network: n, closed: make(chan struct{})}
	if n.conns == nil {
		n.conns = map[*conn]bool{}
	}
	n.conns[c] = true
	return c, nil
}

// Cut breaks all connections, and refuses new ones until Mend.
func (n *Network) Cut() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cut = true
	for c := range n.conns {
		_ = c.Conn.Close()
	}
}

// Stop holds all packets back until Mend, as if one of the ends were paused.
func (n *Network) Stop() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.stopped == nil {
		n.stopped = make(chan struct{})
	}
}

// Mend ends Cut and Stop.
func (n *Network) Mend() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cut = false
	if n.stopped != nil {
		close(n.stopped)
		n.stopped = nil
	}
}

// refused returns the error of a host on which nothing listens.
func refused(network string) error {
	return &net.OpError{Op: "dial", Net: network, Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
}

// flows blocks while packets are held back.
func (n *Network) flows(ended <-chan struct{}) error {
	for {
		n.mu.Lock()
		cut, stopped := n.cut, n.stopped
		n.mu.Unlock()
		switch {
		case cut:
			return net.ErrClosed
		case stopped == nil:
			return nil
		}
		select {
		case <-stopped:
		case <-ended:
			return net.ErrClosed
		}
	}
}

type conn struct {
	net.Conn
	network *Network
	once    sync.Once
	closed  chan struct{}
}

func (c *conn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if held := c.network.flows(c.closed); held != nil && err == nil {
		return 0, held
	}
	return n, err
}

func (c *conn) Write(b []byte) (int, error) {
	if err := c.network.flows(c.closed); err != nil {
		return 0, err
	}
	return c.Conn.Write(b)
}

func (c *conn) Close() error {
	c.once.Do(func() {
		close(c.closed)
		c.network.mu.Lock()
		delete(c.network.conns, c)
		c.network.mu.Unlock()
	})
	return c.Conn.Close()
}
