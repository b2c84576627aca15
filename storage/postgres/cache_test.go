package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

// cached is a store with a cache, whose clock the test moves, on one connection.
type cached struct {
	*testBundle
	t   *testing.T
	now atomic.Int64
}

func setupCached(t *testing.T) *cached {
	t.Helper()
	c := &cached{t: t}
	c.testBundle = setup(t, &setupOptions{
		store:     &postgres.Options{CacheBytesMax: postgres.CacheBytesMin},
		configure: func(c *pgxpool.Config) { c.MaxConns = 1 },
	})
	c.pass(time.Hour)
	postgres.SetCacheClock(c.store, func() time.Duration { return time.Duration(c.now.Add(1)) })
	return c
}

// pass lets time go by, for the cache.
func (c *cached) pass(d time.Duration) { c.now.Add(int64(d)) }

// keepProof has the store hear of the primary, and nothing of the key.
func (c *cached) keepProof() {
	c.t.Helper()
	want(c.t, c.do(c.t, request("", ""), pay(c.t, 500)), idempotency.OutcomeNotExecuted, "")
}

// expect sends the request of a key and says what it must cost and become.
func (c *cached) expect(key string, outcome idempotency.Outcome, roundTrips int) idempotency.Result {
	c.t.Helper()
	before := c.wire.count()
	result := c.do(c.t, request(key, ""), pay(c.t, 201))
	if got := c.wire.count() - before; got != roundTrips || result.Outcome != outcome {
		c.t.Errorf("%s: %s in %d round trips, want %s in %d: %v", key, result.Outcome, got, outcome, roundTrips, result.Err)
	}
	return result
}

const paid = 3 // round trips of a handler with one statement

func TestCachedReplayAsksNobody(t *testing.T) {
	t.Parallel()
	c := setupCached(t)
	c.keepProof() // and warm
	c.expect("k", idempotency.OutcomeExecuted, paid)
	first := c.expect("k", idempotency.OutcomeReplayed, 1)
	again := c.expect("k", idempotency.OutcomeReplayed, 0)
	if fmt.Sprint(first.Record) != fmt.Sprint(again.Record) || first.Record == again.Record {
		t.Errorf("replayed %+v from the database and %+v from the cache", first.Record, again.Record)
	}
	other := request("k", "another body")
	want(t, c.do(t, other, pay(t, 201)), idempotency.OutcomeMismatch, idempotency.ReasonKeyReused)
	other = request("k", "")
	other.Key.Scope = "globex"
	want(t, c.do(t, other, pay(t, 201)), idempotency.OutcomeExecuted, "")
	if n := c.effects(t); n != 2 {
		t.Errorf("%d effects, want 2", n)
	}
}

// The proof that the primary is there lasts a second; any request renews it.
func TestCachedReplayNeedsAWordFromThePrimary(t *testing.T) {
	t.Parallel()
	c := setupCached(t)
	c.keepProof()
	c.expect("k", idempotency.OutcomeExecuted, paid)
	c.expect("k", idempotency.OutcomeReplayed, 1)
	c.pass(postgres.CacheProofMax)
	c.expect("k", idempotency.OutcomeReplayed, 1)
	c.expect("k", idempotency.OutcomeReplayed, 0)
	c.pass(postgres.CacheProofMax)
	c.keepProof()
	c.expect("k", idempotency.OutcomeReplayed, 0)
}

// A row that was deleted by hand is forgotten within CacheAgeMax, however busy the store is.
func TestForgottenKeyLeavesTheCache(t *testing.T) {
	t.Parallel()
	c := setupCached(t)
	c.keepProof()
	c.expect("k", idempotency.OutcomeExecuted, paid)
	c.expect("k", idempotency.OutcomeReplayed, 1)
	c.count(t, "WITH gone AS (DELETE FROM idempotency_keys RETURNING 1) SELECT count(*) FROM gone")
	for range 9 {
		c.pass(postgres.CacheAgeMax / 10)
		c.keepProof()
		c.expect("k", idempotency.OutcomeReplayed, 0)
	}
	c.pass(postgres.CacheAgeMax / 10)
	c.keepProof()
	c.expect("k", idempotency.OutcomeExecuted, paid+1) // the hint is still there
}

// Once its time is over a record is not replayed from the cache: the database says whether it still counts.
func TestExpiredRecordLeavesTheCache(t *testing.T) {
	t.Parallel()
	c := setupCached(t)
	c.keepProof()
	req := request("k", "")
	req.TTL = time.Minute
	want(t, c.do(t, req, pay(t, 201)), idempotency.OutcomeExecuted, "")
	c.count(t, "WITH late AS (UPDATE idempotency_keys SET expires_at = clock_timestamp() + interval '5 s' RETURNING 1) SELECT count(*) FROM late")
	c.expect("k", idempotency.OutcomeReplayed, 1)
	c.pass(time.Second)
	c.keepProof()
	c.expect("k", idempotency.OutcomeReplayed, 0)
	c.pass(4 * time.Second)
	c.keepProof()
	c.expect("k", idempotency.OutcomeReplayed, 1) // its row is there
}

// A key that was reaped and runs again: its old answer is in nobody's way, neither while it runs nor after.
func TestReapedKeyThatRunsAgainReplaysItsNewAnswer(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{store: &postgres.Options{CacheBytesMax: postgres.CacheBytesMin}})
	engine := idempotency.NewEngine(b.store, nil)
	do := func(body string, run func()) idempotency.Result {
		return engine.Do(context.Background(), request("k", ""), func(context.Context) (*idempotency.Answer, error) {
			run()
			return &idempotency.Answer{Status: 201, Body: []byte(body)}, nil
		})
	}
	never := func() { t.Error("the handler ran") }
	want(t, do("old", func() {}), idempotency.OutcomeExecuted, "")
	want(t, do("", never), idempotency.OutcomeReplayed, "")
	if n, _ := postgres.CachedOf(b.store); n != 1 {
		t.Fatalf("%d answers are cached", n)
	}
	b.count(t, "WITH gone AS (DELETE FROM idempotency_keys RETURNING 1) SELECT count(*) FROM gone")
	postgres.LoseProof(b.store)
	want(t, do("new", func() {
		want(t, do("", never), idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
	}), idempotency.OutcomeExecuted, "")
	for range 2 {
		again := do("", never)
		want(t, again, idempotency.OutcomeReplayed, "")
		if got := string(again.Answer.Body); got != "new" {
			t.Errorf("replayed %q", got)
		}
	}
}

// An error of a connection empties the cache: there may be another server behind it. One of a statement does not.
func TestLostConnectionEmptiesTheCache(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	b := setup(t, &setupOptions{store: &postgres.Options{CacheBytesMax: postgres.CacheBytesMin}, configure: func(c *pgxpool.Config) { c.MaxConns = 1 }})
	admin, err := pgx.ConnectConfig(ctx, b.pool.Config().ConnConfig)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = admin.Close(ctx) }()
	kill := func() {
		for n := 1; n > 0; {
			if err := admin.QueryRow(ctx, "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()").Scan(&n); err != nil {
				t.Fatal(err)
			}
		}
	}
	want(t, b.do(t, request("known", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	for _, c := range []struct {
		name   string
		lose   func(key string)
		cached int
	}{
		{"nothing", func(string) {}, 1},
		{"statement", func(key string) {
			b.do(t, request(key, ""), func(ctx context.Context, tx pgx.Tx) int {
				_, _ = tx.Exec(ctx, "SELECT 1/0")
				return 201
			})
		}, 1},
		{"claim", func(key string) {
			kill()
			want(t, b.do(t, request(key, ""), pay(t, 201)), idempotency.OutcomeExecuted, "") // on a fresh one
		}, 0},
		{"look-up", func(string) {
			kill()
			want(t, b.do(t, request("known", ""), pay(t, 201)), idempotency.OutcomeReplayed, "")
		}, 1}, // itself, read anew
		{"commit", func(key string) {
			b.do(t, request(key, ""), func(context.Context, pgx.Tx) int { kill(); return 201 })
		}, 0},
		{"decline", func(key string) {
			b.do(t, request(key, ""), func(context.Context, pgx.Tx) int { kill(); return 402 })
		}, 0},
	} {
		postgres.EmptyCache(b.store)
		want(t, b.do(t, request("k-"+c.name, ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
		want(t, b.do(t, request("k-"+c.name, ""), pay(t, 201)), idempotency.OutcomeReplayed, "")
		c.lose("new-" + c.name)
		if n, _ := postgres.CachedOf(b.store); n != c.cached {
			t.Errorf("%s: %d answers are cached, want %d", c.name, n, c.cached)
		}
		want(t, b.do(t, request("k-"+c.name, ""), pay(t, 201)), idempotency.OutcomeReplayed, "")
	}
}

// A look-up first is no more than that: where what was prepared is gone, or the connection is, the claim tells.
func TestReplayOutlivesWhatItsConnectionLost(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns = 1 }})
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	for _, sql := range []string{
		"DEALLOCATE ALL",
		"ALTER TABLE idempotency_keys ALTER trace_id TYPE varchar", // the result is of another type than the plan's
		"SELECT pg_terminate_backend(pg_backend_pid())",
		"SELECT 1",
	} {
		_, _ = b.pool.Exec(ctx, sql, pgx.QueryExecModeSimpleProtocol)
		for range 2 {
			want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeReplayed, "")
		}
	}
}

// A statement that is gone is missed once on each connection.
func TestLookUpIsSentAsTextOnceItsStatementIsGone(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns = 1 }})
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	var name string
	if err := b.pool.QueryRow(ctx, "SELECT quote_ident(name) FROM pg_prepared_statements WHERE name LIKE 'idempotency%' AND statement LIKE '%pg_is_in_recovery%'").Scan(&name); err != nil {
		t.Fatal(err)
	}
	if _, err := b.pool.Exec(ctx, "DEALLOCATE "+name); err != nil {
		t.Fatal(err)
	}
	for _, roundTrips := range []int{3, 1, 1} { // looked up in vain, claimed, rolled back
		before := b.wire.count()
		want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeReplayed, "")
		if got := b.wire.count() - before; got != roundTrips {
			t.Errorf("%d round trips, want %d", got, roundTrips)
		}
	}
}

// Where COMMIT waits for standbys a replay waits too, also where it was cached, and the key known, before there were any.
func TestF20CachedReplayWaitsForTheStandbys(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	config := configOfOwnServer(t)
	options := &postgres.Options{CacheBytesMax: postgres.CacheBytesMin}
	postgres.Configure(config, options)
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	if err := migrations.Up(ctx, pool, nil); err != nil {
		t.Fatal(err)
	}
	store := postgres.New(pool, options)
	engine := idempotency.NewEngine(store, nil)
	do := func(key string) idempotency.Result {
		return engine.Do(ctx, request(key, ""), func(context.Context) (*idempotency.Answer, error) { return answer(201), nil })
	}
	cachedNow := func() int {
		n, _ := postgres.CachedOf(store)
		return n
	}
	want(t, do("k"), idempotency.OutcomeExecuted, "")
	want(t, do("k"), idempotency.OutcomeReplayed, "")
	want(t, do("k"), idempotency.OutcomeReplayed, "")
	if cachedNow() != 1 {
		t.Fatal("nothing is cached")
	}
	setStandbys(t, pool, "nobody")
	postgres.LoseProof(store) // so that the database is asked, as it is after a second
	for range 2 {             // with the hint, and without it
		replay := make(chan idempotency.Result, 1)
		go func() { replay <- do("k") }()
		cancelWaiting(t, pool)
		want(t, <-replay, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
		if cachedNow() != 0 {
			t.Error("an answer is cached that the standbys don't have")
		}
	}
	setStandbys(t, pool, "")
	for range 2 {
		want(t, do("k"), idempotency.OutcomeReplayed, "")
	}
	if cachedNow() != 1 {
		t.Error("nothing is cached without standbys")
	}
}

// Many replays at once share what is cached, and change it as they like.
func TestCachedReplaysAtOnceChangeNothing(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{store: &postgres.Options{CacheBytesMax: postgres.CacheBytesMin}})
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			for range 50 {
				req := request("k", "")
				_, record, err := b.store.Begin(context.Background(), &req)
				if err != nil || record == nil || string(record.Answer.Body) != "done" || fmt.Sprint(record.Answer.Header) != "map[Content-Type:[text/plain]]" {
					t.Errorf("%+v, %v", record, err)
					return
				}
				record.Answer.Header["Content-Type"][0] = "spoilt"
				record.Answer.Header["New"] = nil
				record.Answer.Body = nil
			}
		})
	}
	group.Wait()
}

func TestCacheBytesMaxHasLimits(t *testing.T) {
	t.Parallel()
	pool, err := pgxpool.New(context.Background(), "postgres://nobody@127.0.0.1:1/none") // which nobody uses
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	for bytes, works := range map[int64]bool{
		-1: false, 0: true, 1: false, postgres.CacheBytesMin - 1: false, postgres.CacheBytesMin: true, 1 << 40: true,
	} {
		err := func() (err error) {
			defer func() {
				if text := recover(); text != nil {
					err = errors.New(fmt.Sprint(text))
				}
			}()
			postgres.New(pool, &postgres.Options{CacheBytesMax: bytes})
			return nil
		}()
		if works != (err == nil) || err != nil && !strings.Contains(err.Error(), "CacheBytesMax") {
			t.Errorf("CacheBytesMax %d: %v", bytes, err)
		}
	}
}
