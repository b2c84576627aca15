package live

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Limits of the stream.
const (
	// ViewersMax is the maximum number of open streams. Further viewers get a 503 with Retry-After.
	ViewersMax = 100

	updateInterval = 100 * time.Millisecond // minimum between two updates
	pingInterval   = 15 * time.Second
	ringMax        = 64        // updates kept for viewers that reconnect
	ringBytesMax   = 512 << 10 // of all events in the ring
	queueMax       = 32        // queued events per viewer; one that is further behind is dropped
)

var (
	errViewersMax = errors.New("too many viewers")
	errClosed     = errors.New("the bank is stopping")
)

// hub sends frames to viewers. It encodes an update once: all viewers and the ring share its bytes.
type hub struct {
	epoch string
	board *board

	mu        sync.Mutex
	viewers   map[*viewer]struct{}
	present   chan struct{} // closed while there are viewers
	sequence  int64         // of the last update
	ring      []event       // the last updates, oldest first
	ringBytes int
	closed    bool
}

// event is an encoded event.
type event struct {
	sequence int64
	bytes    []byte
}

// viewer is one open stream.
type viewer struct {
	first  []byte // sent first
	events chan []byte
	gone   chan struct{} // closed when it must end
	abort  func()        // ends a blocked write; nil until set
}

func newHub(epoch string, b *board) *hub {
	return &hub{epoch: epoch, board: b, viewers: map[*viewer]struct{}{}, present: make(chan struct{})}
}

// join opens a stream. last is the id of the last event that the viewer saw. If the ring still
// holds every later event, the viewer first gets those, each once. Otherwise it first gets a
// snapshot. The error is errViewersMax or errClosed.
func (h *hub) join(last string) (*viewer, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.closed:
		return nil, errClosed
	case len(h.viewers) >= ViewersMax:
		return nil, errViewersMax
	}
	v := &viewer{events: make(chan []byte, queueMax), gone: make(chan struct{})}
	var resumed bool
	if v.first, resumed = h.after(last); !resumed {
		frame := h.board.snapshot(time.Now())
		frame.Epoch, frame.Limits = h.epoch, &limits
		v.first = h.encode("snapshot", h.sequence, frame)
	}
	if len(h.viewers) == 0 {
		close(h.present)
	}
	h.viewers[v] = struct{}{}
	return v, nil
}

// after returns the events after the one with the given id, or false if some are missing.
func (h *hub) after(last string) ([]byte, bool) {
	number, ok := strings.CutPrefix(last, h.epoch+"-")
	sequence, err := strconv.ParseInt(number, 10, 64)
	if !ok || err != nil || sequence > h.sequence || sequence < h.sequence-int64(len(h.ring)) {
		return nil, false
	}
	var missed bytes.Buffer
	for _, e := range h.ring {
		if e.sequence > sequence {
			missed.Write(e.bytes)
		}
	}
	return missed.Bytes(), true
}

// leave closes a stream. The stream may have been dropped already.
func (h *hub) leave(v *viewer) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.remove(v)
}

func (h *hub) remove(v *viewer) {
	if _, ok := h.viewers[v]; !ok {
		return
	}
	delete(h.viewers, v)
	close(v.gone)
	if v.abort != nil {
		v.abort()
	}
	if len(h.viewers) == 0 {
		h.present = make(chan struct{})
	}
}

// close ends all streams and refuses new ones.
func (h *hub) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for v := range h.viewers {
		h.remove(v)
	}
}

// watched returns a channel that is closed while there are viewers.
func (h *hub) watched() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.present
}

// run publishes changes until ctx ends.
func (h *hub) run(ctx context.Context) {
	h.whileWatched(ctx, func() time.Duration {
		h.publish()
		return updateInterval
	})
}

// whileWatched calls do repeatedly until ctx ends, but only while there are viewers. do returns the
// pause before the next call. The pause begins when do returns, so a late timer never shortens it.
func (h *hub) whileWatched(ctx context.Context, do func() (pause time.Duration)) {
	pause := time.NewTimer(0)
	defer pause.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-pause.C:
		}
		select {
		case <-ctx.Done():
			return
		case <-h.watched():
		}
		pause.Reset(do())
	}
}

// publish sends one update if anything changed.
func (h *hub) publish() {
	h.mu.Lock()
	defer h.mu.Unlock()
	frame := h.board.take(time.Now())
	if frame == nil {
		return
	}
	h.sequence++
	e := event{h.sequence, h.encode("update", h.sequence, frame)}
	h.ring, h.ringBytes = append(h.ring, e), h.ringBytes+len(e.bytes)
	for len(h.ring) > ringMax || h.ringBytes > ringBytesMax {
		h.ringBytes -= len(h.ring[0].bytes)
		h.ring[0].bytes = nil
		h.ring = h.ring[1:]
	}
	for v := range h.viewers {
		select {
		case v.events <- e.bytes:
		default: // it reads too slowly; it reconnects, and gets the missed events or a snapshot
			h.remove(v)
		}
	}
}

// encode returns an event of the stream. encoding/json writes no line breaks, so one data line is
// enough.
func (h *hub) encode(kind string, sequence int64, frame *Frame) []byte {
	data, err := json.Marshal(frame)
	if err != nil { // only our own types are passed
		panic(err)
	}
	return fmt.Appendf(make([]byte, 0, len(data)+64), "id: %s-%d\nevent: %s\ndata: %s\n\n", h.epoch, sequence, kind, data)
}
