package middleware

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"sync"
	"time"

	"github.com/paidonce/idempotency"
)

// Quota limits the number of keys that a scope may record, so that no account floods the table.
// Beyond the quota a request with a new key gets 429, and its handler does not run. The limit is
// approximate: each process counts for itself and forgets its count when it ends, and up to twice
// as many keys fit around the border of two windows. It does not replace a limit on requests,
// mounted outside.
//
// A request is counted once its claim has shown that its key is new. So a replay, a mismatch and a
// conflict are never refused, however far over its quota the scope is, and a refused request costs
// as much as a conflict: the claim and a ROLLBACK, two round trips that write nothing. An earlier
// refusal would also refuse replays, because only the table knows which requests they are. A
// request that leaves no record, such as a 500, is subtracted again.
type Quota struct {
	// KeysMax is the maximum number of keys that a scope may record per Window. Defaults to 0: no
	// quota.
	KeysMax int

	// Window is the time that a scope's count lasts, from the scope's first key on; then the count
	// starts at zero again. At least 1 second. Defaults to 1 hour. A scope's share of the table is
	// at most KeysMax, times the number of processes, times the number of windows in a TTL plus
	// one.
	Window time.Duration

	// ScopesMax is the maximum number of scopes with a count of their own, at about 100 bytes each.
	// While that many windows are open, all further scopes share one count and one KeysMax. This
	// bounds memory and table, but a scope may then be refused because of others: set it well above
	// the number of accounts that are active within a window. Defaults to 100,000.
	ScopesMax int

	// Now is the clock. It is called from many goroutines. Defaults to time.Now.
	Now func() time.Time
}

// full returns a copy with every default filled in. It panics on values that can't work.
func (q Quota) full() Quota {
	q.Window = cmp.Or(q.Window, time.Hour)
	q.ScopesMax = cmp.Or(q.ScopesMax, 100_000)
	if q.Now == nil {
		q.Now = time.Now
	}
	if q.KeysMax < 0 || q.ScopesMax < 0 || q.Window < time.Second {
		panic(fmt.Sprintf("idempotency/middleware: Options.Quota has KeysMax %d, ScopesMax %d and Window %v: none may be negative, and a window is at least a second", q.KeysMax, q.ScopesMax, q.Window))
	}
	return q
}

// equal reports whether two quotas have the same limits. A different clock makes no new count.
func (q Quota) equal(other Quota) bool {
	return q.KeysMax == other.KeysMax && q.Window == other.Window && q.ScopesMax == other.ScopesMax
}

// quota counts keys by scope.
type quota struct {
	Quota
	seed maphash.Seed

	mu      sync.Mutex
	windows map[uint64]*window // open ones, by a hash of the scope that nobody outside can guess
	queue   []*window          // the same, in the order in which they end
	rest    *window            // shared by the scopes that found no room; nil while there are none
}

// window is one scope's count.
type window struct {
	scope uint64
	start time.Time
	keys  int
}

// slot is a key's place in a window.
type slot struct{ window *window }

func newQuota(q Quota) *quota {
	if q.KeysMax == 0 {
		return nil
	}
	return &quota{Quota: q, seed: maphash.MakeSeed(), windows: map[uint64]*window{}}
}

// take counts a key. If the scope has none left it returns nil and the time until its count starts
// at zero again.
func (q *quota) take(scope string) (*slot, time.Duration) {
	hash, now := maphash.String(q.seed, scope), q.Now()
	q.mu.Lock()
	defer q.mu.Unlock()
	q.forget(now)
	w := q.windows[hash]
	switch {
	case w != nil:
	case len(q.windows) < q.ScopesMax:
		w = &window{scope: hash, start: now}
		q.windows[hash] = w
		q.queue = append(q.queue, w)
	default:
		if q.rest == nil {
			q.rest = &window{start: now}
		}
		w = q.rest
	}
	if w.keys >= q.KeysMax {
		return nil, w.start.Add(q.Window).Sub(now)
	}
	w.keys++
	return &slot{w}, 0
}

// giveBack subtracts a key. If its window has ended that has no effect.
func (q *quota) giveBack(s *slot) {
	q.mu.Lock()
	defer q.mu.Unlock()
	s.window.keys--
}

// forget drops the windows that have ended.
func (q *quota) forget(now time.Time) {
	over := func(w *window) bool { return now.Sub(w.start) >= q.Window }
	dropped := 0
	for dropped < len(q.queue) && over(q.queue[dropped]) {
		delete(q.windows, q.queue[dropped].scope)
		q.queue[dropped] = nil
		dropped++
	}
	q.queue = q.queue[dropped:]
	if q.rest != nil && over(q.rest) {
		q.rest = nil
	}
}

// errQuotaExceeded is why a request was refused.
var errQuotaExceeded = errors.New("scope has recorded as many keys as it may: see Options.Quota")

// withinQuota runs the request through the engine, and counts its key before the handler's first
// run. It settles the key's place however that ends.
func (run *run) withinQuota(request idempotency.Request) (result idempotency.Result) {
	returned := false
	defer func() {
		if !returned && run.answered { // by a Goexit after the handler: it may have been recorded
			result.Outcome = idempotency.OutcomeUnknown
		}
		run.settle(result)
	}()
	result = run.m.engine.Do(run.request.Context(), request, func(ctx context.Context) (*idempotency.Answer, error) {
		if refusal := run.count(ctx); refusal != nil {
			return nil, refusal
		}
		return run.once(ctx)
	})
	returned = true
	return result
}

// count counts the request's key in its scope's quota. It returns a refusal if the scope has no key
// left.
func (run *run) count(ctx context.Context) *idempotency.Refusal {
	if run.key.Value == "" || run.counted != nil || idempotency.Resumed(ctx) {
		return nil
	}
	var wait time.Duration
	run.counted, wait = run.m.quota.take(run.key.Scope)
	if run.counted == nil {
		return &idempotency.Refusal{Reason: idempotency.ReasonQuotaExceeded, RetryAfter: wait, Err: errQuotaExceeded}
	}
	return nil
}

// settle gives the request's place back if it is proven that nothing was recorded. That includes an
// unknown outcome that has the handler's answer, or that concerns another service: its retry must
// not be refused.
func (run *run) settle(result idempotency.Result) {
	unknown := result.Outcome == idempotency.OutcomeUnknown && result.Answer == nil && result.Reason != idempotency.ReasonCallUnknown
	switch {
	case run.counted == nil, unknown, result.Outcome == idempotency.OutcomeExecuted:
	default:
		run.m.quota.giveBack(run.counted)
	}
}
