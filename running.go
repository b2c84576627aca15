package idempotency

import (
	"fmt"
	"sync"
	"time"
)

// runningKeys are the keys with handlers that run in this process. A duplicate of such a request is
// answered without the store: it holds no connection and sends nothing.
//
// A key is here from a granted claim until the end of the transaction begins, while the handler
// runs. It counts until the handler's deadline, and unless the transaction is lost. After that only
// the store knows whether the key is recorded. So a retry of a recorded key gets no in-progress
// from memory, even if the reply to COMMIT is late or lost, or if another process has executed the
// request because the handler here lost its connection. If the loss can't be seen ([Attempt].Lost),
// that retry may get in-progress until the handler's deadline. Removing a key too early is always
// safe: then the store decides.
//
// The zero value is ready to use. It is safe for concurrent use, and holds at most one entry per
// request in flight.
type runningKeys struct {
	mu    sync.Mutex
	byKey map[Key]runningKey
}

type runningKey struct {
	attempt     AttemptID // the one that added the key
	until       time.Time // the handler's deadline; from then on the store decides
	transaction Attempt
}

// errRunsHere is the error of a duplicate that was answered from memory.
var errRunsHere = fmt.Errorf("%w: its handler runs in this process", ErrInProgress)

// add notes that the handler of this request runs in this transaction, until the given time at most.
// The caller must call remove. The request has a key.
func (r *runningKeys) add(claim *Claim, transaction Attempt, until time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.byKey == nil {
		r.byKey = map[Key]runningKey{}
	}
	r.byKey[claim.Key] = runningKey{claim.Attempt, until, transaction}
}

// remove takes back the add of this attempt. It leaves the entry of another attempt alone: the
// store may have granted the key again while a handler ran past its deadline.
func (r *runningKeys) remove(claim *Claim) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.byKey[claim.Key].attempt == claim.Attempt {
		delete(r.byKey, claim.Key)
	}
}

// removeAny removes the key, whichever attempt added it.
func (r *runningKeys) removeAny(key Key) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.byKey, key)
}

// has reports whether the key's handler runs here, is within its time, and has its transaction.
func (r *runningKeys) has(key Key) bool {
	r.mu.Lock()
	running, ok := r.byKey[key]
	r.mu.Unlock()
	return ok && time.Now().Before(running.until) && !running.transaction.Lost()
}
