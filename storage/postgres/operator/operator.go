package operator

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/storage/postgres"
)

// SchemaVersion is the lowest version of the schema that this whole package works with; package
// migrations provides it. Reading records works from postgres.SchemaVersion on.
const SchemaVersion = 3

// Names of the tables, in the store's schema.
const (
	AuditTableName  = "idempotency_audit"
	EventsTableName = "idempotency_events"
)

// Errors for callers to branch on. None contains a scope, a key or any part of a record. If
// row-level security applies to the role on a table, a call on that table fails with
// postgres.ErrRowSecurityActive, whatever the policies are: its answers could not be trusted.
var (
	// ErrNotFound: the key has no record.
	ErrNotFound = errors.New("key has no record")
	// ErrInProgress: an attempt, or a retry that reads the record, holds the key. Nothing was done.
	ErrInProgress = errors.New("key is in progress")
	// ErrChanged: the record is not of the attempt named in [Act.Attempt], the open request has
	// another epoch than [OpenAct.Epoch], or the message is not as in [MessageAct.Seen]. Nothing was
	// done.
	ErrChanged = errors.New("it has changed since you looked")
	// ErrInvalid: an argument is invalid. The text says why.
	ErrInvalid = errors.New("invalid")
	// ErrTooLarge: the body is over [BodyBytesMax].
	ErrTooLarge = errors.New("body is too large to show")
	// ErrUnknown: COMMIT was sent, and it is not known whether it happened. Look the key up.
	ErrUnknown = errors.New("outcome is unknown")
)

// Options tune an [Operator]. Nil and the zero value are the defaults.
type Options struct {
	// StatementTimeout is the maximum duration of one statement: after it the server cancels the
	// statement. Defaults to 5 seconds; at least 1 millisecond.
	StatementTimeout time.Duration

	// CallTimeout is the maximum duration of one call, including the wait for a connection. The
	// server ends a session that is idle in a call for the same time. [Operator.GC] and
	// [Operator.Doctor] have their own limits. Defaults to 10 seconds; at least StatementTimeout.
	CallTimeout time.Duration

	// RowsExaminedMax and ScanTimeMax bound the part of the table that one page of [Operator.List]
	// examines for its filter. The page stops at the first of the two, and returns its end. They
	// default to 100,000 rows and 500 milliseconds.
	RowsExaminedMax int
	ScanTimeMax     time.Duration
}

// Operator reads and changes the records of one schema. It is safe for concurrent use.
type Operator struct {
	store   *postgres.Store
	pool    *pgxpool.Pool // the store's
	options Options

	table              string // qualified, unquoted: a part of the lock number
	keys               string // sanitized, as are the next
	audit, events      string
	open, effects      string
	outbox, offsets    string
	parked             string
	versions           string
	statementTimeoutMS string
	callTimeoutMS      string
}

// New returns an operator on a store's pool and schema. The pool need not be set up by
// postgres.Configure: each transaction sends its own settings, so a pool that leads to PgBouncer
// works too. New sends nothing. It panics if the store is nil or an option is invalid.
func New(store *postgres.Store, opts *Options) *Operator {
	if store == nil {
		panic("idempotency/operator: New needs a store")
	}
	var o Options
	if opts != nil {
		o = *opts
	}
	o.StatementTimeout = cmp.Or(o.StatementTimeout, 5*time.Second)
	o.CallTimeout = cmp.Or(o.CallTimeout, 10*time.Second)
	o.ScanTimeMax = cmp.Or(o.ScanTimeMax, 500*time.Millisecond)
	o.RowsExaminedMax = cmp.Or(o.RowsExaminedMax, 100_000)
	if o.StatementTimeout < time.Millisecond || o.CallTimeout < o.StatementTimeout {
		panic(fmt.Sprintf("idempotency/operator: Options.StatementTimeout is %v and CallTimeout %v: they must be at least a millisecond, and the second no shorter", o.StatementTimeout, o.CallTimeout))
	}
	if o.ScanTimeMax < 0 || o.RowsExaminedMax < 0 {
		panic(fmt.Sprintf("idempotency/operator: Options.ScanTimeMax is %v and RowsExaminedMax %d: they must be positive", o.ScanTimeMax, o.RowsExaminedMax))
	}
	name := func(table string) string { return pgx.Identifier{store.Schema(), table}.Sanitize() }
	return &Operator{
		store: store, pool: store.Pool(), options: o,
		table: store.Schema() + "." + postgres.TableName,
		keys:  name(postgres.TableName), audit: name(AuditTableName), events: name(EventsTableName),
		open: name(postgres.OpenTableName), effects: name(postgres.EffectsTableName),
		outbox: name(postgres.OutboxTable), offsets: name(postgres.OffsetsTable), parked: name(postgres.ParkedTable),
		versions:           name("idempotency_migrations"),
		statementTimeoutMS: strconv.FormatInt(o.StatementTimeout.Milliseconds(), 10),
		callTimeoutMS:      strconv.FormatInt(o.CallTimeout.Milliseconds(), 10),
	}
}

// lockTimeoutMS is the maximum wait of an act for a locked row or table.
const lockTimeoutMS = "2000"

// in runs do in a transaction of its own, with the settings that bound it, and commits if do
// returns nil. The search_path is only pg_catalog; all other names are qualified. With row_security
// off, a statement fails if row-level security would hide rows from it: an operator never takes a
// hidden record for absent.
func (o *Operator) in(ctx context.Context, options pgx.TxOptions, do func(ctx context.Context, tx pgx.Tx) error) error {
	ctx, cancel := context.WithTimeout(ctx, o.options.CallTimeout)
	defer cancel()
	tx, err := o.pool.BeginTx(ctx, options)
	if err != nil {
		return o.remedy(sqlError(err))
	}
	defer func() { // no effect after a commit
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rollbackTimeout)
		defer cancel()
		_ = tx.Rollback(ctx)
	}()
	// The idle timeout too: a program that is stopped between two statements, for example at a
	// terminal, must not keep a key locked.
	if _, err := tx.Exec(ctx, `SELECT pg_catalog.set_config('statement_timeout', $1, true), pg_catalog.set_config('lock_timeout', $2, true),
		pg_catalog.set_config('idle_in_transaction_session_timeout', $3, true),
		pg_catalog.set_config('search_path', 'pg_catalog', true), pg_catalog.set_config('client_encoding', 'UTF8', true),
		pg_catalog.set_config('row_security', 'off', true)`,
		o.statementTimeoutMS, lockTimeoutMS, o.callTimeoutMS); err != nil {
		return sqlError(err)
	}
	if err := do(ctx, tx); err != nil {
		return o.remedy(sqlError(err))
	}
	err = tx.Commit(ctx)
	var pgErr *pgconn.PgError
	switch {
	case err == nil || options.AccessMode == pgx.ReadOnly:
		return sqlError(err)
	case errors.As(err, &pgErr) && pgErr.SeverityUnlocalized == "ERROR" && pgErr.Code[:2] != "08", errors.Is(err, pgx.ErrTxCommitRollback):
		return sqlError(err) // nothing was committed, for certain
	}
	return fmt.Errorf("%w: look the key up: %w", ErrUnknown, sqlError(err))
}

// Version returns the version of the schema, and whether a migration failed midway (dirty). The
// version is 0 if no migration has run yet.
func (o *Operator) Version(ctx context.Context) (version uint, dirty bool, err error) {
	err = o.read(ctx, func(ctx context.Context, tx pgx.Tx) error {
		var exists bool
		if err := tx.QueryRow(ctx, "SELECT to_regclass($1) IS NOT NULL", o.versions).Scan(&exists); err != nil || !exists {
			return err
		}
		err := tx.QueryRow(ctx, "SELECT version::bigint, dirty FROM "+o.versions).Scan(&version, &dirty)
		if errors.Is(err, pgx.ErrNoRows) {
			return nil
		}
		return err
	})
	if err != nil {
		return 0, false, fmt.Errorf("version: %w", err)
	}
	return version, dirty, nil
}

// rollbackTimeout bounds ROLLBACK; after it the connection is closed.
const rollbackTimeout = 2 * time.Second

// read runs do in a read-only transaction. Each of its statements has its own snapshot.
func (o *Operator) read(ctx context.Context, do func(ctx context.Context, tx pgx.Tx) error) error {
	return o.in(ctx, pgx.TxOptions{IsoLevel: pgx.ReadCommitted, AccessMode: pgx.ReadOnly}, do)
}

// remedy adds a remedy to an error.
func (o *Operator) remedy(err error) error {
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) {
		return err
	}
	if undefined(err) {
		return fmt.Errorf("%w: a table or column is missing in schema %s: run the migrations (idemctl migrate up), or name the schema that has the tables", err, o.store.Schema())
	}
	switch pgErr.Code {
	case "42501":
		if pgErr.Routine == "check_enable_rls" { // see in
			return fmt.Errorf("%w on a table of schema %s: ALTER TABLE ... DISABLE ROW LEVEL SECURITY, or ALTER ROLE ... BYPASSRLS for this role; the doctor names both: %w",
				postgres.ErrRowSecurityActive, o.store.Schema(), err)
		}
		return fmt.Errorf("%w: the role lacks a right on the tables of schema %s: package operator lists those it needs", err, o.store.Schema())
	case "28P01", "28000":
		return fmt.Errorf("%w: the server refuses this role or its password: see the database's address", err)
	case "3D000":
		return fmt.Errorf("%w: the server has no such database: see the database's address", err)
	case "53300":
		return fmt.Errorf("%w: the server has no connection left: try again, or raise max_connections", err)
	case "57014":
		return fmt.Errorf("%w: the statement took longer than %v", err, o.options.StatementTimeout)
	case "55P03":
		return fmt.Errorf("%w: somebody holds the row or the table: try again", err)
	case "25006", "0A000": // a write; BEGIN READ WRITE
		return fmt.Errorf("%w: the server is a standby: connect to the primary", err)
	}
	return err
}

// stateError prints only a database error's SQLSTATE: the server's message may quote a key.
type stateError struct{ err *pgconn.PgError }

func (e *stateError) Error() string {
	text := "SQLSTATE " + e.err.Code
	if e.err.ConstraintName != "" {
		text += " on constraint " + e.err.ConstraintName
	}
	return text
}

func (e *stateError) Unwrap() error { return e.err }

// sqlError makes err safe to log: it prints only the SQLSTATE of a database error, and leaves
// others unchanged.
func sqlError(err error) error {
	var shown *stateError
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && !errors.As(err, &shown) {
		return &stateError{pgErr}
	}
	return err
}
