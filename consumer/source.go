package consumer

import (
	"context"
	"errors"
	"time"

	"github.com/paidonce/idempotency/message"
)

// Partition is a part of a source, and its messages have an order. It is a partition of a Kafka
// topic, a stream of NATS, or a shard of an outbox.
type Partition struct {
	Source string // the topic
	Number int32

	// Incarnation is the broker's id of the topic, or in NATS of the partition's stream. It differs
	// if that was deleted and recreated under its name. Zero if the broker has none.
	Incarnation [16]byte
}

// Delivery is a message with its place in a partition.
type Delivery struct {
	message.Message

	// Offset is the place. Offsets rise, and may leave gaps.
	Offset int64

	// Time is the broker's time of the message; zero if there is none.
	Time time.Time
}

// FromOldest is the offset that a [Receiver] returns for a partition that was never consumed: it
// begins with the oldest message that the broker has. There is no such offset for the newest one:
// until a position is committed, a restart would skip the messages that were published meanwhile.
const FromOldest int64 = -2

// Errors of a [Source]. Their texts name the remedy.
var (
	// ErrTrimmed: the broker has deleted messages that were not consumed, so the next offset is in
	// front of its oldest one. The source stops: an operator decides at which offset it goes on.
	ErrTrimmed = errors.New("messages were deleted unread")
	// ErrRecreated: the topic or stream was deleted and recreated, so the stored offset means nothing.
	ErrRecreated = errors.New("source was recreated")
)

// Source is a subscription: it delivers the messages of partitions to a [Receiver].
type Source interface {
	// Run delivers messages until ctx ends, or until an error that no retry mends. It returns only
	// after all calls of the receiver have returned. For each partition:
	//
	//   - It calls Assigned before the first Receive, and begins at the offset that it returns. It
	//     asks the broker for no offset.
	//   - It calls Receive with messages in their order, one call at a time. Several partitions may be
	//     received at once.
	//   - If not all messages of a call are settled, it delivers the others again after the pause,
	//     and nothing behind them meanwhile.
	//   - If the partition is taken away, the call under way may use the time that is left until
	//     another process may have the partition. Then its context ends. The source drops the
	//     messages of the partition that it holds.
	//   - It may tell the broker the offsets that are settled, for tools that show the lag. Nothing
	//     depends on that.
	Run(ctx context.Context, receiver Receiver) error
}

// Receiver takes a source's messages. [Consumer] is one. It is safe for concurrent use.
type Receiver interface {
	// Assigned returns the offset at which to begin a partition, or [FromOldest]. It returns
	// ErrRecreated if the partition's incarnation is another one than before.
	Assigned(ctx context.Context, partition Partition) (offset int64, err error)

	// Receive handles messages of one partition. It returns the number of them that are settled,
	// from the first on: their effects are committed, with the position behind them. The source
	// delivers the others again, not before the pause. The slice belongs to the source: Receive
	// changes nothing in it.
	Receive(ctx context.Context, partition Partition, deliveries []Delivery) (settled int, pause time.Duration)

	// BatchMax is the maximum number of deliveries that Receive handles together. A call may have
	// more, which only wait for the first ones.
	BatchMax() int
}
