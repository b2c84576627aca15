package idempotency

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

// CompleterOptions tune a [Completer]. Nil and the zero value are the defaults.
type CompleterOptions struct {
	// Interval is the mean pause between two looks for open requests that are due. Each pause is
	// random, from half to one and a half of it, so that replicas don't look in step. Defaults to 1
	// second.
	Interval time.Duration

	// AtOnce is the maximum number of requests that the completer runs at the same time. Each holds a
	// connection for its last transaction. Defaults to 8.
	AtOnce int

	// OnResume is called after each request that the completer ran, by the goroutine that ran it. Nil
	// logs the requests that did not end, with a hash of the key.
	OnResume func(key Key, result Result)

	// Logger gets the completer's log. Defaults to slog.Default().
	Logger *slog.Logger
}

// Completer ends open requests while it runs: those that nobody retries, and those of a process
// that died. Every replica of a service should run one: only one of them at a time runs a request.
// It runs only the requests of handlers that this process has.
type Completer struct {
	engine  *Engine
	options CompleterOptions
}

// NewCompleter returns a completer, which does nothing until [Completer.Run]. It panics if the
// engine's store can't keep requests open.
func NewCompleter(engine *Engine, opts *CompleterOptions) *Completer {
	var o CompleterOptions
	if opts != nil {
		o = *opts
	}
	o.Interval, o.AtOnce = cmp.Or(o.Interval, time.Second), cmp.Or(o.AtOnce, 8)
	if o.Interval < 0 || o.AtOnce < 0 {
		panic("idempotency: CompleterOptions.Interval and AtOnce must be positive")
	}
	if _, ok := engine.store.(Keeper); !ok {
		panic("idempotency: a completer needs a store that keeps requests open, such as postgres.Store")
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.OnResume == nil {
		o.OnResume = func(key Key, result Result) {
			if result.Answer == nil && result.Outcome != OutcomeInProgress && !errors.Is(result.Err, ErrNotOpen) { // otherwise another owner has it, or ended it
				o.Logger.Warn("idempotency: open request did not end", "key", key, "reason", string(result.Reason), "error", result.Err)
			}
		}
	}
	return &Completer{engine: engine, options: o}
}

// Run completes requests until ctx ends, and returns when those under way have ended. A look that
// fails is logged, and the next one tries again.
func (c *Completer) Run(ctx context.Context) {
	for ctx.Err() == nil {
		_, moved, err := c.look(ctx)
		if err != nil && ctx.Err() == nil {
			c.options.Logger.Warn("idempotency: open requests were not completed; the next look tries again", "error", err)
		}
		if moved == c.options.AtOnce {
			continue // there may be more
		}
		_ = sleep(ctx, c.options.Interval/2+rand.N(c.options.Interval))
	}
}

// Once looks for requests that are due, runs at most AtOnce of them, and returns their number when
// they have ended.
func (c *Completer) Once(ctx context.Context) (found int, err error) {
	found, _, err = c.look(ctx)
	return found, err
}

// look does what Once does. moved is the number of its requests that are not due any more. Another
// look without a pause would find the others again.
func (c *Completer) look(ctx context.Context) (found, moved int, err error) {
	names := c.engine.served()
	if len(names) == 0 {
		return 0, 0, nil
	}
	keys, err := c.engine.store.(Keeper).FindDue(ctx, names, c.options.AtOnce)
	if err != nil {
		return 0, 0, fmt.Errorf("find open requests: %w", err)
	}
	var running sync.WaitGroup
	var ended atomic.Int64
	for _, key := range keys {
		running.Go(func() {
			result := c.engine.Resume(ctx, key)
			if result.Answer != nil || result.Accepted && result.RetryAfter > 0 { // else an owner in its last transaction keeps it
				ended.Add(1)
			}
			c.options.OnResume(key, result)
		})
	}
	running.Wait()
	return len(keys), int(ended.Load()), nil
}
