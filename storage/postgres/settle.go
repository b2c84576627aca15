package postgres

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

// Errors of [Store.Settle].
var (
	// ErrEffectNotFound: no call has this key. Its record may have expired, or it is another
	// service's call.
	ErrEffectNotFound = errors.New("no effect has this key")
	// ErrSettledOtherwise: the call has another result already, which counts. If that is a decline,
	// and the other service says that it is done, a person must look: money may have moved.
	ErrSettledOtherwise = errors.New("effect has another result already")
)

// Settle records what the other service says of a call outside of it, as in a webhook: see
// effect.Declared. The first result that is recorded counts, whether the call or Settle brings it. A
// repetition changes nothing and is no error. It runs in tx, which is the caller's, so that what else
// the webhook changes is committed with it, or not at all.
//
// A decline that the other service does not keep (Settlement.Kept) counts only if the call was sent
// once: it may be that of an earlier send, while a later one is under way. Otherwise nothing is
// recorded, and the next run of the handler asks.
//
// The request becomes due at once, unless a run of its handler is under way, and a request that was
// left to a person is not any more. Its handler makes the answer: somebody has to retry, or a
// completer must run.
//
// A result that is recorded leaves a row in the table idempotency_audit, as an operator's act does, so
// the role of tx needs INSERT on it.
//
// The error is [ErrEffectNotFound] or [ErrSettledOtherwise], or that of the database.
func (s *Store) Settle(ctx context.Context, tx pgx.Tx, settlement idempotency.Settlement) error {
	err := s.settleIn(ctx, tx, &settlement)
	if err != nil {
		return fmt.Errorf("settle: %w", err)
	}
	return nil
}

func (s *Store) settleIn(ctx context.Context, tx pgx.Tx, settlement *idempotency.Settlement) error {
	if settlement.State != idempotency.EffectDone && settlement.State != idempotency.EffectDeclined {
		return errors.New("an effect is settled as done or as declined")
	}
	derived, err := parseUUID(settlement.DerivedKey)
	if err != nil {
		return ErrEffectNotFound // a key of somebody else's
	}
	var key idempotency.Key
	var attempt, uuid pgtype.UUID
	uuid.Bytes, uuid.Valid = derived, true
	for looks := 0; ; looks++ {
		var name string
		var state idempotency.EffectState
		var encrypted bool
		var tries int
		err := tx.QueryRow(ctx, s.open.find, pgx.QueryExecModeExec, uuid).Scan(&key.Scope, &key.Value, &name, &state, &tries, &attempt, &encrypted)
		switch {
		case errors.Is(err, pgx.ErrNoRows):
			return ErrEffectNotFound
		case err != nil:
			return wire.SQLError(err)
		case state == settlement.State:
			return nil
		case state != idempotency.EffectIntended:
			return ErrSettledOtherwise
		case encrypted && settlement.Seal == nil:
			return errors.New("the request is encrypted: set Settlement.Seal to encrypted.Store.SealOutput")
		case looks == 2:
			return errors.New("the effect changes under our hands")
		}
		output := notNull(settlement.Output)
		if encrypted {
			output = settlement.Seal(output, key, attempt.Bytes, name)
		}
		// An owner holds the open request in its last transaction, and by then has all results.
		if _, err := tx.Exec(ctx, s.open.hold, pgx.QueryExecModeExec, key.Scope, key.Value); err != nil {
			return wire.SQLError(err)
		}
		final := settlement.State == idempotency.EffectDone || settlement.Kept
		tag, err := tx.Exec(ctx, s.open.settleOutside, pgx.QueryExecModeExec, key.Scope, key.Value, name, int16(settlement.State), output, final)
		reason := "effect " + name + ": settled from outside"
		switch {
		case err != nil:
			return wire.SQLError(err)
		case tag.RowsAffected() == 0 && tries > 1 && !final:
			reason = "effect " + name + ": declined from outside, perhaps of an earlier send"
		case tag.RowsAffected() == 0:
			continue // somebody else was first, or it is sent again just now
		}
		if tag.RowsAffected() > 0 {
			action := "settle-done"
			if settlement.State == idempotency.EffectDeclined {
				action = "settle-declined"
			}
			if _, err := tx.Exec(ctx, s.open.audit, pgx.QueryExecModeExec, key.Scope, key.Value, name, action); err != nil {
				return wire.SQLError(err)
			}
		}
		_, err = tx.Exec(ctx, s.open.hasten, pgx.QueryExecModeExec, key.Scope, key.Value, reason)
		if err != nil {
			return wire.SQLError(err)
		}
		return nil
	}
}
