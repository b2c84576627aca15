package idempotency

import (
	"context"
	"time"
)

// Tracer observes everything that happens to requests. Metrics and traces are built on it. Its
// methods are called synchronously in the goroutine of the request, and concurrently for different
// requests: they should be quick. If one panics, the request goes on unchanged, and [Result].Err
// contains the panic as a [PanicError].
//
// The arguments contain keys and scopes, for detectors and samplers. They must not become labels or
// log fields; a [Key] prints as a hash.
type Tracer interface {
	// TraceRequestStart is called when a request enters the engine. The request uses the context
	// that it returns from then on.
	TraceRequestStart(ctx context.Context, data RequestStart) context.Context
	// TraceStep is called after each step of an attempt, and after each wait for another attempt:
	// in the queue behind a request of this process, or between two claims.
	TraceStep(ctx context.Context, data StepEnd)
	// TraceRequestEnd is called when a request is settled, once for each TraceRequestStart.
	TraceRequestEnd(ctx context.Context, data RequestEnd)
	// TraceRefused is called if an adapter refused a request before it called the engine, because
	// of a quota, or because the client may not see the replay.
	TraceRefused(ctx context.Context, data Refused)
}

// WaitTracer is implemented by a [Tracer] that counts the requests that wait now.
type WaitTracer interface {
	// TraceWaitStart is called when a request begins to wait for another attempt. A [StepWait]
	// always follows when the wait ends, before any other step of that request.
	TraceWaitStart(ctx context.Context)
}

// RequestStart describes a request that enters the engine.
type RequestStart struct {
	Key         Key // Value is empty if the request came without a key
	Fingerprint Fingerprint
	TraceID     string
	Route       string // as the adapter calls it; may be empty
}

// Step is a step of a request.
type Step string

// The steps.
const (
	StepClaim    Step = "claim"
	StepHandler  Step = "handler"
	StepCommit   Step = "commit"
	StepDecline  Step = "decline"
	StepRollback Step = "rollback"
	StepResolve  Step = "resolve"
	StepWait     Step = "wait" // a wait for another attempt; ErrInProgress if the client ended it
)

// StepEnd describes a step that has ended.
type StepEnd struct {
	Attempt  AttemptID // for a wait: the attempt before it, zero if there was none
	Step     Step
	Started  time.Time
	Duration time.Duration
	Err      error
}

// RequestEnd describes a request that is settled.
type RequestEnd struct {
	Key      Key
	Route    string
	Attempt  AttemptID // the last attempt; zero if none began
	Attempts int       // the number that began
	Declined bool      // executed, and the answer was recorded without the handler's writes
	Resolved bool      // the reply to COMMIT was lost, and the store was asked for the outcome
	Result   Result
	Started  time.Time
	Duration time.Duration
}

// Refused describes a request that an adapter refused.
type Refused struct {
	Route  string
	Reason Reason
	Status int
	Err    error
}

// trace carries one request's tracer. Without a tracer it does nothing and reads no clock.
type trace struct {
	tracer   Tracer
	ctx      context.Context
	req      *ongoing
	started  time.Time
	attempts int
	last     Step // of the steps that end an attempt
	resolved bool
	panicked error // the tracer's panics
}

func (e *Engine) startTrace(ctx context.Context, req *ongoing) (t trace) {
	t = trace{tracer: e.options.Tracer, ctx: ctx, req: req}
	if t.tracer != nil {
		defer recovered(panicOfTracer, &t.panicked)
		t.started = time.Now()
		t.ctx = t.tracer.TraceRequestStart(ctx, RequestStart{
			Key: req.Key, Fingerprint: req.Fingerprint, TraceID: req.TraceID, Route: req.Route,
		})
	}
	return t
}

const panicOfTracer = "Tracer"

func (t *trace) now() time.Time {
	if t.tracer == nil {
		return time.Time{}
	}
	return time.Now()
}

// wait is now, at the beginning of a wait.
func (t *trace) wait() time.Time {
	if waiter, ok := t.tracer.(WaitTracer); ok {
		t.waitStart(waiter)
	}
	return t.now()
}

func (t *trace) waitStart(waiter WaitTracer) {
	defer recovered(panicOfTracer, &t.panicked)
	waiter.TraceWaitStart(t.ctx)
}

func (t *trace) step(step Step, started time.Time, err error) {
	switch step {
	case StepClaim:
		t.attempts++
	case StepCommit, StepDecline, StepRollback:
		t.last = step
	case StepResolve:
		t.resolved = true
	}
	if t.tracer == nil {
		return
	}
	defer recovered(panicOfTracer, &t.panicked)
	t.tracer.TraceStep(t.ctx, StepEnd{Attempt: t.req.claim.Attempt, Step: step, Started: started, Duration: time.Since(started), Err: err})
}

func (t *trace) end(result Result) {
	if t.tracer == nil {
		return
	}
	defer recovered(panicOfTracer, &t.panicked)
	t.tracer.TraceRequestEnd(t.ctx, RequestEnd{
		Key: t.req.Key, Route: t.req.Route, Attempt: t.req.claim.Attempt, Attempts: t.attempts, Result: result, Resolved: t.resolved,
		Declined: result.Outcome == OutcomeExecuted && t.last == StepDecline,
		Started:  t.started, Duration: time.Since(t.started),
	})
}
