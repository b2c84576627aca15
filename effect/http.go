package effect

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"

	"github.com/paidonce/idempotency"
)

// DeclineBodyBytesMax is the maximum number of bytes that [FromHTTP] reads and keeps of the body of
// a declining response.
const DeclineBodyBytesMax = 8 << 10

// HTTPDetail is the detail of a decline by [FromHTTP].
type HTTPDetail struct {
	Status int    `json:"status"`
	Body   string `json:"body"` // at most [DeclineBodyBytesMax] bytes
}

// FromHTTP turns the results of [net/http.Client.Do] into the error that the Do of an effect must
// return. It returns nil for a 2xx: then Do reads the body, and returns the error if it can't read
// all of it.
//
//	no connection                            NotSent
//	2xx                                      nil
//	400, 402, 404, 422                       Declined, with an HTTPDetail
//	those, if they are about a reused key    Park
//	409, 425, 429, 3xx, 5xx, others          unknown: again later, with the same key
//	timeout, cut off, any other error        unknown
//
// A response with an Idempotency-Status header comes from a service that uses this module, and says
// more: executed and replayed 4xx are Declined, mismatch is Park, not-executed is NotSent. An error
// of package client that is ErrNotExecuted is NotSent too.
//
// The request must have the context of Do, which shows whether the request got a connection before
// it failed to dial another. The client must not follow redirects (CheckRedirect:
// [net/http.ErrUseLastResponse]): the failure of the second request would hide the first. FromHTTP
// does not close the body. net/http may have sent the request twice: see [Effect.Do].
func FromHTTP(resp *http.Response, err error) error {
	var executed interface{ NotExecuted() bool }
	var op *net.OpError
	switch {
	case errors.As(err, &executed):
		if executed.NotExecuted() {
			return NotSent(err)
		}
		return err
	case errors.As(err, &op) && op.Op == "dial":
		return &notSentError{err: err, dial: true}
	case err != nil:
		return err
	case resp == nil:
		return errors.New("there is no response")
	}
	said := &answeredError{resp.StatusCode}
	outcome := idempotency.Outcome(resp.Header.Get("Idempotency-Status"))
	final := false
	switch outcome {
	case "":
		switch resp.StatusCode {
		case http.StatusBadRequest, http.StatusPaymentRequired, http.StatusNotFound, http.StatusUnprocessableEntity:
			final = true
		}
	case idempotency.OutcomeExecuted, idempotency.OutcomeReplayed:
		final = resp.StatusCode >= 400 && resp.StatusCode < 500
	case idempotency.OutcomeMismatch:
		return Park("the other service has another request under its key", fmt.Errorf("%w %s", said, outcome))
	case idempotency.OutcomeNotExecuted:
		return NotSent(fmt.Errorf("%w %s", said, outcome))
	default: // in progress, unknown, and whatever a later release may say
		return fmt.Errorf("%w %s", said, outcome)
	}
	switch {
	case resp.StatusCode >= 200 && resp.StatusCode < 300:
		return nil
	case !final:
		return said
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, DeclineBodyBytesMax))
	if err != nil { // it may have been about the key
		return fmt.Errorf("%w, and its body was cut off: %w", said, err)
	}
	if outcome == "" && aboutTheKey(body) {
		return Park("the other service says that its key was used with other parameters", said)
	}
	return Declined(said, HTTPDetail{Status: resp.StatusCode, Body: string(body)})
}

// answeredError is an answer that is not 2xx. Its text may be recorded.
type answeredError struct{ status int }

func (e *answeredError) Error() string { return fmt.Sprintf("the other service answered %d", e.status) }

// aboutTheKey reports whether a refusal says that the key was used before with another request,
// such as "idempotency_error" and "IDEMPOTENCY_KEY_REUSED".
func aboutTheKey(body []byte) bool {
	body = bytes.ToLower(body)
	if !bytes.Contains(body, []byte("idempoten")) {
		return false
	}
	for _, word := range []string{"idempotency_error", "reuse", "used", "mismatch", "differ", "conflict", "other param"} {
		if bytes.Contains(body, []byte(word)) {
			return true
		}
	}
	return false
}
