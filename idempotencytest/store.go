package idempotencytest

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/crashpoint"
)

// abandonMax bounds the ROLLBACK of an attempt after the simulated death of its process.
const abandonMax = 5 * time.Second

var (
	errLost        = fmt.Errorf("%w: idempotencytest lost it", idempotency.ErrUnknown)
	errUnavailable = fmt.Errorf("begin: %w: idempotencytest", idempotency.ErrUnavailable)
)

// store wraps the user's store, and adds the crash points.
type store struct {
	inner idempotency.Store
	keys  sync.Map     // by value: *key
	open  atomic.Int64 // attempts that began and have not ended
	stray atomic.Int64 // calls with a context that is not a request's
}

var (
	_ idempotency.Store         = (*store)(nil)
	_ idempotency.BudgetChecker = (*store)(nil)
)

// CheckBudget implements [idempotency.BudgetChecker] if the user's store does.
func (s *store) CheckBudget(handlerTimeout, commitTimeout time.Duration) error {
	if checker, ok := s.inner.(idempotency.BudgetChecker); ok {
		return checker.CheckBudget(handlerTimeout, commitTimeout)
	}
	return nil
}

// keyOf returns the key that a request's claim names, or nil if nothing is planned for it.
func (s *store) keyOf(ctx context.Context, claim *idempotency.Claim) (*key, *exchange) {
	x, ok := ctx.Value(exchangeKey{}).(*exchange)
	if !ok {
		s.stray.Add(1)
		return nil, nil
	}
	k, _ := s.keys.Load(claim.Key.Value)
	if k == nil {
		return nil, nil
	}
	return k.(*key), x
}

// Begin implements [idempotency.Store].
func (s *store) Begin(ctx context.Context, claim *idempotency.Claim) (idempotency.Attempt, *idempotency.Record, error) {
	k, x := s.keyOf(ctx, claim)
	if k == nil {
		return s.inner.Begin(ctx, claim)
	}
	k.seen(claim)
	if k.take(crashpoint.BeforeBegin) {
		return nil, nil, errUnavailable
	}
	inner, record, err := s.inner.Begin(ctx, claim)
	if inner == nil {
		return inner, record, err
	}
	s.open.Add(1)
	a := &attempt{store: s, inner: inner, key: k, exchange: x}
	if k.take(crashpoint.AfterBegin) {
		a.abandon(ctx)
		x.die()
	}
	return a, record, err
}

// Resolve implements [idempotency.Store].
func (s *store) Resolve(ctx context.Context, claim *idempotency.Claim) (*idempotency.Record, error) {
	if x, ok := ctx.Value(exchangeKey{}).(*exchange); ok {
		switch {
		case x.resolving.Load():
			x.die()
		case x.unresolvable.CompareAndSwap(true, false):
			return nil, errLost
		}
	}
	return s.inner.Resolve(ctx, claim)
}

// attempt is an attempt of the user's store. One goroutine uses it, as the contract says, except
// that others may use the handler's context.
type attempt struct {
	store    *store
	inner    idempotency.Attempt
	key      *key
	exchange *exchange
	handler  *tripwire // the handler's context; nil until Context is called
	dies     bool      // the process dies when the handler's context has ended
	sealed   bool
	ended    bool
	open     *openAttempt // itself, if it can become open
}

// Context implements [idempotency.Attempt].
func (a *attempt) Context(ctx context.Context) context.Context {
	planned := a.key.head()
	ctx = a.inner.Context(ctx)
	a.sealed = false // an open attempt runs its handler again after a serialization failure
	a.dies = planned.point == crashpoint.MidHandler
	a.handler = a.key.tripwire(ctx, crashpoint.MidHandler, crashpoint.HandlerCanceled)
	return a.handler
}

// Lost implements [idempotency.Attempt].
func (a *attempt) Lost() bool { return a.inner.Lost() }

// Seal implements [idempotency.Attempt].
func (a *attempt) Seal() error {
	if a.ended { // the engine unwinds after a death
		return nil
	}
	err := a.inner.Seal()
	a.sealed = true
	died := false
	if a.handler != nil {
		died = a.handler.disarm() && a.dies
		a.key.handlerUses.Store(a.handler.uses.Load())
	}
	if died || a.key.take(crashpoint.AfterHandler) {
		a.abandon(context.Background())
		a.exchange.die()
	}
	return err
}

// Rollback implements [idempotency.Attempt].
func (a *attempt) Rollback(ctx context.Context) error {
	if a.ended {
		return nil
	}
	defer a.over()
	return a.inner.Rollback(ctx)
}

// Commit implements [idempotency.Attempt].
func (a *attempt) Commit(ctx context.Context, answer *idempotency.Answer) error {
	return a.finish(ctx, answer, a.inner.Commit, commitEnd)
}

// Decline implements [idempotency.Attempt].
func (a *attempt) Decline(ctx context.Context, answer *idempotency.Answer) error {
	return a.finish(ctx, answer, a.inner.Decline, declineEnd)
}

func (a *attempt) finish(ctx context.Context, answer *idempotency.Answer, inner func(context.Context, *idempotency.Answer) error, at end) error {
	switch {
	case a.key.take(at.before):
		a.abandon(ctx)
		a.exchange.die()
	case a.key.take(at.neverArrived):
		a.abandon(ctx)
		return errLost
	case a.key.odd && a.key.take(at.unresolvable):
		a.abandon(ctx)
		a.exchange.unresolvable.Store(true)
		return errLost
	}
	dies := a.key.head().point == at.mid
	wire := a.key.tripwire(ctx, at.mid, at.canceled)
	err := inner(wire, answer)
	if a.open == nil || !a.open.opened || !errors.Is(err, idempotency.ErrNotSerializable) { // else the engine runs it again
		a.over()
	}
	tripped := wire.disarm()
	wire.cancel()
	a.key.endUses.Store(wire.uses.Load())
	if err == nil {
		a.key.committed.Add(1)
	}
	switch {
	case tripped && dies:
		if err != nil && a.open != nil {
			a.abandon(ctx) // its lease runs out
		}
		a.exchange.die()
	case err != nil:
		return err
	case a.key.take(at.lost):
		return errLost
	case a.key.take(at.resolving):
		a.exchange.resolving.Store(true)
		return errLost
	case a.key.take(at.unresolvable):
		a.exchange.unresolvable.Store(true)
		return errLost
	case a.key.take(at.after):
		a.exchange.die()
	case a.key.take(at.half):
		a.exchange.half.Store(true)
	}
	return nil
}

// abandon ends the attempt as the death of its process would: nothing of it remains.
func (a *attempt) abandon(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), abandonMax)
	defer cancel()
	if !a.sealed {
		_ = a.inner.Seal() // no caller is left to get this error, or the next
	}
	if a.open != nil {
		_ = a.open.undo(ctx)
	} else {
		_ = a.inner.Rollback(ctx)
	}
	a.over()
}

func (a *attempt) over() {
	if a.ended {
		return
	}
	a.ended = true
	a.store.open.Add(-1)
	if a.handler != nil {
		a.handler.cancel()
	}
}

// exchange is one request on its way through the server.
type exchange struct {
	dead         atomic.Bool // the process died for it
	half         atomic.Bool // half of the answer is sent
	resolving    atomic.Bool // it dies when it looks for its COMMIT
	unresolvable atomic.Bool // it can't look for its COMMIT
}

type exchangeKey struct{}

// die ends the request's goroutine; the process itself lives on.
func (x *exchange) die() {
	x.dead.Store(true)
	panic(http.ErrAbortHandler)
}

// aborted reports whether a panic only requests that the conn be cut.
func aborted(value any) bool {
	err, ok := value.(error)
	return ok && errors.Is(err, http.ErrAbortHandler)
}
