package postgres_test

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres"
)

// If another attempt recorded the key, and no restart is left to read the record, the request is
// not reported as not executed.
func TestRecordedKeyIsNeverCalledNotExecuted(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	for name, c := range map[string]struct {
		options idempotency.Options
		wait    time.Duration
		outcome idempotency.Outcome
		reason  idempotency.Reason
	}{
		"no restarts":  {options: idempotency.Options{Restarts: -1}, outcome: idempotency.OutcomeMismatch, reason: idempotency.ReasonKeyReused},
		"no time left": {options: idempotency.Options{Timeouts: idempotency.Timeouts{Handler: 100 * time.Millisecond}}, wait: 200 * time.Millisecond, outcome: idempotency.OutcomeUnknown, reason: idempotency.ReasonOutcomeUnknown},
	} {
		for _, status := range []int{201, 402} {
			key := fmt.Sprint(name[3:], status)
			key = fmt.Sprintf("%x", key)
			result := idempotency.NewEngine(b.store, &c.options).Do(context.Background(), request(key, ""), func(context.Context) (*idempotency.Answer, error) {
				_, err := b.pool.Exec(context.Background(), `INSERT INTO idempotency_keys
					(created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)
					VALUES (now(), now() + interval '1 day', 202, 1, gen_random_uuid(), 'acme', $2, $1, '\x0100', 'theirs')`,
					make([]byte, 32), key)
				if err != nil {
					t.Error(err)
				}
				time.Sleep(c.wait)
				return answer(status), nil
			})
			want(t, result, c.outcome, c.reason)
		}
	}
}

// Above READ COMMITTED the claim may not see another attempt's record. An attempt that leaves no
// record of its own, however it ends and even with no restart left, looks the key up again: the
// record is a replay or a mismatch, and if the look-up fails the outcome is unknown.
func TestEveryEndAboveReadCommittedLooksAgain(t *testing.T) {
	t.Parallel()
	sql := func(sql string, status int) func(context.Context, pgx.Tx) (int, error) {
		return func(ctx context.Context, tx pgx.Tx) (int, error) {
			_, err := tx.Exec(ctx, sql)
			return status, err
		}
	}
	deferExec := func(sql string, status int) func(context.Context, pgx.Tx) (int, error) {
		return func(ctx context.Context, _ pgx.Tx) (int, error) {
			_ = postgres.DeferExec(ctx, sql) // a refused statement fails the commit
			return status, nil
		}
	}
	ends := map[string]struct {
		do     func(ctx context.Context, tx pgx.Tx) (status int, err error)
		cannot bool // it can't look again on its connection
	}{
		"commits":                           {do: sql("SELECT", 201)},
		"declines":                          {do: sql("SELECT", 402)},
		"forgets":                           {do: sql("SELECT", 503)},
		"fails":                             {do: sql("SELECT 1 / 0", 201)},
		"panics":                            {do: func(context.Context, pgx.Tx) (int, error) { panic("handler") }},
		"can't commit its encoding":         {do: sql("SET LOCAL client_encoding = 'LATIN1'", 201)},
		"can't commit its constraint":       {do: sql("INSERT INTO deferred VALUES (1), (1)", 201)},
		"can't commit a deferred statement": {do: deferExec("DELETE FROM again", 201)},
		"can't defer a statement":           {do: deferExec("SET LOCAL lock_timeout = 1", 201)},
		"must start again at a deferred statement": {do: deferExec("INSERT INTO now VALUES (1)", 201)},
		"must start again":                         {do: sql("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$", 201)},
		"must start again at COMMIT":               {do: sql("INSERT INTO again VALUES (1)", 201)},
		"loses its connection":                     {do: sql("SELECT pg_terminate_backend(pg_backend_pid())", 201), cannot: true},
	}
	for _, isolation := range []pgx.TxIsoLevel{pgx.RepeatableRead, pgx.Serializable} {
		b := setup(t, &setupOptions{store: &postgres.Options{Isolation: isolation, AcquireTimeout: 20 * time.Second}})
		b.exec(t, "CREATE TABLE deferred (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
		b.exec(t, "CREATE TABLE again (id int)")
		b.exec(t, "CREATE TABLE now (id int)")
		b.exec(t, "CREATE FUNCTION again() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$")
		b.exec(t, "CREATE TRIGGER again BEFORE INSERT ON now FOR EACH ROW EXECUTE FUNCTION again()")
		b.exec(t, "CREATE CONSTRAINT TRIGGER again AFTER INSERT ON again DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION again()")
		engine := idempotency.NewEngine(b.store, &idempotency.Options{Restarts: -1})
		for name, end := range ends {
			for _, body := range []string{"the same", "another"} {
				// One after another: the serializable transactions must not fail because of each
				// other.
				t.Run(fmt.Sprint(isolation, ", ", name, ", ", body), func(t *testing.T) {
					key := fmt.Sprintf("%x", name+body)
					result := engine.Do(context.Background(), request(key, "the same"), func(ctx context.Context) (*idempotency.Answer, error) {
						effect(ctx, t)
						b.recordElsewhere(t, isolation, request(key, body))
						status, err := end.do(ctx, postgres.Tx(ctx))
						if err != nil {
							return answer(500), nil
						}
						return answer(status), nil
					})
					switch {
					case end.cannot:
						want(t, result, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
					case body == "the same":
						want(t, result, idempotency.OutcomeReplayed, "")
					default:
						want(t, result, idempotency.OutcomeMismatch, idempotency.ReasonKeyReused)
					}
				})
			}
		}
		t.Cleanup(func() {
			if n := b.effects(t); n != 0 {
				t.Errorf("%d effects, want none", n)
			}
		})
	}
}

// recordElsewhere records a request as another attempt does, at the same isolation level.
func (b *testBundle) recordElsewhere(t *testing.T, isolation pgx.TxIsoLevel, req idempotency.Request) {
	t.Helper()
	err := pgx.BeginTxFunc(context.Background(), b.pool, pgx.TxOptions{IsoLevel: isolation}, func(tx pgx.Tx) error {
		if _, err := tx.Exec(context.Background(), "SELECT FROM idempotency_keys WHERE scope = $1 AND key = $2", req.Key.Scope, req.Key.Value); err != nil {
			return err
		}
		_, err := tx.Exec(context.Background(), `INSERT INTO idempotency_keys (created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)
			VALUES (now(), now() + interval '1 day', 202, $1, gen_random_uuid(), $2, $3, $4, '\x0100', 'theirs')`,
			req.Fingerprint.Version, req.Key.Scope, req.Key.Value, req.Fingerprint.Sum[:])
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// Above READ COMMITTED the claim's snapshot may be older than its lock. An attempt that saw nothing
// and then forgets its answer must not report not-executed.
func TestOldSnapshotIsNoProof(t *testing.T) {
	t.Parallel()
	for _, isolation := range []pgx.TxIsoLevel{pgx.RepeatableRead, pgx.Serializable} {
		t.Run(string(isolation), func(t *testing.T) {
			t.Parallel()
			b := setup(t, &setupOptions{
				store:     &postgres.Options{Isolation: isolation, AcquireTimeout: 20 * time.Second},
				configure: func(c *pgxpool.Config) { c.MaxConns = 8 },
			})
			for key := range 300 {
				var runs atomic.Int64
				var wg sync.WaitGroup
				for range 6 {
					wg.Go(func() {
						for {
							run := int64(0)
							result := b.do(t, request(fmt.Sprint(key), ""), func(context.Context, pgx.Tx) int {
								if run = runs.Add(1); run == 1 {
									return 201
								}
								return 500 // runs after the first was recorded, because the lock was free
							})
							if result.Outcome == idempotency.OutcomeNotExecuted {
								t.Errorf("key %d, run %d: %s %v", key, run, result.Outcome, result.Err)
							}
							if result.Outcome != idempotency.OutcomeInProgress {
								return
							}
						}
					})
				}
				wg.Wait()
			}
		})
	}
}

// The last check on a handler that replaced the transaction, for the answers that commit nothing.
func TestReplacedTransactionIsNeverCalledNotExecuted(t *testing.T) {
	t.Parallel()
	for _, status := range []int{500, 429, 0} {
		b := setup(t, nil)
		result := b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
			effect(ctx, t)
			if _, err := postgres.RawConn(tx).Exec(ctx, "commit; begin"); err != nil {
				t.Error(err)
			}
			if status == 0 {
				panic("after the fact")
			}
			return status
		})
		want(t, result, idempotency.OutcomeUnknown, idempotency.ReasonTransactionLost)
	}
}

type faultyTracer struct {
	step           idempotency.Step
	started, ended atomic.Int64
}

func (f *faultyTracer) TraceRequestStart(ctx context.Context, _ idempotency.RequestStart) context.Context {
	f.started.Add(1)
	return ctx
}

func (f *faultyTracer) TraceStep(_ context.Context, s idempotency.StepEnd) {
	if s.Step == f.step {
		panic("tracer")
	}
}
func (f *faultyTracer) TraceRequestEnd(context.Context, idempotency.RequestEnd) { f.ended.Add(1) }
func (f *faultyTracer) TraceRefused(context.Context, idempotency.Refused)       {}

// However a request's goroutine ends, nothing is held and its end is traced.
func TestNothingIsHeldWhereTheGoroutineEnds(t *testing.T) {
	t.Parallel()
	for _, step := range []idempotency.Step{"", idempotency.StepClaim, idempotency.StepHandler, idempotency.StepCommit} {
		b := setup(t, nil)
		tracer := &faultyTracer{step: step}
		done := make(chan struct{})
		go func() {
			defer close(done)
			defer func() { _ = recover() }()
			idempotency.NewEngine(b.store, &idempotency.Options{Tracer: tracer}).Do(context.Background(), request("k", ""), func(context.Context) (*idempotency.Answer, error) {
				if step == "" {
					runtime.Goexit()
				}
				return answer(201), nil
			})
		}()
		<-done
		if n := b.pool.Stat().AcquiredConns(); n != 0 || tracer.started.Load() != tracer.ended.Load() {
			t.Errorf("step %q: %d connections are held, %d requests ended", step, n, tracer.ended.Load())
			b.count(t, "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in transaction%'")
		}
	}
}

// A role that a handler set for the session makes every claim on that connection fail, so the
// connection is closed.
func TestConnectionThatCannotClaimIsNotKept(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns = 1 }})
	if _, err := b.pool.Exec(context.Background(), "SET ROLE pg_read_all_settings"); err != nil {
		t.Fatal(err)
	}
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
}

// not-executed is about the request, not about its key: without a connection the key was not looked
// up. The client's table must not let it give up on this answer if an earlier reply was lost.
func TestNotExecutedIsSaidOfTheRequestAlone(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{
		store:     &postgres.Options{AcquireTimeout: 500 * time.Millisecond},
		configure: func(c *pgxpool.Config) { c.MaxConns = 1 },
	})
	if err := b.pool.Ping(context.Background()); err != nil { // a connection takes longer than a busy pool should
		t.Fatal(err)
	}
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "") // and its reply is lost
	busy, err := b.pool.Acquire(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
	busy.Release()
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeReplayed, "")
}
