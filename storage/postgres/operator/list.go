package operator

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
)

// PageRowsMax is the maximum number of records on a page.
const PageRowsMax = 1000

const pageRows = 50 // the default

// Filter selects the records that match every field that is set. Scope, and KeyPrefix together with
// Scope, are looked up in the primary key. All other fields are compared record by record, so a
// page may end before it is full: see [List].
type Filter struct {
	Scope     string // exact
	KeyPrefix string

	StatusClass int // 2, 3, 4 or 5, for 2xx to 5xx; 0 for all
	Expiry      Expiry

	CreatedFrom time.Time // inclusive; zero: no bound
	CreatedTo   time.Time // exclusive

	TraceID string                // exact
	Attempt idempotency.AttemptID // exact
}

// Expiry selects records by whether they have expired, by the database's clock.
type Expiry string

// The choices of [Filter.Expiry].
const (
	ExpiryAny     Expiry = ""
	ExpiryLive    Expiry = "live"
	ExpiryExpired Expiry = "expired"
)

// Page selects a part of the list.
type Page struct {
	Rows       int    // the maximum, up to [PageRowsMax]. Defaults to 50
	After      Cursor // the previous page's List.Next; empty for the first page
	Descending bool   // from the last key to the first; must be the same for all pages of a walk
}

// Cursor is a place in the list. It is opaque and safe in a URL. It contains a scope and a key:
// people who may see the list may see it, but it must not be logged.
type Cursor string

// List is one page.
type List struct {
	Records []Record

	// Next is the start of the next page; empty if the list ends here. A page with few records or
	// none may still have a Next: then it examined its maximum number of rows, and more matches may
	// follow.
	Next Cursor

	RowsExamined int64 // by this page; show it to the user
	Now          time.Time
}

// List returns a page of the records in the order of scope and key, by bytes: within a scope,
// UUIDv7 keys are in the order of time. It reads the primary key from the end of the previous page
// on, so the last page costs as much as the first. It stops at [Options.RowsExaminedMax] rows or
// [Options.ScanTimeMax]. A record that is added or deleted meanwhile may or may not be returned; no
// record is returned twice. The error for an invalid filter or page wraps [ErrInvalid].
func (o *Operator) List(ctx context.Context, filter Filter, page Page) (List, error) {
	var list List
	q, err := o.listQuery(filter, page)
	if err != nil {
		return list, fmt.Errorf("list: %w", err)
	}
	err = o.read(ctx, func(ctx context.Context, tx pgx.Tx) error {
		list = List{}
		if _, err := tx.Exec(ctx, orderByKey); err != nil {
			return err
		}
		started := time.Now()
		for examined := o.examineFirst(q); ; examined = min(examined*4, examineRowsMax) {
			examined = min(examined, int64(o.options.RowsExaminedMax)-list.RowsExamined)
			end, err := q.step(ctx, tx, examined, &list)
			switch {
			case err != nil:
				return err
			case end:
				list.Next = ""
				return nil
			case len(list.Records) == q.rows, list.RowsExamined >= int64(o.options.RowsExaminedMax), time.Since(started) >= o.options.ScanTimeMax:
				list.Next = q.cursor()
				return nil
			}
		}
	})
	if err != nil {
		return List{}, fmt.Errorf("list: %w", err)
	}
	return list, nil
}

// orderByKey makes the planner use the primary key, even if statistics are missing or suggest
// another plan.
const orderByKey = `SELECT set_config('enable_seqscan', 'off', true), set_config('enable_bitmapscan', 'off', true), set_config('enable_sort', 'off', true),
	set_config('enable_incremental_sort', 'off', true), set_config('max_parallel_workers_per_gather', '0', true), set_config('jit', 'off', true)`

// The first statement examines examineRowsMin rows. Later ones examine more the longer none match.
// So the clock is checked in time even if each row comes from the disk.
const (
	examineRowsMin = 500
	examineRowsMax = 4000
)

func (o *Operator) examineFirst(q *listQuery) int64 { return max(examineRowsMin, int64(q.rows)+1) }

// listQuery is a walk along the primary key.
type listQuery struct {
	table      string
	rows       int
	bounds     []string // on the primary key
	matches    []string
	arguments  []any
	descending bool
	oneScope   bool
	scope, key string // the current place
	started    bool   // whether there is a current place
}

func (q *listQuery) add(to *[]string, condition string, argument any) {
	q.arguments = append(q.arguments, argument)
	*to = append(*to, fmt.Sprintf(condition, len(q.arguments)))
}

func (o *Operator) listQuery(filter Filter, page Page) (*listQuery, error) {
	q := &listQuery{table: o.keys, rows: page.Rows, descending: page.Descending, oneScope: filter.Scope != ""}
	q.rows = cmp.Or(q.rows, pageRows)
	if q.rows < 0 || q.rows > PageRowsMax {
		return nil, fmt.Errorf("%w: a page has 1 to %d rows", ErrInvalid, PageRowsMax)
	}
	if filter.Scope != "" {
		if err := idempotency.ValidateScope(filter.Scope); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
		}
		q.add(&q.bounds, "scope = $%d::text", filter.Scope)
	}
	if filter.KeyPrefix != "" {
		if err := idempotency.ValidateKeyValue(filter.KeyPrefix); err != nil {
			return nil, fmt.Errorf("%w: prefix: %w", ErrInvalid, err)
		}
		to := &q.matches
		if filter.Scope != "" {
			to = &q.bounds
		}
		q.add(to, "key >= $%d::text", filter.KeyPrefix)
		// Keys are visible ASCII: a byte above that range sorts after every key with the prefix.
		q.add(to, "key < $%d::text", filter.KeyPrefix+"\x7f")
	}
	switch {
	case filter.StatusClass >= 2 && filter.StatusClass <= 5:
		q.add(&q.matches, "status / 100 = $%d::int", filter.StatusClass)
	case filter.StatusClass != 0:
		return nil, fmt.Errorf("%w: the class of a status is 2 to 5", ErrInvalid)
	}
	switch filter.Expiry {
	case ExpiryAny:
	case ExpiryLive:
		q.matches = append(q.matches, "expires_at >= statement_timestamp()")
	case ExpiryExpired:
		q.matches = append(q.matches, "expires_at < statement_timestamp()")
	default:
		return nil, fmt.Errorf("%w: expiry is %q or %q", ErrInvalid, ExpiryLive, ExpiryExpired)
	}
	if !filter.CreatedFrom.IsZero() {
		q.add(&q.matches, "created_at >= $%d::timestamptz", filter.CreatedFrom)
	}
	if !filter.CreatedTo.IsZero() {
		q.add(&q.matches, "created_at < $%d::timestamptz", filter.CreatedTo)
	}
	if filter.TraceID != "" {
		if len(filter.TraceID) > idempotency.TraceIDBytesMax || strings.ContainsFunc(filter.TraceID, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
			return nil, fmt.Errorf("%w: a trace id is 1 to %d visible ASCII characters", ErrInvalid, idempotency.TraceIDBytesMax)
		}
		q.add(&q.matches, "trace_id = $%d::text", filter.TraceID)
	}
	if !filter.Attempt.IsZero() {
		q.add(&q.matches, "attempt_id = $%d::uuid", filter.Attempt.String())
	}
	if page.After != "" {
		at, err := page.After.place()
		if err != nil || filter.Scope != "" && at[0] != filter.Scope {
			return nil, fmt.Errorf("%w: the cursor is not one of this list", ErrInvalid)
		}
		q.started, q.scope, q.key = true, at[0], at[1]
	}
	return q, nil
}

// sql returns the statement that examines the next rows; its last argument is their maximum number.
// The statement returns the rows that match, the last row that it may examine, and the last row of
// the list, if it gets that far.
func (q *listQuery) sql(examine int64) (string, []any) {
	arguments := append([]any{}, q.arguments...)
	place := func(value any, kind string) string {
		arguments = append(arguments, value)
		return fmt.Sprintf("$%d::%s", len(arguments), kind)
	}
	bounds := append([]string{}, q.bounds...)
	direction, beyond := "", ">"
	if q.descending {
		direction, beyond = " DESC", "<"
	}
	order := "key" + direction // all that the planner counts as sorted beside scope = a
	if !q.oneScope {
		order = "scope" + direction + ", " + order
	}
	switch {
	case !q.started:
	case q.oneScope:
		// Beside scope = a, a comparison of rows would not seek, but filter every entry before the
		// place.
		bounds = append(bounds, fmt.Sprintf("key %s %s", beyond, place(q.key, "text")))
	default:
		bounds = append(bounds, fmt.Sprintf("(scope, key) %s (%s, %s)", beyond, place(q.scope, "text"), place(q.key, "text")))
	}
	if len(bounds) == 0 {
		bounds = []string{"true"}
	}
	matches := q.matches
	if len(matches) == 0 {
		matches = []string{"true"}
	}
	limit := place(examine, "bigint")
	return fmt.Sprintf(`
		SELECT scope, key, status, fingerprint_version, fingerprint, attempt_id, body_bytes, trace_id, created_at, expires_at, expires_at < statement_timestamp(),
		       number, matches, last, statement_timestamp()
		FROM (
			SELECT scope, key, status, fingerprint_version, fingerprint, attempt_id, octet_length(body)::bigint AS body_bytes, trace_id, created_at, expires_at,
			       (%[1]s) IS TRUE AS matches, row_number() OVER w AS number, lead(true) OVER w IS NULL AS last
			FROM %[2]s WHERE %[3]s
			WINDOW w AS (ORDER BY %[4]s)
			ORDER BY %[4]s LIMIT %[5]s
		) AS examined
		WHERE matches OR last OR number = %[5]s
		ORDER BY %[4]s LIMIT %[6]s`,
		strings.Join(matches, " AND "), q.table, strings.Join(bounds, " AND "), order, limit, place(q.rows, "int")), arguments
}

// step examines the next rows, adds those that match to the list, and reports whether the list
// ended.
func (q *listQuery) step(ctx context.Context, tx pgx.Tx, examine int64, list *List) (end bool, err error) {
	sql, arguments := q.sql(examine)
	rows, err := tx.Query(ctx, sql, arguments...)
	if err != nil {
		return false, err
	}
	defer rows.Close()
	var number int64
	end = true // unless a row shows otherwise
	for rows.Next() {
		var matches bool
		record, err := scanRecord(rows, &number, &matches, &end, &list.Now)
		if err != nil {
			return false, err
		}
		q.started, q.scope, q.key = true, record.Key.Scope, record.Key.Value
		if matches {
			list.Records = append(list.Records, record)
		}
		if len(list.Records) == q.rows {
			break
		}
	}
	rows.Close()
	list.RowsExamined += number
	return end, rows.Err()
}

// cursor returns the current place of the walk.
func (q *listQuery) cursor() Cursor {
	text, _ := json.Marshal([2]string{q.scope, q.key}) // two strings: this never fails
	return Cursor(base64.RawURLEncoding.EncodeToString(text))
}

func (c Cursor) place() (at [2]string, err error) {
	text, err := base64.RawURLEncoding.DecodeString(string(c))
	if err != nil {
		return at, err
	}
	if err := json.Unmarshal(text, &at); err != nil {
		return at, err
	}
	return at, idempotency.Key{Scope: at[0], Value: at[1]}.Validate()
}

// RecentPages is the number of pages, usually of 8 kB, that [Operator.Recent] reads from the
// table's end.
const RecentPages = 256

// Recent returns approximately the newest records of all scopes, newest first, and at most rows of
// them; 0 means 50. It reads only the last [RecentPages] pages of the table. So it misses new
// records in space that the reaper freed nearer to the table's beginning.
func (o *Operator) Recent(ctx context.Context, rows int) (List, error) {
	var list List
	rows = cmp.Or(rows, pageRows)
	if rows < 0 || rows > PageRowsMax {
		return list, fmt.Errorf("recent: %w: a page has 1 to %d rows", ErrInvalid, PageRowsMax)
	}
	err := o.read(ctx, func(ctx context.Context, tx pgx.Tx) error {
		pages, err := o.pages(ctx, tx)
		if err != nil {
			return err
		}
		first := max(0, pages-RecentPages)
		found, err := tx.Query(ctx, "SELECT "+recordColumns+", count(*) OVER (), statement_timestamp() FROM ONLY "+o.keys+
			" WHERE ctid >= $1::tid ORDER BY created_at DESC, scope, key LIMIT $2::int", fmt.Sprintf("(%d,0)", first), rows)
		if err != nil {
			return err
		}
		list.Records, err = pgx.CollectRows(found, func(row pgx.CollectableRow) (Record, error) {
			return scanRecord(row, &list.RowsExamined, &list.Now)
		})
		return err
	})
	if err != nil {
		return List{}, fmt.Errorf("recent: %w", err)
	}
	return list, nil
}

// pages returns the table's number of pages.
func (o *Operator) pages(ctx context.Context, tx pgx.Tx) (pages int64, err error) {
	err = tx.QueryRow(ctx, "SELECT pg_relation_size($1::text::regclass) / current_setting('block_size')::bigint", o.keys).Scan(&pages)
	return pages, err
}
