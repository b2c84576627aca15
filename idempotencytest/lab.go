package idempotencytest

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/crashpoint"
)

// The checks. Each finding names one.
const (
	checkTable     = "status table"
	checkSettled   = "settled"
	checkOnce      = "one execution"
	checkOneAnswer = "one answer"
	checkAccepted  = "accepted"
	checkParked    = "left to a person"
	checkChanged   = "changed request"
	checkPoint     = "crash point"
	checkHits      = "hits"
	checkRest      = "at rest"
	checkRecord    = "record"
	checkScope     = "scope"
	checkInvariant = "invariant"
	checkConfig    = "config"
)

// foundMax is the maximum number of findings of one check that a subtest shows.
const foundMax = 5

type finding struct{ check, text string }

// lab is one run: the service under test, its clients, and their replies.
type lab struct {
	config  Config
	store   *store
	keeper  idempotency.Keeper // the user's store, if it keeps requests open
	handler http.Handler
	server  *httptest.Server
	client  *http.Client

	running, requests atomic.Int64

	handlerUses, commitUses, declineUses int64 // of the contexts of an undisturbed request
	intents, results                     int64 // of an undisturbed request

	mu       sync.Mutex
	findings []finding
	dropped  map[string]int

	// The results of the parts that have ended. Only the test's goroutine uses them.
	told []*key
	hits map[point]int
}

func newLab(config Config) *lab {
	l := &lab{config: config, hits: map[point]int{}}
	inner, store := newStore(config.Store)
	l.store = inner
	l.keeper, _ = config.Store.(idempotency.Keeper)
	l.handler = config.New(store)
	l.server = httptest.NewServer(http.HandlerFunc(l.serve))
	l.client = &http.Client{
		// A conn for each request: on a reused one Go's client may send a keyed request twice by
		// itself.
		Transport:     &http.Transport{DisableKeepAlives: true, DisableCompression: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return l
}

func (l *lab) close() {
	l.client.CloseIdleConnections()
	l.server.Close()
}

// found keeps a finding. It is safe for concurrent use.
func (l *lab) found(check, format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, f := range l.findings {
		if f.check == check {
			n++
		}
	}
	switch {
	case n < foundMax:
		l.findings = append(l.findings, finding{check, fmt.Sprintf(format, args...)})
	case l.dropped == nil:
		l.dropped = map[string]int{check: 1}
	default:
		l.dropped[check]++
	}
}

// take returns the findings since the last call.
func (l *lab) take() []finding {
	l.mu.Lock()
	defer l.mu.Unlock()
	found := l.findings
	for check, n := range l.dropped {
		found = append(found, finding{check, fmt.Sprintf("and %d more", n)})
	}
	l.findings, l.dropped = nil, nil
	return found
}

// random returns a source of decisions, the same for the same seed and names.
func (l *lab) random(names ...any) *rand.Rand {
	h := fnv.New64a()
	_, _ = fmt.Fprintln(h, names...) // never fails
	return rand.New(rand.NewPCG(l.config.Seed, h.Sum64()))
}

// request returns the user's n-th request.
func (l *lab) request(make func(n int) *http.Request, n int) *request {
	r := make(n)
	if r == nil || r.URL == nil {
		l.found(checkConfig, "Config returned no request for %d", n)
		return &request{method: http.MethodPost, target: "/", header: http.Header{}}
	}
	q, err := newRequest(r)
	if err != nil {
		l.found(checkConfig, "the body of request %d can't be read: %v", n, err)
		return &request{method: http.MethodPost, target: "/", header: http.Header{}}
	}
	return q
}

// newKey returns a new key for the n-th request, known to the store.
func (l *lab) newKey(n int, declined bool, pending ...step) *key {
	make := l.config.Request
	if declined {
		make = l.config.Declined
	}
	// A new value in each run, whatever the seed: the database may still have the last run's.
	k := &key{n: n, value: idempotency.NewAttemptID().String(), request: l.request(make, n), declined: declined, odd: n%2 == 1, pending: pending}
	l.store.keys.Store(k.value, k)
	return k
}

// step plans a point. part, from 0 to 1, chooses one of the uses of the context.
func (l *lab) step(p point, part float64) step {
	uses := int64(0)
	switch plan := planOf(p); {
	case plan.ofIntent():
		uses = l.intents
	case plan.ofResult():
		uses = l.results
	}
	switch p {
	case crashpoint.MidHandler, crashpoint.HandlerCanceled:
		uses = l.handlerUses
	case crashpoint.MidCommit, crashpoint.CommitCanceled:
		uses = l.commitUses
	case crashpoint.MidDecline:
		uses = l.declineUses
	}
	return step{point: p, at: min(1+int64(part*float64(uses)), max(uses, 1))}
}

// impossible returns the reason why a point can't be hit, or "".
func (l *lab) impossible(p plan) string {
	switch {
	case p.decline && l.config.Declined == nil:
		return "Config.Declined is not set"
	case (p.point == crashpoint.MidHandler || p.point == crashpoint.HandlerCanceled) && l.handlerUses == 0:
		return "the handler does not use its context, so that it can't end in the middle of it"
	case (p.point == crashpoint.MidCommit || p.point == crashpoint.CommitCanceled) && l.commitUses == 0, p.point == crashpoint.MidDecline && l.declineUses == 0:
		return "the store does not use its context, so that it can't end in the middle of it"
	case p.ofIntent() && l.intents == 0:
		return "the handler makes no call (package effect) and has no phase"
	case p.ofResult() && l.results == 0:
		return "the handler makes no call (package effect)"
	}
	return ""
}

// steps plans the point that must be hit before a plan's point, if there is one, and then that
// point.
func (l *lab) steps(p plan, part float64) []step {
	if p.after == "" {
		return []step{l.step(p.point, part)}
	}
	return []step{l.step(p.after, part), l.step(p.point, part)}
}

// settle waits until nothing is in flight, collects the results of a part's keys, and checks the
// store and the user's tables.
func (l *lab) settle(ctx context.Context, keys []*key) {
	resting, cancel := context.WithTimeout(ctx, l.config.Patience)
	defer cancel()
	for l.running.Load() > 0 || l.store.open.Load() > 0 {
		if resting.Err() != nil {
			l.found(checkRest, "after %v there are %d requests and %d attempts in flight", l.config.Patience, l.running.Load(), l.store.open.Load())
			return
		}
		wait(resting, backoffMin)
	}
	for _, k := range keys {
		k.pending = nil
		for p, n := range k.hits {
			l.hits[p] += n
		}
	}
	l.told = append(l.told, keys...)
	if n := l.store.stray.Swap(0); n > 0 {
		l.found(checkConfig, "%d times the store was called with a context that is not the request's: pass it on, and run no completer: Run calls Config.Resume", n)
	}
	for _, k := range keys {
		if n := k.committed.Load(); n > 1 {
			l.found(checkOnce, "request %d was committed %d times", k.n, n)
		}
		if k.answer != nil || k.abandoned {
			l.lookUp(ctx, k)
		}
	}
	if err := l.config.Invariant(ctx, l.toldNow()); err != nil {
		l.found(checkInvariant, "%v", err)
	}
}

// lookUp compares the store's record of a key with its client's answer.
func (l *lab) lookUp(ctx context.Context, k *key) {
	ctx, cancel := context.WithTimeout(ctx, l.config.Patience)
	defer cancel()
	claim := k.last
	if claim == nil {
		return // refused before it came to the store
	}
	for {
		claim.Attempt = idempotency.NewAttemptID()
		attempt, record, err := l.store.inner.Begin(ctx, claim)
		if attempt != nil {
			_ = attempt.Seal() // nothing was written in it
			_ = attempt.Rollback(ctx)
		}
		switch {
		// The server may still be working on an abandoned attempt.
		case err != nil && ctx.Err() == nil:
			wait(ctx, backoffMin)
			continue
		case errors.Is(err, idempotency.ErrInProgress):
			l.found(checkRest, "request %d is still in progress after %v", k.n, l.config.Patience)
		case err != nil:
			l.found(checkRest, "request %d can't be looked up: %v", k.n, err)
		case k.answer != nil && record == nil:
			l.found(checkRecord, "request %d was answered %d for good, and has no record", k.n, k.answer.Status)
		case k.answer != nil && record.Open:
			l.found(checkRecord, "request %d was answered %d for good, and is open", k.n, k.answer.Status)
		case k.answer == nil && record != nil && record.Open:
			l.found(checkRecord, "request %d was given up after not-executed, and is open: it may be executed", k.n)
		case k.answer == nil && record != nil:
			l.found(checkRecord, "request %d was given up after not-executed, and has a record with %d", k.n, record.Answer.Status)
		}
		return
	}
}

// toldNow returns the answers that clients have got so far.
func (l *lab) toldNow() (told Told) {
	for _, k := range l.told {
		switch {
		case k.answer != nil && k.answer.Status >= 400:
			told.Declined = append(told.Declined, *k.answer)
		case k.answer != nil:
			told.Acknowledged = append(told.Acknowledged, *k.answer)
		case k.abandoned:
			told.GivenUp = append(told.GivenUp, Answer{N: k.n, Key: k.value})
		}
	}
	for _, answers := range [][]Answer{told.Acknowledged, told.Declined, told.GivenUp} {
		slices.SortFunc(answers, func(a, b Answer) int { return a.N - b.N })
	}
	return told
}

func (l *lab) summary() string {
	told := l.toldNow()
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d: %d keys, %d requests; %d acknowledged, %d declined, %d given up; hits:",
		l.config.Seed, len(l.told), l.requests.Load(), len(told.Acknowledged), len(told.Declined), len(told.GivenUp))
	for _, p := range plans() {
		if n := l.hits[p.point]; n > 0 {
			fmt.Fprintf(&b, " %s %d", p.point, n)
		}
	}
	return b.String()
}

// each calls work for each key on this many goroutines, and returns when all calls have returned.
func each(keys []*key, goroutines int, work func(i int, k *key)) {
	var next atomic.Int64
	var group sync.WaitGroup
	for range min(goroutines, len(keys)) {
		group.Go(func() {
			for i := int(next.Add(1)) - 1; i < len(keys); i = int(next.Add(1)) - 1 {
				work(i, keys[i])
			}
		})
	}
	group.Wait()
}
