package client

import (
	"time"

	"github.com/paidonce/idempotency"
)

// EventKind is the kind of an [Event].
type EventKind string

// The kinds of events.
const (
	EventStarted  EventKind = "started"  // an attempt is about to be sent; its intent is saved
	EventAnswered EventKind = "answered" // an attempt's whole answer has arrived
	EventLost     EventKind = "lost"     // an attempt has no answer, or only a part of it
	// EventUnsent: the server can't have the attempt: it got no connection, or nothing was written.
	EventUnsent  EventKind = "unsent"
	EventWaiting EventKind = "waiting" // a pause begins; another attempt follows
	EventEnded   EventKind = "ended"   // the caller gets its answer, or Err
	// EventKept: an IntentStore failed to forget a settled intent, which will be sent once more.
	EventKept EventKind = "kept"
)

// Event is one event of one keyed request.
//
// The key is for following a request. It prints as a hash, and must not become a label or a log
// field.
type Event struct {
	Kind    EventKind
	Key     idempotency.Key // only Value is set
	Attempt int             // from 1; 0 if none was made
	Status  int             // of an answer
	// Outcome is that of an answer, empty if it has none. In an Ended with Err it is the proven
	// outcome.
	Outcome idempotency.Outcome
	Took    time.Duration // of an ended attempt; of the whole request for Ended
	Pause   time.Duration // of Waiting
	Err     error         // of Lost, Unsent and Kept; of Ended if there is no answer
}
