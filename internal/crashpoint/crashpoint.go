// Package crashpoint names the places at which a keyed request is interfered with: by package idempotencytest in a test of a
// user's handler, and in the demo bank when it is told to die there.
package crashpoint

// The points, in the order in which an attempt comes to them. Unless something else is said the process dies there: the
// attempt is rolled back, and its client gets no answer.
const (
	AfterBody          = "after_body"           // body and headers are read, nothing was asked of the database
	BeforeBegin        = "before_begin"         // the store is unavailable
	AfterBegin         = "after_begin"          // the key is claimed, nothing of the handler ran
	MidHandler         = "mid_handler"          // the handler has read and not written, or its context ends at one of its uses
	HandlerCanceled    = "handler_canceled"     // the handler's context ends at one of its uses, and the process lives on
	AfterHandler       = "after_handler"        // everything is written but the record
	BeforeCommit       = "before_commit"        // COMMIT was not sent
	MidCommit          = "mid_commit"           // COMMIT's context ends at one of its uses: it may or may not happen
	CommitCanceled     = "commit_canceled"      // the same, but the process lives on
	CommitNeverArrived = "commit_never_arrived" // COMMIT was sent and is lost on its way; the process lives on
	CommitLost         = "commit_lost"          // COMMIT happened and its reply is lost; the process lives on
	Resolving          = "resolving"            // the reply to COMMIT is lost, and the process dies while it looks for the record
	Unresolvable       = "unresolvable"         // COMMIT or its reply is lost, and the look for it fails
	AfterCommit        = "after_commit"         // COMMIT returned, and nothing was sent to the client
	HalfResponse       = "half_response"        // half of the answer's body was sent

	BeforeDecline       = "before_decline"
	MidDecline          = "mid_decline"
	DeclineNeverArrived = "decline_never_arrived"
	DeclineLost         = "decline_lost"
	AfterDecline        = "after_decline"

	ReaperBatch = "reaper_batch" // the reaper's DELETE is sent, and its end not awaited
)

// BankVariable is the environment's switch of the demo bank, such as before_commit:3: the process kills itself when it gets to
// the named point for the third time.
const BankVariable = "DEMO_BANK_CRASH_POINT"

// Bank returns the points of the demo bank, in the order in which a transfer gets to them. All but the last, which is the
// reaper's, count keyed transfers alone.
func Bank() []string {
	return []string{
		AfterBody, AfterBegin, MidHandler, AfterHandler, BeforeCommit, AfterCommit, HalfResponse, Resolving, ReaperBatch,
	}
}
