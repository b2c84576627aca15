package admin

import (
	"context"
	"sync"
	"testing"
	"time"
)

// Concurrent readers cause one query, and a reader with no time left does not wait.
func TestFiguresAreAskedForOnce(t *testing.T) {
	t.Parallel()
	under := &figuresAnswer{done: make(chan struct{})}
	f := &figures{newest: under}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := f.get(gone, nil); err != context.Canceled {
		t.Errorf("who is gone waits: %v", err)
	}
	var wait sync.WaitGroup
	for range 8 {
		wait.Go(func() {
			// A nil operator can't be queried.
			if stats, err := f.get(context.Background(), nil); err != nil || stats.InFlight != 7 {
				t.Errorf("%v, %v", stats.InFlight, err)
			}
		})
	}
	under.stats.InFlight, under.at = 7, time.Now()
	close(under.done)
	wait.Wait()
	under.at = time.Now().Add(-figuresAgeMax)
	if !under.old() {
		t.Error("figures never become old")
	}
}
