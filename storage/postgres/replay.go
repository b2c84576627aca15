package postgres

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

// recentKeysMax is the maximum number of recent keys of a store: 8 bytes each, 512 kB.
const recentKeysMax = 1 << 16

// recentKeys are the lock numbers of keys that this store has seen recorded, each in the place that
// its low bits name; a new one replaces the one in its place. Nobody relies on them: for a recent
// key, looking the record up first is worth a try. A wrong one costs a fresh request one round
// trip, and a missing one costs a replay one round trip.
type recentKeys [recentKeysMax]atomic.Uint64

func (h *recentKeys) place(number int64) *atomic.Uint64 { return &h[uint64(number)%recentKeysMax] }

func (h *recentKeys) set(number int64) { h.place(number).Store(uint64(number)) }

func (h *recentKeys) has(number int64) bool { return h.place(number).Load() == uint64(number) }

func (h *recentKeys) clear(number int64) { h.place(number).CompareAndSwap(uint64(number), 0) }

// peek looks for the record of a key in one statement outside of a transaction. If there is one,
// that is the whole replay. It returns the record, or an error that ends the claim, or neither:
// then the claim must continue, and the connection is as it was.
//
// A row that a primary shows is committed, whichever session holds the lock, and replays never wait
// for the lock. On a standby, and if COMMIT waits for standbys, a look is not enough for a replay,
// and the claim must continue. A row that a reaper is deleting is replayed, as it may be by the
// claim. Role, row security and statement_timeout are those of the connection, as for the claim;
// with TransactionPooling only ctx bounds peek.
func (s *Store) peek(ctx context.Context, conn *pgconn.PgConn, claim *idempotency.Claim, number int64) (*idempotency.Record, error) {
	var row peekRow
	_, err := s.statements.Flush(ctx, conn, wire.Call{
		Statement: &s.statements.peek, Params: [][]byte{[]byte(claim.Key.Scope), []byte(claim.Key.Value)}, Row: &row,
	})
	if row.hidden {
		s.statements.Distrust(conn) // a plan with policies would outlive them
	}
	switch {
	case err == nil && row.record != nil:
		return row.record, nil
	case err == nil:
		s.recent.clear(number)
		return nil, nil
	case errors.Is(err, errRecord):
		return nil, fail("read the record", idempotency.ErrUnknown, err)
	}
	if conn.IsClosed() { // nothing but a SELECT was sent
		return nil, fail("look the key up", idempotency.ErrUnavailable, errors.Join(errStale, wire.SQLError(err)))
	}
	return nil, nil
}

// peekRow reads the row of a peek.
type peekRow struct {
	record *idempotency.Record // nil if the claim must decide
	hidden bool
}

func (r *peekRow) ReadRow(values [][]byte) (err error) {
	d := wire.Decoder{Values: values[min(1+recordColumnsCount, len(values)):]}
	standby, synchronous := d.Bool(), d.Bool()
	if d.Err != nil || standby || synchronous {
		return d.Err
	}
	r.record, r.hidden, err = decodeLookUp(values)
	return err
}

// replay ends a claim that found a record. If COMMIT waits for standbys, the record must be safe
// before it is replayed.
func (a *keyedAttempt) replay(ctx context.Context) (idempotency.Attempt, *idempotency.Record, error) {
	defer a.release(ctx)
	if !a.synchronous { // with standbys a replay takes more than a look
		a.store.recent.set(a.number)
		return nil, a.record, nil
	}
	err := a.store.barrier(ctx, a.conn)
	switch {
	case err == nil:
		return nil, a.record, nil
	case classify(err) == idempotency.ErrNotSerializable:
		return nil, nil, fail("make the record safe", idempotency.ErrNotSerializable, fmt.Errorf("%w: %w", idempotency.ErrKeyRecorded, wire.SQLError(err)))
	}
	return nil, nil, fail("make the record safe", idempotency.ErrUnknown, err)
}
