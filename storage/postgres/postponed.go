package postgres

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/paidonce/idempotency"
)

// A postponed claim travels with the handler's first statement, in one write:
//
//	BEGIN; try the lock, or fail; look the record up, and fail where there is one      the claim
//	the handler's statement; Sync                                                      pgx's own
//
// There is no Sync in between: where any part of the claim fails, BEGIN too, PostgreSQL skips all that follows up to pgx's Sync, and
// pgx reads the claim's error as that of the handler's statement. Of a claim that succeeds pgx learns nothing: what it
// reads goes through a tap on the connection, which keeps the claim's replies to itself.

// postponedClaim is the claim of an attempt that has not been sent, or not been answered, when its handler starts. It is
// used by whoever holds the transaction's slot; what the replies say may be read by any goroutine.
type postponedClaim struct {
	conn       *tappedConn
	statements *statements
	calls      [3]call
	params     [3][]byte
	queued     bool // held by the connection, and sent in front of whatever is written next
	tap        tap

	mu        sync.Mutex // guards what follows
	reader    replyReader
	completed int // statements that the server has completed
	over      bool

	// Messages are decoded into these.
	complete pgproto3.CommandComplete
	row      pgproto3.DataRow
	failure  pgproto3.ErrorResponse
}

// queue has the claim sent in front of whatever is written next. That must be of the extended protocol: a simple query
// would wait for a Sync behind a claim that failed.
func (p *postponedClaim) queue(conn *pgconn.PgConn) error {
	if p == nil || p.queued {
		return nil
	}
	prepared := p.statements.namesOn(conn)
	held, err := make([]byte, 0, heldBytes), error(nil)
	for i := range p.calls {
		parse, bind := p.calls[i].messages(prepared)
		if bind.PreparedStatement == "" {
			held, err = parse.Encode(held)
		}
		if err == nil {
			held, err = bind.Encode(held)
		}
		if err == nil {
			held, err = (&pgproto3.Execute{}).Encode(held)
		}
		if err != nil {
			return fmt.Errorf("encode the claim: %w", err)
		}
	}
	p.queued = true
	p.reader.calls = p.calls[:]
	p.tap.claim = p
	p.conn.hold(held, &p.tap)
	return nil
}

// heldBytes is room for a claim and a statement of the handler's.
const heldBytes = 1024

// send has the claim made now, in a round trip of its own.
func (p *postponedClaim) send(ctx context.Context, conn *pgconn.PgConn) error {
	if p.answered() {
		return p.refusal()
	}
	if err := p.queue(conn); err != nil {
		return err
	}
	_, err := p.statements.flush(ctx, conn)
	switch {
	case p.refusal() != nil:
		return p.refusal()
	case err == nil && !p.answered():
		err = errors.New("claim was not answered")
	}
	return err
}

// astray reports whether the claim was sent, and its replies went elsewhere.
func (p *postponedClaim) astray() bool {
	if p == nil || !p.queued || p.answered() {
		return false
	}
	p.conn.mu.Lock()
	defer p.conn.mu.Unlock()
	return p.conn.held == nil
}

// answered reports whether the claim's replies are in.
func (p *postponedClaim) answered() bool {
	if p == nil {
		return true
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.over
}

// granted reports whether the key is claimed.
func (p *postponedClaim) granted() bool { return p.answered() && p.refusal() == nil }

// refusal says why the key is not claimed: nil where it is, or the claim was not answered. It wraps
// [idempotency.ErrNotClaimed].
func (p *postponedClaim) refusal() error {
	if p == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	err := p.reader.err
	if err == nil {
		return nil
	}
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && pgErr.Code == "22012" && p.calls[min(p.reader.reply.failed, len(p.calls)-1)].statement == &p.statements.lookUpAbsent {
		return fmt.Errorf("%w: %w", idempotency.ErrNotClaimed, idempotency.ErrKeyRecorded)
	}
	return fmt.Errorf("%w: %w", idempotency.ErrNotClaimed, sqlError(err))
}

// read takes one message of the server's. It says whether the message is pgx's too, and whether it was the claim's last.
func (p *postponedClaim) read(kind byte, body []byte) (shared, over bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var message pgproto3.BackendMessage
	switch kind {
	case '1', '2': // ParseComplete, BindComplete
		return false, false, nil
	case 'C':
		err = p.complete.Decode(body)
		message = &p.complete
		p.completed++
	case 'D':
		err = p.row.Decode(body)
		message = &p.row
	case 'E':
		err = p.failure.Decode(body)
		message, shared = &p.failure, true
	case 'S', 'N', 'A': // a setting that changed, a notice, a notification
		return true, false, nil
	default:
		err = fmt.Errorf("unexpected message %q", kind)
	}
	if err == nil {
		_, err = p.reader.read(message)
	}
	if err != nil {
		return false, false, fmt.Errorf("read the reply to a claim: %w", err)
	}
	p.over = shared || p.completed == len(p.calls)
	return shared, p.over, nil
}

// tappedConn is a connection to the server that may hold something back until the next write, and of which a tap may read
// first.
type tappedConn struct {
	net.Conn
	tap atomic.Pointer[tap]

	mu   sync.Mutex
	held []byte
}

// hold has something written in front of what is written next, and its replies read by the tap.
func (c *tappedConn) hold(held []byte, t *tap) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held = held
	c.tap.Store(t)
}

// Write implements net.Conn.
func (c *tappedConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	held := c.held
	c.held = nil
	c.mu.Unlock()
	if len(held) == 0 {
		return c.Conn.Write(p)
	}
	n, err := c.Conn.Write(append(held, p...))
	return max(n-len(held), 0), err
}

// tapConnection is a pgconn.Config.AfterNetConnect: TLS, where there is one, lies below it.
func tapConnection(inner func(context.Context, *pgconn.Config, net.Conn) (net.Conn, error)) func(context.Context, *pgconn.Config, net.Conn) (net.Conn, error) {
	return func(ctx context.Context, config *pgconn.Config, conn net.Conn) (net.Conn, error) {
		if inner != nil {
			var err error
			if conn, err = inner(ctx, config, conn); err != nil {
				return nil, err
			}
		}
		return &tappedConn{Conn: conn}, nil
	}
}

// Read implements net.Conn. Whose the bytes are is asked once they are there: pgconn may have begun to read, in the
// background, before the tap was set.
func (c *tappedConn) Read(p []byte) (n int, err error) {
	for {
		t := c.tap.Load()
		if t != nil && len(t.others) > 0 {
			n = copy(p, t.others)
			t.others = t.others[n:]
			if len(t.others) == 0 && t.over {
				c.tap.Store(nil)
			}
			return n, nil
		}
		n, err = c.Conn.Read(p)
		if t = c.tap.Load(); t == nil {
			return n, err
		}
		if parseErr := t.take(p[:n]); parseErr != nil {
			return 0, parseErr
		}
		switch {
		case t.over && len(t.others) == 0:
			c.tap.Store(nil)
		case t.over:
			continue
		}
		if err != nil {
			return 0, err // what came so far is kept: after a timeout it may go on
		}
	}
}

// tap takes a claim's replies out of what the server sends. One goroutine reads a connection at a time.
type tap struct {
	claim  *postponedClaim
	unread []byte // from the server: the beginning of a message
	others []byte // what pgx is to read
	over   bool   // what else comes is pgx's
}

const messageHeaderBytes = 5 // kind, and a length that counts itself

// take takes in what the server sent.
func (t *tap) take(sent []byte) error {
	if t.over {
		t.others = append(t.others, sent...)
		return nil
	}
	t.unread = append(t.unread, sent...)
	return t.parse()
}

// parse goes through the messages that are there as a whole.
func (t *tap) parse() error {
	for !t.over && len(t.unread) >= messageHeaderBytes {
		length := 1 + int(binary.BigEndian.Uint32(t.unread[1:]))
		if length < messageHeaderBytes {
			return errors.New("server sent a message of an impossible length")
		}
		if len(t.unread) < length {
			break
		}
		shared, over, err := t.claim.read(t.unread[0], t.unread[messageHeaderBytes:length])
		if err != nil {
			return err
		}
		if shared {
			t.others = append(t.others, t.unread[:length]...)
		}
		t.unread, t.over = t.unread[length:], over
	}
	if t.over {
		t.others, t.unread = append(t.others, t.unread...), nil
	}
	return nil
}
