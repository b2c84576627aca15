package client

import (
	"time"

	"github.com/paidonce/idempotency"
)

// EventKind is what happened.
type EventKind string

// The kinds of events.
const (
	EventStarted  EventKind = "started"  // an attempt is about to be sent; an intent is saved by now
	EventAnswered EventKind = "answered" // an attempt's answer is there, whole
	EventLost     EventKind = "lost"     // an attempt has no answer, or not all of it
	EventUnsent   EventKind = "unsent"   // an attempt ended before the server could have it: it got no connection, or nothing was written
	EventWaiting  EventKind = "waiting"  // a pause begins; another attempt follows
	EventEnded    EventKind = "ended"    // the caller gets its answer, or Err
	EventKept     EventKind = "kept"     // an IntentStore failed to forget an intent that is settled: it will be asked for once more
)

// Event is one thing that happened to one keyed request.
//
// The key is for whoever follows it. It must not become a label or a log field; it prints as a hash.
type Event struct {
	Kind    EventKind
	Key     idempotency.Key     // Value alone
	Attempt int                 // from 1; 0 where none was made
	Status  int                 // of an answer
	Outcome idempotency.Outcome // of an answer, empty where it does not say; of an Ended with Err what is true
	Took    time.Duration       // of an attempt that is over; of all of it for Ended
	Pause   time.Duration       // of Waiting
	Err     error               // of Lost, Unsent, Kept, and of Ended where there is no answer
}
