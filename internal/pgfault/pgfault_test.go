package pgfault

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// protocols are the ways in which a client writes the payment $1 and sends COMMIT in an open
// transaction. If inFlush is true, the flush with the COMMIT holds the payment's id.
var protocols = []struct {
	name    string
	inFlush bool
	pay     func(ctx context.Context, conn *pgconn.PgConn, id string) error
}{
	{"simple", false, func(ctx context.Context, conn *pgconn.PgConn, id string) error {
		if err := conn.Exec(ctx, "INSERT INTO payments VALUES ('"+id+"')").Close(); err != nil {
			return err
		}
		return conn.Exec(ctx, "commit").Close()
	}},
	{"string of statements", true, func(ctx context.Context, conn *pgconn.PgConn, id string) error {
		return conn.Exec(ctx, "INSERT INTO payments VALUES ('"+id+"'); /* ; */ Commit").Close()
	}},
	{"extended", false, func(ctx context.Context, conn *pgconn.PgConn, id string) error {
		if err := insert(ctx, conn, id); err != nil {
			return err
		}
		return conn.ExecParams(ctx, " -- the end\nEND;", nil, nil, nil, nil).Read().Err
	}},
	{"prepared", false, func(ctx context.Context, conn *pgconn.PgConn, id string) error {
		if _, err := conn.Prepare(ctx, "the end", "COMMIT WORK", nil); err != nil {
			return err
		}
		if err := insert(ctx, conn, id); err != nil {
			return err
		}
		return conn.ExecPrepared(ctx, "the end", nil, nil, nil).Read().Err
	}},
	{"pipeline", true, func(ctx context.Context, conn *pgconn.PgConn, id string) error {
		pipeline := conn.StartPipeline(ctx)
		pipeline.SendQueryParams("INSERT INTO payments VALUES ($1)", [][]byte{[]byte(id)}, nil, nil, nil)
		pipeline.SendQueryParams("COMMIT", nil, nil, nil, nil)
		return finish(pipeline, pipeline.Sync())
	}},
	{"pipeline of flushes", false, func(ctx context.Context, conn *pgconn.PgConn, id string) error {
		pipeline := conn.StartPipeline(ctx)
		pipeline.SendQueryParams("INSERT INTO payments VALUES ($1)", [][]byte{[]byte(id)}, nil, nil, nil)
		pipeline.SendPipelineSync()
		pipeline.SendQueryParams("COMMIT", nil, nil, nil, nil)
		return finish(pipeline, pipeline.Sync())
	}},
}

func insert(ctx context.Context, conn *pgconn.PgConn, id string) error {
	return conn.ExecParams(ctx, "INSERT INTO payments VALUES ($1)", [][]byte{[]byte(id)}, nil, nil, nil).Read().Err
}

// finish reads a pipeline's results and returns its first error.
func finish(pipeline *pgconn.Pipeline, err error) error {
	for err == nil {
		var result any
		result, err = pipeline.GetResults()
		if reader, ok := result.(*pgconn.ResultReader); ok && err == nil {
			_, err = reader.Close()
		}
		if result == nil && err == nil {
			break
		}
	}
	return errors.Join(err, pipeline.Close())
}

// eachProtocol runs a test of one kind of fault by each protocol.
func eachProtocol(t *testing.T, test func(t *testing.T, run *commitRun)) {
	for _, protocol := range protocols {
		t.Run(protocol.name, func(t *testing.T) {
			t.Parallel()
			run := &commitRun{inFlush: protocol.inFlush}
			run.testBundle = setup(t, func(commit Commit) Fault {
				run.mu.Lock()
				defer run.mu.Unlock()
				run.seen = append(run.seen, commit)
				// Otherwise pgx's CancelRequest may find the late statements, and cancel them.
				run.proxy.SetRefuse(run.fault.Kind == LateCommit)
				return run.fault
			})
			run.conn, run.hook = connect(t, run.url), connect(t, run.direct.Config().ConnString())
			run.pay = func(ctx context.Context) error {
				if err := run.conn.PgConn().Exec(ctx, "BEGIN").Close(); err != nil {
					return err
				}
				return protocol.pay(ctx, run.conn.PgConn(), "payment-1")
			}
			test(t, run)
			run.mu.Lock()
			defer run.mu.Unlock()
			if len(run.seen) != 1 {
				t.Fatalf("%d COMMITs seen, want 1", len(run.seen))
			}
			if commit := run.seen[0]; commit.Number != 1 || commit.Connection != 1 || commit.BackendPID != run.conn.PgConn().PID() ||
				bytes.Contains(commit.Messages, []byte("payment-1")) != run.inFlush {
				t.Errorf("COMMIT seen as %+v", commit)
			}
			if hits := run.proxy.Hits(); len(hits) != 1 || hits[run.fault.Kind] != 1 {
				t.Errorf("hits: %v", hits)
			}
		})
	}
}

type commitRun struct {
	*testBundle
	conn    *pgx.Conn
	hook    *pgx.Conn // for hooks; around the proxy too
	pay     func(ctx context.Context) error
	inFlush bool

	mu    sync.Mutex
	fault Fault
	seen  []Commit
}

func (r *commitRun) set(fault Fault) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fault = fault
}

func (r *commitRun) wantGone(t *testing.T) {
	t.Helper()
	eventually(t, "no connection is open", func() bool { return r.proxy.Connections() == 0 && r.backends(t, "") == 0 })
}

func TestForwardChangesNothing(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, run *commitRun) {
		if err := run.pay(t.Context()); err != nil || run.payments(t) != 1 {
			t.Fatalf("%v, %d payments", err, run.payments(t))
		}
	})
}

func TestCutBeforeLosesTheCommit(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, run *commitRun) {
		run.set(Fault{Kind: CutBefore})
		err := run.pay(t.Context())
		if err == nil || errors.As(err, new(*pgconn.PgError)) {
			t.Fatalf("got %v, want a lost connection", err)
		}
		run.wantGone(t)
		if n := run.payments(t); n != 0 {
			t.Fatalf("%d payments", n)
		}
	})
}

func TestCutBeforeForwardsWhatComesBefore(t *testing.T) {
	t.Parallel()
	b := setup(t, func(Commit) Fault { return Fault{Kind: CutBefore} })
	conn := connect(t, b.url).PgConn()
	for _, sql := range []string{"CREATE SEQUENCE s", "BEGIN"} {
		if err := conn.Exec(t.Context(), sql).Close(); err != nil {
			t.Fatal(err)
		}
	}
	pipeline := conn.StartPipeline(t.Context())
	pipeline.SendQueryParams("SELECT nextval('s') FROM generate_series(1, 7)", nil, nil, nil, nil)
	pipeline.SendQueryParams("COMMIT", nil, nil, nil, nil)
	if err := finish(pipeline, pipeline.Sync()); err == nil {
		t.Fatal("the client got an answer")
	}
	// A sequence shows which statements ran, even if their transaction was rolled back.
	if n := b.count(t, "SELECT last_value FROM s"); n != 7 {
		t.Fatalf("the statement before the COMMIT got as far as %d, want 7", n)
	}
}

func TestCutAfterLosesTheReply(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, run *commitRun) {
		run.set(Fault{Kind: CutAfter})
		err := run.pay(t.Context())
		if n := run.payments(t); n != 1 { // at once: the cut comes after PostgreSQL's answer
			t.Errorf("%d payments", n)
		}
		if err == nil || errors.As(err, new(*pgconn.PgError)) {
			t.Fatalf("got %v, want a lost connection", err)
		}
		run.wantGone(t)
	})
}

func TestSilenceLastsUntilTheClientHangsUp(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, run *commitRun) {
		run.set(Fault{Kind: Silence})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		result := make(chan error, 1)
		go func() { result <- run.pay(ctx) }()
		eventually(t, "the payment is committed", func() bool { return run.payments(t) == 1 })
		eventually(t, "PostgreSQL has answered", func() bool { return run.backends(t, "idle") == 1 })
		select {
		case err := <-result:
			t.Fatalf("the client heard something: %v", err)
		case <-time.After(100 * time.Millisecond):
		}
		cancel()
		if err := <-result; !errors.Is(err, context.Canceled) {
			t.Fatalf("got %v", err)
		}
		run.wantGone(t)
	})
}

func TestLateCommitComesAfterTheClientIsCut(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, run *commitRun) {
		const delay = 500 * time.Millisecond
		run.set(Fault{Kind: LateCommit, Delay: delay})
		started := time.Now()
		err := run.pay(t.Context())
		if n := run.payments(t); err == nil || n != 0 {
			t.Fatalf("%v, %d payments", err, n)
		}
		eventually(t, "the payment is committed", func() bool { return run.payments(t) == 1 })
		if took := time.Since(started); took < delay {
			t.Errorf("it took %v, want at least %v", took, delay)
		}
		run.wantGone(t)
	})
}

func TestHalfOpenOutlivesTheClient(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, run *commitRun) {
		run.set(Fault{Kind: HalfOpen})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		result := make(chan error, 1)
		go func() { result <- run.pay(ctx) }()
		eventually(t, "the COMMIT is there", func() bool { return run.proxy.Hits()[HalfOpen] == 1 })
		cancel()
		if err := <-result; !errors.Is(err, context.Canceled) {
			t.Fatalf("got %v", err)
		}
		<-run.conn.PgConn().CleanupDone()
		time.Sleep(50 * time.Millisecond) // PostgreSQL would have seen an end by now
		// Aborted, if pgx's CancelRequest met a statement of the flush before.
		if open, idle := run.proxy.Connections(), run.backends(t, "idle in transaction")+run.backends(t, "idle in transaction (aborted)"); open < 1 || idle != 1 {
			t.Fatalf("%d connections, %d sessions in a transaction", open, idle)
		}
		if n := run.proxy.CutAll(); n < 1 {
			t.Errorf("%d connections to cut", n)
		}
		run.wantGone(t)
		if n := run.payments(t); n != 0 {
			t.Fatalf("%d payments", n)
		}
	})
}

func TestHalfOpenSaysNothingWhenPostgreSQLHangsUp(t *testing.T) {
	t.Parallel()
	b := setup(t, func(Commit) Fault { return Fault{Kind: HalfOpen} })
	conn := connect(t, b.url).PgConn()
	if err := conn.Exec(t.Context(), "BEGIN").Close(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	result := make(chan error, 1)
	go func() { result <- conn.Exec(ctx, "COMMIT").Close() }()
	eventually(t, "the COMMIT is there", func() bool { return b.proxy.Hits()[HalfOpen] == 1 })
	if n := b.count(t, "SELECT count(*) FILTER (WHERE pg_terminate_backend($1, 20000))", int32(conn.PID())); n != 1 {
		t.Fatal("the backend did not end")
	}
	select {
	case err := <-result:
		t.Fatalf("the client heard something: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	cancel()
	<-result
	eventually(t, "the connection is gone", func() bool { return b.proxy.Connections() == 0 })
}

func TestDelayReplyDelaysTheReplyAlone(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, run *commitRun) {
		const delay = 300 * time.Millisecond
		run.set(Fault{Kind: DelayReply, Delay: delay})
		started := time.Now()
		result := make(chan error, 1)
		go func() { result <- run.pay(t.Context()) }()
		eventually(t, "the payment is committed", func() bool { return run.payments(t) == 1 })
		select {
		case err := <-result:
			if took := time.Since(started); took < delay {
				t.Fatalf("the reply came after %v: %v", took, err)
			}
		default:
		}
		if err := <-result; err != nil || time.Since(started) < delay {
			t.Fatalf("%v after %v", err, time.Since(started))
		}
	})
}

func TestCallBeforeCanEndTheBackend(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, run *commitRun) {
		pid := int32(run.conn.PgConn().PID())
		run.set(Fault{Kind: CallBefore, Hook: func() {
			if _, err := run.hook.Exec(context.Background(), "SELECT pg_terminate_backend($1, 10000)", pid); err != nil {
				t.Error(err)
			}
		}})
		err := run.pay(t.Context())
		if n := run.payments(t); err == nil || n != 0 {
			t.Errorf("%v, %d payments", err, n)
		}
		if err := run.proxy.Close(); err != nil { // it waits for the hook
			t.Fatal(err)
		}
	})
}

func TestCallAfterComesAfterTheCommit(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, run *commitRun) {
		called := false
		run.set(Fault{Kind: CallAfter, Hook: func() {
			for n := 0; n == 0 && !t.Failed(); {
				if err := run.hook.QueryRow(context.Background(), "SELECT count(*) FROM payments").Scan(&n); err != nil {
					t.Error(err)
				}
			}
			called = true
		}})
		if err := run.pay(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := run.proxy.Close(); err != nil || !called { // it waits for the hook
			t.Fatalf("%v, called: %t", err, called)
		}
	})
}
