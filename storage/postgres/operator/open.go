package operator

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/envelope"
)

// Errors of open requests.
var (
	// ErrNotOpen: the key has no open request. It may have a record: then the request has ended.
	ErrNotOpen = errors.New("key has no open request: idemctl key get shows whether it has ended")
	// ErrOpen: the key's request is open, so there is no record to change, and money may have moved.
	// End the request: settle its effects, or abandon it.
	ErrOpen = errors.New("key's request is open")
	// ErrSettled: the effect has a result already, which is never replaced. Nothing was done.
	ErrSettled = errors.New("effect is settled")
	// ErrNoEffect: the open request has no effect of this name.
	ErrNoEffect = errors.New("request has no such effect")
	// ErrUnconfirmed: [Abandonment.Sent] does not name exactly the effects that may have been sent.
	// The text names them. Nothing was done.
	ErrUnconfirmed = errors.New("abandonment is not confirmed")
	// ErrEncrypted: the output is not encrypted and the service's effects are, or the other way
	// around. Nothing was done. A program with the keys can encrypt it: encrypted.Store.SealOutput.
	ErrEncrypted = errors.New("service encrypts its effects")
)

// OpenRequest is an open request as an operator sees it: one that has called another service, or
// was about to, and has no answer yet.
type OpenRequest struct {
	Key        idempotency.Key // prints as a hash; its fields are the table's columns
	Route      string
	Attempt    idempotency.AttemptID // of the request; a service's rows may carry it
	Epoch      int64                 // changes with each owner, and with each act: see [OpenAct.Epoch]
	Runs       int                   // of the handler
	StartedAt  time.Time
	Age        time.Duration // since StartedAt
	NextAt     time.Time     // the time from which anybody may take it over
	Running    bool          // an attempt runs, or died within its lease
	Parked     string        // why only a person can end it; empty if nobody needs to
	LastReason string        // why the last run left it open
	Unsettled  []string      // names of the effects without a recorded result, the oldest first

	Effects []Effect // only of [Operator.GetOpen]
}

// OpenState is the state of an open request in one word.
type OpenState string

// The states.
const (
	OpenParked  OpenState = "parked"  // only a person can end it
	OpenRunning OpenState = "running" // an attempt runs, or died within its lease
	OpenDue     OpenState = "due"     // anybody may take it over
	OpenWaiting OpenState = "waiting" // it is due later
)

// State returns the state at the time that the request was read.
func (r *OpenRequest) State() OpenState {
	switch {
	case r.Parked != "":
		return OpenParked
	case r.Running:
		return OpenRunning
	case !r.NextAt.After(r.StartedAt.Add(r.Age)):
		return OpenDue
	}
	return OpenWaiting
}

// Effect is a call that an open request made, or was about to make. Its input and output are not
// read: they may contain private data.
type Effect struct {
	Name        string                  `json:"name"`
	Kind        idempotency.EffectKind  `json:"kind"`
	State       idempotency.EffectState `json:"state"`
	Stated      bool                    `json:"stated,omitempty"` // intended, and an operator has stated that it was done; the next run checks the output
	DerivedKey  string                  `json:"derived_key"`      // the key that the other service got, to look the call up there
	Tries       int                     `json:"tries"`            // times that it may have been sent
	Panics      int                     `json:"panics"`
	SentFirstAt time.Time               `json:"sent_first_at"`
	DoubtAt     time.Time               `json:"doubt_at,omitzero"`   // time of the last repeated send without a definite answer
	SettledAt   time.Time               `json:"settled_at,omitzero"` // if it has a result
}

// OpenFilter selects the open requests that match every field that is set.
type OpenFilter struct {
	Scope  string // exact
	Route  string // exact
	Effect string // requests that have an effect of this name
	Parked bool   // only those that wait for a person
}

// OpenList is one page.
type OpenList struct {
	Requests []OpenRequest
	Next     Cursor // the start of the next page; empty if the list ends here
	Now      time.Time
}

const openColumns = `o.scope, o.key, o.route, k.attempt_id, o.epoch, o.runs, o.started_at, o.next_at, o.owned AND o.next_at > statement_timestamp(),
	COALESCE(o.parked, ''), COALESCE(o.last_reason, ''), statement_timestamp()`

func scanOpen(row pgx.Row, now *time.Time, more ...any) (r OpenRequest, err error) {
	err = row.Scan(append([]any{&r.Key.Scope, &r.Key.Value, &r.Route, (*[16]byte)(&r.Attempt), &r.Epoch, &r.Runs, &r.StartedAt, &r.NextAt, &r.Running,
		&r.Parked, &r.LastReason, now}, more...)...)
	*now = now.UTC()
	r.StartedAt, r.NextAt = r.StartedAt.UTC(), r.NextAt.UTC()
	r.Age = max(now.Sub(r.StartedAt), 0)
	return r, err
}

// ListOpen returns a page of the open requests, the oldest first. Page.Descending is refused. A
// request that is opened or ended meanwhile may be returned or not. The error for an invalid filter
// or page wraps [ErrInvalid].
func (o *Operator) ListOpen(ctx context.Context, filter OpenFilter, page Page) (OpenList, error) {
	var list OpenList
	rows := cmp.Or(page.Rows, pageRows)
	started, scope, key := time.Time{}, "", ""
	err := func() error {
		switch {
		case rows < 0 || rows > PageRowsMax:
			return fmt.Errorf("%w: a page has 1 to %d rows", ErrInvalid, PageRowsMax)
		case page.Descending:
			return fmt.Errorf("%w: open requests are listed from the oldest on", ErrInvalid)
		case page.After == "":
			return nil
		}
		var err error
		if started, scope, key, err = page.After.openPlace(); err != nil {
			return fmt.Errorf("%w: the cursor is not one of this list", ErrInvalid)
		}
		return nil
	}()
	if err == nil {
		err = o.read(ctx, func(ctx context.Context, tx pgx.Tx) error {
			found, err := tx.Query(ctx, "SELECT "+openColumns+`, ARRAY(SELECT name FROM `+o.effects+` AS e
					WHERE e.scope = o.scope AND e.key = o.key AND e.state = 1 ORDER BY e.sent_first_at, e.name)
				FROM `+o.open+` AS o JOIN `+o.keys+` AS k USING (scope, key)
				WHERE ($1::text = '' OR o.scope = $1) AND ($2::text = '' OR o.route = $2) AND (NOT $3::bool OR o.parked IS NOT NULL)
				AND ($4::text = '' OR EXISTS (SELECT FROM `+o.effects+` AS e WHERE e.scope = o.scope AND e.key = o.key AND e.name = $4))
				AND ($5::bool OR (o.started_at, o.scope, o.key) > ($6::timestamptz, $7::text, $8::text))
				ORDER BY o.started_at, o.scope, o.key LIMIT $9::int`,
				filter.Scope, filter.Route, filter.Parked, filter.Effect, page.After == "", started, scope, key, rows+1)
			if err != nil {
				return err
			}
			list.Requests, err = pgx.CollectRows(found, func(row pgx.CollectableRow) (r OpenRequest, err error) {
				var unsettled []string
				r, err = scanOpen(row, &list.Now, &unsettled)
				r.Unsettled = unsettled
				return r, err
			})
			return err
		})
	}
	if err != nil {
		return OpenList{}, fmt.Errorf("list open requests: %w", err)
	}
	if len(list.Requests) > rows {
		list.Requests = list.Requests[:rows]
		list.Next = openCursor(&list.Requests[rows-1])
	}
	return list, nil
}

func openCursor(r *OpenRequest) Cursor {
	text, _ := json.Marshal([3]string{r.StartedAt.Format(time.RFC3339Nano), r.Key.Scope, r.Key.Value}) // three strings: this never fails
	return Cursor(base64.RawURLEncoding.EncodeToString(text))
}

func (c Cursor) openPlace() (started time.Time, scope, key string, err error) {
	var at [3]string
	text, err := base64.RawURLEncoding.DecodeString(string(c))
	if err == nil {
		err = json.Unmarshal(text, &at)
	}
	if err == nil {
		started, err = time.Parse(time.RFC3339Nano, at[0])
	}
	return started, at[1], at[2], errors.Join(err, idempotency.Key{Scope: at[1], Value: at[2]}.Validate())
}

// GetOpen returns the key's open request with its effects, or [ErrNotOpen] if there is none.
func (o *Operator) GetOpen(ctx context.Context, key idempotency.Key) (OpenRequest, error) {
	var r OpenRequest
	err := validKey(key)
	if err == nil {
		err = o.read(ctx, func(ctx context.Context, tx pgx.Tx) (err error) {
			r, err = o.openIn(ctx, tx, key, "")
			return err
		})
	}
	if err != nil {
		return OpenRequest{}, fmt.Errorf("get the open request: %w", err)
	}
	return r, nil
}

// openIn reads an open request with its effects; lock is FOR UPDATE OF o, or nothing.
func (o *Operator) openIn(ctx context.Context, tx pgx.Tx, key idempotency.Key, lock string) (r OpenRequest, err error) {
	r, err = scanOpen(tx.QueryRow(ctx, "SELECT "+openColumns+" FROM "+o.open+" AS o JOIN "+o.keys+" AS k USING (scope, key) WHERE o.scope = $1 AND o.key = $2 "+lock, key.Scope, key.Value), new(time.Time))
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return r, ErrNotOpen
	case err != nil:
		return r, err
	}
	r.Effects, err = o.effectsIn(ctx, tx, key)
	for i := range r.Effects {
		if r.Effects[i].State == idempotency.EffectIntended {
			r.Unsettled = append(r.Unsettled, r.Effects[i].Name)
		}
	}
	return r, err
}

// effectsIn returns the effects of a key, the oldest first.
func (o *Operator) effectsIn(ctx context.Context, tx pgx.Tx, key idempotency.Key) ([]Effect, error) {
	rows, err := tx.Query(ctx, "SELECT name, kind, state, state = 1 AND output IS NOT NULL, derived_key::text, tries, panics, sent_first_at, doubt_at, settled_at FROM "+o.effects+
		" WHERE scope = $1 AND key = $2 ORDER BY sent_first_at, name", key.Scope, key.Value)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (e Effect, err error) {
		var doubt, settled *time.Time
		err = row.Scan(&e.Name, &e.Kind, &e.State, &e.Stated, &e.DerivedKey, &e.Tries, &e.Panics, &e.SentFirstAt, &doubt, &settled)
		e.SentFirstAt = e.SentFirstAt.UTC()
		if doubt != nil {
			e.DoubtAt = doubt.UTC()
		}
		if settled != nil {
			e.SettledAt = settled.UTC()
		}
		return e, err
	})
}

// MaybeSent returns the names of the effects that may have been sent: all but those that were
// declined, in the order of their names.
func (r *OpenRequest) MaybeSent() []string {
	var names []string
	for i := range r.Effects {
		if e := &r.Effects[i]; e.State != idempotency.EffectDeclined && e.Kind != idempotency.EffectPhase {
			names = append(names, e.Name)
		}
	}
	slices.Sort(names)
	return names
}

// OpenAct is an [Act] on an open request.
type OpenAct struct {
	Act

	// Epoch, if set, restricts the act to the request as the operator saw it: if somebody has taken it
	// over or acted on it since, the act returns [ErrChanged].
	Epoch int64
}

// Settlement is what an operator knows about an effect.
type Settlement string

// The settlements.
const (
	SettleDone     Settlement = "done"     // the other service did it; the next run checks the output
	SettleDeclined Settlement = "declined" // it refused, and will not do it later
	SettleNotSent  Settlement = "not-sent" // it never got the request: the next run sends it as if for the first time
	SettleRetry    Settlement = "retry"    // nothing is known: the next run sends it again with the same key, if the effect's rules permit that
)

// Settle records what an operator knows about an effect without a result, and makes the request due
// at once: the service's handler makes the answer, never the operator. Output is the result of a
// done effect as JSON, as its Do would return it, or the detail of a declined one, which may be
// nil.
//
// [SettleDone] records a statement, not a result: the next run of the handler checks that the
// effect's Do could have returned this output, and only then records it as the result. If it does
// not fit, nothing is sent, and the request is parked for a reason that names the fields. Until the
// output is recorded Settle may be called again: the last statement counts, and each other
// settlement takes it back.
//
// Like every act on an open request it checks the request's epoch, changes the request and adds a
// row to the audit table, all in one transaction. Errors: [ErrNotOpen]; [ErrNoEffect]; [ErrSettled]
// if the effect has a result already; [ErrInProgress] if an attempt runs, or if the effect is to be
// declined or not sent and may still be being sent; [ErrChanged]; [ErrEncrypted]; [ErrInvalid];
// [ErrUnknown] if the reply to COMMIT was lost.
//
// Before you state that an effect was declined or not sent, look it up at the other service when
// the effect's SettleAfter has passed since its last send: the request may still be under way, and
// an effect that is sent once at most would be sent twice. If the machine of the last owner was
// suspended, wait until it runs again or is gone: it may go on with its send.
func (o *Operator) Settle(ctx context.Context, key idempotency.Key, name string, as Settlement, output []byte, act OpenAct) (OpenRequest, error) {
	switch {
	case as == SettleDone && !json.Valid(output) && !bytes.HasPrefix(output, []byte(envelope.Mark)),
		as == SettleDeclined && len(output) > 0 && !json.Valid(output) && !bytes.HasPrefix(output, []byte(envelope.Mark)):
		return OpenRequest{}, fmt.Errorf(`settle: %w: the output is not JSON: write it as {"id":"ch_1","amount":900}, in single quotes for a shell`, ErrInvalid)
	case (as == SettleNotSent || as == SettleRetry) && output != nil:
		return OpenRequest{}, fmt.Errorf("settle: %w: only a done or declined effect has an output", ErrInvalid)
	case as != SettleDone && as != SettleDeclined && as != SettleNotSent && as != SettleRetry:
		return OpenRequest{}, fmt.Errorf("settle: %w: an effect is done, declined, not-sent or retry", ErrInvalid)
	case output == nil:
		output = []byte{}
	}
	return o.openAct(ctx, "settle-"+string(as), name, key, act, nil, func(ctx context.Context, tx pgx.Tx, r *OpenRequest) (string, error) {
		at := slices.IndexFunc(r.Effects, func(e Effect) bool { return e.Name == name })
		if at < 0 {
			return "", fmt.Errorf("%w: it has %s", ErrNoEffect, strings.Join(r.names(), ", "))
		}
		e := &r.Effects[at]
		if e.State != idempotency.EffectIntended {
			return "", fmt.Errorf("%w: it has been %s since %s, and a recorded result is never replaced: idemctl key resume runs the handler, and if the result is wrong, correct the books after that",
				ErrSettled, e.StateText(), e.SettledAt.Format(time.RFC3339))
		}
		if as == SettleDeclined || as == SettleNotSent {
			if err := o.givenUp(ctx, tx, key, name); err != nil {
				return "", err
			}
		}
		// A run that has read the statement before this one, and is slow, must not record it.
		const refuseStale = ", epoch = epoch + CASE WHEN output IS NULL THEN 0 ELSE 1 END"
		switch as {
		case SettleNotSent:
			if e.Kind != idempotency.EffectCall {
				// The next run commits a new intent and sends that: a recorded one is never sent, if it is sent
				// once at most. That may be true of an undo.
				return "", one(tx.Exec(ctx, "DELETE FROM "+o.effects+" WHERE scope = $1 AND key = $2 AND name = $3 AND state = 1", key.Scope, key.Value, name))
			}
			return "", one(tx.Exec(ctx, "UPDATE "+o.effects+" SET sent_first_at = clock_timestamp(), doubt_at = NULL, tries = 0, panics = 0, output = NULL"+refuseStale+" WHERE scope = $1 AND key = $2 AND name = $3 AND state = 1",
				key.Scope, key.Value, name))
		case SettleRetry:
			if e.Kind == idempotency.EffectAtMostOnce {
				return "", fmt.Errorf("%w: this effect is sent once at most: settle it as %s if the other service certainly never got it", ErrInvalid, SettleNotSent)
			}
			return "", one(tx.Exec(ctx, "UPDATE "+o.effects+" SET panics = 0, output = NULL"+refuseStale+" WHERE scope = $1 AND key = $2 AND name = $3 AND state = 1", key.Scope, key.Value, name))
		}
		var encrypted bool
		if err := tx.QueryRow(ctx, "SELECT substr(input, 1, $4::int) = $5::bytea FROM "+o.effects+" WHERE scope = $1 AND key = $2 AND name = $3",
			key.Scope, key.Value, name, len(envelope.Mark), []byte(envelope.Mark)).Scan(&encrypted); err != nil {
			return "", err
		}
		if encrypted != bytes.HasPrefix(output, []byte(envelope.Mark)) {
			return "", ErrEncrypted
		}
		set := "output = $4"
		if as == SettleDeclined {
			set = "output = $4, state = 3, settled_at = clock_timestamp()"
		}
		return "", one(tx.Exec(ctx, "UPDATE "+o.effects+" SET "+set+refuseStale+" WHERE scope = $1 AND key = $2 AND name = $3 AND state = 1", key.Scope, key.Value, name, output))
	})
}

// givenUp returns [ErrInProgress] if an owner may still send the effect, although its lease has run
// out: an owner begins a send in the first half of its lease, and the send takes less than a lease.
func (o *Operator) givenUp(ctx context.Context, tx pgx.Tx, key idempotency.Key, name string) error {
	var until time.Time
	var passed bool
	err := tx.QueryRow(ctx, "SELECT until, until <= clock_timestamp() FROM (SELECT greatest(e.sent_first_at, e.doubt_at) + o.lease_ms * interval '1.5 milliseconds' AS until FROM "+
		o.effects+" AS e JOIN "+o.open+" AS o USING (scope, key) WHERE e.scope = $1 AND e.key = $2 AND e.name = $3) AS send", key.Scope, key.Value, name).Scan(&until, &passed)
	if err == nil && !passed {
		err = fmt.Errorf("%w: the effect may still be sent until %s: look it up at the other service when its SettleAfter has passed since then", ErrInProgress, until.UTC().Format(time.RFC3339))
	}
	return err
}

// StateText returns the state of the effect in one word: intended, stated, done, declined or maybe.
func (e *Effect) StateText() string {
	if e.Stated && e.State == idempotency.EffectIntended {
		return "stated"
	}
	return e.State.String()
}

func (r *OpenRequest) names() []string {
	names := make([]string, 0, len(r.Effects))
	for i := range r.Effects {
		names = append(names, r.Effects[i].Name)
	}
	return names
}

// Resume makes an open request due at once, parked or not, and sets the panics of its effects to
// zero. If it was parked for its age, it has the whole of ParkAfter again. Any other reason may
// park it again. It returns the errors of [Operator.Settle].
func (o *Operator) Resume(ctx context.Context, key idempotency.Key, act OpenAct) (OpenRequest, error) {
	return o.openAct(ctx, "resume", "", key, act, nil, func(ctx context.Context, tx pgx.Tx, _ *OpenRequest) (string, error) {
		_, err := tx.Exec(ctx, "UPDATE "+o.effects+" SET panics = 0 WHERE scope = $1 AND key = $2 AND state = 1 AND panics > 0", key.Scope, key.Value)
		return "", err
	})
}

// Park leaves an open request to a person: nobody takes it over until an operator resumes it or
// settles one of its effects. It returns the errors of [Operator.Settle].
func (o *Operator) Park(ctx context.Context, key idempotency.Key, act OpenAct) (OpenRequest, error) {
	return o.openAct(ctx, "park", "", key, act, nil, func(context.Context, pgx.Tx, *OpenRequest) (string, error) {
		return "an operator parked it", nil
	})
}

// Abandonment is the end of an open request without an answer.
type Abandonment struct {
	OpenAct

	// Sent names the effects that may have been sent, in any order: [OpenRequest.MaybeSent]. Look each
	// of them up at the other service first.
	Sent []string
}

// Abandon deletes an open request with its effects. After that the key is new: a retry of the
// request RUNS AGAIN, AND CAN PAY TWICE, and only the other service and the audit table know which
// effects were sent. Settle the effects instead if their outcome can be found.
//
// The error is [ErrUnconfirmed] unless [Abandonment.Sent] is right; the other errors are those of
// [Operator.Settle].
func (o *Operator) Abandon(ctx context.Context, key idempotency.Key, a Abandonment) (OpenRequest, error) {
	said := slices.Clone(a.Sent)
	slices.Sort(said)
	return o.openAct(ctx, "abandon", "", key, a.OpenAct, func(r *OpenRequest) error {
		if sent := r.MaybeSent(); !slices.Equal(said, sent) {
			return fmt.Errorf("%w: the effects that may have been sent are %s", ErrUnconfirmed, cmp.Or(strings.Join(sent, ","), "none"))
		}
		return nil
	}, nil)
}

// openAct acts on an open request. do returns the reason to park the request, or "" to make it due.
// If do is nil the request is deleted.
func (o *Operator) openAct(ctx context.Context, action, effect string, key idempotency.Key, act OpenAct, vet func(*OpenRequest) error,
	do func(context.Context, pgx.Tx, *OpenRequest) (parked string, err error),
) (OpenRequest, error) {
	var r OpenRequest
	err := errors.Join(validKey(key), act.Validate())
	if err == nil {
		err = o.in(ctx, pgx.TxOptions{IsoLevel: pgx.ReadCommitted, AccessMode: pgx.ReadWrite}, func(ctx context.Context, tx pgx.Tx) (err error) {
			r, err = o.openActIn(ctx, tx, action, effect, key, act, vet, do)
			return err
		})
	}
	if err != nil {
		return OpenRequest{}, fmt.Errorf("%s: %w", action, err)
	}
	return r, nil
}

func (o *Operator) openActIn(ctx context.Context, tx pgx.Tx, action, effect string, key idempotency.Key, act OpenAct, vet func(*OpenRequest) error,
	do func(context.Context, pgx.Tx, *OpenRequest) (parked string, err error),
) (OpenRequest, error) {
	// COMMIT waits for the local disk, or for more if the role's setting demands it.
	if _, err := tx.Exec(ctx, `SELECT set_config('synchronous_commit', 'on', true) WHERE current_setting('synchronous_commit') IN ('off', 'local', 'remote_write')`); err != nil {
		return OpenRequest{}, err
	}
	// The lock on the row keeps others from taking the request over. An owner holds it during its last
	// transaction.
	r, err := o.openIn(ctx, tx, key, "FOR UPDATE OF o")
	switch {
	case err != nil:
		return r, err
	case !act.Attempt.IsZero() && r.Attempt != act.Attempt, act.Epoch != 0 && r.Epoch != act.Epoch:
		return r, fmt.Errorf("%w: look again with idemctl effect get, and act with the epoch that it shows", ErrChanged)
	case r.Running:
		return r, fmt.Errorf("%w: an attempt runs, or died within its lease: look again when it has ended, at %s at the latest (next_at)", ErrInProgress, r.NextAt.Format(time.RFC3339))
	}
	if vet != nil {
		if err := vet(&r); err != nil {
			return r, err
		}
	}
	details, err := json.Marshal(r.Effects)
	if err != nil {
		return r, err
	}
	var status int
	var created, expires time.Time
	if err := tx.QueryRow(ctx, "SELECT status, created_at, expires_at FROM "+o.keys+" WHERE scope = $1 AND key = $2", key.Scope, key.Value).Scan(&status, &created, &expires); err != nil {
		return r, err
	}
	if do != nil {
		parked, err := do(ctx, tx, &r)
		if err == nil {
			err = one(tx.Exec(ctx, "UPDATE "+o.open+" SET epoch = epoch + 1, owned = false, next_at = clock_timestamp(), parked = NULLIF($4::text, ''), last_reason = $5,"+
				" resumed_at = CASE WHEN $4::text = '' THEN clock_timestamp() ELSE resumed_at END WHERE scope = $1 AND key = $2 AND epoch = $3",
				key.Scope, key.Value, r.Epoch, parked, "an operator: "+action))
		}
		if err != nil {
			return r, err
		}
	} else {
		err := one(tx.Exec(ctx, "DELETE FROM "+o.open+" WHERE scope = $1 AND key = $2 AND epoch = $3", key.Scope, key.Value, r.Epoch))
		if err == nil { // its effects go with it
			err = one(tx.Exec(ctx, "DELETE FROM ONLY "+o.keys+" WHERE scope = $1 AND key = $2 AND attempt_id = $3::uuid AND status = 0", key.Scope, key.Value, r.Attempt.String()))
		}
		if err != nil {
			return r, err
		}
	}
	return r, one(tx.Exec(ctx, "INSERT INTO "+o.audit+` (action, actor, reason, scope, key, attempt_id, status, record_created_at, record_expires_at, effect, effects)
		VALUES ($1, $2, $3, $4, $5, $6::uuid, $7::smallint, $8::timestamptz, $9::timestamptz, NULLIF($10, ''), $11::jsonb)`,
		action, act.Actor, act.Reason, key.Scope, key.Value, r.Attempt.String(), status, created, expires, effect, string(details)))
}

// one returns an error unless the statement wrote one row.
func one(tag interface{ RowsAffected() int64 }, err error) error {
	if err == nil && tag.RowsAffected() != 1 {
		return errors.New("nothing was done: a row was not written: drop the rules and BEFORE triggers of the tables")
	}
	return err
}
