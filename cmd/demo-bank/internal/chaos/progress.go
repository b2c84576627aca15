package chaos

import (
	"fmt"
	"sync"
	"time"
)

const (
	progressTerminal = 200 * time.Millisecond
	progressPlain    = 10 * time.Second
)

// showProgress says how far the run is until the returned function is called.
func (r *run) showProgress() (end func()) {
	w := r.config.Progress
	if w == nil {
		return func() {}
	}
	stop := make(chan struct{})
	var group sync.WaitGroup
	group.Go(func() {
		interval, before, after := progressPlain, "chaos: ", "\n"
		if r.config.Terminal {
			interval, before, after = progressTerminal, "\r\x1b[K", ""
		}
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for {
			// A terminal that is gone is no reason to stop.
			_, _ = fmt.Fprint(w, before, r.progress(), after)
			select {
			case <-tick.C:
			case <-stop:
				if r.config.Terminal {
					_, _ = fmt.Fprint(w, "\r\x1b[K")
				}
				return
			}
		}
	})
	return sync.OnceFunc(func() {
		close(stop)
		group.Wait()
	})
}

func (r *run) progress() string {
	t := &r.tally
	return fmt.Sprintf("%.0f s, %s, seed %d: %d of %d requests, %d keys, %d replayed, %d kills, %d crashes, %d faults of a COMMIT, %d unknown",
		r.clock().Seconds(), r.phase(), r.config.Seed, t.finished.Load(), r.config.Operations, len(r.keys.all()), t.replays.Load(),
		t.kills.Load(), t.crashes.Load(), t.commitFaults.total(), t.unknown.Load())
}
