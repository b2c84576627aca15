package chaos

import (
	"fmt"

	"github.com/paidonce/idempotency/cmd/internal/terminal"
)

// showProgress shows the run's progress until the returned function is called.
func (r *run) showProgress() (end func()) {
	return terminal.ShowProgress(r.config.Progress, r.config.Terminal, "chaos", r.progress)
}

func (r *run) progress() string {
	t := &r.tally
	return fmt.Sprintf("%.0f s, %s, seed %d: %d of %d requests, %d keys, %d in the final replay, %d kills, %d crashes, %d faults of a COMMIT, %d unknown",
		r.clock().Seconds(), r.phase(), r.config.Seed, t.finished.Load(), r.config.Operations, len(r.keys.all()), t.replays.Load(),
		t.kills.Load(), t.crashes.Load(), t.commitFaults.total(), t.unknown.Load())
}
