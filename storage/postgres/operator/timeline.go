package operator

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
)

// EventsMax is the maximum number of history events, and of acts, in a timeline: the newest ones.
const EventsMax = 500

// EventKind is the kind of an [Event].
type EventKind string

// The kinds. Those of [idempotency.Outcome] are ends of requests as a service saw them, from the
// table idempotency_events.
const (
	// EventRecorded comes from the record: an attempt was executed, and its answer committed.
	EventRecorded EventKind = "recorded"
	// EventRunning: a session holds the key now. At is the beginning of its transaction.
	EventRunning EventKind = "running"
	EventExpires EventKind = "expires" // the record will expire
	// EventExpired: the record has expired. It counts until the reaper deletes it.
	EventExpired     EventKind = "expired"
	EventActExpire   EventKind = "act-expire"  // an operator expired a record
	EventActDelete   EventKind = "act-delete"  // an operator deleted a record; each other action of the audit table has a kind too
	EventIntent      EventKind = "intent"      // an effect was about to be sent for the first time
	EventSentAgain   EventKind = "sent-again"  // the last time that an effect was about to be sent again; Attempts is the number of sends
	EventResult      EventKind = "result"      // an effect's result was recorded, or a phase was committed; Reason is its state
	EventNext        EventKind = "next"        // an open request or a parked message is due from this time on; Reason is why the last run failed
	EventParked      EventKind = "parked"      // an open request waits for a person; or a consumer has parked a message: Reason says why
	EventRefused     EventKind = "refused"     // the broker has refused a message in the outbox; Reason has its words
	EventPublished   EventKind = "published"   // a message was committed to the outbox, which still has it
	EventExecuted    EventKind = "executed"    // as [idempotency.OutcomeExecuted]
	EventReplayed    EventKind = "replayed"    // and so on
	EventInProgress  EventKind = "in-progress" //
	EventMismatch    EventKind = "mismatch"
	EventNotExecuted EventKind = "not-executed"
	EventUnknown     EventKind = "unknown"
)

// Event is one known event of a key.
type Event struct {
	At      time.Time
	Kind    EventKind
	Attempt idempotency.AttemptID // zero if unknown. Of a replay: the attempt that recorded the answer
	TraceID string                // of a request: its own, even if it was a replay
	Status  int                   // of a record, and of the record that an act changed; otherwise 0

	// Of requests from the history.
	Outcome  idempotency.Outcome
	Reason   string // why there was no answer. Of an act: the operator's reason
	Duration time.Duration
	Attempts int

	Effect   string  // name of the effect; also of an act that settled one
	Consumer string  // of a message, in MessageState.Events; empty for what happened in the outbox
	Actor    string  // of an act
	Role     string  // of an act: the role that the session logged in with
	Holder   *Holder // of a running one
}

// Timeline returns the known events of a key, oldest first. They come from its record, its lock,
// the audit table, and the history (package observe/history) if a service writes one. Without a
// history retries are unknown, because a replay writes nothing. If nothing is known Timeline
// returns no events and no error. Events that a service saw have the time of the service's clock;
// all others have the database's time.
func (o *Operator) Timeline(ctx context.Context, key idempotency.Key) ([]Event, error) {
	var events []Event
	err := validKey(key)
	if err == nil {
		err = o.read(ctx, func(ctx context.Context, tx pgx.Tx) (err error) {
			events, err = o.timeline(ctx, tx, key)
			return err
		})
	}
	if err != nil {
		return nil, fmt.Errorf("timeline: %w", err)
	}
	return events, nil
}

func (o *Operator) timeline(ctx context.Context, tx pgx.Tx, key idempotency.Key) ([]Event, error) {
	var events []Event
	state, err := o.state(ctx, tx, key)
	if err != nil {
		return nil, err
	}
	effects, err := o.effectEvents(ctx, tx, key, state.Record)
	if err != nil {
		return nil, err
	}
	events = append(events, effects...)
	if r := state.Record; r != nil && !r.Open() {
		recorded := Event{At: r.CreatedAt, Kind: EventRecorded, Attempt: r.Attempt, TraceID: r.TraceID, Status: r.Status}
		for i := range effects { // of an open request the row was made before its first effect, and the answer after its last
			if effects[i].At.After(recorded.At) {
				recorded.At = effects[i].At
			}
		}
		events = append(events, recorded)
		end := Event{At: r.ExpiresAt, Kind: EventExpires, Attempt: r.Attempt}
		if r.Expired {
			end.Kind = EventExpired
		}
		events = append(events, end)
	}
	if h := state.Holder; h != nil {
		running := Event{At: h.Since, Kind: EventRunning, Holder: h}
		if running.At.IsZero() {
			running.At = state.Now
		}
		events = append(events, running)
	}
	// Before migration 3 there are no such tables.
	var audit, history bool
	if err := tx.QueryRow(ctx, "SELECT to_regclass($1) IS NOT NULL, to_regclass($2) IS NOT NULL", o.audit, o.events).Scan(&audit, &history); err != nil {
		return nil, err
	}
	if audit {
		acts, err := o.acts(ctx, tx, "scope = $1 AND key = $2", key.Scope, key.Value)
		if err != nil {
			return nil, err
		}
		events = append(events, acts...)
	}
	if history {
		seen, err := o.history(ctx, tx, key)
		if err != nil {
			return nil, err
		}
		events = append(events, seen...)
	}
	parked, err := o.parkedEvents(ctx, tx, key)
	if err != nil {
		return nil, err
	}
	events = append(events, parked...)
	sortEvents(events)
	return events, nil
}

func sortEvents(events []Event) {
	slices.SortStableFunc(events, func(a, b Event) int { return cmp.Compare(a.At.UnixNano(), b.At.UnixNano()) })
}

// effectEvents returns the events of a request's effects, and its state if it is open. It returns
// none if the role can't read the tables.
func (o *Operator) effectEvents(ctx context.Context, tx pgx.Tx, key idempotency.Key, record *Record) ([]Event, error) {
	var readable bool
	err := tx.QueryRow(ctx, "SELECT COALESCE(has_table_privilege(to_regclass($1)::oid, 'SELECT') AND has_table_privilege(to_regclass($2)::oid, 'SELECT'), false)",
		o.open, o.effects).Scan(&readable)
	if err != nil || !readable || record == nil {
		return nil, err
	}
	var events []Event
	effects, err := o.effectsIn(ctx, tx, key)
	if err != nil {
		return nil, err
	}
	for i := range effects {
		e := &effects[i]
		if e.Kind != idempotency.EffectPhase { // which has only a result
			events = append(events, Event{At: e.SentFirstAt, Kind: EventIntent, Effect: e.Name, Attempt: record.Attempt})
		}
		if !e.DoubtAt.IsZero() {
			events = append(events, Event{At: e.DoubtAt, Kind: EventSentAgain, Effect: e.Name, Attempts: e.Tries, Attempt: record.Attempt})
		}
		if !e.SettledAt.IsZero() {
			events = append(events, Event{At: e.SettledAt, Kind: EventResult, Effect: e.Name, Reason: e.StateText(), Attempt: record.Attempt})
		}
	}
	if !record.Open() {
		return events, nil
	}
	r, err := o.openIn(ctx, tx, key, "")
	switch {
	case errors.Is(err, ErrNotOpen): // it has ended since
		return events, nil
	case err != nil:
		return nil, err
	}
	stands := Event{At: r.NextAt, Kind: EventNext, Reason: r.LastReason, Attempts: r.Runs, Attempt: r.Attempt}
	if r.Parked != "" {
		stands.Kind, stands.Reason = EventParked, r.Parked
	}
	return append(events, stands), nil
}

// acts returns the newest acts that a condition selects.
func (o *Operator) acts(ctx context.Context, tx pgx.Tx, where string, arguments ...any) ([]Event, error) {
	rows, err := tx.Query(ctx, "SELECT at, action, actor, database_role, reason, attempt_id, status, COALESCE(to_jsonb(a)->>'effect', '') FROM "+o.audit+
		" AS a WHERE "+where+fmt.Sprintf(" ORDER BY id DESC LIMIT %d", EventsMax), arguments...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (e Event, err error) {
		var action string
		err = row.Scan(&e.At, &action, &e.Actor, &e.Role, &e.Reason, (*[16]byte)(&e.Attempt), &e.Status, &e.Effect)
		e.At, e.Kind = e.At.UTC(), EventKind("act-"+action)
		return e, err
	})
}

func (o *Operator) history(ctx context.Context, tx pgx.Tx, key idempotency.Key) ([]Event, error) {
	rows, err := tx.Query(ctx, "SELECT at, outcome, COALESCE(reason, ''), duration_us, attempts, COALESCE(attempt_id, '00000000-0000-0000-0000-000000000000'), COALESCE(trace_id, '') FROM "+o.events+
		" WHERE scope = $1 AND key = $2 ORDER BY id DESC LIMIT $3::int", key.Scope, key.Value, EventsMax)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (e Event, err error) {
		var durationUS int64
		err = row.Scan(&e.At, &e.Outcome, &e.Reason, &durationUS, &e.Attempts, (*[16]byte)(&e.Attempt), &e.TraceID)
		e.At, e.Kind, e.Duration = e.At.UTC(), EventKind(e.Outcome), time.Duration(durationUS)*time.Microsecond
		return e, err
	})
}
