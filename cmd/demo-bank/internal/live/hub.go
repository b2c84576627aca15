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
	// ViewersMax is how many streams are open at once; who comes above it is told to come again.
	ViewersMax = 100

	updateInterval = 100 * time.Millisecond // at least, between two updates
	pingInterval   = 15 * time.Second
	ringMax        = 64        // updates that a viewer who comes back can still be sent
	ringBytesMax   = 512 << 10 // of them all
	queueMax       = 32        // events that wait for one viewer: who is further behind is dropped
)

var (
	errViewersMax = errors.New("too many viewers")
	errClosed     = errors.New("the bank is stopping")
)

// hub sends frames to viewers. An update is encoded once, and its bytes are shared by all of them and by the ring.
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

// event is an event as it goes over the wire.
type event struct {
	sequence int64
	bytes    []byte
}

// viewer is one open stream.
type viewer struct {
	first  []byte // what it is sent first
	events chan []byte
	gone   chan struct{} // closed where it has to end
	abort  func()        // ends a write that blocks; nil until there is one
}

func newHub(epoch string, b *board) *hub {
	return &hub{epoch: epoch, board: b, viewers: map[*viewer]struct{}{}, present: make(chan struct{})}
}

// join opens a stream. last is the id of the last event that the viewer saw: where the ring still holds what came
// after it, that is what it is sent first, each event once and none left out, and else a snapshot. The error is
// errViewersMax or errClosed.
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

// after returns the updates after the event with the given id, and false where they are not all there.
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

// leave closes a stream. It may have been dropped before.
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

// close ends all streams, and lets none begin.
func (h *hub) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for v := range h.viewers {
		h.remove(v)
	}
}

// watched returns a channel that is closed as long as somebody watches.
func (h *hub) watched() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.present
}

// run publishes what changes, until ctx ends.
func (h *hub) run(ctx context.Context) {
	h.whileWatched(ctx, func() time.Duration {
		h.publish()
		return updateInterval
	})
}

// whileWatched calls do again and again until ctx ends, and not while nobody watches. do returns how long to pause after
// it: no two calls are closer to each other, however late a timer is.
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

// publish sends one update where something changed.
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
		default: // it reads too slowly: it comes again and gets what it missed, or a snapshot
			h.remove(v)
		}
	}
}

// encode returns an event of the stream. encoding/json writes no line break, so one data line holds it.
func (h *hub) encode(kind string, sequence int64, frame *Frame) []byte {
	data, err := json.Marshal(frame)
	if err != nil { // only our own types come here
		panic(err)
	}
	return fmt.Appendf(make([]byte, 0, len(data)+64), "id: %s-%d\nevent: %s\ndata: %s\n\n", h.epoch, sequence, kind, data)
}
