package postgres_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/storage/encrypted"
	"github.com/paidonce/idempotency/storage/postgres"
)

const (
	stormKeys           = 12
	stormCallers        = 10
	stormRequests       = 250 // of all callers
	stormTerminateEvery = 15  // requests
	stormSettleMax      = 10 * time.Second
	stormsAtOnce        = 4
	stormAcquireTimeout = 5 * time.Second
	stormWait           = 2 * time.Second
	stormWaiters        = 300
)

// Each combination of Wait, encryption, Reduce and pooling, at each isolation level. Duplicates run
// in two engines, as in two processes. Backends are terminated, and handlers panic, decline, fail,
// swallow errors, leave a goroutine, a savepoint or rows behind.
func TestNoCombinationOfOptionsPaysTwiceUnderAStorm(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "runs 48 storms")
	slots := make(chan struct{}, stormsAtOnce)
	for _, level := range []pgx.TxIsoLevel{pgx.ReadCommitted, pgx.RepeatableRead, pgx.Serializable} {
		for mask := range 16 {
			c := stormCase{level: level, waits: mask&1 != 0, encrypts: mask&2 != 0, reduces: mask&4 != 0, pools: mask&8 != 0}
			t.Run(c.String(), func(t *testing.T) {
				t.Parallel()
				slots <- struct{}{}
				defer func() { <-slots }()
				c.run(t)
			})
		}
	}
}

type stormCase struct {
	level                           pgx.TxIsoLevel
	waits, encrypts, reduces, pools bool
}

func (c stormCase) String() string {
	return fmt.Sprintf("%s wait=%t encrypted=%t reduce=%t pooling=%t", c.level, c.waits, c.encrypts, c.reduces, c.pools)
}

// stormReply is an answer that a caller got.
type stormReply struct {
	outcome idempotency.Outcome
	status  int
	body    string
}

type stormRun struct {
	stormCase
	*testBundle
	engines  [2]*idempotency.Engine
	left     atomic.Int64 // requests
	handlers sync.WaitGroup

	mu      sync.Mutex
	draws   *mrand.Rand
	replies [stormKeys][]stormReply
}

func (c stormCase) run(t *testing.T) {
	seed := mrand.Uint64()
	t.Logf("seed %d", seed)
	s := &stormRun{stormCase: c, draws: mrand.New(mrand.NewPCG(seed, 0))}
	s.testBundle = setup(t, &setupOptions{
		store: &postgres.Options{Isolation: c.level, AcquireTimeout: stormAcquireTimeout, TransactionPooling: c.pools},
		before: func(config *pgxpool.Config) {
			if c.pools {
				config.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeExec
			}
		},
	})
	if _, err := s.pool.Exec(t.Context(), "ALTER TABLE effects ADD key int"); err != nil {
		t.Fatal(err)
	}
	var store idempotency.Store = s.store
	if c.encrypts {
		var secret [32]byte
		_, _ = rand.Read(secret[:]) // it never fails
		store = encrypted.New(store, encrypted.Keys{Current: encrypted.Key{ID: 1, Secret: secret}})
	}
	options := &idempotency.Options{}
	if c.waits {
		options.Wait = stormWait
	}
	if c.reduces {
		options.Reduce = func(a idempotency.Answer) idempotency.Answer {
			return idempotency.Answer{Status: a.Status, Body: []byte("reduced")}
		}
	}
	for i := range s.engines {
		s.engines[i] = idempotency.NewEngine(store, options)
	}

	s.left.Store(stormRequests)
	var callers sync.WaitGroup
	var terminated atomic.Int64
	terminate := make(chan struct{}, stormRequests)
	callers.Go(func() { terminated.Store(s.terminateBackends(t, terminate)) })
	var requests sync.WaitGroup
	for range stormCallers {
		requests.Go(func() {
			for left := s.left.Add(-1); left >= 0; left = s.left.Add(-1) {
				if left%stormTerminateEvery == 0 {
					terminate <- struct{}{}
				}
				s.request(s.draw(stormKeys))
			}
		})
	}
	requests.Wait()
	close(terminate)
	callers.Wait()
	s.handlers.Wait()
	if terminated.Load() == 0 {
		t.Error("no backend was terminated")
	}
	s.judge(t)
}

func (s *stormRun) draw(n int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.draws.IntN(n)
}

// terminateBackends ends one connection of the pool per signal, and returns how many it ended.
func (s *stormRun) terminateBackends(t *testing.T, asked <-chan struct{}) (terminated int64) {
	conn, err := pgx.ConnectConfig(t.Context(), s.pool.Config().ConnConfig.Copy())
	if err != nil {
		t.Error(err)
		return 0
	}
	defer conn.Close(context.WithoutCancel(t.Context()))
	for range asked {
		const one = `SELECT count(pg_terminate_backend(pid)) FROM (SELECT pid FROM pg_stat_activity
			WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend' ORDER BY random() LIMIT 1) AS one`
		var n int64
		if err := conn.QueryRow(t.Context(), one).Scan(&n); err != nil {
			t.Error(err)
			return terminated
		}
		terminated += n
	}
	return terminated
}

func (s *stormRun) request(key int) {
	engine := s.engines[s.draw(len(s.engines))]
	result := engine.Do(context.Background(), request(fmt.Sprint("key-", key), "10"), func(ctx context.Context) (*idempotency.Answer, error) {
		return s.handle(ctx, key)
	})
	if result.Answer == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.replies[key] = append(s.replies[key], stormReply{result.Outcome, result.Answer.Status, string(result.Answer.Body)})
}

func (s *stormRun) handle(ctx context.Context, key int) (*idempotency.Answer, error) {
	tx := postgres.Tx(ctx)
	var id int64
	if err := tx.QueryRow(ctx, "INSERT INTO effects (name, key) VALUES ('transfer', $1) RETURNING id", key).Scan(&id); err != nil {
		if s.draw(2) == 0 {
			return answer(201), nil // as a handler that looks at no error
		}
		return nil, err
	}
	switch s.draw(16) {
	case 0:
		panic("a bug")
	case 1:
		return answer(404), nil
	case 2:
		return answer(500), nil
	case 3:
		return nil, errors.New("failed")
	case 4:
		s.handlers.Go(func() { _, _ = tx.Exec(context.WithoutCancel(ctx), "SELECT pg_sleep(0.01)") })
	case 5:
		_, _ = tx.Begin(ctx)
	case 6:
		_, _ = tx.Query(ctx, "SELECT generate_series(1, 1000)")
	case 7:
		if nested, err := tx.Begin(ctx); err == nil {
			_, _ = nested.Exec(ctx, "SELECT 1/0")
			_ = nested.Rollback(ctx)
		}
	}
	paid := answer(201)
	paid.Body = fmt.Appendf(nil, "effect %d", id)
	return paid, nil
}

// judge compares the callers' answers with the books, and requires that nothing is left behind.
func (s *stormRun) judge(t *testing.T) {
	t.Helper()
	until(t, "all connections are given back, and no request is in flight", func() bool {
		return s.pool.Stat().AcquiredConns() == 0 && s.engines[0].InFlight()+s.engines[1].InFlight() == 0
	})
	s.pool.Reset() // of those that were terminated
	told := map[idempotency.Outcome]int{}
	for key, replies := range s.replies {
		effects := s.count(t, "SELECT count(*) FROM effects WHERE key = $1", key)
		records := s.count(t, "SELECT count(*) FROM idempotency_keys WHERE key = $1 AND status = 201", fmt.Sprint("key-", key))
		if effects > 1 || effects != records {
			t.Errorf("key %d: paid %d times, with %d records", key, effects, records)
		}
		paid, declined, executed := 0, 0, 0
		var bodies []string
		for _, reply := range replies {
			told[reply.outcome]++
			if reply.outcome == idempotency.OutcomeExecuted {
				executed++
			}
			switch {
			case reply.outcome != idempotency.OutcomeExecuted && reply.outcome != idempotency.OutcomeReplayed:
			case reply.status == 404:
				declined++
			case reply.status == 201:
				paid++
				// The executed request gets the full answer, and a replay the reduced one.
				if !s.reduces || reply.outcome == idempotency.OutcomeReplayed {
					bodies = append(bodies, reply.body)
				}
			}
		}
		slices.Sort(bodies)
		if bodies = slices.Compact(bodies); len(bodies) > 1 || executed > 1 || paid > 0 && declined > 0 || paid > 0 && effects != 1 {
			t.Errorf("key %d: told paid %d times and declined %d times, executed %d times, with answers %q; it was paid %d times",
				key, paid, declined, executed, bodies, effects)
		}
	}
	if told[idempotency.OutcomeExecuted] == 0 || told[idempotency.OutcomeReplayed] == 0 {
		t.Errorf("a storm that proves nothing: %v", told)
	}
}

// until waits for something that is not signaled.
func until(t *testing.T, name string, holds func() bool) {
	t.Helper()
	for begin := time.Now(); !holds(); time.Sleep(time.Millisecond) {
		if time.Since(begin) > stormSettleMax {
			t.Fatalf("never: %s", name)
		}
	}
}

// Callers that leave while they wait, even at the moment of their turn, leave nothing behind: no
// goroutine, no place in flight, no connection, and no wait queue without a leader. Every tenth
// stays, and gets the leader's answer or runs itself.
func TestCallersThatLeaveWhileTheyWaitLeaveNothingBehind(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	for name, c := range map[string]struct{ status, effects int }{"the leader pays": {201, 1}, "nobody does": {500, 0}} {
		t.Run(name, func(t *testing.T) {
			cancels := make([]context.CancelFunc, stormWaiters)
			tracer := &leavers{began: make(chan struct{}, stormWaiters), leave: func(caller int) {
				if caller%10 != 0 {
					go cancels[caller]()
				}
			}}
			engine := idempotency.NewEngine(b.store, &idempotency.Options{Wait: patience, InFlightMax: -1, Tracer: tracer})
			var stay, leave sync.WaitGroup
			var executed atomic.Int64
			leads, release := make(chan struct{}), make(chan struct{})
			for i := range cancels { // in the order in which they lead
				var ctx context.Context
				ctx, cancels[i] = context.WithCancel(context.WithValue(t.Context(), leaver{}, i))
				defer cancels[i]()
				group := &leave
				if i%10 == 0 {
					group = &stay
				}
				group.Go(func() {
					result := engine.Do(ctx, request(name[:3], "10"), func(ctx context.Context) (*idempotency.Answer, error) {
						effect(ctx, t)
						if i == 0 {
							close(leads)
							<-release
						}
						return answer(c.status), nil
					})
					if result.Outcome == idempotency.OutcomeExecuted {
						executed.Add(1)
					}
				})
				if i == 0 {
					<-leads
				} else {
					<-tracer.began
				}
			}
			for i := 5; i < len(cancels); i += 10 {
				cancels[i]()
			}
			close(release)
			answered := make(chan struct{})
			go func() { stay.Wait(); close(answered) }()
			select {
			case <-answered:
			case <-time.After(stormSettleMax):
				t.Error("those that stay are not answered")
			}
			for _, cancel := range cancels {
				cancel()
			}
			leave.Wait()
			stay.Wait()
			until(t, "nothing is in flight, and no connection in use", func() bool {
				return engine.InFlight() == 0 && b.pool.Stat().AcquiredConns() == 0
			})
			if n := b.effects(t); n != c.effects || executed.Load() != int64(c.effects) {
				t.Errorf("%d effects, told executed %d times, want %d", n, executed.Load(), c.effects)
			}
			if _, err := b.pool.Exec(t.Context(), "TRUNCATE effects"); err != nil {
				t.Error(err)
			}
		})
	}
}

// leaver is the key of a caller's number in its context.
type leaver struct{}

// leavers makes the next caller leave at the moment of its turn.
type leavers struct {
	began chan struct{} // gets a value for each request that begins to wait
	leave func(caller int)
}

func (*leavers) TraceRequestStart(ctx context.Context, _ idempotency.RequestStart) context.Context {
	return ctx
}
func (*leavers) TraceRequestEnd(context.Context, idempotency.RequestEnd) {}
func (*leavers) TraceRefused(context.Context, idempotency.Refused)       {}
func (l *leavers) TraceWaitStart(context.Context)                        { l.began <- struct{}{} }

func (l *leavers) TraceStep(ctx context.Context, step idempotency.StepEnd) {
	if step.Step == idempotency.StepRollback || step.Step == idempotency.StepCommit {
		if next := ctx.Value(leaver{}).(int) + 1; next < stormWaiters {
			l.leave(next)
		}
	}
}
