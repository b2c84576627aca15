package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres"
)

// do runs one request, and passes its transaction to the handler.
func (b *testBundle) do(t *testing.T, req idempotency.Request, handler func(ctx context.Context, tx pgx.Tx) int) idempotency.Result {
	t.Helper()
	return idempotency.NewEngine(b.store, nil).Do(context.Background(), req, func(ctx context.Context) (*idempotency.Answer, error) {
		return answer(handler(ctx, postgres.Tx(ctx))), nil
	})
}

func pay(t *testing.T, status int) func(ctx context.Context, tx pgx.Tx) int {
	return func(ctx context.Context, _ pgx.Tx) int {
		effect(ctx, t)
		return status
	}
}

func want(t *testing.T, result idempotency.Result, outcome idempotency.Outcome, reason idempotency.Reason) {
	t.Helper()
	if result.Outcome != outcome || result.Reason != reason {
		t.Errorf("outcome %q, reason %q, error %v; want %q and %q", result.Outcome, result.Reason, result.Err, outcome, reason)
	}
}

func TestAnswerAndWritesAreOneCommit(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	for _, c := range []struct {
		status  int
		outcome idempotency.Outcome
		effects int
		records int
	}{
		{201, idempotency.OutcomeExecuted, 1, 1},
		{303, idempotency.OutcomeExecuted, 1, 1},
		{402, idempotency.OutcomeExecuted, 0, 1}, // the answer stays, the writes go
		{429, idempotency.OutcomeNotExecuted, 0, 0},
		{500, idempotency.OutcomeNotExecuted, 0, 0},
	} {
		key := fmt.Sprint("k", c.status)
		effects := b.effects(t)
		want(t, b.do(t, request(key, ""), pay(t, c.status)), c.outcome, "")
		if got := b.effects(t) - effects; got != c.effects {
			t.Errorf("status %d left %d effects, want %d", c.status, got, c.effects)
		}
		if got := b.count(t, "SELECT count(*) FROM idempotency_keys WHERE key = $1", key); got != c.records {
			t.Errorf("status %d left %d records, want %d", c.status, got, c.records)
		}
	}
	if n := b.count(t, "SELECT count(*) FROM effects JOIN idempotency_keys USING (attempt_id)"); n != 2 {
		t.Errorf("%d effects carry the attempt id of their record, want 2", n)
	}
}

// The result of the lock and the record must not come from one snapshot: many clients send each key
// at once.
func TestDuplicatesAtOnceRunOnce(t *testing.T) {
	t.Parallel()
	for _, isolation := range []pgx.TxIsoLevel{pgx.ReadCommitted, pgx.RepeatableRead, pgx.Serializable} {
		t.Run(string(isolation), func(t *testing.T) {
			t.Parallel()
			b := setup(t, &setupOptions{
				store:     &postgres.Options{Isolation: isolation, AcquireTimeout: 20 * time.Second},
				configure: func(c *pgxpool.Config) { c.MaxConns = 16 },
			})
			const keys, copies = 60, 8
			var answered, executed atomic.Int64
			var wg sync.WaitGroup
			for key := range keys {
				start := make(chan struct{})
				for range copies {
					wg.Go(func() {
						<-start
						for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
							result := b.do(t, request(fmt.Sprint(key), ""), pay(t, 201))
							switch result.Outcome {
							case idempotency.OutcomeExecuted:
								executed.Add(1)
								answered.Add(1)
								return
							case idempotency.OutcomeReplayed:
								answered.Add(1)
								return
							case idempotency.OutcomeInProgress:
							default:
								if result.Reason != idempotency.ReasonUnavailable {
									t.Errorf("outcome %q: %v", result.Outcome, result.Err)
									return
								}
							}
						}
					})
				}
				close(start)
			}
			wg.Wait()
			if effects := b.effects(t); effects != keys || executed.Load() != keys || answered.Load() != keys*copies {
				t.Errorf("%d effects, %d executed, %d answered; want %d, %d and %d", effects, executed.Load(), answered.Load(), keys, keys, keys*copies)
			}
		})
	}
}

// Correctness never depends on the lock: if the same key is claimed twice the primary key decides,
// for a commit and for a decline.
func TestPrimaryKeyIsTheLastGuard(t *testing.T) {
	t.Parallel()
	for _, status := range []int{201, 402} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			t.Parallel()
			b := setup(t, nil)
			runs := 0
			result := b.do(t, request("k", ""), func(ctx context.Context, _ pgx.Tx) int {
				runs++
				effect(ctx, t)
				// Meanwhile a session that never took the lock records the key.
				other := claimOf(request("k", ""))
				_, err := b.pool.Exec(context.Background(), `INSERT INTO idempotency_keys
					(created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)
					VALUES (now(), now() + interval '1 day', 202, 1, $1, 'acme', 'k', $2, '\x0100', 'theirs')`,
					other.Attempt.String(), other.Fingerprint.Sum[:])
				if err != nil {
					t.Error(err)
				}
				return status
			})
			want(t, result, idempotency.OutcomeReplayed, "")
			if runs != 1 || b.effects(t) != 0 || result.Answer == nil || string(result.Answer.Body) != "theirs" {
				t.Errorf("%d runs, %d effects, answer %+v", runs, b.effects(t), result.Answer)
			}
		})
	}
}

func TestLostRaceComparesFingerprints(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	theirs := request("k", "theirs")
	result := b.do(t, request("k", "ours"), func(ctx context.Context, _ pgx.Tx) int {
		_, err := b.pool.Exec(context.Background(), `INSERT INTO idempotency_keys
			(created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)
			VALUES (now(), now() + interval '1 day', 202, 1, gen_random_uuid(), 'acme', 'k', $1, '\x0100', 'theirs')`,
			theirs.Fingerprint.Sum[:])
		if err != nil {
			t.Error(err)
		}
		return 201
	})
	want(t, result, idempotency.OutcomeMismatch, idempotency.ReasonKeyReused)
}

func TestUnreadableRecordIsNeverAnswered(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	if _, err := b.pool.Exec(context.Background(), `UPDATE idempotency_keys SET headers = '\x01ff'`); err != nil {
		t.Fatal(err)
	}
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
	if n := b.effects(t); n != 1 {
		t.Errorf("%d effects, want 1", n)
	}
}

func TestRecordIsReadBackAsItWasWritten(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	req := request("k", "")
	req.TraceID = "4bf92f3577b34da6a3ce929d0e0e4736"
	req.TTL = time.Hour
	written := &idempotency.Answer{
		Status: 207,
		Header: map[string][]string{"Vary": {"Accept", "Origin, Cookie"}, "Content-Type": {"application/octet-stream"}, "Etag": {""}},
		Body:   []byte{0, 1, 0xff, '\n'},
	}
	engine := idempotency.NewEngine(b.store, nil)
	run := func(context.Context) (*idempotency.Answer, error) { return written, nil }
	want(t, engine.Do(context.Background(), req, run), idempotency.OutcomeExecuted, "")
	replay := engine.Do(context.Background(), req, run)
	want(t, replay, idempotency.OutcomeReplayed, "")
	if got := fmt.Sprintf("%+v", *replay.Answer); got != fmt.Sprintf("%+v", *written) {
		t.Errorf("replayed %s, recorded %+v", got, *written)
	}
	if replay.Record.TraceID != req.TraceID || replay.Record.Attempt.IsZero() || replay.Record.Fingerprint != req.Fingerprint {
		t.Errorf("record %+v", replay.Record)
	}
	if ttl := replay.Record.ExpiresAt.Sub(replay.Record.CreatedAt); ttl < time.Hour || ttl > time.Hour+time.Minute {
		t.Errorf("TTL %v, want 1h from the commit on", ttl)
	}
	if age := time.Since(replay.Record.CreatedAt); age < -time.Minute || age > time.Minute {
		t.Errorf("created %v ago", age)
	}
}

// A backend terminated before COMMIT.
func TestBackendTerminatedBeforeCommitIsNotExecuted(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	result := b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
		effect(ctx, t)
		if _, err := b.pool.Exec(context.Background(), "SELECT pg_terminate_backend($1, 5000)", postgres.RawConn(tx).PgConn().PID()); err != nil {
			t.Error(err)
		}
		if _, err := tx.Exec(ctx, "INSERT INTO effects (name) VALUES ('second')"); err == nil {
			t.Error("the backend is still there")
		}
		return 201
	})
	want(t, result, idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	if n := b.effects(t); n != 1 {
		t.Errorf("%d effects, want 1", n)
	}
}

// If a backend dies when COMMIT may have been sent, its transaction and its lock are gone: the
// look-up proves that nothing was committed. For a decline, which records after it gave up the
// lock, it proves nothing.
func TestBackendTerminatedAtCommitIsResolved(t *testing.T) {
	t.Parallel()
	for status, end := range map[int]struct {
		outcome idempotency.Outcome
		reason  idempotency.Reason
	}{
		201: {idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable},
		402: {idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown},
	} {
		b := setup(t, nil)
		result := b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
			effect(ctx, t)
			pid := postgres.RawConn(tx).PgConn().PID()
			if _, err := b.pool.Exec(context.Background(), "SELECT pg_terminate_backend($1, 5000)", pid); err != nil {
				t.Error(err)
			}
			return status // the handler learned nothing of it
		})
		want(t, result, end.outcome, end.reason)
		if !errors.Is(result.Err, idempotency.ErrUnknown) {
			t.Errorf("status %d: error %v, want the loss of COMMIT's reply", status, result.Err)
		}
		if n := b.effects(t) + b.count(t, "SELECT count(*) FROM idempotency_keys"); n != 0 {
			t.Errorf("status %d: %d effects and records, want none", status, n)
		}
		want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	}
}

// Every idle connection is dead after a restart of the server; a claim is tried once more on a
// fresh one.
func TestClaimOnDeadConnectionIsTriedOnAFreshOne(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) {
		c.MaxConns = 8
		c.ShouldPing = func(context.Context, pgxpool.ShouldPingParams) bool { return false }
	}})
	ctx := context.Background()
	var conns []*pgxpool.Conn
	for range 8 {
		conn, err := b.pool.Acquire(ctx)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	admin, err := pgx.ConnectConfig(ctx, b.pool.Config().ConnConfig)
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close(ctx)
	for _, conn := range conns {
		var ok bool
		if err := admin.QueryRow(ctx, "SELECT pg_terminate_backend($1, 5000)", conn.Conn().PgConn().PID()).Scan(&ok); err != nil || !ok {
			t.Fatal(err)
		}
		conn.Release()
	}
	want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
}

// 50 clients on a pool of 2 are served or refused in time, and never wait for each other forever.
func TestSmallPoolShedsAndNeverDeadlocks(t *testing.T) {
	t.Parallel()
	const acquireTimeout = 300 * time.Millisecond
	b := setup(t, &setupOptions{
		store:     &postgres.Options{AcquireTimeout: acquireTimeout},
		configure: func(c *pgxpool.Config) { c.MaxConns = 2 },
	})
	release := make(chan struct{})
	var running, executed, shed atomic.Int64
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			result := b.do(t, request(fmt.Sprint(i), ""), func(ctx context.Context, _ pgx.Tx) int {
				running.Add(1)
				<-release
				effect(ctx, t)
				return 201
			})
			switch {
			case result.Outcome == idempotency.OutcomeExecuted:
				executed.Add(1)
			case result.Outcome == idempotency.OutcomeNotExecuted && result.Reason == idempotency.ReasonUnavailable:
				if shed.Add(1) == 48 {
					close(release)
				}
			default:
				t.Errorf("outcome %q: %v", result.Outcome, result.Err)
			}
		})
	}
	wg.Wait()
	if executed.Load() != 2 || shed.Load() != 48 {
		t.Errorf("%d executed and %d shed, want 2 and 48", executed.Load(), shed.Load())
	}
}

// After 40001 the handler starts again in a fresh transaction. The third restart is the last.
func TestSerializationFailureStartsAgain(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{store: &postgres.Options{Isolation: pgx.Serializable}})
	ctx := context.Background()
	if _, err := b.pool.Exec(ctx, "CREATE TABLE counters (id int PRIMARY KEY, n int NOT NULL); INSERT INTO counters VALUES (1, 0)"); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name     string
		failures int
		runs     int
		outcome  idempotency.Outcome
		reason   idempotency.Reason
	}{
		{"within-the-budget", 3, 4, idempotency.OutcomeExecuted, ""},
		{"over-the-budget", 4, 4, idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable},
	} {
		runs := 0
		effects := b.effects(t)
		result := b.do(t, request(c.name, ""), func(ctx context.Context, tx pgx.Tx) int {
			runs++
			effect(ctx, t)
			var n int
			if err := tx.QueryRow(ctx, "SELECT n FROM counters WHERE id = 1").Scan(&n); err != nil {
				t.Error(err)
			}
			if runs <= c.failures { // another session is faster
				if _, err := b.pool.Exec(context.Background(), "UPDATE counters SET n = n + 1"); err != nil {
					t.Error(err)
				}
			}
			if _, err := tx.Exec(ctx, "UPDATE counters SET n = $1 WHERE id = 1", n+1); err != nil {
				return 500 // the handler's answer does not matter
			}
			return 201
		})
		want(t, result, c.outcome, c.reason)
		if runs != c.runs {
			t.Errorf("%s: %d runs, want %d", c.name, runs, c.runs)
		}
		if got, executed := b.effects(t)-effects, c.outcome == idempotency.OutcomeExecuted; (got == 1) != executed {
			t.Errorf("%s: %d effects", c.name, got)
		}
	}
}

// 40P01: two handlers lock two rows in opposite order. One is the victim and starts again, and both
// are executed.
func TestDeadlockStartsAgain(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	if _, err := b.pool.Exec(context.Background(), "CREATE TABLE accounts (id int PRIMARY KEY); INSERT INTO accounts VALUES (1), (2)"); err != nil {
		t.Fatal(err)
	}
	var runs atomic.Int64
	var bothHold sync.WaitGroup
	bothHold.Add(2)
	var wg sync.WaitGroup
	for i, order := range [][2]int{{1, 2}, {2, 1}} {
		wg.Go(func() {
			first := true
			want(t, b.do(t, request(fmt.Sprint(i), ""), func(ctx context.Context, tx pgx.Tx) int {
				runs.Add(1)
				// Wait for the row that the other holds first, or it could be overtaken and meet a
				// second deadlock.
				if !first {
					order[0], order[1] = order[1], order[0]
				}
				for n, id := range order {
					if _, err := tx.Exec(ctx, "SELECT FROM accounts WHERE id = $1 FOR UPDATE", id); err != nil {
						return 500
					}
					if n == 0 && first {
						first = false
						bothHold.Done()
						bothHold.Wait()
					}
				}
				effect(ctx, t)
				return 201
			}), idempotency.OutcomeExecuted, "")
		})
	}
	wg.Wait()
	if runs.Load() != 3 || b.effects(t) != 2 {
		t.Errorf("%d runs and %d effects, want 3 and 2", runs.Load(), b.effects(t))
	}
}

// A lock or a statement that takes too long.
func TestTimeoutsAreNotExecuted(t *testing.T) {
	t.Parallel()
	for name, opts := range map[string]*postgres.Options{
		"lock_timeout":      {LockTimeout: 50 * time.Millisecond},
		"statement_timeout": {StatementTimeout: 100 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := context.Background()
			b := setup(t, &setupOptions{store: opts})
			if _, err := b.pool.Exec(ctx, "INSERT INTO effects (name) VALUES ('held')"); err != nil {
				t.Fatal(err)
			}
			holder, err := b.pool.Begin(ctx)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = holder.Rollback(ctx) }()
			if _, err := holder.Exec(ctx, "SELECT FROM effects FOR UPDATE"); err != nil {
				t.Fatal(err)
			}
			for _, status := range []int{201, 402, 500} { // whatever the handler answers
				result := b.do(t, request(fmt.Sprint(status), ""), func(ctx context.Context, tx pgx.Tx) int {
					if _, err := tx.Exec(ctx, "SELECT FROM effects FOR UPDATE"); err == nil {
						t.Error("the row was not held")
					}
					return status
				})
				want(t, result, idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
			}
		})
	}
}

// A handler's own timeout closes the connection, and its status still says that a transaction is
// open. COMMIT was never sent, so the outcome is known.
func TestHandlersOwnTimeoutIsNotExecuted(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	result := b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
		effect(ctx, t)
		short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
		defer cancel()
		if _, err := tx.Exec(short, "SELECT pg_sleep(5)"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		return 201
	})
	want(t, result, idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
	if n := b.effects(t); n != 0 {
		t.Errorf("%d effects, want none", n)
	}
}

// A deferred constraint of the handler's own raises 23505 at COMMIT. It is not about our record: it
// aborts, and replays nothing.
func TestDeferredConstraintAtCommitIsTheHandlersFailure(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	if _, err := b.pool.Exec(context.Background(), "CREATE TABLE names (name text, CONSTRAINT names_unique UNIQUE (name) DEFERRABLE INITIALLY DEFERRED)"); err != nil {
		t.Fatal(err)
	}
	runs := 0
	result := b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
		runs++
		if _, err := tx.Exec(ctx, "INSERT INTO names VALUES ('a'), ('a')"); err != nil {
			t.Error(err)
		}
		return 201
	})
	want(t, result, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
	if runs != 1 {
		t.Errorf("%d runs, want 1", runs)
	}
}

// A handler may turn its own 23505 into a 409, which is recorded although its transaction is
// aborted.
func TestDeclineOfAnAbortedTransactionIsRecorded(t *testing.T) {
	t.Parallel()
	for name, opts := range map[string]*setupOptions{
		"prepared": {},
		"exec":     {configure: func(c *pgxpool.Config) { c.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeExec }},
		"cold":     {cold: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, opts)
			handler := func(ctx context.Context, tx pgx.Tx) int {
				effect(ctx, t)
				if _, err := tx.Exec(ctx, "INSERT INTO effects (id, name) SELECT id, 'again' FROM effects"); err == nil {
					t.Error("no duplicate")
				}
				return 409
			}
			want(t, b.do(t, request("k", ""), handler), idempotency.OutcomeExecuted, "")
			want(t, b.do(t, request("k", ""), handler), idempotency.OutcomeReplayed, "")
			if n := b.effects(t); n != 0 {
				t.Errorf("%d effects, want none", n)
			}
		})
	}
}

// However an attempt ends, it releases everything.
func TestNoLockAndNoSessionIsLeftBehind(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	for i, status := range []int{201, 402, 500} {
		b.do(t, request(fmt.Sprint(i), ""), pay(t, status))
		b.do(t, request(fmt.Sprint(i), ""), pay(t, status))
	}
	if n := b.count(t, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"); n != 0 {
		t.Errorf("%d advisory locks are held", n)
	}
	if n := b.count(t, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in transaction%'"); n != 0 {
		t.Errorf("%d sessions are idle in transaction", n)
	}
	if n := b.pool.Stat().AcquiredConns(); n != 0 {
		t.Errorf("%d connections were not given back", n)
	}
}
