package idempotencytest

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/crashpoint"
)

const (
	// pauseMax bounds the pause of an open request: the times themselves are not under test.
	pauseMax = 10 * time.Millisecond
	// laterBy is the time that seems to pass for a request that waits until no earlier send can be
	// under way. It is shorter than the lifetime of any key.
	laterBy = 2 * time.Minute
)

// openStore wraps a user's store that keeps requests open, and adds the crash points.
type openStore struct {
	idempotency.Keeper // the user's
	store              *store
}

// Begin implements [idempotency.Store].
func (s *openStore) Begin(ctx context.Context, claim *idempotency.Claim) (idempotency.Attempt, *idempotency.Record, error) {
	return s.store.Begin(ctx, claim)
}

// Resolve implements [idempotency.Store].
func (s *openStore) Resolve(ctx context.Context, claim *idempotency.Claim) (*idempotency.Record, error) {
	return s.store.Resolve(ctx, claim)
}

// CheckBudget implements [idempotency.BudgetChecker] if the user's store does.
func (s *openStore) CheckBudget(handlerTimeout, commitTimeout time.Duration) error {
	return s.store.CheckBudget(handlerTimeout, commitTimeout)
}

var (
	_ idempotency.Keeper        = (*openStore)(nil)
	_ idempotency.BudgetChecker = (*openStore)(nil)
	_ idempotency.OpenAttempt   = (*openAttempt)(nil)
)

// newStore returns the store for the service under test.
func newStore(inner idempotency.Store) (*store, idempotency.Store) {
	s := &store{inner: inner}
	if k, ok := inner.(idempotency.Keeper); ok {
		return s, &openStore{Keeper: k, store: s}
	}
	return s, s
}

// BeginOpen implements [idempotency.Keeper].
func (s *openStore) BeginOpen(ctx context.Context, claim *idempotency.Claim, lazy bool) (idempotency.OpenAttempt, *idempotency.Record, error) {
	k, x := s.store.keyOf(ctx, claim)
	if k == nil {
		return s.Keeper.BeginOpen(ctx, claim, lazy)
	}
	k.seen(claim)
	if k.take(crashpoint.BeforeBegin) {
		return nil, nil, errUnavailable
	}
	inner, record, err := s.Keeper.BeginOpen(ctx, claim, lazy)
	if inner == nil {
		return nil, record, err
	}
	a := s.attempt(k, x, claim, inner, false)
	if k.take(crashpoint.AfterBegin) {
		a.abandon(ctx)
		x.die()
	}
	return a, record, err
}

// TakeOver implements [idempotency.Keeper].
func (s *openStore) TakeOver(ctx context.Context, claim *idempotency.Claim) (idempotency.OpenAttempt, *idempotency.Open, error) {
	inner, open, err := s.Keeper.TakeOver(ctx, claim)
	k, x := s.store.keyOf(ctx, claim)
	switch {
	case inner == nil:
		return nil, open, err
	case k == nil:
		return inner, open, err
	}
	if k.later.Load() {
		open.Now = open.Now.Add(laterBy)
	}
	a := s.attempt(k, x, claim, inner, true)
	if k.take(crashpoint.TakeOver) {
		a.abandon(ctx)
		x.die()
	}
	return a, open, err
}

func (s *openStore) attempt(k *key, x *exchange, claim *idempotency.Claim, inner idempotency.OpenAttempt, opened bool) *openAttempt {
	s.store.open.Add(1)
	a := &openAttempt{keeper: s, claim: *claim, inner: inner, opened: opened}
	a.attempt = attempt{store: s.store, inner: inner, key: k, exchange: x, open: a}
	return a
}

// openAttempt is an attempt that can become open. A death in the handler is not a panic, because
// the handler could recover that. Instead all its calls fail from then on, and its client gets
// nothing.
type openAttempt struct {
	attempt
	keeper           *openStore
	claim            idempotency.Claim
	inner            idempotency.OpenAttempt
	opened           bool
	dead             bool
	intents, results int64 // of this owner
}

// undo does to the attempt what the death of its process would do: the transaction is rolled back,
// and the lease runs out.
func (a *openAttempt) undo(ctx context.Context) error {
	a.dead = true
	if !a.opened {
		return a.inner.Rollback(ctx)
	}
	return a.inner.Leave(ctx, idempotency.Lapse{Reason: "its process died, as idempotencytest planned"})
}

// die ends the attempt during its handler, as the death of its process does.
func (a *openAttempt) die(ctx context.Context) error {
	a.abandon(ctx)
	a.exchange.dead.Store(true)
	return errLost
}

// at reports whether p is the next planned point, and this is the n-th chance for it.
func (a *openAttempt) at(p point, n int64) bool {
	planned := a.key.head()
	return planned.point == p && planned.at == n && a.key.take(p)
}

// Intend implements [idempotency.OpenAttempt].
func (a *openAttempt) Intend(ctx context.Context, effect *idempotency.Effect, lease time.Duration) error {
	if a.dead {
		return errLost
	}
	a.intents++
	raise(&a.key.intents, a.intents)
	switch {
	case a.at(crashpoint.BeforeIntent, a.intents):
		return a.die(ctx)
	case a.at(crashpoint.IntentNeverArrived, a.intents):
		if !a.opened {
			a.abandon(ctx)
		}
		return errLost
	}
	if err := a.inner.Intend(ctx, effect, lease); err != nil {
		return err
	}
	a.opened = true
	a.key.opened.Store(true)
	switch {
	case a.at(crashpoint.IntentLost, a.intents):
		return errLost
	case a.at(crashpoint.BeforeSend, a.intents):
		return a.die(ctx)
	}
	return nil
}

// Settle implements [idempotency.OpenAttempt].
func (a *openAttempt) Settle(ctx context.Context, effect *idempotency.Effect) error {
	if a.dead {
		return errLost
	}
	a.results++
	raise(&a.key.results, a.results)
	switch {
	case a.at(crashpoint.AfterReply, a.results):
		return a.die(ctx)
	case a.at(crashpoint.ResultNeverArrived, a.results):
		return errLost
	case a.at(crashpoint.Replaced, a.results):
		a.replace(ctx)
	}
	if err := a.inner.Settle(ctx, effect); err != nil {
		return err
	}
	switch {
	case a.at(crashpoint.ResultLost, a.results):
		return errLost
	case a.at(crashpoint.AfterResult, a.results):
		return a.die(ctx)
	}
	return nil
}

// Recorded implements [idempotency.OpenAttempt].
func (a *openAttempt) Recorded(ctx context.Context, name string) (*idempotency.Effect, error) {
	if a.dead {
		return nil, errLost
	}
	return a.inner.Recorded(ctx, name)
}

// replace makes another owner take the request over and die. If that fails, the point proves
// nothing but does no harm.
func (a *openAttempt) replace(ctx context.Context) {
	_ = a.inner.Leave(ctx, idempotency.Lapse{Reason: "its lease ran out, as idempotencytest planned"})
	claim := a.claim
	if other, _, err := a.keeper.Keeper.TakeOver(ctx, &claim); err == nil && other != nil {
		_ = other.Leave(ctx, idempotency.Lapse{Reason: "its process died, as idempotencytest planned"})
	}
}

// Leave implements [idempotency.OpenAttempt].
func (a *openAttempt) Leave(ctx context.Context, lapse idempotency.Lapse) error {
	if a.dead {
		return nil
	}
	defer a.over()
	if len(lapse.Doubts) > 0 {
		a.key.later.Store(true)
	}
	lapse.Pause = min(lapse.Pause, pauseMax)
	return a.inner.Leave(ctx, lapse)
}

// raise sets a number that only grows. A key has one attempt at a time, so nobody else changes it.
func raise(n *atomic.Int64, to int64) { n.Store(max(n.Load(), to)) }
