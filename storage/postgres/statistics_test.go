package postgres_test

import (
	"context"
	"encoding/json"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency/storage/postgres"
)

func TestStatisticsOfASmallTableAreExact(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	b := setup(t, &setupOptions{store: &postgres.Options{Schema: "house"}})
	if got, err := b.store.Statistics(ctx); err != nil || got.Records != 0 || got.Expired != 0 || got.Overdue != 0 || got.IndexBytes == 0 {
		t.Errorf("of an empty table: %+v, %v", got, err)
	}
	for n := range 9 {
		if _, err := b.pool.Exec(ctx, `INSERT INTO house.idempotency_keys (created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)
			VALUES (now(), now() + CASE WHEN $1 % 3 = 0 THEN interval '1 hour' ELSE $1 * interval '-1 minute' END, 201, 1, gen_random_uuid(), 'acme', $1::int::text, '\x00', '\x0100', '')`, n); err != nil {
			t.Fatal(err)
		}
	}
	got, err := b.store.Statistics(ctx)
	if err != nil || got.Records != 9 || got.Expired != 6 || got.TableBytes == 0 || got.IndexBytes == 0 {
		t.Errorf("%+v, %v; want 9 records, 6 of them expired", got, err)
	}
	if got.Overdue < 8*time.Minute || got.Overdue > 9*time.Minute {
		t.Errorf("overdue for %v, want 8 minutes", got.Overdue)
	}
}

// However large the table is, at most StatisticsPagesMax of its pages are read, and the estimates
// are near. The figures of open requests say how many are open, and how long the oldest of each
// kind has been. An open request always has a time at which it is due, unless a person has to end
// it.
func TestStatisticsOfOpenRequests(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	b := setup(t, &setupOptions{store: &postgres.Options{Schema: "house"}})
	if got, err := b.store.OpenStatistics(ctx); err != nil || got != (postgres.OpenStatistics{}) {
		t.Errorf("without any: %+v, %v", got, err)
	}
	for i, r := range []struct {
		started, due string
		parked       any
	}{
		{"3 hours", "1 minute", nil},    // runs
		{"2 hours", "-10 minutes", nil}, // due
		{"1 hour", "-5 minutes", nil},   // due
		{"5 hours", "-4 hours", "why"},
	} {
		if _, err := b.pool.Exec(ctx, `INSERT INTO house.idempotency_open (next_at, started_at, epoch, lease_ms, ttl_ms, runs, owned, scope, key, route, parked, request)
			VALUES (now() + $1::interval, now() - $2::interval, 1, 1, 1, 1, false, 'acme', $3::int::text, 'topup/1', $4, '')`, r.due, r.started, i, r.parked); err != nil {
			t.Fatal(err)
		}
	}
	got, err := b.store.OpenStatistics(ctx)
	if err != nil || got.Open != 4 || got.Parked != 1 || got.Due != 2 {
		t.Errorf("%+v, %v", got, err)
	}
	for name, c := range map[string]struct{ got, want time.Duration }{
		"open": {got.OldestOpen, 3 * time.Hour}, "parked": {got.OldestParked, 5 * time.Hour}, "due": {got.OldestDue, 10 * time.Minute},
	} {
		if c.got < c.want || c.got > c.want+time.Minute {
			t.Errorf("the oldest that is %s: %v, want %v", name, c.got, c.want)
		}
	}
	if _, err := b.pool.Exec(ctx, "UPDATE house.idempotency_open SET next_at = NULL"); err == nil {
		t.Error("an open request may be due never")
	}
}

// Each message is counted once, and one behind a refused or parked message has no part in the ages: a
// relay can't publish it, and no consumer can try it.
func TestStatisticsOfMessages(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	b := setup(t, &setupOptions{store: &postgres.Options{Schema: "house"}})
	if got, err := b.store.MessageStatistics(ctx); err != nil || got != (postgres.MessageStatistics{}) {
		t.Errorf("without any: %+v, %v", got, err)
	}
	for _, sql := range []string{
		`INSERT INTO house.message_outbox (created_at, shard, message_id, topic, key, refused, headers, body) SELECT now() - age, 3, gen_random_uuid(), 't', key, refused, '', '' FROM (VALUES
			('5 hours'::interval, 'a'::bytea, 'too large'), ('4 hours', 'a', NULL), ('1 hour', 'b', NULL), ('1 minute', NULL, NULL)) AS m (age, key, refused)`,
		`INSERT INTO house.message_parked (parked_at, not_before, position, partition, attempts, state, consumer, message_id, source, topic, error, headers, body)
			SELECT now() - age, now() + due, 0, 0, 1, state, 'ledger', state::text || age::text, 's', 't', '', '', '' FROM (VALUES
			('1 hour'::interval, '-10 minutes'::interval, 1), ('6 hours', '1 hour', 1), ('7 hours', NULL, 2), ('2 hours', NULL, 3), ('3 hours', NULL, 3)) AS m (age, due, state)`,
		`INSERT INTO house.message_offsets (next_offset, updated_at, incarnation, attempt_id, partition, deaths, consumer, source) SELECT 7, now() - age, gen_random_uuid(), gen_random_uuid(), n, deaths, 'ledger', 's' FROM (VALUES
			(0, '20 minutes'::interval, 0), (1, '30 minutes', 1), (2, '9 hours', 0)) AS m (n, age, deaths)`,
	} {
		if _, err := b.pool.Exec(ctx, sql); err != nil {
			t.Fatal(err)
		}
	}
	got, err := b.store.MessageStatistics(ctx)
	if err != nil || got.Outbox != 3 || got.OutboxRefused != 1 || got.Waiting != 2 || got.Behind != 1 || got.Dead != 2 || got.Partitions != 3 {
		t.Errorf("%+v, %v", got, err)
	}
	for name, c := range map[string]struct{ got, want time.Duration }{
		"in the outbox": {got.OldestOutbox, time.Hour}, "dead": {got.OldestDead, 3 * time.Hour}, "due": {got.OldestDue, 10 * time.Minute},
		"moved": {got.SinceMoved, 20 * time.Minute}, "begun": {got.OldestBegun, 30 * time.Minute},
	} {
		if c.got < c.want || c.got > c.want+time.Minute {
			t.Errorf("%s: %v, want %v", name, c.got, c.want)
		}
	}
}

func TestStatisticsReadAFewPages(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	b := setup(t, nil)
	const rows = 60_000
	b.plant(t, rows, 100)
	if pages := b.pages(t); pages <= 4*postgres.StatisticsPagesMax {
		t.Fatalf("%d pages are too few to tell", pages)
	}
	got, err := b.store.Statistics(ctx)
	if err != nil {
		t.Fatal(err)
	}
	near := func(name string, got int64, want float64) {
		if math.Abs(float64(got)-want) > want/20 {
			t.Errorf("%s: %d, want %.0f give or take a twentieth", name, got, want)
		}
	}
	near("records", got.Records, rows)
	near("expired", got.Expired, rows*2/3)
	if want := b.count(t, "SELECT pg_table_size('idempotency_keys')"); got.TableBytes != int64(want) {
		t.Errorf("%d bytes, want %d", got.TableBytes, want)
	}

	var plan []byte
	if err := b.pool.QueryRow(ctx, "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) "+postgres.StatisticsSQL(b.store), `"public"."idempotency_keys"`, postgres.StatisticsPagesMax, .5).Scan(&plan); err != nil {
		t.Fatal(err)
	}
	var explained []struct {
		Plan struct {
			Hit  int `json:"Shared Hit Blocks"`
			Read int `json:"Shared Read Blocks"`
		}
	}
	if err := json.Unmarshal(plan, &explained); err != nil {
		t.Fatal(err)
	}
	const catalogue = 100 // pages of system tables
	if touched := explained[0].Plan.Hit + explained[0].Plan.Read; touched < postgres.StatisticsPagesMax || touched > postgres.StatisticsPagesMax+catalogue {
		t.Errorf("%d pages are read, want %d\n%s", touched, postgres.StatisticsPagesMax, plan)
	}
}

// A locked table delays the figures by StatisticsTimeoutMax, and the pool gets its connection back.
func TestStatisticsGiveUp(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	b := setup(t, nil)
	tx, err := b.pool.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(ctx) }()
	// A new connection would wait when it is prepared.
	if err := b.pool.Ping(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(ctx, "LOCK TABLE idempotency_keys IN ACCESS EXCLUSIVE MODE"); err != nil {
		t.Fatal(err)
	}
	// The store's lock_timeout, which is longer, would end it with 55P03.
	if got, err := b.store.Statistics(ctx); err == nil || !strings.Contains(err.Error(), "57014") {
		t.Errorf("a locked table was read, or waited for too long: %+v, %v", got, err)
	}
	if err := tx.Rollback(ctx); err != nil {
		t.Fatal(err)
	}
	made := b.pool.Stat().NewConnsCount()
	if got, err := b.store.Statistics(ctx); err != nil || got.Records != 0 {
		t.Errorf("%+v, %v", got, err)
	}
	if b.pool.Stat().NewConnsCount() != made {
		t.Error("the connection was lost")
	}
	var timeout string
	if err := b.pool.QueryRow(ctx, "SHOW statement_timeout").Scan(&timeout); err != nil || timeout != "10s" {
		t.Errorf("statement_timeout is %s, %v: it must stay the store's", timeout, err)
	}
}

// MessageStatistics leaves nothing behind: only relays and queues have a channel that wakes them.
func TestMessageStatisticsWakeNobody(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	outbox := b.store.Outbox()
	for range 3 {
		if _, err := b.store.MessageStatistics(t.Context()); err != nil {
			t.Fatal(err)
		}
		outbox.Nudged()
	}
	if n := postgres.NudgedReaders(b.store); n != 1 {
		t.Errorf("%d readers of the outbox are woken, want the relay's", n)
	}
}
