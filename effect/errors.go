package effect

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/paidonce/idempotency"
)

// The errors of a Call.
var (
	// ErrDeclined is a definite no of the other service: it did nothing, and will do nothing. It is
	// recorded, so every later run of the handler gets it too. [errors.As] finds the [DeclinedError]
	// with its detail.
	ErrDeclined = idempotency.ErrDeclined

	// ErrMaybe means that an effect that is sent at most once may or may not have been made, and that
	// the handler will never know. It is recorded. The handler goes on, and should say so in its
	// answer.
	ErrMaybe = errors.New("may or may not have been made")

	// ErrUnsettled means that the result is not known yet. The handler should return: its answer is
	// dropped, and the request stays open.
	ErrUnsettled = idempotency.ErrUnsettled

	// ErrInputTooLarge means that an input is over InputBytesMax. Nothing was sent, and the handler's
	// answer is dropped: check the size of a client's data before the call.
	ErrInputTooLarge = fmt.Errorf("input is over the limit of %d bytes", InputBytesMax)
)

// ErrAbsent is returned by a Lookup that found nothing.
var ErrAbsent = errors.New("absent")

// DeclinedError is the no of another service or of a phase. Decide by its Detail: it is the same in
// every run of the handler. The error that Do returned is not recorded.
type DeclinedError = idempotency.DeclinedError

// Declined returns the error for a definite no: the other service did nothing, and will do nothing
// under this key. err says why, for logs. The detail is recorded as JSON, and the handler finds it
// in the [DeclinedError], in this run and in later ones. It may be nil. A detail that can't be
// encoded or is over OutputBytesMax is left out, because the no matters more.
//
// The function of a phase (postgres.Phase) returns it too, to undo its writes by a decision that no
// later run can change.
func Declined(err error, detail any) error {
	declined := &DeclinedError{Err: err}
	if detail == nil {
		return declined
	}
	if encoded, err := json.Marshal(detail); err == nil && len(encoded) <= OutputBytesMax {
		declined.Detail = encoded
	}
	return declined
}

// NotSent returns the error for a request that provably did not reach the other service, or that
// the service provably did not begin to serve. If in doubt, return err itself.
func NotSent(err error) error { return &notSentError{err: err} }

type notSentError struct {
	err  error
	dial bool // no connection could be made; it counts only if the request got no other connection before
}

func (e *notSentError) Error() string { return fmt.Sprintf("not sent: %v", e.err) }
func (e *notSentError) Unwrap() error { return e.err }

// ParkBytesMax is the maximum length of the reason of [Park]; the rest is cut off.
const ParkBytesMax = 200

// Park returns the error for a call that sending it again can't settle: the other service says that
// the key was used with other parameters, for example. The request is left to a person, who reads
// the reason (idemctl effect get): it is recorded, so it must be a text of the program's own,
// without private data. err is only for logs, and may be nil.
func Park(reason string, err error) error { return &parkError{text: reason, err: err} }

type parkError struct {
	text string
	err  error
}

func (e *parkError) Error() string {
	if e.err == nil {
		return "only a person can go on: " + e.reason()
	}
	return fmt.Sprintf("only a person can go on: %s: %v", e.reason(), e.err)
}

func (e *parkError) Unwrap() error { return e.err }

// reason returns the text as it is recorded.
func (e *parkError) reason() string {
	text := strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, e.text)
	if len(text) > ParkBytesMax {
		text = strings.ToValidUTF8(text[:ParkBytesMax], "")
	}
	return text
}
