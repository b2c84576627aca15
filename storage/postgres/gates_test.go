package postgres_test

import (
	"bytes"
	"context"
	"testing"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgserver"
	"github.com/paidonce/idempotency/storage/postgres"
)

// The limits that a change must keep. Each was measured, and is as tight as the figure is steady.
// The limits of round trips are in TestRoundTripsAreThoseOfAPlainTransaction, those of allocations
// in middleware/gates_test.go.
const (
	// WAL of a fresh request, minus that of its handler in a plain transaction, for an answer of
	// answerBytes and a UUIDv7 key: 411 B for the row, 104 B for its place in the primary key, and
	// a share of new pages. The body is 200 B of it.
	walRequestBytesMax = 540

	// WAL of one expired record with such an answer, including the page images after a checkpoint:
	// docs/decisions/0011-expiry.md.
	walDeleteBytesMax = 465
	walVacuumBytesMax = 85

	connectionsMax = 1
)

const answerBytes = 200

// quiet returns a store on a separate PostgreSQL, to which nothing else writes WAL: no other test,
// no autovacuum, no checkpoint but ours. Page images are written as in production.
func quiet(t *testing.T) *testBundle {
	t.Helper()
	server, err := pgserver.Start(t.Context(), &pgserver.Options{Settings: map[string]string{
		"fsync": "off", "full_page_writes": "on", "autovacuum": "off", "checkpoint_timeout": "1h", "wal_level": "replica",
		"wal_compression": "off", "bgwriter_lru_maxpages": "0",
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	return setup(t, &setupOptions{database: server.URL(), configure: func(c *pgxpool.Config) { c.MaxConns = 1 }})
}

// wal returns the number of bytes of WAL that do writes.
func (b *testBundle) wal(t *testing.T, do func()) int {
	t.Helper()
	position := func() int {
		return b.count(t, "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn")
	}
	before := position()
	do()
	return position() - before
}

func (b *testBundle) exec(t *testing.T, sql string, arguments ...any) {
	t.Helper()
	if _, err := b.pool.Exec(context.Background(), sql, arguments...); err != nil {
		t.Fatal(err)
	}
}

// timeOrdered returns keys as clients should make them: UUIDv7.
func timeOrdered(t *testing.T, n int) []string {
	t.Helper()
	keys := make([]string, n)
	for i := range keys {
		id, err := uuid.NewV7()
		if err != nil {
			t.Fatal(err)
		}
		keys[i] = id.String()
	}
	return keys
}

// The same handler with and without a key, many times in turn: nothing but the record may be added.
func TestGateWALOfARequest(t *testing.T) {
	t.Parallel()
	const requests = 500
	ctx := context.Background()
	b := quiet(t)
	engine := idempotency.NewEngine(b.store, nil)
	plain := func() {
		for range requests {
			tx, err := b.pool.Begin(ctx)
			if err != nil {
				t.Fatal(err)
			}
			statements(ctx, t, tx)
			if err := tx.Commit(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	said := &idempotency.Answer{Status: 201, Header: map[string][]string{"Content-Type": {"application/json"}}, Body: bytes.Repeat([]byte("x"), answerBytes)}
	keyed := func() {
		for _, key := range timeOrdered(t, requests) {
			if result := engine.Do(ctx, request(key, ""), func(ctx context.Context) (*idempotency.Answer, error) {
				statements(ctx, t, postgres.Tx(ctx))
				return said, nil
			}); result.Outcome != idempotency.OutcomeExecuted {
				t.Fatal(result.Err)
			}
		}
	}
	plain() // so that the pages that both write to exist
	keyed()
	bare, ours := b.wal(t, plain), b.wal(t, keyed)
	added := (ours - bare) / requests
	t.Logf("WAL of a request: %d B, of its handler alone %d B: %d B more", ours/requests, bare/requests, added)
	if added > walRequestBytesMax || added < answerBytes {
		t.Errorf("a key adds %d B of WAL to a request; the limit is %d", added, walRequestBytesMax)
	}
}

func TestGateWALOfExpiry(t *testing.T) {
	t.Parallel()
	const records = 5000
	ctx := context.Background()
	b := quiet(t)
	rows := make([][]any, records)
	for i, key := range timeOrdered(t, records) {
		rows[i] = []any{key, bytes.Repeat([]byte("x"), answerBytes)}
	}
	b.exec(t, "CREATE TEMPORARY TABLE planted (key text, body bytea)")
	if _, err := b.pool.CopyFrom(ctx, pgx.Identifier{"planted"}, []string{"key", "body"}, pgx.CopyFromRows(rows)); err != nil {
		t.Fatal(err)
	}
	b.exec(t, `INSERT INTO idempotency_keys (created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)
		SELECT now() - interval '2 days', now() - interval '1 day', 201, 1, gen_random_uuid(), 'acme', key, sha256('x'), $1, body FROM planted`,
		append([]byte{1, 1, 12}, "Content-Type\x10application/json"...))
	b.exec(t, "VACUUM idempotency_keys")
	b.exec(t, "CHECKPOINT")
	deleted := b.wal(t, func() {
		if n, err := b.store.DeleteExpired(ctx); n != records || err != nil {
			t.Fatalf("%d deleted, %v", n, err)
		}
	}) / records
	vacuumed := b.wal(t, func() { b.exec(t, "VACUUM idempotency_keys") }) / records
	t.Logf("WAL of an expired record: DELETE %d B, VACUUM %d B", deleted, vacuumed)
	if deleted > walDeleteBytesMax || vacuumed > walVacuumBytesMax || deleted < answerBytes {
		t.Errorf("an expired record costs %d B of WAL and %d B more in VACUUM; the limits are %d and %d", deleted, vacuumed, walDeleteBytesMax, walVacuumBytesMax)
	}
}

// A request holds one connection and never acquires another: with a second one a full pool would be
// a deadlock.
func TestGateConnectionsOfARequest(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	b := setup(t, nil)
	engine := idempotency.NewEngine(b.store, nil)
	for i, c := range []struct {
		name   string
		key    string
		status int
		want   idempotency.Outcome
	}{
		{"fresh request", "fresh", 201, idempotency.OutcomeExecuted},
		{"decline", "declined", 402, idempotency.OutcomeExecuted},
		{"forgotten answer", "forgotten", 500, idempotency.OutcomeNotExecuted},
		{"without a key", "", 201, idempotency.OutcomeExecuted},
		{"replay", "fresh", 201, idempotency.OutcomeReplayed},
	} {
		before := b.pool.Stat().AcquireCount()
		result := engine.Do(ctx, request(c.key, ""), func(ctx context.Context) (*idempotency.Answer, error) {
			statements(ctx, t, postgres.Tx(ctx))
			return answer(c.status), nil
		})
		if n := b.pool.Stat().AcquireCount() - before; n != connectionsMax || result.Outcome != c.want {
			t.Errorf("%s (%d): %d connections and %q (%v), want %d and %q", c.name, i, n, result.Outcome, result.Err, connectionsMax, c.want)
		}
	}
	if n := b.pool.Stat().TotalConns(); n != 1 {
		t.Errorf("one request after another made %d connections", n)
	}
}
