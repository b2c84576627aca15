package server

import (
	"context"
	"errors"
	"testing"
	"time"
)

// TestAClosedGateWaitsForRequests: it waits for requests longer than for idle connections, until
// they end or ctx does.
func TestAClosedGateWaitsForRequests(t *testing.T) {
	t.Parallel()
	g := newGate()
	if !g.enter() {
		t.Fatal("an open gate refused a request")
	}
	g.close()
	ctx, cancel := context.WithTimeout(t.Context(), lingerTimeout+200*time.Millisecond)
	defer cancel()
	if err := g.drain(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with a request in flight drain says %v", err)
	}
	if g.enter() {
		t.Error("a closed gate let a request in")
	}
	drained := make(chan error, 1)
	go func() { drained <- g.drain(t.Context()) }()
	g.leave()
	if err := <-drained; err != nil {
		t.Errorf("after the last request drain says %v", err)
	}
}
