package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/multitracer"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/storage/postgres"
)

const patience = 50 * time.Second // no test needs it if all is well

// usage counts the connections of a pool that are in use.
type usage struct {
	mu               sync.Mutex
	now, most, taken int
}

func (u *usage) TraceAcquireStart(ctx context.Context, _ *pgxpool.Pool, _ pgxpool.TraceAcquireStartData) context.Context {
	return ctx
}

func (u *usage) TraceAcquireEnd(_ context.Context, _ *pgxpool.Pool, data pgxpool.TraceAcquireEndData) {
	if data.Err == nil {
		u.mu.Lock()
		defer u.mu.Unlock()
		u.now++
		u.taken++
		u.most = max(u.most, u.now)
	}
}

func (u *usage) TraceRelease(*pgxpool.Pool, pgxpool.TraceReleaseData) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.now--
}

// total returns the number of connections that were taken.
func (u *usage) total() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.taken
}

func (u *usage) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	return ctx
}
func (u *usage) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

// storm sends a request many times at once, and returns the results.
func storm(engine *idempotency.Engine, copies int, req idempotency.Request, run idempotency.RunFunc) (results []idempotency.Result, settled func()) {
	results = make([]idempotency.Result, copies)
	var group sync.WaitGroup
	for i := range copies {
		group.Go(func() { results[i] = engine.Do(context.Background(), req, run) })
	}
	return results, group.Wait
}

// wantOne requires that all results have one answer, and that the given number of them are
// executed.
func wantOne(t *testing.T, results []idempotency.Result, executed int) {
	t.Helper()
	for i, result := range results {
		if result.Outcome == idempotency.OutcomeExecuted {
			executed--
		} else if result.Outcome != idempotency.OutcomeReplayed {
			t.Fatalf("copy %d: %s, %v", i, result.Outcome, result.Err)
		}
		if string(result.Answer.Body) != string(results[0].Answer.Body) {
			t.Errorf("copy %d is answered %q, the first %q", i, result.Answer.Body, results[0].Answer.Body)
		}
	}
	if executed != 0 {
		t.Errorf("%d copies too few were executed", executed)
	}
}

// signed answers with the attempt's id, so that no two runs have the same answer.
func signed(ctx context.Context, status int) *idempotency.Answer {
	id, _ := idempotency.AttemptIDFrom(ctx)
	return &idempotency.Answer{Status: status, Body: []byte(id.String())}
}

// However many duplicates wait, they take two connections.
func TestDuplicatesThatWaitTakeTwoConnections(t *testing.T) {
	t.Parallel()
	const copies = 64
	used := &usage{}
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) {
		c.MaxConns = 16
		c.ConnConfig.Tracer = multitracer.New(c.ConnConfig.Tracer, used)
	}})
	engine := idempotency.NewEngine(b.store, &idempotency.Options{Wait: patience})
	running, released := make(chan struct{}, copies), make(chan struct{})
	results, settled := storm(engine, copies, request("k", ""), func(ctx context.Context) (*idempotency.Answer, error) {
		effect(ctx, t)
		running <- struct{}{}
		<-released
		return signed(ctx, 201), nil
	})
	<-running
	for engine.InFlight() != copies {
		time.Sleep(time.Millisecond)
	}
	want(t, engine.Do(t.Context(), request("another", ""), func(context.Context) (*idempotency.Answer, error) {
		return answer(201), nil
	}), idempotency.OutcomeExecuted, "")
	close(released)
	settled()
	used.mu.Lock()
	most, taken := used.most, used.taken
	used.mu.Unlock()
	wantOne(t, results, 1)
	if n := b.effects(t); n != 1 || len(running) != 0 {
		t.Errorf("%d effects, %d runs more", n, len(running))
	}
	// One connection each for the first request, the other request, the duplicate that calls the
	// store, and the duplicates that came after the end.
	if most > 2 || taken > 8 {
		t.Errorf("%d connections at once, %d in all", most, taken)
	}
}

// process is another process on the same database.
type process struct {
	pool   *pgxpool.Pool
	engine *idempotency.Engine
	waits  chan struct{} // a token for the end of each wait
}

func (b *testBundle) process(t *testing.T, wait time.Duration) *process {
	t.Helper()
	pool, err := pgxpool.NewWithConfig(context.Background(), b.pool.Config())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	p := &process{pool: pool, waits: make(chan struct{}, 1000)}
	p.engine = idempotency.NewEngine(postgres.New(pool, nil), &idempotency.Options{Wait: wait, Tracer: waitTracer{p.waits}})
	return p
}

type waitTracer struct{ waits chan struct{} }

func (w waitTracer) TraceRequestStart(ctx context.Context, _ idempotency.RequestStart) context.Context {
	return ctx
}

func (w waitTracer) TraceStep(_ context.Context, data idempotency.StepEnd) {
	if data.Step == idempotency.StepWait {
		w.waits <- struct{}{}
	}
}
func (w waitTracer) TraceRequestEnd(context.Context, idempotency.RequestEnd) {}
func (w waitTracer) TraceRefused(context.Context, idempotency.Refused)       {}

// The awaited attempt belongs to another process: however it or the process ends, there is one
// effect and one answer.
func TestAttemptOfAnotherProcessIsWaitedFor(t *testing.T) {
	t.Parallel()
	const copies = 8
	for name, test := range map[string]struct {
		end    func(b *testBundle, pid uint32, release func()) // ends the attempt
		status int                                             // of the other process's handler
		// The outcome of its request. Empty: not-executed, or a replay if it looked late.
		outcome  idempotency.Outcome
		executed int // of the duplicates that wait
	}{
		"it commits": {func(_ *testBundle, _ uint32, release func()) { release() },
			201, idempotency.OutcomeExecuted, 0},
		"it declines": {func(_ *testBundle, _ uint32, release func()) { release() },
			404, idempotency.OutcomeExecuted, 0},
		"it rolls back": {func(_ *testBundle, _ uint32, release func()) { release() },
			500, idempotency.OutcomeNotExecuted, 1},
		"it dies": {func(b *testBundle, pid uint32, _ func()) {
			b.count(t, "SELECT count(pg_terminate_backend($1, 5000))", pid)
		},
			201, "", 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, nil)
			waiting := b.process(t, patience)
			running, released := make(chan uint32), make(chan struct{})
			var holder idempotency.Result
			var group sync.WaitGroup
			group.Go(func() {
				holder = b.do(t, request("k", ""), func(ctx context.Context, tx pgx.Tx) int {
					effect(ctx, t)
					running <- postgres.RawConn(tx).PgConn().PID()
					<-released
					return test.status
				})
			})
			pid := <-running
			var runs atomic.Int64
			results, settled := storm(waiting.engine, copies, request("k", ""), func(ctx context.Context) (*idempotency.Answer, error) {
				runs.Add(1)
				effect(ctx, t)
				return signed(ctx, 201), nil
			})
			<-waiting.waits // one asks again
			<-waiting.waits
			release := sync.OnceFunc(func() { close(released) })
			test.end(b, pid, release)
			settled()
			release()
			group.Wait()
			if holder.Outcome != test.outcome && (test.outcome != "" || holder.Outcome == idempotency.OutcomeExecuted) {
				t.Errorf("the other process's request: %s, %v", holder.Outcome, holder.Err)
			}
			wantOne(t, results, test.executed)
			if test.executed == 0 && string(results[0].Answer.Body) != string(holder.Answer.Body) {
				t.Errorf("answered %q, and the attempt %q", results[0].Answer.Body, holder.Answer.Body)
			}
			effects := 1
			if test.status == 404 {
				effects = 0
			}
			if n := b.effects(t); n != effects || int(runs.Load()) < test.executed || test.status != 404 && int(runs.Load()) > test.executed {
				t.Errorf("%d effects, %d runs of those that waited", n, runs.Load())
			}
		})
	}
}

// Between two claims nothing is held, nor when the time has elapsed.
func TestThoseThatWaitHoldNothing(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	waiting := b.process(t, 2*time.Second) // a claim on a loaded machine takes a while
	tx := b.hold(t, "k")
	defer func() { _ = tx.Rollback(context.Background()) }()
	results, settled := storm(waiting.engine, 8, request("k", ""), func(context.Context) (*idempotency.Answer, error) {
		t.Error("the handler ran")
		return answer(201), nil
	})
	settled()
	for _, result := range results {
		want(t, result, idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
	}
	if held, locks := waiting.pool.Stat().AcquiredConns(), b.count(t, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"); held != 0 || locks != 1 {
		t.Errorf("%d connections and %d locks are held, want none and the holder's", held, locks)
	}
	if n := len(waiting.waits); n < 8 {
		t.Errorf("%d stretches of waiting, want one of each at least", n)
	}
}

// Duplicates that arrive while their request runs take no connection, even on a route that does not
// wait. Once the first is answered each duplicate gets a replay.
func TestDuplicatesOfWhatRunsHereTakeNoConnection(t *testing.T) {
	t.Parallel()
	const (
		copies   = 64
		over     = 100 * time.Millisecond // in which they arrive
		takes    = 200 * time.Millisecond // the first
		heldMost = 3
	)
	used := &usage{}
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) {
		c.MaxConns = 16
		c.ConnConfig.Tracer = multitracer.New(c.ConnConfig.Tracer, used)
	}})
	engine := idempotency.NewEngine(b.store, nil)
	running, answered := make(chan struct{}), make(chan struct{})
	first := make(chan idempotency.Result, 1)
	go func() {
		first <- engine.Do(context.Background(), request("k", ""), func(ctx context.Context) (*idempotency.Answer, error) {
			effect(ctx, t)
			close(running)
			<-time.After(takes)
			<-answered // on a slow machine too
			return signed(ctx, 201), nil
		})
	}()
	<-running
	before := used.total()
	results := make([]idempotency.Result, copies)
	var group sync.WaitGroup
	for i := range copies {
		group.Go(func() {
			<-time.After(over * time.Duration(i) / copies)
			results[i] = engine.Do(context.Background(), request("k", ""), func(context.Context) (*idempotency.Answer, error) {
				t.Error("the handler of a copy ran")
				return answer(201), nil
			})
		})
	}
	group.Wait()
	if n := used.total() - before; n != 0 {
		t.Errorf("%d connections were taken by duplicates of what runs here", n)
	}
	close(answered)
	executed := <-first
	want(t, executed, idempotency.OutcomeExecuted, "")
	for _, result := range results {
		want(t, result, idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
	}
	used.mu.Lock()
	if used.most > heldMost {
		t.Errorf("%d connections were held at once, want at most %d", used.most, heldMost)
	}
	used.mu.Unlock()

	replays, settled := storm(engine, copies, request("k", ""), func(context.Context) (*idempotency.Answer, error) {
		t.Error("the handler of a copy ran")
		return answer(201), nil
	})
	settled()
	wantOne(t, append(replays, executed), 1)
	if n := b.effects(t); n != 1 {
		t.Errorf("%d effects", n)
	}
}

// Random requests end in all ways, on two engines with and without Wait, and COMMITs lose their
// replies. As soon as a caller has seen the record of a payment, no request that begins later is
// in-progress. At the end no key is left in memory.
func TestNobodyIsInProgressAfterTheEndWasSeen(t *testing.T) {
	t.Parallel()
	const (
		keys     = 24
		callers  = 16
		requests = 40 // of each caller
	)
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) {
		c.MaxConns = 2 * callers
		through(t, c.ConnConfig, func(pgfault.Commit) pgfault.Fault {
			return pgfault.Fault{Kind: []pgfault.Kind{pgfault.CutBefore, pgfault.CutAfter, pgfault.Forward, pgfault.Forward, pgfault.Forward}[rand.N(5)]}
		})
	}})
	engines := []*idempotency.Engine{idempotency.NewEngine(b.store, nil), idempotency.NewEngine(b.store, nil)}
	engines = append(engines, engines[0].With(&idempotency.Options{Wait: time.Second}), engines[1].With(&idempotency.Options{Wait: time.Second}))
	var recorded [keys]atomic.Bool
	var outcomes sync.Map
	do := func(engine *idempotency.Engine, key int) (result idempotency.Result) {
		seen := recorded[key].Load()
		done := make(chan struct{})
		go func() { // a handler may end its goroutine
			defer close(done)
			result = engine.Do(context.Background(), request(fmt.Sprint("k", key), ""), func(ctx context.Context) (*idempotency.Answer, error) {
				effect(ctx, t)
				runtime.Gosched()
				switch rand.N(10) {
				case 0:
					panic("handler")
				case 1:
					runtime.Goexit()
				case 2:
					return nil, errors.New("handler")
				case 3, 4, 5:
					return answer(500), nil
				case 6:
					return answer(402), nil
				}
				return answer(201), nil
			})
		}()
		<-done
		switch result.Outcome {
		case idempotency.OutcomeExecuted, idempotency.OutcomeReplayed:
			// A decline gives up its claim, so another attempt may run beside its record.
			if result.Answer.Status == 201 {
				recorded[key].Store(true)
			}
		case idempotency.OutcomeInProgress:
			if seen {
				t.Errorf("key %d is in-progress after somebody saw its record: %v", key, result.Err)
			}
		}
		outcomes.Store(result.Outcome, true)
		return result
	}
	var group sync.WaitGroup
	for range callers {
		group.Go(func() {
			for range requests {
				do(engines[rand.N(len(engines))], rand.N(keys))
			}
		})
	}
	group.Wait()

	// A key that is still in memory would be answered from it for as long as a handler may run.
	paid := 0
	for key := range keys {
		for _, engine := range engines[:2] {
			if result := do(engine, key); result.Outcome == idempotency.OutcomeInProgress && strings.Contains(result.Err.Error(), "runs in this process") {
				t.Errorf("key %d is in memory at the end: %v", key, result.Err)
			}
		}
		for deadline := time.Now().Add(patience); ; {
			if result := do(engines[0], key); result.Record != nil || result.Outcome == idempotency.OutcomeExecuted {
				if result.Answer.Status == 201 {
					paid++
				}
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("key %d is not recorded", key)
			}
		}
	}
	if n := b.effects(t); n != paid {
		t.Errorf("%d effects of %d payments", n, paid)
	}
	for _, outcome := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed, idempotency.OutcomeNotExecuted} {
		if _, ok := outcomes.Load(outcome); !ok {
			t.Errorf("nothing was %s", outcome)
		}
	}
}

// startTracer also gives a token for the start of each wait.
type startTracer struct {
	waitTracer
	starts chan struct{}
}

func (s startTracer) TraceWaitStart(context.Context) { s.starts <- struct{}{} }

// callUnderWay is an engine with Wait, and a request that is in the middle of its call. lapse ends
// the call.
func callUnderWay(t *testing.T, lapse idempotency.Lapse, settle bool) (r *resumable, tracer startTracer, first func() idempotency.Result, end func()) {
	t.Helper()
	tracer = startTracer{waitTracer{make(chan struct{}, 1000)}, make(chan struct{}, 1000)}
	began, over := make(chan struct{}), make(chan struct{})
	r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
		effects, err := idempotency.EffectsFrom(ctx)
		if err != nil {
			return nil, err
		}
		effect, resumed, _, err := effects.Begin(idempotency.Intent{Name: "charge", Kind: idempotency.EffectCall, Timeout: 20 * time.Second})
		switch {
		case err != nil:
			return nil, err
		case resumed:
			t.Error("it was called twice")
		}
		close(began)
		<-over
		if settle {
			effect.State = idempotency.EffectDone
			return said(201), effects.Settle(effect)
		}
		effects.Lapse(lapse)
		return nil, idempotency.ErrUnsettled
	})
	r.Engine = idempotency.NewEngine(r.Store, &idempotency.Options{Wait: patience, Tracer: tracer})
	ended := make(chan idempotency.Result, 1)
	go func() { ended <- r.Engine.Do(context.Background(), r.request(), r.run) }()
	<-began
	first = sync.OnceValue(func() idempotency.Result { return <-ended })
	end = sync.OnceFunc(func() { close(over) })
	t.Cleanup(func() {
		end()
		first()
	})
	return r, tracer, first, end
}

// Duplicates that wait for a request get its result if its call is not settled, without a run of
// their own. Another request with the same key does not get it.
func TestCopiesOfAnOpenRequestAreAccepted(t *testing.T) {
	t.Parallel()
	const copies, pause = 5, time.Minute
	for name, c := range map[string]struct {
		lapse  idempotency.Lapse
		reason idempotency.Reason
	}{
		"later":       {idempotency.Lapse{Pause: pause, Reason: "no reply"}, idempotency.ReasonOutcomeUnknown},
		"by a person": {idempotency.Lapse{Parked: "no reply"}, idempotency.ReasonNeedsAttention},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, tracer, first, end := callUnderWay(t, c.lapse, false)
			var runs atomic.Int64
			run := func(context.Context) (*idempotency.Answer, error) {
				runs.Add(1)
				return said(201), nil
			}
			results, settled := storm(r.Engine, copies, r.request(), run)
			other := r.request()
			other.Fingerprint = testservice.Request(idempotency.Key{Scope: "acme", Value: "other"}).Fingerprint
			others, otherSettled := storm(r.Engine, 1, other, run)
			for range copies + 1 {
				<-tracer.starts
			}
			end()
			settled()
			otherSettled()
			leader := first()
			want(t, leader, idempotency.OutcomeUnknown, c.reason)
			for _, result := range results {
				want(t, result, idempotency.OutcomeUnknown, c.reason)
				if !result.Accepted || result.RetryAfter != leader.RetryAfter || c.lapse.Pause != 0 && result.RetryAfter != pause || result.Record != nil {
					t.Errorf("%+v", result)
				}
			}
			want(t, others[0], idempotency.OutcomeMismatch, idempotency.ReasonKeyReused)
			if n := runs.Load(); n != 0 || others[0].Accepted {
				t.Errorf("%d runs", n)
			}
		})
	}
}

// A duplicate in another process runs its handler up to the first call once at most, however often
// it claims, and gets the result of the request in the end.
func TestCopiesInAnotherProcessClaimFirst(t *testing.T) {
	t.Parallel()
	for name, settle := range map[string]bool{"settled": true, "not settled": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, _, first, end := callUnderWay(t, idempotency.Lapse{Pause: time.Minute, Reason: "no reply"}, settle)
			tracer := startTracer{waitTracer{make(chan struct{}, 1000)}, make(chan struct{}, 1000)}
			another := idempotency.NewEngine(testservice.Open(t, r.URL, nil), &idempotency.Options{Wait: patience, Tracer: tracer})
			runs := 0
			results, settled := storm(another, 1, r.request(), func(ctx context.Context) (*idempotency.Answer, error) {
				runs++
				return said(201), r.charge(ctx, true)
			})
			for range 4 { // looks
				<-tracer.starts
			}
			end()
			settled()
			if settle {
				want(t, first(), idempotency.OutcomeExecuted, "")
				want(t, results[0], idempotency.OutcomeReplayed, "")
			} else {
				want(t, results[0], idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
				if left := results[0].RetryAfter; !results[0].Accepted || left <= 0 || left > time.Minute {
					t.Errorf("%+v", results[0])
				}
			}
			if runs != 1 || r.sent != 0 {
				t.Errorf("%d runs, sent %d", runs, r.sent)
			}
		})
	}
}

// The same while there is no record to be seen, because the other process is in its first phase.
func TestCopiesOfAPhaseInAnotherProcessClaimFirst(t *testing.T) {
	t.Parallel()
	began, over := make(chan struct{}), make(chan struct{})
	r := newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
		_, err := postgres.Phase(ctx, "hold", func(tx pgx.Tx) (hold, error) {
			close(began)
			<-over
			return insert(ctx, "hold")(tx)
		})
		return said(201), err
	})
	first, firstSettled := storm(r.Engine, 1, r.request(), r.run)
	<-began
	tracer := startTracer{waitTracer{make(chan struct{}, 1000)}, make(chan struct{}, 1000)}
	another := idempotency.NewEngine(testservice.Open(t, r.URL, nil), &idempotency.Options{Wait: patience, Tracer: tracer})
	runs := 0
	results, settled := storm(another, 1, r.request(), func(ctx context.Context) (*idempotency.Answer, error) {
		runs++
		_, err := postgres.Phase(ctx, "hold", insert(ctx, "hold"))
		return said(201), err
	})
	for range 4 { // looks
		<-tracer.starts
	}
	close(over)
	firstSettled()
	settled()
	want(t, first[0], idempotency.OutcomeExecuted, "")
	want(t, results[0], idempotency.OutcomeReplayed, "")
	if names := r.names(t); runs != 1 || names != "hold" {
		t.Errorf("%d runs, wrote %q", runs, names)
	}
}

// If a duplicate's Wait elapses while the call is under way, it checks the store and does not run
// its handler. It is in-progress, for the rest of the lease at most.
func TestWaitThatElapsesDuringACallRunsNothing(t *testing.T) {
	t.Parallel()
	r, _, _, _ := callUnderWay(t, idempotency.Lapse{Reason: "no reply"}, false)
	impatient := r.Engine.With(&idempotency.Options{Wait: 50 * time.Millisecond})
	result := impatient.Do(t.Context(), r.request(), func(context.Context) (*idempotency.Answer, error) {
		t.Error("it ran")
		return said(201), nil
	})
	want(t, result, idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
	if result.RetryAfter <= 0 || result.RetryAfter > patience {
		t.Errorf("%+v", result)
	}
}

// A handler that has lost its connection runs on until it notices. Another process may execute the
// request meanwhile. From then on no process answers a copy with in-progress.
func TestHandlerWithoutItsConnectionHidesNoRecord(t *testing.T) {
	t.Parallel()
	used := &usage{}
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) {
		c.ConnConfig.Tracer = multitracer.New(c.ConnConfig.Tracer, used)
	}})
	here, elsewhere := idempotency.NewEngine(b.store, nil), idempotency.NewEngine(b.store, nil)
	paid := func(ctx context.Context) (*idempotency.Answer, error) {
		effect(ctx, t)
		return signed(ctx, 201), nil
	}
	result := here.Do(context.Background(), request("k", ""), func(ctx context.Context) (*idempotency.Answer, error) {
		effect(ctx, t)
		before := used.total()
		want(t, here.Do(context.Background(), request("k", ""), paid), idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
		if used.total() != before {
			t.Error("a copy took a connection while the handler had its own")
		}
		if b.count(t, "SELECT count(*) FROM (SELECT pg_terminate_backend($1, 5000)) AS ended", int(postgres.RawConn(postgres.Tx(ctx)).PgConn().PID())) != 1 {
			t.Error("the backend was not ended")
		}
		want(t, elsewhere.Do(context.Background(), request("k", ""), paid), idempotency.OutcomeExecuted, "")
		want(t, here.Do(context.Background(), request("k", ""), paid), idempotency.OutcomeReplayed, "")
		return signed(ctx, 201), nil
	})
	want(t, result, idempotency.OutcomeReplayed, "")
	if n := b.effects(t); n != 1 {
		t.Errorf("%d effects, want 1", n)
	}
}
