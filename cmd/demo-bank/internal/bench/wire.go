package bench

import (
	"bytes"
	"context"
	"net"
	"sync/atomic"

	"github.com/jackc/pgx/v5/pgxpool"
)

// wire counts the traffic on the conns to PostgreSQL. It allocates nothing in a request.
type wire struct {
	roundTrips atomic.Int64 // number of writes that follow a read
	// The number of conns in use. A conn is in use from a write until PostgreSQL reports that it is
	// ready outside a transaction.
	busy    atomic.Int64
	busyMax atomic.Int64
}

// watch makes wire count all conns that are opened with the config.
func (w *wire) watch(config *pgxpool.Config) {
	dial := config.ConnConfig.DialFunc
	config.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return &wireConn{Conn: conn, wire: w}, nil
	}
}

// wireConn is read by one goroutine and written by one, which may be two different ones.
type wireConn struct {
	net.Conn
	wire    *wire
	writing atomic.Bool
	busy    atomic.Bool
}

func (c *wireConn) Write(p []byte) (int, error) {
	if !c.writing.Swap(true) {
		c.wire.roundTrips.Add(1)
	}
	if !c.busy.Swap(true) {
		now := c.wire.busy.Add(1)
		for most := c.wire.busyMax.Load(); now > most && !c.wire.busyMax.CompareAndSwap(most, now); {
			most = c.wire.busyMax.Load()
		}
	}
	return c.Conn.Write(p)
}

// readyIdle is PostgreSQL's ReadyForQuery outside a transaction. It is the end of a reply.
var readyIdle = []byte{'Z', 0, 0, 0, 5, 'I'}

func (c *wireConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.writing.Store(false)
	}
	if bytes.HasSuffix(p[:n], readyIdle) {
		c.idle()
	}
	return n, err
}

func (c *wireConn) Close() error {
	c.idle()
	return c.Conn.Close()
}

func (c *wireConn) idle() {
	if c.busy.Swap(false) {
		c.wire.busy.Add(-1)
	}
}
