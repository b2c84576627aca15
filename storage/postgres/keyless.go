package postgres

import (
	"context"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

// keylessAttempt is the attempt of a request without a key: a transaction with the same guards, in
// which nothing is claimed, looked up or recorded.
type keylessAttempt struct{ attempt }

// claimKeyless opens the transaction on a connection. It takes a lock that nobody else takes.
func (s *Store) claimKeyless(ctx context.Context, claim *idempotency.Claim, conn *pgxpool.Conn) (idempotency.Attempt, *idempotency.Record, error) {
	a := new(keylessAttempt)
	a.init(s, conn, claim, idempotency.Key{Value: claim.Attempt.String()}.LockNumber(s.table))
	calls := append(a.calls[:0], wire.Call{Statement: &s.statements.begin}, a.lockCall())
	if reply, err := s.statements.Flush(ctx, a.conn, calls...); err != nil {
		return nil, nil, a.claimFailed(ctx, calls[min(reply.Failed, len(calls)-1)].Statement, err)
	}
	return a, nil, nil
}

// Commit implements [idempotency.Attempt]. The guard before COMMIT sets synchronous_commit, as a
// record does.
func (a *keylessAttempt) Commit(ctx context.Context, _ *idempotency.Answer) error {
	defer a.release(ctx)
	deferred, _, refused := a.deferred()
	return a.commit(ctx, deferred, refused, a.guardCall())
}

// Decline implements [idempotency.Attempt].
func (a *keylessAttempt) Decline(ctx context.Context, _ *idempotency.Answer) error {
	return a.rollback(ctx)
}

// Rollback implements [idempotency.Attempt].
func (a *keylessAttempt) Rollback(ctx context.Context) error { return a.rollback(ctx) }
