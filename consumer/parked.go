package consumer

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/message"
)

// parkedAtOnce is the maximum number of parked messages that one look reads.
const parkedAtOnce = 64

// unsettledTry is a try that was counted, and has to be taken back: the store was away when its end
// should have been written.
type unsettledTry struct {
	tried int
	park  Park
}

// retry handles due parked messages until ctx ends.
func (c *Consumer) retry(ctx context.Context) {
	for ctx.Err() == nil {
		tries := c.unsettled
		c.unsettled = nil
		for _, try := range tries {
			c.repark(ctx, try.tried, &try.park)
		}
		ids, err := c.store.Due(ctx, c.name, c.options.Order != Unordered, parkedAtOnce)
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
			continue // the messages behind them are due now
		}
		select {
		case <-ctx.Done():
		case <-time.After(c.options.ParkedInterval/2 + rand.N(c.options.ParkedInterval)):
		}
	}
}

// retryOne tries a parked message once, and reports whether it was handled and is not parked any
// more.
func (c *Consumer) retryOne(ctx context.Context, id string) (handled bool) {
	select {
	case c.slots <- struct{}{}:
	case <-ctx.Done():
		return false
	}
	defer func() { <-c.slots }()
	stopped := ctx
	ctx, cancel := context.WithTimeout(ctx, c.options.BatchTimeout)
	defer cancel()
	started, attempt := time.Now(), idempotency.NewAttemptID()
	batch, park, err := c.store.BeginParked(ctx, &ParkedClaim{
		Consumer: c.name, ID: id, Attempt: attempt, Ordered: c.options.Order != Unordered, Lease: c.options.BatchTimeout,
	})
	d := park.Delivery
	if d == nil {
		return false // it is gone, or the store is away: the next look finds out
	}
	tried := park.Attempts
	if err != nil { // another process has it, or the store is away
		c.takeBack(ctx, &park, 0)
		return false
	}
	end := BatchEnd{Consumer: c.name, Partition: Partition{Source: d.Topic}}
	defer func() {
		end.Duration = time.Since(started)
		c.options.OnBatch(end)
	}()
	finish := End{TTL: c.options.Retention}
	failure, duplicates := error(nil), 0
	switch known := batch.Known(0); {
	case known == Recorded:
		duplicates++
	case known == Mismatch:
		failure = Reject(errors.New("its id was recorded with another topic or body"))
	case park.Attempts > c.options.AttemptsMax:
		park.Attempts--
		failure = Reject(fmt.Errorf("its process ended in the last of %d tries", park.Attempts))
	case c.batch != nil:
		failure = c.handleTogether(ctx, batch, []*Delivery{d}, attempt)
	default:
		failure = c.handle(ctx, batch, d, attempt)
	}
	if failure == nil && duplicates == 0 {
		finish.Recorded = []int{0}
	}
	sealed := batch.Seal()
	if failure == nil && sealed == nil {
		err := commit(ctx, batch, &finish)
		if err == nil {
			end.Executed, end.Duplicates = len(finish.Recorded), duplicates
			return true
		}
		failure = err // of a deferred constraint, say
	} else {
		_ = rollback(ctx, batch)
	}
	end.Err = errors.Join(failure, sealed)
	var later *laterError
	switch {
	case ctx.Err() != nil && stopped.Err() == nil: // the handler, or the database, was too slow
		c.options.Logger.Warn("idempotency: a parked message took longer than BatchTimeout; the try does not count", "consumer", c.name, "topic", d.Topic, "offset", d.Offset)
		c.takeBack(ctx, &park, c.backoff(park.Attempts)) // others have their turn
		return false
	case !countsAsTry(failure, sealed), ctx.Err() != nil: // an outage counts for no message
		c.takeBack(ctx, &park, 0)
		return false
	case errors.Is(failure, ErrRejected):
		park.State = Dead
	case errors.As(failure, &later):
		park.State, park.NotBefore, park.Attempts = Waiting, later.wait, park.Attempts-1
	default:
		park.State, park.NotBefore = Waiting, c.backoff(park.Attempts)
		if park.Attempts >= c.options.AttemptsMax {
			park.State = Dead
		}
	}
	park.Error = reason(end.Err)
	if !c.repark(ctx, tried, &park, c.deadLetter(&park)...) {
		return false
	}
	if park.State == Dead {
		end.Dead++
		c.options.Logger.Warn("idempotency: a parked message is dead", "consumer", c.name, "topic", d.Topic, "offset", d.Offset, "attempts", park.Attempts)
	}
	return false
}

// countsAsTry reports whether a try that failed counts for the message. The first error is that of
// the handler or of COMMIT, the second one that of the transaction.
func countsAsTry(failure, sealed error) bool {
	if sealed != nil && !errors.Is(sealed, idempotency.ErrAborted) {
		return false
	}
	for _, outage := range []error{idempotency.ErrUnavailable, idempotency.ErrNotSerializable, idempotency.ErrUnknown, idempotency.ErrTransactionLost, idempotency.ErrKeyRecorded, ErrFenced} {
		if errors.Is(failure, outage) {
			return false
		}
	}
	return true
}

// takeBack undoes the count of a try that does not count for the message. The message is due again
// after this time.
func (c *Consumer) takeBack(ctx context.Context, park *Park, wait time.Duration) {
	tried := park.Attempts
	park.State, park.Attempts, park.NotBefore = Waiting, tried-1, wait
	c.repark(ctx, tried, park)
}

// repark writes the state of a parked message, and reports whether it did. If the store is away,
// the try is taken back later: the message is then due again, whatever its state should have been.
func (c *Consumer) repark(ctx context.Context, tried int, park *Park, publish ...message.Message) bool {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTimeout)
	defer cancel()
	err := c.store.Repark(ctx, c.name, tried, park, publish...)
	if err != nil && len(c.unsettled) < parkedAtOnce {
		taken := *park
		taken.State, taken.Attempts, taken.NotBefore = Waiting, tried-1, 0
		c.unsettled = append(c.unsettled, unsettledTry{tried: tried, park: taken})
	}
	return err == nil
}
