package client

import (
	"net/http"

	"github.com/paidonce/idempotency"
)

// seen is the result of one attempt.
type seen uint8

const (
	// The server can't have the request: no connection was made, or nothing was written.
	seenUnsent   seen = iota + 1
	seenLost          // it was sent, at least in part, and there is no whole answer
	seenAnswered      // there is a whole answer
)

// fact is the knowledge after one attempt.
type fact struct {
	seen       seen
	hopeless   bool                // it was not sent, and another try would end the same way
	outcome    idempotency.Outcome // of an answer: its Idempotency-Status, or empty
	status     int                 // of an answer
	bodyUnread bool                // of an answer: the server says that the body did not arrive whole
	// Of a pending answer: the server says that only a person can settle the request.
	needsAttention bool
	// The server honours keys: Options.Honours says so, or its answers have shown it.
	honoured bool
	// An earlier attempt of this call, or of another call with the key, may have been executed.
	maybe bool
}

// step is the next step.
type step struct {
	// Send the same bytes with the same key again. If false, the caller gets this attempt's answer.
	again bool
	leave bool // the caller gets an error, because asking again soon would not help
	maybe bool // this attempt, or another with its key, may have been executed
}

// decide is the only function that branches on the result of an attempt. docs/client.md has the
// same table in words.
func decide(f fact) step {
	switch f.seen {
	case seenUnsent:
		return step{again: !f.hopeless}
	case seenLost:
		return step{again: f.honoured, maybe: true}
	}
	switch f.outcome {
	case idempotency.OutcomeExecuted, idempotency.OutcomeReplayed, idempotency.OutcomeMismatch:
		return step{}
	case idempotency.OutcomeNotExecuted:
		// The answer describes the request that it answers, and not an earlier one
		// (docs/decisions/0007). If an earlier one may have been executed, only executed or
		// replayed ends the call.
		return step{again: f.maybe || passing(f.status) || f.bodyUnread}
	case "":
		// The answer is not from the middleware: the server does not use it, or something in front
		// of the server answered. Nothing is proven. A success is never retried: it is the best
		// sign that the server does not honour keys. A redirect is not retried either, and a client
		// that follows it sends a request with another key.
		switch {
		case f.status < 300 || !f.honoured:
			return step{}
		case passing(f.status):
			return step{again: true, maybe: true}
		}
		return step{again: f.maybe}
	}
	if f.outcome == idempotency.OutcomePending && f.needsAttention {
		return step{leave: true, maybe: true}
	}
	// In progress, pending, unknown, and whatever a later release may say.
	return step{again: true, maybe: true}
}

// passing reports whether a refusal may be a different answer in a moment.
func passing(status int) bool {
	switch status {
	// 499 is a canceled call.
	case http.StatusRequestTimeout, http.StatusConflict, http.StatusTooEarly, http.StatusTooManyRequests, 499:
		return true
	}
	return status >= 500
}

// settles reports whether an answer settles its key: the request need not be sent again, whatever
// earlier attempts got.
func settles(outcome idempotency.Outcome) bool {
	switch outcome {
	case idempotency.OutcomeExecuted, idempotency.OutcomeReplayed, idempotency.OutcomeMismatch:
		return true
	}
	return false
}
