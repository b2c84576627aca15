package postgres

import (
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/paidonce/idempotency/storage/postgres/internal/sealed"
	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

// statements are all statements that a store sends on the path of a request that is not resumable;
// [openStatements] has the others. Every name in them is qualified, so that a handler's SET LOCAL
// search_path can't redirect them.
type statements struct {
	wire.Set // those that are prepared on each connection of the pool
	schema   string
	table    string // sanitized
	begin    wire.Statement
	// lock tries to lock. It also returns the transaction's timestamp, and whether COMMIT waits for
	// standbys.
	lock   wire.Statement
	lockAt wire.Statement // as lock; also returns the position of the server's log
	// lookUp always returns a row: whether row-level security applies, then the record or NULLs.
	lookUp wire.Statement
	peek   wire.Statement // the look-up of a replay, outside of a transaction

	guard       wire.Statement // fails if the transaction is not the one of the claim
	constraints wire.Statement // runs the constraints and triggers that were deferred to COMMIT
	insert      wire.Statement // fails unless the record was written exactly as sent
	commit      wire.Statement
	rollback    wire.Statement
	outbox      wire.Statement // writes the messages that the handler published
	barrier     wire.Statement // makes the next COMMIT, and so all earlier ones, wait for the standbys

	// Of the resolver, on connections of its own: never prepared.
	resolveBegin wire.Statement
	resolveSet   wire.Statement
	resolveAt    wire.Statement // the position of the server's log
	resolveLock  wire.Statement // waits
	resolveTime  wire.Statement // the server's clock
}

// logPosition is the position of the server's log: the name of its file, which begins with the
// timeline in hexadecimal, and the flush position. The log up to there survives a crash of the
// server. The log between there and the write position might not. Both functions fail on a standby.
const logPosition = "pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_flush_lsn()), pg_catalog.pg_current_wal_flush_lsn()"

// synchronousStandbys is a SQL expression that is true if COMMIT waits for standbys.
const synchronousStandbys = "pg_catalog.current_setting('synchronous_standby_names') OPERATOR(pg_catalog.<>) ''"

// hearWarnings makes the server send warnings, whatever the session or the handler set. If the wait
// of a COMMIT for standbys was canceled, a warning is the only sign.
const hearWarnings = " AND pg_catalog.set_config('client_min_messages', 'warning', true) IS NOT NULL"

func newStatements(o *Options) statements {
	table := pgx.Identifier{o.Schema, TableName}.Sanitize()
	// With a pooler that hands out a server connection per transaction, settings last as long as
	// the transaction.
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
		begin: wire.Statement{SQL: "BEGIN ISOLATION LEVEL " + string(o.Isolation) + " READ WRITE"},
		lock: wire.Statement{
			SQL:  "SELECT pg_catalog.pg_try_advisory_xact_lock($1), pg_catalog.transaction_timestamp(), " + synchronousStandbys + settings,
			OIDs: []uint32{pgtype.Int8OID},
		},
		lockAt: wire.Statement{
			SQL:  "SELECT pg_catalog.pg_try_advisory_xact_lock($1), pg_catalog.transaction_timestamp(), " + synchronousStandbys + ", " + logPosition + settings,
			OIDs: []uint32{pgtype.Int8OID},
		},
		// A statement of its own: its snapshot must be younger than the lock. Otherwise it misses a
		// record if the recording transaction released the lock in between, and the handler runs
		// twice.
		lookUp: wire.Statement{
			SQL:  "SELECT " + hidden + ", " + recordColumns + lookedUp,
			OIDs: []uint32{pgtype.TextOID, pgtype.TextOID},
		},
		peek: wire.Statement{
			SQL:  "SELECT " + hidden + ", " + recordColumns + ", pg_catalog.pg_is_in_recovery(), " + synchronousStandbys + lookedUp,
			OIDs: []uint32{pgtype.TextOID, pgtype.TextOID},
		},
		// The handler's triggers that run inside COMMIT could change synchronous_commit after the
		// record set it.
		constraints: wire.Statement{SQL: "SET CONSTRAINTS ALL IMMEDIATE"},
		// created_at is NULL, and so refused, if the transaction is not the one of the claim: then
		// the handler ended ours behind our back. $1 is NULL after a decline, which records in a
		// new transaction. set_config: COMMIT waits for the disk whatever the handler set. The TTL
		// runs from now: a record is not born expired, however long the handler took. A trigger may
		// drop or change the row while the INSERT succeeds, and a deferred trigger may have set the
		// client_encoding, so that the server read another scope: see wire.PlainText. COMMIT is
		// already on its way behind it, so this statement must fail itself, by a division by zero.
		// PostgreSQL refuses a rule, because the INSERT is inside WITH.
		insert: wire.Statement{
			SQL: "WITH written AS (INSERT INTO " + table + " (created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body, trace_id)" +
				" VALUES (CASE WHEN pg_catalog.transaction_timestamp() OPERATOR(pg_catalog.=) COALESCE($1, pg_catalog.transaction_timestamp())" +
				" AND pg_catalog.set_config('synchronous_commit', $2, true) IS NOT NULL" + hearWarnings + " THEN pg_catalog.transaction_timestamp() END," +
				" pg_catalog.clock_timestamp() OPERATOR(pg_catalog.+) ($3 OPERATOR(pg_catalog.*) interval '1 microsecond'), $4, $5, $6, $7, $8, $9, $10, $11, $12)" +
				" RETURNING attempt_id OPERATOR(pg_catalog.=) $6 AND scope OPERATOR(pg_catalog.=) $7 AND key OPERATOR(pg_catalog.=) $8" +
				" AND fingerprint OPERATOR(pg_catalog.=) $9" +
				" AND pg_catalog.pg_client_encoding() OPERATOR(pg_catalog.=) ANY ('{UTF8,SQL_ASCII}'::pg_catalog.name[]) AS same)" +
				" SELECT 1 OPERATOR(pg_catalog./) pg_catalog.count(*) FILTER (WHERE same) FROM written",
			OIDs: []uint32{
				pgtype.TimestamptzOID, pgtype.TextOID, pgtype.Int8OID, pgtype.Int2OID, pgtype.Int2OID, pgtype.UUIDOID,
				pgtype.TextOID, pgtype.TextOID, pgtype.ByteaOID, pgtype.ByteaOID, pgtype.ByteaOID, pgtype.TextOID,
			},
		},
		guard: wire.Statement{
			SQL: "SELECT 1 OPERATOR(pg_catalog./) CASE WHEN pg_catalog.transaction_timestamp() OPERATOR(pg_catalog.=) $1" +
				" AND pg_catalog.set_config('synchronous_commit', $2, true) IS NOT NULL" + hearWarnings + " THEN 1 ELSE 0 END",
			OIDs: []uint32{pgtype.TimestamptzOID, pgtype.TextOID},
		},
		outbox:   outboxStatement(o.Schema),
		commit:   wire.Statement{SQL: "COMMIT"},
		rollback: wire.Statement{SQL: "ROLLBACK"},
		barrier: wire.Statement{
			SQL: "SELECT pg_catalog.set_config('synchronous_commit', $1, true), pg_catalog.set_config('client_min_messages', 'warning', true)," +
				" pg_catalog.pg_logical_emit_message(true, 'idempotency', '')",
			OIDs: []uint32{pgtype.TextOID},
		},
		// READ COMMITTED whatever the store's isolation: the look-up's snapshot must be younger
		// than the lock. READ WRITE fails on a standby.
		resolveBegin: wire.Statement{SQL: "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"},
		resolveSet: wire.Statement{
			SQL: "SELECT pg_catalog.set_config('lock_timeout', $1, true), pg_catalog.set_config('statement_timeout', '0', true), " +
				"pg_catalog.pg_is_in_recovery(), " + synchronousStandbys + resolveSettings,
			OIDs: []uint32{pgtype.TextOID},
		},
		resolveAt:   wire.Statement{SQL: "SELECT " + logPosition},
		resolveLock: wire.Statement{SQL: "SELECT pg_catalog.pg_advisory_xact_lock($1)", OIDs: []uint32{pgtype.Int8OID}},
		resolveTime: wire.Statement{SQL: "SELECT pg_catalog.clock_timestamp()"},
	}
	s.Set = wire.NewSet(s.table, sealed.DeferredMark, &s.begin, &s.lock, &s.lockAt, &s.lookUp, &s.peek, &s.guard, &s.constraints, &s.insert, &s.commit, &s.rollback)
	return s
}
