package postgres_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/storage/postgres"
)

// stopper makes a pool's connections behave as if their process had been stopped: once stop reports
// true for the bytes to be written, the rest is never sent, nothing is received, and nothing is
// closed.
type stopper struct {
	mu   sync.Mutex
	stop func(written []byte) (send int, stopped bool) // nil: everything passes
}

func (s *stopper) arm(stop func([]byte) (int, bool)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stop = stop
}

// configure puts the stopper below a pool's connections. Their sockets are closed when the test
// ends.
func (s *stopper) configure(t *testing.T) func(*pgxpool.Config) {
	return func(config *pgxpool.Config) {
		dial := config.ConnConfig.DialFunc
		config.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dial(ctx, network, address)
			if err != nil {
				return nil, err
			}
			t.Cleanup(func() { _ = conn.Close() })
			return &stoppedConn{Conn: conn, stopper: s}, nil
		}
	}
}

type stoppedConn struct {
	net.Conn
	stopper *stopper
	stopped bool // guarded by stopper.mu
}

func (c *stoppedConn) Write(p []byte) (int, error) {
	c.stopper.mu.Lock()
	defer c.stopper.mu.Unlock()
	if c.stopped {
		return len(p), nil
	}
	if c.stopper.stop != nil {
		if send, stopped := c.stopper.stop(p); stopped {
			c.stopped, c.stopper.stop = true, nil
			_, err := c.Conn.Write(p[:send])
			return len(p), err
		}
	}
	return c.Conn.Write(p)
}

func (c *stoppedConn) Close() error {
	c.stopper.mu.Lock()
	defer c.stopper.mu.Unlock()
	if c.stopped {
		return nil
	}
	return c.Conn.Close()
}

// beforeCommit cuts a flush off before the messages of its last statement: Bind, Execute, Sync, and
// a Parse in front of them if it is not prepared.
func beforeCommit(written []byte) (send int, stopped bool) {
	var starts []int
	for at := 0; at+5 <= len(written); at += 1 + int(binary.BigEndian.Uint32(written[at+1:])) {
		starts = append(starts, at)
	}
	last := len(starts) - 3
	if written[starts[last-1]] == 'P' {
		last--
	}
	return starts[last], true
}

func half(written []byte) (send int, stopped bool) { return len(written) / 2, len(written) > 600 }

// A process that is stopped, on a machine that still answers for it, keeps its key until PostgreSQL
// ends the session. Each case names the first version with a timeout that does; if there is none,
// pg_terminate_backend does.
func TestKeyOfAStoppedProcessIsFreed(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "waits until PostgreSQL ends many sessions that are silent")
	const patience = time.Second
	const long = 1 << 16
	record := func(ctx context.Context, attempt idempotency.Attempt, body int) {
		a := answer(201)
		a.Body = []byte(strings.Repeat("x", body))
		_ = attempt.Seal()
		_ = attempt.Commit(ctx, a) // the stopped process never gets the result
	}
	decline := func(ctx context.Context, attempt idempotency.Attempt) {
		a := answer(402)
		a.Body = []byte(strings.Repeat("x", long))
		_ = attempt.Seal()
		_ = attempt.Decline(ctx, a)
	}
	deferNames := func(ctx context.Context, attempt idempotency.Attempt, names ...string) {
		for _, name := range names {
			if err := postgres.DeferExec(attempt.Context(ctx), "INSERT INTO effects (name) VALUES ($1)", name); err != nil {
				t.Error(err)
			}
		}
		record(ctx, attempt, 1)
	}
	type stopped struct {
		stop    func(written []byte) (send int, stopped bool)
		do      func(ctx context.Context, attempt idempotency.Attempt)
		commits bool // or declines
		// The first major version of PostgreSQL with a timeout that ends the session. 0: none.
		since int
	}
	for name, c := range map[string]stopped{
		"in the handler": {nil, func(context.Context, idempotency.Attempt) {}, false, 14},
		"in the middle of a long record": {half, func(ctx context.Context, attempt idempotency.Attempt) {
			record(ctx, attempt, long)
		}, true, 14},
		"in the middle of a long decline": {half, decline, true, 17},
		"in the middle of a long statement of the handler's": {half, func(ctx context.Context, attempt idempotency.Attempt) {
			_, _ = postgres.Tx(attempt.Context(ctx)).Exec(ctx, "INSERT INTO effects (name) VALUES ($1)", strings.Repeat("x", 1<<20))
		}, false, 14},
		"between the record and COMMIT": {beforeCommit, func(ctx context.Context, attempt idempotency.Attempt) {
			record(ctx, attempt, 1)
		}, true, 17},
		"in the middle of a long deferred statement": {half, func(ctx context.Context, attempt idempotency.Attempt) {
			deferNames(ctx, attempt, "x", strings.Repeat("x", long))
		}, true, 14},
		"between deferred statements": {half, func(ctx context.Context, attempt idempotency.Attempt) {
			deferNames(ctx, attempt, strings.Split(strings.Repeat("x", 30), "")...)
		}, true, 17},
		"in the middle of a batch": {half, func(ctx context.Context, attempt idempotency.Attempt) {
			batch := &pgx.Batch{}
			for range 100 {
				batch.Queue("INSERT INTO effects (name) VALUES ('x')")
			}
			_ = postgres.Tx(attempt.Context(ctx)).SendBatch(ctx, batch).Close()
		}, false, 17},
		"in the middle of a copy": {func(written []byte) (int, bool) { return len(written), written[0] == 'd' },
			func(ctx context.Context, attempt idempotency.Attempt) {
				rows := [][]any{}
				for range 100_000 {
					rows = append(rows, []any{"x"})
				}
				_, _ = postgres.Tx(attempt.Context(ctx)).CopyFrom(ctx, pgx.Identifier{"effects"}, []string{"name"}, pgx.CopyFromRows(rows))
			}, false, 0},
	} {
		for _, pooling := range []bool{false, true} { // which also means that nothing is prepared
			if pooling && !c.commits {
				continue // the handler's own statements
			}
			t.Run(name+map[bool]string{true: ", as through a pooler"}[pooling], func(t *testing.T) {
				t.Parallel()
				s := &stopper{}
				b := setup(t, &setupOptions{store: &postgres.Options{IdleInTransactionTimeout: patience, TransactionPooling: pooling}, configure: s.configure(t)})
				other := setupOther(t, b)
				version := other.count(t, "SELECT current_setting('server_version_num')::int / 10000")
				ctx, cancel := context.WithCancel(context.Background())
				attempt, record, err := b.store.Begin(ctx, claimOf(request("k", "")))
				if err != nil || record != nil {
					t.Fatal(record, err)
				}
				pid := postgres.RawConnOf(attempt).PgConn().PID()
				held := func() bool {
					return other.count(t, "SELECT count(*) FROM pg_locks WHERE pid = $1 AND locktype = 'advisory' AND granted", int(pid)) > 0
				}
				if !held() {
					t.Fatal("the key is not held")
				}
				s.arm(c.stop)
				done := make(chan struct{})
				began := time.Now()
				go func() {
					defer close(done)
					c.do(ctx, attempt)
					if !c.commits {
						<-ctx.Done()
						_ = attempt.Rollback(context.Background())
					}
				}()
				t.Cleanup(func() { cancel(); <-done })
				bounded := c.since != 0 && version >= c.since
				limit := 5 * patience
				if bounded {
					limit = time.Minute // the machine may be busy
				}
				for held() && time.Since(began) < limit {
					time.Sleep(20 * time.Millisecond)
				}
				switch took := time.Since(began); {
				case bounded && held():
					t.Fatalf("the key is still held after %v: %s", took, other.text(t, "SELECT concat_ws(' ', state, wait_event, query) FROM pg_stat_activity WHERE pid = $1", int(pid)))
				case bounded && took < patience/2:
					t.Errorf("the key was given up after %v", took)
				case !bounded && !held():
					t.Errorf("PostgreSQL %d ended the session after %v: docs/guarantees.md says that it does not", version, took)
				case !bounded:
					other.count(t, "SELECT count(*) FROM (SELECT pg_terminate_backend($1, 10000)) AS ended", int(pid))
				}
				want(t, other.do(t, request("k", ""), pay(t, 201)), idempotency.OutcomeExecuted, "")
				if n := other.effects(t); n != 1 {
					t.Errorf("%d effects, want 1", n)
				}
			})
		}
	}
}

// setupOther returns another service on the bundle's database.
func setupOther(t *testing.T, b *testBundle) *testBundle {
	t.Helper()
	plain := b.pool.Config().ConnConfig
	config, err := pgxpool.ParseConfig(plain.ConnString())
	if err != nil {
		t.Fatal(err)
	}
	postgres.Configure(config, nil)
	other := &testBundle{}
	if other.pool, err = pgxpool.NewWithConfig(context.Background(), config); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(other.pool.Close)
	other.store = postgres.New(other.pool, nil)
	return other
}

func (b *testBundle) text(t *testing.T, sql string, arguments ...any) (text string) {
	t.Helper()
	if err := b.pool.QueryRow(context.Background(), sql, arguments...).Scan(&text); err != nil {
		t.Fatal(err)
	}
	return text
}

// If a process is stopped while it looks for a lost COMMIT, it holds the key no longer than one
// that runs a handler.
func TestResolverOfAStoppedProcessFreesItsKey(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "waits until PostgreSQL ends sessions that are silent")
	for name, pooling := range map[string]bool{"directly": false, "as through a pooler": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := &stopper{}
			b := setup(t, &setupOptions{store: &postgres.Options{IdleInTransactionTimeout: 2 * time.Second, TransactionPooling: pooling}, configure: s.configure(t)})
			other := setupOther(t, b)
			stopped := make(chan struct{})
			s.arm(func(written []byte) (int, bool) {
				if !strings.Contains(string(written), "ROLLBACK") {
					return 0, false
				}
				close(stopped)
				return 0, true
			})
			found := b.resolveLater(t.Context(), "k")
			<-stopped
			const held = "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE locktype = 'advisory' AND datname = current_database()"
			if n := other.count(t, held); n != 1 {
				t.Errorf("%d keys are held, want 1", n)
			}
			for deadline := time.Now().Add(30 * time.Second); other.count(t, held) > 0; time.Sleep(20 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatal("the key is still held")
				}
			}
			(<-found).wantAbsent(t)
		})
	}
}

// Over TCP the server notices a machine that is gone, whatever the last message was.
func TestServerNoticesAMachineThatIsGone(t *testing.T) {
	t.Parallel()
	b := setup(t, &setupOptions{database: pgtest.TLS(t).TLSURL("postgres")})
	for name, want := range map[string]string{"tcp_keepalives_idle": "30", "tcp_keepalives_interval": "10", "tcp_keepalives_count": "3", "tcp_user_timeout": "60000"} {
		if got := b.text(t, "SELECT current_setting($1)", name); got != want && !(name == "tcp_user_timeout" && got == "1min") {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
}

// The Sync before a long record changes no outcome: a failure before it leaves nothing behind, and
// gives the same error as without it.
func TestLongRecordsFailAsShortOnesDo(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		sick    string
		handle  func(t *testing.T, b *testBundle, ctx context.Context, tx pgx.Tx)
		outcome idempotency.Outcome
		reason  idempotency.Reason
		effects int
	}{
		"nothing is wrong": {"SELECT 1", func(*testing.T, *testBundle, context.Context, pgx.Tx) {}, idempotency.OutcomeExecuted, "", 1},
		"a deferred constraint": {"ALTER TABLE effects ADD CONSTRAINT once UNIQUE (name) DEFERRABLE INITIALLY DEFERRED",
			func(t *testing.T, _ *testBundle, ctx context.Context, _ pgx.Tx) { effect(ctx, t) }, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed, 0},
		"a lost race": {"SELECT 1",
			func(t *testing.T, b *testBundle, _ context.Context, _ pgx.Tx) { record(t, b.pool, "k", "", "theirs") }, idempotency.OutcomeReplayed, "", 0},
		"a trigger that drops the record": {"CREATE FUNCTION drop_row() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; CREATE TRIGGER drop_row BEFORE INSERT ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION drop_row()",
			func(*testing.T, *testBundle, context.Context, pgx.Tx) {}, idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable, 0},
		"another transaction": {"SELECT 1", func(t *testing.T, _ *testBundle, ctx context.Context, tx pgx.Tx) {
			for _, sql := range []string{"COMMIT", "BEGIN"} {
				if err := postgres.SendUnadmitted(ctx, tx, true, sql); err != nil {
					t.Error(err)
				}
			}
		}, idempotency.OutcomeUnknown, idempotency.ReasonTransactionLost, 1},
	} {
		var short string // the error with a short record
		for _, length := range []int{1, postgres.TogetherBytesMax + 1} {
			b := setup(t, nil)
			b.exec(t, c.sick)
			result := idempotency.NewEngine(b.store, nil).Do(t.Context(), request("k", ""), func(ctx context.Context) (*idempotency.Answer, error) {
				effect(ctx, t)
				c.handle(t, b, ctx, postgres.Tx(ctx))
				a := answer(201)
				a.Body = []byte(strings.Repeat("x", length))
				return a, nil
			})
			if result.Outcome != c.outcome || result.Reason != c.reason || b.effects(t) != c.effects {
				t.Errorf("%s, %d bytes: %s %q %v, %d effects; want %s %q, %d", name, length, result.Outcome, result.Reason, result.Err, b.effects(t), c.outcome, c.reason, c.effects)
			}
			if text := fmt.Sprint(result.Err); length == 1 {
				short = text
			} else if text != short {
				t.Errorf("%s, %d bytes: error is %q, with a short record %q", name, length, text, short)
			}
		}
	}
}
