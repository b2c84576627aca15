package postgres

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

const (
	resolveLockTimeout    = 2 * time.Second // then the place is given to others that wait
	resolveConnectTimeout = 2 * time.Second
	resolveCloseTimeout   = time.Second
	resolvePauseMin       = 20 * time.Millisecond
	resolvePauseMax       = 500 * time.Millisecond
)

// Resolve implements [idempotency.Store]. It waits for the key's lock on a fresh connection to a
// primary, and reads the record in a statement of its own. The backend that sent the lost reply
// holds the lock until its outcome is visible, and a crash drops both: so the lock, and a snapshot
// younger than it, show the truth. It uses neither pgconn.SafeToRetry, which is true after a COMMIT
// that happened, nor pg_xact_status, which returns committed for transactions that a fail-over
// lost.
//
// It does not trust a server with a log that is behind its position at the claim: that is an old
// primary that nobody has stopped, or a copy. Absence also proves nothing if row-level security
// applies to the role, or once half of the TTL has passed.
//
// A decline gives up the lock at its ROLLBACK, before its INSERT: after a decline, nil proves
// nothing.
func (s *Store) Resolve(ctx context.Context, claim *idempotency.Claim) (*idempotency.Record, error) {
	last := errors.New("no place among the resolvers: raise Options.ResolversMax")
	for pause := resolvePauseMin; ; pause = min(2*pause, resolvePauseMax) {
		select {
		case s.resolvers <- struct{}{}:
		case <-ctx.Done():
			return nil, fail("resolve", idempotency.ErrUnknown, last)
		}
		record, err := s.resolveInPlace(ctx, claim)
		if err == nil {
			return record, nil
		}
		last = err
		// No retry changes it.
		if errors.Is(err, errRecord) || errors.Is(err, ErrRowSecurityActive) || errors.Is(err, errMayHaveExpired) {
			return nil, fail("resolve", idempotency.ErrUnknown, err)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, fail("resolve", idempotency.ErrUnknown, last)
		}
	}
}

// resolveInPlace gives the place back, even if a hook of the pool panics.
func (s *Store) resolveInPlace(ctx context.Context, claim *idempotency.Claim) (*idempotency.Record, error) {
	defer func() { <-s.resolvers }()
	return s.resolveOnce(ctx, claim)
}

var (
	errOldPrimary = errors.New("connected to a primary that is behind the one of the claim: an old one that was not stopped, or a copy. Stop it, or lead its name elsewhere")

	// errMayHaveExpired means that an absent record proves nothing: half of the TTL or more has
	// passed since the claim, because the TTL is short or the machine stood still. The database's
	// clock decides: the process's own stands still with the machine.
	errMayHaveExpired = errors.New("the record may have been there, and expired")
)

var errStandby = errors.New("connected to a standby: the connection string must lead to the primary, or name all hosts")

func (s *Store) resolveOnce(ctx context.Context, claim *idempotency.Claim) (*idempotency.Record, error) {
	conn, err := s.connectPrimary(ctx)
	if err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), resolveCloseTimeout)
		defer cancel()
		// Closing would end the transaction too, but a moment later: an immediate retry would find
		// the key in progress.
		if conn.PgConn().TxStatus() != 'I' {
			_, _ = s.statements.Flush(ctx, conn.PgConn(), wire.Call{Statement: &s.statements.rollback})
		}
		_ = conn.Close(ctx)
	}()
	if !wire.PlainText(conn.PgConn()) {
		return nil, errEncoding
	}
	var record *idempotency.Record
	var now time.Time
	synchronous, hidden := false, false
	statements, lockNumber := &s.statements, wire.EncodeInt8(claim.Key.LockNumber(s.table))
	calls := []wire.Call{
		{Statement: &statements.resolveBegin},
		{Statement: &statements.resolveSet, Params: [][]byte{[]byte(strconv.FormatInt(resolveLockTimeout.Milliseconds(), 10))}, Row: wire.RowFunc(func(values [][]byte) error {
			d := wire.Decoder{Values: values}
			d.Next(-1)
			d.Next(-1)
			standby := d.Bool()
			synchronous = d.Bool()
			if standby {
				return errStandby
			}
			return d.Err
		})},
	}
	if claim.Timeline != 0 {
		calls = append(calls, wire.Call{Statement: &statements.resolveAt, Row: wire.RowFunc(func(values [][]byte) error {
			d := wire.Decoder{Values: values}
			timeline, position := d.Position()
			if timeline < claim.Timeline || timeline == claim.Timeline && position < claim.Position {
				return cmp.Or(d.Err, errOldPrimary)
			}
			return d.Err
		})})
	}
	calls = append(calls,
		wire.Call{Statement: &statements.resolveLock, Params: [][]byte{lockNumber[:]}},
		wire.Call{Statement: &statements.lookUp, Params: [][]byte{[]byte(claim.Key.Scope), []byte(claim.Key.Value)}, Row: wire.RowFunc(func(values [][]byte) (err error) {
			record, hidden, err = decodeLookUp(values)
			return err
		})},
		// The clock is read after the look-up.
		wire.Call{Statement: &statements.resolveTime, Row: wire.RowFunc(func(values [][]byte) error {
			d := wire.Decoder{Values: values}
			now = d.Timestamp()
			return d.Err
		})},
	)
	_, err = statements.Flush(ctx, conn.PgConn(), calls...)
	switch {
	case err != nil || record != nil:
	case hidden:
		err = rowSecurity(s.table, "")
	case !claim.At.IsZero() && 2*now.Sub(claim.At) >= claim.TTL:
		err = errMayHaveExpired
	}
	if err == nil && synchronous {
		// For an absent record too: standbys do not acknowledge a primary that was replaced without
		// knowing it.
		err = s.barrier(ctx, conn.PgConn())
	}
	if err != nil {
		return nil, err
	}
	return record, nil
}

// connectPrimary makes a connection as the pool would, but to a primary. One of the pool's may lead
// to a server that is no longer the primary, or never become free.
func (s *Store) connectPrimary(ctx context.Context) (*pgx.Conn, error) {
	pool := s.pool.Config()
	config := pool.ConnConfig
	if config.ConnectTimeout == 0 || config.ConnectTimeout > resolveConnectTimeout {
		config.ConnectTimeout = resolveConnectTimeout
	}
	// If there are several hosts, take the one that is a primary.
	if config.ValidateConnect == nil && len(config.Fallbacks) > 0 {
		config.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsPrimary
	}
	if pool.BeforeConnect != nil {
		if err := pool.BeforeConnect(ctx, config); err != nil {
			return nil, err
		}
	}
	// Warnings are noted even if the pool's config did not go through Configure.
	config.OnNotice = wire.MarkWarnings(config.OnNotice)
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return nil, err
	}
	prepared := false
	defer func() {
		if !prepared {
			_ = conn.Close(ctx)
		}
	}()
	if err := prepareAsPool(context.WithValue(ctx, unpreparedKey{}, true), pool, conn); err != nil {
		return nil, err
	}
	prepared = true
	return conn, nil
}

// prepareAsPool runs the pool's hooks for a new connection: they may set a role or a setting that
// decides which rows it sees.
func prepareAsPool(ctx context.Context, pool *pgxpool.Config, conn *pgx.Conn) error {
	if pool.AfterConnect != nil {
		if err := pool.AfterConnect(ctx, conn); err != nil {
			return err
		}
	}
	usable, err := true, error(nil)
	//lint:ignore SA1019 the pool still calls it
	before := pool.BeforeAcquire
	switch {
	case pool.PrepareConn != nil:
		usable, err = pool.PrepareConn(ctx, conn)
	case before != nil:
		usable = before(ctx, conn)
	}
	if err == nil && !usable {
		err = errors.New("the pool's hook refused the connection")
	}
	return err
}

// unpreparedKey marks the context of a connection that is used once: preparing our statements would
// cost more round trips than all else.
type unpreparedKey struct{}
