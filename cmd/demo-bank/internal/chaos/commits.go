package chaos

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/process"
	"github.com/paidonce/idempotency/internal/deadline"
	"github.com/paidonce/idempotency/internal/pgfault"
)

// commits makes faults of COMMITs that carry a key, as they pass the proxies. It is safe for
// concurrent use.
type commits struct {
	run  *run
	seen atomic.Int64 // COMMITs with a key

	// killNext makes the backend of the next such COMMIT die of SIGKILL. The channel is closed once
	// that was done.
	killNext atomic.Pointer[chan struct{}]

	mu       sync.Mutex
	left     []commitFault
	stops    []stop
	seenOpen map[openCommit]int64
	calmed   bool // in a lull, in which no bank is killed
	halfOpen int  // the number that a lull still makes
}

// When the schedule's faults are used up, one of resolveEvery COMMITs is cut for a bank that is to
// die while it resolves.
const resolveEvery = 10

// hangUpPause delays a COMMIT after its client has hung up, so that the bank can notice.
const hangUpPause = 50 * time.Millisecond

func newCommits(r *run) *commits {
	return &commits{run: r, left: r.schedule.commits, stops: r.schedule.stops}
}

func (c *commits) exhausted() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.left) == 0 && len(c.stops) == 0
}

// fault decides the fault of a COMMIT through a bank's proxy.
func (c *commits) fault(bank int, commit pgfault.Commit) pgfault.Fault {
	forward := pgfault.Fault{Kind: pgfault.Forward}
	k := c.run.keys.find(commit.Messages)
	if k == nil {
		return forward
	}
	if c.run.profile.effects {
		if f, ok := c.faultOpen(bank, commit, k); ok {
			return f
		}
	}
	if c.run.healed.Load() {
		return forward
	}
	n := c.seen.Add(1)
	if told := c.killNext.Swap(nil); told != nil {
		c.run.keys.markExempt(k)
		return pgfault.Fault{Kind: pgfault.CallAfter, Hook: func() {
			c.run.noteFault()
			_ = process.Kill(int(commit.BackendPID)) // it may have ended
			close(*told)
		}}
	}
	f, due := c.take(n, k)
	if !due && c.exhausted() && n%resolveEvery == 0 && c.run.banks.awaitsResolve(bank) {
		// Otherwise its crash point would never be reached.
		f, due = commitFault{commit: n, kind: cutAfter}, true
	}
	if !due {
		return forward
	}
	c.run.noteFault()
	c.run.tally.commitFaults.add(string(f.kind))
	c.run.note("bank %d: COMMIT %d of key %d: %s", bank, n, k.index, f.kind)
	switch f.kind {
	// For a while PostgreSQL itself might not know the outcome.
	case terminateBefore, terminateAfter, lateCommit, halfOpen:
		c.run.keys.markExempt(k)
	}
	kind, known := kinds[f.kind]
	if !known {
		panic("chaos: no fault of a COMMIT is named " + string(f.kind))
	}
	broken := pgfault.Fault{Kind: kind, Delay: f.delay}
	switch f.kind {
	case terminateBefore, terminateAfter:
		broken.Hook = func() { c.run.terminate(commit.BackendPID) }
	case hangUpAtCommit:
		broken.Hook = func() {
			c.run.keys.hangUp(k)
			_ = deadline.Sleep(context.Background(), hangUpPause)
		}
	case killCommitting:
		broken.Hook = func() { c.run.banks.kill(bank, arm{}) }
	}
	return broken
}

// kinds maps each kind to the proxy's fault.
var kinds = map[commitKind]pgfault.Kind{
	cutBefore: pgfault.CutBefore, cutAfter: pgfault.CutAfter, silence: pgfault.Silence, lateCommit: pgfault.LateCommit,
	halfOpen: pgfault.HalfOpen, delayReply: pgfault.DelayReply, terminateBefore: pgfault.CallBefore, terminateAfter: pgfault.CallAfter,
	hangUpAtCommit: pgfault.CallBefore, killCommitting: pgfault.CallAfter,
}

// calm begins a lull with halfOpen half-open COMMITs; 0 ends the lull.
func (c *commits) calm(halfOpen int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calmed, c.halfOpen = halfOpen > 0, halfOpen
}

// take returns the fault that is due at the n-th COMMIT and can apply to this key's.
func (c *commits) take(n int64, k *key) (commitFault, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.halfOpen > 0 && !k.hot {
		c.halfOpen--
		return commitFault{commit: n, kind: halfOpen}, true
	}
	for i, f := range c.left {
		if f.commit > n {
			break
		}
		if c.calmed && f.kind == killCommitting {
			continue
		}
		// A transaction that stays open holds its rows. The rows of a hot key would block many
		// others.
		if f.kind == halfOpen && k.hot {
			continue
		}
		// In place: the skipped faults are few and at the front.
		copy(c.left[1:i+1], c.left[:i])
		c.left = c.left[1:]
		return f, true
	}
	return commitFault{}, false
}

// terminate ends one backend in order.
func (r *run) terminate(pid uint32) {
	_ = r.cluster.admin.use(context.Background(), r.cluster, func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, `SELECT pg_terminate_backend($1)`, int32(pid)) // it may have ended
		return err
	})
}
