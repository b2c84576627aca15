package postgres

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/storage/postgres/internal/sealed"
	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

// The faults that [Store.Check] finds. Each error's text names the remedy.
var (
	ErrServerOutdated   = errors.New("the server is older than PostgreSQL 14")
	ErrNotPrimary       = errors.New("the server is a standby")
	ErrSchemaOutdated   = errors.New("the schema is not what this version needs")
	ErrTableUnlogged    = errors.New("the table is unlogged")
	ErrTableUnsafe      = errors.New("the table does not keep each record as it is written")
	ErrCommitNotDurable = errors.New("COMMIT does not wait for the disk")
	ErrSessionUnbounded = errors.New("nothing ends a session that stopped")
	ErrRightMissing     = errors.New("the role lacks a right")
	ErrNotConfigured    = errors.New("the pool is not configured for this store")
)

// SchemaVersion is the lowest version of the schema that this package works with; package
// migrations provides it. Later ones may add tables for others, such as the operator's in version
// 3.
const SchemaVersion = 2

const serverVersionMin = 14

const versionTable = "idempotency_migrations"

// Check returns an error if the database or the pool can't keep the store's promises. It requires:
//
//   - the server: PostgreSQL 14 or later, a primary, and no logical replica of one; COMMIT waits
//     for the disk, and a session that is idle in a transaction is ended within a minute
//   - the schema: the version of this package or a later one
//   - the table: a plain logged one with its primary key and all of its columns, and none of these:
//     another NOT NULL column without a default, a rule, an enabled BEFORE ROW trigger, a child
//     table
//   - no row-level security that hides the table's rows from the pool's role
//   - the database's encoding: UTF8 or SQL_ASCII
//   - the pool: a connection has the settings of the store's options, and an Acquire with a running
//     handler's context is refused
//
// The error joins all faults that Check finds. A service calls it when it starts and from its
// readiness probe.
func (s *Store) Check(ctx context.Context) error { return errors.Join(s.check(ctx)...) }

func (s *Store) check(ctx context.Context) (wrong []error) {
	ctx, cancel := context.WithTimeout(ctx, s.options.AcquireTimeout+s.options.StatementTimeout)
	defer cancel()
	add := func(sentinel error, remedy string, args ...any) {
		wrong = append(wrong, fmt.Errorf("check: %w: %s", sentinel, fmt.Sprintf(remedy, args...)))
	}
	var (
		standby           bool
		session           []string // the values of its settings, in the order of Options.settings
		encoding          string
		version           string // "15.14 (Debian 15.14-1)"
		othersPrepared    bool
		kind, persistence *string
		keyName, keyOf    *string
		altered           alterations
		versions          *string
		subscriptions     []string
		missing, demanded []string // missing: a record needs them; demanded: no record fills them
	)
	var names []string
	for _, setting := range s.options.settings() {
		names = append(names, setting.name)
	}
	const sql = `
		SELECT pg_is_in_recovery(),
		       ARRAY(SELECT COALESCE(s.setting, '') FROM unnest($4::text[]) WITH ORDINALITY AS n(name, at) LEFT JOIN pg_settings AS s ON s.name = n.name ORDER BY n.at),
		       current_setting('client_encoding'),
		       c.relkind::text, c.relpersistence::text,
		       p.name, p.columns,
		       ARRAY(SELECT quote_ident(rulename) FROM pg_rewrite WHERE ev_class = c.oid AND ev_enabled <> 'D' AND rulename <> '_RETURN' ORDER BY 1),
		       ARRAY(SELECT quote_ident(tgname) FROM pg_trigger
		             WHERE tgrelid = c.oid AND NOT tgisinternal AND tgenabled <> 'D' AND tgtype & 3 = 3 ORDER BY 1), -- BEFORE, ROW
		       ARRAY(SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = c.oid AND c.relkind = 'r' ORDER BY 1),
		       to_regclass($2)::text,
		       ARRAY(SELECT quote_ident(s.subname) FROM pg_subscription_rel AS r JOIN pg_subscription AS s ON s.oid = r.srsubid
		             WHERE r.srrelid = c.oid AND s.subenabled ORDER BY 1),
		       ARRAY(SELECT n.name FROM unnest($3::text[]) WITH ORDINALITY AS n(name, at) WHERE NOT EXISTS (
		             SELECT FROM pg_attribute AS a WHERE a.attrelid = c.oid AND a.attname = n.name AND a.attnum > 0 AND NOT a.attisdropped) ORDER BY n.at),
		       ARRAY(SELECT quote_ident(a.attname) FROM pg_attribute AS a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
		             AND a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' AND a.attname <> ALL ($3)
		             AND (SELECT typdefault FROM pg_type WHERE oid = a.atttypid) IS NULL ORDER BY a.attnum)
		FROM (SELECT to_regclass($1) AS oid) AS named
		LEFT JOIN pg_class AS c ON c.oid = named.oid
		LEFT JOIN LATERAL (
			SELECT quote_ident(k.conname) AS name,
			       CASE WHEN k.condeferrable THEN 'deferrable' ELSE string_agg(a.attname, ', ' ORDER BY array_position(k.conkey, a.attnum)) END AS columns
			FROM pg_constraint AS k JOIN pg_attribute AS a ON a.attrelid = k.conrelid AND a.attnum = ANY (k.conkey)
			WHERE k.conrelid = c.oid AND k.contype = 'p'
			GROUP BY k.conname, k.condeferrable
		) AS p ON true`
	err := s.pool.AcquireFunc(ctx, func(conn *pgxpool.Conn) error {
		version = conn.Conn().PgConn().ParameterStatus("server_version")
		othersPrepared = s.statements.OthersOn(conn.Conn().PgConn())
		return conn.QueryRow(ctx, sql,
			pgx.Identifier{s.options.Schema, TableName}.Sanitize(),
			pgx.Identifier{s.options.Schema, versionTable}.Sanitize(),
			strings.Split("scope, key, "+recordColumns, ", "),
			names,
		).Scan(&standby, &session, &encoding, &kind, &persistence, &keyName, &keyOf, &altered.rules, &altered.triggers, &altered.children, &versions, &subscriptions, &missing, &demanded)
	})
	if err != nil {
		return []error{fmt.Errorf("check: %w", reachError(err))}
	}
	if !s.refusesEscapes(ctx) {
		add(ErrNotConfigured, "a handler that uses the pool with its own context would write around its transaction, and nothing would stop it: call postgres.Configure before pgxpool.NewWithConfig")
	}
	if encoding != "UTF8" && encoding != "SQL_ASCII" {
		add(ErrNotConfigured, "client_encoding is %s, in which two keys may be one: put the pool's config through Configure", encoding)
	}
	if othersPrepared {
		add(ErrNotConfigured, "its connections have the statements of other options prepared, of another schema or isolation level, so that PostgreSQL parses this store's each time: put the pool's config through Configure with this store's options too")
	}
	if major := 0; version != "" {
		if _, err := fmt.Sscan(version, &major); err == nil && major < serverVersionMin {
			add(ErrServerOutdated, "it is version %d: upgrade it", major)
		}
	}
	if standby {
		add(ErrNotPrimary, "connect to the primary (target_session_attrs=read-write)")
	}
	for _, name := range subscriptions {
		add(ErrNotPrimary, "subscription %[1]s writes to the table, so that another server is the primary: connect to that one, or stop it for good and ALTER SUBSCRIPTION %[1]s DISABLE", name)
	}
	switch {
	case kind == nil:
		add(ErrSchemaOutdated, "table %s is missing: run the migrations", s.table)
	case *kind != "r":
		add(ErrSchemaOutdated, "%s is not a plain table, so nothing keeps its keys unique: while no service runs, put a plain one in its place, as docs/operations.md says", s.table)
	case *persistence != "p":
		add(ErrTableUnlogged, "a crash empties it: ALTER TABLE %s SET LOGGED", s.table)
	default:
		if remedy := s.keyRemedy(keyName, keyOf); remedy != "" {
			add(ErrSchemaOutdated, "table %s has no primary key %s on (scope, key), so a key may be recorded twice: %s", s.table, primaryKey, remedy)
		}
	}
	if kind != nil && len(missing) > 0 {
		add(ErrSchemaOutdated, "table %s has no column %s, so nothing can be recorded or replayed: restore the table", s.table, strings.Join(missing, ", "))
	}
	for _, column := range demanded {
		add(ErrSchemaOutdated, "column %[2]s of table %[1]s must not be NULL, and no record has it: ALTER TABLE %[1]s ALTER COLUMN %[2]s DROP NOT NULL", s.table, column)
	}
	if kind != nil {
		wrong = append(wrong, s.checkAlterations(&altered)...)
	}
	if kind != nil {
		if err := s.checkVersion(ctx, versions); err != nil {
			wrong = append(wrong, err)
		}
	}
	for _, err := range s.checkAbsence(ctx) {
		wrong = append(wrong, fmt.Errorf("check: %w", err))
	}
	return append(wrong, s.checkSession(session)...)
}

// CheckResumable returns an error if the pool's role can't keep requests open in this database: it
// needs the tables and triggers of migration 4, and rights on the tables. The error joins all
// faults that it finds, and wraps [ErrSchemaOutdated], [ErrTableUnsafe] or [ErrRightMissing]. A
// service with resumable routes calls it in addition to [Store.Check]; others need neither the
// tables nor the rights.
func (s *Store) CheckResumable(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.options.AcquireTimeout+s.options.StatementTimeout)
	defer cancel()
	rows, err := s.pool.Query(ctx, `
		SELECT t.name, c.oid IS NOT NULL, ARRAY(
			SELECT r FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) WITH ORDINALITY AS r(r, at)
			WHERE c.relname <> $2 AND NOT has_table_privilege(c.oid, r) ORDER BY at
		) || ARRAY(
			SELECT 'UPDATE (' || string_agg(col, ', ' ORDER BY at) || ')' FROM unnest($3::text[]) WITH ORDINALITY AS col(col, at)
			WHERE c.relname = $2 AND NOT has_column_privilege(c.oid, col, 'UPDATE') HAVING count(*) > 0
		), quote_ident(current_user)
		FROM unnest($1::text[]) AS t(name) LEFT JOIN pg_class AS c ON c.oid = to_regclass(t.name)`, pgx.QueryExecModeExec,
		[]string{
			pgx.Identifier{s.options.Schema, TableName}.Sanitize(), pgx.Identifier{s.options.Schema, OpenTableName}.Sanitize(),
			pgx.Identifier{s.options.Schema, EffectsTableName}.Sanitize(),
		}, TableName, []string{"status", "headers", "body", "trace_id", "expires_at"})
	if err != nil {
		return fmt.Errorf("check: %w", reachError(err))
	}
	var wrong []error
	var name, role string
	var there bool
	var missing []string
	_, err = pgx.ForEachRow(rows, []any{&name, &there, &missing, &role}, func() error {
		switch {
		case !there:
			wrong = append(wrong, fmt.Errorf("check: %w: table %s is missing, and resumable routes need it: run the migrations", ErrSchemaOutdated, name))
		case len(missing) > 0:
			wrong = append(wrong, fmt.Errorf("check: %w, and resumable routes need it: GRANT %s ON %s TO %s", ErrRightMissing, strings.Join(missing, ", "), name, role))
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("check: %w", reachError(err))
	}
	return errors.Join(append(wrong, s.checkGuards(ctx)...)...)
}

// guards are the triggers of migration 4 that protect the keys of open requests, by name.
var guards = [...]struct{ name, event string }{
	{TableName + "_delete_guard", "AFTER DELETE ON %s REFERENCING OLD TABLE AS deleted FOR EACH STATEMENT"},
	{TableName + "_expire_guard", "AFTER UPDATE OF expires_at ON %s FOR EACH ROW WHEN (OLD.status = 0 AND NEW.status = 0)"},
	{TableName + "_truncate_guard", "BEFORE TRUNCATE ON %s FOR EACH STATEMENT"},
}

func (s *Store) checkGuards(ctx context.Context) (wrong []error) {
	for _, guard := range guards {
		var missing, disabled bool
		err := s.pool.QueryRow(ctx, `
			SELECT o.oid IS NOT NULL AND t.oid IS NULL, o.oid IS NOT NULL AND COALESCE(t.tgenabled NOT IN ('O', 'A'), false)
			FROM to_regclass($1) AS o(oid) LEFT JOIN pg_trigger AS t ON t.tgrelid = to_regclass($2) AND t.tgname = $3`, pgx.QueryExecModeExec,
			pgx.Identifier{s.options.Schema, OpenTableName}.Sanitize(), pgx.Identifier{s.options.Schema, TableName}.Sanitize(), guard.name).Scan(&missing, &disabled)
		const what = "check: %w: an open request can be deleted, and its effects would answer for a new request of its key: "
		switch {
		case err != nil:
			return append(wrong, fmt.Errorf("check: %w", reachError(err)))
		case missing:
			wrong = append(wrong, fmt.Errorf(what+"CREATE TRIGGER %s %s EXECUTE FUNCTION %s()", ErrTableUnsafe, guard.name, fmt.Sprintf(guard.event, s.table),
				pgx.Identifier{s.options.Schema, TableName + "_guard"}.Sanitize()))
		case disabled:
			wrong = append(wrong, fmt.Errorf(what+"ALTER TABLE %s ENABLE TRIGGER %s", ErrTableUnsafe, s.table, guard.name))
		}
	}
	return wrong
}

// checkSession compares a connection's settings, in the order of Options.settings, with those that
// the options ask for.
func (s *Store) checkSession(session []string) (wrong []error) {
	add := func(sentinel error, remedy string, args ...any) {
		wrong = append(wrong, fmt.Errorf("check: %w: %s", sentinel, fmt.Sprintf(remedy, args...)))
	}
	if s.options.TransactionPooling { // the settings come with each claim
		if s.transactions.Mode == pgx.QueryExecModeCacheStatement || s.transactions.Mode == pgx.QueryExecModeDescribeExec {
			add(ErrNotConfigured, "Options.TransactionPooling says that a pooler hands out a server connection per transaction, and the pool's mode %q prepares statements on one and uses them on the next:"+
				" give Configure the same options, or set ConnConfig.DefaultQueryExecMode to pgx.QueryExecModeExec", s.transactions.Mode)
		}
		return wrong
	}
	for i, setting := range s.options.settings() {
		got := session[i]
		switch {
		case setting.name == "synchronous_commit" && (got == "off" || got == "local" || got == "remote_write"):
			add(ErrCommitNotDurable, "synchronous_commit is %s: put the pool's config through Configure", got)
		case setting.name == "idle_in_transaction_session_timeout" && !bounded(got):
			add(ErrSessionUnbounded, "idle_in_transaction_session_timeout is %s, so that a service that vanishes keeps its key for longer than %v: take it out of the pool's config and put the config through Configure", inTime(got), IdleInTransactionTimeoutMax)
		case got != setting.value:
			add(ErrNotConfigured, "%s is %s, and Options.%s says %s: give Configure and New the same options, and take %[1]s out of the database's address and of hooks, or set the option to it",
				setting.name, inTime(got), setting.option, inTime(setting.value))
		}
	}
	return wrong
}

// bounded reports whether a timeout, in milliseconds, is set and short enough.
func bounded(ms string) bool {
	n, err := strconv.ParseInt(ms, 10, 64)
	return err == nil && n > 0 && n <= IdleInTransactionTimeoutMax.Milliseconds()
}

// inTime returns a setting in milliseconds as a duration, and any other setting unchanged.
func inTime(value string) string {
	ms, err := strconv.ParseInt(value, 10, 64)
	if err != nil {
		return value
	}
	return (time.Duration(ms) * time.Millisecond).String()
}

// primaryKey is the name of the table's primary key. An INSERT that loses a race is recognized by
// it.
const primaryKey = TableName + "_pkey"

// keyRemedy returns the SQL that gives the table its primary key, given the name and the columns of
// the one it has. It returns "" if that one is right.
func (s *Store) keyRemedy(name, columns *string) string {
	table := "ALTER TABLE " + s.table
	add := "ADD CONSTRAINT " + primaryKey + " PRIMARY KEY (scope, key)"
	switch {
	case name == nil:
		return table + " " + add + ", once each (scope, key) that is there twice has one row left"
	case *columns != "scope, key":
		return table + " DROP CONSTRAINT " + *name + ", " + add
	case *name != primaryKey:
		return table + " RENAME CONSTRAINT " + *name + " TO " + primaryKey
	}
	return ""
}

// alterations are additions to the table that may drop, change or hide its rows. Names are quoted.
type alterations struct{ rules, triggers, children []string }

func (s *Store) checkAlterations(a *alterations) (wrong []error) {
	add := func(what, remedy string, args ...any) {
		wrong = append(wrong, fmt.Errorf("check: %w: %s: %s", ErrTableUnsafe, what, fmt.Sprintf(remedy, args...)))
	}
	for _, name := range a.rules {
		add("rule "+name+" rewrites its statements", "DROP RULE %s ON %s", name, s.table)
	}
	for _, name := range a.triggers {
		add("trigger "+name+" may drop or change a row before it is written", "ALTER TABLE %s DISABLE TRIGGER %s, and write an AFTER trigger in its place", s.table, name)
	}
	for _, name := range a.children {
		add("table "+name+" inherits from it, and its primary key does not reach there", "ALTER TABLE %s NO INHERIT %s", name, s.table)
	}
	return wrong
}

// refusesEscapes reports whether the pool refuses a connection to a handler that holds one, by
// trying it.
func (s *Store) refusesEscapes(ctx context.Context) bool {
	var tx sealed.Transaction
	tx.Init(&s.transactions, nil)
	handle := tx.Handle()
	conn, err := s.pool.Acquire(context.WithValue(ctx, txKey{}, &handle))
	if err == nil {
		conn.Release()
	}
	return errors.Is(err, ErrPoolRefused)
}

func (s *Store) checkVersion(ctx context.Context, versions *string) error {
	if versions == nil {
		return fmt.Errorf("check: %w: table %s.%s is missing: run the migrations", ErrSchemaOutdated, s.options.Schema, versionTable)
	}
	var version int
	var found, dirty, hidden bool
	var role string
	table := pgx.Identifier{s.options.Schema, versionTable}.Sanitize()
	err := s.pool.QueryRow(ctx, "SELECT v.version IS NOT NULL, COALESCE(v.version, 0), COALESCE(v.dirty, false), row_security_active($1), current_user::text FROM (SELECT) AS one LEFT JOIN "+table+" AS v ON true",
		pgx.QueryExecModeExec, table).Scan(&found, &version, &dirty, &hidden, &role)
	var pgErr *pgconn.PgError
	switch {
	case err == nil && !found && hidden:
		return fmt.Errorf("check: %w", rowSecurity(s.options.Schema+"."+versionTable, pgx.Identifier{role}.Sanitize()))
	case err == nil && !found:
		return fmt.Errorf("check: %w: nothing was migrated yet: run the migrations", ErrSchemaOutdated)
	case errors.As(err, &pgErr) && pgErr.Code == "42501":
		return fmt.Errorf("check: %w: its version can't be read: GRANT SELECT ON %s.%s to the service's role", ErrSchemaOutdated, s.options.Schema, versionTable)
	case err != nil:
		return fmt.Errorf("check: %w", wire.SQLError(err))
	case dirty:
		return fmt.Errorf("check: %w: migration %d failed in the middle: idemctl migrate up, or migrations.Up, says how to mend it", ErrSchemaOutdated, version)
	case version < SchemaVersion:
		return fmt.Errorf("check: %w: it has version %d, and version %d is needed: run the migrations", ErrSchemaOutdated, version, SchemaVersion)
	}
	return nil
}
