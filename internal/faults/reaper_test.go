package faults_test

import (
	"context"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/postgres"
)

// The reaper is paused before each of its messages in turn, and so between a look-up and a delete
// if those are two. Meanwhile another replica's reaper deletes the old row, and the client sends
// its key again.
func TestF22FreshRowOutlivesAReaperPausedAnywhere(t *testing.T) {
	t.Parallel()
	g := &gate{}
	f := startReaperFault(t, "", func(config *pgxpool.Config) {
		config.MaxConns = 1
		dial := config.ConnConfig.DialFunc
		config.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dial(ctx, network, address)
			return &gatedConn{conn, g}, err
		}
	})
	// So that the messages of a new connection have been sent.
	if _, err := f.paused.DeleteExpired(t.Context()); err != nil {
		t.Fatal(err)
	}
	const messagesMax = 20
	for n := 1; ; n++ {
		key := fmt.Sprintf("key-%d", n)
		f.service.mustPay(t, key, 201, "executed")
		f.expire(t, key)
		at := g.closeBefore(n)
		done := make(chan error, 1)
		go func() {
			_, err := f.paused.DeleteExpired(context.WithoutCancel(t.Context()))
			done <- err
		}()
		select {
		case err := <-done: // it sends no further message
			g.closeBefore(0)
			if err != nil || n < 3 || n > messagesMax {
				t.Errorf("the reaper sent %d messages, %v", n-1, err)
			}
			return
		case <-at.reached:
		}
		if deleted, err := f.service.store.DeleteExpired(t.Context()); err != nil || deleted > 1 {
			t.Errorf("the other reaper deleted %d, %v", deleted, err)
		}
		second := f.service.mustPay(t, key, 201, "executed")
		close(at.open)
		if err := <-done; err != nil {
			t.Errorf("reap: %v", err)
		}
		if again, err := f.service.pay(key); err != nil || !again.is(201, "replayed") || again.body != second.body {
			t.Errorf("paused before message %d, the reaper took the fresh row: %v, %v", n, again, err)
		}
	}
}

// gate stops a connection before a message.
type gate struct {
	mu    sync.Mutex
	left  int // messages until it stops; 0: it does not
	point stop
}

type stop struct{ reached, open chan struct{} }

// closeBefore stops the nth message from now, which continues when open is closed. 0 stops none.
func (g *gate) closeBefore(n int) stop {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.left, g.point = n, stop{make(chan struct{}), make(chan struct{})}
	return g.point
}

func (g *gate) pass() {
	g.mu.Lock()
	point, stops := g.point, g.left == 1
	if g.left > 0 {
		g.left--
	}
	g.mu.Unlock()
	if stops {
		close(point.reached)
		<-point.open
	}
}

type gatedConn struct {
	net.Conn
	gate *gate
}

func (c *gatedConn) Write(p []byte) (int, error) {
	c.gate.pass()
	return c.Conn.Write(p)
}

// The pause comes after the DELETE took its snapshot, which still has the expired row, and before
// it locks a row.
func TestF22FreshRowOutlivesAReaperThatSawTheOldOne(t *testing.T) {
	t.Parallel()
	f := startReaperFault(t, "BEFORE DELETE ON idempotency_keys FOR EACH STATEMENT", nil)
	first := f.service.mustPay(t, "key", 201, "executed")
	f.expire(t, "key")
	reaped := f.reap(t)

	// Another replica's reaper deletes the old row, and the client sends its key again.
	if deleted, err := f.service.store.DeleteExpired(t.Context()); err != nil || deleted != 1 {
		t.Fatalf("the other reaper deleted %d, %v", deleted, err)
	}
	second := f.service.mustPay(t, "key", 201, "executed")
	if deleted := reaped(); deleted != 0 {
		t.Errorf("the reaper deleted %d rows: it took the fresh one", deleted)
	}
	if again := f.service.mustPay(t, "key", 201, "replayed"); again.body != second.body || again.body == first.body {
		t.Errorf("replayed %s, recorded %s", again.body, second.body)
	}
	if payments := f.service.payments(t, "key"); payments != 2 {
		t.Errorf("%d payments, want one of before it expired and one of after", payments)
	}
}

// Here the reaper has locked the row and has not deleted it yet: the row still counts, and another
// reaper skips it.
func TestF22RowInTheReapersHandsIsReplayed(t *testing.T) {
	t.Parallel()
	f := startReaperFault(t, "BEFORE DELETE ON idempotency_keys FOR EACH ROW", nil)
	first := f.service.mustPay(t, "key", 201, "executed")
	f.service.mustPay(t, "living", 201, "executed")
	f.expire(t, "key")
	reaped := f.reap(t)
	if again := f.service.mustPay(t, "key", 201, "replayed"); again.body != first.body {
		t.Errorf("replayed %s, first %s", again.body, first.body)
	}
	if deleted, err := f.service.store.DeleteExpired(t.Context()); err != nil || deleted != 0 {
		t.Errorf("another reaper deleted %d, %v", deleted, err)
	}
	if deleted := reaped(); deleted != 1 {
		t.Errorf("the reaper deleted %d rows, want the one that had expired", deleted)
	}
	second := f.service.mustPay(t, "key", 201, "executed")
	if deleted, err := f.service.store.DeleteExpired(t.Context()); err != nil || deleted != 0 {
		t.Errorf("after that a reaper deleted %d, %v", deleted, err)
	}
	if again := f.service.mustPay(t, "key", 201, "replayed"); again.body != second.body {
		t.Errorf("replayed %s, recorded %s", again.body, second.body)
	}
	f.service.mustPay(t, "living", 201, "replayed")
}

// reaperFault is a service, and a reaper that a trigger pauses.
type reaperFault struct {
	service *service
	paused  *postgres.Store // its DeleteExpired is paused
	url     string
}

// The paused reaper is recognized by its application_name. It polls an advisory lock, because a
// wait for it would be bounded by the reaper's own short lock_timeout.
const (
	pausedReaper = "paused reaper"
	pauseReaper  = `CREATE FUNCTION pause_reaper() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			IF current_setting('application_name') = '` + pausedReaper + `' THEN
				WHILE NOT pg_try_advisory_xact_lock(22) LOOP
					PERFORM pg_sleep(0.01);
				END LOOP;
			END IF;
			RETURN OLD;
		END $$`
)

func startReaperFault(t *testing.T, trigger string, change func(*pgxpool.Config)) *reaperFault {
	t.Helper()
	f := &reaperFault{url: pgtest.Database(t)}
	f.service = serve(t, f.url, &serviceOptions{middleware: &middleware.Options{TTL: time.Hour}})
	if trigger != "" {
		execute(t, f.url, pauseReaper)
		execute(t, f.url, "CREATE TRIGGER pause "+trigger+" EXECUTE FUNCTION pause_reaper()")
	}
	config, err := pgxpool.ParseConfig(f.url)
	if err != nil {
		t.Fatal(err)
	}
	config.ConnConfig.RuntimeParams["application_name"] = pausedReaper
	if change != nil {
		change(config)
	}
	options := &postgres.Options{LockTimeout: time.Minute, StatementTimeout: time.Minute}
	postgres.Configure(config, options)
	pool, err := pgxpool.NewWithConfig(context.WithoutCancel(t.Context()), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	f.paused = postgres.New(pool, options)
	return f
}

// expire moves a record into the past, as time would.
func (f *reaperFault) expire(t *testing.T, key string) {
	t.Helper()
	execute(t, f.url, "UPDATE idempotency_keys SET created_at = created_at - interval '2 h', expires_at = expires_at - interval '2 h' WHERE key = $1", key)
}

// reap starts the reaper and returns once it is paused. resume lets it continue, and returns the
// number of deleted records.
func (f *reaperFault) reap(t *testing.T) (resume func() int64) {
	t.Helper()
	pool, err := pgxpool.New(context.WithoutCancel(t.Context()), f.url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	gate, err := pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	open := sync.OnceValue(func() error { return gate.Rollback(context.WithoutCancel(t.Context())) })
	if _, err := gate.Exec(t.Context(), "SELECT pg_advisory_xact_lock(22)"); err != nil {
		t.Fatal(err)
	}
	var deleted int64
	var reapErr error
	done := make(chan struct{})
	go func() {
		defer close(done)
		deleted, reapErr = f.paused.DeleteExpired(context.WithoutCancel(t.Context()))
	}()
	t.Cleanup(func() {
		_ = open()
		<-done
	})
	await(t, f.url, "the reaper pauses",
		"EXISTS (SELECT FROM pg_stat_activity WHERE application_name = $1 AND wait_event = 'PgSleep')", pausedReaper)
	return func() int64 {
		t.Helper()
		if err := open(); err != nil {
			t.Fatal(err)
		}
		<-done
		if reapErr != nil {
			t.Errorf("reap: %v", reapErr)
		}
		return deleted
	}
}
