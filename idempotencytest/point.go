package idempotencytest

import (
	"slices"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/crashpoint"
)

// point is a place at which an attempt is interfered with: one of those of package crashpoint.
type point string

// plan holds the expectations around a point.
type plan struct {
	point   point
	decline bool // it needs a request that the handler declines

	// first are the outcomes that the client may get for the request that was hit; noAnswer if the
	// conn must be cut.
	first []idempotency.Outcome
	// then is the final outcome for a client that retries because first did not settle the request.
	// Empty means executed or replayed.
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
		{crashpoint.BeforeBegin, false, outcomes{notExecuted}, executed},
		{crashpoint.AfterBegin, false, cut, executed},
		{crashpoint.MidHandler, false, cut, executed},
		{crashpoint.HandlerCanceled, false, outcomes{executed, notExecuted, unknown}, ""},
		{crashpoint.AfterHandler, false, cut, executed},
		{crashpoint.BeforeCommit, false, cut, executed},
		{crashpoint.MidCommit, false, cut, ""},
		{crashpoint.CommitCanceled, false, outcomes{executed, notExecuted, unknown}, ""},
		{crashpoint.CommitNeverArrived, false, outcomes{notExecuted, unknown}, executed},
		{crashpoint.CommitLost, false, outcomes{executed, unknown}, replayed},
		{crashpoint.Resolving, false, cut, replayed},
		{crashpoint.Unresolvable, false, outcomes{unknown}, ""},
		{crashpoint.AfterCommit, false, cut, replayed},
		{crashpoint.HalfResponse, false, cut, replayed},
		{crashpoint.BeforeDecline, true, cut, executed},
		{crashpoint.MidDecline, true, cut, ""},
		{crashpoint.DeclineNeverArrived, true, outcomes{notExecuted, unknown}, executed},
		{crashpoint.DeclineLost, true, outcomes{executed, unknown}, replayed},
		{crashpoint.AfterDecline, true, cut, replayed},
	}
}

// wants reports whether the request that was hit may get this outcome.
func (p plan) wants(o idempotency.Outcome) bool { return slices.Contains(p.first, o) }

// end names the points around the end of a transaction. An empty one is never reached.
type end struct {
	before, mid, canceled, neverArrived, lost, resolving, unresolvable, after, half point
}

var (
	commitEnd = end{
		before: crashpoint.BeforeCommit, mid: crashpoint.MidCommit, canceled: crashpoint.CommitCanceled,
		neverArrived: crashpoint.CommitNeverArrived, lost: crashpoint.CommitLost, resolving: crashpoint.Resolving,
		unresolvable: crashpoint.Unresolvable, after: crashpoint.AfterCommit, half: crashpoint.HalfResponse,
	}
	declineEnd = end{
		before: crashpoint.BeforeDecline, mid: crashpoint.MidDecline, neverArrived: crashpoint.DeclineNeverArrived,
		lost: crashpoint.DeclineLost, after: crashpoint.AfterDecline,
	}
)
