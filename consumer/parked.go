package consumer

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/paidonce/idempotency"
)

// parkedAtOnce is the maximum number of parked messages of one look.
const parkedAtOnce = 64

// retry handles parked messages that are due until ctx ends.
func (c *Consumer) retry(ctx context.Context) {
	for ctx.Err() == nil {
		ids, err := c.store.Due(ctx, c.name, parkedAtOnce)
		if err != nil && ctx.Err() == nil {
			c.options.Logger.Warn("idempotency: a consumer's parked messages were not read; the next look tries again", "consumer", c.name, "error", err)
		}
		handled := 0
		for _, id := range ids {
			if ctx.Err() == nil && c.retryOne(ctx, id) {
				handled++
			}
		}
		if handled > 0 {
			continue // those behind them are due now
		}
		select {
		case <-ctx.Done():
		case <-time.After(c.options.ParkedInterval/2 + rand.N(c.options.ParkedInterval)):
		}
	}
}

// retryOne tries a parked message once, and reports whether it is parked no more.
func (c *Consumer) retryOne(ctx context.Context, id string) (handled bool) {
	select {
	case c.slots <- struct{}{}:
	case <-ctx.Done():
		return false
	}
	defer func() { <-c.slots }()
	ctx, cancel := context.WithTimeout(ctx, c.options.BatchTimeout)
	defer cancel()
	started, attempt := time.Now(), idempotency.NewAttemptID()
	batch, d, park, err := c.store.BeginParked(ctx, c.name, id, attempt)
	if err != nil || d == nil {
		return false // another process has it, or it is gone, or the store is away: the next look tells
	}
	end := BatchEnd{Consumer: c.name, Partition: Partition{Source: d.Topic}}
	defer func() {
		end.Duration = time.Since(started)
		c.options.OnBatch(end)
	}()
	finish := End{TTL: c.options.Retention}
	failure := error(nil)
	switch batch.Known(0) {
	case Recorded:
		end.Duplicates++
	case Mismatch:
		failure = Reject(errors.New("its id was recorded with another topic or body"))
	default:
		if c.batch != nil {
			failure = c.handleTogether(ctx, batch, []*Delivery{d}, attempt)
		} else {
			failure = c.handle(ctx, batch, d, attempt)
		}
		if failure == nil {
			finish.Recorded = []int{0}
		}
	}
	sealed := batch.Seal()
	if failure == nil && sealed == nil {
		if err := commit(ctx, batch, &finish); err != nil {
			end.Err = err
			return false // it is still parked, or gone: the next look tells
		}
		end.Executed = len(finish.Recorded)
		return true
	}
	_ = rollback(ctx, batch)
	end.Err = errors.Join(failure, sealed)
	var later *laterError
	switch {
	case sealed != nil && !errors.Is(sealed, idempotency.ErrAborted), ctx.Err() != nil:
		return false // an outage counts for no message
	case errors.Is(failure, ErrRejected):
		park.State, park.Attempts = Dead, park.Attempts+1
	case errors.As(failure, &later):
		park.State, park.NotBefore = Waiting, later.wait
	default:
		park.Attempts++
		park.State, park.NotBefore = Waiting, c.backoff(park.Attempts)
		if park.Attempts >= c.options.AttemptsMax {
			park.State = Dead
		}
	}
	park.Error = reason(end.Err)
	ctx, finished := context.WithTimeout(context.WithoutCancel(ctx), endTimeout)
	defer finished()
	if err := c.store.Repark(ctx, c.name, &park, c.deadLetter(&park)...); err != nil {
		end.Err = err
		return false
	}
	if park.State == Dead {
		end.Dead++
		c.options.Logger.Warn("idempotency: a parked message is dead", "consumer", c.name, "topic", d.Topic, "offset", d.Offset, "attempts", park.Attempts)
	}
	return false
}
