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

// DeclineBodyBytesMax is the part of a declining response's body that [FromHTTP] reads and keeps.
const DeclineBodyBytesMax = 8 << 10

// HTTPDetail is the detail of a decline by [FromHTTP].
type HTTPDetail struct {
	Status int    `json:"status"`
	Body   string `json:"body"` // at most [DeclineBodyBytesMax] bytes
}

// FromHTTP returns the error that Do must return for what [net/http.Client.Do] returned, and nil for
// a 2xx, whose body is the caller's: if it can't be read whole, Do returns the error of reading it.
//
//	no connection                            NotSent
//	2xx                                      nil
//	400, 402, 404, 422                       Declined, with an HTTPDetail
//	those, about a key that was used before  Park
//	409, 425, 429, 3xx, 5xx, others          unknown: again later, with the same key
//	timeout, cut off, any other error        unknown
//
// A response with an Idempotency-Status header comes from a service that uses this module, and says
// more: executed and replayed 4xx are Declined, mismatch is Park, not-executed is NotSent. So is an
// error of package client that is ErrNotExecuted.
//
// The request must have the context of Do, which shows whether a connection was got before another
// one failed. The client must not follow redirects (CheckRedirect: [net/http.ErrUseLastResponse]):
// the failure of the second request would hide the first. FromHTTP does not close the body.
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
	said := fmt.Errorf("the other service answered %d", resp.StatusCode)
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
		return Park(fmt.Errorf("%w %s", said, outcome))
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
		return Park(fmt.Errorf("%w: the key was used with other parameters", said))
	}
	return Declined(said, HTTPDetail{Status: resp.StatusCode, Body: string(body)})
}

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
