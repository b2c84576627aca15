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

// BodyBytesMax is the maximum size of a body that [Operator.Body] returns.
const BodyBytesMax = 16 << 20

// Record is a record as an operator sees it.
type Record struct {
	Key         idempotency.Key // prints as a hash; its fields are the table's columns
	Status      int             // 0 if the request is open
	Fingerprint idempotency.Fingerprint
	Attempt     idempotency.AttemptID
	TraceID     string // empty if there was none
	CreatedAt   time.Time
	ExpiresAt   time.Time
	Expired     bool  // by the database's clock. An expired record counts until the reaper deletes it
	BodyBytes   int64 // of the stored body: package encrypted adds some bytes

	// Header holds the recorded headers; only Get sets it. If they can't be read, Header is nil and
	// HeaderErr is set.
	Header    map[string][]string
	HeaderErr error
}

// Open reports whether this is the row of an open request, which has no answer yet: see
// [Operator.GetOpen].
func (r *Record) Open() bool { return r.Status == 0 }

// Holder is a session that holds a key's lock: a running attempt; or, for a moment, a retry that
// reads the record, the look-up of a lost COMMIT, or an operator's act.
type Holder struct {
	PID int

	// Of the session's transaction; zero and empty if the role is not allowed to see other sessions
	// (pg_monitor).
	Since time.Time     // its begin
	Age   time.Duration // by the database's clock
	State string        // as in pg_stat_activity: active, idle in transaction, ...
	// WaitEvent is the event that the session waits for, as type and name; empty if it waits for
	// none.
	WaitEvent   string
	Application string // application_name
	Client      string // the client's address; empty for a Unix socket
}

// State is a key's present state in the database.
type State struct {
	Record *Record // nil: no record was committed
	Holder *Holder // nil: no session holds the key
	Now    time.Time
}

// recordColumns are the columns that scanRecord reads.
const recordColumns = "scope, key, status, fingerprint_version, fingerprint, attempt_id, octet_length(body)::bigint, trace_id, created_at, expires_at, expires_at < statement_timestamp()"

// scanRecord reads recordColumns, and the columns after them into more.
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

// Get returns the key's record without its body, and the session that holds the key. If there is
// neither, the error is [ErrNotFound]: no attempt has committed, and none was running when the lock
// was checked. An invalid key returns [ErrInvalid].
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

// state checks the lock first, and then reads the record in a statement of its own: an attempt that
// commits in between may be seen twice, but is never missed.
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

// holderColumns are the columns that scanHolder reads, from pg_locks AS l LEFT JOIN
// pg_stat_activity AS a.
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

// holder returns the session that holds the key's lock, or nil.
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

// Body returns the recorded body of a key as it is stored: in the answer's content encoding, and as
// ciphertext if the service encrypts. It may contain data that an operator need not see, so no
// other call returns it. The error is [ErrNotFound] if there is no record, and [ErrTooLarge] if the
// body is over [BodyBytesMax].
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

// ParseAttemptID parses an attempt's id as it is printed, with or without hyphens. The error wraps
// [ErrInvalid].
func ParseAttemptID(text string) (id idempotency.AttemptID, err error) {
	decoded, err := hex.DecodeString(strings.ReplaceAll(text, "-", ""))
	if err != nil || len(decoded) != len(id) {
		return id, fmt.Errorf("%w: an attempt id is a UUID", ErrInvalid)
	}
	return idempotency.AttemptID(decoded), nil
}
