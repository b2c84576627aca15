package postgres_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres"
)

// A handler can't make COMMIT skip the wait for the disk, also if nothing is recorded.
func TestKeylessCommitWaitsForTheDisk(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	if _, err := b.pool.Exec(context.Background(), `
		CREATE TABLE seen (setting text);
		CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.seen VALUES (current_setting('synchronous_commit')); RETURN NULL; END $$;
		CREATE CONSTRAINT TRIGGER see AFTER INSERT ON effects DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION see()`); err != nil {
		t.Fatal(err)
	}
	want(t, b.do(t, request("", ""), func(ctx context.Context, tx pgx.Tx) int {
		effect(ctx, t)
		if _, err := tx.Exec(ctx, "SET LOCAL synchronous_commit = off"); err != nil {
			t.Error(err)
		}
		return 201
	}), idempotency.OutcomeExecuted, "")
	if n := b.count(t, "SELECT count(*) FROM seen WHERE setting = 'on'"); n != 1 {
		t.Errorf("synchronous_commit was on at %d of 1 commits", n)
	}
}

// If a trigger or a deferred constraint of the service raises an error under our INSERT or COMMIT,
// the error is its own: it fails the handler, and is taken neither for a lost race nor for a lost
// transaction.
func TestErrorsOfTheServiceAtTheEndAreTheHandlersFailure(t *testing.T) {
	t.Parallel()
	for name, sql := range map[string]string{
		"23505 of a trigger": `
			CREATE TABLE audit (name text CONSTRAINT audit_name_key UNIQUE);
			CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.audit VALUES ('a'), ('a'); RETURN NULL; END $$;
			CREATE TRIGGER audit AFTER INSERT ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION audit()`,
		"23502 of a trigger": `
			CREATE TABLE audit (name text NOT NULL);
			CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.audit VALUES (NULL); RETURN NULL; END $$;
			CREATE TRIGGER audit AFTER INSERT ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION audit()`,
		"23505 at COMMIT by a constraint of our name": `
			CREATE SCHEMA other; CREATE TABLE other.names (name text, CONSTRAINT idempotency_keys_pkey UNIQUE (name) DEFERRABLE INITIALLY DEFERRED);
			CREATE FUNCTION twice() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO other.names VALUES ('a'), ('a'); RETURN NULL; END $$;
			CREATE TRIGGER twice AFTER INSERT ON effects FOR EACH ROW EXECUTE FUNCTION twice()`,
		"22012 at COMMIT": `
			CREATE FUNCTION fault() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM 1/0; RETURN NULL; END $$;
			CREATE CONSTRAINT TRIGGER fault AFTER INSERT ON effects DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fault()`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, nil)
			if _, err := b.pool.Exec(context.Background(), sql); err != nil {
				t.Fatal(err)
			}
			runs := 0
			result := b.do(t, request("k", ""), func(ctx context.Context, _ pgx.Tx) int {
				runs++
				effect(ctx, t)
				return 201
			})
			want(t, result, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
			if n := b.effects(t); runs != 1 || n != 0 {
				t.Errorf("%d runs and %d effects, want 1 and none", runs, n)
			}
		})
	}
}

// While the answer of a decline is recorded the key is held: a duplicate gets in-progress, and does
// not run.
func TestDeclineHoldsTheKeyWhileItRecords(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	ctx := context.Background()
	if _, err := b.pool.Exec(ctx, `
		CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NEW; END $$;
		CREATE TRIGGER wait BEFORE INSERT ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION wait()`); err != nil {
		t.Fatal(err)
	}
	gate, err := b.pool.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := gate.Exec(ctx, "SELECT pg_advisory_xact_lock(1)"); err != nil {
		t.Fatal(err)
	}
	done := make(chan idempotency.Result)
	go func() { done <- b.do(t, request("k", ""), pay(t, 402)) }()
	for b.count(t, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'") == 0 {
		time.Sleep(time.Millisecond)
	}
	want(t, b.do(t, request("k", ""), func(context.Context, pgx.Tx) int {
		t.Error("the handler ran while the decline was recorded")
		return 500
	}), idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
	if err := gate.Rollback(ctx); err != nil {
		t.Fatal(err)
	}
	want(t, <-done, idempotency.OutcomeExecuted, "")
}

// COMMIT of an aborted transaction answers ROLLBACK without an error: only the tag COMMIT counts as
// one.
func TestCommitIsReadFromItsTag(t *testing.T) {
	t.Parallel()
	var armed atomic.Bool
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) {
		dial := c.ConnConfig.DialFunc
		c.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dial(ctx, network, address)
			return &otherTag{Conn: conn, armed: &armed}, err
		}
	}})
	want(t, b.do(t, request("warm", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	result := b.do(t, request("k", ""), func(context.Context, pgx.Tx) int {
		armed.Store(true)
		return 201
	})
	want(t, result, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
}

// otherTag replaces the tag of the server's reply to COMMIT by another one of the same length.
type otherTag struct {
	net.Conn
	armed *atomic.Bool
}

func (c *otherTag) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.armed.Load() {
		copy(p, bytes.Replace(p[:n], []byte("C\x00\x00\x00\x0bCOMMIT\x00"), []byte("C\x00\x00\x00\x0bABORTS\x00"), 1))
	}
	return n, err
}

// A COMMIT that was never sent is a definite abort, and never unknown.
func TestCommitThatWasNeverSentIsUnavailable(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(ctx context.Context, conn *pgx.Conn) context.Context{
		"closed": func(ctx context.Context, conn *pgx.Conn) context.Context {
			_ = conn.Close(ctx)
			return ctx
		},
		"busy": func(ctx context.Context, conn *pgx.Conn) context.Context {
			_, _ = conn.Query(ctx, "SELECT generate_series(1, 100000)")
			return ctx
		},
		"late": func(ctx context.Context, _ *pgx.Conn) context.Context {
			ctx, cancel := context.WithCancel(ctx)
			cancel()
			return ctx
		},
	} {
		for step, end := range map[string]func(idempotency.Attempt, context.Context, *idempotency.Answer) error{
			"commit": idempotency.Attempt.Commit, "decline": idempotency.Attempt.Decline,
		} {
			t.Run(name+" "+step, func(t *testing.T) {
				t.Parallel()
				b := setup(t, nil)
				attempt, _, err := b.store.Begin(context.Background(), claimOf(request("k", "")))
				if err != nil {
					t.Fatal(err)
				}
				ctx := spoil(context.Background(), postgres.RawConnOf(attempt))
				if err := end(attempt, ctx, answer(201)); !errors.Is(err, idempotency.ErrUnavailable) || errors.Is(err, idempotency.ErrUnknown) {
					t.Errorf("got %v, want ErrUnavailable", err)
				}
				if n := b.count(t, "SELECT count(*) FROM idempotency_keys"); n != 0 {
					t.Errorf("%d records, want none", n)
				}
				if n := b.pool.Stat().AcquiredConns(); n != 0 {
					t.Errorf("%d connections were not given back", n)
				}
			})
		}
	}
}

// The seal notices an aborted transaction even if no error was seen on the way.
func TestSealSeesAnAbortedTransaction(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	ctx := context.Background()
	attempt, _, err := b.store.Begin(ctx, claimOf(request("k", "")))
	if err != nil {
		t.Fatal(err)
	}
	defer attempt.Rollback(ctx)
	if _, err := postgres.RawConnOf(attempt).Exec(ctx, "SELECT 1/0"); err == nil {
		t.Error("no error")
	}
	if err := attempt.Seal(); !errors.Is(err, idempotency.ErrAborted) {
		t.Errorf("got %v, want ErrAborted", err)
	}
}

// If the connection is gone, unavailable replaces the handler's answer, whatever it is.
func TestAnswerOverADeadConnectionIsUnavailable(t *testing.T) {
	t.Parallel()
	for _, status := range []int{201, 402, 500} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			t.Parallel()
			b := setup(t, nil)
			result := b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
				effect(ctx, t)
				short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
				defer cancel()
				if _, err := tx.Exec(short, "SELECT pg_sleep(5)"); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("got %v", err)
				}
				return status
			})
			want(t, result, idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
		})
	}
}

// A goroutine that nothing wakes keeps its connection: neither the attempt nor the pool ever gets
// it.
func TestGoroutineThatNothingWakesKeepsItsConnection(t *testing.T) {
	t.Parallel()
	for _, status := range []int{201, 402, 500} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			t.Parallel()
			b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns = 1 }})
			entered, release, done := make(chan struct{}), make(chan struct{}), make(chan struct{})
			b.do(t, request("k", ""), func(_ context.Context, tx pgx.Tx) int {
				go func() {
					defer close(done)
					batch := &pgx.Batch{}
					batch.Queue("SELECT 1").QueryRow(func(pgx.Row) error {
						close(entered)
						<-release
						return nil
					})
					for range 50 { // its later use of the connection is not seen
						batch.Queue("SELECT 1")
					}
					_ = tx.SendBatch(context.Background(), batch).Close()
				}()
				<-entered
				// Not by this goroutine, which would order its steps before ours for the race
				// detector.
				time.AfterFunc(postgres.AbandonTimeout+300*time.Millisecond, func() { close(release) })
				return status
			})
			if n := b.pool.Stat().TotalConns(); n != 0 {
				t.Errorf("%d connections in the pool, want none", n)
			}
			want(t, b.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
			<-done
		})
	}
}

// A wait for a lock that was too long is remembered from every path, also from those that parse
// before they send.
func TestLockTimeoutIsRememberedFromEveryPath(t *testing.T) {
	t.Parallel()
	const sql = "INSERT INTO effects (name) VALUES ($1)"
	ctx := context.Background()
	for name, swallow := range map[string]func(tx pgx.Tx){
		"copy": func(tx pgx.Tx) {
			_, _ = tx.CopyFrom(ctx, pgx.Identifier{"effects"}, []string{"name"}, pgx.CopyFromRows([][]any{{"a"}}))
		},
		"prepare": func(tx pgx.Tx) { _, _ = tx.Prepare(ctx, "p", sql) },
		"exec":    func(tx pgx.Tx) { _, _ = tx.Exec(ctx, sql, "a") },
		"query":   func(tx pgx.Tx) { _, _ = tx.Query(ctx, sql, "a") },
		"batch": func(tx pgx.Tx) {
			batch := &pgx.Batch{}
			batch.Queue(sql, "a")
			_, _ = tx.SendBatch(ctx, batch).Exec()
		},
		"batch query": func(tx pgx.Tx) {
			batch := &pgx.Batch{}
			batch.Queue(sql, "a")
			_, _ = tx.SendBatch(ctx, batch).Query()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, &setupOptions{store: &postgres.Options{LockTimeout: 50 * time.Millisecond}})
			holder, err := b.pool.Begin(ctx)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = holder.Rollback(ctx) }()
			if _, err := holder.Exec(ctx, "LOCK TABLE effects"); err != nil {
				t.Fatal(err)
			}
			result := b.do(t, request("k", ""), func(_ context.Context, tx pgx.Tx) int {
				swallow(tx)
				return 201
			})
			want(t, result, idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
		})
	}
}

// Text that would end the transaction is refused wherever a rewriter stands among the arguments,
// and also if a backslash hides the end of a string.
func TestHiddenEndOfTheTransactionIsRefused(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	refused := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, postgres.ErrSealed) {
			t.Errorf("%s: got %v, want ErrSealed", what, err)
		}
	}
	result := b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
		effect(ctx, t)
		_, err := tx.Exec(ctx, "SELECT 1", pgx.QueryExecModeExec, rewriter("COMMIT"))
		refused("behind a mode", err)
		batch := &pgx.Batch{}
		batch.Queue("SELECT 1", rewriter("COMMIT"))
		refused("in a batch", tx.SendBatch(ctx, batch).Close())
		if _, err := tx.Exec(ctx, "SET LOCAL standard_conforming_strings = off"); err != nil {
			t.Error(err)
		}
		_, err = tx.Exec(ctx, `SELECT '\';COMMIT;BEGIN;--'`)
		refused("behind a backslash", err)
		_, err = tx.Exec(ctx, `SELECT 'a\'';COMMIT;BEGIN;--'`)
		refused("behind a doubled quote", err)
		return 201
	})
	want(t, result, idempotency.OutcomeExecuted, "")
	if n := b.effects(t); n != 1 {
		t.Errorf("%d effects, want 1", n)
	}
}

// Work that a handler left for later still has the values of its context, and may use the pool once
// the handler has returned.
func TestPoolIsFreeOnceTheHandlerReturned(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	var later context.Context
	want(t, b.do(t, request("k", ""), func(ctx context.Context, _ pgx.Tx) int {
		later = context.WithoutCancel(ctx)
		return 201
	}), idempotency.OutcomeExecuted, "")
	if _, err := b.pool.Exec(later, "INSERT INTO effects (name) VALUES ('later')"); err != nil {
		t.Error(err)
	}
}

// A transaction that the handler aborted costs no connection: it is rolled back, and the connection
// is used again.
func TestConnectionOfAnAbortedTransactionIsKept(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns = 1 }})
	want(t, b.do(t, request("warm", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
	before := b.pool.Stat().NewConnsCount()
	for i, status := range []int{201, 402, 500} {
		b.do(t, request(fmt.Sprint(i), ""), func(ctx context.Context, tx pgx.Tx) int {
			if _, err := tx.Exec(ctx, "SELECT 1/0"); err == nil {
				t.Error("no error")
			}
			return status
		})
	}
	if n := b.pool.Stat().NewConnsCount() - before; n != 0 {
		t.Errorf("%d connections were made anew, want none", n)
	}
}

// If an error that proves nothing comes in place of COMMIT's reply, the connection is closed, and a
// fresh one looks the outcome up.
func TestConnectionOfAnUnknownOutcomeIsClosed(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	ctx := context.Background()
	if _, err := b.pool.Exec(ctx, `
		CREATE FUNCTION fault() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE SQLSTATE '08006'; END $$;
		CREATE CONSTRAINT TRIGGER fault AFTER INSERT ON effects DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fault()`); err != nil {
		t.Fatal(err)
	}
	var pid uint32
	want(t, b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
		effect(ctx, t)
		pid = postgres.RawConn(tx).PgConn().PID()
		return 201
	}), idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
	for range 2 { // whichever connections the pool has
		conn, err := b.pool.Acquire(ctx)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Release()
		if conn.Conn().PgConn().PID() == pid {
			t.Error("the connection went back to the pool")
		}
	}
}
