// Package lostkey finds clients that lose their keys. A client that sends a request again must send the key again; one that
// makes a new key for each try, or forgets the key when it crashes, pays twice, and nothing can stop it: to a server the second
// request is a new one. It shows, though: the same scope sends the same request, with another key, soon after.
//
// Two purchases of the same thing within a window look the same, so a finding is a hint and never a verdict: nothing is refused.
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

// RequestsMaxMin is the least [Options.RequestsMax].
const RequestsMaxMin = 2

// Options tune a [Detector]. Nil and the zero value are the defaults. A negative number panics.
type Options struct {
	// Window is how soon after a request the same one with another key is a finding. Longer than the pause between two tries of a
	// client, shorter than the pause between two purchases. Defaults to 30 seconds.
	Window time.Duration

	// RequestsMax is how many requests are remembered at most, as hashes under a seed of the process, some 70 bytes each. Where
	// more come the older half is forgotten before its time: findings are missed then, and none is made up. Defaults to 32,768,
	// enough for 500 requests a second. At least [RequestsMaxMin].
	RequestsMax int

	// OnLost is told of each finding, in the goroutine of the request and before it is claimed: it should be quick. Nil
	// leaves [Detector.Lost].
	OnLost func(ctx context.Context, event Event)

	// Now is the clock. It is called from many goroutines. The default is time.Now.
	Now func() time.Time
}

// full returns a copy in which nothing is left out. It panics on values that can't work.
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

// Event is a finding. It holds neither key nor scope.
type Event struct {
	Route string
	After time.Duration // since the same request came last
}

// Detector is a tracer that remembers the requests of the last moments. It is safe for concurrent use. It sees its own
// process alone: a retry that reaches another replica is not found.
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

// generation is what came in one stretch of time: a window, or as long as it took to fill half of RequestsMax.
type generation struct {
	since time.Duration
	seen  map[uint64]time.Duration // when last, by the hash of scope and fingerprint, and by that of the key too
}

var _ idempotency.Tracer = (*Detector)(nil)

// New returns a detector that has seen nothing. It panics where the options can't work.
func New(opts *Options) *Detector {
	d := &Detector{options: opts.full(), seed: maphash.MakeSeed()}
	d.start = d.options.Now()
	d.young.seen, d.old.seen = map[uint64]time.Duration{}, map[uint64]time.Duration{}
	return d
}

// Lost returns how many findings there were.
func (d *Detector) Lost() int64 { return d.lost.Load() }

// Dropped returns how many requests, at most, were forgotten before their window was over, for lack of room. While it grows
// findings are missed: raise RequestsMax or shorten Window.
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

// see remembers a request, and reports whether the same came with another key and never with this one, and how long ago.
func (d *Detector) see(start *idempotency.RequestStart) (after time.Duration, lost bool) {
	var h maphash.Hash
	h.SetSeed(d.seed)
	_, _ = h.WriteString(start.Key.Scope)
	_ = h.WriteByte(0) // which no scope contains
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

// when returns when a hash was seen last, and reports whether that was within the window.
func (d *Detector) when(hash uint64, now time.Duration) (at time.Duration, ok bool) {
	if at, ok = d.young.seen[hash]; !ok {
		at, ok = d.old.seen[hash]
	}
	return at, ok && now-at <= d.options.Window
}

// age begins a new generation where the young one is full or a window old, and forgets the one before.
func (d *Detector) age(now time.Duration) {
	full := len(d.young.seen) >= d.options.RequestsMax // two hashes each, and half of them in a generation
	over := now-d.young.since >= d.options.Window
	if !full && !over {
		return
	}
	if !over { // the last of the old ones came when the young generation began
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
