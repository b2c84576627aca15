package migrations

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/golang-migrate/migrate/v4/database"
	"github.com/golang-migrate/migrate/v4/source"
	"github.com/golang-migrate/migrate/v4/source/iofs"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgconn/ctxwatch"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/internal/pooler"
)

const (
	// endMax limits each step after a context has ended: the server's answer to a cancel request, a
	// ROLLBACK, a COMMIT.
	endMax = 5 * time.Second
	// pausesMax is the longest pause as a multiple of LockTimeout.
	pausesMax = 8
	// turnPauseMin and turnPauseMax limit the pauses between checks whether another migration has
	// ended.
	turnPauseMin, turnPauseMax = 50 * time.Millisecond, time.Second

	none = database.NilVersion // the version before the first
)

// migrator migrates one schema, on a connection with a session of its own: it sets search_path and
// timeouts for the session, and holds an advisory lock.
//
// It keeps golang-migrate's file names, version table and lock, so that the migrate program can be
// used as well. It does not use golang-migrate's driver, which takes no context, truncates the
// version table (so that it waits for every reader), and marks the schema dirty before it waits.
type migrator struct {
	options  Options
	schema   string
	table    string // of versions, sanitized
	own      bool   // the files are a program's own, and may contain any statement
	files    source.Driver
	versions []uint // of the files, ascending

	changed bool // a migration was applied or undone

	conn    *pgx.Conn
	pid     int       // its server process
	watcher *pgx.Conn // reads the sessions that conn waits for
}

func newMigrator(store Store, opts *Options) (*migrator, error) {
	m := &migrator{schema: store.Schema()}
	if opts != nil {
		m.options = *opts
	}
	o := &m.options
	if (o.Files == nil) != (o.VersionTable == "") {
		return nil, errors.New("Options.Files and Options.VersionTable belong together: set both or none")
	}
	if m.own = o.Files != nil; !m.own {
		o.Files, o.VersionTable = files, "idempotency_migrations"
	}
	o.LockTimeout = cmp.Or(o.LockTimeout, time.Second)
	if o.LockTimeout < time.Millisecond {
		return nil, fmt.Errorf("Options.LockTimeout is %v: it must be at least a millisecond", o.LockTimeout)
	}
	m.table = pgx.Identifier{m.schema, o.VersionTable}.Sanitize()
	var err error
	if m.files, err = iofs.New(o.Files, "."); err != nil {
		return nil, fmt.Errorf("read files: %w", err)
	}
	version, err := m.files.First()
	for ; err == nil; version, err = m.files.Next(version) {
		m.versions = append(m.versions, version)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read files: %w", err)
	}
	return m, nil
}

// connect opens a connection as the pool does, but does not call its AfterConnect.
func connect(ctx context.Context, pool *pgxpool.Pool) (*pgx.Conn, error) {
	config := pool.Config()
	conn := config.ConnConfig
	if config.BeforeConnect != nil {
		if err := config.BeforeConnect(ctx, conn); err != nil {
			return nil, err
		}
	}
	conn.DefaultQueryExecMode = pgx.QueryExecModeExec
	// When a context ends, the connection sends a cancel request and waits for the answer: the
	// session stays usable, and the outcome of a file is known.
	conn.BuildContextWatcherHandler = func(conn *pgconn.PgConn) ctxwatch.Handler {
		return &pgconn.CancelRequestContextWatcherHandler{Conn: conn, DeadlineDelay: endMax}
	}
	return pgx.ConnectConfig(ctx, conn)
}

// begin connects, checks that no pooler shares the session, and waits for its turn.
func (m *migrator) begin(ctx context.Context, pool *pgxpool.Pool) (err error) {
	if m.conn, err = connect(ctx, pool); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	if m.watcher, err = connect(ctx, pool); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	switch mode, err := pooler.Find(ctx, m.conn, m.watcher); {
	case err != nil:
		return fmt.Errorf("look for a pooler: %w", err)
	case mode == pooler.Transaction:
		return fmt.Errorf("%w that hands a server connection on after each transaction, and would leave the search_path, the timeouts and the lock of a migration"+
			" to another client: connect to PostgreSQL itself (its own port, not PgBouncer's), or to a pool in session mode", ErrPoolerInBetween)
	}
	if err := m.conn.QueryRow(ctx, "SELECT pg_backend_pid()").Scan(&m.pid); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	// A migration may run as long as it needs, but its waits are limited.
	for _, conn := range []*pgx.Conn{m.conn, m.watcher} {
		_, err := conn.Exec(ctx, `SELECT set_config(name, CASE name WHEN 'lock_timeout' THEN $1 ELSE '0' END, false) FROM pg_settings WHERE name IN
			('lock_timeout', 'statement_timeout', 'transaction_timeout', 'idle_in_transaction_session_timeout', 'idle_session_timeout')`, m.lockTimeoutMS())
		if err == nil {
			_, err = conn.Exec(ctx, "SELECT set_config('search_path', $1, false)", pgx.Identifier{m.schema}.Sanitize())
		}
		if err != nil {
			return fmt.Errorf("set timeouts: %w", err)
		}
	}
	return m.takeTurn(ctx)
}

func (m *migrator) lockTimeoutMS() string {
	return strconv.FormatInt(m.options.LockTimeout.Milliseconds(), 10)
}

// close ends the session, after a reset of the state that a pooler in session mode might keep.
func (m *migrator) close(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endMax)
	defer cancel()
	for _, conn := range []*pgx.Conn{m.conn, m.watcher} {
		if conn == nil || conn.IsClosed() {
			continue
		}
		_, _ = conn.Exec(ctx, "DISCARD ALL") // if it fails, the end of the connection does the same
		_ = conn.Close(ctx)                  // closed even if it returns an error
	}
	_ = m.files.Close() // they were read
}

// takeTurn waits until nobody else migrates the schema. It polls: a session that waits inside a
// statement has a snapshot, and CREATE INDEX CONCURRENTLY in another session would wait for that.
func (m *migrator) takeTurn(ctx context.Context) error {
	var name string
	if err := m.conn.QueryRow(ctx, "SELECT current_database()").Scan(&name); err != nil {
		return err
	}
	var locks [2]int64
	// golang-migrate's lock has two names: the driver uses the first as a library, and the second
	// in the migrate program.
	for i, alias := range []string{name, "/" + name} {
		id, err := lockID(alias, m.schema, m.options.VersionTable)
		if err != nil {
			return err
		}
		locks[i] = id
	}
	waiting := Waiting{What: "another migration", Pause: turnPauseMin}
	for {
		var first, both bool
		err := m.conn.QueryRow(ctx, "SELECT first, first AND pg_try_advisory_lock($2::bigint) FROM (SELECT pg_try_advisory_lock($1::bigint) AS first OFFSET 0) AS locked", locks[0], locks[1]).Scan(&first, &both)
		if err == nil && first && !both {
			_, err = m.conn.Exec(ctx, "SELECT pg_advisory_unlock($1::bigint)", locks[0])
		}
		if both || err != nil {
			return err
		}
		waiting.Tries++
		waiting.Blockers, err = m.blockers(ctx, `SELECT DISTINCT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 1
			AND classid = 0 AND objid::bigint = ANY ($1) AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`, locks[:])
		if err != nil {
			return err
		}
		if err := m.pause(ctx, waiting); err != nil {
			return err
		}
		waiting.Pause = min(2*waiting.Pause, turnPauseMax)
	}
}

func lockID(name, schema, table string) (int64, error) {
	id, err := database.GenerateAdvisoryLockId(name, schema, table)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(id, 10, 64)
}

// blockers returns the sessions of the processes that sql selects.
func (m *migrator) blockers(ctx context.Context, sql string, argument any) ([]Blocker, error) {
	rows, err := m.watcher.Query(ctx, `SELECT b.pid, COALESCE(a.application_name, ''), COALESCE(a.state, ''),
		COALESCE(extract(epoch FROM clock_timestamp() - a.xact_start)::float8, 0)
		FROM (`+sql+`) AS b (pid) LEFT JOIN pg_stat_activity AS a ON a.pid = b.pid ORDER BY b.pid`, argument)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (b Blocker, err error) {
		var seconds float64
		err = row.Scan(&b.PID, &b.Application, &b.State, &seconds)
		b.Age = time.Duration(seconds * float64(time.Second))
		return b, err
	})
}

// pause calls Waiting, and then waits.
func (m *migrator) pause(ctx context.Context, waiting Waiting) error {
	if m.options.Waiting != nil {
		m.options.Waiting(waiting)
	}
	select {
	case <-ctx.Done():
		text := "nobody that can be seen any more"
		if len(waiting.Blockers) > 0 {
			names := make([]string, 0, len(waiting.Blockers))
			for _, b := range waiting.Blockers {
				names = append(names, b.String())
			}
			text = strings.Join(names, "; ")
		}
		return fmt.Errorf("%s has waited, %d times, for %s: %w", waiting.What, waiting.Tries, text, ctx.Err())
	case <-time.After(waiting.Pause):
		return nil
	}
}

// version returns the version of the schema, or none.
func (m *migrator) version(ctx context.Context) (int, error) {
	var exists bool
	err := m.conn.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE nspname = $1 AND relname = $2)",
		m.schema, m.options.VersionTable).Scan(&exists)
	if err != nil || !exists {
		return none, err
	}
	var version int
	var dirty bool
	err = m.conn.QueryRow(ctx, "SELECT version, dirty FROM "+m.table).Scan(&version, &dirty)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		var hidden bool // an unseen version does not prove that nothing was migrated
		err := m.conn.QueryRow(ctx, "SELECT row_security_active($1)", m.table).Scan(&hidden)
		if err == nil && hidden {
			err = fmt.Errorf("row-level security may hide the version: ALTER TABLE %s DISABLE ROW LEVEL SECURITY, or migrate as its owner", m.table)
		}
		return none, err
	case err != nil:
		return none, fmt.Errorf("read the table of versions: %w", err)
	case dirty:
		return version, m.dirty(version)
	}
	return version, nil
}

func (m *migrator) dirty(version int) error {
	remedy := "DELETE FROM " + m.table
	if before, err := m.before(version); err == nil && before != none {
		remedy = fmt.Sprintf("UPDATE %s SET version = %d, dirty = false", m.table, before)
	}
	if m.own {
		return fmt.Errorf("%w: version %d failed in the middle: undo what it left, then `%s`", ErrDirty, version, remedy)
	}
	return fmt.Errorf("%w: another tool's migration to or from version %d failed in the middle: if the tool sends a file as one, `%s` writes down which version is there",
		ErrDirty, max(version, 0), m.lookAndMend())
}

// compare returns an error if the version table claims a table of records that does not exist, or
// if such a table exists without a version: otherwise Up would have nothing to do, or would fail at
// the first file. It knows only this package's files, up to their newest version.
func (m *migrator) compare(ctx context.Context, version int) error {
	if m.own || version > Latest {
		return nil
	}
	var exists bool
	records := pgx.Identifier{m.schema, "idempotency_keys"}.Sanitize()
	if err := m.conn.QueryRow(ctx, "SELECT to_regclass($1) IS NOT NULL", records).Scan(&exists); err != nil {
		return err
	}
	switch {
	case exists && version <= 0:
		return fmt.Errorf("%w: %s is there, and %s has no version:"+
			" `CREATE TABLE IF NOT EXISTS %[3]s (version bigint not null primary key, dirty boolean not null); INSERT INTO %[3]s VALUES (%d, false); %s` records the version",
			ErrVersionUntrue, records, m.table, Latest, m.lookAndMend())
	case !exists && version > 0:
		var others string
		for _, table := range []string{"idempotency_audit", "idempotency_events", "idempotency_open", "idempotency_effects", "message_outbox", "message_offsets", "message_parked"} {
			others = strings.TrimPrefix(others+", "+pgx.Identifier{m.schema, table}.Sanitize(), ", ")
		}
		return fmt.Errorf("%w: %s has version %d, and %s is missing: restore it together with the data that its records report. Without it every retry runs again:"+
			" if no client retries any more, `DROP TABLE IF EXISTS %s; DELETE FROM %[2]s` and migrate up start again, without the audit table, the history and the messages",
			ErrVersionUntrue, m.table, version, records, others)
	}
	return nil
}

// lookAndMend returns SQL that detects this package's version from the objects in the schema, and
// repairs the version table.
func (m *migrator) lookAndMend() string {
	quoted := func(table string) string {
		return "'" + strings.ReplaceAll(pgx.Identifier{m.schema, table}.Sanitize(), "'", "''") + "'"
	}
	return fmt.Sprintf("DELETE FROM %[1]s WHERE to_regclass(%[2]s) IS NULL; UPDATE %[1]s SET dirty = false, version = CASE"+
		" WHEN EXISTS (SELECT FROM pg_constraint WHERE conname = 'idempotency_keys_status_check' AND conrelid = to_regclass(%[2]s)) THEN 1"+
		" WHEN to_regclass(%[3]s) IS NULL THEN 2 WHEN to_regclass(%[4]s) IS NULL THEN 3 WHEN to_regclass(%[5]s) IS NULL THEN 4 ELSE 5 END",
		m.table, quoted("idempotency_keys"), quoted("idempotency_audit"), quoted("idempotency_open"), quoted("message_outbox"))
}

// after returns the next version, and whether there is one.
func (m *migrator) after(version int) (next int, ok bool, err error) {
	i, found := 0, version == none
	if !found {
		i, found = slices.BinarySearch(m.versions, uint(version))
		if found {
			i++
		}
	}
	switch {
	case i == len(m.versions):
		return 0, false, nil
	case !found:
		return 0, false, fmt.Errorf("the schema has version %d, which is not among the files", version)
	}
	return int(m.versions[i]), true, nil
}

// before returns the previous version, or none.
func (m *migrator) before(version int) (int, error) {
	i, found := slices.BinarySearch(m.versions, uint(max(version, 0)))
	switch {
	case !found:
		return none, fmt.Errorf("the schema has version %d, which is not among the files", version)
	case i == 0:
		return none, nil
	}
	return int(m.versions[i-1]), nil
}

// body returns a file's text, or an empty one if there is none for this direction.
func (m *migrator) body(version uint, up bool) (string, error) {
	read := m.files.ReadDown
	if up {
		read = m.files.ReadUp
	}
	file, _, err := read(version)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	text, err := io.ReadAll(file)
	return string(text), errors.Join(err, file.Close())
}

// step migrates the schema from one version to a neighbour.
func (m *migrator) step(ctx context.Context, from, to int, up bool) error {
	number, name := to, "up"
	if !up {
		number, name = from, "down"
	}
	name = fmt.Sprintf("migration %d %s", number, name)
	body, err := m.body(uint(number), up)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if err := m.again(ctx, name, m.prepare); err != nil {
		return fmt.Errorf("make the table of versions: %w", err)
	}
	err = m.again(ctx, name, func(ctx context.Context) error {
		if m.own {
			return m.runOwn(ctx, from, to, body)
		}
		_, err := m.run(ctx, to, body)
		return err
	})
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	m.changed = true
	return nil
}

// leftError is the error of a file that may have left something behind, and so is not retried.
type leftError struct{ error }

func (e leftError) Unwrap() error { return e.error }

// again calls try until it gets the locks that it needs.
func (m *migrator) again(ctx context.Context, name string, try func(context.Context) error) error {
	waiting := Waiting{What: name, Pause: m.options.LockTimeout}
	for {
		seen := m.watch()
		err := try(ctx)
		blockers := seen()
		var pgErr *pgconn.PgError
		// PostgreSQL reports a deadlock (40P01) if a request holds one table and waits for another.
		if err == nil || errors.As(err, new(leftError)) || !errors.As(err, &pgErr) || pgErr.Code != "55P03" && pgErr.Code != "40P01" {
			return err
		}
		waiting.Tries, waiting.Blockers = waiting.Tries+1, blockers
		if err := m.pause(ctx, waiting); err != nil {
			return err
		}
		waiting.Pause = min(2*waiting.Pause, pausesMax*m.options.LockTimeout)
	}
}

// watch polls the sessions that conn waits for. The returned function stops the polling, and
// returns the sessions last seen. After a lock timeout it is too late to look.
func (m *migrator) watch() (seen func() []Blocker) {
	var blockers []Blocker
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			case <-time.After(m.options.LockTimeout / 3):
			}
			ctx, cancel := context.WithTimeout(context.Background(), endMax)
			// The list is empty if the role is not allowed to see them.
			if now, err := m.blockers(ctx, "SELECT DISTINCT unnest(pg_blocking_pids($1))", m.pid); err == nil && len(now) > 0 {
				blockers = now
			}
			cancel()
		}
	}()
	return func() []Blocker {
		close(stop)
		<-stopped
		return blockers
	}
}

// prepare creates the schema and the version table. It checks first whether they exist, because
// CREATE needs a right that the check does not.
func (m *migrator) prepare(ctx context.Context) error {
	var schema, table bool
	err := m.conn.QueryRow(ctx, `SELECT to_regnamespace($1) IS NOT NULL,
		EXISTS (SELECT FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE nspname = $2 AND relname = $3)`,
		pgx.Identifier{m.schema}.Sanitize(), m.schema, m.options.VersionTable).Scan(&schema, &table)
	if err == nil && !schema {
		_, err = m.conn.Exec(ctx, "CREATE SCHEMA IF NOT EXISTS "+pgx.Identifier{m.schema}.Sanitize())
	}
	if err == nil && !table {
		_, err = m.conn.Exec(ctx, "CREATE TABLE IF NOT EXISTS "+m.table+" (version bigint not null primary key, dirty boolean not null)")
	}
	return err
}

// run executes a file and records its version, in one transaction. ended reports whether the file
// ended the transaction, or COMMIT was sent. If it is false, an error means that nothing happened.
func (m *migrator) run(ctx context.Context, to int, body string) (ended bool, err error) {
	if _, err := m.conn.Exec(ctx, "BEGIN"); err != nil {
		return false, err
	}
	defer func() {
		if !m.conn.IsClosed() && m.conn.PgConn().TxStatus() != 'I' {
			err = errors.Join(err, m.end(ctx, "ROLLBACK"))
		}
	}()
	if ended, err = m.send(ctx, body); err != nil {
		return ended, err
	}
	if m.conn.PgConn().TxStatus() == 'I' { // the file ended ours
		return true, m.mark(context.WithoutCancel(ctx), to, false)
	}
	if err := m.write(ctx, to, false); err != nil {
		return ended, err
	}
	err = m.end(ctx, "COMMIT")
	var pgErr *pgconn.PgError
	// A deferred constraint failed: nothing was committed.
	if errors.As(err, &pgErr) && pgErr.SeverityUnlocalized == "ERROR" {
		return ended, err
	}
	return true, err
}

// runOwn is run for files that may contain any statement. While such a file runs the schema is
// dirty: if it is more than one transaction, nobody can tell afterwards how far it got.
func (m *migrator) runOwn(ctx context.Context, from, to int, body string) error {
	if err := m.mark(ctx, to, true); err != nil {
		return err
	}
	ended, err := m.run(ctx, to, body)
	var pgErr *pgconn.PgError
	switch {
	case err == nil:
		return nil
	case ended || m.conn.IsClosed():
		return leftError{err}
	case errors.As(err, &pgErr) && (pgErr.Code == "25001" || pgErr.Code == "2D000"):
		// The statement can't run in a transaction.
		err = m.runOutside(ctx, body)
		if err == nil {
			err = m.mark(context.WithoutCancel(ctx), to, false)
		}
		if err != nil {
			return leftError{err}
		}
		return nil
	}
	if markErr := m.mark(context.WithoutCancel(ctx), from, false); markErr != nil {
		return leftError{errors.Join(err, markErr)}
	}
	return err
}

// runOutside runs a file outside of a transaction. CONCURRENTLY waits for whole transactions of
// others, and blocks nobody.
func (m *migrator) runOutside(ctx context.Context, body string) error {
	if strings.Contains(strings.ToUpper(body), "CONCURRENTLY") {
		if _, err := m.conn.Exec(ctx, "SET lock_timeout = 0"); err != nil {
			return err
		}
		defer func() { // if this fails on the connection, later statements fail on it too
			_, _ = m.conn.Exec(context.WithoutCancel(ctx), "SELECT set_config('lock_timeout', $1, false)", m.lockTimeoutMS())
		}()
	}
	_, err := m.send(ctx, body)
	return err
}

// send sends a file unchanged. ended reports whether one of its statements ended a transaction, or
// rolled back to a savepoint.
func (m *migrator) send(ctx context.Context, body string) (ended bool, err error) {
	results := m.conn.PgConn().Exec(ctx, body)
	for results.NextResult() {
		tag, _ := results.ResultReader().Close() // the same error is returned at the end
		switch tag.String() {
		case "COMMIT", "ROLLBACK", "PREPARE TRANSACTION":
			ended = true
		}
	}
	return ended, results.Close()
}

// mark records the version in a transaction of its own.
func (m *migrator) mark(ctx context.Context, version int, dirty bool) error {
	ctx, cancel := context.WithTimeout(ctx, endMax+m.options.LockTimeout)
	defer cancel()
	if _, err := m.conn.Exec(ctx, "BEGIN"); err != nil {
		return err
	}
	if err := m.write(ctx, version, dirty); err != nil {
		return errors.Join(err, m.end(ctx, "ROLLBACK"))
	}
	return m.end(ctx, "COMMIT")
}

func (m *migrator) write(ctx context.Context, version int, dirty bool) error {
	// Not TRUNCATE, which waits for every reader and blocks every later one.
	_, err := m.conn.Exec(ctx, "DELETE FROM "+m.table)
	if err == nil && (version != none || dirty) {
		_, err = m.conn.Exec(ctx, "INSERT INTO "+m.table+" (version, dirty) VALUES ($1, $2)", version, dirty)
	}
	if err != nil {
		return fmt.Errorf("write the version: %w", err)
	}
	return nil
}

// end ends a transaction, on a context of its own.
func (m *migrator) end(ctx context.Context, sql string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endMax)
	defer cancel()
	_, err := m.conn.Exec(ctx, sql)
	return err
}
