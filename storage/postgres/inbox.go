package postgres

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/storage/postgres/internal/locks"
	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

// The inbox has the positions of consumers, the records of the messages that they handled (in
// idempotency_keys), and the messages that are parked. A batch is one transaction: this file has
// its protocol, as attempt.go has that of a request.

// Tables of package consumer.
const (
	OffsetsTable = "message_offsets"
	ParkedTable  = "message_parked"
)

// Inbox is the inbox of a store, for package consumer. It is safe for concurrent use.
type Inbox struct {
	store      *Store
	offsets    string // sanitized
	parked     string // sanitized
	statements inboxStatements
}

var _ consumer.Store = (*Inbox)(nil)

// inboxStatements are prepared by their first use on a connection, except park, which is rare: so a
// service without consumers needs neither them nor their tables.
type inboxStatements struct {
	position wire.Statement
	known    wire.Statement
	records  wire.Statement
	park     wire.Statement
	move     wire.Statement
}

// Inbox returns the inbox.
func (s *Store) Inbox() *Inbox {
	i := &Inbox{store: s, offsets: pgx.Identifier{s.options.Schema, OffsetsTable}.Sanitize(), parked: pgx.Identifier{s.options.Schema, ParkedTable}.Sanitize()}
	keys := s.statements.table
	const counted = " SELECT 1 OPERATOR(pg_catalog./) CASE WHEN pg_catalog.count(*) OPERATOR(pg_catalog.=) "
	i.statements = inboxStatements{
		position: wire.Statement{
			Keep: true,
			SQL: "SELECT next_offset, incarnation, deaths FROM " + i.offsets +
				" WHERE consumer OPERATOR(pg_catalog.=) $1 AND source OPERATOR(pg_catalog.=) $2 AND partition OPERATOR(pg_catalog.=) $3",
			OIDs: []uint32{pgtype.TextOID, pgtype.TextOID, pgtype.Int4OID},
		},
		// It returns one character for each message, in their order: see consumer.Known. OFFSET 0
		// makes the server look each id up by itself: a plan that joins the two sides, made while the
		// table was small, would read every record of the consumer. LIMIT leaves no message out:
		// without it the planner expects ten, and plans again for each batch of fewer.
		known: wire.Statement{
			Keep: true,
			SQL: "SELECT pg_catalog.row_security_active('" + keys + "'::pg_catalog.regclass), pg_catalog.string_agg(CASE" +
				" WHEN k.fingerprint_version OPERATOR(pg_catalog.=) 1 AND k.fingerprint OPERATOR(pg_catalog.=) m.fingerprint THEN '1'" +
				" WHEN NOT EXISTS (SELECT FROM " + i.parked + " AS p WHERE p.consumer OPERATOR(pg_catalog.=) $2) THEN CASE WHEN k.key IS NULL THEN '0' ELSE '2' END" + // runs once
				" WHEN EXISTS (SELECT FROM " + i.parked + " AS p WHERE p.consumer OPERATOR(pg_catalog.=) $2 AND p.message_id OPERATOR(pg_catalog.=) m.id) THEN '3'" +
				" WHEN k.key IS NOT NULL THEN '2'" + // after '3': a mismatch is parked itself, and only once
				" WHEN $7 AND EXISTS (SELECT FROM " + i.parked + " AS p WHERE p.consumer OPERATOR(pg_catalog.=) $2 AND p.topic OPERATOR(pg_catalog.=) m.topic AND pg_catalog.sha256(p.key) OPERATOR(pg_catalog.=) pg_catalog.sha256(m.key)) THEN '4'" +
				" ELSE '0' END, '' ORDER BY m.place)" +
				" FROM (SELECT * FROM ROWS FROM (pg_catalog.unnest($3), pg_catalog.unnest($4), pg_catalog.unnest($5), pg_catalog.unnest($6)) WITH ORDINALITY LIMIT pg_catalog.cardinality($3)) AS m (id, fingerprint, topic, key, place)" +
				" LEFT JOIN LATERAL (SELECT key, fingerprint_version, fingerprint FROM " + keys + " WHERE scope OPERATOR(pg_catalog.=) $1 AND key OPERATOR(pg_catalog.=) m.id OFFSET 0) AS k ON true",
			OIDs: []uint32{pgtype.TextOID, pgtype.TextOID, pgtype.TextArrayOID, pgtype.ByteaArrayOID, pgtype.TextArrayOID, pgtype.ByteaArrayOID, pgtype.BoolOID},
		},
		// Like the statement of a request's record: see [statements]. A message's record has no headers
		// and no body.
		records: wire.Statement{
			Keep: true,
			SQL: "WITH written AS (INSERT INTO " + keys + " (created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)" +
				" SELECT CASE WHEN pg_catalog.transaction_timestamp() OPERATOR(pg_catalog.=) $1" +
				" AND pg_catalog.set_config('synchronous_commit', $2, true) IS NOT NULL" + hearWarnings + " THEN pg_catalog.transaction_timestamp() END," +
				" pg_catalog.clock_timestamp() OPERATOR(pg_catalog.+) ($3 OPERATOR(pg_catalog.*) interval '1 microsecond'), 204, 1, $4, $5, m.id, m.fingerprint, pg_catalog.decode('0100', 'hex'), ''" +
				" FROM ROWS FROM (pg_catalog.unnest($6), pg_catalog.unnest($7)) AS m (id, fingerprint)" +
				" RETURNING key, fingerprint, attempt_id OPERATOR(pg_catalog.=) $4 AND scope OPERATOR(pg_catalog.=) $5" +
				" AND pg_catalog.pg_client_encoding() OPERATOR(pg_catalog.=) ANY ('{UTF8,SQL_ASCII}'::pg_catalog.name[]) AS same)" +
				" SELECT 1 OPERATOR(pg_catalog./) CASE WHEN pg_catalog.array_agg(key) OPERATOR(pg_catalog.=) $6 AND pg_catalog.array_agg(fingerprint) OPERATOR(pg_catalog.=) $7" +
				" AND pg_catalog.bool_and(same) THEN 1 ELSE 0 END FROM written",
			OIDs: []uint32{pgtype.TimestamptzOID, pgtype.TextOID, pgtype.Int8OID, pgtype.UUIDOID, pgtype.TextOID, pgtype.TextArrayOID, pgtype.ByteaArrayOID},
		},
		park: wire.Statement{
			SQL: "WITH written AS (INSERT INTO " + i.parked + " (parked_at, not_before, position, partition, attempts, state, consumer, message_id, source, topic, error, key, headers, body)" +
				" SELECT pg_catalog.clock_timestamp(), CASE WHEN m.state OPERATOR(pg_catalog.=) 1 THEN pg_catalog.clock_timestamp() OPERATOR(pg_catalog.+) (m.wait OPERATOR(pg_catalog.*) interval '1 microsecond') END," +
				" m.position, $3, m.attempts, m.state, $1, m.id, $2, m.topic, m.error, m.key, m.headers, m.body" +
				" FROM ROWS FROM (pg_catalog.unnest($4), pg_catalog.unnest($5), pg_catalog.unnest($6), pg_catalog.unnest($7), pg_catalog.unnest($8), pg_catalog.unnest($9), pg_catalog.unnest($10), pg_catalog.unnest($11), pg_catalog.unnest($12), pg_catalog.unnest($13))" +
				" WITH ORDINALITY AS m (wait, position, attempts, state, id, topic, error, key, headers, body, place) ORDER BY m.place RETURNING 1)" +
				counted + "pg_catalog.cardinality($8) THEN 1 ELSE 0 END FROM written",
			OIDs: []uint32{
				pgtype.TextOID, pgtype.TextOID, pgtype.Int4OID, pgtype.Int8ArrayOID, pgtype.Int8ArrayOID, pgtype.Int4ArrayOID, pgtype.Int2ArrayOID,
				pgtype.TextArrayOID, pgtype.TextArrayOID, pgtype.TextArrayOID, pgtype.ByteaArrayOID, pgtype.ByteaArrayOID, pgtype.ByteaArrayOID,
			},
		},
		// The position is the last guard of a partition, as the primary key is that of a record.
		move: wire.Statement{
			Keep: true,
			SQL: "WITH moved AS (UPDATE " + i.offsets + " SET next_offset = $5, incarnation = $6, attempt_id = $7, deaths = 0, updated_at = pg_catalog.clock_timestamp()" +
				" WHERE consumer OPERATOR(pg_catalog.=) $1 AND source OPERATOR(pg_catalog.=) $2 AND partition OPERATOR(pg_catalog.=) $3 AND next_offset OPERATOR(pg_catalog.=) $4" +
				" AND pg_catalog.set_config('synchronous_commit', $8, true) IS NOT NULL" + hearWarnings + " RETURNING 1)" +
				" SELECT 1 OPERATOR(pg_catalog./) pg_catalog.count(*) FROM moved",
			OIDs: []uint32{pgtype.TextOID, pgtype.TextOID, pgtype.Int4OID, pgtype.Int8OID, pgtype.Int8OID, pgtype.UUIDOID, pgtype.UUIDOID, pgtype.TextOID},
		},
	}
	return i
}

// scopeOf is the scope of a consumer's records.
func scopeOf(name string) string { return idempotency.MessageScopePrefix + name }

// Position implements [consumer.Store].
func (i *Inbox) Position(ctx context.Context, name string, p consumer.Partition) (position consumer.Position, err error) {
	ctx, cancel := i.store.limited(ctx)
	defer cancel()
	err = i.store.pool.QueryRow(ctx, "SELECT next_offset, incarnation, deaths FROM "+i.offsets+" WHERE consumer = $1 AND source = $2 AND partition = $3", name, p.Source, p.Number).
		Scan(&position.Next, &position.Incarnation, &position.Deaths)
	if errors.Is(err, pgx.ErrNoRows) {
		return consumer.Position{Next: -1}, nil
	}
	if err != nil {
		return position, fmt.Errorf("read the position: %w", wire.SQLError(err))
	}
	return position, nil
}

// CountDeath implements [consumer.Store]. It tries to take the lock of the partition until the
// count is committed, so processes that wait for the partition count nothing.
func (i *Inbox) CountDeath(ctx context.Context, name string, p consumer.Partition) (deaths int, err error) {
	ctx, cancel := i.store.limited(ctx)
	defer cancel()
	err = i.store.pool.QueryRow(ctx, "WITH lock AS MATERIALIZED (SELECT pg_try_advisory_xact_lock($6) AS ours)"+
		" INSERT INTO "+i.offsets+" AS o (next_offset, updated_at, incarnation, attempt_id, partition, deaths, consumer, source)"+
		" SELECT -1, clock_timestamp(), $4::uuid, $5::uuid, $3, 1, $1, $2 FROM lock WHERE ours"+
		" ON CONFLICT (consumer, source, partition) DO UPDATE SET deaths = o.deaths + 1 RETURNING deaths",
		name, p.Source, p.Number, p.Incarnation, idempotency.AttemptID{}, locks.Partition(i.store.table, name, p.Source, p.Number)).Scan(&deaths)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return 0, fail("count the death", consumer.ErrHeld, errors.New("its lock is taken"))
	case err != nil:
		return 0, fmt.Errorf("count the death: %w", wire.SQLError(err))
	}
	return deaths, nil
}

// ForgiveDeath implements [consumer.Store].
func (i *Inbox) ForgiveDeath(ctx context.Context, name string, p consumer.Partition) error {
	ctx, cancel := i.store.limited(ctx)
	defer cancel()
	_, err := i.store.pool.Exec(ctx, "UPDATE "+i.offsets+" SET deaths = deaths - 1 WHERE consumer = $1 AND source = $2 AND partition = $3 AND deaths > 0", name, p.Source, p.Number)
	if err != nil {
		return fmt.Errorf("forgive the death: %w", wire.SQLError(err))
	}
	return nil
}

// batch is a [consumer.Batch]: an attempt with the lock of a partition.
type batch struct {
	attempt
	inbox    *Inbox
	claim    *consumer.Claim
	none     idempotency.Claim // for the attempt, which writes the time of the claim into it
	position consumer.Position
	found    bool // the partition has a position
	known    []byte
	hidden   bool
}

// Begin implements [consumer.Store].
func (i *Inbox) Begin(ctx context.Context, claim *consumer.Claim) (consumer.Batch, error) {
	b := &batch{inbox: i, claim: claim}
	return b, i.begin(ctx, b, b.knownCall())
}

// begin opens the transaction of a batch. The last call reads the states of its messages.
func (i *Inbox) begin(ctx context.Context, b *batch, known wire.Call) error {
	s, claim := i.store, b.claim
	conn, err := i.acquire(ctx)
	if err != nil {
		return err
	}
	b.init(s, conn, &b.none, locks.Partition(s.table, claim.Consumer, claim.Partition.Source, claim.Partition.Number))
	b.tx.Share(len(claim.Entries))
	partition := wire.EncodeInt4(claim.Partition.Number)
	calls := []wire.Call{
		{Statement: &s.statements.begin},
		b.lockCall(),
		// Statements of their own: their snapshots must be younger than the lock.
		{Statement: &i.statements.position, Params: [][]byte{[]byte(claim.Consumer), []byte(claim.Partition.Source), partition[:]}, Row: wire.RowFunc(b.readPosition)},
		known,
	}
	if reply, err := s.statements.Flush(ctx, b.conn, calls...); err != nil {
		return b.claimFailed(ctx, calls[min(reply.Failed, len(calls)-1)].Statement, err)
	}
	switch {
	case !b.locked:
		err = fail("begin a batch", consumer.ErrHeld, errors.New("its lock is taken"))
	case b.hidden:
		err = fail("begin a batch", idempotency.ErrUnavailable, rowSecurity(s.table, ""))
	case !b.found:
		err = fail("begin a batch", idempotency.ErrUnavailable, errors.New("the partition has no position: the row was deleted"))
	default:
		return nil
	}
	b.release(ctx)
	return err
}

// acquire takes a connection on which the server does not convert our text.
func (i *Inbox) acquire(ctx context.Context) (*pgxpool.Conn, error) {
	conn, err := i.store.acquire(ctx)
	if err != nil {
		return nil, fail("acquire a connection", idempotency.ErrUnavailable, err)
	}
	if !wire.PlainText(conn.Conn().PgConn()) {
		_ = conn.Conn().Close(ctx)
		conn.Release()
		return nil, fail("begin a batch", idempotency.ErrUnavailable, errEncoding)
	}
	return conn, nil
}

func (b *batch) readPosition(values [][]byte) error {
	d := wire.Decoder{Values: values}
	b.position.Next = d.Int8()
	copy(b.position.Incarnation[:], d.Next(16))
	b.position.Deaths = int(d.Int4())
	b.found = true
	return d.Err
}

func (b *batch) knownCall() wire.Call {
	entries := b.claim.Entries
	var ids, sums, topics, keys [][]byte
	for i := range entries {
		e := &entries[i]
		ids, sums, topics, keys = append(ids, []byte(e.ID)), append(sums, e.Fingerprint.Sum[:]), append(topics, []byte(e.Topic)), append(keys, e.Key)
	}
	return wire.Call{
		Statement: &b.inbox.statements.known,
		Params: [][]byte{
			[]byte(scopeOf(b.claim.Consumer)), []byte(b.claim.Consumer),
			wire.EncodeArray(pgtype.TextOID, ids), wire.EncodeArray(pgtype.ByteaOID, sums), wire.EncodeArray(pgtype.TextOID, topics), wire.EncodeArray(pgtype.ByteaOID, keys), encodeBool(b.claim.Keys),
		},
		Row: wire.RowFunc(func(values [][]byte) error {
			d := wire.Decoder{Values: values}
			b.hidden, b.known = d.Bool(), d.Bytes()
			if d.Err == nil && len(b.known) != len(entries) {
				return errors.New("the server returned another number of messages")
			}
			return d.Err
		}),
	}
}

// Position implements [consumer.Batch].
func (b *batch) Position() consumer.Position { return b.position }

// Known implements [consumer.Batch].
func (b *batch) Known(entry int) consumer.Known { return consumer.Known(b.known[entry] - '0') }

// Check implements [consumer.Batch].
func (b *batch) Check() error { return stateError(b.tx.Check()) }

// Commit implements [consumer.Batch].
func (b *batch) Commit(ctx context.Context, end *consumer.End) error {
	return b.commit(ctx, end, b.moveCall(end.Next))
}

// commit sends the last flush. Its last call before COMMIT moves the position, or deletes the
// handled messages of a queue, or the parked message.
func (b *batch) commit(ctx context.Context, end *consumer.End, last wire.Call) error {
	defer b.release(ctx)
	if !b.tx.Abandoned() && !wire.PlainText(b.conn) {
		return fail("commit a batch", idempotency.ErrAborted, errEncoding)
	}
	deferred, _, refused := b.deferred(end.Publish...)
	if refused != nil {
		return fail("commit a batch", refusal(refused), refused)
	}
	s := &b.store.statements
	calls := append(append(b.calls[:0], b.guardCall()), deferred...)
	calls = append(calls, wire.Call{Statement: &s.constraints})
	if len(end.Recorded) > 0 {
		calls = append(calls, b.recordsCall(end))
	}
	if len(end.Park) > 0 {
		calls = append(calls, b.parkCall(end.Park))
	}
	return b.end(ctx, "commit a batch", append(calls, last, wire.Call{Statement: &s.commit}))
}

func (b *batch) recordsCall(end *consumer.End) wire.Call {
	var ids, sums [][]byte
	for _, at := range end.Recorded {
		e := &b.claim.Entries[at]
		ids, sums = append(ids, []byte(e.ID)), append(sums, e.Fingerprint.Sum[:])
	}
	ttl := wire.EncodeInt8(end.TTL.Microseconds())
	return wire.Call{
		Statement: &b.inbox.statements.records, Apart: true,
		Params: [][]byte{
			b.claimedAt[:], b.store.synchronousCommit, ttl[:], b.claim.Attempt[:], []byte(scopeOf(b.claim.Consumer)),
			wire.EncodeArray(pgtype.TextOID, ids), wire.EncodeArray(pgtype.ByteaOID, sums),
		},
		Meaning: func(err *pgconn.PgError) (sentinel, explained error) {
			return b.store.statements.meaning(&wire.Call{Statement: &b.store.statements.insert}, err)
		},
	}
}

func (b *batch) parkCall(parks []consumer.Park) wire.Call {
	const first, columns = 3, 10
	var values [columns][][]byte
	for i := range parks {
		p := &parks[i]
		wait, position := wire.EncodeInt8(p.NotBefore.Microseconds()), wire.EncodeInt8(p.Delivery.Offset)
		attempts, state := wire.EncodeInt4(int32(p.Attempts)), wire.EncodeInt2(int16(p.State))
		for at, value := range [columns][]byte{
			wait[:], position[:], attempts[:], state[:], []byte(p.Delivery.ID), []byte(p.Delivery.Topic), []byte(p.Error), p.Delivery.Key,
			encodeHeaders(nil, p.Delivery.Header), notNull(p.Delivery.Body),
		} {
			values[at] = append(values[at], value)
		}
	}
	partition := wire.EncodeInt4(b.claim.Partition.Number)
	params := [][]byte{[]byte(b.claim.Consumer), []byte(b.claim.Partition.Source), partition[:]}
	for at, oid := range [columns]uint32{
		pgtype.Int8OID, pgtype.Int8OID, pgtype.Int4OID, pgtype.Int2OID, pgtype.TextOID, pgtype.TextOID, pgtype.TextOID, pgtype.ByteaOID, pgtype.ByteaOID, pgtype.ByteaOID,
	} {
		params = append(params, wire.EncodeArray(oid, values[at]))
	}
	return wire.Call{Statement: &b.inbox.statements.park, Params: params, Apart: true, Meaning: func(err *pgconn.PgError) (sentinel, explained error) {
		if err.Code == "23505" && err.TableName == ParkedTable {
			return idempotency.ErrKeyRecorded, err // a copy of the message was parked meanwhile
		}
		return classify(err), err
	}}
}

func (b *batch) moveCall(next int64) wire.Call {
	partition, old, to := wire.EncodeInt4(b.claim.Partition.Number), wire.EncodeInt8(b.position.Next), wire.EncodeInt8(next)
	return wire.Call{
		Statement: &b.inbox.statements.move, Row: wire.WarningForgotten{Conn: b.conn},
		Params: [][]byte{
			[]byte(b.claim.Consumer), []byte(b.claim.Partition.Source), partition[:], old[:], to[:], b.claim.Partition.Incarnation[:], b.claim.Attempt[:], b.store.synchronousCommit,
		},
		Meaning: fencedMeaning,
	}
}

// fencedMeaning is the Meaning of a call that fails if another process was faster.
func fencedMeaning(err *pgconn.PgError) (sentinel, explained error) {
	if err.Code == "22012" && err.Where == "" {
		return consumer.ErrFenced, err
	}
	return classify(err), err
}

// Rollback implements [consumer.Batch].
func (b *batch) Rollback(ctx context.Context) error { return b.rollback(ctx) }

// due is a condition on a parked message m: see Due of consumer.Store. The parameter with this
// number says whether the messages of a key have an order.
func (i *Inbox) due(ordered int) string {
	return fmt.Sprintf("(m.state = 1 AND m.not_before <= clock_timestamp() OR m.state = 2) AND (m.state = 1 AND NOT $%d::boolean OR"+
		" NOT EXISTS (SELECT FROM %s AS p WHERE p.consumer = m.consumer AND p.topic = m.topic AND sha256(p.key) = sha256(m.key) AND p.id < m.id))", ordered, i.parked)
}

// Due implements [consumer.Store].
func (i *Inbox) Due(ctx context.Context, name string, ordered bool, max int) ([]string, error) {
	ctx, cancel := i.store.limited(ctx)
	defer cancel()
	rows, err := i.store.pool.Query(ctx, "SELECT m.message_id FROM "+i.parked+" AS m WHERE m.consumer = $1 AND "+i.due(2)+" ORDER BY m.id LIMIT $3", name, ordered, max)
	if err != nil {
		return nil, wire.SQLError(err)
	}
	ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, wire.SQLError(err)
	}
	return ids, nil
}

// parkedBatch is the batch of one parked message.
type parkedBatch struct{ batch }

// BeginParked implements [consumer.Store].
func (i *Inbox) BeginParked(ctx context.Context, claim *consumer.ParkedClaim) (consumer.Batch, consumer.Park, error) {
	s := i.store
	b := &parkedBatch{batch{inbox: i, claim: &consumer.Claim{Consumer: claim.Consumer, Attempt: claim.Attempt}}}
	park, err := i.countTry(ctx, claim, &b.claim.Partition)
	if err != nil || park.Delivery == nil {
		return nil, consumer.Park{}, err
	}
	d := park.Delivery
	b.claim.Entries = []consumer.Entry{{ID: d.ID, Topic: d.Topic, Key: d.Key, Fingerprint: consumer.FingerprintOf(&d.Message)}}
	conn, err := i.acquire(ctx)
	if err != nil {
		return nil, park, err
	}
	lock := "parked " + strconv.Quote(claim.Consumer) + " " + strconv.Quote(d.Topic) + " "
	if d.Key != nil && claim.Ordered {
		lock += strconv.Quote(string(d.Key))
	} else {
		lock += "of " + d.ID
	}
	b.init(s, conn, &b.none, idempotency.Key{Value: lock}.LockNumber(s.table))
	still, tried := 0, wire.EncodeInt4(int32(park.Attempts))
	calls := []wire.Call{
		{Statement: &s.statements.begin},
		b.lockCall(),
		// Statements of their own: their snapshots must be younger than the lock.
		{
			Statement: &wire.Statement{
				SQL:  "SELECT pg_catalog.count(*) FROM " + i.parked + " WHERE consumer = $1 AND message_id = $2 AND state = 1 AND attempts = $3",
				OIDs: []uint32{pgtype.TextOID, pgtype.TextOID, pgtype.Int4OID},
			},
			Params: [][]byte{[]byte(claim.Consumer), []byte(claim.ID), tried[:]},
			Row: wire.RowFunc(func(values [][]byte) error {
				d := wire.Decoder{Values: values}
				still = int(d.Int8())
				return d.Err
			}),
		},
		b.recordedCall(),
	}
	if reply, err := s.statements.Flush(ctx, b.conn, calls...); err != nil {
		return nil, park, b.claimFailed(ctx, calls[min(reply.Failed, len(calls)-1)].Statement, err)
	}
	switch {
	case b.hidden:
		err = fail("begin a batch", idempotency.ErrUnavailable, rowSecurity(s.table, ""))
	case !b.locked || still == 0:
		err = fail("begin a batch", consumer.ErrHeld, errors.New("its lock is taken, or it was changed"))
	default:
		return b, park, nil
	}
	b.release(ctx)
	return nil, park, err
}

// countTry reads a parked message that is due, and counts another try of it.
func (i *Inbox) countTry(ctx context.Context, claim *consumer.ParkedClaim, p *consumer.Partition) (park consumer.Park, err error) {
	ctx, cancel := i.store.limited(ctx)
	defer cancel()
	var d consumer.Delivery
	var headers []byte
	err = i.store.pool.QueryRow(ctx, "UPDATE "+i.parked+" AS m SET attempts = m.attempts + 1, state = 1, not_before = clock_timestamp() + $4 * interval '1 microsecond'"+
		" WHERE m.consumer = $1 AND m.message_id = $2 AND "+i.due(3)+" RETURNING m.message_id, m.topic, m.key, m.headers, m.body, m.position, m.attempts, m.state, m.error, m.source, m.partition",
		claim.Consumer, claim.ID, claim.Ordered, claim.Lease.Microseconds()).
		Scan(&d.ID, &d.Topic, &d.Key, &headers, &d.Body, &d.Offset, &park.Attempts, &park.State, &park.Error, &p.Source, &p.Number)
	if errors.Is(err, pgx.ErrNoRows) {
		return consumer.Park{}, nil
	}
	if err == nil {
		park.Delivery = &d
		d.Header, err = decodeHeaders(headers)
	}
	if err != nil {
		return consumer.Park{}, fail("read a parked message", idempotency.ErrUnavailable, wire.SQLError(err))
	}
	return park, nil
}

// recordedCall is knownCall, except that it does not look at parked messages: this one is parked.
func (b *parkedBatch) recordedCall() wire.Call {
	call := b.knownCall()
	call.Params[1] = []byte("") // no consumer has this name
	return call
}

// Commit implements [consumer.Batch].
func (b *parkedBatch) Commit(ctx context.Context, end *consumer.End) error {
	return b.commit(ctx, end, wire.Call{
		Statement: &wire.Statement{
			SQL:  "WITH deleted AS (DELETE FROM " + b.inbox.parked + " WHERE consumer = $1 AND message_id = $2 RETURNING 1) SELECT 1 / count(*) FROM deleted",
			OIDs: []uint32{pgtype.TextOID, pgtype.TextOID},
		},
		Params: [][]byte{[]byte(b.claim.Consumer), []byte(b.claim.Entries[0].ID)}, Row: wire.WarningForgotten{Conn: b.conn}, Meaning: fencedMeaning,
	})
}

// Repark implements [consumer.Store].
func (i *Inbox) Repark(ctx context.Context, name string, tried int, park *consumer.Park, publish ...message.Message) error {
	ctx, cancel := i.store.limited(ctx)
	defer cancel()
	err := pgx.BeginTxFunc(ctx, i.store.pool, pgx.TxOptions{IsoLevel: pgx.ReadCommitted, AccessMode: pgx.ReadWrite}, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, "UPDATE "+i.parked+" SET attempts = $3, state = $4, error = $5, not_before = CASE WHEN $4::smallint = 1 THEN clock_timestamp() + $6 * interval '1 microsecond' END"+
			" WHERE consumer = $1 AND message_id = $2 AND state = 1 AND attempts = $7", name, park.Delivery.ID, park.Attempts, park.State, park.Error, park.NotBefore.Microseconds(), tried)
		if err != nil || tag.RowsAffected() == 0 || len(publish) == 0 {
			return err
		}
		call, _ := (&attempt{store: i.store}).outboxCall(publish)
		_, err = tx.Conn().PgConn().ExecParams(ctx, call.Statement.SQL, call.Params, call.Statement.OIDs, []int16{1}, nil).Close()
		return err
	})
	if err != nil {
		return fmt.Errorf("repark a message: %w", wire.SQLError(err))
	}
	return nil
}
