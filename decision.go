package idempotency

import "errors"

// Outcome says what became of a request. On the wire it is the value of Idempotency-Status.
type Outcome string

// The outcomes. A client branches on these, never on the status code: a handler has 409s and 422s of its own.
const (
	OutcomeExecuted    Outcome = "executed"     // this attempt ran, and its answer is recorded if there is a key
	OutcomeReplayed    Outcome = "replayed"     // an earlier attempt's answer, repeated
	OutcomeInProgress  Outcome = "in-progress"  // another attempt is running
	OutcomeMismatch    Outcome = "mismatch"     // the key belongs to a different request
	OutcomeNotExecuted Outcome = "not-executed" // proven: this request left nothing in the database, and did not call DerivedKey
	OutcomeUnknown     Outcome = "unknown"      // it may or may not have been executed; keep the key and ask again
)

// Reason says why a request has no answer of the handler's. On the wire it is the end of a problem's type.
type Reason string

// The reasons. The engine gives the second group. The first are for adapters: what they refuse before the engine is
// asked, a replay that the caller may not see, and a new key of a caller who has used up theirs.
const (
	ReasonKeyMissing    Reason = "key-missing"
	ReasonKeyInvalid    Reason = "key-invalid"
	ReasonScope         Reason = "scope"
	ReasonBodyTooLarge  Reason = "body-too-large"
	ReasonBodyUnread    Reason = "body-unread"
	ReasonReplayDenied  Reason = "replay-denied"
	ReasonQuotaExceeded Reason = "quota-exceeded"

	ReasonKeyReused       Reason = "key-reused"
	ReasonInProgress      Reason = "in-progress"
	ReasonHandlerFailed   Reason = "handler-failed"
	ReasonTransactionLost Reason = "transaction-lost"
	ReasonUnavailable     Reason = "unavailable"
	ReasonOutcomeUnknown  Reason = "outcome-unknown"
	ReasonCallUnknown     Reason = "call-unknown"
	ReasonRecordCorrupt   Reason = "record-corrupt"
)

// Disposition says what an answer means for the transaction. A policy maps a status to it; see [DefaultDisposition].
type Disposition uint8

// The dispositions.
const (
	Forget  Disposition = iota // undo the handler's writes and record nothing: a retry runs again
	Commit                     // commit the handler's writes with the answer
	Decline                    // undo the handler's writes, keep the answer
)

// DefaultDisposition commits 2xx and 3xx, declines 4xx, and forgets what a retry may change: 401, 403, 407, 408, 421,
// 425, 429, 499 (a call that was canceled, as gateways and gRPC spell it) and everything else.
func DefaultDisposition(status int) Disposition {
	switch status {
	case 401, 403, 407, 408, 421, 425, 429, 499:
		return Forget
	}
	switch {
	case status >= 200 && status < 400:
		return Commit
	case status >= 400 && status < 500:
		return Decline
	}
	return Forget
}

// Fact is what is known of a request at one of its turning points: after the claim or a wait for another attempt, after
// the handler, after the end of the transaction, and after the look for a COMMIT whose reply was lost.
type Fact uint8

// The facts.
const (
	FactClaimed            Fact = iota + 1 // no record; the claim is ours
	FactInProgress                         // no record; the claim is another attempt's, and the request does not wait, or no longer
	FactAwaited                            // no record; the claim is another attempt's, and the request may wait for it
	FactTurn                               // that attempt left no answer to this request, whose turn it is to ask the store
	FactRecordedSame                       // a record of this very request
	FactRecordedOther                      // a record of a different request
	FactRecordedUnreadable                 // a record with a fingerprint or an answer that this program can't read, or can't vouch for yet; or one that may be hidden from it
	FactRecordCorrupt                      // a record that is not what was recorded
	FactUnavailable                        // no connection, or the database failed before COMMIT was sent
	FactSerialization                      // 40001, 40P01 or a plan that a migration made stale, wherever it came from
	FactRestartsSpent                      // another restart was due, and the budget of restarts is used up
	FactRecordUnread                       // unavailable or spent, after another attempt was seen to record the key

	FactAnsweredCommit  // the handler answered, by policy for good
	FactAnsweredDecline // the handler answered, by policy without its writes
	FactAnsweredForget  // the handler answered, by policy for this once
	FactHandlerFailed   // the handler or a policy panicked, its answer can't be recorded, or it wants to commit an aborted transaction
	FactTransactionLost // the handler ended the transaction behind our back

	FactCommitted     // COMMIT returned
	FactDeclined      // COMMIT of the answer alone returned
	FactForgotten     // ROLLBACK, after an answer that is not recorded
	FactKeyRecorded   // our INSERT found another attempt's record
	FactCommitAborted // the database refused COMMIT: a deferred constraint, for example
	FactDeclineFailed // the answer of a decline was not recorded; its writes are undone too
	FactCommitUnknown // COMMIT was sent and its reply is missing

	FactResolvedOurs   // asked again, the store has this attempt's record
	FactResolvedAbsent // asked again, the store proves that nothing was recorded

	FactCallForgotten  // Forgotten, and a run of the request asked for a derived key
	FactCallUnknown    // the request ends in another way without a record, and a run of it asked for a derived key
	FactOutcomeUnknown // what became of the request could not be found out
)

// Action is what the engine does about a fact.
type Action uint8

// The actions.
const (
	ActionRun     Action = iota + 1 // run the handler
	ActionWait                      // wait for what becomes of the other attempt
	ActionClaim                     // claim the key
	ActionReplay                    // answer with the record
	ActionCommit                    // record the answer and commit it with the handler's writes
	ActionDecline                   // undo the handler's writes; record the answer and commit it
	ActionForget                    // undo the handler's writes and answer what the handler answered
	ActionAnswer                    // answer what the handler answered
	ActionRestart                   // undo everything and claim again
	ActionResolve                   // ask the store what became of COMMIT
	ActionRefuse                    // undo what is open and answer a problem
)

// Decision is one row of the table: what to do, and what to tell the client where that ends the request.
type Decision struct {
	Action  Action
	Outcome Outcome
	Reason  Reason
}

// Decide is the state machine of a key: the one place that branches on what is known of a request. Everything else
// finds facts or carries out actions. docs/state-machine.md holds the same table in words.
func Decide(fact Fact) Decision {
	switch fact {
	// After the claim, and after a wait.
	case FactClaimed:
		return Decision{Action: ActionRun}
	case FactInProgress:
		return Decision{ActionRefuse, OutcomeInProgress, ReasonInProgress}
	case FactAwaited:
		return Decision{Action: ActionWait}
	case FactTurn:
		return Decision{Action: ActionClaim}
	case FactRecordedSame:
		return Decision{Action: ActionReplay, Outcome: OutcomeReplayed}
	case FactRecordedOther:
		return Decision{ActionRefuse, OutcomeMismatch, ReasonKeyReused}
	case FactRecordedUnreadable:
		return Decision{ActionRefuse, OutcomeUnknown, ReasonOutcomeUnknown}
	case FactRecordCorrupt:
		return Decision{ActionRefuse, OutcomeUnknown, ReasonRecordCorrupt}

	// At any point before COMMIT was sent.
	case FactUnavailable:
		return Decision{ActionRefuse, OutcomeNotExecuted, ReasonUnavailable}
	case FactSerialization:
		return Decision{Action: ActionRestart}
	case FactRestartsSpent:
		return Decision{ActionRefuse, OutcomeNotExecuted, ReasonUnavailable}
	case FactRecordUnread:
		return Decision{ActionRefuse, OutcomeUnknown, ReasonOutcomeUnknown}

	// After the handler.
	case FactAnsweredCommit:
		return Decision{Action: ActionCommit}
	case FactAnsweredDecline:
		return Decision{Action: ActionDecline}
	case FactAnsweredForget:
		return Decision{Action: ActionForget}
	case FactHandlerFailed:
		return Decision{ActionRefuse, OutcomeNotExecuted, ReasonHandlerFailed}
	case FactTransactionLost:
		return Decision{ActionRefuse, OutcomeUnknown, ReasonTransactionLost}

	// After the end of the transaction.
	case FactCommitted, FactDeclined:
		return Decision{Action: ActionAnswer, Outcome: OutcomeExecuted}
	case FactForgotten:
		return Decision{Action: ActionAnswer, Outcome: OutcomeNotExecuted}
	case FactKeyRecorded:
		return Decision{Action: ActionRestart}
	case FactCommitAborted:
		return Decision{ActionRefuse, OutcomeNotExecuted, ReasonHandlerFailed}
	case FactDeclineFailed:
		return Decision{ActionRefuse, OutcomeNotExecuted, ReasonUnavailable}
	case FactCommitUnknown:
		return Decision{Action: ActionResolve}

	// After the look for a lost COMMIT, which may also find the facts of a record.
	case FactResolvedOurs:
		return Decision{Action: ActionAnswer, Outcome: OutcomeExecuted}
	case FactResolvedAbsent:
		return Decision{ActionRefuse, OutcomeNotExecuted, ReasonUnavailable}

	// After all of it, when a derived key was asked for and nothing is recorded.
	case FactCallForgotten:
		return Decision{Action: ActionAnswer, Outcome: OutcomeUnknown}
	case FactCallUnknown:
		return Decision{ActionRefuse, OutcomeUnknown, ReasonCallUnknown}
	}
	// FactOutcomeUnknown, and whatever nobody thought of.
	return Decision{ActionRefuse, OutcomeUnknown, ReasonOutcomeUnknown}
}

// factOfEnd adjusts a fact that may end the request to its earlier attempts.
//
// If one of them saw that another attempt had recorded the key (recorded), the record may be that
// of this request. If one of them called [DerivedKey] (derived), another service may have done
// something that no rollback undoes, and only a record would give a retry its answer. So without a
// record no end is not-executed, and none suggests a new key.
func factOfEnd(fact Fact, recorded, derived bool) Fact {
	switch decision := Decide(fact); {
	case recorded && decision.Reason == ReasonUnavailable:
		return FactRecordUnread
	case !derived:
	case decision.Outcome == OutcomeNotExecuted && decision.Action == ActionAnswer:
		return FactCallForgotten
	case decision.Outcome == OutcomeNotExecuted, decision.Outcome == OutcomeMismatch:
		return FactCallUnknown
	}
	return fact
}

// passesTurn reports whether a request that ended with this result leaves its key free, so that the
// next waiting request runs.
func passesTurn(result *Result) bool {
	switch {
	case result.Record != nil:
		return false
	case result.Outcome == OutcomeUnknown: // FactCallForgotten and FactCallUnknown leave nothing in the database
		return result.Answer != nil || result.Reason == ReasonCallUnknown
	}
	return true
}

// factAfterClaim reads what Begin returned.
func factAfterClaim(req *Request, record *Record, err error) Fact {
	switch {
	case errors.Is(err, ErrInProgress):
		return FactInProgress
	case errors.Is(err, ErrSerialization):
		return FactSerialization
	case errors.Is(err, ErrRecordCorrupt):
		return FactRecordCorrupt
	case errors.Is(err, ErrUnknown):
		return FactRecordedUnreadable
	case err != nil:
		return FactUnavailable
	case record == nil:
		return FactClaimed
	}
	return factOfRecord(req, record)
}

// factOfWait says of a request whose key is another attempt's whether it may wait.
func factOfWait(mayWait bool) Fact {
	if mayWait {
		return FactAwaited
	}
	return FactInProgress
}

// factOfLeader reads what a request that waited behind another was told when that one ended: its record, that the
// outcome is unknown, or nil, which is this request's turn.
func factOfLeader(req *Request, told *Result) Fact {
	switch {
	case told == nil:
		return FactTurn
	case told.Record != nil:
		return factOfRecord(req, told.Record)
	}
	return FactOutcomeUnknown
}

// factOfRecord compares fingerprints. Every path that answers with a record comes through here.
func factOfRecord(req *Request, record *Record) Fact {
	ours, ok := req.Fingerprint, true
	if record.Fingerprint.Version != ours.Version {
		ours, ok = Fingerprint{}, false
		if req.FingerprintAt != nil {
			ours, ok = req.FingerprintAt(record.Fingerprint.Version)
		}
	}
	switch {
	case !ok:
		return FactRecordedUnreadable
	case !ours.Equal(record.Fingerprint):
		return FactRecordedOther
	}
	return FactRecordedSame
}

// factAfterHandler reads what the handler left: what became of its transaction, whether it failed, and what its
// answer means. The transaction comes first: an answer given on a dead one is worth nothing.
func factAfterHandler(sealed, failed error, disposition Disposition) Fact {
	switch {
	case errors.Is(sealed, ErrTransactionLost):
		return FactTransactionLost
	case errors.Is(sealed, ErrSerialization):
		return FactSerialization
	case errors.Is(sealed, ErrUnavailable), errors.Is(failed, ErrUnavailable):
		return FactUnavailable
	case failed != nil:
		return FactHandlerFailed
	case disposition == Decline:
		return FactAnsweredDecline
	case disposition != Commit:
		return FactAnsweredForget
	case sealed != nil:
		return FactHandlerFailed
	}
	return FactAnsweredCommit
}

// factAfterRollback reads what Rollback returned; fact is what called for it. What a handler committed behind our back
// stands, whatever else comes to light, so a lost transaction stays one.
func factAfterRollback(fact Fact, err error) Fact {
	switch {
	case fact == FactTransactionLost, errors.Is(err, ErrTransactionLost):
		return FactTransactionLost
	case errors.Is(err, ErrKeyRecorded):
		return FactKeyRecorded
	case errors.Is(err, ErrUnknown):
		return FactOutcomeUnknown
	}
	return fact
}

// factAfterCommit reads what Commit returned. Without a key there is no record to ask for.
func factAfterCommit(req *Request, err error) Fact {
	switch {
	case err == nil:
		return FactCommitted
	case errors.Is(err, ErrUnknown): // first: it outweighs whatever else the error wraps
	case errors.Is(err, ErrTransactionLost):
		return FactTransactionLost
	case errors.Is(err, ErrKeyRecorded):
		return FactKeyRecorded
	case errors.Is(err, ErrSerialization):
		return FactSerialization
	case errors.Is(err, ErrUnavailable):
		return FactUnavailable
	case errors.Is(err, ErrAborted):
		return FactCommitAborted
	}
	if req.Keyless() {
		return FactOutcomeUnknown
	}
	return FactCommitUnknown
}

// factAfterDecline reads what Decline returned.
func factAfterDecline(err error) Fact {
	switch {
	case err == nil:
		return FactDeclined
	case errors.Is(err, ErrUnknown):
	case errors.Is(err, ErrTransactionLost):
		return FactTransactionLost
	case errors.Is(err, ErrKeyRecorded):
		return FactKeyRecorded
	case errors.Is(err, ErrSerialization), errors.Is(err, ErrUnavailable), errors.Is(err, ErrAborted):
		return FactDeclineFailed
	}
	return FactCommitUnknown
}

// factAfterResolve reads what Resolve returned. An attempt is known by its id, which nobody else can have made. A decline
// gives its claim away when it undoes the writes, and records the answer after that: so nobody held the key and nothing
// was there may be true in between, and proves nothing.
func factAfterResolve(req *Request, disposition Disposition, record *Record, err error) Fact {
	switch {
	case errors.Is(err, ErrRecordCorrupt):
		return FactRecordCorrupt
	case err != nil, record == nil && disposition == Decline:
		return FactOutcomeUnknown
	case record == nil:
		return FactResolvedAbsent
	case record.Attempt == req.Attempt:
		return FactResolvedOurs
	}
	return factOfRecord(req, record)
}
