package chaos

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/storm"
	"github.com/paidonce/idempotency/internal/deadline"
)

const (
	reusedPause = 16 * time.Millisecond // between two checks whether an expired record is gone
	laterMin    = time.Second
	laterMax    = 5 * time.Second
	lanesMax    = 5 // copies of one key that a client has in flight at once
	idlePause   = 20 * time.Millisecond
)

// client works on one key after another, with a few conns: it sends some keys twice or more at
// once.
type client struct{ lanes [lanesMax]*lane }

func newClient(r *run, id int) *client {
	c := &client{}
	for i := range c.lanes {
		c.lanes[i] = newLane(r, id*lanesMax+i)
	}
	return c
}

func (c *client) close() {
	for _, l := range c.lanes {
		l.Close()
	}
}

// work takes new keys and later copies until the load ends, and then the remaining later copies.
func (c *client) work(ctx context.Context) {
	r := c.lanes[0].run
	for ctx.Err() == nil {
		over := r.loadOver.Load()
		if k := r.later.pop(over); k != nil {
			r.tally.clientFaults.add("later copy")
			c.lanes[0].ask(ctx, k, false, storm.NoTrouble)
			continue
		}
		if over {
			return
		}
		c.drive(ctx, r.keys.next())
	}
}

// drive sends a key's copies: some at once, some after the answer. It leaves some for later.
func (c *client) drive(ctx context.Context, k *key) {
	r := c.lanes[0].run
	choice := rand.New(rand.NewPCG(r.config.Seed^0xc0b1e5, uint64(k.index)))
	if k.asks == askReused {
		r.planted.reuse(ctx, k)
	}
	if k.together > 1 {
		r.tally.clientFaults.add("copies at once")
	}
	r.tally.asked(k)
	group := sync.WaitGroup{}
	barrier := make(chan struct{})
	for n := range k.together {
		t := r.drawTrouble(choice)
		group.Go(func() {
			<-barrier
			c.lanes[n].ask(ctx, k, false, t)
		})
	}
	close(barrier)
	group.Wait()
	for range k.after {
		c.lanes[0].ask(ctx, k, false, r.drawTrouble(choice))
	}
	// After the key's own answer, so that the changed request cannot be the one that is executed.
	if k.changed && !k.open() {
		c.lanes[0].ask(ctx, k, true, storm.NoTrouble)
	}
	if k.later > 0 && !k.abandoned() {
		r.later.push(k, time.Now().Add(laterMin+rand.N(laterMax-laterMin)))
	}
}

// drawTrouble chooses the trouble of a copy's first request.
func (r *run) drawTrouble(choice *rand.Rand) storm.Trouble {
	n, s := choice.IntN(1000), r.profile.shares
	for _, one := range []struct {
		share int
		storm.Trouble
	}{{s.cut, storm.Cut}, {s.hangUp, storm.HangUp}, {s.halfSent, storm.HalfSent}, {s.slow, storm.Slow}} {
		if n -= one.share; n < 0 {
			return one.Trouble
		}
	}
	return storm.NoTrouble
}

// ask sends a key's request until it has its final answer, the key is given up, or ctx ends. It
// follows the table for clients in docs/guarantees.md.
func (l *lane) ask(ctx context.Context, k *key, changed bool, t storm.Trouble) {
	backoff := storm.BackoffFirst
	for tries := 1; ctx.Err() == nil && k.begin(); tries++ {
		l.run.tally.trouble(t)
		what := l.send(ctx, k, changed, false, t)
		if first := k.end(what); first && !k.scripted {
			l.run.noteAnswer()
		}
		l.run.finished(what)
		t = storm.NoTrouble
		switch what {
		case resultAnswered, resultMismatch:
			if changed != (what == resultMismatch) {
				l.run.unexpected.add("key %s: %s", k.text, map[bool]string{true: "another body was answered", false: "its own body was called a mismatch"}[changed])
			} else if changed {
				l.run.tally.clientFaults.add("changed body")
			}
			return
		case resultParked:
			return
		case resultNotExecuted:
			if !k.scripted && l.choice.Float64() < l.run.profile.giveUp && k.giveUp() {
				l.run.tally.clientFaults.add("given up")
				return
			}
		}
		if tries == k.triesMax {
			l.run.tally.clientFaults.add("left before the end")
			return
		}
		pause := backoff
		if k.asks == askReused && what == resultAgain {
			pause = reusedPause
		}
		if deadline.Sleep(ctx, pause/2+rand.N(pause/2)) != nil {
			return
		}
		backoff = min(2*backoff, storm.BackoffMax)
	}
}

// load drives the clients and makes the faults until both are done, then ends the load. It returns
// while clients may still wait for answers: settle waits for them.
func (r *run) load(ctx context.Context) error {
	for i := range r.config.Clients {
		c := newClient(r, i)
		r.clients = append(r.clients, c)
		r.working.Go(func() { c.work(ctx) })
	}
	group, groupCtx := errgroup.WithContext(ctx)
	for _, track := range r.tracks() {
		group.Go(func() error { return r.breakThings(groupCtx, track) })
	}
	group.Go(func() error { return r.awaitLoad(groupCtx) })
	r.directed.early(ctx)
	err := group.Wait()
	r.loadOver.Store(true)
	r.loadEnded = r.clock()
	return err
}

// overtime bounds a run that has not reached its whole schedule: it sends at most overtime times
// its operations.
const overtime = 2

// awaitLoad blocks until the clients have sent enough and every fault of the schedule was made. It
// gives up on the missing faults after overtime times the operations.
func (r *run) awaitLoad(ctx context.Context) error {
	limit := int64(overtime * r.config.Operations)
	for r.tally.finished.Load() < int64(r.config.Operations) || !r.commits.exhausted() || !r.banks.disarmed() || r.eventsLeft.Load() > 0 {
		if r.tally.finished.Load() >= limit {
			return nil // the report finds the faults that were not reached
		}
		if err := deadline.Sleep(ctx, idlePause); err != nil {
			return err
		}
	}
	return nil
}

// queue holds the keys that have a later copy. It is safe for concurrent use.
type queue struct {
	mu    sync.Mutex
	later []laterCopy // the first that is due comes first
}

type laterCopy struct {
	key *key
	due time.Time
}

func (q *queue) push(k *key, due time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	at, _ := slices.BinarySearchFunc(q.later, due, func(l laterCopy, due time.Time) int { return l.due.Compare(due) })
	q.later = slices.Insert(q.later, at, laterCopy{k, due})
}

// pop returns a key that is due, or any key if all is true. It returns nil if there is none.
func (q *queue) pop(all bool) *key {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.later) == 0 || !all && time.Now().Before(q.later[0].due) {
		return nil
	}
	first := q.later[0].key
	q.later = slices.Delete(q.later, 0, 1)
	return first
}
