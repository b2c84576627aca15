// Package lostkey detects clients that lose their keys. A client that sends a request again must
// send its key again. A client that makes a new key for each try, or forgets the key when it
// crashes, pays twice, and a server can't stop it, because the second request is new to it. But it
// can be noticed: the same scope soon sends the same request with another key.
//
// Two purchases of the same thing within a window look the same, so a finding is only a hint:
// nothing is refused.
package lostkey

import (
	"cmp"
	"context"
	"fmt"
	"hash/maphash"
	"sync"
	"sync/atomic"
	"time"

	"github.com/paidonce/idempotency"
)

// RequestsMaxMin is the minimum of [Options.RequestsMax].
const RequestsMaxMin = 2

// Options tune a [Detector]. Nil and the zero value are the defaults. A negative number panics.
type Options struct {
	// Window is the maximum time between a request and the same request with another key that makes
	// a finding. It should be longer than the pause between two tries of a client, and shorter than
	// the pause between two purchases. Defaults to 30 seconds.
	Window time.Duration

	// RequestsMax is the maximum number of remembered requests, stored as hashes under a seed of
	// the process, about 70 bytes each. If more arrive the older half is forgotten early: then
	// findings are missed, but none is made up. Defaults to 32,768, enough for 500 requests a
	// second. At least [RequestsMaxMin].
	RequestsMax int

	// OnLost is called for each finding, on the request's goroutine and before its key is claimed:
	// it should be quick. If it is nil, use [Detector.Lost].
	OnLost func(ctx context.Context, event Event)

	// Now is the clock. It must be safe for concurrent use. Defaults to time.Now.
	Now func() time.Time
}

// full returns a copy with defaults filled in. It panics on invalid values.
func (o *Options) full() Options {
	var full Options
	if o != nil {
		full = *o
	}
	full.Window = cmp.Or(full.Window, 30*time.Second)
	full.RequestsMax = cmp.Or(full.RequestsMax, 32_768)
	if full.OnLost == nil {
		full.OnLost = func(context.Context, Event) {}
	}
	if full.Now == nil {
		full.Now = time.Now
	}
	if full.Window < 0 || full.RequestsMax < RequestsMaxMin {
		panic(fmt.Sprintf("idempotency/lostkey: Options.Window is %v and RequestsMax is %d: the first must be positive, and the second at least %d", full.Window, full.RequestsMax, RequestsMaxMin))
	}
	return full
}

// Event is a finding. It contains neither key nor scope.
type Event struct {
	Route string
	After time.Duration // time since the same request last came
}

// Detector is a tracer that remembers recent requests. It is safe for concurrent use. It sees only
// the requests of its own process: a retry that reaches another replica is not found.
type Detector struct {
	options Options
	seed    maphash.Seed
	start   time.Time
	lost    atomic.Int64
	dropped atomic.Int64

	mu    sync.Mutex
	young generation
	old   generation // the one before
}

// generation has the requests of one period: a window, or the time to fill half of RequestsMax.
type generation struct {
	since time.Duration
	// seen has the time of the last request, by the hash of scope and fingerprint, and by the hash
	// that also includes the key.
	seen map[uint64]time.Duration
}

var _ idempotency.Tracer = (*Detector)(nil)

// New returns a detector that has seen nothing. It panics on invalid options.
func New(opts *Options) *Detector {
	d := &Detector{options: opts.full(), seed: maphash.MakeSeed()}
	d.start = d.options.Now()
	d.young.seen, d.old.seen = map[uint64]time.Duration{}, map[uint64]time.Duration{}
	return d
}

// Lost returns the number of findings.
func (d *Detector) Lost() int64 { return d.lost.Load() }

// Dropped returns the maximum number of requests that were forgotten before their window ended, for
// lack of room. While it grows findings are missed: raise RequestsMax or shorten Window.
func (d *Detector) Dropped() int64 { return d.dropped.Load() }

// TraceRequestStart implements [idempotency.Tracer].
func (d *Detector) TraceRequestStart(ctx context.Context, start idempotency.RequestStart) context.Context {
	if start.Key.Value == "" {
		return ctx
	}
	if after, lost := d.see(&start); lost {
		d.lost.Add(1)
		d.options.OnLost(ctx, Event{Route: start.Route, After: after})
	}
	return ctx
}

// see remembers a request. It reports whether the same request came with another key and never with
// this one, and how long ago.
func (d *Detector) see(start *idempotency.RequestStart) (after time.Duration, lost bool) {
	var h maphash.Hash
	h.SetSeed(d.seed)
	_, _ = h.WriteString(start.Key.Scope)
	_ = h.WriteByte(0) // no scope contains it
	_ = h.WriteByte(byte(start.Fingerprint.Version >> 8))
	_ = h.WriteByte(byte(start.Fingerprint.Version))
	_, _ = h.Write(start.Fingerprint.Sum[:])
	request := h.Sum64()
	_, _ = h.WriteString(start.Key.Value)
	keyed := h.Sum64()

	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.options.Now().Sub(d.start)
	d.age(now)
	before, known := d.when(request, now)
	_, again := d.when(keyed, now)
	d.young.seen[request], d.young.seen[keyed] = now, now
	return now - before, known && !again
}

// when returns the last time of a hash, and reports whether that was within the window.
func (d *Detector) when(hash uint64, now time.Duration) (at time.Duration, ok bool) {
	if at, ok = d.young.seen[hash]; !ok {
		at, ok = d.old.seen[hash]
	}
	return at, ok && now-at <= d.options.Window
}

// age starts a new generation when the young one is full or a window old, and forgets the one
// before.
func (d *Detector) age(now time.Duration) {
	// Each request has two hashes, and a generation holds half of the requests.
	full := len(d.young.seen) >= d.options.RequestsMax
	over := now-d.young.since >= d.options.Window
	if !full && !over {
		return
	}
	if !over { // the last of the old ones came when the young generation started
		d.dropped.Add(int64(len(d.old.seen)+1) / 2)
	}
	clear(d.old.seen)
	d.old, d.young = d.young, generation{since: now, seen: d.old.seen}
}

// TraceStep implements [idempotency.Tracer].
func (*Detector) TraceStep(context.Context, idempotency.StepEnd) {}

// TraceRequestEnd implements [idempotency.Tracer].
func (*Detector) TraceRequestEnd(context.Context, idempotency.RequestEnd) {}

// TraceRefused implements [idempotency.Tracer].
func (*Detector) TraceRefused(context.Context, idempotency.Refused) {}
