package postgres

import (
	"hash/fnv"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

// The outbox has the messages that are committed and not yet with the broker. This file writes
// them, in the flush of the handler's COMMIT.

// OutboxShards is the number of parts of the outbox. Messages of one topic and key are in one
// shard, and one relay at a time empties a shard, so they keep their order.
const OutboxShards = 16

// OutboxTable is the name of the outbox.
const OutboxTable = "message_outbox"

// shardOf returns the shard of a message. It must never change: two versions side by side would
// give the messages of one key to two shards.
func shardOf(m *message.Message) int16 {
	hash := fnv.New32a()
	_, _ = hash.Write(append([]byte(m.Topic), 0))
	if m.Key == nil {
		_, _ = hash.Write([]byte(m.ID)) // no order to keep
	} else {
		_, _ = hash.Write(m.Key)
	}
	return int16(hash.Sum32() % OutboxShards)
}

// outboxStatement writes messages. The ids of the rows are drawn here, after every row lock that
// the handler has taken, so messages of handlers that lock a common row have them in the order of
// their commits. COMMIT is on its way behind the statement, so it must fail itself if a trigger
// drops a row.
func outboxStatement(schema string) wire.Statement {
	return wire.Statement{
		SQL: "WITH written AS (INSERT INTO " + pgx.Identifier{schema, OutboxTable}.Sanitize() + " (created_at, shard, message_id, topic, key, headers, body)" +
			" SELECT pg_catalog.clock_timestamp(), shard, id, topic, key, headers, body FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2)," +
			" pg_catalog.unnest($3), pg_catalog.unnest($4), pg_catalog.unnest($5), pg_catalog.unnest($6)) WITH ORDINALITY AS m (shard, id, topic, key, headers, body, place) ORDER BY place RETURNING 1)" +
			" SELECT 1 OPERATOR(pg_catalog./) CASE WHEN pg_catalog.count(*) OPERATOR(pg_catalog.=) pg_catalog.cardinality($2) THEN 1 ELSE 0 END FROM written",
		OIDs: []uint32{pgtype.Int2ArrayOID, pgtype.UUIDArrayOID, pgtype.TextArrayOID, pgtype.ByteaArrayOID, pgtype.ByteaArrayOID, pgtype.ByteaArrayOID},
	}
}

// deferred returns what the handler left for the last flush: the statements of DeferExec, and one
// that writes its messages. together is the number of bytes of parameters since the last Sync;
// refused says why something is missing.
func (a *attempt) deferred() (calls []wire.Call, together int, refused error) {
	calls, together, refused = a.tx.Deferred()
	if messages := a.tx.Messages(); len(messages) > 0 {
		call, size := a.outboxCall(messages)
		if together += size; together > wire.TogetherBytesMax {
			call.Apart, together = true, size
		}
		calls = append(calls[:len(calls):len(calls)], call)
	}
	return calls, together, refused
}

// outboxCall returns the call that writes the messages, and the bytes of its parameters.
func (a *attempt) outboxCall(messages []message.Message) (call wire.Call, size int) {
	const columns = 6
	var values [columns][][]byte
	for i := range messages {
		m := &messages[i]
		shard := wire.EncodeInt2(shardOf(m))
		id, _ := parseUUID(m.ID) // message.Publish made it
		for at, value := range [columns][]byte{shard[:], id[:], []byte(m.Topic), m.Key, encodeHeaders(nil, m.Header), notNull(m.Body)} {
			values[at] = append(values[at], value)
		}
	}
	params := make([][]byte, columns)
	for at, oid := range [columns]uint32{pgtype.Int2OID, pgtype.UUIDOID, pgtype.TextOID, pgtype.ByteaOID, pgtype.ByteaOID, pgtype.ByteaOID} {
		params[at] = wire.EncodeArray(oid, values[at])
		size += len(params[at])
	}
	return wire.Call{Statement: &a.store.statements.outbox, Params: params, Meaning: outboxMeaning}, size
}

// outboxMeaning returns the sentinel for PostgreSQL's error in the outbox's statement.
func outboxMeaning(err *pgconn.PgError) (sentinel, explained error) {
	switch {
	case err.Code == "22012" && err.Where == "":
		return idempotency.ErrAborted, explain(err, "a trigger on "+OutboxTable+" dropped a message: drop the trigger")
	case err.Code == "42P01":
		return idempotency.ErrAborted, explain(err, "there is no outbox: apply the migrations (idemctl migrate up)")
	case err.Code == "42501":
		return idempotency.ErrAborted, explain(err, "the role may not publish: GRANT INSERT ON "+OutboxTable+" to it")
	}
	return classify(err), err
}
