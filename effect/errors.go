package effect

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/paidonce/idempotency"
)

// The errors of a Call.
var (
	// ErrDeclined is a definite no of the other service: nothing was done, and nothing will be. It
	// is recorded, so every later run of the handler gets it too. [errors.As] finds the
	// [DeclinedError] with its detail.
	ErrDeclined = errors.New("declined")

	// ErrMaybe means that an effect that is sent at most once may have been made, and that nobody
	// will find out. It is recorded. The handler goes on, and says so in its answer.
	ErrMaybe = errors.New("may or may not have been made")

	// ErrUnsettled means that the result is not known yet. The handler returns; whatever it answers
	// is dropped, and the request stays open.
	ErrUnsettled = idempotency.ErrUnsettled

	// ErrInputTooLarge means that an input is over InputBytesMax. Nothing was sent, and the answer
	// of the handler is dropped: check what comes from a client before the call.
	ErrInputTooLarge = fmt.Errorf("input is over the limit of %d bytes", InputBytesMax)
)

// ErrAbsent is returned by a Lookup that found nothing.
var ErrAbsent = errors.New("absent")

// DeclinedError is the no of another service. The Detail is what counts: it is the same in every
// run of the handler, while the error that Do returned is not recorded.
type DeclinedError struct {
	Effect string          // the name of the effect
	Detail json.RawMessage // as given to [Declined]; empty if there was none

	err error // of Do
}

// Error returns the name of the effect, and the error of Do for Do's own caller.
func (e *DeclinedError) Error() string {
	text := "declined"
	if e.Effect != "" {
		text = "effect " + e.Effect + ": declined"
	}
	if e.err != nil {
		text += ": " + e.err.Error()
	}
	return text
}

// Is reports whether target is [ErrDeclined].
func (e *DeclinedError) Is(target error) bool { return target == ErrDeclined }

// Unwrap returns the error that was given to [Declined].
func (e *DeclinedError) Unwrap() error { return e.err }

// Declined returns the error for a definite no: the other service did nothing, and will do nothing
// under this key. err says why, for logs. The detail is recorded as JSON, and the handler finds it
// in the [DeclinedError], in this run and in later ones. It may be nil; one that can't be encoded or
// is over OutputBytesMax is left out, because the no counts more.
func Declined(err error, detail any) error {
	declined := &DeclinedError{err: err}
	if detail == nil {
		return declined
	}
	if encoded, err := json.Marshal(detail); err == nil && len(encoded) <= OutputBytesMax {
		declined.Detail = encoded
	}
	return declined
}

// NotSent returns the error for a request that provably did not reach the other service, or that it
// provably did not begin to serve. If in doubt, return err itself.
func NotSent(err error) error { return &notSentError{err: err} }

type notSentError struct {
	err  error
	dial bool // no connection could be made; not true if the request got another one before
}

func (e *notSentError) Error() string { return fmt.Sprintf("not sent: %v", e.err) }
func (e *notSentError) Unwrap() error { return e.err }

// Park returns the error for a call that no repetition settles: the other service says that the key
// was used with other parameters, for example. The request is left to a person.
func Park(err error) error { return &parkError{err} }

type parkError struct{ err error }

func (e *parkError) Error() string { return fmt.Sprintf("only a person can go on: %v", e.err) }
func (e *parkError) Unwrap() error { return e.err }
