package idempotencytest

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
)

// step is a point that is planned for a key.
type step struct {
	point point
	at    int64 // the number of the use that ends the context
}

// key is one key of the run: the plan for its attempts, and the replies to its clients.
type key struct {
	n        int
	value    string
	request  *request
	declined bool // the handler is expected to decline the request
	odd      bool // chooses between the two ways of unresolvable

	handlerUses, endUses atomic.Int64 // of the contexts of the last attempt
	committed            atomic.Int64 // ends of a transaction that the store reported as successful
	intents, results     atomic.Int64 // the most commits of each by one attempt
	opened               atomic.Bool  // it has committed an intent or a phase
	later                atomic.Bool  // time seems to pass for it

	mu        sync.Mutex
	pending   []step
	hits      map[point]int
	last      *idempotency.Claim // as it came to the store
	answer    *Answer            // the first that a client got
	executed  int                // number of replies with executed
	abandoned bool
}

// head returns the next planned step.
func (k *key) head() step {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.pending) == 0 {
		return step{}
	}
	return k.pending[0]
}

// take reports whether p is the next planned point, and if so counts it as hit.
func (k *key) take(p point) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if p == "" || len(k.pending) == 0 || k.pending[0].point != p {
		return false
	}
	k.pending = k.pending[1:]
	if k.hits == nil {
		k.hits = map[point]int{}
	}
	k.hits[p]++
	return true
}

// hit returns the number of hits of all the key's points.
func (k *key) hit() (n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, hits := range k.hits {
		n += hits
	}
	return n
}

// tripwire returns a context that ends if one of the points is planned next.
func (k *key) tripwire(ctx context.Context, points ...point) *tripwire {
	planned := k.head()
	if planned.point == "" || !slices.Contains(points, planned.point) {
		planned.at = 0
	}
	return newTripwire(ctx, planned.at, func() bool { return k.take(planned.point) })
}

// seen keeps the first claim that came to the store.
func (k *key) seen(claim *idempotency.Claim) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.last == nil { // the first is the real one: changed requests come later
		copied := *claim
		k.last = &copied
	}
}

// claimed returns the key as it came to the store.
func (k *key) claimed() idempotency.Key {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.last.Key
}

// told keeps the first answer and compares later ones with it. If the given answer is wrong, it
// returns the check and the reason.
func (k *key) told(r *reply) (check, trouble string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if r.outcome == executed {
		k.executed++
	}
	first := k.answer
	if first == nil {
		k.answer = &Answer{N: k.n, Key: k.value, Status: r.status, Header: r.header, Body: r.body}
	}
	switch {
	case k.executed > 1:
		return checkOnce, fmt.Sprintf("request %d was answered executed %d times", k.n, k.executed)
	case first != nil && first.Status != r.status:
		return checkOneAnswer, fmt.Sprintf("request %d was answered %d, and then %d", k.n, first.Status, r.status)
	case first != nil && !bytes.Equal(first.Body, r.body):
		return checkOneAnswer, fmt.Sprintf("request %d was answered %d with %d bytes, and then with other %d bytes", k.n, r.status, len(first.Body), len(r.body))
	case first == nil && !k.declined && r.status >= 400:
		return checkAccepted, fmt.Sprintf("request %d was declined for good with %d, and an undisturbed one is not: answer 5xx to what a retry may change; "+
			"or is there less in the database than Config.Keys asks for?", k.n, r.status)
	case first == nil && k.declined && r.status < 400:
		return checkAccepted, fmt.Sprintf("request %d of Config.Declined was answered %d", k.n, r.status)
	case first != nil:
		for _, name := range middleware.RecordedHeaders() {
			if !slices.Equal(first.Header.Values(name), r.header.Values(name)) {
				return checkOneAnswer, fmt.Sprintf("request %d was answered %d, and then with another %s", k.n, r.status, name)
			}
		}
	}
	return "", ""
}

// Answer is the final answer that a client got to its request.
type Answer struct {
	N      int         // the n for which Config returned the request
	Key    string      // its Idempotency-Key
	Status int         // 0 if the client gave up
	Header http.Header // nil if the client gave up
	Body   []byte
}
