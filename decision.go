package idempotency

import (
	"errors"
	"sync/atomic"
)

// Outcome is the result of a request. On the wire it is the value of Idempotency-Status.
type Outcome string

// The outcomes. A client branches on these, never on the status code: a handler has 409s and 422s
// of its own.
const (
	// OutcomeExecuted: this attempt ran, and its answer is recorded if there is a key.
	OutcomeExecuted   Outcome = "executed"
	OutcomeReplayed   Outcome = "replayed"    // an earlier attempt's answer, repeated
	OutcomeInProgress Outcome = "in-progress" // another attempt is running
	OutcomeMismatch   Outcome = "mismatch"    // the key belongs to a different request
	// OutcomeNotExecuted is proven: this request left nothing in the database, and did not call
	// DerivedKey.
	OutcomeNotExecuted Outcome = "not-executed"
	// OutcomeUnknown: the request may or may not have been executed; keep the key and ask again.
	OutcomeUnknown Outcome = "unknown"
	// OutcomePending is OutcomeUnknown for a client that prefers not to wait: the request is accepted,
	// and a status resource will have its answer. Adapters answer it instead of an OutcomeUnknown that
	// is Accepted. No [Result] has it.
	OutcomePending Outcome = "pending"
)

// Reason says why a request did not get a handler's answer. On the wire it is the end of a problem
// document's type.
type Reason string

// The reasons. The first group is for adapters: requests that they refuse before they call the
// engine, replays that the caller is not allowed to see, and new keys over the caller's quota. The
// engine gives the second group.
const (
	ReasonKeyMissing    Reason = "key-missing"
	ReasonKeyInvalid    Reason = "key-invalid"
	ReasonScope         Reason = "scope"
	ReasonBodyTooLarge  Reason = "body-too-large"
	ReasonBodyUnread    Reason = "body-unread"
	ReasonMediaType     Reason = "media-type"
	ReasonReplayDenied  Reason = "replay-denied"
	ReasonQuotaExceeded Reason = "quota-exceeded"

	ReasonKeyReused       Reason = "key-reused"
	ReasonInProgress      Reason = "in-progress"
	ReasonHandlerFailed   Reason = "handler-failed"
	ReasonTransactionLost Reason = "transaction-lost"
	ReasonUnavailable     Reason = "unavailable"
	ReasonOutcomeUnknown  Reason = "outcome-unknown"
	ReasonCallUnknown     Reason = "call-unknown"
	ReasonNeedsAttention  Reason = "needs-attention" // the request is open, and only a person can end it
	ReasonRecordCorrupt   Reason = "record-corrupt"

	// reasonOfRefusal stands in the decision table for the reason of the [Refusal]. No result has
	// it.
	reasonOfRefusal Reason = "(its own)"
)

// Disposition is the meaning of an answer for the transaction. A policy maps an answer to it; see
// [DefaultDisposition].
type Disposition uint8

// The dispositions.
const (
	// DispositionForget undoes the handler's writes and records nothing: a retry runs again.
	DispositionForget  Disposition = iota
	DispositionCommit              // commit the handler's writes with the answer
	DispositionDecline             // undo the handler's writes, keep the answer
)

// DefaultDisposition looks only at the status. It commits 2xx and 3xx and declines 4xx. It forgets
// answers that a retry may change: 401, 403, 407, 408, 421, 425, 429, 499 (a canceled call, as
// gateways and gRPC spell it) and every other status.
func DefaultDisposition(answer Answer) Disposition {
	switch answer.Status {
	case 401, 403, 407, 408, 421, 425, 429, 499:
		return DispositionForget
	}
	switch {
	case answer.Status >= 200 && answer.Status < 400:
		return DispositionCommit
	case answer.Status >= 400 && answer.Status < 500:
		return DispositionDecline
	}
	return DispositionForget
}

// fact is a fact about a request at one of its turning points: after the claim or a wait for
// another attempt, after the handler, after the end of the transaction, and after the look-up that
// follows a lost reply to COMMIT.
type fact uint8

// The facts.
const (
	factRunsHere           fact = iota + 1 // the key's handler runs in this process; no store called
	factClaimed                            // no record; the claim is ours
	factInProgress                         // no record; claim held by another; no wait, or no longer
	factAwaited                            // no record; claim held by another; the request may wait
	factTurn                               // the awaited attempt left this request no answer
	factRecordedSame                       // a record of this very request
	factRecordedOther                      // a record of a different request
	factRecordedUnreadable                 // a record is unreadable, not safe yet, or may be hidden
	factRecordCorrupt                      // a record that somebody has changed
	factUnavailable                        // no connection, or a failure before COMMIT was sent
	factSerialization                      // 40001, 40P01, or a migration made a plan stale; any step
	factRestartsSpent                      // another restart was due, and none is left
	factRecordUnread                       // unavailable or spent; another attempt recorded the key

	factAnsweredCommit  // the handler answered; the policy keeps answer and writes
	factAnsweredDecline // the handler answered; the policy keeps the answer, without the writes
	factAnsweredForget  // the handler answered; the policy keeps nothing
	factRefused         // the adapter's function returned a Refusal: the handler did not run
	// The handler or a policy panicked, the answer can't be recorded, or the transaction is
	// aborted.
	factHandlerFailed
	factTransactionLost // the handler ended the transaction behind our back

	factCommitted     // COMMIT returned
	factDeclined      // COMMIT of the answer, without the writes, returned
	factForgotten     // ROLLBACK, after an answer that is not recorded
	factKeyRecorded   // our INSERT found another attempt's record
	factCommitAborted // the database refused COMMIT: a deferred constraint, for example
	factDeclineFailed // the answer of a decline was not recorded; its writes are undone too
	factCommitUnknown // COMMIT was sent and its reply is missing

	factResolvedOurs   // the store has this attempt's record
	factResolvedAbsent // the store proves that nothing was recorded

	factCallForgotten // Forgotten, and a run of the request asked for a derived key
	factCallUnknown   // another end without a record; a run of the request called DerivedKey
	factOpen          // a record of this very request, which is open
	factTakenOver     // the open request is ours now
	factBackingOff    // the open request is not due yet, or belongs to another handler; nobody runs it
	factParked        // the open request waits for a person
	factUnsettled     // the request is open, and this run does not end it
	factContradiction // the request is open; its answer does not fit its effects, or it must not run again
	factFenced        // the request is open, and another owner has taken it over

	factOutcomeUnknown // the outcome of the request could not be found out
)

// action is the engine's response to a fact.
type action uint8

// The actions.
const (
	actionRun      action = iota + 1 // run the handler
	actionWait                       // wait for the other attempt
	actionClaim                      // claim the key
	actionReplay                     // answer with the record
	actionCommit                     // record the answer and commit it with the handler's writes
	actionDecline                    // undo the handler's writes; record the answer and commit it
	actionForget                     // undo the handler's writes and give its answer to the client
	actionAnswer                     // give the handler's answer to the client
	actionRestart                    // undo everything and claim again
	actionResolve                    // look the outcome of COMMIT up in the store
	actionTakeOver                   // become the owner of the open request
	actionLeave                      // undo an open transaction, and leave the request open for later
	actionPark                       // undo an open transaction, and leave the request open for a person
	actionRefuse                     // undo an open transaction and answer a problem
)

// decision is one row of the table: the action, and the client's outcome and reason if the action
// ends the request.
type decision struct {
	action  action
	outcome Outcome
	reason  Reason
}

// decide is the state machine of a key: the one place that branches on the facts about a request.
// Everything else finds facts or carries out actions. docs/state-machine.md has the same table in
// words.
func decide(fact fact) decision {
	switch fact {
	// Before the claim.
	case factRunsHere:
		return decision{actionRefuse, OutcomeInProgress, ReasonInProgress}

	// After the claim, and after a wait.
	case factClaimed:
		return decision{action: actionRun}
	case factInProgress:
		return decision{actionRefuse, OutcomeInProgress, ReasonInProgress}
	case factAwaited:
		return decision{action: actionWait}
	case factTurn:
		return decision{action: actionClaim}
	case factRecordedSame:
		return decision{action: actionReplay, outcome: OutcomeReplayed}
	case factRecordedOther:
		return decision{actionRefuse, OutcomeMismatch, ReasonKeyReused}
	case factRecordedUnreadable:
		return decision{actionRefuse, OutcomeUnknown, ReasonOutcomeUnknown}
	case factRecordCorrupt:
		return decision{actionRefuse, OutcomeUnknown, ReasonRecordCorrupt}

	// At any point before COMMIT was sent.
	case factUnavailable:
		return decision{actionRefuse, OutcomeNotExecuted, ReasonUnavailable}
	case factSerialization:
		return decision{action: actionRestart}
	case factRestartsSpent:
		return decision{actionRefuse, OutcomeNotExecuted, ReasonUnavailable}
	case factRecordUnread:
		return decision{actionRefuse, OutcomeUnknown, ReasonOutcomeUnknown}

	// After the handler.
	case factAnsweredCommit:
		return decision{action: actionCommit}
	case factAnsweredDecline:
		return decision{action: actionDecline}
	case factAnsweredForget:
		return decision{action: actionForget}
	case factRefused:
		return decision{actionRefuse, OutcomeNotExecuted, reasonOfRefusal}
	case factHandlerFailed:
		return decision{actionRefuse, OutcomeNotExecuted, ReasonHandlerFailed}
	case factTransactionLost:
		return decision{actionRefuse, OutcomeUnknown, ReasonTransactionLost}

	// After the end of the transaction.
	case factCommitted, factDeclined:
		return decision{action: actionAnswer, outcome: OutcomeExecuted}
	case factForgotten:
		return decision{action: actionAnswer, outcome: OutcomeNotExecuted}
	case factKeyRecorded:
		return decision{action: actionRestart}
	case factCommitAborted:
		return decision{actionRefuse, OutcomeNotExecuted, ReasonHandlerFailed}
	case factDeclineFailed:
		return decision{actionRefuse, OutcomeNotExecuted, ReasonUnavailable}
	case factCommitUnknown:
		return decision{action: actionResolve}

	// After the look-up of a lost COMMIT, which may also find the facts of a record.
	case factResolvedOurs:
		return decision{action: actionAnswer, outcome: OutcomeExecuted}
	case factResolvedAbsent:
		return decision{actionRefuse, OutcomeNotExecuted, ReasonUnavailable}

	// An open request. If the new request is not resumable, the engine refuses it.
	case factOpen:
		return decision{actionTakeOver, OutcomeUnknown, ReasonOutcomeUnknown}
	case factTakenOver:
		return decision{action: actionRun}
	case factBackingOff:
		return decision{actionRefuse, OutcomeUnknown, ReasonOutcomeUnknown}
	case factParked:
		return decision{actionRefuse, OutcomeUnknown, ReasonNeedsAttention}
	case factUnsettled:
		return decision{actionLeave, OutcomeUnknown, ReasonOutcomeUnknown}
	case factContradiction:
		return decision{actionPark, OutcomeUnknown, ReasonNeedsAttention}
	case factFenced:
		return decision{actionRefuse, OutcomeInProgress, ReasonInProgress}

	// After any other end, if a run called DerivedKey and nothing is recorded.
	case factCallForgotten:
		return decision{action: actionAnswer, outcome: OutcomeUnknown}
	case factCallUnknown:
		return decision{actionRefuse, OutcomeUnknown, ReasonCallUnknown}
	}
	// factOutcomeUnknown, and every fact that has no row.
	return decision{actionRefuse, OutcomeUnknown, ReasonOutcomeUnknown}
}

// past collects facts from the attempts of one request so far.
type past struct {
	recorded bool         // another attempt has recorded the key
	derived  *atomic.Bool // a run of the handler has called DerivedKey
}

// decide is the table for a fact that may end the request.
func (p past) decide(fact fact) decision {
	return decide(factOfEnd(fact, p.recorded, p.derived.Load()))
}

// factOfEnd takes a fact that may end the request, and adjusts it if an earlier attempt of the
// request demands that.
//
// If one of them saw that another attempt had recorded the key (recorded), that record may be this
// request's own. If one of them called [DerivedKey] (derived), another service may have done
// something that no rollback undoes, and only a record would give a retry its answer. So an end
// without a record is never not-executed, and never suggests a new key.
func factOfEnd(fact fact, recorded, derived bool) fact {
	switch decision := decide(fact); {
	case recorded && (decision.reason == ReasonUnavailable || decision.reason == reasonOfRefusal):
		return factRecordUnread
	case !derived:
	case decision.outcome == OutcomeNotExecuted && decision.action == actionAnswer:
		return factCallForgotten
	case decision.outcome == OutcomeNotExecuted, decision.outcome == OutcomeMismatch:
		return factCallUnknown
	}
	return fact
}

// passesTurn reports whether a request that ended with this result leaves its key free, so that the
// next waiting request runs.
func passesTurn(result *Result) bool {
	switch {
	case result.Record != nil:
		return false
	case result.Outcome == OutcomeUnknown:
		// After factCallForgotten and factCallUnknown nothing is left in the database.
		return result.Answer != nil || result.Reason == ReasonCallUnknown
	}
	return true
}

// factAfterClaim returns the fact for the results of Begin.
func factAfterClaim(req *Request, record *Record, err error) fact {
	switch {
	case errors.Is(err, ErrInProgress):
		return factInProgress
	case errors.Is(err, ErrNotSerializable):
		return factSerialization
	case errors.Is(err, ErrRecordCorrupt):
		return factRecordCorrupt
	case errors.Is(err, ErrUnknown):
		return factRecordedUnreadable
	case err != nil:
		return factUnavailable
	case record == nil:
		return factClaimed
	}
	return factOfRecord(req, record)
}

// factOfWait returns the fact for a request that found its key held by another attempt.
func factOfWait(mayWait bool) fact {
	if mayWait {
		return factAwaited
	}
	return factInProgress
}

// factOfLeader returns the fact for a request that waited in the queue, given the leader's result:
// its record, or an unknown outcome. nil means that it is this request's turn.
func factOfLeader(req *Request, told *Result) fact {
	switch {
	case told == nil:
		return factTurn
	case told.Record != nil:
		return factOfRecord(req, told.Record)
	}
	return factOutcomeUnknown
}

// factOfRecord compares fingerprints. Every path that answers with a record comes through here.
func factOfRecord(req *Request, record *Record) fact {
	ours, ok := req.Fingerprint, true
	if record.Fingerprint.Version != ours.Version {
		ours, ok = Fingerprint{}, false
		if req.FingerprintAt != nil {
			ours, ok = req.FingerprintAt(record.Fingerprint.Version)
		}
	}
	switch {
	case !ok:
		return factRecordedUnreadable
	case !ours.Equal(record.Fingerprint):
		return factRecordedOther
	case record.Open:
		return factOpen
	}
	return factRecordedSame
}

// factAfterHandler returns the fact for the end of the handler: the state of its transaction, its
// failure, and the meaning of its answer. The transaction is checked first: an answer given on a
// dead one is worth nothing.
func factAfterHandler(sealed, failed error, disposition Disposition) fact {
	switch {
	case errors.Is(sealed, ErrTransactionLost):
		return factTransactionLost
	case errors.Is(sealed, ErrNotSerializable):
		return factSerialization
	case errors.Is(sealed, ErrUnavailable), errors.Is(failed, errHandlerTimeout):
		return factUnavailable
	case refusalOf(failed) != nil:
		return factRefused
	case failed != nil:
		return factHandlerFailed
	case disposition == DispositionDecline:
		return factAnsweredDecline
	case disposition != DispositionCommit:
		return factAnsweredForget
	case sealed != nil:
		return factHandlerFailed
	}
	return factAnsweredCommit
}

// refusalOf returns the refusal that a RunFunc returned, or nil. A handler that panics with one has
// failed.
func refusalOf(failed error) *Refusal {
	refusal, _ := failed.(*Refusal)
	if refusal == nil || refusal.Reason == "" {
		return nil
	}
	return refusal
}

// factAfterRollback returns the fact for the error of Rollback; fact is the reason for the
// rollback. The writes that a handler committed behind our back stand, so a lost transaction stays
// lost.
func factAfterRollback(fact fact, err error) fact {
	switch {
	case fact == factTransactionLost, errors.Is(err, ErrTransactionLost):
		return factTransactionLost
	case errors.Is(err, ErrKeyRecorded):
		return factKeyRecorded
	case errors.Is(err, ErrUnknown):
		return factOutcomeUnknown
	}
	return fact
}

// factAfterCommit returns the fact for the error of Commit. Without a key there is no record to
// look for.
func factAfterCommit(keyless bool, err error) fact {
	switch {
	case err == nil:
		return factCommitted
	case errors.Is(err, ErrUnknown): // first: it outweighs whatever else the error wraps
	case errors.Is(err, ErrTransactionLost):
		return factTransactionLost
	case errors.Is(err, ErrKeyRecorded):
		return factKeyRecorded
	case errors.Is(err, ErrNotSerializable):
		return factSerialization
	case errors.Is(err, ErrUnavailable):
		return factUnavailable
	case errors.Is(err, ErrAborted):
		return factCommitAborted
	}
	if keyless {
		return factOutcomeUnknown
	}
	return factCommitUnknown
}

// factAfterDecline returns the fact for the error of Decline.
func factAfterDecline(err error) fact {
	switch {
	case err == nil:
		return factDeclined
	case errors.Is(err, ErrUnknown):
	case errors.Is(err, ErrTransactionLost):
		return factTransactionLost
	case errors.Is(err, ErrKeyRecorded):
		return factKeyRecorded
	case errors.Is(err, ErrNotSerializable), errors.Is(err, ErrUnavailable), errors.Is(err, ErrAborted):
		return factDeclineFailed
	}
	return factCommitUnknown
}

// factAfterResolve returns the fact for the results of Resolve. An attempt is recognized by its id,
// which nobody else can have made. A decline gives up its claim when it undoes the writes, and
// records the answer after that, so finding the key free and unrecorded in between proves nothing.
func factAfterResolve(req *ongoing, disposition Disposition, record *Record, err error) fact {
	switch {
	case errors.Is(err, ErrRecordCorrupt):
		return factRecordCorrupt
	case err != nil, record == nil && disposition == DispositionDecline:
		return factOutcomeUnknown
	case record == nil:
		return factResolvedAbsent
	case record.Attempt == req.claim.Attempt:
		return factResolvedOurs
	}
	return factOfRecord(&req.Request, record)
}

// factAfterTakeOver returns the fact for the results of TakeOver.
func factAfterTakeOver(req *Request, open *Open, taken bool, err error) fact {
	switch {
	case err != nil:
		return factOutcomeUnknown
	case open == nil: // it ended a moment ago
		return factKeyRecorded
	case taken:
		return factTakenOver
	case open.Parked != "":
		return factParked
	case open.Owned:
		return factInProgress
	}
	return factBackingOff
}

// factBeforeOpen adjusts the fact after the handler of a resumable request that is not open. A
// statement of the handler may have made the claim. intent is the error of the effect that was not
// committed.
func factBeforeOpen(fact fact, sealed, intent error) fact {
	err := errors.Join(sealed, intent)
	switch {
	case fact == factTransactionLost:
		return fact
	case errors.Is(err, ErrKeyRecorded):
		return factKeyRecorded
	case errors.Is(err, ErrInProgress):
		return factInProgress
	case errors.Is(err, ErrRecordCorrupt): // found by the claim
		return factRecordCorrupt
	case errors.Is(err, ErrUnknown):
		return factOutcomeUnknown
	case errors.Is(intent, ErrNotSerializable):
		return factSerialization
	case errors.Is(intent, ErrUnavailable):
		return factUnavailable
	case intent != nil:
		return factHandlerFailed
	}
	return fact
}

// factOfOpenEnd adjusts the fact after the end of an open request's last transaction: an open
// request is never forgotten, and an end without a record is never not-executed.
func factOfOpenEnd(fact fact, err error) fact {
	switch {
	case fact == factCommitted, fact == factDeclined, fact == factContradiction, fact == factSerialization, fact == factCommitUnknown:
		return fact
	case errors.Is(err, ErrFenced):
		return factFenced
	case fact == factTransactionLost: // its writes may stand: another run would make them twice
		return factContradiction
	}
	return factUnsettled
}

// factOfOpenResolved returns the fact for the look-up after the reply to an open request's last
// COMMIT was lost. The record is the request's answer, whoever ended it.
func factOfOpenResolved(req *Request, record *Record, err error) fact {
	switch {
	case errors.Is(err, ErrRecordCorrupt):
		return factRecordCorrupt
	case record == nil:
		return factOutcomeUnknown
	case record.Open:
		return factUnsettled
	}
	return factOfRecord(req, record)
}
