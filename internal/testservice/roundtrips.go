package testservice

import (
	"context"
	"net"
	"sync"

	"github.com/jackc/pgx/v5/pgxpool"
)

// RoundTrips counts the times that something was written to a server after something was read from
// it.
type RoundTrips struct {
	mu sync.Mutex
	n  int
}

// CountRoundTrips counts on all connections that are made with the config.
func CountRoundTrips(config *pgxpool.Config) *RoundTrips {
	count := new(RoundTrips)
	dial := config.ConnConfig.DialFunc
	config.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return &countedConn{Conn: conn, count: count}, nil
	}
	return count
}

// Count returns the number of round trips so far.
func (r *RoundTrips) Count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.n
}

type countedConn struct {
	net.Conn
	count   *RoundTrips
	writing bool // guarded by count.mu
}

// NetConn lets the store look at the socket.
func (c *countedConn) NetConn() net.Conn { return c.Conn }

func (c *countedConn) Write(p []byte) (int, error) {
	c.count.mu.Lock()
	if !c.writing {
		c.writing = true
		c.count.n++
	}
	c.count.mu.Unlock()
	return c.Conn.Write(p)
}

func (c *countedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.count.mu.Lock()
		c.writing = false
		c.count.mu.Unlock()
	}
	return n, err
}
