package chaos

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/check"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/storm"
	"github.com/paidonce/idempotency/internal/deadline"
)

// settleMax is the time after the last fault within which every key must have its answer.
const settleMax = 60 * time.Second

// errUnsettled means that keys have no answer yet, so that their answers cannot be compared.
var errUnsettled = errors.New("keys did not settle")

// settle heals all faults and waits for the clients, which continue until each key has its answer
// or was given up.
func (r *run) settle(ctx context.Context) error {
	r.healed.Store(true)
	r.cluster.heal()
	if err := r.banks.heal(ctx); err != nil {
		return err
	}
	if r.profile.effects {
		r.working.Go(func() { r.awaitNothingOpen(ctx) })
	}
	done := make(chan struct{})
	go func() {
		r.working.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(settleMax):
	}
	for _, k := range r.keys.all() {
		if k.open() && !k.waiting() && k.triesMax == 0 {
			r.findings.add("key %s has no answer %v after the last fault", k.text, settleMax)
		}
	}
	r.findings.add("clients still wait for answers %v after the last fault", settleMax)
	return errUnsettled
}

// replay sends once more the request of every key that was not given up. The answer must be the
// recorded one.
func (r *run) replay(ctx context.Context) error {
	keys := slices.DeleteFunc(slices.Clone(r.keys.all()), (*key).abandoned)
	err := storm.Each(ctx, r.clients, keys, func(ctx context.Context, c *client, k *key) error { return c.lanes[0].replay(ctx, k) })
	for _, c := range r.clients {
		c.close()
	}
	return err
}

// replay sends the request until there is an answer. There are no faults any more, so the first try
// should succeed.
func (l *lane) replay(ctx context.Context, k *key) error {
	until := time.Now().Add(settleMax)
	for {
		l.run.tally.replays.Add(1)
		switch what := l.send(ctx, k, false, true, storm.NoTrouble); {
		case what == resultAnswered, what == resultParked && l.run.profile.effects:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case what == resultMismatch || time.Now().After(until):
			l.run.findings.add("key %s has no answer in the final replay", k.text)
			return nil
		}
		if err := deadline.Sleep(ctx, storm.BackoffFirst); err != nil {
			return err
		}
	}
}

// history returns the operations and expectations of all clients. It still contains replays of
// planted records: see withoutPlanted.
func (r *run) history() (ops []check.Operation, expected []check.Expectation) {
	for _, c := range r.clients {
		for _, l := range c.lanes {
			ops = append(ops, l.ops...)
			l.ops = nil
		}
	}
	for _, l := range r.directed.lanes {
		ops = append(ops, l.ops...)
	}
	keys := r.keys.all()
	for _, k := range keys {
		expected = append(expected, check.Expectation{
			Scope: tenants[k.tenant].scope, Key: k.text, GivenUp: k.abandoned(), Declined: k.asks == askDeclined || k.refused, Parked: k.waiting(),
		})
	}
	return ops, expected
}
