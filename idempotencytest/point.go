package idempotencytest

import (
	"slices"

	"github.com/paidonce/idempotency"
)

// point is a place at which one attempt is interfered with.
type point string

// The points, in the order in which an attempt comes to them. Where nothing else is said the process dies: the attempt
// is rolled back and its client gets no answer.
const (
	beforeBegin        point = "before_begin"         // the store is unavailable
	afterBegin         point = "after_begin"          // the key is claimed
	midHandler         point = "mid_handler"          // the handler's context ends at one of its uses
	handlerCanceled    point = "handler_canceled"     // the same, but the process lives on
	afterHandler       point = "after_handler"        // the handler has returned
	beforeCommit       point = "before_commit"        // COMMIT was not sent
	midCommit          point = "mid_commit"           // COMMIT's context ends at one of its uses: it may or may not happen
	commitCanceled     point = "commit_canceled"      // the same, but the process lives on
	commitNeverArrived point = "commit_never_arrived" // COMMIT was sent and is lost on its way; the process lives on
	commitLost         point = "commit_lost"          // COMMIT happened and its reply is lost; the process lives on
	resolving          point = "resolving"            // the same, and it dies while it looks what became of COMMIT
	unresolvable       point = "unresolvable"         // COMMIT or its reply is lost, and the look for it fails
	afterCommit        point = "after_commit"         // nothing was sent to the client
	halfResponse       point = "half_response"        // half of the answer's body was sent

	beforeDecline       point = "before_decline"
	midDecline          point = "mid_decline"
	declineNeverArrived point = "decline_never_arrived"
	declineLost         point = "decline_lost"
	afterDecline        point = "after_decline"
)

// plan is what is expected around a point.
type plan struct {
	point   point
	decline bool // it needs a request that the handler declines

	// first is what the client may hear of the request that was hit; noAnswer where the connection must be cut.
	first []idempotency.Outcome
	// then is what a client that goes on hears in the end, where first was not it; empty where both may be.
	then idempotency.Outcome
}

// noAnswer stands for a connection that was cut.
const noAnswer idempotency.Outcome = ""

const (
	executed    = idempotency.OutcomeExecuted
	replayed    = idempotency.OutcomeReplayed
	notExecuted = idempotency.OutcomeNotExecuted
	unknown     = idempotency.OutcomeUnknown
)

func plans() []plan {
	type outcomes = []idempotency.Outcome
	cut := outcomes{noAnswer}
	return []plan{
		{beforeBegin, false, outcomes{notExecuted}, executed},
		{afterBegin, false, cut, executed},
		{midHandler, false, cut, executed},
		{handlerCanceled, false, outcomes{executed, notExecuted, unknown}, ""},
		{afterHandler, false, cut, executed},
		{beforeCommit, false, cut, executed},
		{midCommit, false, cut, ""},
		{commitCanceled, false, outcomes{executed, notExecuted, unknown}, ""},
		{commitNeverArrived, false, outcomes{notExecuted, unknown}, executed},
		{commitLost, false, outcomes{executed, unknown}, replayed},
		{resolving, false, cut, replayed},
		{unresolvable, false, outcomes{unknown}, ""},
		{afterCommit, false, cut, replayed},
		{halfResponse, false, cut, replayed},
		{beforeDecline, true, cut, executed},
		{midDecline, true, cut, ""},
		{declineNeverArrived, true, outcomes{notExecuted, unknown}, executed},
		{declineLost, true, outcomes{executed, unknown}, replayed},
		{afterDecline, true, cut, replayed},
	}
}

// wants reports whether the request that was hit may be told so.
func (p plan) wants(o idempotency.Outcome) bool { return slices.Contains(p.first, o) }

// end names the points around the end of a transaction. An empty one is never met.
type end struct {
	before, mid, canceled, neverArrived, lost, resolving, unresolvable, after, half point
}

var (
	commitEnd = end{
		before: beforeCommit, mid: midCommit, canceled: commitCanceled, neverArrived: commitNeverArrived, lost: commitLost,
		resolving: resolving, unresolvable: unresolvable, after: afterCommit, half: halfResponse,
	}
	declineEnd = end{
		before: beforeDecline, mid: midDecline, neverArrived: declineNeverArrived, lost: declineLost, after: afterDecline,
	}
)
