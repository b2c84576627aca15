package client

import (
	"net/http"

	"github.com/paidonce/idempotency"
)

// seen is what one attempt brought.
type seen uint8

const (
	seenUnsent   seen = iota + 1 // the server can't have it: no connection was got, or nothing was written
	seenLost                     // it was sent, at least in part, and there is no whole answer
	seenAnswered                 // there is a whole answer
)

// fact is what is known after one attempt.
type fact struct {
	seen       seen
	hopeless   bool                // it was not sent, and another try would end the same way
	outcome    idempotency.Outcome // of an answer: its Idempotency-Status, empty where there is none
	status     int                 // of an answer
	bodyUnread bool                // of an answer: the server says that the body did not arrive whole
	honoured   bool                // the server honours keys: somebody said so, or it has shown it
	maybe      bool                // an earlier attempt of this call may have been executed, or one of another call with the key
}

// step is what follows.
type step struct {
	again bool // send the same bytes with the same key again; else this attempt's answer is the caller's
	maybe bool // this attempt may have been executed, or another with its key
}

// decide is the one place that branches on what an attempt brought. docs/client.md holds the same table in words.
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
		// It speaks of the request that it answers, and not of an earlier one (docs/decisions/0007): there is an end only
		// with executed or replayed once that may have been executed.
		return step{again: f.maybe || passing(f.status) || f.bodyUnread}
	case "":
		// No word of the middleware: a server without one, or something in front of it. Nothing is proven. A success is never
		// asked for again: it is the best sign that nobody there honours keys. A redirect is none, and who follows it makes a
		// request with another key.
		switch {
		case f.status < 300 || !f.honoured:
			return step{}
		case passing(f.status):
			return step{again: true, maybe: true}
		}
		return step{again: f.maybe}
	}
	// In progress, unknown, and whatever a later release may say.
	return step{again: true, maybe: true}
}

// passing reports whether a refusal may be another one in a moment.
func passing(status int) bool {
	switch status {
	case http.StatusRequestTimeout, http.StatusConflict, http.StatusTooEarly, http.StatusTooManyRequests, 499: // a canceled call
		return true
	}
	return status >= 500
}

// settles reports whether an answer ends its key's story: nobody need send it again, whatever went before.
func settles(outcome idempotency.Outcome) bool {
	switch outcome {
	case idempotency.OutcomeExecuted, idempotency.OutcomeReplayed, idempotency.OutcomeMismatch:
		return true
	}
	return false
}
