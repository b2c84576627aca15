package postgres

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/relay"
	"github.com/paidonce/idempotency/storage/postgres/internal/locks"
	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

// The outbox has the messages that are committed and not yet with the broker. This file writes
// them, in the flush of the handler's COMMIT, and reads them for a relay.

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
// the handler has taken, so the ids of messages of handlers that lock a common row have the order
// of the commits. COMMIT is sent behind the statement in the same flush, so the statement itself
// must fail if a trigger drops a row.
func outboxStatement(schema string) wire.Statement {
	return wire.Statement{
		Keep: true,
		SQL: "WITH written AS (INSERT INTO " + pgx.Identifier{schema, OutboxTable}.Sanitize() + " (created_at, shard, message_id, topic, key, headers, body)" +
			" SELECT pg_catalog.clock_timestamp(), shard, id, topic, key, headers, body FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2)," +
			" pg_catalog.unnest($3), pg_catalog.unnest($4), pg_catalog.unnest($5), pg_catalog.unnest($6)) WITH ORDINALITY AS m (shard, id, topic, key, headers, body, place) ORDER BY place RETURNING 1)" +
			" SELECT 1 OPERATOR(pg_catalog./) CASE WHEN pg_catalog.count(*) OPERATOR(pg_catalog.=) pg_catalog.cardinality($2) THEN 1 ELSE 0 END FROM written",
		OIDs: []uint32{pgtype.Int2ArrayOID, pgtype.UUIDArrayOID, pgtype.TextArrayOID, pgtype.ByteaArrayOID, pgtype.ByteaArrayOID, pgtype.ByteaArrayOID},
	}
}

// deferred returns the calls that the handler left for the last flush: the statements of DeferExec,
// and one that writes its messages and more, which the store publishes. together is the number of
// bytes of parameters since the last Sync; refused is the reason if a statement or message is
// missing.
func (a *attempt) deferred(more ...message.Message) (calls []wire.Call, together int, refused error) {
	calls, together, refused = a.tx.Deferred()
	if messages := slices.Concat(a.tx.Messages(), more); len(messages) > 0 {
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

// nudge wakes the readers of the outbox in this process if the handlers of the transaction, which
// is committed, published messages.
func (a *attempt) nudge() {
	if len(a.tx.Messages()) > 0 {
		a.store.nudges.send()
	}
}

// nudges tell the readers of the outbox in this process that there are messages.
type nudges struct {
	mu      sync.Mutex
	readers []chan struct{}
}

// reader returns a new channel.
func (n *nudges) reader() <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	c := make(chan struct{}, 1)
	n.readers = append(n.readers, c)
	return c
}

func (n *nudges) send() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range n.readers {
		select {
		case c <- struct{}{}:
		default: // it has a value already
		}
	}
}

// Outbox is the outbox of a store, for package relay. It is safe for concurrent use.
//
// Each look begins at the front of a shard, and not behind the last id that was deleted: a
// transaction that drew a lower id may commit later, and the next message of its key would overtake
// it.
type Outbox struct {
	store  *Store
	table  string // sanitized
	except []string
	nudged func() <-chan struct{}
}

// Outbox returns the outbox, without the messages of some topics: those that a [Queue] handles.
func (s *Store) Outbox(except ...string) *Outbox {
	if except == nil {
		except = []string{} // nil would be NULL
	}
	return &Outbox{store: s, table: pgx.Identifier{s.options.Schema, OutboxTable}.Sanitize(), except: except, nudged: sync.OnceValue(s.nudges.reader)}
}

var _ relay.Outbox = (*Outbox)(nil)

// ready is a condition on a message m: it is not refused, and no refused one of its topic and key
// is in front of it.
func (o *Outbox) ready() string {
	return "m.refused IS NULL AND NOT EXISTS (SELECT FROM " + o.table + " AS p WHERE p.refused IS NOT NULL AND p.shard = m.shard AND p.topic = m.topic AND sha256(p.key) = sha256(m.key) AND p.id < m.id)"
}

// Waiting implements [relay.Outbox].
func (o *Outbox) Waiting(ctx context.Context) ([]int, error) {
	ctx, cancel := o.store.limited(ctx)
	defer cancel()
	rows, err := o.store.pool.Query(ctx, "SELECT shard FROM generate_series(0, $1::int - 1) AS s (shard)"+
		" WHERE EXISTS (SELECT FROM "+o.table+" AS m WHERE m.shard = s.shard AND m.topic <> ALL ($2) AND "+o.ready()+")", OutboxShards, o.except)
	if err != nil {
		return nil, wire.SQLError(err)
	}
	shards, err := pgx.CollectRows(rows, pgx.RowTo[int])
	if err != nil {
		return nil, wire.SQLError(err)
	}
	return shards, nil
}

// Nudged implements [relay.Outbox]. Dead messages that a consumer publishes give no value: the next
// look finds them.
func (o *Outbox) Nudged() <-chan struct{} { return o.nudged() }

// RefusedBytesMax is the maximum length of the broker's reason that is kept with a refused message.
const RefusedBytesMax = 500

// Drain implements [relay.Outbox]. One transaction takes the shard's lock and deletes the messages
// that were published. If its COMMIT fails, they stay, and are published again.
func (o *Outbox) Drain(ctx context.Context, shard int, limits relay.Limits, publish func(context.Context, []message.Message) []error) (d relay.Drained, err error) {
	if shard < 0 || shard >= OutboxShards {
		return d, fmt.Errorf("drain the outbox: there is no shard %d", shard)
	}
	reading, cancel := o.store.limited(ctx) // a limit for BEGIN and all reads together
	defer cancel()
	tx, err := o.store.pool.BeginTx(reading, pgx.TxOptions{IsoLevel: pgx.ReadCommitted, AccessMode: pgx.ReadWrite})
	if err != nil {
		return d, fmt.Errorf("drain the outbox: %w", wire.SQLError(err))
	}
	defer o.rollback(ctx, tx)
	if d, err = o.drain(ctx, reading, tx, shard, limits, publish); err != nil {
		return d, fmt.Errorf("drain the outbox: %w", wire.SQLError(err))
	}
	return d, nil
}

// rollback ends the transaction if it was not committed.
func (o *Outbox) rollback(ctx context.Context, tx pgx.Tx) {
	ctx, cancel := o.store.limited(context.WithoutCancel(ctx))
	defer cancel()
	_ = tx.Rollback(ctx) // after COMMIT it does nothing; after a failure that error is returned
}

func (o *Outbox) drain(ctx, reading context.Context, tx pgx.Tx, shard int, limits relay.Limits, publish func(context.Context, []message.Message) []error) (d relay.Drained, err error) {
	// A statement of its own: the snapshot of the next one must be younger than the lock.
	var held bool
	if err := tx.QueryRow(reading, "SELECT pg_try_advisory_xact_lock($1)", locks.Shard(o.store.table, shard)).Scan(&held); err != nil || !held {
		return relay.Drained{Held: err == nil}, err
	}
	rows, err := tx.Query(reading, "SELECT id, message_id::text, topic, key, headers, body, GREATEST(extract(epoch FROM clock_timestamp() - created_at), 0)::float8 FROM ("+
		"SELECT *, sum(octet_length(body)) OVER (ORDER BY id) - octet_length(body) AS before FROM (SELECT * FROM "+o.table+" AS m WHERE shard = $1 AND topic <> ALL ($4) AND "+o.ready()+
		" ORDER BY id LIMIT $2) AS oldest) AS sized WHERE before < $3 ORDER BY id", shard, limits.Messages, limits.Bytes, o.except)
	if err != nil {
		return d, err
	}
	var ids []int64
	messages, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (m message.Message, err error) {
		var id int64
		var headers []byte
		var age float64
		if err := row.Scan(&id, &m.ID, &m.Topic, &m.Key, &headers, &m.Body, &age); err != nil {
			return m, err
		}
		ids = append(ids, id)
		if d.Age == 0 {
			d.Age = time.Duration(age * float64(time.Second))
		}
		m.Header, err = decodeHeaders(headers)
		return m, err
	})
	if err != nil || len(messages) == 0 {
		return d, err
	}
	results := publish(ctx, messages)
	if len(results) != len(messages) {
		return d, fmt.Errorf("the publisher returned %d results for %d messages", len(results), len(messages))
	}
	// Messages that the broker has confirmed are deleted, even if ctx has ended meanwhile.
	ctx, cancel := o.store.limited(context.WithoutCancel(ctx))
	defer cancel()
	var published, refused []int64
	var reasons []string
	for i, result := range results {
		switch {
		case result == nil:
			published = append(published, ids[i])
			continue
		case errors.Is(result, relay.ErrRefused):
			refused, reasons = append(refused, ids[i]), append(reasons, reasonOf(result))
		default:
			d.Failed++
		}
		if d.Err == nil {
			d.Err = result
		}
	}
	if len(published) > 0 {
		tag, err := tx.Exec(ctx, "DELETE FROM "+o.table+" WHERE shard = $1 AND id = ANY ($2)", shard, published)
		if err == nil && tag.RowsAffected() != int64(len(published)) {
			err = fmt.Errorf("%d of %d published messages were not deleted: drop the rules and triggers of %s", int64(len(published))-tag.RowsAffected(), len(published), OutboxTable)
		}
		if err != nil {
			return d, err
		}
	}
	if len(refused) > 0 {
		if _, err := tx.Exec(ctx, "UPDATE "+o.table+" AS m SET refused = r.reason FROM unnest($2::bigint[], $3::text[]) AS r (id, reason) WHERE m.shard = $1 AND m.id = r.id", shard, refused, reasons); err != nil {
			return d, err
		}
	}
	if err := tx.Commit(ctx); err != nil {
		return d, err
	}
	d.Published, d.Refused = len(published), len(refused)
	return d, nil
}

// reasonOf returns the broker's reason as it is kept with a refused message.
func reasonOf(err error) string {
	text := strings.Map(func(r rune) rune { // Map also replaces bytes that are not UTF-8
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, err.Error())
	if len(text) > RefusedBytesMax {
		text = strings.ToValidUTF8(text[:RefusedBytesMax], "")
	}
	return text
}
