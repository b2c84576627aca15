package kafka

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/message"
)

// The maximum of buffered messages of a partition. A partition with that many is not fetched until
// less than half of the maximum is buffered. One more fetch may be on its way: 1 MiB, or one larger
// batch of the producer, measured as it is compressed.
const (
	bufferedBytesMax = 4 << 20
	bufferedMax      = 10_000 // messages
)

// worker passes the messages of one partition to the receiver.
type worker struct {
	member    *member
	partition consumer.Partition
	ctx       context.Context // of the receiver's calls
	cancel    context.CancelFunc
	ended     chan struct{}
	news      chan struct{} // there are messages, or a failure

	// Only the poller uses it: the offset behind the last fetched message.
	next int64

	mu       sync.Mutex
	halted   chan struct{} // closed if no other call may begin
	buffered []consumer.Delivery
	bytes    int
	resting  bool  // after an error
	paused   bool  // not fetched, because it rests or enough is buffered
	failure  error // ends the member once all fetched messages are settled
}

func newWorker(m *member, partition consumer.Partition, next int64) *worker {
	w := &worker{member: m, partition: partition, next: next, ended: make(chan struct{}), news: make(chan struct{}, 1), halted: make(chan struct{})}
	// A call under way outlives the member's context: stop decides when it ends.
	w.ctx, w.cancel = context.WithCancel(context.WithoutCancel(m.ctx))
	return w
}

func (w *worker) place() place { return place{w.partition.Source, w.partition.Number} }

// halt lets the worker begin no other call.
func (w *worker) halt() {
	w.mu.Lock()
	defer w.mu.Unlock()
	select {
	case <-w.halted:
	default:
		close(w.halted)
	}
}

// run passes messages on until it is halted.
func (w *worker) run() {
	defer close(w.ended)
	defer w.release()
	for {
		batch, failure := w.batch()
		switch {
		case len(batch) > 0:
		case failure != nil:
			w.member.end(failure)
			return
		default:
			select {
			case <-w.news:
				continue
			case <-w.halted:
				return
			}
		}
		select {
		case <-w.halted:
			return
		default:
		}
		settled, pause := w.member.receiver.Receive(w.ctx, w.partition, batch)
		w.settle(settled)
		if settled < len(batch) && pause > 0 {
			select {
			case <-w.halted:
				return
			case <-time.After(pause):
			}
		}
	}
}

// batch returns the first messages, and the failure that came after the last one.
func (w *worker) batch() ([]consumer.Delivery, error) {
	most := max(w.member.receiver.BatchMax(), 1)
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.buffered[:min(most, len(w.buffered))], w.failure
}

// add adds fetched messages, and pauses the partition if there are enough.
func (w *worker) add(records []*kgo.Record) {
	if len(records) == 0 {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range records {
		w.buffered = append(w.buffered, delivery(r, w.partition.Incarnation))
		w.bytes += sizeOf(&w.buffered[len(w.buffered)-1])
	}
	w.next = records[len(records)-1].Offset + 1
	w.regulate()
	w.wake()
}

// holds reports whether at least this part (a half: 2) of the maximum is buffered.
func (w *worker) holds(part int) bool {
	return w.bytes >= bufferedBytesMax/part || len(w.buffered) >= bufferedMax/part
}

// fail ends the member once all messages are settled.
func (w *worker) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.failure = err
	w.wake()
}

func (w *worker) hasFailed() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.failure != nil
}

func (w *worker) wake() {
	select {
	case w.news <- struct{}{}:
	default:
	}
}

// settle drops the messages that are settled, and marks their offsets for the broker.
func (w *worker) settle(n int) {
	if n == 0 {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	next := w.buffered[n-1].Offset + 1
	for i := range n {
		w.bytes -= sizeOf(&w.buffered[i])
		w.buffered[i] = consumer.Delivery{}
	}
	w.buffered = w.buffered[n:]
	w.member.kgo.MarkCommitOffsets(map[string]map[int32]kgo.EpochOffset{w.partition.Source: {w.partition.Number: {Epoch: -1, Offset: next}}})
	w.regulate()
}

// regulate pauses or resumes the fetching of the partition.
func (w *worker) regulate() {
	self := map[string][]int32{w.partition.Source: {w.partition.Number}}
	switch {
	case !w.paused && (w.resting || w.holds(1)):
		w.paused = true
		w.member.kgo.PauseFetchPartitions(self)
	case w.paused && !w.resting && !w.holds(2):
		w.paused = false
		w.member.kgo.ResumeFetchPartitions(self)
	}
}

// rest leaves the partition out of fetches for errorPause: the library would ask again at once.
func (w *worker) rest() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.resting {
		return
	}
	w.resting = true
	w.regulate()
	time.AfterFunc(errorPause, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.resting { // and has not ended
			w.resting = false
			w.regulate()
		}
	})
}

// release drops the buffered messages and resumes the fetching: another worker may get the
// partition.
func (w *worker) release() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.buffered, w.bytes, w.resting = nil, 0, false
	w.regulate()
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

// Headers of other producers that have a message's id: CloudEvents, and Debezium's outbox.
var foreignIDs = [...]string{"ce_id", "id"}

// delivery returns the message of a record.
func delivery(r *kgo.Record, incarnation [16]byte) consumer.Delivery {
	d := consumer.Delivery{Message: message.Message{Topic: r.Topic, Key: r.Key, Body: r.Value}, Offset: r.Offset, Time: r.Timestamp}
	header := map[string][]string{}
	for _, h := range r.Headers {
		if h.Key == IDHeader && d.ID == "" {
			d.ID = string(h.Value)
			continue
		}
		header[h.Key] = append(header[h.Key], string(h.Value))
	}
	for _, name := range foreignIDs {
		if values := header[name]; d.ID == "" && len(values) > 0 {
			d.ID = values[0]
		}
	}
	if d.ID == "" {
		d.ID = fmt.Sprintf("%s/%d/%d", r.Topic, r.Partition, r.Offset)
		if incarnation != [16]byte{} { // offsets begin again in a topic that is recreated
			d.ID += fmt.Sprintf("/%x", incarnation)
		}
	}
	if d.Header = header; !valid(header) {
		d.Header = map[string][]string{}
		for _, name := range slices.Sorted(maps.Keys(header)) {
			if d.Header[name] = header[name]; !valid(d.Header) { // the header itself, or too much in all
				delete(d.Header, name)
			}
		}
	}
	return d
}

// valid reports whether headers keep the rules of [message.Message].
func valid(header map[string][]string) bool {
	return (&idempotency.Answer{Status: idempotency.StatusMin, Header: header}).Validate() == nil
}
