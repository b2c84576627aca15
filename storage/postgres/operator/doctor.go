package operator

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/paidonce/idempotency/internal/pooler"
	"github.com/paidonce/idempotency/storage/postgres"
)

// Level is the severity of a [Finding].
type Level string

// The levels.
const (
	LevelOK   Level = "ok"
	LevelWarn Level = "warn" // it works, but may fail later, or could not be checked
	LevelFail Level = "fail" // requests fail, or a guarantee does not hold
)

// Finding is one result of a check of [Operator.Doctor].
type Finding struct {
	Check  string // the check's stable name: one of [Checks]
	Level  Level
	What   string // the fault or state found: names and numbers, nothing of any record
	Remedy string // how to mend it; empty if all is well, or if What names the check that has it
}

// The limits above which the doctor warns.
const (
	ClockSkewMax      = 5 * time.Second  // between the server and this process
	ReaperBehindMax   = 10 * time.Minute // since an expired record should have been deleted
	OpenAgeMax        = 10 * time.Minute // of an open request that is not parked
	OutboxAgeMax      = 2 * time.Minute  // of a message in the outbox that nothing is in front of
	ConsumerAgeMax    = 10 * time.Minute // of a begun batch that was not ended, and of a parked message that is due
	TableLockAgeMax   = 2 * time.Second  // of a lock on the table that blocks requests
	AttemptAgeMax     = postgres.IdleInTransactionTimeoutMax
	TransactionAgeMax = 10 * time.Minute // of any transaction, because it holds back vacuum
	deadRowsShareMax  = 0.2
	deadRowsMin       = 10_000
	bloatShareMax     = 0.5
	bloatBytesMin     = 64 << 20
	xidAgeWarn        = 500_000_000
	xidAgeFail        = 1_500_000_000
	slotBytesMax      = 10 << 30
	connectionsShare  = 0.8
	checkTimeout      = 5 * time.Second
	serverVersionMin  = 14
)

// check is one check of the doctor.
type check struct {
	name string
	run  func(e *examination, ctx context.Context) error
}

// checks are in the order of the report.
var checks = [...]check{
	{"server", (*examination).server},
	{"primary", (*examination).primary},
	{"pooler", (*examination).pooler},
	{"encryption", (*examination).encryption},
	{"schema", (*examination).schema},
	{"index", (*examination).index},
	{"locks", (*examination).locks},
	{"rights", (*examination).rights},
	{"row-security", (*examination).rowSecurity},
	{"durability", (*examination).durability},
	{"isolation", (*examination).isolation},
	{"timeouts", (*examination).timeouts},
	{"connections", (*examination).connections},
	{"replication", (*examination).replication},
	{"clock", (*examination).clock},
	{"attempts", (*examination).attempts},
	{"reaper", (*examination).reaper},
	{"open", (*examination).open},
	{"outbox", (*examination).outbox},
	{"consumers", (*examination).consumers},
	{"vacuum", (*examination).vacuum},
	{"bloat", (*examination).bloat},
	{"transactions", (*examination).transactions},
	{"wraparound", (*examination).wraparound},
}

// Checks returns the names of the doctor's checks, in order.
func Checks() []string {
	names := make([]string, 0, len(checks))
	for _, c := range checks {
		names = append(names, c.name)
	}
	return names
}

// examination is one call of the doctor.
type examination struct {
	o        *Operator
	check    string
	findings []Finding
}

func (e *examination) ok(what string, arguments ...any) { e.add(LevelOK, "", what, arguments...) }

func (e *examination) warn(remedy, what string, arguments ...any) {
	e.add(LevelWarn, remedy, what, arguments...)
}

func (e *examination) fail(remedy, what string, arguments ...any) {
	e.add(LevelFail, remedy, what, arguments...)
}

func (e *examination) add(level Level, remedy, what string, arguments ...any) {
	e.findings = append(e.findings, Finding{Check: e.check, Level: level, What: fmt.Sprintf(what, arguments...), Remedy: remedy})
}

// Doctor looks for present and coming faults of the database, and returns at least one finding for
// each of [Checks], in that order. A check that fails is itself a finding, and the other checks
// still run. Doctor changes nothing. It briefly opens three connections beside the pool's. Each
// check takes at most 5 seconds. If the database can't be reached, the only finding is one of the
// check named server.
func (o *Operator) Doctor(ctx context.Context) []Finding {
	e := &examination{o: o}
	incomplete := false // the tables, by the check schema
	for i, c := range checks {
		e.check = c.name
		before := len(e.findings)
		err := func() error {
			ctx, cancel := context.WithTimeout(ctx, checkTimeout)
			defer cancel()
			return c.run(e, ctx)
		}()
		switch {
		case err != nil && i == 0:
			e.fail("see that the address, the role and its password are right, and that the server is up", "it can't be reached: %s",
				// pgx lists each address on a line of its own.
				strings.Join(strings.Fields(sqlError(err).Error()), " "))
			return e.findings
		case err != nil && len(e.findings) == before && incomplete && undefined(err):
			e.warn("", "not checked: the tables are incomplete, see the check schema")
		case err != nil && len(e.findings) == before:
			remedy := "see the error; the right that is missing may be that of pg_monitor"
			if errors.Is(err, postgres.ErrRowSecurityActive) {
				remedy = "see the check row-security"
			}
			e.warn(remedy, "it could not be checked: %v", sqlError(err))
		case err == nil && len(e.findings) == before:
			e.ok("nothing found")
		}
		if c.name == "schema" {
			incomplete = slices.ContainsFunc(e.findings[before:], func(f Finding) bool { return f.Level != LevelOK })
		}
	}
	return e.findings
}

// undefined reports whether err means that a schema, table or column does not exist.
func undefined(err error) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && (pgErr.Code == "42P01" || pgErr.Code == "3F000" || pgErr.Code == "42703")
}

// row reads one row, in a read-only transaction of its own.
func (e *examination) row(ctx context.Context, sql string, arguments []any, to ...any) error {
	return e.o.read(ctx, func(ctx context.Context, tx pgx.Tx) error { return tx.QueryRow(ctx, sql, arguments...).Scan(to...) })
}

func (e *examination) server(ctx context.Context) error {
	var number int
	var version, role, database, encoding string
	if err := e.row(ctx, "SELECT current_setting('server_version_num')::int, current_setting('server_version'), session_user::text, current_database()::text, current_setting('server_encoding')",
		nil, &number, &version, &role, &database, &encoding); err != nil {
		return err
	}
	if number/10000 < serverVersionMin {
		e.fail(fmt.Sprintf("upgrade to PostgreSQL %d or later", serverVersionMin), "PostgreSQL %s: too old", version)
		return nil
	}
	if encoding != "UTF8" && encoding != "SQL_ASCII" {
		e.fail("dump the database and restore it into one made by CREATE DATABASE ... ENCODING 'UTF8' LOCALE 'C' TEMPLATE template0",
			"the database's encoding is %s, which may make one key of two: services refuse it", encoding)
		return nil
	}
	e.ok("PostgreSQL %s, database %s, role %s", version, database, role)
	return nil
}

func (e *examination) primary(ctx context.Context) error {
	var standby bool
	var readOnly, subscription string
	err := e.row(ctx, `
		SELECT pg_is_in_recovery(), (SELECT reset_val FROM pg_settings WHERE name = 'default_transaction_read_only'),
		       COALESCE((SELECT min(quote_ident(s.subname)) FROM pg_subscription_rel AS r JOIN pg_subscription AS s ON s.oid = r.srsubid
		                 WHERE r.srrelid = to_regclass($1) AND s.subenabled), '')`, []any{e.o.keys}, &standby, &readOnly, &subscription)
	if err != nil {
		return err
	}
	switch {
	case subscription != "":
		e.fail("connect to the primary; or, once that is stopped for good, ALTER SUBSCRIPTION "+subscription+" DISABLE, and docs/operations.md has what else",
			"subscription %s writes to the table: the server is a logical replica, and a request that runs here may run on the primary too", subscription)
	case standby:
		e.fail("connect to the primary (target_session_attrs=read-write)", "the server is a standby, or is still recovering: it takes no requests")
	case readOnly == "on":
		e.warn("find out who set default_transaction_read_only, and why: often a tool that stops writes while a disk is full", "transactions are read-only by default; a claim asks for a writable one, other programs don't")
	default:
		e.ok("it takes writes")
	}
	return nil
}

// pooler checks whether a pooler such as PgBouncer is in between.
func (e *examination) pooler(ctx context.Context) error {
	a, err := e.connect(ctx)
	if err != nil {
		return err
	}
	defer closeConn(a)
	b, err := e.connect(ctx)
	if err != nil {
		return err
	}
	defer closeConn(b)
	switch mode, err := pooler.Find(ctx, a, b); {
	case err != nil:
		return err
	case mode == pooler.Transaction:
		e.warn("services on it need postgres.Options.TransactionPooling and pgx.QueryExecModeExec or CacheDescribe; see docs/guarantees.md, F31. Migrations go around it",
			"a pooler is in between, and hands out a server connection per transaction")
	case mode == pooler.Session:
		e.ok("a pooler is in between, and a client keeps its server connection as far as can be seen")
	default:
		e.ok("none in between")
	}
	return nil
}

// connect opens a connection as the pool would.
func (e *examination) connect(ctx context.Context) (*pgx.Conn, error) {
	config := e.o.pool.Config()
	if config.BeforeConnect != nil {
		if err := config.BeforeConnect(ctx, config.ConnConfig); err != nil {
			return nil, err
		}
	}
	return pgx.ConnectConfig(ctx, config.ConnConfig)
}

func closeConn(conn *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), rollbackTimeout)
	defer cancel()
	_ = conn.Close(ctx) // the connection is gone, whatever the error
}

// schema lets the store check its table, and checks the operator's tables.
func (e *examination) schema(ctx context.Context) error {
	bad := false
	found := joined(e.o.store.Check(ctx))
	for _, err := range joined(e.o.store.CheckResumable(ctx)) {
		if errors.Is(err, postgres.ErrTableUnsafe) { // the other faults concern the service's role
			found = append(found, err)
		}
	}
	for _, err := range joined(e.o.store.CheckMessages(ctx)) {
		if errors.Is(err, postgres.ErrTableUnsafe) || errors.Is(err, postgres.ErrTableUnlogged) {
			found = append(found, err)
		}
	}
	for _, err := range found {
		switch {
		case errors.Is(err, postgres.ErrSchemaOutdated), errors.Is(err, postgres.ErrTableUnlogged):
			bad = true
			e.fail("do what the text says; the migrations are idemctl migrate up, with --schema NAME if the tables are in another schema", "%v", err)
		case errors.Is(err, postgres.ErrTableUnsafe):
			bad = true
			e.fail("what the text says, with a look at who added it and why", "%v", err)
		case errors.Is(err, postgres.ErrServerOutdated), errors.Is(err, postgres.ErrNotPrimary), errors.Is(err, postgres.ErrCommitNotDurable), errors.Is(err, postgres.ErrNotConfigured),
			errors.Is(err, postgres.ErrSessionUnbounded), errors.Is(err, postgres.ErrRowSecurityActive), errors.Is(err, postgres.ErrEncodingUnsafe):
			// other checks report these, and the service's pool is another one
		default:
			bad = true
			e.warn("see the error", "%v", err)
		}
	}
	if bad {
		return nil
	}
	var version int
	var after *string
	if err := e.row(ctx, "SELECT version, (SELECT string_agg(quote_ident(tgname), ', ' ORDER BY tgname) FROM pg_trigger"+
		" WHERE tgrelid = $1::text::regclass AND NOT tgisinternal AND tgenabled <> 'D' AND tgtype & 6 = 4) FROM "+e.o.versions, []any{e.o.keys}, &version, &after); err != nil {
		return err
	}
	if after != nil {
		e.warn("see that it is quick, that it changes no setting, and that it may fail the request: its error undoes the handler's writes",
			"AFTER triggers run with each record: %s", *after)
	}
	if version < SchemaVersion {
		e.warn("idemctl migrate up: a service needs nothing of it, and runs on through it",
			"version %d: services work; expire, delete and the history need version %d", version, SchemaVersion)
		return nil
	}
	e.ok("version %d", version)
	return nil
}

func joined(err error) []error {
	var many interface{ Unwrap() []error }
	switch {
	case err == nil:
		return nil
	case errors.As(err, &many):
		return many.Unwrap()
	}
	return []error{err}
}

func (e *examination) index(ctx context.Context) error {
	var valid, ready, unique bool
	var collations, more int
	err := e.row(ctx, `
		SELECT i.indisvalid, i.indisready, i.indisunique, (SELECT count(*) FROM unnest(i.indcollation::oid[]) AS c WHERE c = '"C"'::regcollation),
		       (SELECT count(*) FROM pg_index AS o WHERE o.indrelid = i.indrelid AND o.indexrelid <> i.indexrelid)
		FROM pg_index AS i WHERE i.indrelid = $1::text::regclass AND i.indisprimary`, []any{e.o.keys}, &valid, &ready, &unique, &collations, &more)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		e.fail("see the check schema", "the table has no primary key: nothing but the lock keeps a key from being recorded twice")
		return nil
	case err != nil:
		return err
	case !valid || !ready || !unique:
		e.fail("REINDEX INDEX CONCURRENTLY "+postgres.TableName+"_pkey", "the primary key's index is not valid: a look-up may miss a record, and its handler runs again")
	case collations != 2:
		e.fail(`ALTER TABLE ... ALTER COLUMN scope TYPE text COLLATE "C", ALTER COLUMN key TYPE text COLLATE "C", while no service runs`,
			"the primary key is not in the collation C: an upgrade of the C library, or a standby with another one, can hide a record")
	default:
		e.ok(`the primary key is valid, and in the collation C`)
	}
	if more > 0 {
		e.warn("drop what is not needed: looking records up by other columns is what idemctl key list is for", "%d more indexes on the table: each request pays for each", more)
	}
	return nil
}

// locks looks for a session that holds, or waits for, a lock on the table that blocks requests.
// While that session waits, every later request queues behind it until the session in front of it
// releases its lock. ALTER TABLE, VACUUM FULL and LOCK TABLE take such a lock.
func (e *examination) locks(ctx context.Context) error {
	var pid int
	var granted bool
	var seconds float64
	var before string
	err := e.row(ctx, `
		SELECT l.pid, l.granted, age.s, COALESCE((SELECT string_agg(DISTINCT b::text, ', ') FROM unnest(CASE WHEN NOT l.granted THEN pg_blocking_pids(l.pid) END) AS b), '')
		FROM pg_locks AS l LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid,
		LATERAL (SELECT COALESCE(extract(epoch FROM clock_timestamp() - CASE WHEN l.granted THEN a.xact_start ELSE l.waitstart END), 0)::float8 AS s) AS age
		WHERE l.relation = to_regclass($1) AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
		AND l.mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
		ORDER BY age.s DESC LIMIT 1`, []any{e.o.keys}, &pid, &granted, &seconds, &before)
	age := time.Duration(seconds * float64(time.Second)).Round(100 * time.Millisecond)
	switch {
	case errors.Is(err, pgx.ErrNoRows), err == nil && age <= TableLockAgeMax:
		e.ok("nobody keeps requests from the table")
		return nil
	case err != nil:
		return err
	case granted:
		e.fail(fmt.Sprintf("wait for it, or SELECT pg_terminate_backend(%d), which undoes what it did", pid),
			"process %d has had the table locked for %v: requests wait for it", pid, age)
	default:
		e.fail(fmt.Sprintf("SELECT pg_cancel_backend(%d), and requests go on; then idemctl migrate up, or SET lock_timeout = '1s' before what it did", pid),
			"process %d has waited for a lock on the table for %v, behind %s: requests wait behind it", pid, age, before)
	}
	return nil
}

func (e *examination) rights(ctx context.Context) error {
	var read, write, remove, expire, audit, events, settle, messages, monitor bool
	var role string
	err := e.row(ctx, `
		SELECT has_table_privilege($1::text, 'SELECT'), has_table_privilege($1::text, 'INSERT'), has_table_privilege($1::text, 'DELETE'),
		       has_column_privilege($1::text, 'expires_at', 'UPDATE'),
		       COALESCE(has_table_privilege(to_regclass($2)::oid, 'SELECT') AND has_table_privilege(to_regclass($2)::oid, 'INSERT'), false),
		       COALESCE(has_table_privilege(to_regclass($3)::oid, 'SELECT'), false),
		       (SELECT COALESCE(bool_and(has_table_privilege(to_regclass(t)::oid, 'SELECT') AND has_table_privilege(to_regclass(t)::oid, 'UPDATE') AND has_table_privilege(to_regclass(t)::oid, 'DELETE')), true)
		        FROM unnest(ARRAY[$4, $5]) AS t), -- NULL before migration 4
		       (SELECT COALESCE(bool_and(has_table_privilege(to_regclass(t)::oid, 'SELECT') AND (t = $8 OR has_table_privilege(to_regclass(t)::oid, 'UPDATE') AND has_table_privilege(to_regclass(t)::oid, 'DELETE'))), true)
		        FROM unnest(ARRAY[$6, $7, $8]) AS t), -- NULL before migration 5
		       pg_has_role('pg_read_all_stats', 'USAGE'), quote_ident(current_user)`,
		[]any{e.o.keys, e.o.audit, e.o.events, e.o.open, e.o.effects, e.o.outbox, e.o.parked, e.o.offsets}, &read, &write, &remove, &expire, &audit, &events, &settle, &messages, &monitor, &role)
	if err != nil {
		return err
	}
	if !read {
		e.fail("GRANT SELECT ON "+e.o.table+" TO "+role, "this role can't read the records")
		return nil
	}
	grantAudit := "GRANT SELECT, INSERT ON " + e.o.store.Schema() + "." + AuditTableName + " TO " + role
	for _, right := range []struct {
		there   bool
		what    string
		granted string
	}{
		{remove && audit, "delete a key", "GRANT DELETE ON " + e.o.table + " TO " + role + "; " + grantAudit},
		{expire && audit, "expire a key", "GRANT UPDATE (expires_at) ON " + e.o.table + " TO " + role + "; " + grantAudit},
		{events, "see a key's history", "GRANT SELECT ON " + e.o.store.Schema() + "." + EventsTableName + " TO " + role},
		{settle && audit, "settle an effect", fmt.Sprintf("GRANT SELECT, UPDATE, DELETE ON %[1]s.%[2]s, %[1]s.%[3]s TO %[4]s; %[5]s", e.o.store.Schema(), postgres.OpenTableName, postgres.EffectsTableName, role, grantAudit)},
		{messages && audit, "act on messages", fmt.Sprintf("GRANT SELECT, UPDATE, DELETE ON %[1]s.%[2]s, %[1]s.%[3]s TO %[5]s; GRANT SELECT ON %[1]s.%[4]s TO %[5]s; %[6]s",
			e.o.store.Schema(), postgres.OutboxTable, postgres.ParkedTable, postgres.OffsetsTable, role, grantAudit)},
		{monitor, "see other sessions", "GRANT pg_monitor TO " + role},
	} {
		if !right.there {
			e.warn(right.granted+" (if it should)", "this role can't %s", right.what)
		}
	}
	if write {
		e.ok("this role may read and write records, as a service's does")
	} else {
		e.ok("this role may read records, and adds none")
	}
	return nil
}

// rowSecurity looks for roles that a policy may hide rows from: this role, and roles that may read
// the table and write or delete records, as services and reapers do. Superusers and roles with
// BYPASSRLS see all rows. So does the table's owner, unless row-level security is forced.
func (e *examination) rowSecurity(ctx context.Context) error {
	type hidden struct {
		table string
		roles []string
	}
	var found []hidden
	err := e.o.read(ctx, func(ctx context.Context, tx pgx.Tx) error {
		rows, err := tx.Query(ctx, `
			SELECT format('%I.%I', c.relnamespace::regnamespace, c.relname), ARRAY(
				SELECT quote_ident(r.rolname) FROM pg_roles AS r
				WHERE NOT r.rolsuper AND NOT r.rolbypassrls AND (c.relforcerowsecurity OR NOT pg_has_role(r.oid, c.relowner, 'USAGE'))
				  AND (r.rolname = current_user OR left(r.rolname, 3) <> 'pg_' AND has_table_privilege(r.oid, c.oid, 'SELECT')
				       AND (has_table_privilege(r.oid, to_regclass($1)::oid, 'INSERT') OR has_table_privilege(r.oid, to_regclass($1)::oid, 'DELETE')))
				ORDER BY r.rolname LIMIT 10)
			FROM pg_class AS c WHERE c.relrowsecurity AND c.oid IN (to_regclass($1), to_regclass($2), to_regclass($3), to_regclass($4))
			ORDER BY c.relname DESC`, e.o.keys, e.o.versions, e.o.audit, e.o.events)
		if err != nil {
			return err
		}
		found, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (h hidden, err error) {
			err = row.Scan(&h.table, &h.roles)
			return h, err
		})
		return err
	})
	if err != nil {
		return err
	}
	for _, h := range found {
		if len(h.roles) == 0 {
			e.ok("%s has row-level security, and every role that it concerns bypasses that", h.table)
			continue
		}
		remedy := "ALTER TABLE " + h.table + " DISABLE ROW LEVEL SECURITY, or "
		for i, role := range h.roles {
			if i > 0 {
				remedy += "; "
			}
			remedy += "ALTER ROLE " + role + " BYPASSRLS"
		}
		e.fail(remedy, "row-level security may hide rows of %s from %s: a record that is not seen may be there", h.table, strings.Join(h.roles, ", "))
	}
	return nil
}

func (e *examination) durability(ctx context.Context) error {
	var fsync, pages, commit string
	if err := e.row(ctx, "SELECT current_setting('fsync'), current_setting('full_page_writes'), (SELECT reset_val FROM pg_settings WHERE name = 'synchronous_commit')", nil, &fsync, &pages, &commit); err != nil {
		return err
	}
	found := len(e.findings)
	if fsync == "off" {
		e.fail("ALTER SYSTEM SET fsync = on", "fsync is off: when the machine stops, payments are lost, and the table may be ruined")
	}
	if pages == "off" {
		e.fail("ALTER SYSTEM SET full_page_writes = on, unless the file system never tears a page", "full_page_writes is off: when the machine stops in the middle of a write, a page may be lost")
	}
	switch commit {
	case "off", "local", "remote_write":
		e.warn("ALTER SYSTEM, ALTER DATABASE or ALTER ROLE ... SET synchronous_commit = on, or have every pool go through postgres.Configure, which sets it",
			"synchronous_commit is %s unless a session sets it: COMMIT does not wait for the disk there", commit)
	}
	if len(e.findings) == found {
		e.ok("fsync and full_page_writes are on, synchronous_commit is %s", commit)
	}
	return nil
}
