// Package pgfault is a proxy between a client and PostgreSQL that knows a COMMIT when it passes.
//
// It forwards every byte as it came, and keeps the messages of a flush (those up to Sync, Flush or a simple Query)
// together, so that a test can decide what happens to each flush that holds a COMMIT: whether it arrives, whether its
// reply comes back, and who hangs up. A COMMIT is seen in a simple Query, also as one of several statements, and in
// an Execute, also of a statement that was prepared earlier under a name. One that runs inside a procedure or a DO
// block is not, nor is COMMIT PREPARED, which ends another transaction.
package pgfault

import (
	"fmt"
	"net/url"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// Options say where PostgreSQL is and what happens to a COMMIT.
type Options struct {
	// Network is "tcp" or "unix", Address that of PostgreSQL: host:port, or the socket's file /dir/.s.PGSQL.5432.
	Network, Address string

	// OnCommit decides what happens to each flush that holds a COMMIT. It is called before anything of the flush is
	// forwarded (but for what a Flush message asked for earlier), and concurrently for different connections. Nil
	// forwards.
	OnCommit func(Commit) Fault
}

// Commit is a flush with a COMMIT in it.
type Commit struct {
	Number     int64  // counts those flushes from 1, over all connections
	Connection int64  // counts connections from 1, CancelRequests not included
	BackendPID uint32 // of PostgreSQL's BackendKeyData

	// Messages are the client's messages since its last Sync, the COMMIT's included, as they came. The values of an
	// INSERT's parameters appear in it verbatim. The callee may keep it.
	Messages []byte
}

// Fault is what happens to a flush.
type Fault struct {
	Kind  Kind
	Delay time.Duration // of LateCommit and DelayReply
	Hook  func()        // of CallBefore and CallAfter; runs on the connection's goroutine
}

// Kind names a fault.
type Kind int

// The kinds of faults.
const (
	// Forward lets it pass.
	Forward Kind = iota
	// CutBefore forwards what comes before the COMMIT, but not the COMMIT, and cuts both sides.
	CutBefore
	// CutAfter forwards all; once PostgreSQL has answered both sides are cut, and the reply is lost.
	CutAfter
	// Silence forwards all and drops the reply. Nobody hangs up until the client does, which its Terminate is taken for.
	Silence
	// LateCommit cuts the client at once and forwards all after Delay.
	LateCommit
	// HalfOpen forwards nothing of the flush, and nobody hangs up: PostgreSQL's side stays open until PostgreSQL ends it
	// or the proxy cuts it, also when the client has hung up.
	HalfOpen
	// DelayReply forwards all; the reply comes Delay later.
	DelayReply
	// CallBefore runs Hook, then forwards all.
	CallBefore
	// CallAfter forwards all and runs Hook at once. The reply is passed on as it comes.
	CallAfter
)

var kindNames = [...]string{
	Forward: "forward", CutBefore: "cut-before", CutAfter: "cut-after", Silence: "silence", LateCommit: "late-commit",
	HalfOpen: "half-open", DelayReply: "delay-reply", CallBefore: "call-before", CallAfter: "call-after",
}

func (k Kind) String() string {
	if k < 0 || int(k) >= len(kindNames) {
		return "unknown"
	}
	return kindNames[k]
}

// URL returns a postgres:// URL with the proxy in the place of its host and port, without TLS. Everything else of it
// stays.
func (p *Proxy) URL(upstream string) string {
	address, err := url.Parse(upstream)
	if err != nil {
		return upstream // the driver says what is wrong with it
	}
	query := address.Query()
	query.Del("host")
	query.Del("port")
	query.Set("sslmode", "disable")
	address.Host, address.RawQuery = p.Addr(), query.Encode()
	return address.String()
}

// Addr is the proxy's host:port.
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// Upstream returns the network and address of the server that a postgres:// URL or connection string leads to first,
// for [Options] and [Proxy.SetUpstream].
func Upstream(connection string) (network, address string, err error) {
	config, err := pgconn.ParseConfig(connection)
	if err != nil {
		return "", "", fmt.Errorf("upstream: %w", err)
	}
	network, address = pgconn.NetworkAddress(config.Host, config.Port)
	return network, address, nil
}
