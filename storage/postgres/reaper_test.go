package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres"
)

// plant puts records into the table: every third is live, the others have expired. Their keys are 1
// to rows.
func (b *testBundle) plant(t *testing.T, rows, bodyBytes int) {
	t.Helper()
	if _, err := b.pool.Exec(context.Background(), `
		INSERT INTO idempotency_keys (created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)
		SELECT now() - interval '2 days', now() + CASE WHEN n % 3 = 0 THEN interval '1 hour' ELSE interval '-1 second' END,
		       201, 1, gen_random_uuid(), 'acme', n::text, sha256('x'), '\x0100', repeat('x', $2)::bytea
		FROM generate_series(1, $1) AS n`, rows, bodyBytes); err != nil {
		t.Fatal(err)
	}
}

// pages returns the number of pages of the table.
func (b *testBundle) pages(t *testing.T) int {
	return b.count(t, "SELECT pg_relation_size('idempotency_keys') / 8192")
}

// A place in a child table is another row than the same place in ours.
func TestDeleteExpiredLeavesChildTablesAlone(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.plant(t, 30, 1)
	b.exec(t, "CREATE TABLE archive () INHERITS (idempotency_keys)")
	b.exec(t, "INSERT INTO archive SELECT * FROM ONLY idempotency_keys")
	if n, err := b.store.DeleteExpired(context.Background()); n != 20 || err != nil {
		t.Errorf("%d deleted, %v, want 20", n, err)
	}
	if n := b.count(t, "SELECT count(*) FROM archive"); n != 30 {
		t.Errorf("%d rows in the child table, want 30", n)
	}
	if stats, err := b.store.Statistics(context.Background()); err != nil || stats.Records != 10 || stats.Expired != 0 {
		t.Errorf("%+v, %v", stats, err)
	}
}

// The reaper deletes everything expired and nothing else, across many pages. A page with a held row
// is left to the next walk.
func TestDeleteExpiredWalksTheWholeTable(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	b := setup(t, nil)
	const rows = 60_000 // over ReaperPagesMax pages
	b.plant(t, rows, 100)
	if pages := b.pages(t); pages <= postgres.ReaperPagesMax {
		t.Fatalf("%d pages fit into one batch", pages)
	}
	held, err := b.pool.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := held.Exec(ctx, "SELECT FROM idempotency_keys WHERE key = '1' FOR UPDATE"); err != nil {
		t.Fatal(err)
	}
	onPage := b.count(t, "SELECT count(*) FROM idempotency_keys WHERE ctid < '(1,0)' AND expires_at < now()")
	if n, err := b.store.DeleteExpired(ctx); n != int64(rows*2/3-onPage) || err != nil {
		t.Errorf("%d deleted, %v; want %d", n, err, rows*2/3-onPage)
	}
	if err := held.Rollback(ctx); err != nil {
		t.Fatal(err)
	}
	if n, err := b.store.DeleteExpired(ctx); n != int64(onPage) || err != nil {
		t.Errorf("%d deleted, %v; want %d", n, err, onPage)
	}
	if n := b.count(t, "SELECT count(*) FROM idempotency_keys"); n != rows/3 {
		t.Errorf("%d are left, want %d", n, rows/3)
	}
}

// A walk that meets held rows everywhere gives up, and returns an error.
func TestDeleteExpiredGivesUpWhereEverythingIsHeld(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	b := setup(t, nil)
	b.plant(t, 4*postgres.ReaperHeldMax, 1800) // four on a page
	held, err := b.pool.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = held.Rollback(ctx) }() // the pool can't be closed before
	if _, err := held.Exec(ctx, "SELECT FROM idempotency_keys FOR UPDATE"); err != nil {
		t.Fatal(err)
	}
	n, err := b.store.DeleteExpired(ctx)
	var pgErr *pgconn.PgError
	if n != 0 || !errors.As(err, &pgErr) || pgErr.Code != "55P03" {
		t.Errorf("%d deleted, %v; want SQLSTATE 55P03", n, err)
	}
}

// Concurrent reapers share the table: each row is deleted once, and no reaper fails.
func TestReapersAtOnceShareTheTable(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	const rows = 30_000
	b.plant(t, rows, 400) // over ReaperPagesMax pages
	if pages := b.pages(t); pages <= postgres.ReaperPagesMax {
		t.Fatalf("%d pages fit into one range", pages)
	}
	var all sync.WaitGroup
	var mu sync.Mutex
	sum := int64(0)
	for range 4 {
		all.Go(func() {
			n, err := b.store.DeleteExpired(context.Background())
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			sum += n
		})
	}
	all.Wait()
	if left := b.count(t, "SELECT count(*) FROM idempotency_keys"); sum != rows*2/3 || left != rows/3 {
		t.Errorf("%d deleted and %d left, want %d and %d", sum, left, rows*2/3, rows/3)
	}
}

// If a batch takes longer than statement_timeout, as one of large bodies may, it is retried in
// halves, down to one page. If a page still takes too long, that is an error, and the deletions
// before it stay.
func TestDeleteExpiredHalvesWhatTakesTooLong(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	for _, c := range []struct {
		name        string
		timeout     time.Duration
		quickRows   int // the number that can be deleted in time
		deletedRows int64
		code        string
	}{
		{"a page is not too much", time.Second, 4, 16, ""},
		{"a page is too much", 300 * time.Millisecond, 0, 0, "57014"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, &setupOptions{store: &postgres.Options{StatementTimeout: c.timeout}})
			b.plant(t, 24, 1800) // four on a page
			if pages := b.pages(t); pages != 6 {
				t.Fatalf("%d pages, want 6", pages)
			}
			if _, err := b.pool.Exec(ctx, `CREATE FUNCTION takes_long() RETURNS trigger LANGUAGE plpgsql AS $$
				BEGIN
					IF (SELECT count(*) FROM deleted) > TG_ARGV[0]::int THEN
						PERFORM pg_sleep(60);
					END IF;
					RETURN NULL;
				END $$`); err != nil {
				t.Fatal(err)
			}
			if _, err := b.pool.Exec(ctx, "CREATE TRIGGER takes_long AFTER DELETE ON idempotency_keys REFERENCING OLD TABLE AS deleted FOR EACH STATEMENT EXECUTE FUNCTION takes_long("+
				strconv.Itoa(c.quickRows)+")"); err != nil {
				t.Fatal(err)
			}
			n, err := b.store.DeleteExpired(ctx)
			var pgErr *pgconn.PgError
			if errors.As(err, &pgErr); n != c.deletedRows || (pgErr == nil) != (c.code == "") || pgErr != nil && pgErr.Code != c.code {
				t.Errorf("%d deleted, %v; want %d and SQLSTATE %q", n, err, c.deletedRows, c.code)
			}
		})
	}
}

func TestReaperRunsUntilItIsStopped(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	ctx, cancel := context.WithCancel(context.Background())
	walks := make(chan error)
	stopped := make(chan struct{})
	reaper := postgres.NewReaper(b.store, &postgres.ReaperOptions{Interval: time.Millisecond, OnWalk: func(_ int64, _ time.Duration, err error) {
		select {
		case walks <- err:
		case <-ctx.Done():
		}
	}})
	go func() {
		defer close(stopped)
		reaper.Run(ctx)
	}()
	if err := <-walks; err != nil {
		t.Error(err)
	}
	if _, err := b.pool.Exec(context.Background(), "ALTER TABLE idempotency_keys RENAME TO elsewhere"); err != nil {
		t.Fatal(err)
	}
	var pgErr *pgconn.PgError
	for err := range walks {
		if errors.As(err, &pgErr) { // reported, and tried again
			break
		}
	}
	if _, err := b.pool.Exec(context.Background(), "ALTER TABLE elsewhere RENAME TO idempotency_keys"); err != nil {
		t.Fatal(err)
	}
	for err := range walks {
		if err == nil {
			break
		}
	}
	cancel()
	<-stopped
}

// The reaper uses only the database's clock: it sends no time.
func TestReaperSendsNoTime(t *testing.T) {
	t.Parallel()
	var sent []string
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) {
		c.ConnConfig.Tracer = argumentTracer(func(sql string, arguments []any) {
			if !strings.Contains(sql, "DELETE FROM") {
				return
			}
			for _, argument := range arguments {
				sent = append(sent, fmt.Sprintf("%T", argument))
			}
		})
	}})
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	if _, err := b.store.DeleteExpired(context.Background()); err != nil {
		t.Fatal(err)
	}
	// The first page, the last, and the lock's number.
	if fmt.Sprint(sent) != "[pgx.QueryExecMode string string int64]" {
		t.Errorf("the batch was sent with %v", sent)
	}
}

type argumentTracer func(sql string, arguments []any)

func (f argumentTracer) TraceQueryStart(ctx context.Context, _ *pgx.Conn, data pgx.TraceQueryStartData) context.Context {
	f(data.SQL, data.Args)
	return ctx
}

func (argumentTracer) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}
