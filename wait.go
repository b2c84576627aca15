package idempotency

import (
	"context"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/paidonce/idempotency/internal/deadline"
)

// WaitMax is the longest [Options.Wait]: about as long as a service that is gone can hold a key in PostgreSQL, and as
// clients and balancers have patience.
const WaitMax = time.Minute

// Pauses between two claims of a request that waits for an attempt of another process.
const (
	waitPauseMin = 25 * time.Millisecond
	waitPauseMax = 250 * time.Millisecond
)

// inQueue takes a request that may wait through the protocol. The first with its key in this process is the leader: it
// asks the store. The others, its followers, wait in memory until it ends, and are told what it knows then, or one of
// them that it leads now. So many duplicates take one connection, and none while the attempt that they wait for is in
// another process: the leader claims again and again, and holds nothing in between.
func (e *Engine) inQueue(ctx context.Context, req *Request, run RunFunc, trace *trace) (result Result) {
	over := time.Now().Add(e.options.Wait)
	place, ok := e.family.queues.enter(req.Key, e.followersMax())
	if !ok { // too many wait already
		return e.attempts(ctx, req, run, trace, nil)
	}
	defer func() { place.leave(&result) }() // whatever way this is left by, somebody else leads
	if !place.leads {
		if result, settled := follow(ctx, req, place, over, trace); settled {
			return result
		}
	}
	for pause := waitPauseMin; ; pause = min(2*pause, waitPauseMax) {
		result = e.attempts(ctx, req, run, trace, &place.derived)
		if result.Outcome != OutcomeInProgress || decide(factOfWait(mayWait(ctx, over))).action != actionWait {
			return result
		}
		// Processes that wait for the same key should not ask at the same time. The last look is when the time is over.
		jittered := pause*3/4 + rand.N(pause/2)
		started := trace.wait()
		gone := sleep(ctx, min(jittered, time.Until(over)))
		trace.step(StepWait, started, gone)
		if gone != nil { // nothing is begun, and nobody would take the answer
			return refuse(decide(factOfWait(false)), gone)
		}
	}
}

// follow waits behind the leader. It returns a result, or false where the request asks the store itself: because it leads
// now, or its time is over. A leader that is slow for reasons of its own must not keep an answer from it.
func follow(ctx context.Context, req *Request, place *place, over time.Time, trace *trace) (result Result, settled bool) {
	started := trace.wait()
	told, err := place.wait(ctx, over)
	fact := factTurn
	if err == nil {
		fact = factOfLeader(req, told)
	}
	err = nil
	if decide(fact).action == actionClaim && ctx.Err() != nil {
		fact, err = factInProgress, errClientGone(ctx) // nothing is begun, and nobody would take the answer
	}
	trace.step(StepWait, started, err)
	switch decision := decide(fact); decision.action {
	case actionClaim:
		return Result{}, false
	case actionReplay:
		return Result{Outcome: decision.outcome, Answer: &told.Record.Answer, Record: told.Record}, true
	default:
		if decision.outcome == OutcomeUnknown {
			err = errAwaitedUnknown
		}
		return refuse(decision, err), true
	}
}

// followersMax is how many requests may wait in memory: half of those that may be in flight, or any number.
func (e *Engine) followersMax() int {
	if e.options.InFlightMax < 0 {
		return math.MaxInt
	}
	return e.options.InFlightMax / 2
}

// mayWait reports whether a request's time goes on, and its client is there.
func mayWait(ctx context.Context, over time.Time) bool {
	return ctx.Err() == nil && time.Now().Before(over)
}

// errAwaitedUnknown is why a request is unknown that waited. What went wrong is told of the attempt alone.
var errAwaitedUnknown = fmt.Errorf("%w: that of the attempt which the request waited for, or its record can't be compared", ErrUnknown)

// errWaitOver is why a request no longer waits, and looks for itself.
var errWaitOver = fmt.Errorf("%w: Options.Wait is over", ErrInProgress)

// errClientGone is why a request no longer waits, and begins nothing.
func errClientGone(ctx context.Context) error {
	return fmt.Errorf("%w: the client did not wait: %w", ErrInProgress, ctx.Err())
}

// sleep returns nil after d, or why the wait is over before.
func sleep(ctx context.Context, d time.Duration) error {
	if deadline.Sleep(ctx, d) != nil {
		return errClientGone(ctx)
	}
	return nil
}

// queues are the requests of one process that may wait, by key. A queue is there for as long as it has a leader. It is safe
// for concurrent use, and as large as there are requests in flight.
type queues struct {
	mu        sync.Mutex
	byKey     map[Key]*queue
	followers int // of all queues together
}

// queue is the requests with one key.
type queue struct {
	followers []*place // in the order of their arrival; guarded by queues.mu
}

// place is a request's place in its queue. It is used by the request's goroutine.
type place struct {
	queues  *queues
	queue   *queue
	key     Key
	leads   bool
	derived atomic.Bool  // whether a run of the request has called DerivedKey
	news    chan *Result // of a follower: once it is out of the queue, its result is here or comes at once. Nil: it leads
}

// enter gives a request its place, which must be left. It reports false where there are followersMax followers already.
func (q *queues) enter(key Key, followersMax int) (*place, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	p := &place{queues: q, queue: q.byKey[key], key: key}
	if p.queue == nil {
		p.queue, p.leads = &queue{}, true
		if q.byKey == nil {
			q.byKey = map[Key]*queue{}
		}
		q.byKey[key] = p.queue
		return p, true
	}
	if q.followers >= followersMax {
		return nil, false
	}
	p.news = make(chan *Result, 1)
	p.queue.followers = append(p.queue.followers, p)
	q.followers++
	return p, true
}

// wait returns what a follower is told, nil where it leads now, or an error where ctx or its time ended first.
func (p *place) wait(ctx context.Context, over time.Time) (told *Result, err error) {
	timer := time.NewTimer(time.Until(over))
	defer timer.Stop()
	select {
	case told = <-p.news:
		p.leads = told == nil
		return told, nil
	case <-timer.C:
	case <-ctx.Done():
	}
	if p.withdraw() {
		if ctx.Err() == nil {
			return nil, errWaitOver
		}
		return nil, errClientGone(ctx)
	}
	told = <-p.news // it is being told in this moment
	p.leads = told == nil
	return told, nil
}

// withdraw takes a follower out of its queue. It reports false where somebody else just did.
func (p *place) withdraw() bool {
	p.queues.mu.Lock()
	defer p.queues.mu.Unlock()
	i := slices.Index(p.queue.followers, p)
	if i < 0 {
		return false
	}
	p.queue.followers = slices.Delete(p.queue.followers, i, i+1)
	p.queues.followers--
	return true
}

// leave removes a leader from its queue; a follower has left it by then, unless a tracer ended its
// goroutine. A record answers all waiting requests, and so does a COMMIT that may have happened:
// another look would take each of them as long. Otherwise the next of them leads: it finds the
// answer that the leader's attempt recorded, or a free key.
func (p *place) leave(result *Result) {
	if !p.leads && !p.flee() {
		return
	}
	if passesTurn(result) {
		p.pass()
		return
	}
	for _, follower := range p.close() {
		told := *result
		if told.Record != nil {
			told.Record = copyOf(told.Record)
		}
		follower.news <- &told
	}
}

// flee takes a follower out of its queue that may be in it still, and reports whether it was made the leader before.
func (p *place) flee() bool {
	if p.withdraw() {
		return false
	}
	select {
	case told := <-p.news: // there by now, where it makes a leader: see pass
		return told == nil
	default:
		return false
	}
}

// pass makes the first follower the leader. Where there is none the queue is closed.
func (p *place) pass() {
	p.queues.mu.Lock()
	defer p.queues.mu.Unlock()
	if len(p.queue.followers) == 0 {
		delete(p.queues.byKey, p.key)
		return
	}
	next := p.queue.followers[0]
	p.queue.followers = slices.Delete(p.queue.followers, 0, 1)
	p.queues.followers--
	next.news <- nil
}

// close closes the queue and returns those who are to be told.
func (p *place) close() []*place {
	p.queues.mu.Lock()
	defer p.queues.mu.Unlock()
	delete(p.queues.byKey, p.key)
	followers := p.queue.followers
	p.queue.followers = nil // so that none of them withdraws any more
	p.queues.followers -= len(followers)
	return followers
}

// copyOf returns a copy that shares the body alone: what is around a handler may change headers in place.
func copyOf(r *Record) *Record {
	c := *r
	c.Answer.Header = maps.Clone(r.Answer.Header)
	for name, values := range c.Answer.Header {
		c.Answer.Header[name] = slices.Clone(values)
	}
	return &c
}
