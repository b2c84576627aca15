package idempotency

import (
	"context"
	"time"
)

// Tracer observes everything that happens to requests. Metrics and traces are built on it. Its
// methods are called synchronously in the goroutine of the request, and concurrently for different
// requests: they should be quick. If one panics, the request continues unchanged, and [Result].Err
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
	// of a quota, or because the client is not allowed to see the replay.
	TraceRefused(ctx context.Context, data Refused)
}

// WaitTracer is implemented by a [Tracer] that counts the requests that wait now.
type WaitTracer interface {
	// TraceWaitStart is called when a request begins to wait for another attempt. A [StepWait]
	// always follows when the wait ends, before any other step of that request.
	TraceWaitStart(ctx context.Context)
}

// EffectTracer is implemented by a [Tracer] that also traces the calls to other services.
type EffectTracer interface {
	// TraceEffect is called after each call of an effect, in the goroutine of the handler that made
	// it.
	TraceEffect(ctx context.Context, data EffectEnd)
}

// EffectResult is the result of an effect that a handler called.
type EffectResult string

// The results. The first three are recorded.
const (
	EffectResultDone     EffectResult = "done"
	EffectResultDeclined EffectResult = "declined"
	EffectResultMaybe    EffectResult = "maybe"
	EffectResultUnknown  EffectResult = "unknown"  // it was sent, and its result is not known yet
	EffectResultNotSent  EffectResult = "not-sent" // it will be sent later
	EffectResultParked   EffectResult = "parked"   // only a person can settle it
	EffectResultFenced   EffectResult = "fenced"   // it came too late: another owner has the request, and will get the result itself
	EffectResultFailed   EffectResult = "failed"   // it was not begun
)

// EffectEnd describes the call of an effect.
type EffectEnd struct {
	Name     string
	Route    string
	Kind     EffectKind
	Result   EffectResult
	Sent     bool // by this call; false for a recorded result
	Resumed  bool // an earlier run may have sent it
	Drift    bool // the handler's input differs from the recorded one, which is the one that is sent
	Started  time.Time
	Duration time.Duration
	Err      error // of the send, or the reason for not sending. Its text may hold data of the other service
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
	Resolved bool      // the reply to COMMIT was lost, and the store was called for the outcome
	// TakenOver reports that the key's request was open, and that an attempt of this request took it
	// over.
	TakenOver bool
	Result    Result
	Started   time.Time
	Duration  time.Duration
}

// Refused describes a request that an adapter refused.
type Refused struct {
	Route  string
	Reason Reason
	Status int
	Err    error
}
