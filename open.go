package idempotency

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/paidonce/idempotency/internal/deadline"
)

// An open request is one that has committed the intent to call another service, and has no answer
// yet. Its key stays claimed without a transaction, a connection or a process, until the attempt
// itself, a retry or the completer ends it. This file has the state of an open request, the
// contract with the store, and the end of an open attempt.

// EffectKind is the kind of a recorded effect.
type EffectKind int16

// The kinds. Stores keep their numbers.
const (
	EffectCall       EffectKind = 1 // may be sent again with the same key
	EffectAtMostOnce EffectKind = 2 // is sent once at most
	EffectUndo       EffectKind = 3 // undoes another effect; may be sent again with the same key
	EffectPhase      EffectKind = 4 // a transaction of the handler's, committed before its last one
)

// String returns the kind in one word, for people: "at-most-once".
func (k EffectKind) String() string {
	switch k {
	case EffectCall:
		return "call"
	case EffectAtMostOnce:
		return "at-most-once"
	case EffectUndo:
		return "undo"
	case EffectPhase:
		return "phase"
	}
	return fmt.Sprintf("kind %d", int16(k))
}

// EffectState is the state of a recorded effect.
type EffectState int16

// The states. Stores keep their numbers.
const (
	// EffectIntended: it may have been sent, once or more, and its result is not known. Output, if not
	// nil, is what a person stated as the result. The next run checks it.
	EffectIntended EffectState = 1
	EffectDone     EffectState = 2 // Output is its result
	EffectDeclined EffectState = 3 // a definite no; Output is its detail
	EffectMaybe    EffectState = 4 // sent once at most, and its result will never be known
)

// String returns the state in one word, for people: "intended".
func (s EffectState) String() string {
	switch s {
	case EffectIntended:
		return "intended"
	case EffectDone:
		return "done"
	case EffectDeclined:
		return "declined"
	case EffectMaybe:
		return "maybe"
	}
	return fmt.Sprintf("state %d", int16(s))
}

// Effect is a call to another service, or a phase, as the store keeps it. Times are by the store's
// clock. A phase has no input and is never recorded as EffectIntended; its SentFirst is the time of
// its commit.
type Effect struct {
	Name       string
	Kind       EffectKind
	State      EffectState
	DerivedKey string // for the other service; derived once, then kept
	Input      []byte // recorded once; every send uses it
	Output     []byte
	Tries      int       // times that it may have been sent
	Panics     int       // times that its send panicked
	SentFirst  time.Time // its intent was committed, just before the first send
	Doubt      time.Time // time of the last send without a definite answer; zero if there was none before this run
}

// Open is the state of an open request.
type Open struct {
	Route       string // a name with a version, such as "topup/1": Request.Resumable
	Request     []byte // the kept request that a run starts from: Request.Stored
	Fingerprint Fingerprint
	Attempt     AttemptID // of the first attempt; later ones keep it
	TTL         time.Duration
	Effects     []Effect

	Epoch    int64 // differs for each owner, so that a replaced owner can't write any more
	Runs     int   // of the handler, this one included
	Started  time.Time
	Resumed  time.Time     // the last time that an operator made it due; Started if none did
	Now      time.Time     // when this was read
	Due      time.Time     // the time from which anybody may take it over
	Lease    time.Duration // of the last owner
	Owned    bool          // an owner had it when this was read, and its lease had not run out
	Parked   string        // why only a person can end it; empty if nobody needs to
	LastFail string        // the last reason why a run left it open; holds no data
}

// Settlement is the result of a call that the other service reports in another way than by its
// reply: in a webhook, for example. Package effect makes it, and a store records it
// (postgres.Store.Settle).
type Settlement struct {
	DerivedKey string      // the key that the other service got
	State      EffectState // EffectDone or EffectDeclined
	Output     []byte      // as JSON; of a decline, its detail
	Kept       bool        // of a decline: the other service keeps it under the key

	// Seal encrypts the output. For a store of package storage/encrypted it is that store's
	// SealOutput, for others nil.
	Seal func(output []byte, key Key, attempt AttemptID, effect string) []byte
}

// EffectRecord is an effect of a request, open or recorded, with the request's key.
type EffectRecord struct {
	Key     Key
	Attempt AttemptID // of the request
	Effect
}

// EffectReader is implemented by a [Store] that can list its recorded calls, so that
// effect.Declared.Reconcile can compare them with the other service's list. It leaves out phases.
// It is safe for concurrent use.
type EffectReader interface {
	// EffectsByKey returns the effects with these derived keys, in any order. Keys without an effect
	// are left out.
	EffectsByKey(ctx context.Context, derivedKeys []string) ([]EffectRecord, error)

	// EffectsBetween returns at most max effects with these names that were first sent at from or
	// later, and before to, ordered by derived key. If after is not empty, it starts behind that
	// derived key.
	EffectsBetween(ctx context.Context, names []string, from, to time.Time, after string, max int) ([]EffectRecord, error)
}

// Lapse is how a run leaves a request open.
type Lapse struct {
	Pause  time.Duration // until somebody may take it over
	Parked string        // why nobody may take it over until an operator says so; empty if anybody may
	Reason string        // for the operator; holds no data
	// Doubts has, by the effect's name, the doubt that is set back because this run did not send
	// the effect, or got a definite answer.
	Doubts map[string]Doubt
	// Panicked is the name of the effect whose send panicked in this run, and empty if none did.
	Panicked string
	// Cause is the error behind Reason. It is for the result's error, and so for the log, and is never
	// recorded.
	Cause error
}

// Doubt has the values to which a run sets back an effect's doubt.
type Doubt struct {
	At   time.Time // Effect.Doubt before this run
	Sent bool      // this run sent it all the same; otherwise it does not count among Effect.Tries
}

// Errors of a [Keeper] and an [OpenAttempt], beside those of a [Store] and an [Attempt].
var (
	// ErrFenced: another owner has taken the open request over. Nothing was written.
	ErrFenced = errors.New("request was taken over by another owner")
	// ErrNotKept: the store can't keep requests open.
	ErrNotKept = errors.New("store can't keep requests open")
)

// Keeper is implemented by a [Store] that can keep requests open. It is safe for concurrent use.
type Keeper interface {
	Store

	// BeginOpen is Begin for a request that may become open. If lazy is set it need not send
	// anything: then the claim travels with the attempt's first statement, and Intend or Seal
	// returns its error. A Rollback before the first statement claims too, because the failure of
	// this attempt says nothing about another attempt. It returns ErrKeyRecorded if another attempt
	// has the key, or if there may be a record that can't be read. The record of an open request
	// has Open set.
	BeginOpen(ctx context.Context, claim *Claim, lazy bool) (OpenAttempt, *Record, error)

	// TakeOver makes the caller the owner of an open request if it is due, is not parked, and has the
	// claim's route (Claim.Resumable), because another handler has other effects. The new lease is as
	// long as the last owner's. Each effect that is not settled gets a new doubt, unless a person has
	// stated its result: then this owner does not send it. TakeOver returns the
	// request's state, or nil if it is not open, and an attempt if the caller is now the owner. The
	// state has the effects as they were before: Doubt is that of earlier owners. The claim gets the
	// request's Attempt and TTL. ErrUnknown means that the caller may have become the owner. That does
	// no harm: nothing is sent, and the lease runs out.
	TakeOver(ctx context.Context, claim *Claim) (OpenAttempt, *Open, error)

	// FindDue returns the keys of at most max open requests of these routes that are due and not
	// parked, the one that has waited longest first.
	FindDue(ctx context.Context, routes []string, max int) ([]Key, error)

	// LookUp returns the key's record, or nil if it sees none, which proves nothing. It claims
	// nothing, does not wait for a running attempt, and compares no fingerprint. The record of an open
	// request has Open set. The error is ErrRecordCorrupt, or ErrUnknown if a record can't be read, is
	// not safe yet or may be hidden. Any other error means that the store is unavailable.
	LookUp(ctx context.Context, key Key) (*Record, error)

	// ReadOpen returns the state of an open request, or nil if there is none. A store that encrypts
	// leaves Request, and Input and Output of the effects, encrypted here: only TakeOver decrypts
	// them.
	ReadOpen(ctx context.Context, key Key) (*Open, error)
}

// OpenAttempt is an attempt that can become open. It is used by one goroutine at a time.
//
// Once it is open, Commit and Decline record the answer and close the request, in one transaction;
// they return ErrFenced if another owner has taken it over.
type OpenAttempt interface {
	Attempt

	// Intend commits the intent to send this effect. The first intent also commits the claim, and
	// opens the request. From then on the attempt is open, and its lease runs. Intend sets the
	// effect's SentFirst. When it returns it holds no transaction and no connection. It returns a
	// [UsageError] if the handler has used its transaction since the last effect, because those writes
	// would be lost. ErrUnknown: the outcome of its COMMIT is not known.
	//
	// For a phase it commits the result: with the phase's writes if that is EffectDone, without them
	// if it is EffectDeclined.
	Intend(ctx context.Context, effect *Effect, lease time.Duration) error

	// Settle commits the effect's state and output, and opens the handler's next transaction.
	// ErrUnknown: it may be committed; the effect may be sent again with the same key. ErrFenced:
	// another owner has the request, or the effect has a result already.
	Settle(ctx context.Context, effect *Effect) error

	// Recorded returns the effect of this name as it is recorded. It returns ErrFenced if another
	// owner has taken the request over.
	Recorded(ctx context.Context, name string) (*Effect, error)

	// Leave undoes the open transaction, if there is one, and leaves the request open. An error
	// means that the lease has to run out before somebody takes it over.
	Leave(ctx context.Context, lapse Lapse) error
}

// Effects are the recorded effects of one run of a handler, for package effect and for the phases
// of a store. An effect lasts from [Effects.Begin] to [Effects.Settle], [Effects.Lapse] or
// [Effects.Undone]; a second one in between gets [ErrEffectBusy].
type Effects struct {
	engine  *Engine
	keeper  Keeper
	attempt OpenAttempt
	req     *ongoing
	trace   trace // a copy, so that the trace of a request without effects stays on the stack
	running *running
	ctx     context.Context // without end

	// Held while the store works, so that the end of a run waits for it: a handler may return
	// without waiting for the goroutine of its call.
	mu       sync.Mutex
	busy     bool
	over     bool // the handler has returned: nothing below may change any more
	opened   bool
	epochAt  time.Time     // local, with a monotonic reading: no later than the start of this owner's lease
	lease    time.Duration // of this owner
	clockAt  time.Time     // local, when the store's clock showed storeAt or a moment later
	storeAt  time.Time
	open     *Open // nil in the first run
	recorded map[string]*Effect
	asked    map[string][]byte // by name, the inputs of the effects that this run has begun
	intent   error             // why an effect could not begin: then no later one begins, and the answer is dropped
	lapse    Lapse             // of the effect that is not settled
	lapsed   bool
}

// ErrEffectBusy is returned to a handler that makes two calls or phases at once, or makes one
// inside a phase.
var ErrEffectBusy = errors.New("idempotency: two effects of one request at once: make one call or phase after the other, and none inside a phase")

// ErrUnsettled means that the result of a call is not known yet. The handler should return: its
// answer is dropped, and the request stays open.
var ErrUnsettled = errors.New("idempotency: the effect is not settled; the request stays open")

// ErrDeclined is a definite no: another service did nothing and will do nothing, or a phase decided
// against its writes. It is recorded, so every later run of the handler gets it too.
var ErrDeclined = errors.New("declined")

// DeclinedError is an [ErrDeclined] with its recorded detail.
type DeclinedError struct {
	Effect string          // the name of the effect
	Detail json.RawMessage // the same in every run of the handler; empty if there was none
	Err    error           // for the caller of a Do or a phase. It is not recorded
}

// Error returns the name of the effect, and the text of Err.
func (e *DeclinedError) Error() string {
	text := "declined"
	if e.Effect != "" {
		text = "effect " + e.Effect + ": declined"
	}
	if e.Err != nil {
		text += ": " + e.Err.Error()
	}
	return text
}

// Is reports whether target is [ErrDeclined].
func (e *DeclinedError) Is(target error) bool { return target == ErrDeclined }

// Unwrap returns Err.
func (e *DeclinedError) Unwrap() error { return e.Err }

// EffectsFrom returns the effects of the request that runs with this context. Outside an idempotent
// handler, for a request without a key, or on a route that is not resumable, it returns a
// [UsageError] that names the remedy.
func EffectsFrom(ctx context.Context) (*Effects, error) {
	r, ok := ctx.Value(contextKey{}).(*running)
	switch {
	case !ok:
		return nil, UsageError("idempotency: an effect outside an idempotent handler: mount the middleware on the route, and pass the request's context on")
	case r.key.Value == "":
		return nil, UsageError("idempotency: an effect needs a key: do not make keys optional on this route")
	case r.effects == nil:
		return nil, UsageError("idempotency: an effect on a route that is not resumable: set Options.Resumable to a name of the route")
	}
	return r.effects, nil
}

// Intent describes a call or a phase that a handler is about to make.
type Intent struct {
	Name    string
	Kind    EffectKind
	Input   []byte
	Timeout time.Duration // of one send
}

// Begin returns the recorded effect of this name. If there is none, it commits the intent first. A
// phase has no intent: Begin commits nothing and returns the phase as EffectIntended, and the
// caller must call Settle, Lapse or Undone.
//
// If the effect is not settled, the caller is its only sender, as long as [Effects.MaySend] allows,
// and must call Settle or Lapse. resumed reports whether an earlier run may have sent it. drift
// reports whether the input differs from the recorded one, which is the one to send.
//
// After an error of Begin the handler's answer is dropped. After a lapse the run sends no effect
// any more.
func (e *Effects) Begin(intent Intent) (effect *Effect, resumed, drift bool, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	effect, err = e.find(&intent)
	if effect != nil {
		return effect, true, !bytes.Equal(effect.Input, intent.Input), nil
	}
	if err == nil {
		effect, err = e.intend(&intent)
	}
	if err != nil && e.intent == nil && !e.over {
		e.intent = err
	}
	return effect, false, false, err
}

var errEffectLate = errors.New("idempotency: an effect after the handler has returned: wait for its end in the handler")

// find returns the recorded effect of this name, or nil.
func (e *Effects) find(intent *Intent) (*Effect, error) {
	asked, again := e.asked[intent.Name]
	switch {
	case e.over:
		return nil, errEffectLate
	case e.busy:
		return nil, ErrEffectBusy
	case intent.Kind == EffectPhase && (!validResumable(intent.Name) || strings.HasPrefix(intent.Name, undoPrefix)):
		return nil, UsageError(fmt.Sprintf("idempotency: the name of a phase must be 1 to %d visible ASCII characters, and must not begin with %s", ResumableBytesMax, undoPrefix))
	case again && intent.Kind == EffectPhase: // its function may do something else
		return nil, UsageError("idempotency: the name " + intent.Name + " was asked for twice in one run: give each phase a name of its own")
	case again && !bytes.Equal(asked, intent.Input):
		return nil, UsageError("idempotency: the effect " + intent.Name + " was asked for twice with different inputs in one run: give the second call another name")
	}
	effect := e.recorded[intent.Name]
	switch {
	case effect != nil && effect.State != EffectIntended:
	case e.intent != nil:
		return nil, e.intent
	case e.lapsed:
		return nil, fmt.Errorf("%w: an earlier effect", ErrUnsettled)
	default:
		e.busy = effect != nil
	}
	if effect != nil {
		e.asked[intent.Name] = intent.Input
	}
	return effect, nil
}

// intend begins an effect that is not recorded: it commits the intent, unless it is a phase.
func (e *Effects) intend(intent *Intent) (*Effect, error) {
	effect := &Effect{
		Name: intent.Name, Kind: intent.Kind, State: EffectIntended, Input: intent.Input,
		DerivedKey: e.running.derive("effect/" + intent.Name), Tries: 1,
	}
	if effect.Kind != EffectPhase {
		if err := e.commit(effect, intent.Timeout); err != nil { // nothing may be sent
			return nil, err
		}
	}
	e.busy = true
	return effect, nil
}

// commit commits an effect that is not recorded, and opens the request if it is the first. The
// lease is long enough for one send with this timeout.
func (e *Effects) commit(effect *Effect, timeout time.Duration) error {
	lease := timeout + e.engine.options.Timeouts.Commit + leaseMargin
	inDoubt := e.inDoubt()
	if inDoubt { // it may be sent again within the lease
		lease = max(lease, e.lease)
	}
	at := time.Now()
	bounded := deadline.After(e.ctx, e.engine.options.Timeouts.Commit)
	defer bounded.End()
	err := e.attempt.Intend(bounded, effect, lease)
	if errors.Is(err, ErrUnknown) && !e.opened {
		effect.SentFirst, err = e.resolveIntent(err)
	}
	if err != nil {
		return err
	}
	e.opened = true
	e.lease = lease
	if !inDoubt { // else the time to send counts from the take-over, which noted the doubt
		e.epochAt, e.clockAt, e.storeAt = at, time.Now(), effect.SentFirst
	}
	e.recorded[effect.Name], e.asked[effect.Name] = effect, effect.Input
	return nil
}

// inDoubt reports whether an earlier run may have sent an effect that is not settled.
func (e *Effects) inDoubt() bool {
	for _, effect := range e.recorded {
		if effect.State == EffectIntended {
			return true
		}
	}
	return false
}

// Fail makes this run of the handler fail, because an effect can't begin: the handler's answer is
// dropped. It returns err.
func (e *Effects) Fail(err error) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.intent == nil && !e.over {
		e.intent = err
	}
	return err
}

// leaseMargin is the part of an owner's lease beyond the timeouts of a send and of a commit.
const leaseMargin = 5 * time.Second

// resolveIntent looks for the first intent after the reply to its COMMIT was lost. It returns the
// time of the intent if the intent is proven to be committed, ErrUnavailable if it is proven not to
// be, ErrKeyRecorded if another attempt has the key, and ErrUnknown otherwise.
func (e *Effects) resolveIntent(lost error) (time.Time, error) {
	bounded := deadline.After(e.ctx, e.engine.options.Timeouts.Resolve)
	defer bounded.End()
	switch record, err := e.keeper.Resolve(bounded, &e.req.claim); {
	case err != nil:
		return time.Time{}, errors.Join(lost, err)
	case record == nil && e.req.claim.At.IsZero():
		// Claim and intent travel in one message. It may still be on its way, and nobody holds the
		// lock for it yet.
		return time.Time{}, lost
	case record == nil:
		return time.Time{}, fmt.Errorf("%w: the intent was not committed", ErrUnavailable)
	case record.Attempt == e.req.claim.Attempt:
		// It is open: nobody else can have ended it, because its lease has only just begun.
		return record.CreatedAt, nil
	}
	return time.Time{}, fmt.Errorf("%w: the intent was not committed", ErrKeyRecorded)
}

// MaySend reports whether this owner may still send: more than half of its lease is left, by the
// wall clock and by the monotonic clock, and the handler has not returned. A process that was
// suspended must not send.
func (e *Effects) MaySend() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return !e.over && sinceByBoth(e.epochAt) < e.lease/2
}

// Now returns the time by the store's clock. It may be behind by the time that the store's last
// reply took.
func (e *Effects) Now() time.Time {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.now()
}

func (e *Effects) now() time.Time { return e.storeAt.Add(time.Since(e.clockAt)) }

// Age returns the time since the first send of the effect by the store's clock. It may be too long
// by the time that the store's last reply took, but not too short, even if the process was
// suspended.
func (e *Effects) Age(effect *Effect) time.Duration {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.storeAt.Sub(effect.SentFirst) + sinceByBoth(e.epochAt)
}

// sinceByBoth returns the time since t by the wall clock or by the monotonic clock, whichever is
// longer: the monotonic one stands still while a machine is suspended, and the other may be set back.
func sinceByBoth(t time.Time) time.Duration {
	now := time.Now()
	return max(now.Sub(t), now.Round(0).Sub(t.Round(0)))
}

// GivenUp returns a time by which every earlier run has given up its unanswered send of the effect.
// An owner may begin a send in the first half of its lease, and the send ends after its timeout.
// That is this program's timeout or the one that the lease was made for: the longer one counts.
// The lease's other part is the Timeouts.Commit of the program that made it, which may be shorter
// than this one's, so it is not taken off.
func (e *Effects) GivenUp(effect *Effect, timeout time.Duration) time.Time {
	e.mu.Lock()
	defer e.mu.Unlock()
	last := effect.SentFirst
	if effect.Doubt.After(last) {
		last = effect.Doubt
	}
	return last.Add(e.lease/2 + max(timeout, e.lease-leaseMargin))
}

// Settle commits the result of an effect: its State and Output. After an error a call stays
// unsettled. A phase was not committed, or the outcome of its COMMIT is not known; then the
// handler's answer is dropped.
func (e *Effects) Settle(effect *Effect) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.busy = false
	if effect.Kind == EffectPhase {
		return e.settlePhase(effect)
	}
	bounded := deadline.After(e.ctx, e.engine.options.Timeouts.Commit)
	defer bounded.End()
	err := e.attempt.Settle(bounded, effect)
	lapse := Lapse{Reason: "the result was not recorded"}
	if errors.Is(err, ErrFenced) {
		switch found := e.settledOutside(bounded, effect); {
		case found == nil:
		case found.State != EffectDone && effect.State == EffectDone: // money may have moved
			lapse.Parked = "effect " + effect.Name + ": it was made, and another result is recorded from outside"
		default: // the first one counts
			effect.State, effect.Output, err = found.State, found.Output, nil
		}
	}
	if err != nil {
		effect.State, effect.Output = EffectIntended, nil
		e.lapseOf(lapse)
		return fmt.Errorf("%w: %w", ErrUnsettled, err)
	}
	return nil
}

// settledOutside returns the recorded effect if somebody else, such as a webhook, has recorded its
// result during this owner's call, and nil otherwise.
func (e *Effects) settledOutside(ctx context.Context, effect *Effect) *Effect {
	found, err := e.attempt.Recorded(ctx, effect.Name)
	if err != nil || found.State == EffectIntended {
		return nil
	}
	return found
}

func (e *Effects) settlePhase(effect *Effect) error {
	switch {
	case e.over:
		return errEffectLate
	case e.intent == nil: // else it made another effect inside
		e.intent = e.commit(effect, 0)
	}
	return e.intent
}

// Undone ends a phase that was undone: nothing of it is recorded. If the request is open, this run
// can't end it: a later run begins the phase again, whatever the handler answers now.
func (e *Effects) Undone(phase string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.busy = false
	if e.opened && e.intent == nil { // else this run has failed already
		e.lapseOf(Lapse{Reason: "phase " + phase + " was undone"})
	}
}

// Lapse notes that the effect stays unsettled. With a Pause of 0 the engine chooses one.
func (e *Effects) Lapse(lapse Lapse) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.busy = false
	e.lapseOf(lapse)
}

func (e *Effects) lapseOf(lapse Lapse) {
	if !e.over {
		e.lapse, e.lapsed = lapse, true
	}
}

// Trace calls the [EffectTracer], if there is one.
func (e *Effects) Trace(end EffectEnd) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.over {
		end.Route = e.req.Route
		e.trace.effect(end)
	}
}

// end makes all later calls fail, and the run too if one is still under way.
func (e *Effects) end() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.over = true
	if e.busy && e.intent == nil {
		e.intent = errEffectLate
	}
}

// attemptOpen is attempt for a request that may become open. If lazy is set the claim may travel
// with the handler's first statement. If the request is open already, and nobody else owns it, this
// attempt takes it over.
func (e *Engine) attemptOpen(ctx context.Context, budget *deadline.Context, req *ongoing, run RunFunc, trace *trace, past past, lazy bool) (result Result, again error) {
	keeper, ok := e.store.(Keeper)
	if !ok {
		return refuse(past.decide(factHandlerFailed), ErrNotKept), nil
	}

	// The claim, or the take-over.
	started := trace.now()
	attempt, record, err := keeper.BeginOpen(budget, &req.claim, lazy)
	fact := factAfterClaim(&req.Request, record, err)
	var open *Open
	// Read before the lease begins, so that MaySend notices if the process sleeps from then on.
	var asked time.Time
	if decide(fact).action == actionTakeOver {
		asked = time.Now()
		attempt, open, err = keeper.TakeOver(budget, &req.claim)
		fact = factAfterTakeOver(&req.Request, open, attempt != nil, err)
		trace.takenOver = trace.takenOver || attempt != nil
	}
	ended := attempt == nil
	rollback := func() error {
		ended = true
		bounded := deadline.After(ctx, e.options.Timeouts.Rollback)
		defer bounded.End()
		started := trace.now()
		err := attempt.Rollback(bounded)
		trace.step(StepRollback, started, err)
		return err
	}
	defer func() { // even after a panic or a Goexit
		if !ended {
			_ = attempt.Seal()
			_ = rollback()
		}
	}()
	trace.step(StepClaim, started, err)
	switch decision := past.decide(fact); decision.action {
	case actionRun:
		if req.resumed && open == nil { // an operator has abandoned it: only a client may begin the request again
			return refuse(decide(factOutcomeUnknown), errors.Join(ErrNotOpen, rollback())), nil
		}
	case actionReplay:
		return Result{Outcome: decision.outcome, Answer: &record.Answer, Record: record}, nil
	case actionRestart:
		if err == nil {
			err = fmt.Errorf("take over: %w: it ended a moment ago", ErrKeyRecorded)
		}
		return Result{}, err
	default:
		result := refuse(decision, err)
		result.Accepted = record != nil && record.Open && decision.outcome == OutcomeUnknown
		if open != nil {
			result.RetryAfter = max(open.Due.Sub(open.Now), 0)
		}
		return result, nil
	}

	effects := &Effects{
		engine: e, keeper: keeper, attempt: attempt, req: req, trace: *trace, ctx: ctx, open: open, opened: open != nil, recorded: map[string]*Effect{},
	}
	if open != nil {
		effects.epochAt, effects.lease, effects.clockAt, effects.storeAt = asked, open.Lease, time.Now(), open.Now
		for i := range open.Effects {
			effects.recorded[open.Effects[i].Name] = &open.Effects[i]
		}
	}
	for restarts := 0; ; restarts++ {
		answer, recorded, fact, err := e.runOpen(ctx, budget, req, run, trace, past, effects)
		refusal := refusalOf(err)
		switch decide(fact).action {
		case actionCommit:
			err = end(deadline.After(ctx, e.options.Timeouts.Commit), attempt.Commit, recorded, StepCommit, trace)
			fact = factAfterCommit(false, err)
		case actionDecline:
			err = end(deadline.After(ctx, e.options.Timeouts.Commit), attempt.Decline, recorded, StepDecline, trace)
			fact = factAfterDecline(err)
		case actionForget:
			err = rollback()
			fact = factAfterRollback(factForgotten, err)
		case actionLeave, actionPark:
		default:
			undone := rollback()
			fact = factAfterRollback(fact, undone)
			err = errors.Join(err, undone)
		}
		if !effects.opened {
			ended = true
			if decide(fact).action == actionResolve {
				disposition := DispositionCommit
				if trace.last == StepDecline {
					disposition = DispositionDecline
				}
				fact, record, err = e.resolve(ctx, req, disposition, err, trace)
			}
		} else {
			fact = factOfOpenEnd(fact, err)
			if fact == factSerialization {
				if budget.Err() == nil && restarts < e.options.Restarts {
					continue // settled effects are not sent again
				}
				fact = factUnsettled
			}
			if decide(fact).action == actionResolve {
				_, record, err = e.resolve(ctx, req, DispositionCommit, err, trace)
				fact = factOfOpenResolved(&req.Request, record, err)
			}
			ended = true
			if action := decide(fact).action; action == actionLeave || action == actionPark {
				err = errors.Join(err, effects.leave(fact))
			}
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
				decision.reason = refusal.Reason
			}
			if err == nil && effects.opened { // the handler just returned
				err = errors.New(effects.lapse.Reason)
				if cause := effects.lapse.Cause; cause != nil && !strings.HasSuffix(err.Error(), cause.Error()) {
					err = fmt.Errorf("%w: %v", err, cause) // its text alone: the handler did not return it
				}
			}
			result := refuse(decision, err)
			result.Accepted = effects.opened && decision.outcome == OutcomeUnknown
			if result.Accepted {
				result.RetryAfter = effects.lapse.Pause
			}
			return result, nil
		}
	}
}

// runOpen runs the handler of a request that may become open. It returns the handler's answer, the
// part of it to record, and the fact about its end.
func (e *Engine) runOpen(ctx context.Context, budget *deadline.Context, req *ongoing, run RunFunc, trace *trace, past past, effects *Effects) (answer, recorded *Answer, fact fact, err error) {
	started := trace.now()
	handlerEnd, _ := budget.Deadline()
	handlerCtx, cancel := context.WithDeadline(ctx, handlerEnd)
	defer cancel()
	carrier := &attemptContext{Context: handlerCtx, running: running{
		key: req.Key, attempt: req.claim.Attempt, service: e.options.Service, derived: past.derived, effects: effects,
	}}
	effects.begin(&carrier.running)
	answer, failed := e.call(effects.attempt.Context(carrier), req, effects.attempt, handlerEnd, run)
	effects.end()
	// The handler returned because its call has no result: that is no failure.
	unsettled := errors.Is(failed, ErrAnswerMissing) && (effects.opened && effects.lapsed || effects.intent != nil)
	if unsettled {
		failed = nil
	}
	trace.step(StepHandler, started, failed)
	if effects.trace.panicked != nil {
		trace.panicked = effects.trace.panicked
	}
	sealed := effects.attempt.Seal()

	disposition := DispositionForget
	if failed == nil && !unsettled {
		disposition, failed = e.disposition(req, answer)
	}
	recorded = answer
	switch {
	case unsettled: // nothing to record
	case disposition != DispositionForget:
		recorded, failed = e.reduce(answer)
	case budget.Err() != nil:
		failed = errors.Join(failed, fmt.Errorf("%w than %v", errHandlerTimeout, e.options.Timeouts.Handler))
	}
	fact = factAfterHandler(sealed, failed, disposition)
	if effects.opened {
		fact = effects.factOfOpen(fact)
	} else {
		fact = factBeforeOpen(fact, sealed, effects.intent)
	}
	if refusalOf(failed) != nil { // unwrapped, for its reason
		return answer, recorded, fact, failed
	}
	return answer, recorded, fact, errors.Join(failed, sealed, effects.intent)
}

// begin readies the effects for a run of the handler.
func (e *Effects) begin(running *running) {
	e.running, e.asked, e.over, e.intent, e.lapsed, e.lapse = running, map[string][]byte{}, false, nil, false, Lapse{}
}

// factOfOpen adjusts the fact after the handler to a request that is open: nothing may be forgotten
// any more, and the answer must fit the effects.
func (e *Effects) factOfOpen(fact fact) fact {
	if e.lapsed && e.lapse.Parked != "" {
		return factContradiction
	}
	switch {
	case fact == factTransactionLost:
		e.lapse.Parked = parkedLost
		return factContradiction
	case fact == factSerialization && !e.lapsed && (e.intent == nil || errors.Is(e.intent, ErrNotSerializable)):
		return fact
	case e.lapsed, e.intent != nil:
		return factUnsettled
	}
	final := decide(fact).action == actionCommit || decide(fact).action == actionDecline
	if !final {
		return factUnsettled
	}
	undone := map[string]bool{}
	for _, effect := range e.recorded {
		if effect.Kind == EffectUndo && effect.State == EffectDone {
			undone[UndoneBy(effect.Name)] = true
		}
	}
	for name, effect := range e.recorded {
		_, asked := e.asked[name]
		switch {
		case effect.State == EffectIntended:
			return factUnsettled
		case !asked:
			e.lapse.Parked = "the handler did not ask for effect " + name + ", which is recorded"
			return factContradiction
		case decide(fact).action == actionDecline && effect.mayStand() && !undone[name]:
			e.lapse.Parked = "the answer is a refusal, and effect " + name + " was made and not undone"
			return factContradiction
		}
	}
	return fact
}

// mayStand reports whether the effect is a call that was made, or may have been.
func (e *Effect) mayStand() bool {
	return (e.Kind == EffectCall || e.Kind == EffectAtMostOnce) && (e.State == EffectDone || e.State == EffectMaybe)
}

// undoPrefix begins the name of an effect that undoes another.
const undoPrefix = "undo/"

// UndoName returns the name of the effect that undoes the effect of this name.
func UndoName(name string) string { return undoPrefix + name }

// UndoneBy returns the name of the effect that the effect of this name undoes.
func UndoneBy(name string) string { return name[len(undoPrefix):] }

const parkedLost = "the handler ended its transaction, so its writes may stand"

// leave leaves the request open, or parks it.
func (e *Effects) leave(fact fact) error {
	lapse := e.lapse
	if decide(fact).action == actionPark && lapse.Parked == "" { // the last transaction found it, not the handler's answer
		lapse.Parked = parkedLost
	}
	if lapse.Reason == "" {
		lapse.Reason = "the handler gave no final answer"
	}
	runs := 1
	if e.open != nil {
		runs = e.open.Runs
		if age := e.now().Sub(e.open.Resumed); lapse.Parked == "" && age > e.engine.options.ParkAfter {
			lapse.Parked = fmt.Sprintf("it is still open after %v", e.engine.options.ParkAfter)
		}
	}
	if lapse.Pause == 0 {
		lapse.Pause = backoff(runs, e.engine.options.BackoffMax)
	}
	e.lapse.Pause, e.lapse.Reason = lapse.Pause, cmp.Or(lapse.Parked, lapse.Reason)
	bounded := deadline.After(e.ctx, e.engine.options.Timeouts.Commit)
	defer bounded.End()
	return e.attempt.Leave(bounded, lapse)
}

// backoff returns the pause after this many runs. It is random, with a limit that begins at 1
// second and doubles with each run, up to max.
func backoff(runs int, max time.Duration) time.Duration {
	limit := min(time.Second<<min(runs-1, 20), max)
	return rand.N(limit) + time.Millisecond
}

// ResumeFunc returns a run of the handler for a stored request. After an error the request stays
// open, and is run again later.
type ResumeFunc func(key Key, stored []byte) (RunFunc, error)

// Resumable registers the handler of requests that name it in [Request.Resumable]. Engines made by
// [Engine.With] share it. It panics if the name is taken or invalid, or if the store can't keep
// requests open.
func (e *Engine) Resumable(name string, resume ResumeFunc) {
	if _, ok := e.store.(Keeper); !ok {
		panic("idempotency: a resumable route needs a store that keeps requests open, such as postgres.Store")
	}
	if !validResumable(name) {
		panic(fmt.Sprintf("idempotency: the name of a resumable route must be 1 to %d visible ASCII characters", ResumableBytesMax))
	}
	e.family.resumable.mu.Lock()
	defer e.family.resumable.mu.Unlock()
	if e.family.resumable.byName[name].resume != nil {
		panic("idempotency: two handlers with the Resumable name " + name + ": a request that is open would not know which of them to run")
	}
	if e.family.resumable.byName == nil {
		e.family.resumable.byName = map[string]resumable{}
	}
	e.family.resumable.byName[name] = resumable{e, resume}
}

// resumables are the resumable handlers of a process, by name.
type resumables struct {
	mu     sync.Mutex
	byName map[string]resumable
}

type resumable struct {
	engine *Engine // with the options of the route
	resume ResumeFunc
}

func validResumable(name string) bool {
	for i := range len(name) {
		if name[i] <= ' ' || name[i] >= 0x7f {
			return false
		}
	}
	return name != "" && len(name) <= ResumableBytesMax
}

// Errors of [Engine.Resume].
var (
	// ErrNotOpen: the key has no open request. It may be recorded by now.
	ErrNotOpen = errors.New("request is not open")
	// ErrNotServed: this process has no handler with the request's Resumable name.
	ErrNotServed = errors.New("no handler of this process has the request's name")
)

// Resume runs the handler of an open request, if it is due, and returns its result as Do does. A
// job queue or a workflow engine may call it instead of a [Completer], any number of times. This
// process must have the handler: see [Engine.Resumable]. The error in the result is [ErrNotOpen] or
// [ErrNotServed] if nothing was run for that reason.
func (e *Engine) Resume(ctx context.Context, key Key) Result {
	keeper, ok := e.store.(Keeper)
	if !ok {
		return refuse(decide(factOutcomeUnknown), ErrNotKept)
	}
	open, err := keeper.ReadOpen(ctx, key)
	switch {
	case err != nil:
		return refuse(decide(factOutcomeUnknown), err)
	case open == nil:
		return refuse(decide(factOutcomeUnknown), ErrNotOpen)
	}
	e.family.resumable.mu.Lock()
	route := e.family.resumable.byName[open.Route]
	e.family.resumable.mu.Unlock()
	if route.resume == nil {
		return refuse(decide(factOutcomeUnknown), fmt.Errorf("%w: %s", ErrNotServed, open.Route))
	}
	// resume is called only as the owner: a request that it can't read is left with a pause, and does
	// not stay the first that is due.
	run := func(ctx context.Context) (*Answer, error) {
		effects, err := EffectsFrom(ctx)
		if err != nil {
			return nil, err
		}
		run, err := route.resume(key, effects.open.Request)
		if err != nil {
			return nil, err
		}
		return run(ctx)
	}
	return route.engine.Do(ctx, Request{
		Key: key, Fingerprint: open.Fingerprint, TTL: open.TTL, Route: open.Route, Resumable: open.Route,
		Stored: func() []byte { return nil }, resumed: true, // it is stored already
	}, run)
}

// ErrNotFound is the error of [Engine.LookUp] if it sees no record of the key.
var ErrNotFound = errors.New("key has no record")

// lookUpsMax is the maximum number of times that LookUp reads a request, because it may end in
// between.
const lookUpsMax = 2

// LookUp returns the recorded result of a request, and runs nothing. It uses only the request's
// Key, Fingerprint and FingerprintAt. It is bounded by Timeouts.Resolve, counts for InFlightMax,
// and is not traced.
//
// A recorded answer is [OutcomeReplayed]. An open request is Accepted, as in the result of Do, with
// [ReasonNeedsAttention] if only a person can end it. Otherwise nothing is proven, whatever the
// outcome: Err is [ErrNotFound] if there is no record.
func (e *Engine) LookUp(ctx context.Context, req Request) Result {
	keeper, ok := e.store.(Keeper)
	if !ok {
		return refuse(decide(factOutcomeUnknown), ErrNotKept)
	}
	defer e.family.inFlight.Add(-1)
	if e.family.inFlight.Add(1) > int64(e.options.InFlightMax) && e.options.InFlightMax > 0 {
		return refuse(decide(factOutcomeUnknown), ErrInFlightExceeded)
	}
	ctx, cancel := context.WithTimeout(ctx, e.options.Timeouts.Resolve)
	defer cancel()
	for range lookUpsMax {
		record, err := keeper.LookUp(ctx, req.Key)
		fact := factOutcomeUnknown
		switch {
		case errors.Is(err, ErrRecordCorrupt):
			fact = factRecordCorrupt
		case err == nil && record == nil:
			err = ErrNotFound
		case err == nil:
			fact = factOfRecord(&req, record)
		}
		if fact == factRecordedSame {
			return Result{Outcome: decide(fact).outcome, Answer: &record.Answer, Record: record}
		}
		if fact != factOpen {
			return refuse(decide(fact), err)
		}
		open, err := keeper.ReadOpen(ctx, req.Key)
		fact = factAfterTakeOver(&req, open, false, err)
		if fact == factKeyRecorded { // it ended a moment ago
			continue
		}
		result := refuse(decide(fact), err)
		result.Accepted = true
		if open != nil && !open.Owned {
			result.RetryAfter = max(open.Due.Sub(open.Now), 0)
		}
		return result
	}
	return refuse(decide(factOutcomeUnknown), fmt.Errorf("look up: %w: it ended a moment ago", ErrUnknown))
}

// served returns the names of the resumable handlers of this process.
func (e *Engine) served() (names []string) {
	e.family.resumable.mu.Lock()
	defer e.family.resumable.mu.Unlock()
	for name := range e.family.resumable.byName {
		names = append(names, name)
	}
	return names
}
