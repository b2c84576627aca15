package postgres

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

var errNotReplicated = errors.New("COMMIT did not wait for the standbys: pg_stat_replication says which are away")

// barrier ends the transaction with a COMMIT that waits for the standbys, and so for every earlier
// COMMIT. If an earlier one's wait was canceled, its record is visible on the primary, but a
// fail-over would lose it: it must be safe before it is replayed.
func (s *Store) barrier(ctx context.Context, conn *pgconn.PgConn) error {
	wire.ForgetWarning(conn)
	reply, err := s.statements.Flush(ctx, conn,
		wire.Call{Statement: &s.statements.barrier, Params: [][]byte{s.synchronousCommit}},
		wire.Call{Statement: &s.statements.commit},
	)
	switch {
	case err != nil:
		return err
	case !reply.Committed || wire.Warned(conn):
		return errNotReplicated
	}
	return nil
}
