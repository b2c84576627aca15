package operator

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres"
)

// BodyBytesMax is the largest body that [Operator.Body] returns.
const BodyBytesMax = 16 << 20

// Record is a record as an operator sees it.
type Record struct {
	Key         idempotency.Key // prints as a hash; its parts are what the table holds
	Status      int
	Fingerprint idempotency.Fingerprint
	Attempt     idempotency.AttemptID
	TraceID     string // empty where there was none
	CreatedAt   time.Time
	ExpiresAt   time.Time
	Expired     bool  // by the database's clock. The record counts all the same, until the reaper deletes it
	BodyBytes   int64 // of the body as it is stored: package encrypted adds some

	// Header holds the recorded headers, of Get alone. Nil with HeaderErr where they can't be read.
	Header    map[string][]string
	HeaderErr error
}

// Holder is a session that holds a key's lock: a running attempt, and for a moment also a retry that reads the record, a
// look for a lost COMMIT, or an operator's act.
type Holder struct {
	PID int

	// Of the session's transaction; zero and empty where the role may not see other sessions (pg_monitor).
	Since       time.Time     // when it began
	Age         time.Duration // by the database's clock
	State       string        // as in pg_stat_activity: active, idle in transaction, ...
	WaitEvent   string        // what the session waits for, as type and name, empty where it waits for nothing
	Application string        // application_name
	Client      string        // the address it came from; empty for a Unix socket
}

// State is what the database tells of a key now.
type State struct {
	Record *Record // nil: none was committed
	Holder *Holder // nil: nobody holds the key
	Now    time.Time
}

// recordColumns are what scanRecord reads.
const recordColumns = "scope, key, status, fingerprint_version, fingerprint, attempt_id, octet_length(body)::bigint, trace_id, created_at, expires_at, expires_at < statement_timestamp()"

// scanRecord reads recordColumns, and more behind them.
func scanRecord(row pgx.Row, more ...any) (Record, error) {
	var r Record
	var sum []byte
	var traceID *string
	err := row.Scan(append([]any{
		&r.Key.Scope, &r.Key.Value, &r.Status, &r.Fingerprint.Version, &sum, (*[16]byte)(&r.Attempt), &r.BodyBytes, &traceID,
		&r.CreatedAt, &r.ExpiresAt, &r.Expired,
	}, more...)...)
	copy(r.Fingerprint.Sum[:], sum)
	if traceID != nil {
		r.TraceID = *traceID
	}
	r.CreatedAt, r.ExpiresAt = r.CreatedAt.UTC(), r.ExpiresAt.UTC()
	return r, err
}

// Get returns what the database tells of a key: its record without the body, and who holds it. [ErrNotFound] where there
// is neither: no attempt has committed, and when the lock was looked at none ran. A key that can't be one is [ErrInvalid].
func (o *Operator) Get(ctx context.Context, key idempotency.Key) (State, error) {
	var state State
	if err := validKey(key); err != nil {
		return state, fmt.Errorf("get: %w", err)
	}
	err := o.read(ctx, func(ctx context.Context, tx pgx.Tx) (err error) {
		state, err = o.state(ctx, tx, key)
		return err
	})
	if err == nil && state.Record == nil && state.Holder == nil {
		err = ErrNotFound
	}
	if err != nil {
		return state, fmt.Errorf("get: %w", err)
	}
	return state, nil
}

// state looks at the lock first and at the record then, in a statement of its own: an attempt that commits in between is
// seen twice and never not at all.
func (o *Operator) state(ctx context.Context, tx pgx.Tx, key idempotency.Key) (state State, err error) {
	if state.Holder, err = o.holder(ctx, tx, key); err != nil {
		return state, err
	}
	var header []byte
	record, err := scanRecord(tx.QueryRow(ctx, "SELECT "+recordColumns+", headers FROM "+o.keys+" WHERE scope = $1 AND key = $2", key.Scope, key.Value), &header)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
	case err != nil:
		return state, err
	default:
		record.Header, record.HeaderErr = postgres.DecodeHeaders(header)
		state.Record = &record
	}
	return state, tx.QueryRow(ctx, "SELECT statement_timestamp()").Scan(&state.Now)
}

// holderColumns are what scanHolder reads, from pg_locks AS l LEFT JOIN pg_stat_activity AS a.
const holderColumns = `l.pid, a.xact_start, COALESCE(extract(epoch FROM clock_timestamp() - a.xact_start), 0)::float8, COALESCE(a.state, ''),
	COALESCE(a.wait_event_type || ' ' || a.wait_event, ''), COALESCE(a.application_name, ''), COALESCE(host(a.client_addr), '')`

func scanHolder(row pgx.Row, more ...any) (Holder, error) {
	var h Holder
	var since *time.Time
	var ageS float64
	err := row.Scan(append([]any{&h.PID, &since, &ageS, &h.State, &h.WaitEvent, &h.Application, &h.Client}, more...)...)
	if since != nil {
		h.Since = since.UTC()
	}
	h.Age = time.Duration(max(ageS, 0) * float64(time.Second)).Round(time.Millisecond)
	return h, err
}

// holder returns who holds the key's lock, nil where nobody does.
func (o *Operator) holder(ctx context.Context, tx pgx.Tx, key idempotency.Key) (*Holder, error) {
	number := uint64(key.LockNumber(o.table))
	holder, err := scanHolder(tx.QueryRow(ctx, "SELECT "+holderColumns+`
		FROM pg_locks AS l LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
		WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
		  AND l.classid::bigint = $1::bigint AND l.objid::bigint = $2::bigint
		  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
		LIMIT 1`, int64(number>>32), int64(number&0xffffffff)))
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, nil
	}
	return &holder, err
}

// Body returns the recorded body of a key, as it is stored: bytes of whatever encoding the answer had, and ciphertext where the
// service encrypts. It may hold what an operator need not see, so it is never returned unasked. [ErrNotFound] where there
// is no record, [ErrTooLarge] where it is over [BodyBytesMax].
func (o *Operator) Body(ctx context.Context, key idempotency.Key) ([]byte, error) {
	if err := validKey(key); err != nil {
		return nil, fmt.Errorf("body: %w", err)
	}
	var body []byte
	var bytes int64
	err := o.read(ctx, func(ctx context.Context, tx pgx.Tx) error {
		return tx.QueryRow(ctx, "SELECT octet_length(body)::bigint, CASE WHEN octet_length(body) <= $3::bigint THEN body END FROM "+o.keys+" WHERE scope = $1 AND key = $2",
			key.Scope, key.Value, int64(BodyBytesMax)).Scan(&bytes, &body)
	})
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		err = ErrNotFound
	case err == nil && bytes > BodyBytesMax:
		err = fmt.Errorf("%w: it has %d bytes, over the limit of %d", ErrTooLarge, bytes, int64(BodyBytesMax))
	}
	if err != nil {
		return nil, fmt.Errorf("body: %w", err)
	}
	return body, nil
}

func validKey(key idempotency.Key) error {
	if err := key.Validate(); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return nil
}

// ParseAttemptID reads an attempt's id as it is printed, with or without hyphens. The error wraps [ErrInvalid].
func ParseAttemptID(text string) (id idempotency.AttemptID, err error) {
	decoded, err := hex.DecodeString(strings.ReplaceAll(text, "-", ""))
	if err != nil || len(decoded) != len(id) {
		return id, fmt.Errorf("%w: an attempt id is a UUID", ErrInvalid)
	}
	return idempotency.AttemptID(decoded), nil
}
