package client

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/paidonce/idempotency"
)

// The two possible states of a request that has no answer. An [*Error] is one of them.
var (
	// ErrNotExecuted is proof: no request with the key has left or will leave anything in the
	// server's database, and no handler has called idempotency.DerivedKey for a call to another
	// service. The caller may give up, or make a new request with a new key.
	ErrNotExecuted = errors.New("not executed")
	// ErrUnknown means that the request may or may not have been executed. The caller keeps the
	// key, retries with it later, and never makes a new one for the same purpose.
	ErrUnknown = errors.New("may or may not have been executed")
)

// The reasons for which a [Transport] stops retrying. An [*Error] wraps one of these, the error of
// the request's context, that of an [IntentStore], or a fault of the request.
var (
	ErrAttemptsSpent   = errors.New("attempts are spent (Options.AttemptsMax)")
	ErrTimeSpent       = errors.New("time is spent (Options.TotalMax)")
	ErrRetriesSpent    = errors.New("retries of all requests are spent (Options.RetryPercent, RetriesPerSecond and RetryBurst)")
	ErrNotHonoured     = errors.New("server is not known to honour keys, so it is not asked again (Options.Honours: client.Everywhere if all routes of this client do)")
	ErrAttemptTimedOut = errors.New("attempt took too long (Options.AttemptTimeout)")
	ErrBodyTooLarge    = errors.New("body is too large to be sent again (Options.BodyBytesMax)")
	ErrIntentTooOld    = errors.New("intent is too old to be sent again (Options.IntentAgeMax)")
	ErrIntentRefused   = errors.New("intent is not kept") // IntentStore.Save
	ErrIntentDifferent = fmt.Errorf("%w: its key is kept with another request", ErrIntentRefused)
	ErrIntentTaken     = errors.New("somebody else has taken the intent") // IntentStore.Abandon
)

// A caller gets an Error in place of an answer. [errors.Is] tells [ErrNotExecuted] from
// [ErrUnknown], and [errors.As] finds it under the [*net/url.Error] of an [net/http.Client].
//
// Its text never shows the key, nor do the verbs of fmt: Key prints as a hash. Pass Key.Value to
// [WithKey] to continue, even in another process.
type Error struct {
	Outcome idempotency.Outcome // idempotency.OutcomeNotExecuted or idempotency.OutcomeUnknown
	Key     idempotency.Key     // only Value is set: the client does not know the server's scope
	// Started is the time before the first attempt. The server keeps a key for a time, 24 hours by
	// default.
	Started  time.Time
	Attempts int                 // how many requests this call made
	Status   int                 // of the last answer, 0 if there was none
	Last     idempotency.Outcome // of the last answer, empty if there was none or it has no outcome
	Err      error               // why there is no answer

	// Accepted means that the server has promised to end the request by itself, whatever this caller
	// does. The caller may stop asking, but must never make a new key for the same purpose. Only with
	// ErrUnknown.
	Accepted bool
}

// Error returns the state of the request and the reason for the end.
func (e *Error) Error() string {
	var text strings.Builder
	text.WriteString("idempotency/client: request ")
	text.WriteString(e.kind().Error())
	if e.Attempts > 0 {
		fmt.Fprintf(&text, " after %d attempt(s)", e.Attempts)
	}
	if e.Status > 0 {
		text.WriteString(", the last answered with " + strconv.Itoa(e.Status))
	}
	if e.Last != "" {
		text.WriteString(" " + string(e.Last))
	}
	if e.Accepted {
		text.WriteString(", accepted")
	}
	text.WriteString(": " + e.Err.Error())
	return text.String()
}

func (e *Error) kind() error {
	if e.Outcome == idempotency.OutcomeNotExecuted {
		return ErrNotExecuted
	}
	return ErrUnknown
}

// Format keeps the key out of every verb of fmt. It drops the error, for which fmt has no use.
func (e *Error) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, e.Error()) }

// Is reports whether target is the state of the request: [ErrNotExecuted] or [ErrUnknown].
func (e *Error) Is(target error) bool { return target == e.kind() }

// NotExecuted reports whether the state is [ErrNotExecuted], for packages that do not import this
// one, such as effect.
func (e *Error) NotExecuted() bool { return e.Outcome == idempotency.OutcomeNotExecuted }

// Unwrap returns the reason for the end.
func (e *Error) Unwrap() error { return e.Err }
