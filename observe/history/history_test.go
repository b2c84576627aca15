package history_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/observe/history"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

type testBundle struct {
	*testservice.Service
	history *history.History
}

// setup makes a service that writes its history. If change is set the history has a pool of its
// own.
func setup(t *testing.T, opts *history.Options, change func(*testBundle, *pgxpool.Config)) *testBundle {
	t.Helper()
	b := &testBundle{Service: testservice.New(t, nil)}
	store := b.Store
	if change != nil {
		store = testservice.Open(t, b.URL, &postgres.Options{PoolConfig: func(config *pgxpool.Config) { change(b, config) }})
	}
	b.history = history.New(store, opts)
	t.Cleanup(func() { b.close(t) })
	b.Engine = idempotency.NewEngine(b.Store, &idempotency.Options{Tracer: b.history})
	return b
}

func (b *testBundle) close(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := b.history.Close(ctx); err != nil {
		t.Error(err)
	}
}

// do makes the service answer a request with this trace id.
func (b *testBundle) do(value, body, traceID string, status int) idempotency.Result {
	return b.Engine.Do(context.Background(), idempotency.Request{
		Key: idempotency.Key{Scope: "acme", Value: value}, TraceID: traceID,
		Fingerprint: idempotency.NewFingerprintV1("POST", "/transfers", "", "", []byte(body)),
	}, func(context.Context) (*idempotency.Answer, error) { return &idempotency.Answer{Status: status}, nil })
}

// The timeline of a key has all its events, including retries.
func TestTimelineShowsRetries(t *testing.T) {
	t.Parallel()
	b := setup(t, nil, nil)
	b.do("canary", "x", "t1", 503)
	b.do("canary", "x", "t2", 201)
	b.do("canary", "x", "t3", 201)
	b.do("canary", "y", "t4", 201)
	b.do("", "x", "t5", 201) // without a key
	b.do("other", "x", "", 201)
	b.close(t)
	if s := b.history.Stats(); s != (history.Stats{Written: 5}) {
		t.Errorf("%+v", s)
	}
	o := operator.New(b.Store, nil)
	events, err := o.Timeline(t.Context(), idempotency.Key{Scope: "acme", Value: "canary"})
	if err != nil {
		t.Fatal(err)
	}
	state, err := o.Get(t.Context(), idempotency.Key{Scope: "acme", Value: "canary"})
	if err != nil {
		t.Fatal(err)
	}
	seen := map[operator.EventKind]operator.Event{}
	var kinds []string
	for _, e := range events {
		seen[e.Kind] = e
		kinds = append(kinds, string(e.Kind)+" "+e.TraceID)
	}
	// The record's time is the start of its transaction.
	if got := strings.Join(kinds, ", "); got != "not-executed t1, recorded t2, executed t2, replayed t3, mismatch t4, expires " {
		t.Errorf("timeline: %s", got)
	}
	if e := seen[operator.EventMismatch]; e.Reason != "key-reused" || e.Attempts != 1 {
		t.Errorf("%+v", e)
	}
	// Both name the attempt that recorded the answer.
	for _, kind := range []operator.EventKind{operator.EventExecuted, operator.EventReplayed} {
		if e := seen[kind]; e.Attempt != state.Record.Attempt || e.Duration <= 0 || time.Since(e.At).Abs() > time.Minute || e.Reason != "" {
			t.Errorf("%+v, want attempt %s", e, state.Record.Attempt)
		}
	}
}

// Rows appear without a call of Close.
func TestEventsAreWrittenByAndBy(t *testing.T) {
	t.Parallel()
	b := setup(t, &history.Options{Interval: 10 * time.Millisecond}, nil)
	b.do("k", "x", "", 201)
	for deadline := time.Now().Add(30 * time.Second); b.history.Stats().Written == 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("nothing is written")
		}
	}
}

// end passes the ends of n requests to the history.
func (b *testBundle) end(n int) {
	for range n {
		b.history.TraceRequestEnd(context.Background(), idempotency.RequestEnd{
			Key: idempotency.Key{Scope: "acme", Value: "canary"}, Result: idempotency.Result{Outcome: idempotency.OutcomeExecuted}, Started: time.Now(),
		})
	}
}

// Events over the limit are dropped and counted, and no request waits for them. Events that can't
// be written are lost, counted, and reported without a key.
func TestQueueAtItsLimit(t *testing.T) {
	t.Parallel()
	const queueMax = 4
	writing, release := make(chan error), make(chan struct{})
	b := setup(t, &history.Options{QueueMax: queueMax, Interval: time.Hour, OnError: func(err error, _ int) {
		select {
		case writing <- err:
			<-release
		case <-release:
		}
	}}, nil)
	b.Exec(t, "DROP TABLE idempotency_events")
	b.end(1)
	select {
	case <-writing:
		t.Error("it did not wait for others")
	case <-time.After(50 * time.Millisecond):
	}
	b.end(1) // half full
	err := <-writing
	if !strings.Contains(err.Error(), "run the migrations") || strings.Contains(err.Error(), "canary") || strings.Contains(err.Error(), "acme") {
		t.Errorf("error is %v", err)
	}
	b.end(queueMax)
	if s := b.history.Stats(); s != (history.Stats{Lost: 2}) {
		t.Errorf("at its limit: %+v", s)
	}
	b.end(1)
	if s := b.history.Stats(); s != (history.Stats{Lost: 2, Dropped: 1}) {
		t.Errorf("above its limit: %+v", s)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := b.history.Close(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Close while a write hangs: %v", err)
	}
	close(release)
	b.close(t)
	if s := b.history.Stats(); s != (history.Stats{Lost: 2 + queueMax, Dropped: 1}) {
		t.Errorf("in the end: %+v", s)
	}
	b.end(1)
	if s := b.history.Stats(); s.Dropped != 2 {
		t.Errorf("after Close: %+v", s)
	}
}

// More than one batch, from many goroutines: every row is there once.
func TestManyEventsAtOnce(t *testing.T) {
	t.Parallel()
	b := setup(t, &history.Options{Interval: time.Millisecond, QueueMax: 100_000}, nil)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() { b.end(1000) })
	}
	all.Wait()
	b.close(t)
	var n int
	if err := b.Pool.QueryRow(t.Context(), "SELECT count(*) FROM idempotency_events").Scan(&n); err != nil || n != 8000 {
		t.Errorf("%d rows, %v", n, err)
	}
	if s := b.history.Stats(); s != (history.Stats{Written: 8000}) {
		t.Errorf("%+v", s)
	}
}

func TestKeepDecides(t *testing.T) {
	t.Parallel()
	b := setup(t, &history.Options{Keep: func(end idempotency.RequestEnd) bool { return end.Result.Outcome == idempotency.OutcomeReplayed }}, nil)
	b.do("k", "x", "", 201)
	b.do("k", "x", "", 201)
	b.close(t)
	if s := b.history.Stats(); s != (history.Stats{Written: 1}) {
		t.Errorf("%+v", s)
	}
}

// The service's role needs only INSERT, and a service that can't write its history still serves.
func TestHistoryNeedsInsertAlone(t *testing.T) {
	t.Parallel()
	for _, granted := range []bool{true, false} {
		var told error
		b := setup(t, &history.Options{OnError: func(err error, _ int) { told = err }}, func(b *testBundle, config *pgxpool.Config) {
			name := "test_" + strings.ReplaceAll(uuid.NewString(), "-", "")
			b.Exec(t, "CREATE ROLE "+name+" LOGIN PASSWORD '"+name+"'")
			t.Cleanup(func() { b.Exec(t, "DROP OWNED BY "+name); b.Exec(t, "DROP ROLE "+name) })
			if granted {
				b.Exec(t, "GRANT INSERT ON idempotency_events TO "+name)
			}
			config.ConnConfig.User, config.ConnConfig.Password = name, name
		})
		if result := b.do("k", "x", "", 201); result.Outcome != idempotency.OutcomeExecuted {
			t.Errorf("%s, %v", result.Outcome, result.Err)
		}
		b.close(t)
		want := history.Stats{Written: 1}
		if !granted {
			want = history.Stats{Lost: 1}
		}
		if s := b.history.Stats(); s != want || granted != (told == nil) || told != nil && !strings.Contains(told.Error(), "GRANT INSERT") {
			t.Errorf("granted %t: %+v, %v", granted, s, told)
		}
	}
}

// Rows that COPY did not write are lost: they are reported, and not counted as written.
func TestRowsThatATriggerDropsAreLost(t *testing.T) {
	t.Parallel()
	var told error
	lost := 0
	b := setup(t, &history.Options{Interval: time.Hour, OnError: func(err error, n int) { told, lost = err, n }}, nil)
	b.Exec(t, `CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF NEW.key = 'dropped' THEN RETURN NULL; END IF; RETURN NEW; END $$;
		CREATE TRIGGER skip BEFORE INSERT ON idempotency_events FOR EACH ROW EXECUTE FUNCTION skip()`)
	b.do("kept", "x", "", 201)
	b.do("dropped", "x", "", 201)
	b.close(t)
	if s := b.history.Stats(); s.Written != 1 || s.Lost != 1 {
		t.Errorf("%+v", s)
	}
	if told == nil || lost != 1 || !strings.Contains(told.Error(), "trigger") {
		t.Errorf("%d lost: %v", lost, told)
	}
}

func TestOptionsThatCannotWorkPanic(t *testing.T) {
	t.Parallel()
	pool, err := pgxpool.New(t.Context(), "postgres://nobody@127.0.0.1:1/x")
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	for name, start := range map[string]func(){
		"no store": func() { history.New(nil, nil) },
		"queue":    func() { history.New(postgres.New(pool, nil), &history.Options{QueueMax: -1}) },
		"interval": func() { history.New(postgres.New(pool, nil), &history.Options{Interval: -1}) },
		"timeout":  func() { history.New(postgres.New(pool, nil), &history.Options{WriteTimeout: -1}) },
	} {
		func() {
			defer func() {
				if text, _ := recover().(string); !strings.HasPrefix(text, "idempotency/history: ") {
					t.Errorf("%s: panic %q", name, text)
				}
			}()
			start()
		}()
	}
}
