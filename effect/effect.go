package effect

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http/httptrace"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/paidonce/idempotency"
)

// Limits. Everything that is recorded has one.
const (
	NameBytesMax   = 100      // of an effect's name
	InputBytesMax  = 64 << 10 // of an input as JSON: a larger one fails the run before anything is sent
	OutputBytesMax = 64 << 10 // of an output or the detail of a decline as JSON
	PanicsMax      = 5        // of Do for one request; then only a person can go on
)

// Effect describes a call to another service. In and Out are recorded as JSON, so both must survive
// encoding/json: Do gets, and Call returns, the value that was decoded from the record.
type Effect[In, Out any] struct {
	// Do makes the call once, and passes the key on as the other service's idempotency key. It returns
	// [Declined] for a definite no, [NotSent] if the request provably did not leave, and [Park] if
	// only a person can go on. Any other error, and a panic, means that the result is unknown: the
	// call is sent again later, with the same key and input. [FromHTTP] makes these errors from an
	// HTTP response. Use ctx for the request; it ends after Timeout, and with the handler's context.
	// Required.
	//
	// net/http sends a request with an Idempotency-Key header again by itself if a reused connection
	// breaks. Call notices that by ctx, and then a decline is not final unless KeepsDeclines is set.
	// Set the request's GetBody to nil to keep net/http from it.
	Do func(ctx context.Context, key string, in In) (Out, error)

	// Lookup finds the result of an earlier send by its key, and must change nothing at the other
	// service. It returns [ErrAbsent] if it finds none, which proves nothing, because the other
	// service's list may lag. It has half of Timeout. It is called before a call is sent again; after
	// nine tenths of KeyLifetime it is called instead. With it a KeyLifetime that is too long does no
	// harm while that list is up to date, so provide it if you can. Optional.
	Lookup func(ctx context.Context, key string, in In) (Out, error)

	// Timeout bounds one send. The request's lease grows with it. Defaults to 10 seconds.
	Timeout time.Duration

	// KeyLifetime is the time for which the other service is sure to remember a key. After nine
	// tenths of it, counted from the first send by the store's clock, nothing is sent any more:
	// Lookup or a person settles the call. A value that is too long can pay twice. It must be at
	// least ten times Timeout, unless AtMostOnce is set, so that the last tenth covers a send.
	// Defaults to 1 hour. It can't be unlimited.
	KeyLifetime time.Duration

	// SettleAfter is the longest time that a send can still be under way to the other service, or be
	// processed there, after Do has given it up. A decline of a repeated send counts only after this
	// time, unless KeepsDeclines is set. Defaults to 1 minute.
	SettleAfter time.Duration

	// KeepsDeclines means that the other service keeps a no under its key, so that an earlier
	// request that arrives late gets the same no. Its documentation says so if it repeats the first
	// answer of a key whatever its status. Leave it out if you don't know: then declines take up to
	// SettleAfter longer, and webhooks can't report them.
	KeepsDeclines bool

	// AtMostOnce is for a service without keys: only the attempt that committed the intent sends the
	// call, once. Do must not repeat it either: net/http does that by itself if the request has an
	// Idempotency-Key header and a GetBody. If that attempt could not send it, Call returns
	// [ErrDeclined]. If the result of the send is lost and Lookup does not find it, Call returns
	// [ErrMaybe]. Both are recorded.
	AtMostOnce bool

	// MaybeParks leaves the request to a person instead of returning ErrMaybe. Set it if the effect
	// moves money. Only with AtMostOnce.
	MaybeParks bool
}

// Declared is an effect with its name. It is safe for concurrent use. Make it once, with [New].
type Declared[In, Out any] struct {
	name    string
	effect  Effect[In, Out]
	breaker breaker
}

// New declares an effect. The name is recorded, and the key for the other service is derived from
// it. So it must not change while requests are open, and a handler must not call two effects of one
// name. It is 1 to 100 visible ASCII characters ([NameBytesMax]) and does not begin with "undo/".
// New panics if the name or the effect is invalid.
func New[In, Out any](name string, e Effect[In, Out]) *Declared[In, Out] {
	e.Timeout = cmp.Or(e.Timeout, 10*time.Second)
	e.KeyLifetime = cmp.Or(e.KeyLifetime, time.Hour)
	e.SettleAfter = cmp.Or(e.SettleAfter, time.Minute)
	wrong := ""
	switch {
	case name == "" || len(name) > NameBytesMax || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r >= 0x7f }):
		wrong = fmt.Sprintf("its name must be 1 to %d visible ASCII characters", NameBytesMax)
	case strings.HasPrefix(name, idempotency.UndoName("")):
		wrong = "its name begins with " + idempotency.UndoName("") + ": that of an undo is made by Undo"
	case e.Do == nil:
		wrong = "Do is required"
	case e.Timeout < 0 || e.KeyLifetime < 0 || e.SettleAfter < 0:
		wrong = "Timeout, KeyLifetime and SettleAfter must not be negative"
	case e.KeyLifetime < 10*e.Timeout && !e.AtMostOnce:
		wrong = fmt.Sprintf("KeyLifetime is %v: it must be at least ten times Timeout, which is %v", e.KeyLifetime, e.Timeout)
	case e.MaybeParks && !e.AtMostOnce:
		wrong = "MaybeParks is for AtMostOnce: any other effect is sent again"
	}
	if wrong != "" {
		panic(fmt.Sprintf("idempotency/effect: effect %q: %s", name, wrong))
	}
	return &Declared[In, Out]{name: name, effect: e}
}

// Name returns the name of the effect.
func (d *Declared[In, Out]) Name() string { return d.name }

// Call makes the call for the request that runs with this context, and returns its result. If an
// earlier run has recorded the result, nothing is sent. Call holds no transaction and no connection
// while Do runs.
//
// The error is [ErrDeclined], [ErrMaybe] or another one. After another one the handler should
// return: its answer is dropped, and if something may have been sent the request stays open until a
// later run ends it.
//
// Call must come before the handler uses its transaction, and every run of the handler must make
// it. It panics with an [idempotency.UsageError] outside an idempotent handler, for a request
// without a key, on a route that is not resumable, after the transaction was used, and if one run
// calls it twice with different inputs. It does not return an error for these mistakes, because a
// handler could turn that into an answer, and the answer could be recorded.
func (d *Declared[In, Out]) Call(ctx context.Context, in In) (Out, error) {
	kind := idempotency.EffectCall
	if d.effect.AtMostOnce {
		kind = idempotency.EffectAtMostOnce
	}
	return d.call(ctx, d.name, kind, in)
}

// Undo makes the call as Call does, to undo another effect of this request: a refund of a charge,
// for example. It is an effect with a name and a key of its own, so it is neither lost nor made
// twice. After it the handler may answer a refusal. If the handler answers a refusal after an
// effect that was made and not undone, the request is left to a person.
func (d *Declared[In, Out]) Undo(ctx context.Context, of interface{ Name() string }, in In) (Out, error) {
	return d.call(ctx, idempotency.UndoName(of.Name()), idempotency.EffectUndo, in)
}

// Settled returns the settlement for a webhook of the other service that reports that the call with
// this key was done, with this output. A store records it in the webhook's transaction
// (postgres.Store.Settle), and the next run of the handler finds it. Settled returns an error if
// the output can't be recorded.
func (d *Declared[In, Out]) Settled(key string, out Out) (idempotency.Settlement, error) {
	output, err := encodeOutput(out)
	if err != nil {
		return idempotency.Settlement{}, fmt.Errorf("effect %s: %w", d.name, err)
	}
	return idempotency.Settlement{DerivedKey: key, State: idempotency.EffectDone, Output: output}, nil
}

// SettledDeclined is Settled for a definite no. The detail is as in [Declined]. Unless KeepsDeclines
// or AtMostOnce is set the no is not recorded, because it may belong to one of several sends while
// another is under way: the next run looks the call up or sends it again.
func (d *Declared[In, Out]) SettledDeclined(key string, detail any) idempotency.Settlement {
	settlement := idempotency.Settlement{DerivedKey: key, State: idempotency.EffectDeclined, Kept: d.effect.KeepsDeclines}
	var declined *DeclinedError
	if errors.As(Declined(nil, detail), &declined) {
		settlement.Output = declined.Detail
	}
	return settlement
}

func (d *Declared[In, Out]) call(ctx context.Context, name string, kind idempotency.EffectKind, in In) (out Out, err error) {
	effects, err := idempotency.EffectsFrom(ctx)
	if err != nil {
		panic(err)
	}
	r := run[In, Out]{Declared: d, ctx: ctx, effects: effects}
	r.end = idempotency.EffectEnd{Name: name, Kind: kind, Started: time.Now(), Result: idempotency.EffectResultFailed}
	defer func() {
		r.end.Duration = time.Since(r.end.Started)
		effects.Trace(r.end)
	}()
	input, err := encodeInput(in)
	if err == nil && ctx.Err() != nil {
		err = fmt.Errorf("%w: %w", idempotency.ErrUnavailable, context.Cause(ctx))
	}
	if err != nil {
		r.end.Err = effects.Fail(fmt.Errorf("effect %s: %w", name, err))
		return out, r.end.Err
	}
	r.effect, r.end.Resumed, r.end.Drift, err = effects.Begin(idempotency.Intent{Name: name, Kind: kind, Input: input, Timeout: d.effect.Timeout})
	if usage := idempotency.UsageError(""); errors.As(err, &usage) {
		panic(usage)
	}
	if err != nil {
		r.end.Err = err
		return out, fmt.Errorf("effect %s: %w", name, err)
	}
	switch {
	case r.effect.Kind == idempotency.EffectPhase:
		return r.park("a phase is recorded under the name of this effect", nil)
	case r.effect.State == idempotency.EffectIntended:
		return r.settle()
	}
	return r.recorded()
}

// run is one call of an effect in one run of a handler.
type run[In, Out any] struct {
	*Declared[In, Out]
	ctx     context.Context
	effects *idempotency.Effects
	effect  *idempotency.Effect
	end     idempotency.EffectEnd

	repeated bool // Do sent the request more than once
}

// recorded returns the recorded result.
func (r *run[In, Out]) recorded() (out Out, err error) {
	switch r.effect.State {
	case idempotency.EffectDeclined:
		r.end.Result = idempotency.EffectResultDeclined
		return out, &DeclinedError{Effect: r.effect.Name, Detail: r.effect.Output}
	case idempotency.EffectMaybe:
		r.end.Result = idempotency.EffectResultMaybe
		return out, fmt.Errorf("effect %s: %w", r.effect.Name, ErrMaybe)
	}
	r.end.Result = idempotency.EffectResultDone
	if len(r.effect.Output) == 0 {
		return r.park("it was made, and its output could not be recorded", nil)
	}
	if err := json.Unmarshal(r.effect.Output, &out); err != nil {
		// Another version of the program may understand it.
		return r.lapse(idempotency.EffectResultDone, "its recorded output does not fit the program", err, idempotency.Lapse{})
	}
	return out, nil
}

// settle gets the result of the effect, by the rules in the package's comment.
func (r *run[In, Out]) settle() (out Out, err error) {
	if r.effect.Output != nil {
		return r.stated()
	}
	in, err := decodeStrictly[In](r.effect.Input)
	if err != nil {
		// Another version of the program may understand it. The part that this one understands would be
		// another input.
		return r.unsent("its recorded input does not fit the program", err)
	}
	once := r.Declared.effect.AtMostOnce || r.effect.Kind == idempotency.EffectAtMostOnce

	probe, ok := r.breaker.enter()
	if !ok {
		return r.unsentOnce(once, "the other service gives no results", errBreaker)
	}
	learned := learnedNothing
	defer func() { r.breaker.leave(probe, learned) }()

	absent := r.Declared.effect.Lookup == nil
	if r.end.Resumed && !absent {
		start := r.effects.Now()
		out, err := r.protect(r.Declared.effect.Lookup, r.Declared.effect.Timeout/2, in, new(wireUse))
		var parked *parkError
		switch {
		case err == nil:
			return r.done(out)
		case errors.Is(err, ErrDeclined):
			return r.declined(start, err)
		case errors.As(err, &parked):
			return r.park("by its look-up: "+parked.reason(), err)
		}
		absent = errors.Is(err, ErrAbsent)
		r.end.Err = err
	}
	switch {
	case once && r.end.Resumed:
		if !absent || r.Declared.effect.Lookup != nil && !r.quiet(r.effects.Now()) {
			return r.unsent("it is never sent twice, and is not found yet", r.end.Err)
		}
		return r.maybe(r.end.Err)
	case !r.effects.MaySend(): // first, because a wall clock that was set ahead makes Age too long too
		return r.unsentOnce(once, "it was too late to send", errLate)
	case r.effects.Age(r.effect) >= r.Declared.effect.KeyLifetime/10*9:
		if !absent {
			return r.unsent("its key may be forgotten, and it could not be looked up", r.end.Err)
		}
		if r.Declared.effect.Lookup == nil {
			return r.park("the other service may have forgotten its key, and there is no look-up", nil)
		}
		return r.park("the other service may have forgotten its key, and it was not found", r.end.Err)
	case r.ctx.Err() != nil:
		return r.unsentOnce(once, "the handler's time ran out", context.Cause(r.ctx))
	}

	start := r.effects.Now()
	r.end.Sent, r.end.Result = true, idempotency.EffectResultUnknown
	var used wireUse
	out, err = r.protect(r.Declared.effect.Do, r.Declared.effect.Timeout, in, &used)
	r.repeated = used.keys.Load() > 1
	learned = learnedAnswer
	var parked *parkError
	var notSent *notSentError
	switch {
	case err == nil:
		return r.done(out)
	case errors.Is(err, ErrDeclined):
		return r.declined(start, err)
	case errors.As(err, &parked):
		return r.park(parked.reason(), err)
	}
	learned = learnedUnknown
	var panicked *idempotency.PanicError
	switch {
	case errors.As(err, &notSent) && !r.repeated && !(notSent.dial && used.connected.Load()):
		r.end.Sent = false
		return r.unsentOnce(once, "it could not be sent", err)
	case once && r.Declared.effect.Lookup == nil:
		return r.maybe(err)
	case errors.As(err, &panicked) && r.effect.Panics+1 >= PanicsMax:
		return r.lapse(idempotency.EffectResultParked, "", err, idempotency.Lapse{
			Panicked: r.effect.Name, Parked: r.reason(fmt.Sprintf("its call panicked %d times", PanicsMax)),
		})
	case panicked != nil:
		return r.lapse(idempotency.EffectResultUnknown, "its call panicked", err, idempotency.Lapse{Panicked: r.effect.Name})
	}
	return r.lapse(idempotency.EffectResultUnknown, "its result is not known", err, idempotency.Lapse{})
}

var (
	errBreaker = fmt.Errorf("%d results in a row were unknown, and one call at a time tries again", breakerUnknownMax)
	errLate    = errors.New("half of the lease has passed, or the handler has returned")
)

// wireUse records whether net/http got a connection for a send, and how often it wrote the
// request's key.
type wireUse struct {
	connected atomic.Bool  // it got a connection
	keys      atomic.Int32 // the number of times that it wrote a header with the derived key
}

// protect calls Do or Lookup, and turns a panic into an error.
func (r *run[In, Out]) protect(call func(context.Context, string, In) (Out, error), timeout time.Duration, in In, used *wireUse) (out Out, err error) {
	ctx, cancel := context.WithTimeout(r.ctx, timeout)
	defer cancel()
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) { used.connected.Store(true) },
		WroteHeaderField: func(_ string, values []string) {
			if slices.Contains(values, r.effect.DerivedKey) {
				used.keys.Add(1)
			}
		},
	})
	defer func() {
		if value := recover(); value != nil {
			err = &idempotency.PanicError{Value: value, Stack: debug.Stack()}
		}
	}()
	return call(ctx, r.effect.DerivedKey, in)
}

// quiet reports whether no earlier send can be under way any more at this time.
func (r *run[In, Out]) quiet(start time.Time) bool {
	return start.Sub(r.effects.GivenUp(r.effect, r.Declared.effect.Timeout)) >= r.Declared.effect.SettleAfter
}

// done records the output. If that can't be recorded, the effect is recorded as done without it:
// otherwise a later run would send the call again, and pay twice if KeyLifetime is wrong. Then the
// request is left to a person, who can see the output at the other service.
func (r *run[In, Out]) done(out Out) (Out, error) {
	output, err := encodeOutput(out)
	return r.record(idempotency.EffectDone, output, err)
}

// declined records a no if it is final. A no to a repeated send is not final, unless the other
// service keeps it under the key: an earlier send may still be under way, and succeed. net/http
// repeats a request with an Idempotency-Key header by itself if a reused connection breaks. Then the
// earlier send is one of this run, so the doubt of this run stays.
func (r *run[In, Out]) declined(start time.Time, no error) (Out, error) {
	switch {
	case r.Declared.effect.KeepsDeclines:
	case r.repeated:
		return r.lapse(idempotency.EffectResultUnknown, "it was sent twice, so its decline is not final", no, idempotency.Lapse{})
	case r.end.Resumed && !r.quiet(start):
		return r.lapse(idempotency.EffectResultUnknown, "an earlier send may be under way, so its decline is not final", no, r.doubtless(r.end.Sent))
	}
	var declined *DeclinedError
	var detail []byte
	if errors.As(no, &declined) && len(declined.Detail) <= OutputBytesMax {
		detail = declined.Detail
	}
	return r.record(idempotency.EffectDeclined, detail, no)
}

// maybe ends an effect that is sent at most once, if its result is lost.
func (r *run[In, Out]) maybe(cause error) (Out, error) {
	if r.Declared.effect.MaybeParks {
		return r.park("it may have been made, and is never sent twice", cause)
	}
	return r.record(idempotency.EffectMaybe, nil, cause)
}

// record settles the effect, and returns the result from the record, as a later run gets it.
func (r *run[In, Out]) record(state idempotency.EffectState, output []byte, cause error) (out Out, err error) {
	r.effect.State, r.effect.Output = state, output
	if err := r.effects.Settle(r.effect); err != nil {
		r.end.Result, r.end.Err = idempotency.EffectResultUnknown, errors.Join(cause, err)
		if errors.Is(err, idempotency.ErrFenced) {
			r.end.Result = idempotency.EffectResultFenced
		}
		return out, fmt.Errorf("effect %s: %w", r.end.Name, err)
	}
	r.end.Err = cause
	return r.recorded()
}

// unsentOnce does what unsent does, unless this run is the only one that may send the effect. Then
// it was not sent and never will be, which is a decline.
func (r *run[In, Out]) unsentOnce(once bool, reason string, cause error) (Out, error) {
	if once && !r.end.Resumed {
		return r.record(idempotency.EffectDeclined, nil, cause)
	}
	return r.unsent(reason, cause)
}

// unsent leaves the effect as it was before this run.
func (r *run[In, Out]) unsent(reason string, cause error) (Out, error) {
	return r.lapse(idempotency.EffectResultNotSent, reason, cause, r.doubtless(false))
}

// doubtless returns the lapse of a run that adds no doubt. sent tells whether it sent the effect.
func (r *run[In, Out]) doubtless(sent bool) idempotency.Lapse {
	return idempotency.Lapse{Doubts: map[string]idempotency.Doubt{r.effect.Name: {At: r.effect.Doubt, Sent: sent}}}
}

// park leaves the request to a person.
func (r *run[In, Out]) park(reason string, cause error) (Out, error) {
	lapse := idempotency.Lapse{Parked: r.reason(reason)}
	if r.end.Resumed && !r.end.Sent && r.effect.State == idempotency.EffectIntended && r.effect.Output == nil {
		lapse.Doubts = r.doubtless(false).Doubts
	}
	return r.lapse(idempotency.EffectResultParked, "", cause, lapse)
}

// lapse leaves the request open.
func (r *run[In, Out]) lapse(result idempotency.EffectResult, reason string, cause error, lapse idempotency.Lapse) (out Out, err error) {
	var answered *answeredError
	if errors.As(cause, &answered) && lapse.Parked == "" { // it says nothing private
		reason += ": " + answered.Error()
	}
	lapse.Reason, lapse.Cause = cmp.Or(lapse.Parked, r.reason(reason)), cause
	r.end.Result, r.end.Err = result, cause
	r.effects.Lapse(lapse)
	if cause == nil {
		return out, fmt.Errorf("%w: %s", ErrUnsettled, lapse.Reason)
	}
	return out, fmt.Errorf("%w: %s: %w", ErrUnsettled, lapse.Reason, cause)
}

// reason returns a reason for the operator. It holds no data.
func (r *run[In, Out]) reason(reason string) string { return "effect " + r.end.Name + ": " + reason }

// encodeOutput returns the output as it is recorded, or nil.
func encodeOutput[Out any](out Out) ([]byte, error) {
	output, err := json.Marshal(out)
	switch {
	case err != nil:
		return nil, fmt.Errorf("encode the output: %w", err)
	case len(output) > OutputBytesMax:
		return nil, fmt.Errorf("its output has %d bytes, over the limit of %d", len(output), OutputBytesMax)
	}
	return output, nil
}

// encodeInput returns the input as it is recorded and sent. It must survive the way back, or a
// repeated send would not be the same.
func encodeInput[In any](in In) ([]byte, error) {
	input, err := json.Marshal(in)
	switch {
	case err != nil:
		return nil, fmt.Errorf("encode the input: %w", err)
	case len(input) > InputBytesMax:
		return nil, fmt.Errorf("%w: it has %d bytes", ErrInputTooLarge, len(input))
	}
	if _, err := decodeStrictly[In](input); err != nil {
		return nil, fmt.Errorf("decode the input again: %w", err)
	}
	return input, nil
}

// decodeStrictly refuses fields that this program does not know: without them it would send another
// input under the same key.
func decodeStrictly[T any](text []byte) (value T, err error) {
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&value); err != nil {
		return value, err
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return value, errors.New("there is more than one value")
	}
	return value, nil
}
