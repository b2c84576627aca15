package postgres

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

// Queue is a topic of the outbox as a queue in the same database, for a consumer that needs no
// broker: the commit that has the effects of a message deletes its row. So no id has to be
// recorded, and no position. A topic has one consumer, because a message is gone once it is
// handled. A Queue is both the source and the store of package consumer:
//
//	queue := store.Queue("mails")
//	go consumer.New("mailer", queue, queue, sendMail, nil).Run(ctx)
//
// The relay of every process must leave the topic out: see [Store.Outbox]. It is safe for
// concurrent use.
type Queue struct {
	*Inbox // parked messages are those of any consumer
	topic  string
	outbox string // sanitized
	nudged func() <-chan struct{}
	exists wire.Statement
	taken  wire.Statement
}

var (
	_ consumer.Source = (*Queue)(nil)
	_ consumer.Store  = (*Queue)(nil)
)

// Queue returns the queue of a topic.
func (s *Store) Queue(topic string) *Queue {
	q := &Queue{Inbox: s.Inbox(), topic: topic, outbox: pgx.Identifier{s.options.Schema, OutboxTable}.Sanitize(), nudged: sync.OnceValue(s.nudges.reader)}
	// Like Inbox's known, with its OFFSET 0 and LIMIT. A message that is recorded there is deleted
	// here.
	q.exists = wire.Statement{
		Keep: true,
		SQL: "SELECT pg_catalog.string_agg(CASE WHEN o.id IS NULL THEN '1'" +
			" WHEN NOT EXISTS (SELECT FROM " + q.parked + " AS p WHERE p.consumer OPERATOR(pg_catalog.=) $1) THEN '0'" +
			" WHEN EXISTS (SELECT FROM " + q.parked + " AS p WHERE p.consumer OPERATOR(pg_catalog.=) $1 AND p.message_id OPERATOR(pg_catalog.=) m.id) THEN '3'" +
			" WHEN $6 AND EXISTS (SELECT FROM " + q.parked + " AS p WHERE p.consumer OPERATOR(pg_catalog.=) $1 AND p.topic OPERATOR(pg_catalog.=) o.topic AND pg_catalog.sha256(p.key) OPERATOR(pg_catalog.=) pg_catalog.sha256(m.key)) THEN '4'" +
			" ELSE '0' END, '' ORDER BY m.place)" +
			" FROM (SELECT * FROM ROWS FROM (pg_catalog.unnest($3), pg_catalog.unnest($4), pg_catalog.unnest($5)) WITH ORDINALITY LIMIT pg_catalog.cardinality($3)) AS m (offset_, id, key, place)" +
			" LEFT JOIN LATERAL (SELECT id, topic FROM " + q.outbox + " WHERE shard OPERATOR(pg_catalog.=) $2 AND id OPERATOR(pg_catalog.=) m.offset_ OFFSET 0) AS o ON true",
		OIDs: []uint32{pgtype.TextOID, pgtype.Int2OID, pgtype.Int8ArrayOID, pgtype.TextArrayOID, pgtype.ByteaArrayOID, pgtype.BoolOID},
	}
	q.taken = wire.Statement{
		Keep: true,
		SQL: "WITH taken AS (DELETE FROM " + q.outbox + " WHERE shard OPERATOR(pg_catalog.=) $1 AND id OPERATOR(pg_catalog.=) ANY ($2) RETURNING 1)," +
			" lives AS (UPDATE " + q.offsets + " SET deaths = 0 WHERE consumer OPERATOR(pg_catalog.=) $3 AND source OPERATOR(pg_catalog.=) $4 AND partition OPERATOR(pg_catalog.=) $1 AND deaths OPERATOR(pg_catalog.>) 0)" +
			" SELECT 1 OPERATOR(pg_catalog./) CASE WHEN pg_catalog.count(*) OPERATOR(pg_catalog.=) pg_catalog.cardinality($2) THEN 1 ELSE 0 END FROM taken",
		OIDs: []uint32{pgtype.Int2OID, pgtype.Int8ArrayOID, pgtype.TextOID, pgtype.TextOID},
	}
	return q
}

// queueInterval is the mean pause between two looks for messages of other processes.
const queueInterval = 200 * time.Millisecond

// Run implements [consumer.Source]. The partitions are the shards of the outbox.
func (q *Queue) Run(ctx context.Context, receiver consumer.Receiver) error {
	var all sync.WaitGroup
	defer all.Wait()
	var mu sync.Mutex
	busy := map[int]time.Time{} // by shard: nothing is delivered until this time
	failed := false
	for ctx.Err() == nil {
		shards, err := q.waiting(ctx)
		if err != nil {
			shards = nil
			if !failed && ctx.Err() == nil {
				slog.Warn("idempotency: a queue was not read; the next look tries again", "topic", q.topic, "error", wire.SQLError(err))
			}
		}
		failed = err != nil
		for _, shard := range shards {
			mu.Lock()
			free := time.Now().After(busy[shard])
			if free {
				busy[shard] = time.Now().Add(math.MaxInt64) // until it is done
			}
			mu.Unlock()
			if !free {
				continue
			}
			all.Go(func() {
				pause := q.deliver(ctx, receiver, shard)
				mu.Lock()
				defer mu.Unlock()
				busy[shard] = time.Now().Add(pause)
			})
		}
		select {
		case <-ctx.Done():
		case <-q.nudged():
		case <-time.After(queueInterval/2 + rand.N(queueInterval)):
		}
	}
	return nil
}

func (q *Queue) waiting(ctx context.Context) ([]int, error) {
	ctx, cancel := q.store.limited(ctx)
	defer cancel()
	rows, err := q.store.pool.Query(ctx, "SELECT s FROM generate_series(0, $1::int - 1) AS s WHERE EXISTS (SELECT FROM "+q.outbox+" WHERE shard = s AND topic = $2)", OutboxShards, q.topic)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[int])
}

// deliver delivers the messages of a shard until there are none, or a call settles none. It returns
// the pause before the next look at the shard.
func (q *Queue) deliver(ctx context.Context, receiver consumer.Receiver, shard int) (pause time.Duration) {
	partition := consumer.Partition{Source: q.topic, Number: int32(shard)}
	for ctx.Err() == nil {
		deliveries, err := q.read(ctx, shard, receiver.BatchMax())
		if err != nil || len(deliveries) == 0 {
			return 0
		}
		if settled, pause := receiver.Receive(ctx, partition, deliveries); settled == 0 {
			return pause
		}
	}
	return 0
}

// read returns the oldest messages of a shard. It locks nothing: the batch looks again.
func (q *Queue) read(ctx context.Context, shard, max int) ([]consumer.Delivery, error) {
	ctx, cancel := q.store.limited(ctx)
	defer cancel()
	rows, err := q.store.pool.Query(ctx, "SELECT id, message_id::text, key, headers, body, created_at FROM "+q.outbox+" WHERE shard = $1 AND topic = $2 ORDER BY id LIMIT $3", shard, q.topic, max)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (d consumer.Delivery, err error) {
		var headers []byte
		d.Topic = q.topic
		if err := row.Scan(&d.Offset, &d.ID, &d.Key, &headers, &d.Body, &d.Time); err != nil {
			return d, err
		}
		d.Header, err = decodeHeaders(headers)
		return d, err
	})
}

// Position implements [consumer.Store]: a queue has none.
func (q *Queue) Position(context.Context, string, consumer.Partition) (consumer.Position, error) {
	return consumer.Position{Next: -1}, nil
}

// queueBatch is a [consumer.Batch] of a queue.
type queueBatch struct {
	batch
	queue *Queue
}

// Begin implements [consumer.Store].
func (q *Queue) Begin(ctx context.Context, claim *consumer.Claim) (consumer.Batch, error) {
	b := &queueBatch{batch: batch{inbox: q.Inbox, claim: claim}, queue: q}
	return b, q.begin(ctx, &b.batch, b.existsCall())
}

func (b *queueBatch) existsCall() wire.Call {
	shard := wire.EncodeInt2(int16(b.claim.Partition.Number))
	var offsets, ids, keys [][]byte
	for i := range b.claim.Entries {
		e := &b.claim.Entries[i]
		offset := wire.EncodeInt8(e.Offset)
		offsets, ids, keys = append(offsets, offset[:]), append(ids, []byte(e.ID)), append(keys, e.Key)
	}
	return wire.Call{
		Statement: &b.queue.exists,
		Params: [][]byte{
			[]byte(b.claim.Consumer), shard[:], wire.EncodeArray(pgtype.Int8OID, offsets), wire.EncodeArray(pgtype.TextOID, ids), wire.EncodeArray(pgtype.ByteaOID, keys), encodeBool(b.claim.Keys),
		},
		Row: wire.RowFunc(func(values [][]byte) error {
			d := wire.Decoder{Values: values}
			if b.known = d.Bytes(); d.Err == nil && len(b.known) != len(b.claim.Entries) {
				return errors.New("the server returned another number of messages")
			}
			return d.Err
		}),
	}
}

// Position implements [consumer.Batch].
func (b *queueBatch) Position() consumer.Position { return consumer.Position{Next: -1} }

// Commit implements [consumer.Batch]. It deletes the messages, so they are not handled again.
func (b *queueBatch) Commit(ctx context.Context, end *consumer.End) error {
	shard := wire.EncodeInt2(int16(b.claim.Partition.Number))
	var offsets [][]byte
	for i := range b.claim.Entries {
		if e := &b.claim.Entries[i]; e.Offset < end.Next && b.Known(i) != consumer.Recorded {
			offset := wire.EncodeInt8(e.Offset)
			offsets = append(offsets, offset[:])
		}
	}
	rest := *end
	rest.Recorded = nil
	return b.commit(ctx, &rest, wire.Call{
		Statement: &b.queue.taken, Row: wire.WarningForgotten{Conn: b.conn}, Meaning: fencedMeaning,
		Params: [][]byte{shard[:], wire.EncodeArray(pgtype.Int8OID, offsets), []byte(b.claim.Consumer), []byte(b.claim.Partition.Source)},
	})
}

func encodeBool(v bool) []byte {
	if v {
		return []byte{1}
	}
	return []byte{0}
}
