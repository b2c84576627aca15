package postgres_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/multitracer"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
)

// Duplicates that arrive while their request runs take no connection, on a route that does not wait
// either. Once the first is answered each copy is a replay.
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
