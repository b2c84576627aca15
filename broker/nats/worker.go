package nats

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/message"
)

const (
	// batchBytesMax ends a batch that has more bytes.
	batchBytesMax = 1 << 20
	// pullMessages, and the size of two largest messages, bound one request to the server.
	pullMessages  = 200
	pullExpiry    = 10 * time.Second
	pullHeartbeat = 2 * time.Second // after two of them without a word of the server a new consumer is made
	// idleMax is the time for which the server keeps its own consumer if nobody uses it.
	idleMax = time.Minute
)

// worker reads one partition, and passes its messages to the receiver.
type worker struct {
	member *member
	number int
	ended  chan struct{}
	ctx    context.Context // of the receiver's calls
	cancel context.CancelFunc
	halted context.Context // ends if no other call may begin
	halt   context.CancelFunc
	once   sync.Once
}

func newWorker(m *member, number int) *worker {
	w := &worker{member: m, number: number, ended: make(chan struct{})}
	// A call under way outlives the member's context: stop decides when it ends.
	w.ctx, w.cancel = context.WithCancel(context.WithoutCancel(m.ctx))
	w.halted, w.halt = context.WithCancel(w.ctx)
	return w
}

// stop lets the worker begin no other call, and ends the context of the call under way after this
// time. Only the first stop counts, or one with the time 0.
func (w *worker) stop(most time.Duration) {
	w.halt()
	if most == 0 {
		w.cancel()
		return
	}
	w.once.Do(func() {
		late := time.AfterFunc(most, w.cancel)
		context.AfterFunc(w.ctx, func() { late.Stop() })
	})
}

// run passes messages on until the worker is stopped.
func (w *worker) run() {
	defer w.cancel()
	for w.halted.Err() == nil {
		partition, next, err := w.member.open(w.halted, w.number)
		if err == nil {
			err = w.consume(partition, next)
		}
		if err != nil && !errors.Is(err, errRecreated) && w.halted.Err() == nil {
			w.member.end(err)
			return
		}
	}
}

// consume passes messages on, from this one, until the worker is stopped or the reader has failed.
func (w *worker) consume(partition consumer.Partition, next uint64) error {
	read := make(chan consumer.Delivery, min(max(w.member.receiver.BatchMax(), 1), pullMessages))
	var failure error
	var reading sync.WaitGroup
	ctx, cancel := context.WithCancel(w.halted)
	reading.Go(func() {
		defer close(read)
		failure = w.read(ctx, partition, next, read)
	})
	defer reading.Wait()
	defer cancel()
	var batch []consumer.Delivery
	for {
		if batch = w.fill(batch, read); len(batch) == 0 {
			cancel()
			reading.Wait()
			return failure
		}
		if w.halted.Err() != nil {
			return nil
		}
		if !w.member.mayCall() { // the member was paused: it is about to notice, and to stop this worker
			wake(w.member.news)
			w.wait(10 * time.Millisecond)
			continue
		}
		settled, pause := w.member.receiver.Receive(w.ctx, partition, batch)
		left := settled < len(batch)
		batch = slices.Delete(batch, 0, settled)
		if left {
			w.wait(pause)
		}
	}
}

func (w *worker) wait(pause time.Duration) {
	if pause <= 0 {
		return
	}
	select {
	case <-w.halted.Done():
	case <-time.After(pause):
	}
}

// fill adds the messages that were read to a batch. If the batch is empty, it blocks until there is
// a message, and returns none if no more will come.
func (w *worker) fill(batch []consumer.Delivery, read <-chan consumer.Delivery) []consumer.Delivery {
	size := 0
	for i := range batch {
		size += sizeOf(&batch[i])
	}
	if len(batch) == 0 {
		select {
		case d, ok := <-read:
			if !ok {
				return nil
			}
			batch, size = append(batch, d), sizeOf(&d)
		case <-w.halted.Done():
			return nil
		}
	}
	for len(batch) < w.member.receiver.BatchMax() && size < batchBytesMax {
		select {
		case d, ok := <-read:
			if !ok {
				return batch
			}
			batch, size = append(batch, d), size+sizeOf(&d)
		default:
			return batch
		}
	}
	return batch
}

// read reads messages in their order, each number once, until ctx ends or it can't go on.
func (w *worker) read(ctx context.Context, partition consumer.Partition, next uint64, read chan<- consumer.Delivery) error {
	for try := 0; ; try++ {
		before := next
		err := w.readFrom(ctx, partition, &next, read)
		var final *finalError
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.As(err, &final):
			return final.cause
		}
		w.member.trouble("a stream is read again from where it was", err)
		if next != before {
			try = 0
		}
		sleep(ctx, try)
	}
}

// finalError ends a worker.
type finalError struct{ cause error }

func (e *finalError) Error() string { return e.cause.Error() }

// check returns a finalError if the stream is another one, or does not have the next message.
func (w *worker) check(ctx context.Context, partition consumer.Partition, next uint64) (jetstream.Stream, error) {
	stream, err := w.member.stream(ctx, w.number)
	if err != nil {
		return nil, err
	}
	if incarnationOf(stream.CachedInfo()) != partition.Incarnation {
		return nil, &finalError{errRecreated}
	}
	if err := checkStart(stream.CachedInfo(), next); err != nil {
		return nil, &finalError{err}
	}
	return stream, nil
}

// readFrom reads with one consumer of the server, until that fails. It acknowledges nothing, and
// the server counts nothing.
func (w *worker) readFrom(ctx context.Context, partition consumer.Partition, next *uint64, read chan<- consumer.Delivery) error {
	asking, cancel := context.WithTimeout(ctx, askMax)
	defer cancel()
	one, err := w.member.conn.js.CreateConsumer(asking, streamName(w.member.topic, w.number), jetstream.ConsumerConfig{
		AckPolicy: jetstream.AckNonePolicy, DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: *next,
		InactiveThreshold: idleMax, MemoryStorage: true, Replicas: 1,
	})
	if err != nil {
		return err
	}
	// The check comes after that: the consumer belongs to the stream that is checked, or was deleted
	// with a former one.
	if _, err := w.check(ctx, partition, *next); err != nil {
		return err
	}
	bytes := 2 * int(w.member.conn.nats.MaxPayload())
	messages, err := one.Messages(jetstream.PullMaxMessagesWithBytesLimit(pullMessages, bytes), jetstream.PullExpiry(pullExpiry), jetstream.PullHeartbeat(pullHeartbeat))
	if err != nil {
		return err
	}
	defer messages.Stop()
	for {
		in, err := messages.Next(jetstream.NextContext(ctx))
		if err != nil {
			return err
		}
		meta, err := in.Metadata()
		if err != nil {
			return err
		}
		if meta.Sequence.Stream != *next {
			if err := w.gap(ctx, partition, *next, meta.Sequence.Stream); err != nil {
				return err
			}
		}
		select {
		case read <- delivery(w.member.topic, partition, in, meta):
			*next = meta.Sequence.Stream + 1
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// gap returns nil if all messages from next up to got were deleted individually. Otherwise it
// returns an error: a limit has deleted them, or they were lost on their way.
func (w *worker) gap(ctx context.Context, partition consumer.Partition, next, got uint64) error {
	stream, err := w.check(ctx, partition, next)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, askMax)
	defer cancel()
	first, err := stream.GetMsg(ctx, next, jetstream.WithGetMsgSubject(subjectOf(w.member.topic, w.number)))
	switch {
	case err != nil:
		return err
	case first.Sequence != got:
		return fmt.Errorf("message %d came, and %d was due", got, first.Sequence)
	}
	w.member.source.client.logger().Warn("idempotency: consuming from NATS: messages were deleted by themselves, and are skipped", "group", w.member.source.group,
		"topic", w.member.topic, "partition", w.number, "from", next, "to", got-1)
	return nil
}

func sizeOf(d *consumer.Delivery) int {
	size := len(d.Key) + len(d.Body)
	for name, values := range d.Header {
		for _, value := range values {
			size += len(name) + len(value)
		}
	}
	return size
}

// foreignID is the header of other producers that has a message's id: CloudEvents.
const foreignID = "ce-id"

// delivery returns the message that came.
func delivery(topic string, partition consumer.Partition, in jetstream.Msg, meta *jetstream.MsgMetadata) consumer.Delivery {
	d := consumer.Delivery{
		Message: message.Message{Topic: topic, Body: in.Data(), Header: map[string][]string{}},
		Offset:  int64(meta.Sequence.Stream), Time: meta.Timestamp, //nolint:gosec // no stream has as many messages
	}
	for _, name := range slices.Sorted(maps.Keys(in.Headers())) {
		values := in.Headers()[name]
		switch {
		case name == jetstream.MsgIDHeader:
			d.ID = values[0]
		case name == KeyHeader:
			if key, err := url.PathUnescape(values[0]); err == nil {
				d.Key = []byte(key)
			} else { // of another producer
				d.Key = []byte(values[0])
			}
		case strings.HasPrefix(name, reservedPrefix):
		default:
			if d.Header[name] = values; !valid(d.Header) { // the header itself, or too much in all
				delete(d.Header, name)
			}
		}
	}
	if values := d.Header[foreignID]; d.ID == "" && len(values) > 0 {
		d.ID = values[0]
	}
	if d.ID == "" { // numbers begin again in a stream that is recreated
		d.ID = fmt.Sprintf("%s/%d/%d/%x", topic, partition.Number, meta.Sequence.Stream, partition.Incarnation)
	}
	return d
}

// valid reports whether headers keep the rules of [message.Message].
func valid(header map[string][]string) bool {
	return (&idempotency.Answer{Status: idempotency.StatusMin, Header: header}).Validate() == nil
}
