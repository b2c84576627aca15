package server

import (
	"context"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
)

// lingerTimeout is the time for which a closed gate still answers on open but idle connections. A
// request may be on its way on each, and its client should get a refusal, not a cut connection.
const lingerTimeout = time.Second

// gate counts the requests in progress. Once it is closed, it refuses new ones.
type gate struct {
	changed chan struct{} // holds a token if something changed since drain last looked

	mu          sync.Mutex
	closed      bool
	requests    int
	connections int
}

func newGate() *gate { return &gate{changed: make(chan struct{}, 1)} }

// handler passes requests to next while the gate is open. Afterwards it refuses them and closes
// their connections. A refused request never reached the database, so its status is not-executed.
func (g *gate) handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !g.enter() {
			h := w.Header()
			h.Set("Connection", "close")
			h.Set("Retry-After", "1")
			h.Set("Idempotency-Status", "not-executed")
			bank.WriteProblem(w, &bank.Problem{
				Status: http.StatusServiceUnavailable, Slug: "unavailable", Title: "The bank is stopping",
				Detail: "This request left nothing in the database. Try again with the same key, or give up if no earlier one may have been executed.",
			})
			return
		}
		defer g.leave()
		next.ServeHTTP(w, r)
	})
}

func (g *gate) enter() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return false
	}
	g.requests++
	return true
}

func (g *gate) leave() {
	g.mu.Lock()
	g.requests--
	g.mu.Unlock()
	g.signal()
}

// connState counts open connections. It is the ConnState of an http.Server.
func (g *gate) connState(_ net.Conn, state http.ConnState) {
	g.mu.Lock()
	switch state {
	case http.StateNew:
		g.connections++
	case http.StateClosed, http.StateHijacked:
		g.connections--
	}
	g.mu.Unlock()
	g.signal()
}

func (g *gate) signal() {
	select {
	case g.changed <- struct{}{}:
	default: // drain has a token already
	}
}

// close makes the gate refuse requests from now on.
func (g *gate) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
}

// drain blocks until no request is in progress and either no connection is open or lingerTimeout
// has passed. It returns ctx's error if ctx ends first. The gate must be closed.
func (g *gate) drain(ctx context.Context) error {
	linger := time.NewTimer(lingerTimeout)
	defer linger.Stop()
	lingering := true
	for {
		g.mu.Lock()
		requests, connections := g.requests, g.connections
		g.mu.Unlock()
		if requests == 0 && (connections == 0 || !lingering) {
			return nil
		}
		select {
		case <-g.changed:
		case <-linger.C:
			lingering = false
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
