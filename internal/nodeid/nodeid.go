// Package nodeid makes ids that no other process on the same database makes: snowflakes with a node
// number that is leased from PostgreSQL.
package nodeid

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/bwmarrin/snowflake"
	"github.com/jackc/pgx/v5"
)

const (
	// Nodes is the number of node numbers, and so the maximum number of processes that share a
	// database: 10 bits of a snowflake.
	Nodes = 1024

	// LockNamespace is the first half of the advisory locks that are the leases. The second half is
	// the node number.
	LockNamespace = 0x6e6f6465 // "node"

	probeInterval = 5 * time.Second // between two probes of a conn that looks alive
	probeTimeout  = 2 * time.Second
	leaseTimeout  = 5 * time.Second
	retryInterval = 200 * time.Millisecond
)

// ErrNoLease means that no node number is leased now, so no id would be sure to be unique.
var ErrNoLease = errors.New("no node number is leased")

// Source makes ids while it holds a lease.
//
// A lease is a session's advisory lock on a conn of its own. It ends with that conn, and so with
// this process or with the database: leases need no expiry. When the conn is lost, the source makes
// no ids until it holds a new lease. Between the loss and its discovery two processes can hold one
// number. Then they make the same id only within one millisecond of both clocks, and the primary
// key of the ids' table refuses the second.
type Source struct {
	config *pgx.ConnConfig
	logger *slog.Logger
	conn   *pgx.Conn // of the lease; nil if there is none
	node   atomic.Pointer[snowflake.Node]
}

// Open leases a node number over a new conn with the given config. The lease lasts until
// [Source.Run] returns.
func Open(ctx context.Context, config *pgx.ConnConfig, logger *slog.Logger) (*Source, error) {
	s := &Source{config: config.Copy(), logger: logger}
	// The session's name in pg_stat_activity.
	s.config.RuntimeParams["application_name"] = "node id"
	if err := s.lease(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

// Next returns a new id, or [ErrNoLease]. It is safe for concurrent use.
func (s *Source) Next() (int64, error) {
	node := s.node.Load()
	if node == nil {
		return 0, ErrNoLease
	}
	return node.Generate().Int64(), nil
}

// Check returns [ErrNoLease] if no id could be made now.
func (s *Source) Check() error {
	if s.node.Load() == nil {
		return ErrNoLease
	}
	return nil
}

// Run keeps the lease until ctx ends, and takes a new one whenever it is lost. Then it releases the
// lease. Call it once.
func (s *Source) Run(ctx context.Context) {
	defer s.release()
	for ctx.Err() == nil {
		if err := s.watch(ctx); ctx.Err() == nil {
			s.release()
			s.logger.WarnContext(ctx, "the lease of the node number is lost; no ids are made until there is another", "error", err)
		}
		for ctx.Err() == nil && s.lease(ctx) != nil {
			select {
			case <-ctx.Done():
			case <-time.After(retryInterval):
			}
		}
	}
}

// lease connects and locks the first free node number, starting at a random one: replicas rarely
// try the same.
func (s *Source) lease(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, leaseTimeout)
	defer cancel()
	conn, err := pgx.ConnectConfig(ctx, s.config)
	if err != nil {
		return fmt.Errorf("lease a node number: connect: %w", err)
	}
	s.conn = conn
	first := rand.IntN(Nodes)
	for i := range Nodes {
		number := (first + i) % Nodes
		var locked bool
		if err := conn.QueryRow(ctx, `SELECT pg_try_advisory_lock($1, $2)`, LockNamespace, number).Scan(&locked); err != nil {
			s.release()
			return fmt.Errorf("lease a node number: %w", err)
		}
		if !locked {
			continue
		}
		node, err := snowflake.NewNode(int64(number))
		if err != nil {
			s.release()
			return fmt.Errorf("lease a node number: %w", err)
		}
		s.node.Store(node)
		return nil
	}
	s.release()
	return fmt.Errorf("lease a node number: all %d are taken", Nodes)
}

// watch returns when the lease's conn is lost, or ctx ends. A server that shuts down sends an error
// or closes the conn, which ends the wait at once. The probe finds a conn that is silently dead.
func (s *Source) watch(ctx context.Context) error {
	for {
		wait, cancel := context.WithTimeout(ctx, probeInterval)
		_, err := s.conn.WaitForNotification(wait)
		waited := wait.Err() != nil
		cancel()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil && (!waited || s.conn.IsClosed()):
			return err
		}
		probe, cancel := context.WithTimeout(ctx, probeTimeout)
		err = s.conn.Ping(probe)
		cancel()
		if err != nil {
			return err
		}
	}
}

// release stops making ids, then releases the lease by closing its conn.
func (s *Source) release() {
	s.node.Store(nil)
	if s.conn == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), probeTimeout)
	defer cancel()
	_ = s.conn.Close(ctx) // a conn that can't send Terminate is closed all the same
	s.conn = nil
}
