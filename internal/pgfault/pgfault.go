// Package pgfault is a proxy between a client and PostgreSQL that recognizes a passing COMMIT.
//
// It forwards every byte unchanged, and keeps the messages of a flush (those up to Sync, Flush or a
// simple Query) together. So a test can decide the fault of each flush that holds a COMMIT: whether
// it arrives, whether its reply comes back, and which side hangs up. The proxy finds a COMMIT in a
// simple Query, even as one of several statements, and in an Execute, even of a statement that was
// prepared earlier under a name. It does not find a COMMIT inside a procedure or a DO block. Nor
// does it find COMMIT PREPARED, which ends another transaction.
package pgfault

import (
	"fmt"
	"net/url"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// Options set PostgreSQL's address and the faults of COMMITs.
type Options struct {
	// Network is "tcp" or "unix". Address is PostgreSQL's: host:port, or the socket's file
	// /dir/.s.PGSQL.5432.
	Network, Address string

	// OnCommit decides the fault of each flush that holds a COMMIT. It is called before anything of
	// the flush is forwarded (except a part for which an earlier Flush message asked). It is called
	// concurrently for different conns. Nil forwards everything.
	OnCommit func(Commit) Fault
}

// Commit is a flush that contains a COMMIT.
type Commit struct {
	Number     int64  // the flush's number, from 1, over all conns
	Connection int64  // the conn's number, from 1; CancelRequests do not count
	BackendPID uint32 // from PostgreSQL's BackendKeyData

	// Messages are the client's messages since its last Sync, unchanged, the COMMIT's included. The
	// values of an INSERT's parameters appear in them verbatim. OnCommit may keep the slice.
	Messages []byte
}

// Fault is applied to a flush.
type Fault struct {
	Kind  Kind
	Delay time.Duration // for LateCommit and DelayReply
	Hook  func()        // for CallBefore and CallAfter; runs on the conn's goroutine
}

// Kind names a fault.
type Kind int

// The kinds of faults.
const (
	// Forward lets the flush pass.
	Forward Kind = iota
	// CutBefore forwards everything before the COMMIT, but not the COMMIT, and cuts both sides.
	CutBefore
	// CutAfter forwards everything. Once PostgreSQL has answered, both sides are cut, and the reply
	// is lost.
	CutAfter
	// Silence forwards everything and drops the reply. The proxy hangs up only when the client
	// hangs up or sends Terminate.
	Silence
	// LateCommit cuts the client at once and forwards everything after Delay.
	LateCommit
	// HalfOpen forwards nothing of the flush and hangs up on neither side: PostgreSQL's side stays
	// open until PostgreSQL ends it or the proxy cuts it, even after the client has hung up.
	HalfOpen
	// DelayReply forwards everything; the reply comes Delay later.
	DelayReply
	// CallBefore runs Hook, then forwards everything.
	CallBefore
	// CallAfter forwards everything and runs Hook at once. The reply is passed on when it comes.
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

// URL returns a postgres:// URL with the proxy's host and port in place of its own, without TLS.
// Everything else stays.
func (p *Proxy) URL(upstream string) string {
	address, err := url.Parse(upstream)
	if err != nil {
		return upstream // the driver reports the error in it
	}
	query := address.Query()
	query.Del("host")
	query.Del("port")
	query.Set("sslmode", "disable")
	address.Host, address.RawQuery = p.Addr(), query.Encode()
	return address.String()
}

// Addr returns the proxy's host:port.
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// Upstream returns the network and address of the first server of a postgres:// URL or connection
// string, for [Options] and [Proxy.SetUpstream].
func Upstream(connection string) (network, address string, err error) {
	config, err := pgconn.ParseConfig(connection)
	if err != nil {
		return "", "", fmt.Errorf("upstream: %w", err)
	}
	network, address = pgconn.NetworkAddress(config.Host, config.Port)
	return network, address, nil
}
