package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres/internal/sealed"
)

// PhaseOutputBytesMax is the maximum size of a phase's output as JSON.
const PhaseOutputBytesMax = 64 << 10

// Phase runs fn in a transaction that commits before the handler goes on, for writes before a call
// to another service or between two of them (package effect): a hold on an account, for example.
// One commit has the writes, fn's output and, if nothing of the request was committed before, the
// claim of its key. When Phase returns it holds no connection.
//
// If an earlier run of the handler has committed the phase of this name, Phase returns the recorded
// output, and fn does not run. So the name stands for this step of the handler: it is 1 to 100
// visible ASCII characters, does not begin with "undo/", and differs from the names of the
// handler's other phases and effects. The output is recorded as JSON of at most 64 KiB
// ([PhaseOutputBytesMax]). It must survive encoding/json, because Phase returns the decoded value.
//
// If fn returns effect.Declined, its writes are undone, and that decision is recorded: this run and
// every later one get an [idempotency.DeclinedError] with the detail that was given to Declined.
// After any other error, or a panic, the writes are undone and nothing is recorded. Phase returns
// the error. Then, if nothing of the request was committed before, the handler may answer; if the
// request is open, the handler's answer is dropped, and a later run begins the phase again. If the
// transaction can't begin or commit, the answer is dropped too; after a serialization failure the
// handler runs again.
//
// The handler may answer a 4xx after a committed phase; the phase's writes stay. Each run must call
// the recorded phases; if one does not, the request is left to a person.
//
// fn must write only through tx, which is a pgx.Tx like that of [Tx], and fails once fn has
// returned. Inside fn, [Tx] returns the same transaction, and the statements of [DeferExec] travel
// with the phase's COMMIT. A call or a phase inside fn, or at the same time, gets
// [idempotency.ErrEffectBusy], and nothing of the run is committed.
//
// Phase panics with an [idempotency.UsageError] before it writes anything: outside an idempotent
// handler, on a route that is not resumable, for a request without a key, if the handler has used
// Tx or DeferExec before, outside of a phase, and if a run uses one name twice.
func Phase[T any](ctx context.Context, name string, fn func(tx pgx.Tx) (T, error)) (out T, err error) {
	effects, err := idempotency.EffectsFrom(ctx)
	if err != nil {
		panic(err)
	}
	a, ok := ctx.Value(txKey{}).(*openAttempt)
	if !ok {
		panic(idempotency.UsageError("idempotency/postgres: Phase in a handler of another store: mount the middleware with this store on the route, and pass the request's context on"))
	}
	effect, _, _, err := effects.Begin(idempotency.Intent{Name: name, Kind: idempotency.EffectPhase})
	switch usage := idempotency.UsageError(""); {
	case errors.As(err, &usage):
		panic(usage)
	case err != nil:
		return out, fmt.Errorf("phase %s: %w", name, err)
	case effect.Kind != idempotency.EffectPhase:
		effects.Lapse(idempotency.Lapse{Parked: "phase " + name + ": a call is recorded under this name"})
		return out, fmt.Errorf("phase %s: %w: a call is recorded under this name", name, idempotency.ErrUnsettled)
	case effect.State != idempotency.EffectIntended:
		return recordedPhase[T](effects, effect)
	}

	committed := false
	defer func() { // even after a panic or a Goexit of fn
		if !committed {
			if err := a.undoInner(); err != nil {
				_ = effects.Fail(err)
			}
			effects.Undone(name)
		}
	}()
	tx, err := a.beginInner()
	if usage := idempotency.UsageError(""); errors.As(err, &usage) {
		panic(usage)
	}
	if err != nil {
		return out, fmt.Errorf("phase %s: %w", name, err)
	}
	made, failed := fn(tx)
	unfit, dead := a.sealInner()
	var declined *idempotency.DeclinedError
	switch {
	case dead: // whatever fn returned
		return out, fmt.Errorf("phase %s: %w", name, errors.Join(unfit, failed))
	case errors.Is(failed, idempotency.ErrDeclined):
		effect.State = idempotency.EffectDeclined
		if errors.As(failed, &declined) && len(declined.Detail) <= PhaseOutputBytesMax {
			effect.Output = declined.Detail
		}
	case failed != nil:
		return out, failed
	case unfit != nil:
		return out, fmt.Errorf("phase %s: %w", name, unfit)
	default:
		effect.State = idempotency.EffectDone
		if effect.Output, err = encodePhase(made); err != nil {
			return out, fmt.Errorf("phase %s: %w", name, err)
		}
	}
	if err := effects.Settle(effect); err != nil {
		return out, fmt.Errorf("phase %s: %w", name, err)
	}
	committed = true
	return recordedPhase[T](effects, effect)
}

// encodePhase returns the output of a phase as it is recorded. It checks that the output can be
// decoded again.
func encodePhase[T any](out T) ([]byte, error) {
	output, err := json.Marshal(out)
	switch {
	case err != nil:
		return nil, fmt.Errorf("encode the output: %w", err)
	case len(output) > PhaseOutputBytesMax:
		return nil, fmt.Errorf("its output has %d bytes, over the limit of %d", len(output), PhaseOutputBytesMax)
	}
	if err := json.Unmarshal(output, new(T)); err != nil {
		return nil, fmt.Errorf("decode the output again: %w", err)
	}
	return output, nil
}

// recordedPhase returns the recorded result of a phase.
func recordedPhase[T any](effects *idempotency.Effects, effect *idempotency.Effect) (out T, err error) {
	if effect.State == idempotency.EffectDeclined {
		return out, &idempotency.DeclinedError{Effect: effect.Name, Detail: effect.Output}
	}
	if err := json.Unmarshal(effect.Output, &out); err != nil {
		// Another version of the program may understand it.
		effects.Lapse(idempotency.Lapse{Reason: "phase " + effect.Name + ": its recorded output does not fit the program"})
		return out, fmt.Errorf("phase %s: %w: its recorded output does not fit the program: %w", effect.Name, idempotency.ErrUnsettled, err)
	}
	return out, nil
}

// beginInner readies the handler's transaction for a phase, and opens it if there is none.
func (a *openAttempt) beginInner() (*sealed.Tx, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.used:
		return nil, errUsed
	case a.failed == nil && a.shut:
		return nil, errors.New("idempotency/postgres: the handler has returned")
	case a.failed == nil && a.phase == nil:
		a.failed = a.beginPhase(a.outer)
	}
	if a.failed != nil {
		return nil, a.failed
	}
	a.inner = true
	return &a.phase.handle, nil
}

// sealInner takes the transaction away from a phase. It returns an error if the transaction can't
// be committed, and reports whether the whole run has failed with it.
func (a *openAttempt) sealInner() (unfit error, dead bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.over || a.phase == nil {
		return errors.New("idempotency/postgres: the handler has returned"), true
	}
	unfit = a.phase.Seal()
	for _, fatal := range []error{idempotency.ErrNotSerializable, idempotency.ErrUnavailable, idempotency.ErrTransactionLost} {
		if errors.Is(unfit, fatal) {
			a.failed = unfit
		}
	}
	return unfit, a.failed != nil
}

// innerRollbackTimeout bounds the ROLLBACK of a phase.
const innerRollbackTimeout = 2 * time.Second

// undoInner undoes the transaction of a phase. It returns an error if the whole run has failed.
// Once the handler has returned, the end of the attempt undoes the transaction instead.
func (a *openAttempt) undoInner() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.over || !a.inner {
		return a.failed
	}
	phase := a.phase
	a.inner, a.phase = false, nil
	ctx, cancel := context.WithTimeout(context.WithoutCancel(a.outer), innerRollbackTimeout)
	defer cancel()
	if err := a.rollback(ctx, phase); err != nil && a.failed == nil {
		a.failed = err
	}
	return a.failed
}
