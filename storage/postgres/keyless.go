package postgres

import (
	"context"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

// keylessAttempt is the attempt of a request without a key: a transaction with the same guards, in
// which nothing is claimed, looked up or recorded.
type keylessAttempt struct{ attempt }

// claimKeyless opens the transaction. It takes a lock that nobody else takes, because the statement
// of the lock also returns the transaction's timestamp and sets what a pooler does not keep.
func (s *Store) claimKeyless(ctx context.Context, claim *idempotency.Claim, acquire acquireFunc) (idempotency.Attempt, *idempotency.Record, error) {
	conn, err := s.connect(ctx, acquire)
	if err != nil {
		return nil, nil, err
	}
	a := new(keylessAttempt)
	a.init(s, conn, claim, idempotency.Key{Value: claim.Attempt.String()}.LockNumber(s.table))
	a.params[0] = a.lockNumber[:]
	calls := append(a.calls[:0],
		wire.Call{Statement: &s.statements.begin},
		wire.Call{Statement: &s.statements.lock, Params: a.params[:1:1], Row: lockRow{&a.attempt}},
	)
	if reply, err := s.statements.Flush(ctx, a.conn(), calls...); err != nil {
		return nil, nil, a.claimFailed(ctx, calls[min(reply.Failed, len(calls)-1)].Statement, err)
	}
	return a, nil, nil
}

// Commit implements [idempotency.Attempt]. The guard before COMMIT sets synchronous_commit, as a
// record does.
func (a *keylessAttempt) Commit(ctx context.Context, _ *idempotency.Answer) error {
	defer a.release(ctx)
	return a.commit(ctx, a.guardCall())
}

// Decline implements [idempotency.Attempt].
func (a *keylessAttempt) Decline(ctx context.Context, _ *idempotency.Answer) error {
	return a.Rollback(ctx)
}

// Rollback implements [idempotency.Attempt].
func (a *keylessAttempt) Rollback(ctx context.Context) error {
	defer a.release(ctx)
	return a.undo(ctx, "rollback", a.guarded(), false)
}
