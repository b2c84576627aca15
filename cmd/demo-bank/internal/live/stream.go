package live

import (
	"errors"
	"net/http"
	"time"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
)

const (
	writeTimeout = 5 * time.Second // for one event to one viewer
	// reconnectLine sets EventSource's pause before it reconnects, in milliseconds.
	reconnectLine = "retry: 1000\n\n"
	pingLine      = ": ping\n\n"
)

// events answers GET /live/events with server-sent events: a snapshot or the missed updates, then
// at most ten updates a second.
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
	// net/http removes the read deadline itself. The write deadline, from the server's
	// WriteTimeout, would end the stream.
	stream := http.NewResponseController(w)
	// Ignored: a connection that is gone needs no deadline.
	l.hub.onAbort(v, func() { _ = stream.SetWriteDeadline(time.Unix(1, 0)) })
	send := func(bytes []byte) bool {
		if stream.SetWriteDeadline(time.Now().Add(writeTimeout)) != nil {
			return false
		}
		select {
		case <-v.gone: // its abort may have come before the deadline was set above
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
		case <-ping.C: // keeps proxies from closing the stream, and detects dead viewers
			bytes = []byte(pingLine)
		}
		if !send(bytes) {
			return
		}
	}
}

// onAbort sets the function that ends a blocked write to v.
func (h *hub) onAbort(v *viewer, abort func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	v.abort = abort
}

// refuse answers 503 with Retry-After.
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
