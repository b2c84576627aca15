package pgintent

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/textproto"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
)

// PendingMax is the maximum number of intents that one call of [Store.Pending] returns.
const PendingMax = 1000

// DB is the part of a *pgxpool.Pool or a *pgx.Conn that a store uses. It leads to the client's own
// database, never to that of the called server. A store on a *pgx.Conn is not safe for concurrent
// use.
type DB interface {
	Exec(ctx context.Context, sql string, arguments ...any) (pgconn.CommandTag, error)
	Query(ctx context.Context, sql string, arguments ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, arguments ...any) pgx.Row
}

// Options tune a [Store]. Nil and the zero value are the defaults. A negative number panics.
type Options struct {
	// Schema holds the table. Defaults to "public".
	Schema string

	// Owner separates the intents of clients that share the table. Clients that may resume each
	// other's intents have the same owner: they call the same servers with the same rights.
	// Defaults to "".
	Owner string

	// PendingAfter is the time for which another store's intent is left to it. It should be longer
	// than client.Options.TotalMax, or intents under way elsewhere are sent twice, which is safe
	// but useless. A store's own intents are pending at once. Defaults to 5 minutes.
	PendingAfter time.Duration
}

func (o *Options) full() Options {
	var full Options
	if o != nil {
		full = *o
	}
	full.Schema = cmp.Or(full.Schema, "public")
	full.PendingAfter = cmp.Or(full.PendingAfter, 5*time.Minute)
	if full.PendingAfter < 0 {
		panic("idempotency/pgintent: Options.PendingAfter must not be negative")
	}
	if strings.ContainsRune(full.Schema, 0) || strings.ContainsRune(full.Owner, 0) {
		panic("idempotency/pgintent: Options.Schema and Owner must not contain a NUL")
	}
	return full
}

func (o *Options) table() string { return pgx.Identifier{o.Schema, "idempotency_intents"}.Sanitize() }

// ErrRowSecurityActive is returned if row-level security applies to the table of intents: an intent
// may be hidden, and would never be resumed. The text names the remedy.
var ErrRowSecurityActive = errors.New("row-level security may hide intents")

func (s *Store) rowSecurity() error {
	return fmt.Errorf("%w: ALTER TABLE %s DISABLE ROW LEVEL SECURITY, or ALTER ROLE ... BYPASSRLS for the service's role", ErrRowSecurityActive, s.options.table())
}

// anew makes PostgreSQL plan a statement each time: a plan that was made with policies keeps them
// after ALTER ROLE ... BYPASSRLS, while row_security_active reports that none applies. It works
// behind a pooler too.
const anew = pgx.QueryExecModeExec

// createLock is held while the table is made: concurrent CREATE IF NOT EXISTS can fail.
const createLock = 0x696e74656e74 // "intent"

// Create makes the table if it is missing. The schema must exist. Several processes may call Create
// at once. Nothing in this package calls it.
func Create(ctx context.Context, db DB, options *Options) error {
	o := options.full()
	// Several statements without arguments are one transaction.
	_, err := db.Exec(ctx, fmt.Sprintf(`
SELECT pg_advisory_xact_lock(%d);
CREATE TABLE IF NOT EXISTS %s (
	owner      text COLLATE "C" NOT NULL,
	key        text COLLATE "C" NOT NULL,
	-- The store that may say that the request was not executed: it saved the intent, or took it last.
	holder     uuid NOT NULL,
	saved_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
	touched_at timestamptz NOT NULL DEFAULT clock_timestamp(),
	method     text NOT NULL,
	url        text NOT NULL,
	host       text NOT NULL,
	header     bytea NOT NULL, -- as on the wire
	body       bytea NOT NULL,

	CONSTRAINT idempotency_intents_pkey PRIMARY KEY (owner, key)
);`, createLock, o.table()))
	if err != nil {
		return fmt.Errorf("create the table of intents: %w", err)
	}
	return nil
}

// Store keeps intents in a table. Make it with [New]. It is safe for concurrent use.
type Store struct {
	db      DB
	options Options
	holder  uuid.UUID

	save, takeOver, done, abandon, pending, take, isKept, isPending string
}

var _ client.IntentStore = (*Store)(nil)

// New returns a store. It sends nothing: the table must be there by its first use, see [Create]. It
// panics on a transaction: an intent must be committed before its request is sent.
func New(db DB, options *Options) *Store {
	if db == nil {
		panic("idempotency/pgintent: New needs a DB")
	}
	if _, inside := db.(pgx.Tx); inside {
		panic("idempotency/pgintent: New needs a pool, not a transaction: an intent must be committed before its request is sent")
	}
	s := &Store{db: db, options: options.full(), holder: uuid.New()}
	table := s.options.table()
	// A commit that a crash undoes would be worse than none. If the session's synchronous_commit is
	// less than "on", the statement sets it for its transaction; OFFSET keeps the planner from
	// removing that. It also sets client_min_messages if the session would suppress the warning
	// that Configure looks for.
	const durable = `(SELECT set_config('synchronous_commit', CASE WHEN current_setting('synchronous_commit') IN ('off', 'local')
		THEN 'on' ELSE current_setting('synchronous_commit') END, true) || set_config('client_min_messages',
		CASE current_setting('client_min_messages') WHEN 'error' THEN 'warning' ELSE current_setting('client_min_messages') END, true)
		AS setting OFFSET 0) AS durable`
	hidden := `row_security_active('` + strings.ReplaceAll(table, "'", "''") + `'::regclass)`
	// RETURNING counts the written rows and shows a trigger's changes. With a rule that diverts the
	// statement it fails.
	const same = `method = $4 AND url = $5 AND host = $6 AND header = $7 AND body = $8`
	s.save = `INSERT INTO ` + table + ` AS kept (owner, key, holder, method, url, host, header, body)
		SELECT $1, $2, $3::uuid, $4, $5, $6, $7::bytea, $8::bytea FROM ` + durable + ` WHERE durable.setting <> '' ON CONFLICT DO NOTHING
		RETURNING owner = $1 AND key = $2 AND holder = $3::uuid AND ` + same
	// The former holder must no longer report not-executed: this store sends the request too.
	s.takeOver = `UPDATE ` + table + ` SET holder = CASE WHEN ` + same + ` THEN $3::uuid ELSE holder END,
		touched_at = CASE WHEN ` + same + ` THEN clock_timestamp() ELSE touched_at END
		FROM ` + durable + ` WHERE owner = $1 AND key = $2 AND durable.setting <> '' RETURNING ` + same + `, holder = $3::uuid`
	s.done = `DELETE FROM ` + table + ` WHERE owner = $1 AND key = $2`
	s.abandon = `DELETE FROM ` + table + ` USING ` + durable + ` WHERE owner = $1 AND key = $2 AND holder = $3::uuid AND durable.setting <> ''`
	const mayTake = `(holder = $2::uuid OR touched_at <= clock_timestamp() - $3 * interval '1 microsecond')`
	// The intents that were taken last come last. Otherwise a page of intents that can't be settled
	// would keep all others from being resumed.
	s.pending = `SELECT ` + hidden + `, found.key FROM (SELECT) AS one
		LEFT JOIN (SELECT * FROM ` + table + ` WHERE owner = $1 AND ` + mayTake + ` ORDER BY touched_at, saved_at, key LIMIT $4) AS found ON true
		ORDER BY found.touched_at, found.saved_at, found.key`
	// If two stores take at once, the second waits for the row, and sees that it was touched.
	s.take = `UPDATE ` + table + ` SET holder = $2::uuid, touched_at = clock_timestamp() FROM ` + durable + `
		WHERE owner = $1 AND key = $4 AND ` + mayTake + ` AND durable.setting <> ''
		RETURNING method, url, host, header, body, (extract(epoch FROM clock_timestamp() - saved_at) * 1000000)::bigint`
	// After a statement that changed no row, these check that there is no such row: a trigger can
	// skip a row, and row-level security can hide it.
	s.isKept = `SELECT ` + hidden + `, EXISTS (SELECT FROM ` + table + ` WHERE owner = $1 AND key = $2)`
	s.isPending = `SELECT ` + hidden + `, EXISTS (SELECT FROM ` + table + ` WHERE owner = $1 AND key = $4 AND ` + mayTake + `)`
	return s
}

// Save keeps an intent. It returns when it is committed, durably whatever the session's
// synchronous_commit. An intent that another store holds becomes this store's, so that the other
// can no longer report not-executed.
func (s *Store) Save(ctx context.Context, intent *client.Intent) (before bool, err error) {
	var header bytes.Buffer
	if err := intent.Header.Write(&header); err != nil {
		return false, fmt.Errorf("%w: %w", client.ErrIntentRefused, err)
	}
	// A nil slice would be sent as NULL.
	head, body := append([]byte{}, header.Bytes()...), append([]byte{}, intent.Body...)
	arguments := []any{anew, s.options.Owner, intent.Key.Value, s.holder.String(), intent.Method, intent.URL, intent.Host, head, body}
	db, release, err := s.connection(ctx)
	if err != nil {
		return false, err
	}
	defer release()
	forgetWarning(db)
	if before, err = s.saveOn(ctx, db, arguments); err == nil {
		err = notReplicated(db)
	}
	return before, err
}

func (s *Store) saveOn(ctx context.Context, db DB, arguments []any) (before bool, err error) {
	for range 2 { // it may be forgotten between the two statements
		var same, held bool
		switch err := db.QueryRow(ctx, s.save, arguments...).Scan(&same); {
		case err == nil && !same:
			return false, fmt.Errorf("the database kept another intent: a trigger of table %s changes it; drop the trigger", s.options.table())
		case err == nil:
			return false, nil
		case !errors.Is(err, pgx.ErrNoRows):
			return false, s.refused(err)
		}
		switch err := db.QueryRow(ctx, s.takeOver, arguments...).Scan(&same, &held); {
		case errors.Is(err, pgx.ErrNoRows):
			continue
		case err != nil:
			return true, s.refused(err)
		case !same:
			return true, client.ErrIntentDifferent
		case !held:
			return true, fmt.Errorf("%w: a trigger of table %s undoes its holder; drop the trigger", client.ErrIntentRefused, s.options.table())
		}
		return true, nil
	}
	var hidden bool
	if err := db.QueryRow(ctx, s.isKept, arguments[:3]...).Scan(&hidden, &before); err != nil {
		return true, s.refused(err)
	}
	if hidden && !before {
		return true, fmt.Errorf("%w: %w", client.ErrIntentRefused, s.rowSecurity())
	}
	return before, fmt.Errorf("%w: the database took the statements and wrote no row: look for a trigger or row level security on table %s",
		client.ErrIntentRefused, s.options.table())
}

// Configure lets a [Store] notice a commit that did not wait for the synchronous standbys, because
// somebody canceled the wait: PostgreSQL only warns of it. Then Save, Take and Abandon fail,
// because a failover could undo their writes: an intent that was abandoned would come back, and be
// sent after its caller got not-executed. Call it on the config of a connection, or on the
// ConnConfig of a pool's config, before the connection or the pool is opened. If no standby is
// synchronous it changes nothing.
func Configure(config *pgx.ConnConfig) {
	inner := config.OnNotice
	config.OnNotice = func(conn *pgconn.PgConn, notice *pgconn.Notice) {
		if inner != nil {
			inner(conn, notice)
		}
		// Not every server names its routines. A trigger's own warning has another name.
		if notice.Code == "01000" && (notice.Routine == "SyncRepWaitForLSN" || notice.Routine == "") {
			conn.CustomData()[warningMark] = true
		}
	}
}

// warningMark is the key in a connection's custom data that marks such a warning.
const warningMark = "paidonce/pgintent/warned"

var errNotReplicated = errors.New("the commit did not wait for the standbys: pg_stat_replication shows which are away")

func forgetWarning(db DB) {
	if conn := pgConnOf(db); conn != nil {
		delete(conn.CustomData(), warningMark)
	}
}

func notReplicated(db DB) error {
	if conn := pgConnOf(db); conn != nil && conn.CustomData()[warningMark] != nil {
		return errNotReplicated
	}
	return nil
}

func pgConnOf(db DB) *pgconn.PgConn {
	switch db := db.(type) {
	case *pgxpool.Conn:
		return db.Conn().PgConn()
	case *pgx.Conn:
		return db.PgConn()
	}
	return nil
}

// connection returns a connection to write on. If there is none the error says that nothing was
// changed.
func (s *Store) connection(ctx context.Context) (db DB, release func(), err error) {
	if pool, ok := s.db.(*pgxpool.Pool); ok {
		conn, err := pool.Acquire(ctx)
		if err != nil {
			if _, inside := idempotency.AttemptIDFrom(ctx); inside {
				err = fmt.Errorf("%w (inside an idempotent handler a pgintent.Store needs a pool of its own, which is not the pool of the handler's store)", err)
			}
			return nil, nil, fmt.Errorf("%w: take a connection: %w", client.ErrIntentRefused, err)
		}
		return conn, conn.Release, nil
	}
	if conn := pgConnOf(s.db); conn != nil && conn.TxStatus() != 'I' {
		return nil, nil, fmt.Errorf("%w: its connection is in a transaction, and an intent must be committed before its request is sent: give pgintent.New a pool",
			client.ErrIntentRefused)
	}
	return s.db, func() {}, nil
}

// refused reports whether an error proves that nothing was changed: the server refused the
// statement, or no connection was made.
func (s *Store) refused(err error) error {
	var answer *pgconn.PgError
	var connecting *pgconn.ConnectError
	// A policy of row-level security refused the row.
	if errors.As(err, &answer) && answer.Code == "42501" && answer.Routine == "ExecWithCheckOptions" {
		err = fmt.Errorf("%w: %w", s.rowSecurity(), err)
	}
	if errors.As(err, &connecting) ||
		errors.As(err, &answer) && answer.SeverityUnlocalized == "ERROR" && !strings.HasPrefix(answer.Code, "08") {
		return fmt.Errorf("%w: %w", client.ErrIntentRefused, err)
	}
	return err
}

// Done forgets an intent, whoever holds it.
func (s *Store) Done(ctx context.Context, key string) error {
	tag, err := s.db.Exec(ctx, s.done, anew, s.options.Owner, key)
	if err != nil || tag.RowsAffected() > 0 {
		return err
	}
	return s.expectNone(ctx, s.db, s.isKept, key)
}

// expectNone returns nil if a query finds no row of a key, after a statement that changed none.
func (s *Store) expectNone(ctx context.Context, db DB, query string, arguments ...any) error {
	var hidden, found bool
	if err := db.QueryRow(ctx, query, append([]any{anew, s.options.Owner}, arguments...)...).Scan(&hidden, &found); err != nil {
		return err
	}
	if hidden && !found {
		return s.rowSecurity()
	}
	if found {
		return fmt.Errorf("a statement changed no row, and there is one: look for a trigger or row level security on table %s", s.options.table())
	}
	return nil
}

// Abandon forgets an intent that this store holds.
func (s *Store) Abandon(ctx context.Context, key string) error {
	db, release, err := s.connection(ctx)
	if err != nil {
		return err
	}
	defer release()
	forgetWarning(db)
	tag, err := db.Exec(ctx, s.abandon, anew, s.options.Owner, key, s.holder.String())
	switch {
	case err != nil:
		return err
	case tag.RowsAffected() > 0:
		return notReplicated(db)
	}
	if err := s.expectNone(ctx, db, s.isKept, key); errors.Is(err, ErrRowSecurityActive) {
		return err
	}
	return client.ErrIntentTaken
}

// Pending returns the keys of the intents that this store holds, and of those that others have held
// for too long: the oldest [PendingMax], by the time of their last Save or Take. It fails with
// [ErrRowSecurityActive] if any may be hidden.
func (s *Store) Pending(ctx context.Context) ([]string, error) {
	rows, err := s.db.Query(ctx, s.pending, anew, s.options.Owner, s.holder.String(), s.options.PendingAfter.Microseconds(), PendingMax)
	if err != nil {
		return nil, err
	}
	var keys []string
	var hidden bool
	var key *string
	_, err = pgx.ForEachRow(rows, []any{&hidden, &key}, func() error {
		if hidden {
			return s.rowSecurity()
		}
		if key != nil {
			keys = append(keys, *key)
		}
		return nil
	})
	return keys, err
}

// Take makes this store the holder of an intent, and returns the intent. It returns nil if the
// intent is not kept, or another store holds it.
func (s *Store) Take(ctx context.Context, key string) (*client.Intent, error) {
	intent := &client.Intent{Key: idempotency.Key{Value: key}}
	var header []byte
	var ageMicroseconds int64
	db, release, err := s.connection(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	forgetWarning(db)
	err = db.QueryRow(ctx, s.take, anew, s.options.Owner, s.holder.String(), s.options.PendingAfter.Microseconds(), key).
		Scan(&intent.Method, &intent.URL, &intent.Host, &header, &intent.Body, &ageMicroseconds)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return nil, s.expectNone(ctx, db, s.isPending, s.holder.String(), s.options.PendingAfter.Microseconds(), key)
	case err != nil:
		return nil, err
	}
	if err := notReplicated(db); err != nil {
		return nil, err
	}
	// By the database's clock: this process's clock may differ.
	intent.SavedAt = time.Now().Add(-time.Duration(ageMicroseconds) * time.Microsecond)
	lines, err := textproto.NewReader(bufio.NewReader(bytes.NewReader(append(header, "\r\n"...)))).ReadMIMEHeader()
	if err != nil {
		return nil, fmt.Errorf("read the headers of an intent: %w", err)
	}
	intent.Header = http.Header(lines)
	return intent, nil
}
