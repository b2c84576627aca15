package postgres

import (
	"context"
	"reflect"
	"sync"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres/internal/sealed"
	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

// ReaperPagesMax is the size of a batch.
const ReaperPagesMax = reaperPagesMax

// ReaperHeldMax is the maximum number of times that a walk waits for a held row.
const ReaperHeldMax = reaperHeldMax

// AbandonTimeout is the time to wait for a goroutine that was left behind.
const AbandonTimeout = sealed.AbandonTimeout

// TogetherBytesMax is the maximum size of a record that is sent without a Sync in front of it.
const TogetherBytesMax = wire.TogetherBytesMax

// RawConn returns the connection behind the seal. A handler in bad faith might find another way to
// it.
func RawConn(tx pgx.Tx) *pgx.Conn {
	conn := reflect.ValueOf(tx).Elem().FieldByName("conn")
	return *(**pgx.Conn)(conn.Addr().UnsafePointer())
}

// NudgedReaders returns the number of readers that each message of this process wakes.
func NudgedReaders(s *Store) int {
	s.nudges.mu.Lock()
	defer s.nudges.mu.Unlock()
	return len(s.nudges.readers)
}

// RawConnOf returns the connection of an attempt.
func RawConnOf(a idempotency.Attempt) *pgx.Conn { return a.(*keyedAttempt).pooled.Conn() }

// SendUnadmitted sends SQL as Exec and Query do, but past the guard that reads its text: the store
// remembers the text as one that it has admitted.
func SendUnadmitted(ctx context.Context, tx pgx.Tx, exec bool, sql string, arguments ...any) (err error) {
	texts := reflect.ValueOf(tx).Elem().FieldByName("settings").Elem().FieldByName("texts")
	mu := (*sync.RWMutex)(texts.FieldByName("mu").Addr().UnsafePointer())
	admitted := (*map[string]struct{})(texts.FieldByName("admitted").Addr().UnsafePointer())
	mu.Lock()
	if *admitted == nil {
		*admitted = map[string]struct{}{}
	}
	(*admitted)[sql] = struct{}{}
	mu.Unlock()
	if exec {
		_, err := tx.Exec(ctx, sql, arguments...)
		return err
	}
	rows, err := tx.Query(ctx, sql, arguments...)
	if err != nil {
		return err
	}
	rows.Close()
	return rows.Err()
}

// ResolversOf returns the maximum number of concurrent resolvers.
func ResolversOf(s *Store) int { return cap(s.resolvers) }

// ForgetRecentKey removes the key from a store's recent keys, as if another process had recorded
// it.
func ForgetRecentKey(s *Store, key idempotency.Key) { s.recent.clear(key.LockNumber(s.table)) }

// StatisticsSQL returns the statement of Statistics.
func StatisticsSQL(s *Store) string { return s.statisticsSQL() }

// DeferredTextsMax is the maximum number of deferred statements that a connection remembers.
const DeferredTextsMax = sealed.DeferredTextsMax

// QueueWaiting looks for the shards that have messages of a queue.
func QueueWaiting(ctx context.Context, q *Queue) error {
	_, err := q.waiting(ctx)
	return err
}

// QueueRead reads the messages of a shard.
func QueueRead(ctx context.Context, q *Queue, shard int) error {
	_, err := q.read(ctx, shard, 1)
	return err
}
