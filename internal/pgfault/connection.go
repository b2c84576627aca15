package pgfault

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// The codes of a client's first message that are not protocol versions.
const (
	codeCancel = 80877102
	codeSSL    = 80877103
	codeGSS    = 80877104

	startupBytesMax = 10_000 // PostgreSQL's own limit
)

const (
	// answerWaitMax bounds the wait for the answers before a COMMIT that is cut.
	answerWaitMax = time.Second
)

// connection is a client's conn, and the conn to PostgreSQL that was opened for it.
type connection struct {
	proxy  *Proxy
	number int64
	ctx    context.Context // ends when both sides are cut
	cancel context.CancelFunc
	client net.Conn

	mu     sync.Mutex
	server net.Conn // nil until it is dialed

	answers *answers

	// Signals from the client's goroutine to the server's.
	drop       atomic.Bool  // replies are read and dropped
	quiet      atomic.Bool  // the client does not see PostgreSQL hang up
	replyDelay atomic.Int64 // a time.Duration, of the next reply
}

// cut closes both sides.
func (c *connection) cut() {
	c.cancel()
	_ = c.client.Close() // an error means that it is closed already
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.server != nil {
		_ = c.server.Close()
	}
}

// dial opens the connection to PostgreSQL.
func (c *connection) dial() bool {
	network, address := c.proxy.upstream()
	var dialer net.Dialer
	server, err := dialer.DialContext(c.ctx, network, address)
	if err != nil {
		return false // the client sees its conn closed
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.server = server
	if c.ctx.Err() != nil {
		_ = server.Close()
		return false
	}
	return true
}

// serve runs the connection. It returns when both directions have ended.
func (c *connection) serve() {
	first, code, ok := c.startup()
	if !ok || c.resumed() != nil || !c.dial() {
		return
	}
	if code == codeCancel {
		if c.forward(c.server, first) == nil {
			_, _ = io.Copy(io.Discard, c.server) // PostgreSQL hangs up when it is done
		}
		return
	}
	c.number = c.proxy.connections.Add(1)
	if c.forward(c.server, first) != nil {
		return
	}
	var replies sync.WaitGroup
	replies.Go(c.fromServer)
	c.fromClient()
	replies.Wait()
}

// startup reads the client's first message. It refuses encryption; the client then continues
// without.
func (c *connection) startup() (message []byte, code uint32, ok bool) {
	for {
		var header [8]byte
		if _, err := io.ReadFull(c.client, header[:]); err != nil {
			return nil, 0, false
		}
		length := binary.BigEndian.Uint32(header[:])
		code = binary.BigEndian.Uint32(header[4:])
		if length < 8 || length > startupBytesMax {
			return nil, 0, false
		}
		message = make([]byte, length)
		copy(message, header[:])
		if _, err := io.ReadFull(c.client, message[8:]); err != nil {
			return nil, 0, false
		}
		if code != codeSSL && code != codeGSS {
			return message, code, true
		}
		if c.forward(c.client, []byte{'N'}) != nil {
			return nil, 0, false
		}
	}
}

// fromClient forwards one flush after another until the client hangs up or a fault ends it.
func (c *connection) fromClient() {
	s := newSplitter()
	for hungUp := false; !hungUp; {
		hungUp = s.read(c.client) != nil
		for {
			f, ok, err := s.next(hungUp)
			if err != nil {
				c.cut()
				return
			}
			if !ok {
				break
			}
			if f.commit < 0 {
				c.answers.sent(f)
				if c.forward(c.server, f.raw) != nil {
					// fromServer passes on PostgreSQL's last messages before it hung up.
					return
				}
				continue
			}
			if !c.commit(s, f) {
				return
			}
		}
	}
	// PostgreSQL first completes all work that it received, and then sees the end.
	_ = c.client.Close()
	c.drop.Store(true)
	if rest := s.rest(); c.resumed() == nil && (len(rest) == 0 || c.forward(c.server, rest) == nil) {
		c.hangUp()
	}
}

// commit applies the decided fault to a flush with a COMMIT. It reports whether to keep reading
// from the client.
func (c *connection) commit(s *splitter, f flush) bool {
	fault := c.proxy.decide(Commit{Connection: c.number, BackendPID: c.answers.backendPID(), Messages: f.messages})
	switch fault.Kind {
	case CutBefore:
		c.cutBefore(f)
		return false
	case CutAfter:
		c.drop.Store(true)
		c.quiet.Store(true) // PostgreSQL may hang up too
		if c.send(f) {
			c.awaitAnswers(0)
		}
		c.cut()
		return false
	case Silence:
		c.drop.Store(true)
		c.quiet.Store(true)
		c.send(f)
		c.awaitHangUp(s)
		c.cut()
		return false
	case LateCommit:
		c.drop.Store(true)
		_ = c.client.Close()
		if c.sleep(fault.Delay) == nil && c.send(f) {
			c.hangUp()
		}
		return false
	case HalfOpen:
		c.drop.Store(true)
		c.quiet.Store(true)
		c.awaitHangUp(s)
		_ = c.client.Close()
		return false
	case DelayReply:
		c.replyDelay.Store(int64(fault.Delay))
	case CallBefore:
		fault.call()
	}
	ok := c.send(f)
	if fault.Kind == CallAfter {
		fault.call()
	}
	return ok
}

// awaitHangUp reads and drops the client's data until the client hangs up. A Terminate counts as a
// hang-up: after it pgx waits up to 15 s for the conn to be closed, and meanwhile keeps its place
// in the pool.
func (c *connection) awaitHangUp(s *splitter) {
	for {
		f, ok, err := s.next(false)
		if err != nil || f.leaves || !ok && s.read(c.client) != nil {
			return
		}
	}
}

func (f Fault) call() {
	if f.Hook != nil {
		f.Hook()
	}
}

// cutBefore forwards the part of a flush before its COMMIT and cuts. It adds a Flush, so that
// PostgreSQL answers and the proxy knows that it is done. The client did not ask for that answer
// and does not get it.
func (c *connection) cutBefore(f flush) {
	defer c.cut()
	if f.commit > 0 {
		c.drop.Store(true)
		c.answers.sent(flush{executes: f.beforeCommit})
		if c.forward(c.server, append(f.raw[:f.commit:f.commit], messageFlush, 0, 0, 0, 4)) != nil {
			return
		}
	}
	c.awaitAnswers(answerWaitMax)
}

func (c *connection) send(f flush) bool {
	c.answers.sent(f)
	return c.forward(c.server, f.raw) == nil
}

// awaitAnswers blocks until PostgreSQL has answered everything that was sent, hung up, or the
// timeout has elapsed. A timeout of 0 means no limit.
func (c *connection) awaitAnswers(timeout time.Duration) {
	var late <-chan time.Time
	if timeout > 0 {
		timer := time.NewTimer(timeout)
		defer timer.Stop()
		late = timer.C
	}
	for !c.answers.settled() {
		select {
		case <-c.answers.changed:
		case <-late:
			return
		case <-c.ctx.Done():
			return
		}
	}
}

// hangUp tells PostgreSQL that the client has hung up. Its remaining output is read, so that it is
// not cut off during its work.
func (c *connection) hangUp() {
	if half, ok := c.server.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite()
		return
	}
	_ = c.server.Close()
}

// fromServer forwards PostgreSQL's messages until it hangs up.
func (c *connection) fromServer() {
	buf := make([]byte, bufferBytes)
	for {
		n, err := c.server.Read(buf)
		if n > 0 {
			c.answers.received(buf[:n])
			if delay := c.replyDelay.Swap(0); delay > 0 && c.sleep(time.Duration(delay)) != nil {
				return
			}
			if !c.drop.Load() && c.forward(c.client, buf[:n]) != nil {
				c.drop.Store(true) // the client has hung up; fromClient will notice
			}
		}
		if err != nil {
			break
		}
	}
	c.answers.hungUp()
	if c.resumed() != nil {
		return
	}
	_ = c.server.Close()
	if !c.quiet.Load() {
		_ = c.client.Close()
	}
}
