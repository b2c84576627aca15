// Package crashpoint names the places at which a keyed request is interfered with: by package
// idempotencytest in a test of a user's handler, and in the demo bank if it is configured to die
// there.
package crashpoint

// The points, in the order in which an attempt reaches them. Unless the comment says otherwise, the
// process dies there: the attempt is rolled back, and its client gets no answer.
const (
	// Body and headers are read; nothing was sent to the database.
	AfterBody   = "after_body"
	BeforeBegin = "before_begin" // the store is unavailable
	AfterBegin  = "after_begin"  // the key is claimed, nothing of the handler ran
	// The handler has read and not written, or its context ends at one of its uses.
	MidHandler = "mid_handler"
	// The handler's context ends at one of its uses, and the process lives on.
	HandlerCanceled = "handler_canceled"
	AfterHandler    = "after_handler" // everything is written except the record
	BeforeCommit    = "before_commit" // COMMIT was not sent
	// COMMIT's context ends at one of its uses: it may or may not happen.
	MidCommit      = "mid_commit"
	CommitCanceled = "commit_canceled" // the same, but the process lives on
	// COMMIT was sent but never arrives; the process lives on.
	CommitNeverArrived = "commit_never_arrived"
	// COMMIT happened and its reply is lost; the process lives on.
	CommitLost = "commit_lost"
	// The reply to COMMIT is lost, and the process dies while it looks for the record.
	Resolving    = "resolving"
	Unresolvable = "unresolvable"  // COMMIT or its reply is lost, and the lookup fails
	AfterCommit  = "after_commit"  // COMMIT returned, and nothing was sent to the client
	HalfResponse = "half_response" // half of the answer's body was sent

	BeforeDecline       = "before_decline"
	MidDecline          = "mid_decline"
	DeclineNeverArrived = "decline_never_arrived"
	DeclineLost         = "decline_lost"
	AfterDecline        = "after_decline"

	ReaperBatch = "reaper_batch" // the reaper's DELETE is sent, its end not awaited
)

// The points of a request that calls another service, in the order in which it reaches them. The
// process dies there.
const (
	BeforeIntent = "before_intent" // nothing of the intent was sent to the database
	IntentSent   = "intent_sent"   // the intent's COMMIT was sent, its reply not awaited
	BeforeSend   = "before_send"   // the intent is committed, nothing was sent to the other service
	InCall       = "in_call"       // the other service has the request, its reply not awaited
	AfterReply   = "after_reply"   // the other service has answered, nothing of the result was sent to the database
	ResultSent   = "result_sent"   // the result's COMMIT was sent, its reply not awaited
	AfterResult  = "after_result"  // the result is committed, the last phase has begun
	LastPhase    = "last_phase"    // the last phase has read, and not written
	BeforeEnd    = "before_end"    // everything is written except the answer, and nothing of that was sent
	EndSent      = "end_sent"      // the last COMMIT was sent, its reply not awaited
	AfterEnd     = "after_end"     // the last COMMIT returned, and nothing was sent to the client

	TakeOver       = "take_over"       // an open request is being taken over, the reply not awaited
	CompleterBatch = "completer_batch" // the completer knows what is due, and begins to take one over
)

// The points of a request that calls another service at which its process lives on. Only package
// idempotencytest has them.
const (
	IntentNeverArrived = "intent_never_arrived" // the intent's COMMIT was sent but never arrives
	IntentLost         = "intent_lost"          // the intent's COMMIT happened and its reply is lost
	ResultNeverArrived = "result_never_arrived" // the result's COMMIT was sent but never arrives
	ResultLost         = "result_lost"          // the result's COMMIT happened and its reply is lost
	Replaced           = "replaced"             // another owner has taken the request over, before the result's COMMIT
)

// BankVariable is the demo bank's environment variable. With the value before_commit:3, for
// example, the process kills itself when it reaches that point for the third time.
const BankVariable = "DEMO_BANK_CRASH_POINT"

// Bank returns the points of the demo bank, in the order in which a transfer reaches them. All but
// the last, which is the reaper's, count only keyed transfers.
func Bank() []string {
	return []string{
		AfterBody, AfterBegin, MidHandler, AfterHandler, BeforeCommit, AfterCommit, HalfResponse, Resolving, ReaperBatch,
	}
}

// BankCalls returns the points of the demo bank for requests that call its processor. The last two
// need a request that was left open.
func BankCalls() []string {
	return []string{
		BeforeIntent, IntentSent, BeforeSend, InCall, AfterReply, ResultSent, AfterResult, LastPhase, BeforeEnd, EndSent, AfterEnd,
		TakeOver, CompleterBatch,
	}
}
