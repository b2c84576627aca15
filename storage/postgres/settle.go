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
	// ErrEffectNotFound: no call has this key. Its record may have expired, or another service made
	// the call.
	ErrEffectNotFound = errors.New("no effect has this key")
	// ErrSettledOtherwise: the call has another result already, which counts. If that is a decline,
	// and the other service says that the call was done, a person must look: money may have moved.
	ErrSettledOtherwise = errors.New("effect has another result already")
)

// Settle records the result of a call that the other service reports in another way than by its
// reply: in a webhook, for example. See effect.Declared.Settled. The first recorded result counts,
// whether the call or Settle brings it. A repetition changes nothing and is no error. Settle runs
// in tx, the caller's transaction, so that the other changes of the webhook are committed with it,
// or not at all.
//
// A decline that the other service does not keep (Settlement.Kept) counts only for a call that is
// sent once at most. It may belong to one of several sends, while another one is under way, and
// net/http repeats requests with a key by itself. For any other call only a note for the operator
// is recorded. The request stays due or parked as it was, and its next run looks the call up or
// sends it again.
//
// Otherwise the request becomes due at once, unless a run of its handler is under way. A parked
// request is not parked any more. Its handler makes the answer, so a client must retry or a
// completer must run.
//
// A recorded result adds a row to the table idempotency_audit, as an operator's act does, so the
// role of tx needs INSERT on that table.
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
		return ErrEffectNotFound // it is not one of our keys
	}
	var key idempotency.Key
	var attempt, uuid pgtype.UUID
	uuid.Bytes, uuid.Valid = derived, true
	for looks := 0; ; looks++ {
		var name string
		var state idempotency.EffectState
		var encrypted bool
		var kind idempotency.EffectKind
		err := tx.QueryRow(ctx, s.open.find, pgx.QueryExecModeExec, uuid).Scan(&key.Scope, &key.Value, &name, &state, &kind, &attempt, &encrypted)
		switch {
		case errors.Is(err, pgx.ErrNoRows):
			return ErrEffectNotFound
		case err != nil:
			return wire.SQLError(err)
		case state == settlement.State:
			return nil
		case state != idempotency.EffectIntended:
			return ErrSettledOtherwise
		case settlement.State == idempotency.EffectDeclined && !settlement.Kept && kind != idempotency.EffectAtMostOnce:
			_, err := tx.Exec(ctx, s.open.note, pgx.QueryExecModeExec, key.Scope, key.Value, "effect "+name+": declined from outside, and another send may be under way")
			return wire.SQLError(err)
		case encrypted && settlement.Seal == nil:
			return errors.New("the request is encrypted: set Settlement.Seal to encrypted.Store.SealOutput")
		case looks == 2:
			return errors.New("the effect keeps changing: settle it again later")
		}
		output := notNull(settlement.Output)
		if encrypted {
			output = settlement.Seal(output, key, attempt.Bytes, name)
		}
		// This may wait for an owner in its last transaction, which has all results by then.
		if _, err := tx.Exec(ctx, s.open.hold, pgx.QueryExecModeExec, key.Scope, key.Value); err != nil {
			return wire.SQLError(err)
		}
		tag, err := tx.Exec(ctx, s.open.settleOutside, pgx.QueryExecModeExec, key.Scope, key.Value, name, int16(settlement.State), output)
		switch {
		case err != nil:
			return wire.SQLError(err)
		case tag.RowsAffected() == 0:
			continue // somebody else was first
		}
		action := "settle-done"
		if settlement.State == idempotency.EffectDeclined {
			action = "settle-declined"
		}
		if _, err := tx.Exec(ctx, s.open.audit, pgx.QueryExecModeExec, key.Scope, key.Value, name, action); err != nil {
			return wire.SQLError(err)
		}
		_, err = tx.Exec(ctx, s.open.hasten, pgx.QueryExecModeExec, key.Scope, key.Value, "effect "+name+": settled from outside")
		if err != nil {
			return wire.SQLError(err)
		}
		return nil
	}
}
