package idempotency

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/paidonce/idempotency/internal/deadline"
)

// Limits of [Options].
const (
	TTLMin          = time.Second
	ServiceBytesMax = 255 // of Options.Service
)

// ErrInFlightExceeded is the reason for refusing a request while [Options.InFlightMax] others are
// in flight.
var ErrInFlightExceeded = errors.New("too many requests in flight")

// Options tune an [Engine]. Nil and the zero value are the defaults, which are the safest. A
// negative value turns something off if its comment says so, and panics otherwise.
type Options struct {
	// TTL is how long a record counts, from its commit on. A retry that comes later runs again, so
	// TTL must be longer than any client retries. At least 1 second. Defaults to 24 hours.
	TTL time.Duration

	// Wait is the time, counted from its arrival, that a request waits for the answer of the
	// attempt that holds its key before it is answered in-progress. At most 1 minute ([WaitMax]).
	// While it waits it holds no connection: of all requests of a process with one key, one at a
	// time calls the store. If the attempt leaves no answer, one of the waiting requests runs, with
	// the whole of Timeouts.Handler. If the attempt leaves the request open, because a call to
	// another service is not settled, all waiting requests get that result. A wait ends early if
	// the client is gone.
	//
	// It must be shorter than TTL and than the patience of clients and balancers: a server's
	// WriteTimeout must exceed its ReadTimeout, Wait and all of Timeouts together. Waiting requests
	// count for InFlightMax and may be half of it, so that a flood of duplicates leaves room for
	// others; further ones do not wait. Defaults to 0: no request waits.
	Wait time.Duration

	// Disposition returns the meaning of an answer for the transaction. It gets the handler's answer
	// as a RunFunc returns it, before Reduce, so that it can find an error that the body of a 200
	// reports, as GraphQL and JSON-RPC do. It must not change the answer's header or body in place,
	// and is called from many goroutines. Defaults to [DefaultDisposition].
	Disposition func(answer Answer) Disposition

	// Reduce returns the part of an answer that is recorded, if that is not all of it: a body may
	// hold a one-time secret, for example. The first client gets the whole answer all the same, and
	// retries get the recorded one. Reduce must not change the answer's header or body in place,
	// and is called from many goroutines. If its result can't be recorded, the request is 500
	// not-executed and the handler's writes are undone. Defaults to recording everything.
	Reduce func(answer Answer) Answer

	// Tracer gets all events. Defaults to none.
	Tracer Tracer

	// Service goes into every [DerivedKey], so that two services with the same scopes, keys and
	// names derive different keys. It is at most 255 bytes ([ServiceBytesMax]) of UTF-8 without
	// NUL. Empty, the default, leaves it out.
	//
	// All replicas and all releases must have the same one. Setting or changing it changes every
	// derived key: the retry of a request that is under way would then charge twice. So stop
	// accepting new requests, wait until clients no longer retry (the TTL at most), and only then
	// change it.
	Service string

	// Restarts is the maximum number of times that a request is started again after a serialization
	// failure or a lost race. Negative means never. Defaults to 3.
	Restarts int

	// InFlightMax is the maximum number of requests in progress, counted after their body is read.
	// Further ones are refused as unavailable. Each holds a connection, or waits for one or for
	// another attempt. A duplicate that is answered from memory holds nothing, and counts until it
	// is answered. Negative means no limit. Defaults to 512.
	InFlightMax int

	// BackoffMax is the longest pause between two runs of an open request: one with a call to another
	// service that is not settled. A pause is random, with a limit that begins at 1 second and
	// doubles. Defaults to 5 minutes.
	BackoffMax time.Duration

	// ParkAfter is the time after which a request that is still open is left to a person. It starts
	// again when an operator makes the request due. Defaults to 24 hours.
	ParkAfter time.Duration

	// Timeouts bound the steps of a request.
	Timeouts Timeouts
}

// Timeouts bound the steps of a request. Zero values are the defaults.
type Timeouts struct {
	// Handler bounds the claim and all runs of the handler together. When it has elapsed, the
	// handler's context ends, and with it the handler's statement in the database. If the handler
	// answers later, the answer counts if it is recorded, and is unavailable otherwise. Defaults to
	// 10 seconds.
	Handler time.Duration

	// Commit bounds the record and COMMIT, on a context of their own. When it has elapsed, the
	// engine looks their outcome up in the store. Defaults to 5 seconds.
	Commit time.Duration

	// Resolve bounds the look-up of a COMMIT with a lost reply, on a context of its own. When it
	// has elapsed, the outcome is unknown, and a retry looks again. Defaults to 8 seconds.
	Resolve time.Duration

	// Rollback bounds ROLLBACK. When it has elapsed, the connection is closed, which has the same
	// effect. Defaults to 2 seconds.
	Rollback time.Duration
}

// full returns a copy of o with every default filled in. It panics on values that can't work.
func (o *Options) full() Options {
	var full Options
	if o != nil {
		full = *o
	}
	t := &full.Timeouts
	t.Handler = cmp.Or(t.Handler, 10*time.Second)
	t.Commit = cmp.Or(t.Commit, 5*time.Second)
	t.Resolve = cmp.Or(t.Resolve, 8*time.Second)
	t.Rollback = cmp.Or(t.Rollback, 2*time.Second)
	full.TTL = cmp.Or(full.TTL, 24*time.Hour)
	full.Restarts = cmp.Or(full.Restarts, 3)
	full.InFlightMax = cmp.Or(full.InFlightMax, 512)
	full.BackoffMax = cmp.Or(full.BackoffMax, 5*time.Minute)
	full.ParkAfter = cmp.Or(full.ParkAfter, 24*time.Hour)
	if full.Disposition == nil {
		full.Disposition = DefaultDisposition
	}
	for name, value := range map[string]time.Duration{
		"Timeouts.Handler": t.Handler, "Timeouts.Commit": t.Commit, "Timeouts.Resolve": t.Resolve, "Timeouts.Rollback": t.Rollback, "Wait": full.Wait,
		"BackoffMax": full.BackoffMax, "ParkAfter": full.ParkAfter,
	} {
		if value < 0 {
			panic(fmt.Sprintf("idempotency: Options.%s is %v: it must not be negative", name, value))
		}
	}
	if full.TTL < TTLMin {
		panic(fmt.Sprintf("idempotency: Options.TTL is %v: it must be at least %v", full.TTL, TTLMin))
	}
	if full.Wait > WaitMax || full.Wait >= full.TTL {
		panic(fmt.Sprintf("idempotency: Options.Wait is %v: it must be at most %v, and shorter than the TTL, which is %v", full.Wait, WaitMax, full.TTL))
	}
	if err := validateService(full.Service); err != nil {
		panic("idempotency: Options.Service " + err.Error())
	}
	return full
}

// validateService returns an error if a service's name is invalid. Its text continues the name of
// the option.
func validateService(service string) error {
	switch {
	case len(service) > ServiceBytesMax:
		return fmt.Errorf("has %d bytes, over the limit of %d", len(service), ServiceBytesMax)
	case !utf8.ValidString(service):
		return errors.New("is not UTF-8")
	case strings.ContainsRune(service, 0):
		return errors.New("contains a NUL")
	}
	return nil
}

// BudgetChecker is implemented by a [Store] if its timeouts must fit the engine's. [NewEngine]
// calls it.
type BudgetChecker interface {
	// CheckBudget returns an error that names the remedy if the store would cut off a handler
	// within its timeout.
	CheckBudget(handlerTimeout, commitTimeout time.Duration) error
}

// Engine runs the protocol: claim, run, record, commit, each request in one transaction of its
// [Store], unless the request is resumable. It knows nothing of net/http: package middleware is the
// adapter. It is safe for concurrent use.
type Engine struct {
	store   Store
	options Options
	family  *family
}

// family is the state that engines share if one was made from the other by [Engine.With].
type family struct {
	inFlight atomic.Int64
	running  runningKeys
	queues   queues

	resumable resumables
}

// NewEngine returns an engine on the store. It panics if the store is nil or the options can't work
// together.
func NewEngine(store Store, opts *Options) *Engine {
	if store == nil {
		panic("idempotency: NewEngine needs a Store")
	}
	return newEngine(store, opts, &family{})
}

// With returns an engine with other options on the same store. The two share the count of requests
// in flight, the running keys and the wait queues.
func (e *Engine) With(opts *Options) *Engine { return newEngine(e.store, opts, e.family) }

func newEngine(store Store, opts *Options, family *family) *Engine {
	e := &Engine{store: store, options: opts.full(), family: family}
	if checker, ok := store.(BudgetChecker); ok {
		if err := checker.CheckBudget(e.options.Timeouts.Handler, e.options.Timeouts.Commit); err != nil {
			panic("idempotency: " + err.Error())
		}
	}
	return e
}

// Options returns the options in force, with every default filled in.
func (e *Engine) Options() Options { return e.options }

// InFlight returns the number of requests in progress, including those of engines made by
// [Engine.With].
func (e *Engine) InFlight() int { return int(e.family.inFlight.Load()) }

// ErrAnswerMissing is the error that a [RunFunc] returns if its handler returned without an answer.
// The handler has failed, unless one of its calls to another service has no result yet: then it had
// nothing to answer, and the request stays open.
var ErrAnswerMissing = errors.New("handler gave no answer")

// RunFunc runs the handler once and returns its answer. The engine calls it again, with a new
// context, if the transaction has to be started again; each call must start from the request as it
// arrived. A [*Refusal] means that the handler was not run, and any other error that it failed; in
// both cases nothing is recorded. A nil answer with a nil error counts as [ErrAnswerMissing].
type RunFunc func(ctx context.Context) (*Answer, error)

// Refusal is the error of a [RunFunc] that did not run the handler, after the claim has shown that
// the request's key is new: a quota is used up, for example. It must be returned as it is, not
// wrapped. The request ends as [OutcomeNotExecuted] with Reason; or as [OutcomeUnknown] if an
// earlier run of the same request called [DerivedKey].
type Refusal struct {
	Reason     Reason        // required: without one the handler has failed
	RetryAfter time.Duration // after which a retry may succeed; zero if that is not known
	Err        error         // for the operator; its text holds no key, body or credential. May be nil
}

// Error returns the reason and the text of Err.
func (r *Refusal) Error() string {
	if r.Err == nil {
		return "refused: " + string(r.Reason)
	}
	return "refused: " + string(r.Reason) + ": " + r.Err.Error()
}

// Unwrap returns Err.
func (r *Refusal) Unwrap() error { return r.Err }

// Result is the result of a request.
type Result struct {
	Outcome Outcome
	Answer  *Answer // the handler's answer or the recorded one; nil if Reason is set
	Reason  Reason  // why there is no answer; empty if Answer is set
	Record  *Record // the replayed record, else nil. Other requests may share its body: only read it
	// Accepted reports that the request is open: it called another service, or was about to, and will
	// be ended even if the client never asks again.
	Accepted bool
	// RetryAfter is the time after which a retry of an open request may find an answer; zero if not
	// known.
	RetryAfter time.Duration
	// Err is for the operator: the fault, or a panic of a Tracer, which may come together with an
	// answer. Its text holds no key, body or credential.
	Err error
}

// Do takes one request through the protocol. It returns when the request is settled and holds
// nothing. It ignores the request's own cancellation: work that has begun is finished, and a retry
// finds it. Cancellation only ends a wait for another attempt ([Options.Wait]), when nothing of
// this request has begun.
//
// Read attempt together with decide in decision.go: attempt finds the facts in their order, and the
// table there has the consequence of each.
func (e *Engine) Do(ctx context.Context, req Request, run RunFunc) (result Result) {
	o := &ongoing{Request: req}
	o.TTL = cmp.Or(o.TTL, e.options.TTL)
	if !validTraceID(o.TraceID) {
		o.TraceID = ""
	}
	if reason, err := validate(&o.Request); err != nil {
		return Result{Outcome: OutcomeNotExecuted, Reason: reason, Err: err}
	}
	trace := e.startTrace(ctx, o)
	result = refuse(decide(factOutcomeUnknown), errGoexit) // unless do returns
	defer func() {
		trace.end(result)
		if trace.panicked != nil {
			result.Err = errors.Join(result.Err, trace.panicked)
		}
	}()
	return e.do(trace.ctx, o, run, &trace)
}

// ongoing is a request on its way through the engine.
type ongoing struct {
	Request
	claim Claim // of the latest attempt; zero if none was begun
}

func (o *ongoing) keyless() bool { return o.Key.Value == "" }

// errHandlerTimeout means that the handler answered after its timeout, and the answer is not
// recorded.
var errHandlerTimeout = fmt.Errorf("%w: the handler took longer", ErrUnavailable)

// errGoexit stands for a handler that ended its goroutine.
var errGoexit = errors.New("handler did not return")

// validate reports why a request can't be taken, and the reason that a client is given.
func validate(req *Request) (Reason, error) {
	if req.TTL < TTLMin {
		return ReasonHandlerFailed, fmt.Errorf("request's TTL is %v: it must be at least %v", req.TTL, TTLMin)
	}
	if req.Key.Value == "" {
		return "", nil
	}
	if err := req.Key.Validate(); errors.Is(err, ErrScopeInvalid) {
		return ReasonScope, err
	} else if err != nil {
		return ReasonKeyInvalid, err
	}
	if req.Fingerprint.Version == 0 { // a forgotten one would equal that of every other request
		return ReasonHandlerFailed, errors.New("request has a key and no fingerprint")
	}
	if req.Resumable != "" && (!validResumable(req.Resumable) || req.Stored == nil) {
		return ReasonHandlerFailed, errors.New("resumable request has an invalid name, or no Stored function")
	}
	return "", nil
}

func validTraceID(id string) bool {
	for i := range len(id) {
		if id[i] <= ' ' || id[i] >= 0x7f {
			return false
		}
	}
	return len(id) <= TraceIDBytesMax
}

func (e *Engine) do(ctx context.Context, req *ongoing, run RunFunc, trace *trace) Result {
	defer e.family.inFlight.Add(-1)
	if e.family.inFlight.Add(1) > int64(e.options.InFlightMax) && e.options.InFlightMax > 0 {
		return refuse(decide(factUnavailable), ErrInFlightExceeded)
	}
	if e.options.Wait > 0 && !req.keyless() {
		return e.inQueue(ctx, req, run, trace)
	}
	return e.attempts(ctx, req, run, trace, nil)
}

// attempts makes one attempt after another until one does not have to be started again. derived is
// set once a run of the request has called DerivedKey; pass nil if there were no attempts before.
func (e *Engine) attempts(ctx context.Context, req *ongoing, run RunFunc, trace *trace, derived *atomic.Bool) Result {
	if e.family.running.has(req.Key) {
		return refuse(decide(factRunsHere), errRunsHere)
	}
	bounds := &struct { // one piece of memory
		parent  detached
		budget  deadline.Context // of the claim and of all runs
		derived atomic.Bool
	}{parent: detached{ctx}}
	if derived == nil {
		derived = &bounds.derived
	}
	budget := &bounds.budget
	budget.Start(&bounds.parent, e.options.Timeouts.Handler)
	defer budget.End()
	past := past{derived: derived}
	for restarts := 0; ; restarts++ {
		req.claim = Claim{Key: req.Key, Fingerprint: req.Fingerprint, TTL: req.TTL, TraceID: req.TraceID, Attempt: NewAttemptID()}
		var result Result
		var again error
		if req.Resumable == "" || req.keyless() {
			result, again = e.attempt(&bounds.parent, budget, req, run, trace, past)
		} else {
			req.claim.Resumable, req.claim.Stored = req.Resumable, req.Stored
			result, again = e.attemptOpen(&bounds.parent, budget, req, run, trace, past, restarts == 0 && !req.resumed && !req.ClaimFirst)
		}
		lost := errors.Is(again, ErrKeyRecorded)
		// Another attempt recorded the key. Claim once more to read its record, even if the
		// restarts are spent.
		read := lost && !past.recorded
		past.recorded = past.recorded || lost
		if again != nil && budget.Err() == nil && (read || restarts < e.options.Restarts) {
			continue
		}
		if again != nil {
			result = refuse(past.decide(factRestartsSpent), again)
		}
		return result
	}
}

// attempt claims the key, runs the handler within the rest of the budget if the claim was granted,
// and ends the transaction. The end has a timeout of its own: neither the client nor the handler's
// timeout may cut it off. ctx never ends. attempt returns a result, or the reason to start again.
func (e *Engine) attempt(ctx context.Context, budget *deadline.Context, req *ongoing, run RunFunc, trace *trace, past past) (result Result, again error) {
	// The claim.
	started := trace.now()
	attempt, record, err := e.store.Begin(budget, &req.claim)
	open := attempt != nil
	rollback := func() error {
		open = false
		started := trace.now()
		bounded := deadline.After(ctx, e.options.Timeouts.Rollback)
		defer bounded.End()
		err := attempt.Rollback(bounded)
		trace.step(StepRollback, started, err)
		return err
	}
	defer func() { // even after a panic or a Goexit the transaction is ended once
		if open {
			_ = attempt.Seal()
			_ = rollback()
		}
	}()
	trace.step(StepClaim, started, err)
	switch decision := past.decide(factAfterClaim(&req.Request, record, err)); decision.action {
	case actionRun:
	case actionReplay:
		return Result{Outcome: decision.outcome, Answer: &record.Answer, Record: record}, nil
	case actionRestart:
		return Result{}, err
	default:
		return refuse(decision, err), nil
	}

	// The handler.
	started = trace.now()
	handlerEnd, _ := budget.Deadline()
	handlerCtx, cancel := context.WithDeadline(ctx, handlerEnd)
	defer cancel()
	bounds := &struct { // one piece of memory
		handler attemptContext
		end     deadline.Context
	}{handler: attemptContext{Context: handlerCtx, running: running{
		key: req.Key, attempt: req.claim.Attempt, service: e.options.Service, derived: past.derived,
	}}}
	answer, failed := e.call(attempt.Context(&bounds.handler), req, attempt, handlerEnd, run)
	trace.step(StepHandler, started, failed)
	sealed := attempt.Seal()

	// The end.
	disposition := DispositionForget
	if failed == nil {
		disposition, failed = e.disposition(req, answer)
	}
	recorded := answer
	switch {
	case disposition != DispositionForget:
		recorded, failed = e.reduce(answer)
	case budget.Err() != nil:
		failed = errors.Join(failed, fmt.Errorf("%w than %v", errHandlerTimeout, e.options.Timeouts.Handler))
	}
	fact := factAfterHandler(sealed, failed, disposition)
	switch decide(fact).action {
	case actionCommit:
		open = false
		bounds.end.Start(ctx, e.options.Timeouts.Commit)
		err = end(&bounds.end, attempt.Commit, recorded, StepCommit, trace)
		fact = factAfterCommit(req.keyless(), err)
	case actionDecline:
		open = false
		bounds.end.Start(ctx, e.options.Timeouts.Commit)
		err = end(&bounds.end, attempt.Decline, recorded, StepDecline, trace)
		// Another attempt may have claimed the key in between: it must not hide the record.
		e.family.running.removeAny(req.Key)
		fact = factAfterDecline(err)
	case actionForget:
		err = rollback()
		fact = factAfterRollback(factForgotten, err)
	default:
		undone := rollback()
		fact = factAfterRollback(fact, undone)
		err = errors.Join(failed, sealed, undone)
	}
	if decide(fact).action == actionResolve {
		fact, record, err = e.resolve(ctx, req, disposition, err, trace)
	}
	switch decision := past.decide(fact); decision.action {
	case actionAnswer:
		return Result{Outcome: decision.outcome, Answer: answer}, nil
	case actionReplay:
		return Result{Outcome: decision.outcome, Answer: &record.Answer, Record: record}, nil
	case actionRestart:
		return Result{}, err
	default:
		if decision.reason == reasonOfRefusal {
			decision.reason = refusalOf(failed).Reason
		}
		return refuse(decision, err), nil
	}
}

// disposition calls the policy. Without a key no answer can be recorded, so a decline is forgotten.
// If the policy panics the handler has failed: nothing says that the answer is final.
func (e *Engine) disposition(req *ongoing, answer *Answer) (disposition Disposition, err error) {
	defer recovered("Options.Disposition", &err)
	disposition = e.options.Disposition(*answer)
	if disposition == DispositionDecline && req.keyless() {
		return DispositionForget, nil
	}
	return disposition, nil
}

// end runs Commit or Decline with ctx, and ends ctx afterwards.
func end(ctx *deadline.Context, end func(context.Context, *Answer) error, answer *Answer, step Step, trace *trace) error {
	defer ctx.End()
	started := trace.now()
	err := end(ctx, answer)
	trace.step(step, started, err)
	return err
}

// resolve calls the store's Resolve after the reply to a COMMIT was lost; lost is the error in
// place of the reply.
func (e *Engine) resolve(ctx context.Context, req *ongoing, disposition Disposition, lost error, trace *trace) (fact, *Record, error) {
	started := trace.now()
	bounded := deadline.After(ctx, e.options.Timeouts.Resolve)
	defer bounded.End()
	record, err := e.store.Resolve(bounded, &req.claim)
	trace.step(StepResolve, started, err)
	return factAfterResolve(req, disposition, record, err), record, errors.Join(lost, err)
}

// reduce returns the part of an answer to record, or an error if it can't be recorded.
func (e *Engine) reduce(answer *Answer) (recorded *Answer, err error) {
	if err := answer.Validate(); err != nil || e.options.Reduce == nil {
		return answer, err
	}
	defer recovered("Options.Reduce", &err)
	reduced := e.options.Reduce(*answer)
	return &reduced, reduced.Validate()
}

// recovered is deferred around calls to the service's functions. It turns a panic into an error,
// unless *err is set already.
func recovered(whose string, err *error) {
	if value := recover(); value != nil && *err == nil {
		*err = &PanicError{Value: value, Stack: debug.Stack(), whose: whose}
	}
}

// call runs the handler and turns a panic into an error. While it runs the key, if there is one, is
// in memory, until the handler's deadline at most.
func (e *Engine) call(ctx context.Context, req *ongoing, attempt Attempt, handlerEnd time.Time, run RunFunc) (answer *Answer, err error) {
	defer recovered("", &err)
	if !req.keyless() && req.Resumable == "" { // a resumable handler may run before its claim
		e.family.running.add(&req.claim, attempt, handlerEnd)
		defer e.family.running.remove(&req.claim)
	}
	answer, err = run(ctx)
	if answer == nil && err == nil {
		err = ErrAnswerMissing
	}
	return answer, err
}

func refuse(decision decision, err error) Result {
	return Result{Outcome: decision.outcome, Reason: decision.reason, Err: err}
}

// trace carries one request's tracer. Without a tracer it does nothing and reads no clock.
type trace struct {
	tracer    Tracer
	ctx       context.Context
	req       *ongoing
	started   time.Time
	attempts  int
	last      Step // of the steps that end an attempt
	resolved  bool
	takenOver bool
	panicked  error // the tracer's panics
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

func (t *trace) effect(end EffectEnd) {
	if tracer, ok := t.tracer.(EffectTracer); ok {
		defer recovered(panicOfTracer, &t.panicked)
		tracer.TraceEffect(t.ctx, end)
	}
}

func (t *trace) now() time.Time {
	if t.tracer == nil {
		return time.Time{}
	}
	return time.Now()
}

// wait traces the beginning of a wait, and returns its time.
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
		Key: t.req.Key, Route: t.req.Route, Attempt: t.req.claim.Attempt, Attempts: t.attempts, Result: result, Resolved: t.resolved, TakenOver: t.takenOver,
		Declined: result.Outcome == OutcomeExecuted && t.last == StepDecline,
		Started:  t.started, Duration: time.Since(t.started),
	})
}
