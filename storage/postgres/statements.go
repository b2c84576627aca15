package postgres

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
)

// statement is one of our own statements. Parameters and results are in binary format throughout.
type statement struct {
	number int // its place in the names of a connection that has it prepared; 0: it is never prepared
	sql    string
	oids   []uint32 // of the parameters, so that nothing has to be described first
	name   string   // of a deferred statement that is prepared on its connection
}

// statements are all that a store ever sends on the path of a request. Every name in them is qualified: a handler's
// SET LOCAL search_path can't redirect them.
type statements struct {
	mark   string // the key of their *preparedNames in a connection's custom data
	schema string
	table  string // sanitized
	begin  statement
	lock   statement // try to lock; also tells the transaction's timestamp, and whether COMMIT waits for standbys
	lockAt statement // as lock; also returns the position of the server's log
	lookUp statement // always returns a row: whether row-level security applies, then the record or NULLs
	peek   statement // the look-up of a replay, outside of a transaction

	guard       statement // fails if the transaction is not the one of the claim
	constraints statement // runs the constraints and triggers that were deferred to COMMIT
	insert      statement // fails unless the record was written exactly as sent
	commit      statement
	rollback    statement
	barrier     statement // makes the next COMMIT, and so all earlier ones, wait for the standbys

	// Of the resolver, on connections of its own: never prepared.
	resolveBegin statement
	resolveSet   statement
	resolveAt    statement // the position of the server's log
	resolveLock  statement // waits
	resolveTime  statement // the server's clock
}

// insertParams is how many parameters the longest of them has.
const insertParams = 12

var binaryFormat = []int16{1} // stands for all parameters, and for all columns

// recordColumns are what [decodeRecord] reads.
const (
	recordColumns      = "fingerprint_version, fingerprint, attempt_id, status, headers, body, trace_id, created_at, expires_at"
	recordColumnsCount = 9
)

// logPosition is the position of the server's log: the name of its file, which begins with the
// timeline in hexadecimal, and the flush position. The log up to there survives a crash of the
// server; up to the write position it may not. Both functions fail on a standby.
const logPosition = "pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_flush_lsn()), pg_catalog.pg_current_wal_flush_lsn()"

// synchronousStandbys is true where COMMIT waits for standbys.
const synchronousStandbys = "pg_catalog.current_setting('synchronous_standby_names') OPERATOR(pg_catalog.<>) ''"

// hearWarnings has the server send the warning that is all a COMMIT says whose wait for standbys was canceled, whatever
// the session or the handler set.
const hearWarnings = " AND pg_catalog.set_config('client_min_messages', 'warning', true) IS NOT NULL"

func newStatements(o *Options) statements {
	table := pgx.Identifier{o.Schema, TableName}.Sanitize()
	// With a pooler that hands out a server connection per transaction, settings live and die with the transaction.
	settings := ", " + o.transactionTimeout()
	resolveSettings := settings
	if o.TransactionPooling {
		resolveSettings += fmt.Sprintf(", pg_catalog.set_config('idle_in_transaction_session_timeout', '%d', true)", o.IdleInTransactionTimeout.Milliseconds())
		for _, setting := range o.settings() {
			settings += fmt.Sprintf(", pg_catalog.set_config('%s', '%s', true)", setting.name, setting.value)
		}
	}
	// While policies apply to the current role, a record that is not seen may still be there. The
	// outer join returns a row that says so even if there is no record, in the same statement.
	hidden := "pg_catalog.row_security_active('" + table + "'::pg_catalog.regclass)"
	lookedUp := " FROM (SELECT) AS one LEFT JOIN " + table + " ON scope = $1 AND key = $2"
	s := statements{
		schema: o.Schema, table: table,
		begin: statement{sql: "BEGIN ISOLATION LEVEL " + string(o.Isolation) + " READ WRITE"},
		lock: statement{
			sql:  "SELECT pg_catalog.pg_try_advisory_xact_lock($1), pg_catalog.transaction_timestamp(), " + synchronousStandbys + settings,
			oids: []uint32{pgtype.Int8OID},
		},
		lockAt: statement{
			sql:  "SELECT pg_catalog.pg_try_advisory_xact_lock($1), pg_catalog.transaction_timestamp(), " + synchronousStandbys + ", " + logPosition + settings,
			oids: []uint32{pgtype.Int8OID},
		},
		// A statement of its own: its snapshot must be younger than the lock, or it misses a record whose transaction
		// let the lock go in between, and the handler runs twice.
		lookUp: statement{
			sql:  "SELECT " + hidden + ", " + recordColumns + lookedUp,
			oids: []uint32{pgtype.TextOID, pgtype.TextOID},
		},
		peek: statement{
			sql:  "SELECT " + hidden + ", " + recordColumns + ", pg_catalog.pg_is_in_recovery(), " + synchronousStandbys + lookedUp,
			oids: []uint32{pgtype.TextOID, pgtype.TextOID},
		},
		// The handler's triggers that run inside COMMIT could change synchronous_commit after the
		// record set it.
		constraints: statement{sql: "SET CONSTRAINTS ALL IMMEDIATE"},
		// created_at is NULL, and so refused, if the transaction is not the one of the claim: then
		// the handler ended ours behind our back. $1 is NULL after a decline, which records in a
		// new transaction. set_config: COMMIT waits for the disk whatever the handler set. The TTL
		// runs from now: a record is not born expired, however long the handler took. A trigger may
		// drop or change the row while the INSERT succeeds, and a deferred trigger may have set the
		// client_encoding, so that the server read another scope: see plainText. COMMIT is already on
		// its way behind it, so this statement must fail itself, by a division by zero. PostgreSQL
		// refuses a rule, because the INSERT is inside WITH.
		insert: statement{
			sql: "WITH written AS (INSERT INTO " + table + " (created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body, trace_id)" +
				" VALUES (CASE WHEN pg_catalog.transaction_timestamp() OPERATOR(pg_catalog.=) COALESCE($1, pg_catalog.transaction_timestamp())" +
				" AND pg_catalog.set_config('synchronous_commit', $2, true) IS NOT NULL" + hearWarnings + " THEN pg_catalog.transaction_timestamp() END," +
				" pg_catalog.clock_timestamp() OPERATOR(pg_catalog.+) ($3 OPERATOR(pg_catalog.*) interval '1 microsecond'), $4, $5, $6, $7, $8, $9, $10, $11, $12)" +
				" RETURNING attempt_id OPERATOR(pg_catalog.=) $6 AND scope OPERATOR(pg_catalog.=) $7 AND key OPERATOR(pg_catalog.=) $8" +
				" AND fingerprint OPERATOR(pg_catalog.=) $9" +
				" AND pg_catalog.pg_client_encoding() OPERATOR(pg_catalog.=) ANY ('{UTF8,SQL_ASCII}'::pg_catalog.name[]) AS same)" +
				" SELECT 1 OPERATOR(pg_catalog./) pg_catalog.count(*) FILTER (WHERE same) FROM written",
			oids: []uint32{
				pgtype.TimestamptzOID, pgtype.TextOID, pgtype.Int8OID, pgtype.Int2OID, pgtype.Int2OID, pgtype.UUIDOID,
				pgtype.TextOID, pgtype.TextOID, pgtype.ByteaOID, pgtype.ByteaOID, pgtype.ByteaOID, pgtype.TextOID,
			},
		},
		guard: statement{
			sql: "SELECT 1 OPERATOR(pg_catalog./) CASE WHEN pg_catalog.transaction_timestamp() OPERATOR(pg_catalog.=) $1" +
				" AND pg_catalog.set_config('synchronous_commit', $2, true) IS NOT NULL" + hearWarnings + " THEN 1 ELSE 0 END",
			oids: []uint32{pgtype.TimestamptzOID, pgtype.TextOID},
		},
		commit:   statement{sql: "COMMIT"},
		rollback: statement{sql: "ROLLBACK"},
		barrier: statement{
			sql: "SELECT pg_catalog.set_config('synchronous_commit', $1, true), pg_catalog.set_config('client_min_messages', 'warning', true)," +
				" pg_catalog.pg_logical_emit_message(true, 'idempotency', '')",
			oids: []uint32{pgtype.TextOID},
		},
		// READ COMMITTED whatever the store's isolation: the look-up's snapshot must be younger than the lock. READ WRITE
		// fails on a standby.
		resolveBegin: statement{sql: "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"},
		resolveSet: statement{
			sql: "SELECT pg_catalog.set_config('lock_timeout', $1, true), pg_catalog.set_config('statement_timeout', '0', true), " +
				"pg_catalog.pg_is_in_recovery(), " + synchronousStandbys + resolveSettings,
			oids: []uint32{pgtype.TextOID},
		},
		resolveAt:   statement{sql: "SELECT " + logPosition},
		resolveLock: statement{sql: "SELECT pg_catalog.pg_advisory_xact_lock($1)", oids: []uint32{pgtype.Int8OID}},
		resolveTime: statement{sql: "SELECT pg_catalog.clock_timestamp()"},
	}
	texts := sha256.New()
	for i, one := range s.all() {
		one.number = i + 1
		sum := sha256.Sum256([]byte(one.sql))
		_, _ = texts.Write(sum[:]) // a hash never fails
	}
	s.mark = preparedMark + hex.EncodeToString(texts.Sum(nil))
	return s
}

func (s *statements) all() []*statement {
	return []*statement{&s.begin, &s.lock, &s.lockAt, &s.lookUp, &s.peek, &s.guard, &s.constraints, &s.insert, &s.commit, &s.rollback}
}

// preparedMark begins the keys under which a connection's custom data says that a store's statements are prepared on
// it, and by what names: a *preparedNames. The rest of the key is of their texts: those of another schema or isolation
// level are others, and both may be prepared.
const preparedMark = "paidonce/idempotency/prepared/"

// preparedNames are the names of prepared statements, by number; that of number 0 is empty.
type preparedNames struct{ names []string }

// newNames draws names that nobody else knows. EXECUTE is SQL text as any other to the guard that reads what a handler
// sends, and COMMIT is among the statements.
func (s *statements) newNames() *preparedNames {
	prefix := "idempotency_" + rand.Text() + "_"
	p := &preparedNames{names: []string{""}}
	for _, one := range s.all() {
		p.names = append(p.names, prefix+strconv.Itoa(one.number))
	}
	return p
}

// namesOn returns the names of these statements on a connection, nil where they are not prepared there.
func (s *statements) namesOn(conn *pgconn.PgConn) *preparedNames {
	p, _ := conn.CustomData()[s.mark].(*preparedNames)
	return p
}

// othersOn reports whether the statements of a store with other options are prepared on a connection, and these are not.
func (s *statements) othersOn(conn *pgconn.PgConn) (others bool) {
	for mark := range conn.CustomData() {
		others = others || strings.HasPrefix(mark, preparedMark)
	}
	return others && s.namesOn(conn) == nil
}

// prepare prepares the statements on a new connection, in one round trip. The connection is usable
// without them: they are then sent as text, which adds no round trip. So a missing table or column
// is no error, because a migration, or Check, may need the connection. Neither is a table that has a rule, or that
// somebody keeps locked for longer than timeout, because the connection may be for a request that
// needs no record. If the table has row-level security, they are sent as text too: see
// [ErrRowSecurity].
func (s *statements) prepare(ctx context.Context, conn *pgconn.PgConn, p *preparedNames, timeout time.Duration) error {
	pipeline := conn.StartPipeline(ctx)
	// Local to the transaction: all messages before the Sync run in one.
	pipeline.SendQueryParams("SELECT pg_catalog.set_config('lock_timeout', $1, true)",
		[][]byte{strconv.AppendInt(nil, timeout.Milliseconds(), 10)}, []uint32{pgtype.TextOID}, nil, nil)
	for _, one := range s.all() {
		pipeline.SendPrepare(p.names[one.number], one.sql, one.oids)
	}
	// Read after the statements were parsed, and regardless of the roles that it applies to.
	pipeline.SendQueryParams("SELECT relrowsecurity FROM pg_catalog.pg_class WHERE oid = '"+s.table+"'::pg_catalog.regclass", nil, nil, nil, nil)
	rowSecurity := "t"
	err := pipeline.Sync()
	for err == nil {
		var result any
		if result, err = pipeline.GetResults(); result == nil {
			break
		}
		if reader, ok := result.(*pgconn.ResultReader); ok {
			if reader.NextRow() { // the last query's value remains
				rowSecurity = string(reader.Values()[0])
			}
			_, err = reader.Close()
		}
	}
	if closeErr := pipeline.Close(); err == nil {
		err = closeErr
	}
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		switch pgErr.Code {
		case "42P01", "42703", "3F000", "42883", "0A000", "55P03", "57014": // no table, column, schema or function, a rule, lock_timeout, statement_timeout
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("idempotency/postgres: prepare: %w", sqlError(err))
	}
	if rowSecurity == "f" {
		conn.CustomData()[s.mark] = p
	}
	return nil
}

// forgetPrepared has our statements sent as text from now on, and deferred ones prepared once more.
func (s *statements) forgetPrepared(conn *pgconn.PgConn) {
	delete(conn.CustomData(), s.mark)
	delete(conn.CustomData(), deferredMark)
}

// unprepared reports whether a prepared statement can't be used any more: somebody deallocated it on this connection,
// or the table changed under its plan.
func unprepared(err error) bool {
	if err == nil { // saves the allocation below
		return false
	}
	var pgErr *pgconn.PgError
	return stalePlan(err) || errors.As(err, &pgErr) && pgErr.Code == "26000"
}

// The encodings of PostgreSQL's binary format that our statements need. Text, bytea and uuid are their bytes.

func encodeInt2(v int16) (encoded [2]byte) {
	binary.BigEndian.PutUint16(encoded[:], uint16(v))
	return encoded
}

func encodeInt8(v int64) (encoded [8]byte) {
	binary.BigEndian.PutUint64(encoded[:], uint64(v))
	return encoded
}

// decoder reads the columns of a row one after another and keeps the first error.
type decoder struct {
	values [][]byte
	err    error
}

func (d *decoder) next(bytes int) []byte {
	if d.err == nil && len(d.values) == 0 {
		d.err = errors.New("row is too short")
	}
	if d.err != nil {
		return make([]byte, max(bytes, 0))
	}
	value := d.values[0]
	d.values = d.values[1:]
	if bytes >= 0 && len(value) != bytes {
		d.err = errors.New("column has " + strconv.Itoa(len(value)) + " bytes instead of " + strconv.Itoa(bytes))
		return make([]byte, bytes)
	}
	return value
}

func (d *decoder) bool() bool { return d.next(1)[0] != 0 }

func (d *decoder) int2() int16 {
	b := d.next(2)
	return int16(b[0])<<8 | int16(b[1])
}

// bytes returns a copy: the connection's buffer is used again.
func (d *decoder) bytes() []byte { return append([]byte{}, d.next(-1)...) }

// position reads the position of the server's log.
func (d *decoder) position() (timeline uint32, position uint64) {
	const digits = 24 // in the name of a log file
	name := d.next(digits)
	position = binary.BigEndian.Uint64(d.next(8))
	for _, digit := range name[:8] {
		switch {
		case digit >= '0' && digit <= '9':
			timeline = timeline<<4 | uint32(digit-'0')
		case digit >= 'A' && digit <= 'F':
			timeline = timeline<<4 | uint32(digit-'A'+10)
		default:
			d.err = cmp.Or(d.err, errors.New("name of a file of the log is not hexadecimal"))
		}
	}
	return timeline, position
}

// timestamp reads microseconds since the year 2000.
func (d *decoder) timestamp() time.Time {
	var us int64
	for _, b := range d.next(8) {
		us = us<<8 | int64(b)
	}
	return time.UnixMicro(us + 946_684_800_000_000).UTC()
}
