package operator_test

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// stopAt stops a program before a statement until the test continues it.
type stopAt struct {
	prefix  string
	stopped chan struct{}
	resume  chan struct{}
	once    sync.Once
}

func (s *stopAt) TraceQueryStart(ctx context.Context, _ *pgx.Conn, data pgx.TraceQueryStartData) context.Context {
	if strings.HasPrefix(data.SQL, s.prefix) {
		s.once.Do(func() { close(s.stopped) })
		<-s.resume
	}
	return ctx
}

func (s *stopAt) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

// If a program is stopped in the middle of an act, for example by Ctrl-Z, the key becomes free and
// the act is not done.
func TestStoppedActGivesTheKeyBack(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.do(t, key("k"), 201)
	config, err := pgxpool.ParseConfig(b.URL)
	if err != nil {
		t.Fatal(err)
	}
	stop := &stopAt{prefix: "DELETE", stopped: make(chan struct{}), resume: make(chan struct{})}
	config.ConnConfig.Tracer = stop
	pool, err := pgxpool.NewWithConfig(t.Context(), config) // not through Configure, as idemctl's
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	acted := make(chan error, 1)
	go func() {
		_, err := operator.New(postgres.New(pool, nil), &operator.Options{StatementTimeout: time.Second, CallTimeout: time.Second}).
			Delete(t.Context(), key("k"), operator.Act{Actor: "alice", Reason: "a test"})
		acted <- err
	}()
	<-stop.stopped
	const held = "SELECT count(*)::text FROM pg_locks WHERE locktype = 'advisory' AND granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
	if n := b.Text(t, held); n != "1" {
		t.Errorf("%s keys are held, want 1", n)
	}
	for deadline := time.Now().Add(time.Minute); b.Text(t, held) != "0"; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Error("the key is held for as long as the program is stopped")
			break
		}
	}
	close(stop.resume)
	if err := <-acted; err == nil {
		t.Error("the act was done by a session that had ended")
	}
	if n := b.Text(t, "SELECT count(*)::text FROM idempotency_keys"); n != "1" {
		t.Errorf("%s records, want 1", n)
	}
}
