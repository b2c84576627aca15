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
	// after is the point that must be hit before this one can be reached; empty if there is none.
	after point
}

// noAnswer stands for a connection that was cut.
const noAnswer idempotency.Outcome = ""

const (
	executed    = idempotency.OutcomeExecuted
	replayed    = idempotency.OutcomeReplayed
	notExecuted = idempotency.OutcomeNotExecuted
	unknown     = idempotency.OutcomeUnknown
	inProgress  = idempotency.OutcomeInProgress
)

func plans() []plan {
	type outcomes = []idempotency.Outcome
	cut := outcomes{noAnswer}
	return []plan{
		{crashpoint.BeforeBegin, false, outcomes{notExecuted}, executed, ""},
		{crashpoint.AfterBegin, false, cut, executed, ""},
		{crashpoint.MidHandler, false, cut, executed, ""},
		{crashpoint.HandlerCanceled, false, outcomes{executed, notExecuted, unknown}, "", ""},
		{crashpoint.AfterHandler, false, cut, executed, ""},
		{crashpoint.BeforeCommit, false, cut, executed, ""},
		{crashpoint.MidCommit, false, cut, "", ""},
		{crashpoint.CommitCanceled, false, outcomes{executed, notExecuted, unknown}, "", ""},
		{crashpoint.CommitNeverArrived, false, outcomes{notExecuted, unknown}, executed, ""},
		{crashpoint.CommitLost, false, outcomes{executed, unknown}, replayed, ""},
		{crashpoint.Resolving, false, cut, replayed, ""},
		{crashpoint.Unresolvable, false, outcomes{unknown}, "", ""},
		{crashpoint.AfterCommit, false, cut, replayed, ""},
		{crashpoint.HalfResponse, false, cut, replayed, ""},
		{crashpoint.BeforeDecline, true, cut, executed, ""},
		{crashpoint.MidDecline, true, cut, "", ""},
		{crashpoint.DeclineNeverArrived, true, outcomes{notExecuted, unknown}, executed, ""},
		{crashpoint.DeclineLost, true, outcomes{executed, unknown}, replayed, ""},
		{crashpoint.AfterDecline, true, cut, replayed, ""},

		{crashpoint.BeforeIntent, false, cut, executed, ""},
		{crashpoint.IntentNeverArrived, false, outcomes{notExecuted, unknown}, executed, ""},
		{crashpoint.IntentLost, false, outcomes{executed, unknown}, "", ""},
		{crashpoint.BeforeSend, false, cut, executed, ""},
		{crashpoint.AfterReply, false, cut, executed, ""},
		{crashpoint.ResultNeverArrived, false, outcomes{unknown}, executed, ""},
		{crashpoint.ResultLost, false, outcomes{unknown}, executed, ""},
		{crashpoint.AfterResult, false, cut, executed, ""},
		{crashpoint.Replaced, false, outcomes{inProgress, unknown}, executed, ""},
		{crashpoint.TakeOver, false, cut, executed, crashpoint.BeforeSend},
	}
}

// ofIntent reports whether a point is at the commit of an intent or a phase, and ofResult whether
// it is at the commit of a result.
func (p plan) ofIntent() bool {
	switch p.point {
	case crashpoint.BeforeIntent, crashpoint.IntentNeverArrived, crashpoint.IntentLost, crashpoint.BeforeSend, crashpoint.TakeOver:
		return true
	}
	return false
}

func (p plan) ofResult() bool {
	switch p.point {
	case crashpoint.AfterReply, crashpoint.ResultNeverArrived, crashpoint.ResultLost, crashpoint.AfterResult, crashpoint.Replaced:
		return true
	}
	return false
}

// planOf returns the plan of a point.
func planOf(p point) plan {
	for _, other := range plans() {
		if other.point == p {
			return other
		}
	}
	return plan{}
}

// wants reports whether the request that was hit may get this outcome. If the reply to an open
// request's last COMMIT is lost, and its record is found, the request is answered as a replay.
func (p plan) wants(k *key, o idempotency.Outcome) bool {
	return slices.Contains(p.first, o) || o == replayed && k.opened.Load() && slices.Contains(p.first, executed)
}

// wantsThen reports whether a retry may get this outcome. Somebody else may have ended an open
// request.
func (p plan) wantsThen(k *key, o idempotency.Outcome) bool {
	return p.then == "" || o == p.then || o == replayed && k.opened.Load()
}

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
