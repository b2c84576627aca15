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

// WaitMax is the maximum of [Options.Wait]. PostgreSQL frees the key of a machine that is gone
// after about as long, and clients and balancers rarely wait longer.
const WaitMax = time.Minute

// The pauses between two claims of a request that waits for an attempt of another process. Each is
// twice the one before, up to the maximum.
const (
	waitPauseMin = 25 * time.Millisecond
	waitPauseMax = 250 * time.Millisecond
)

// inQueue takes a request that may wait through the protocol. The first request with its key in
// this process is the leader: it makes the claims. The others are its followers: they wait in
// memory until the leader ends, and get its result, or one of them becomes the leader. So all
// duplicates together use one connection. While another process holds the key they use none between
// two claims.
func (e *Engine) inQueue(ctx context.Context, req *ongoing, run RunFunc, trace *trace) (result Result) {
	over := time.Now().Add(e.options.Wait)
	place, ok := e.family.queues.enter(req.Key, e.followersMax())
	if !ok { // too many requests wait already
		return e.attempts(ctx, req, run, trace, nil)
	}
	// This is deferred: a panic or a Goexit must not leave the queue without a leader.
	defer func() { place.leave(&result, &req.Fingerprint) }()
	if !place.leads {
		if result, settled := follow(ctx, req, place, over, trace); settled {
			return result
		}
		// Another request had the key: a handler that runs before its claim would probably run for
		// nothing.
		req.ClaimFirst = true
	}
	for pause := waitPauseMin; ; pause = min(2*pause, waitPauseMax) {
		result = e.attempts(ctx, req, run, trace, &place.derived)
		if result.Outcome != OutcomeInProgress || decide(factOfWait(mayWait(ctx, over))).action != actionWait {
			return result
		}
		req.ClaimFirst = true
		// The jitter keeps processes that wait for one key from claiming at the same time. The last
		// claim is made when Wait has elapsed.
		jittered := pause*3/4 + rand.N(pause/2)
		started := trace.wait()
		gone := sleep(ctx, min(jittered, time.Until(over)))
		trace.step(StepWait, started, gone)
		if gone != nil { // nothing has begun, and there is no client to answer
			return refuse(decide(factOfWait(false)), gone)
		}
	}
}

// follow waits until the leader ends, and returns the request's result. It returns false if the
// request must call the store itself: it is the leader now, or its Wait has elapsed. In the second
// case the answer may be there although the leader, which may be slow, has not seen it.
func follow(ctx context.Context, req *ongoing, place *place, over time.Time, trace *trace) (result Result, settled bool) {
	started := trace.wait()
	told, err := place.wait(ctx, over)
	fact := factTurn
	if err == nil {
		fact = factOfLeader(&req.Request, told)
	}
	err = nil
	if decide(fact).action == actionClaim && ctx.Err() != nil {
		// Nothing has begun, and there is no client to answer.
		fact, err = factInProgress, errClientGone(ctx)
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
		result = refuse(decision, err)
		if fact == factOpen { // the leader's result holds for this request too
			result.Reason, result.Accepted, result.RetryAfter = told.Reason, told.Accepted, told.RetryAfter
		}
		return result, true
	}
}

// followersMax returns the maximum number of followers: half of InFlightMax, or no limit.
func (e *Engine) followersMax() int {
	if e.options.InFlightMax < 0 {
		return math.MaxInt
	}
	return e.options.InFlightMax / 2
}

// mayWait reports whether the request's Wait has not elapsed and its client is still there.
func mayWait(ctx context.Context, over time.Time) bool {
	return ctx.Err() == nil && time.Now().Before(over)
}

// errAwaitedUnknown is the error of a follower with a leader that ended as unknown. The cause is in
// the leader's own error.
var errAwaitedUnknown = fmt.Errorf("%w: that of the attempt which the request waited for, or its record can't be compared", ErrUnknown)

// errWaitOver is the error of a follower when its Wait has elapsed.
var errWaitOver = fmt.Errorf("%w: Options.Wait has elapsed", ErrInProgress)

// errClientGone returns the error of a waiting request when its client is gone.
func errClientGone(ctx context.Context) error {
	return fmt.Errorf("%w: the client did not wait: %w", ErrInProgress, ctx.Err())
}

// sleep blocks for d. It returns an error if ctx ends first.
func sleep(ctx context.Context, d time.Duration) error {
	if deadline.Sleep(ctx, d) != nil {
		return errClientGone(ctx)
	}
	return nil
}

// queues are the wait queues of one process, by key. A queue exists while it has a leader. queues
// is safe for concurrent use, and holds at most one entry per request in flight. The zero value is
// ready to use.
type queues struct {
	mu        sync.Mutex
	byKey     map[Key]*queue
	followers int // in all queues
}

// queue holds the waiting requests with one key.
type queue struct {
	followers []*place // in order of arrival; guarded by queues.mu
}

// place is a request's place in its queue. Only the request's goroutine uses it.
type place struct {
	queues  *queues
	queue   *queue
	key     Key
	leads   bool
	derived atomic.Bool // a run of the request has called DerivedKey

	// news gets the leader's result once the follower is out of the queue; nil means that the
	// follower is the leader now. It is nil for a request that was the leader from the start.
	news chan *Result
}

// enter adds the request to its key's queue; the caller must call leave. It returns false if
// followersMax requests already wait.
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

// wait blocks until the leader ends, and returns its result, or nil if this follower is the leader
// now. It returns an error if ctx ends or Wait elapses first.
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
	told = <-p.news // somebody took it out of the queue, and is sending
	p.leads = told == nil
	return told, nil
}

// withdraw removes a follower from its queue. It returns false if it was removed already.
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

// leave removes the leader from its queue. It does nothing for a follower, which has left its queue
// by then, unless a tracer ended its goroutine. If the result has a record, or the outcome of a
// COMMIT is unknown, all followers get it: if each of them looked again it would take each as long.
// Otherwise the first follower becomes the leader: it finds the answer that this attempt recorded,
// or a free key. fingerprint is that of the leader's request: if the request is open, each follower
// compares its own with it.
func (p *place) leave(result *Result, fingerprint *Fingerprint) {
	if !p.leads && !p.flee() {
		return
	}
	if passesTurn(result) {
		p.pass()
		return
	}
	for _, follower := range p.close() {
		told := *result
		switch {
		case told.Record != nil:
			told.Record = copyOf(told.Record)
		case told.Accepted:
			told.Record = &Record{Fingerprint: *fingerprint, Open: true}
		}
		follower.news <- &told
	}
}

// flee removes a follower that may still be in its queue, and reports whether it had become the
// leader.
func (p *place) flee() bool {
	if p.withdraw() {
		return false
	}
	select {
	case told := <-p.news: // pass sends before it releases the lock, so a leader's news is here
		return told == nil
	default:
		return false
	}
}

// pass makes the first follower the leader. Without followers it removes the queue.
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

// close removes the queue and returns its followers, which must get the result.
func (p *place) close() []*place {
	p.queues.mu.Lock()
	defer p.queues.mu.Unlock()
	delete(p.queues.byKey, p.key)
	followers := p.queue.followers
	p.queue.followers = nil // from now on none of them can withdraw
	p.queues.followers -= len(followers)
	return followers
}

// copyOf returns a copy of r that shares only its body. Middleware around a handler may change the
// headers in place.
func copyOf(r *Record) *Record {
	c := *r
	c.Answer.Header = maps.Clone(r.Answer.Header)
	for name, values := range c.Answer.Header {
		c.Answer.Header[name] = slices.Clone(values)
	}
	return &c
}
