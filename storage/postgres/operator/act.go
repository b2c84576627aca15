package operator

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
)

// Limits of an [Act], in bytes.
const (
	ActorBytesMax  = 255
	ReasonBytesMax = 1000
)

// Act names who changes a record, and why. The audit table stores both unchanged.
type Act struct {
	Actor  string // required: who, as far as the caller knows; the database role is stored too
	Reason string // required: why

	// Attempt, if set, restricts the act to the record of this attempt, so that an operator does
	// not change a newer record than the one seen. If the record is another attempt's, the act
	// returns [ErrChanged].
	Attempt idempotency.AttemptID
}

// Validate returns nil if the act can be stored: it needs an actor and a reason, of at most
// [ActorBytesMax] and [ReasonBytesMax] bytes of UTF-8. The error wraps [ErrInvalid].
func (a Act) Validate() error {
	for _, field := range []struct {
		name, value string
		bytesMax    int
	}{{"actor", a.Actor, ActorBytesMax}, {"reason", a.Reason, ReasonBytesMax}} {
		switch {
		case strings.TrimSpace(field.value) == "":
			return fmt.Errorf("%w: an act needs its %s", ErrInvalid, field.name)
		case len(field.value) > field.bytesMax:
			return fmt.Errorf("%w: the %s has %d bytes, over the limit of %d", ErrInvalid, field.name, len(field.value), field.bytesMax)
		case !utf8.ValidString(field.value) || strings.IndexByte(field.value, 0) >= 0:
			return fmt.Errorf("%w: the %s is not UTF-8", ErrInvalid, field.name)
		}
	}
	return nil
}

// Expire sets the record's expiry to now, and returns the record as it was. Until the reaper
// deletes the record on its next walk, retries still get a replay. After that the key is new, and a
// retry of the request runs again, WHICH CAN PAY TWICE, as after [Operator.Delete].
//
// Like Delete it takes the key's lock as a claim does, and adds a row to the audit table in the
// same transaction. Errors: [ErrNotFound]; [ErrInProgress] if an attempt or a retry holds the key;
// [ErrChanged]; [ErrOpen] if the request is open; [ErrInvalid]; [ErrUnknown] if the reply to COMMIT
// was lost. Expiring an expired record is no error, and does not change its expiry.
func (o *Operator) Expire(ctx context.Context, key idempotency.Key, act Act) (Record, error) {
	return o.act(ctx, "expire", key, act, "UPDATE ONLY "+o.keys+" SET expires_at = least(expires_at, transaction_timestamp()) WHERE scope = $1 AND key = $2 AND attempt_id = $3::uuid AND status <> 0")
}

// Delete deletes the record at once, and returns it as it was. After that the key is new: a retry
// of the request RUNS AGAIN, AND CAN PAY TWICE. Delete a record only if it is known to be wrong,
// the payment was checked, and the client is known to send no more retries or is meant to run the
// request again.
//
// Delete never takes a record from a running attempt: it takes the key's lock as a claim does, and
// does nothing if it can't. But an attempt that lost the reply to its COMMIT no longer holds the
// lock, and looks for its record for the engine's Timeouts.Resolve. If Delete has deleted that
// record, the attempt takes its absence as proof, and ITS CLIENT GETS NOT-EXECUTED FOR WORK THAT
// WAS COMMITTED. So do not delete a record that is younger than a minute, least of all while the
// network or the database is in trouble. Delete returns the errors of [Operator.Expire].
func (o *Operator) Delete(ctx context.Context, key idempotency.Key, act Act) (Record, error) {
	return o.act(ctx, "delete", key, act, "DELETE FROM ONLY "+o.keys+" WHERE scope = $1 AND key = $2 AND attempt_id = $3::uuid AND status <> 0")
}

func (o *Operator) act(ctx context.Context, action string, key idempotency.Key, act Act, sql string) (Record, error) {
	var record Record
	err := errors.Join(validKey(key), act.Validate())
	if err == nil {
		err = o.in(ctx, pgx.TxOptions{IsoLevel: pgx.ReadCommitted, AccessMode: pgx.ReadWrite}, func(ctx context.Context, tx pgx.Tx) (err error) {
			record, err = o.actIn(ctx, tx, action, key, act, sql)
			return err
		})
	}
	if err != nil {
		return Record{}, fmt.Errorf("%s: %w", action, err)
	}
	return record, nil
}

func (o *Operator) actIn(ctx context.Context, tx pgx.Tx, action string, key idempotency.Key, act Act, sql string) (Record, error) {
	var locked bool
	// COMMIT waits for the local disk, or for more if the role's setting demands it.
	err := tx.QueryRow(ctx, `SELECT pg_try_advisory_xact_lock($1::bigint), CASE WHEN current_setting('synchronous_commit') IN ('off', 'local', 'remote_write')
		THEN set_config('synchronous_commit', 'on', true) END IS NULL`, key.LockNumber(o.table)).Scan(&locked, new(bool))
	switch {
	case err != nil:
		return Record{}, err
	case !locked:
		return Record{}, ErrInProgress
	}
	// As in a claim: a statement of its own, so that its snapshot is taken after the lock.
	look := func() (Record, error) {
		return scanRecord(tx.QueryRow(ctx, "SELECT "+recordColumns+" FROM "+o.keys+" WHERE scope = $1 AND key = $2", key.Scope, key.Value))
	}
	record, err := look()
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return Record{}, ErrNotFound
	case err != nil:
		return Record{}, err
	case !act.Attempt.IsZero() && record.Attempt != act.Attempt:
		return Record{}, fmt.Errorf("%w: the record is of another attempt: look again with idemctl key get", ErrChanged)
	case record.Open():
		return Record{}, fmt.Errorf("%w, and money may have moved: end it first (idemctl effect get, effect settle), or give it up with idemctl key abandon", ErrOpen)
	}
	tag, err := tx.Exec(ctx, sql, key.Scope, key.Value, record.Attempt.String())
	switch {
	case err != nil:
		return Record{}, err
	case tag.RowsAffected() == 0: // the reaper deleted it, unless the record is still there
		if still, err := look(); err == nil && still.Attempt == record.Attempt {
			return Record{}, fmt.Errorf("nothing was done: the record stays: idemctl doctor names the rule, trigger or child table of %s that keeps it", o.table)
		}
		return Record{}, ErrNotFound
	}
	tag, err = tx.Exec(ctx, "INSERT INTO "+o.audit+` (action, actor, reason, scope, key, attempt_id, status, record_created_at, record_expires_at)
		VALUES ($1, $2, $3, $4, $5, $6::uuid, $7::smallint, $8::timestamptz, $9::timestamptz)`,
		action, act.Actor, act.Reason, key.Scope, key.Value, record.Attempt.String(), record.Status, record.CreatedAt, record.ExpiresAt)
	if err == nil && tag.RowsAffected() != 1 {
		err = fmt.Errorf("nothing was done: no row was written to %s.%s: drop its rules and its BEFORE triggers", o.store.Schema(), AuditTableName)
	}
	return record, err
}
