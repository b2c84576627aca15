package idempotencytest

import (
	"context"
	"net/http"
	"sync"

	"github.com/paidonce/idempotency"
)

// scopeKeys is the number of keys that two callers share.
const scopeKeys = 3

// numbers returns the n at which each part's requests begin, so that a part has the same requests
// whatever -run leaves out.
func (l *lab) numbers() (crash func(i int) int, storm, scope int) {
	const prepared = 4
	crash = func(i int) int { return prepared + 2*l.config.Point*i }
	storm = crash(len(plans()))
	return crash, storm, storm + 2*l.stormKeys()
}

// prepare sends undisturbed requests. If they fail, the rest of the run would prove nothing.
func (l *lab) prepare(ctx context.Context) []finding {
	if err := l.config.Invariant(ctx, Told{}); err != nil {
		l.found(checkInvariant, "it does not hold before the first request: %v", err)
		return l.take()
	}
	random := l.random("prepare")
	k := l.newKey(0, false)
	keys := []*key{k}
	other := l.request(l.config.Request, 1)
	if k.request.same(other) {
		l.found(checkConfig, "Config.Request returned the same for 0 and 1: it must ask for something else for each n")
	}
	if _, last, ok := l.follow(ctx, k, manner{}, random); ok {
		if last.outcome != executed && (!k.opened.Load() || last.outcome != replayed) {
			l.found(checkTable, "the first request was answered %s, want executed", last)
		}
		l.handlerUses, l.commitUses = k.handlerUses.Load(), k.endUses.Load()
		l.intents, l.results = k.intents.Load(), k.results.Load()
		l.again(ctx, k)
		l.change(ctx, k, other)
	}
	if l.config.Declined != nil {
		k := l.newKey(2, true)
		keys = append(keys, k)
		if _, _, ok := l.follow(ctx, k, manner{}, random); ok {
			l.declineUses = k.endUses.Load()
			l.again(ctx, k)
		}
	}
	l.settle(ctx, keys)
	return l.take()
}

// crash hits the first attempt of some keys at one point. Each key has one client, so that the
// required replies are known.
func (l *lab) crash(ctx context.Context, p plan) []finding {
	base := 0
	crash, _, _ := l.numbers()
	for i, other := range plans() {
		if other.point == p.point {
			base = crash(i)
		}
	}
	keys := make([]*key, l.config.Point)
	for i := range keys {
		keys[i] = l.newKey(base+i, p.decline, l.steps(p, float64(i)/float64(len(keys)))...)
	}
	each(keys, l.config.Clients, func(i int, k *key) {
		struck, last, ok := l.follow(ctx, k, manner{quits: i%4 == 3}, l.random("crash", p.point, i))
		if !ok {
			return
		}
		if struck != nil && !p.wants(k, struck.outcome) {
			l.found(checkPoint, "request %d was answered %s, want one of %q", k.n, struck, p.first)
		}
		if k.abandoned {
			return
		}
		if struck != nil && struck != last && !p.wantsThen(k, last.outcome) {
			l.found(checkPoint, "the retry of request %d was answered %s, want %s", k.n, last, p.then)
		}
		l.again(ctx, k)
		l.change(ctx, k, l.request(l.config.Request, base+len(keys)+i))
	})
	l.settle(ctx, keys)
	l.wantHits(keys, p)
	return l.take()
}

// wantHits finds points that were never hit: they guard nothing.
func (l *lab) wantHits(keys []*key, points ...plan) {
	for _, p := range points {
		hits := 0
		for _, k := range keys {
			k.mu.Lock() // if the part is not at rest, requests may be in flight
			hits += k.hits[p.point]
			k.mu.Unlock()
		}
		if hits == 0 {
			l.found(checkHits, "no attempt came to %s", p.point)
		}
	}
}

// possible returns the points that can be hit.
func (l *lab) possible() (points []plan) {
	for _, p := range plans() {
		if l.impossible(p) == "" {
			points = append(points, p)
		}
	}
	return points
}

func (l *lab) stormKeys() int { return max(l.config.Keys, len(plans())) }

// storm sends many keys with many copies, and mixes all points.
func (l *lab) storm(ctx context.Context) []finding {
	_, base, _ := l.numbers()
	random := l.random("storm")
	points := l.possible()
	random.Shuffle(len(points), func(i, j int) { points[i], points[j] = points[j], points[i] })
	keys := make([]*key, l.stormKeys())
	for i := range keys {
		p := points[i%len(points)]
		part := random.Float64()
		if i < len(points) {
			part = 0 // the first use is certain to come
		}
		pending := l.steps(p, part)
		if more := points[random.IntN(len(points))]; more.decline == p.decline {
			pending = append(pending, l.step(more.point, random.Float64()))
		}
		keys[i] = l.newKey(base+i, p.decline, pending...)
	}
	each(keys, l.config.Clients, func(i int, k *key) {
		random := l.random("storm", i)
		atOnce, quits := (l.config.Copies+1)/2, random.IntN(5) == 0
		if quits {
			atOnce = 1 // a client that gives up must know about all requests that were sent
		}
		var group sync.WaitGroup
		for copied := range atOnce {
			random := l.random("storm", i, copied)
			m := manner{quits: quits, hangsUp: random.IntN(4) == 0}
			group.Go(func() { l.follow(ctx, k, m, random) })
		}
		group.Wait()
		if k.answer == nil { // given up, or with a finding
			return
		}
		for range l.config.Copies - atOnce {
			l.again(ctx, k)
		}
		if random.IntN(2) == 0 {
			l.change(ctx, k, l.request(l.config.Request, base+len(keys)+i))
		}
	})
	l.settle(ctx, keys)
	l.wantHits(keys, points...)
	return l.take()
}

// again sends the request of a key with a final answer: it must be replayed.
func (l *lab) again(ctx context.Context, k *key) {
	if _, last, ok := l.follow(ctx, k, manner{}, l.random("again", k.n)); ok && last.outcome != replayed {
		l.found(checkOnce, "request %d was answered for good, and then %s", k.n, last)
	}
}

// scope uses the keys of one caller for another: each must get its own answer.
func (l *lab) scope(ctx context.Context) []finding {
	_, _, base := l.numbers()
	var keys []*key
	for i := range scopeKeys {
		value := idempotency.NewAttemptID().String()
		for j, make := range []func(int) *http.Request{l.config.Request, l.config.Other} {
			// Not known to the store: nothing is planned for it.
			k := &key{n: base + 2*i + j, value: value}
			k.request = l.request(make, k.n)
			keys = append(keys, k)
			last := l.send(ctx, value, k.request, false)
			open := false // it made a call that is not settled, so somebody else may end it
			for backoff := backoffMin; (last.outcome == notExecuted || last.outcome == unknown) && backoff < l.config.Patience; backoff *= 2 {
				open = open || last.outcome == unknown
				wait(ctx, backoff)
				last = l.send(ctx, value, k.request, false)
			}
			if last.outcome != executed && !(open && last.outcome == replayed) {
				l.found(checkScope, "request %d was answered %s, and only another caller has used its key: want executed", k.n, last)
			} else if check, trouble := k.told(last); trouble != "" {
				l.found(check, "%s", trouble)
			}
		}
	}
	l.settle(ctx, keys)
	return l.take()
}

// replay sends every request with a final answer once more.
func (l *lab) replay(ctx context.Context) []finding {
	var keys []*key
	for _, k := range l.told {
		if k.answer != nil {
			keys = append(keys, k)
		}
	}
	each(keys, l.config.Clients, func(_ int, k *key) { l.again(ctx, k) })
	l.settle(ctx, nil)
	return l.take()
}
