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

	"github.com/jackc/pgx/v5/multitracer"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgfault"
)

// Duplicates that arrive while their request runs take no connection, also on a route that does not
// wait. Once the first is answered each copy is a replay.
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
	taken := func() int {
		used.mu.Lock()
		defer used.mu.Unlock()
		return used.taken
	}
	before := taken()
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
	if n := taken() - before; n != 0 {
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
