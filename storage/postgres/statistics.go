package postgres

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

// StatisticsPagesMax is the maximum number of pages of the table that [Store.Statistics] reads: 2
// MB, whatever the size of the table.
const StatisticsPagesMax = 256

// StatisticsTimeoutMax bounds the statement of [Store.Statistics] on the server, even if its
// context allows more.
const StatisticsTimeoutMax = time.Second

// Statistics are figures about the table. Records, Expired and Overdue are estimates from pages
// spread evenly over it, and exact if it has no more than [StatisticsPagesMax] pages.
type Statistics struct {
	Records int64 // that lie in the table, expired ones included; without open requests
	Expired int64 // of these, that wait for the reaper
	// Overdue is the time that has passed since the earliest expiry among the records that were
	// read; zero if none has expired.
	Overdue    time.Duration
	TableBytes int64 // bodies included
	IndexBytes int64
}

// Statistics reads figures about the table, in four round trips on a connection of the pool, which
// it holds for little longer than [StatisticsTimeoutMax]. If the pool has to connect first, only
// ctx bounds that. It needs SELECT on the table, and fails with [ErrRowSecurityActive] if rows may
// be hidden from the role. Its cost does not grow with the table; still, call it every half minute,
// not for each request. Safe for concurrent use.
func (s *Store) Statistics(ctx context.Context) (Statistics, error) {
	var stats Statistics
	var read, pages int64
	var overdueSeconds float64
	err := s.readBounded(ctx, TableName, s.statisticsSQL(), []any{pgx.Identifier{s.options.Schema, TableName}.Sanitize(), StatisticsPagesMax, rand.Float64()},
		&pages, &stats.TableBytes, &stats.IndexBytes, &read, &stats.Records, &stats.Expired, &overdueSeconds)
	if err != nil {
		return Statistics{}, fmt.Errorf("statistics: %w", err)
	}
	stats.Overdue = seconds(overdueSeconds)
	if read > 0 && read < pages {
		scale := float64(pages) / float64(read)
		stats.Records = int64(float64(stats.Records) * scale)
		stats.Expired = int64(float64(stats.Expired) * scale)
	}
	return stats, nil
}

// OpenStatistics are figures about the open requests.
type OpenStatistics struct {
	Open   int64 // requests that are open, parked ones included
	Parked int64 // of these, that wait for a person
	Due    int64 // of the others, that wait for a run
	// OldestOpen is the age of the oldest open request that is not parked; zero if there is none.
	OldestOpen time.Duration
	// OldestParked is the age of the oldest parked request; zero if there is none.
	OldestParked time.Duration
	// OldestDue is the longest time that one of them has waited for a run; zero if none waits. If it
	// grows, no completer runs, or no replica has a handler with the request's name.
	OldestDue time.Duration
}

// OpenStatistics reads figures about the open requests. Its cost grows with the number of open
// requests, and it fails if that takes longer than 1 second ([StatisticsTimeoutMax]). It needs
// SELECT on the table [OpenTableName]. Safe for concurrent use.
func (s *Store) OpenStatistics(ctx context.Context) (OpenStatistics, error) {
	var stats OpenStatistics
	var open, parked, due float64
	err := s.readBounded(ctx, OpenTableName, `SELECT count(*), count(parked), count(*) FILTER (WHERE parked IS NULL AND next_at <= now()),
		coalesce(extract(epoch FROM now() - min(started_at) FILTER (WHERE parked IS NULL)), 0)::float8,
		coalesce(extract(epoch FROM now() - min(started_at) FILTER (WHERE parked IS NOT NULL)), 0)::float8,
		coalesce(greatest(extract(epoch FROM now() - min(next_at) FILTER (WHERE parked IS NULL)), 0), 0)::float8
		FROM `+pgx.Identifier{s.options.Schema, OpenTableName}.Sanitize(), nil, &stats.Open, &stats.Parked, &stats.Due, &open, &parked, &due)
	if err != nil {
		return OpenStatistics{}, fmt.Errorf("statistics of open requests: %w", err)
	}
	stats.OldestOpen, stats.OldestParked, stats.OldestDue = seconds(open), seconds(parked), seconds(due)
	return stats, nil
}

// MessageStatistics are figures about the messages in the database. Durations are zero if there is
// nothing that they measure.
type MessageStatistics struct {
	Outbox        int64         // messages in the outbox that no broker has refused
	OutboxRefused int64         // messages that a broker refused; they wait for a person
	OldestOutbox  time.Duration // age of the oldest that is behind no refused one. If it grows, no relay or consumer of a queue runs
	Waiting       int64         // parked messages that are tried again
	Behind        int64         // parked messages behind another one of their key
	Dead          int64         // parked messages that wait for a person
	OldestDead    time.Duration // since the oldest of those was parked
	OldestDue     time.Duration // the longest time that a waiting one has been due. If it grows, its consumer does not run
	Partitions    int64         // in which consumers have a position
	SinceMoved    time.Duration // since any position was moved
	OldestBegun   time.Duration // the longest time for which a position has not moved although a process began a batch there
}

// MessageStatistics reads figures about the messages in the database. Its cost grows with the number
// of messages in the outbox and of parked ones, and it fails if that takes longer than 1 second
// ([StatisticsTimeoutMax]). It needs SELECT on the tables [OutboxTable], [ParkedTable] and
// [OffsetsTable]. Safe for concurrent use.
func (s *Store) MessageStatistics(ctx context.Context) (MessageStatistics, error) {
	var stats MessageStatistics
	var outbox, dead, due, moved, begun float64
	box := s.Outbox()
	inbox := s.Inbox()
	err := s.readBounded(ctx, OutboxTable, `SELECT o.*, r.*, p.*, f.* FROM (
			SELECT count(*) FILTER (WHERE refused IS NULL), count(refused) FROM `+box.table+`) AS o,
		(SELECT count(*) FILTER (WHERE state = 1), count(*) FILTER (WHERE state = 2), count(*) FILTER (WHERE state = 3),
			coalesce(extract(epoch FROM now() - min(parked_at) FILTER (WHERE state = 3)), 0)::float8,
			coalesce(greatest(extract(epoch FROM now() - min(not_before) FILTER (WHERE state = 1)), 0), 0)::float8 FROM `+inbox.parked+`) AS p,
		(SELECT coalesce(extract(epoch FROM now() - min(created_at)), 0)::float8 FROM `+box.table+` AS m WHERE `+box.ready()+`) AS r,
		(SELECT count(*), coalesce(extract(epoch FROM now() - max(updated_at)), 0)::float8,
			coalesce(extract(epoch FROM now() - min(updated_at) FILTER (WHERE deaths > 0)), 0)::float8 FROM `+inbox.offsets+`) AS f`, nil,
		&stats.Outbox, &stats.OutboxRefused, &outbox, &stats.Waiting, &stats.Behind, &stats.Dead, &dead, &due, &stats.Partitions, &moved, &begun)
	if err != nil {
		return MessageStatistics{}, fmt.Errorf("statistics of messages: %w", err)
	}
	stats.OldestOutbox, stats.OldestDead, stats.OldestDue = seconds(outbox), seconds(dead), seconds(due)
	stats.SinceMoved, stats.OldestBegun = seconds(max(moved, 0)), seconds(max(begun, 0))
	return stats, nil
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// readBounded reads one row of figures about a table, within StatisticsTimeoutMax on the server.
func (s *Store) readBounded(ctx context.Context, table, sql string, args []any, dest ...any) error {
	tx, err := s.pool.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.ReadCommitted, AccessMode: pgx.ReadOnly})
	if err != nil {
		return wire.SQLError(err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), StatisticsTimeoutMax)
		defer cancel()
		_ = tx.Rollback(ctx) // it wrote nothing
	}()
	// The server's timeout bounds it: a ctx that ends would cost the pool its connection. Nothing is
	// prepared, because preparing waits for a locked table too, before the timeout is set. With
	// row_security off, the next statement fails if policies would hide rows from its count.
	_, err = tx.Exec(ctx, "SELECT set_config('statement_timeout', $1, true), set_config('row_security', 'off', true)", pgx.QueryExecModeExec, fmt.Sprint(StatisticsTimeoutMax.Milliseconds()))
	if err == nil {
		err = tx.QueryRow(ctx, sql, append([]any{pgx.QueryExecModeExec}, args...)...).Scan(dest...)
	}
	var pgErr *pgconn.PgError
	switch {
	case errors.As(err, &pgErr) && pgErr.Code == "42501" && pgErr.Routine == "check_enable_rls":
		return rowSecurity(pgx.Identifier{s.options.Schema, table}.Sanitize(), "")
	case err != nil:
		return wire.SQLError(err)
	}
	return nil
}

// statisticsSQL reads every n-th page from a random one on. Records that expire together lie
// together, so pages at even distances give a better estimate than as many random ones. Each page
// is a TID range of its own, and nothing else is read: the aggregate around it keeps the planner
// from joining instead.
func (s *Store) statisticsSQL() string {
	return `
		SELECT size.pages, pg_table_size($1::regclass), pg_indexes_size($1::regclass), count(page.number),
			coalesce(sum(found.records), 0)::bigint, coalesce(sum(found.expired), 0)::bigint,
			coalesce(greatest(extract(epoch FROM statement_timestamp() - min(found.oldest)), 0), 0)::float8
		FROM (SELECT pg_relation_size($1::regclass) / current_setting('block_size')::bigint AS pages) size
		LEFT JOIN LATERAL (
			SELECT floor((n + $3::float8) * size.pages / least(size.pages, $2::bigint))::bigint AS number
			FROM generate_series(0, least(size.pages, $2::bigint) - 1) n
		) page ON true
		LEFT JOIN LATERAL (
			SELECT count(*) FILTER (WHERE status <> 0) AS records, count(*) FILTER (WHERE expires_at < statement_timestamp() AND status <> 0) AS expired, min(expires_at) FILTER (WHERE status <> 0) AS oldest
			FROM ONLY ` + pgx.Identifier{s.options.Schema, TableName}.Sanitize() + `
			WHERE ctid >= format('(%s,0)', page.number)::tid AND ctid < format('(%s,0)', page.number + 1)::tid
		) found ON true
		GROUP BY size.pages`
}
