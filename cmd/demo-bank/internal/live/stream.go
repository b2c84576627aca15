package live

import (
	"errors"
	"net/http"
	"time"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
)

const (
	writeTimeout = 5 * time.Second // for a viewer to take an event
	// reconnectLine tells EventSource how long to wait before it comes again.
	reconnectLine = "retry: 1000\n\n"
	pingLine      = ": ping\n\n"
)

// events answers GET /live/events: server-sent events, a snapshot and then updates, at most ten a second.
func (l *Live) events(w http.ResponseWriter, r *http.Request) {
	v, err := l.hub.join(r.Header.Get("Last-Event-ID"))
	if err != nil {
		refuse(w, err)
		return
	}
	defer l.hub.leave(v)
	h := w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("Cache-Control", "no-store")
	if r.Method == http.MethodHead {
		return
	}
	// net/http takes the deadline off reads itself; that of writes, the server's WriteTimeout, would end the stream.
	stream := http.NewResponseController(w)
	l.hub.onAbort(v, func() { _ = stream.SetWriteDeadline(time.Unix(1, 0)) }) // a connection that is gone needs no deadline
	send := func(bytes []byte) bool {
		if stream.SetWriteDeadline(time.Now().Add(writeTimeout)) != nil {
			return false
		}
		select {
		case <-v.gone: // and its abort may have come before the deadline just set
			return false
		default:
		}
		_, err := w.Write(bytes)
		return err == nil && stream.Flush() == nil
	}

	if !send(append([]byte(reconnectLine), v.first...)) {
		return
	}
	ping := time.NewTicker(pingInterval)
	defer ping.Stop()
	for {
		var bytes []byte
		select {
		case <-r.Context().Done():
			return
		case <-v.gone:
			return
		case bytes = <-v.events:
		case <-ping.C: // so that proxies keep the stream, and one that nobody reads is found
			bytes = []byte(pingLine)
		}
		if !send(bytes) {
			return
		}
	}
}

// onAbort says what ends a write to v that blocks.
func (h *hub) onAbort(v *viewer, abort func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	v.abort = abort
}

// refuse tells a viewer to come again.
func refuse(w http.ResponseWriter, err error) {
	p := &bank.Problem{Status: http.StatusServiceUnavailable, Slug: "unavailable", Title: "The bank is stopping", Detail: "Come again when it is back."}
	after := "1"
	if errors.Is(err, errViewersMax) {
		p.Slug, p.Title, p.Detail = "viewers-max", "Too many viewers", "Others watch already, as many as the bank serves at once. Come again later."
		after = "5"
	}
	w.Header().Set("Retry-After", after)
	bank.WriteProblem(w, p)
}
