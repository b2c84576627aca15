package consumer

import (
	"context"
	"errors"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/message"
)

// Store keeps positions, records and parked messages, and runs batches in transactions. It is safe
// for concurrent use. postgres.Store has one: postgres.Store.Inbox.
type Store interface {
	// Position returns the position of a partition. It waits for no batch.
	Position(ctx context.Context, consumer string, partition Partition) (Position, error)

	// CountDeath is called before a batch if the process has committed none in the partition. It
	// adds 1 to the partition's deaths, and returns them. Each commit of a batch sets them to 0.
	// CountDeath counts nothing and returns ErrHeld if another process has the lock of the
	// partition.
	CountDeath(ctx context.Context, consumer string, partition Partition) (deaths int, err error)

	// ForgiveDeath undoes one CountDeath: the batch has ended, and the process lives.
	ForgiveDeath(ctx context.Context, consumer string, partition Partition) error

	// Due returns the ids of parked messages that are due, at most max. A Waiting message is due
	// when its time has come; if ordered, no other parked message of its topic and key may be in
	// front of it. A WaitingBehind message is due when none is in front of it any more.
	Due(ctx context.Context, consumer string, ordered bool, max int) (ids []string, err error)

	// BeginParked is Begin for a parked message. It counts the try before the transaction begins,
	// so that a message that ends its process is found: Park.Attempts includes the try, and the
	// message is not due for claim.Lease. If Park.Delivery and the error are nil, the message is
	// not due any more, and nothing is counted. If there is a delivery and an error, the try is
	// counted, and Repark must take it back. Commit deletes the row.
	BeginParked(ctx context.Context, claim *ParkedClaim) (Batch, Park, error)

	// Repark writes the state of a parked message after a try, and publishes messages in the same
	// transaction. Tried is the Park.Attempts of BeginParked. It does nothing if the message is not
	// parked any more, or changed meanwhile: an operator redrove it, say.
	Repark(ctx context.Context, consumer string, tried int, park *Park, publish ...message.Message) error

	// Begin opens a transaction for a batch, takes the lock of the partition, and reads its
	// position and the state of each message. It returns ErrHeld if another process has the lock,
	// and never waits for it; [idempotency.ErrNotSerializable] if it should be called again; any
	// other error means that the store is unavailable.
	Begin(ctx context.Context, claim *Claim) (Batch, error)
}

// Position is a consumer's position in a partition.
type Position struct {
	Next        int64    // offset of the next message; negative if none was consumed yet
	Incarnation [16]byte // of the source when the position was written
	Deaths      int      // see Store.CountDeath
}

// Claim has the messages that a batch is about to handle.
type Claim struct {
	Consumer  string
	Partition Partition
	Attempt   idempotency.AttemptID
	Entries   []Entry
	Keys      bool // whether to look for parked messages of the same keys
}

// ParkedClaim has the parked message that is about to be tried again.
type ParkedClaim struct {
	Consumer string
	ID       string // of the message
	Attempt  idempotency.AttemptID
	Ordered  bool          // as in Store.Due; then no other message of its key is tried meanwhile
	Lease    time.Duration // the pause before the next try if the process ends in this one
}

// Entry is a message of a batch.
type Entry struct {
	ID          string
	Offset      int64
	Topic       string
	Key         []byte
	Fingerprint idempotency.Fingerprint
}

// Known is the state of a message in the store.
type Known int

// The states.
const (
	Unknown  Known = iota
	Recorded       // it was handled before: a copy
	Mismatch       // its id was recorded with other content
	Parked         // it is parked itself
	Behind         // another message of its key is parked
)

// Errors of a [Store], beside those of package idempotency.
var (
	// ErrHeld: another process works on the partition.
	ErrHeld = errors.New("another process has the partition")
	// ErrFenced: the position moved since the batch began; nothing of it was written.
	ErrFenced = errors.New("position was moved by another process")
)

// Batch is an open transaction with the lock of a partition. It is used by one goroutine, and ended
// exactly once, by Commit or Rollback.
type Batch interface {
	// Position is the partition's, as Begin read it.
	Position() Position
	// Known is the state of the entry with this index.
	Known(entry int) Known
	// Context returns ctx with the transaction for a handler.
	Context(ctx context.Context) context.Context
	// Check is called after each handler, and returns the error of the transaction's state, as Seal
	// does. If the handler left a savepoint or a query open, the next one must not run inside of it.
	Check() error
	// Seal takes the transaction away from the handler and returns the error of its state, as
	// [idempotency.Attempt] does.
	Seal() error
	// Commit writes the records, parks messages and moves the position in one round trip with
	// COMMIT. It returns the errors of [idempotency.Attempt]'s Commit, and ErrFenced.
	// ErrKeyRecorded means that another process recorded or parked one of the ids meanwhile. After
	// ErrUnknown the next batch finds the outcome: it gets the lock only after this transaction's
	// end, and then reads whether the position was moved.
	Commit(ctx context.Context, end *End) error
	// Rollback undoes everything.
	Rollback(ctx context.Context) error
}

// End has the results that a batch commits.
type End struct {
	Next     int64             // the new position; not used for a parked message that is tried again
	Recorded []int             // entries that were handled
	Park     []Park            // messages to park
	Publish  []message.Message // beside those of the handlers
	TTL      time.Duration     // of the records
}

// Park is a message that its consumer could not handle.
type Park struct {
	Delivery  *Delivery
	State     ParkState
	Attempts  int
	NotBefore time.Duration // from now; for Waiting
	Error     string        // for an operator; bounded
}

// ParkState is the state of a parked message.
type ParkState int16

// The states. Stores keep their numbers.
const (
	Waiting       ParkState = 1 // it is tried again later
	WaitingBehind ParkState = 2 // behind another message of its key; its handler did not run
	Dead          ParkState = 3 // until a person redrives or drops it
)
