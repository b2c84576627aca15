package chaos

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/psp"
	"github.com/paidonce/idempotency/internal/crashpoint"
	"github.com/paidonce/idempotency/internal/deadline"
	"github.com/paidonce/idempotency/internal/pgfault"
)

// With Config.Effects some requests call a processor, which misbehaves. This file has their faults;
// processor.go runs the processor, gateway.go stands between it and the banks, directed.go has the
// schedules that a random one rarely meets, and outside.go judges the state at the end.

// The faults of the processor. Each lasts for a while, and one comes at a time, with this
// exception: with half of them the processor also keeps no declines, or its look-up lags.
const (
	loseRequests   eventKind = "processor-loses-requests"
	loseReplies    eventKind = "processor-loses-replies"
	errorsAfter    eventKind = "processor-errors-after"
	errorsBefore   eventKind = "processor-errors-before"
	slowProcessor  eventKind = "processor-slow"
	lateProcessor  eventKind = "processor-late"
	sameErrors     eventKind = "processor-same-error"
	processorDown  eventKind = "processor-down"
	forgetsKeys    eventKind = "processor-forgets-keys"
	forgetsNo      eventKind = "processor-forgets-declines"
	lookupLags     eventKind = "processor-lookup-lags"
	crashProcessor eventKind = "processor-sigkill" // and a start on the same file
)

// ofProcessor reports whether the event is a fault of the processor.
func (k eventKind) ofProcessor() bool {
	switch k {
	case loseRequests, loseReplies, errorsAfter, errorsBefore, slowProcessor, lateProcessor, sameErrors, processorDown,
		forgetsKeys, forgetsNo, lookupLags, crashProcessor:
		return true
	}
	return false
}

// openCommit is one of the COMMITs of a request that calls the processor.
type openCommit string

const (
	intentCommit openCommit = "intent" // the call is about to be made
	resultCommit openCommit = "result" // the call has its result, and the last transaction begins
	answerCommit openCommit = "answer" // the answer is recorded, and the request ends
)

// openCommitOf returns the kind of COMMIT that the messages to PostgreSQL hold, or "".
func openCommitOf(messages []byte) openCommit {
	switch {
	case bytes.Contains(messages, []byte("closed AS (DELETE")):
		return answerCommit
	case bytes.Contains(messages, []byte("settled AS (UPDATE")):
		return resultCommit
	case bytes.Contains(messages, []byte(`"idempotency_effects" (sent_first_at`)), bytes.Contains(messages, []byte("idempotency_effects (sent_first_at")):
		return intentCommit
	}
	return ""
}

// stop is a SIGSTOP of a bank, after the n-th COMMIT of a kind has arrived and before its reply,
// and a SIGCONT after the lease.
type stop struct {
	commit int64
	kind   openCommit
}

func (s stop) name() string { return "stop at the " + string(s.kind) + "'s COMMIT" }

// stopKinds are the COMMITs at which a bank is stopped: before its send, and between the fence of
// its last transaction and that transaction's COMMIT.
var stopKinds = []openCommit{intentCommit, resultCommit}

// effectsShare is the share of a profile's operations and faults in a run with Config.Effects,
// because its requests take longer.
const effectsShare = 0.2

// withEffects returns the profile of a run with clients that also send requests to call the
// processor.
func (p profile) withEffects() profile {
	operations := int(float64(p.operations) * effectsShare)
	p = p.scaled(operations)
	p.durationMax += time.Minute
	n := max(1, operations/4000) // of each fault that a smoke run has once
	for kind, times := range map[eventKind]int{
		loseRequests: 2, loseReplies: 3, errorsAfter: 2, errorsBefore: 2, slowProcessor: 2, lateProcessor: 3, sameErrors: 1,
		processorDown: 2, forgetsKeys: 1, forgetsNo: 1, lookupLags: 2, crashProcessor: 3,
	} {
		p.events[kind] = times * n
	}
	p.points = append(slices.Clone(p.points), crashpoint.BankCalls()...)
	p.events[killBank] = max(p.events[killBank], len(p.points))
	p.stops, p.killsMin = max(1, n/2), max(p.killsMin, len(p.points))
	p.shares.topUp, p.shares.payout, p.shares.receipt = 250, 170, 80
	p.shares.leave, p.shares.async = 150, 300
	p.effects = true
	return p
}

// stopsWithin limits the number of COMMITs of a kind before a stop is due, as a share of the
// operations. There are fewer such COMMITs than operations.
const stopsWithin = 0.03

// drawStops adds the stops of banks.
func (s *schedule) drawStops(p profile, choice *rand.Rand) {
	for _, kind := range stopKinds {
		for range p.stops {
			s.stops = append(s.stops, stop{1 + int64(stopsWithin*float64(p.operations)*choice.Float64()), kind})
		}
	}
}

// drawProcessor chooses the parameters of a fault of the processor.
func (e *event) drawProcessor(choice *rand.Rand) {
	e.length = between(choice, 1500*time.Millisecond, 4*time.Second)
	e.amount = 30 + choice.IntN(60) // percent
	e.with = ""
	switch {
	case e.kind == crashProcessor:
		e.length, e.amount = 0, 0
	case e.kind == sameErrors:
		e.length, e.amount = time.Second, 10+choice.IntN(20)
	case e.kind == slowProcessor:
		e.amount = 300 + choice.IntN(6000) // ms; the banks wait for 5 s
	case e.kind == forgetsKeys, e.kind == forgetsNo, e.kind == lookupLags, e.kind == processorDown:
		e.amount = 0
	}
	// A processor that forgets its keys while its look-up lags pays twice, whatever the bank does.
	if with := []eventKind{forgetsNo, lookupLags, "", ""}[choice.IntN(4)]; e.kind != crashProcessor && e.kind != forgetsKeys && e.kind != with {
		e.with = with
	}
}

// keyLifetime is the time for which the processor knows a key, and the banks' --psp-key-lifetime.
// It is a little longer than the shortest that they accept.
const keyLifetime = time.Minute

// goodProcessor returns the settings of a processor without faults.
func goodProcessor() psp.Faults {
	f := psp.FaultsDefault()
	f.KeyLifetimeS = keyLifetime.Seconds()
	return f
}

// faults returns the processor's settings during an event.
func (e *event) faults() psp.Faults {
	f := goodProcessor()
	f.Seed = uint64(e.due) + 1
	p := float64(e.amount) / 100
	for _, kind := range []eventKind{e.kind, e.with} {
		switch kind {
		case loseRequests:
			f.LoseRequest = p
		case loseReplies:
			f.LoseReply = p
		case errorsAfter:
			f.ErrorAfter = p
		case errorsBefore:
			f.ErrorBefore = p
		case slowProcessor:
			f.SlowMS = int64(e.amount)
		case lateProcessor:
			f.Late, f.LateMS = p, 2500
		case sameErrors:
			f.SameError = p
		case processorDown:
			f.Down = true
		case forgetsKeys:
			f.KeyLifetimeS = 0.2
			f.LoseReply = 0.5
		case forgetsNo:
			f.KeepsDeclines = false
		case lookupLags:
			f.LookupLagMS = 1500
		}
	}
	return f
}

// misbehave makes a fault of the processor.
func (r *run) misbehave(ctx context.Context, e event) (bool, error) {
	if e.kind == crashProcessor {
		return r.insist(ctx, insistMax, func() (bool, error) { return r.processor.crash(ctx) })
	}
	if err := r.processor.set(ctx, e.faults()); err != nil {
		return false, err
	}
	err := deadline.Sleep(ctx, e.length)
	return true, errors.Join(err, r.processor.set(ctx, goodProcessor()))
}

// stopLength is longer than the lease of a bank's open request: its call's timeout of 5 s, the
// COMMIT's of 5 s, and 5 s.
const stopLength = 16 * time.Second

// faultOpen decides the fault of a COMMIT of a request that calls the processor.
func (c *commits) faultOpen(bank int, commit pgfault.Commit, k *key) (pgfault.Fault, bool) {
	kind := openCommitOf(commit.Messages)
	if kind == "" {
		return pgfault.Fault{}, false
	}
	if hook := c.run.directed.hookOf(k, kind); hook != nil {
		return hook(bank), true
	}
	if c.run.healed.Load() {
		return pgfault.Fault{}, false
	}
	due, ok := c.takeStop(kind)
	if !ok {
		return pgfault.Fault{}, false
	}
	r := c.run
	r.noteFault()
	r.tally.stops.add(due.name())
	r.note("bank %d: key %d: %s", bank, k.index, due.name())
	r.keys.markExempt(k)
	return pgfault.Fault{Kind: pgfault.CallAfter, Hook: func() {
		r.allow(r.cluster.proxies[bank].Connections())
		if resume := r.banks.stop(bank); resume != nil {
			r.stopped.Go(func() {
				r.pauseStopped()
				resume()
				r.noteFault()
				r.note("bank %d goes on", bank)
			})
		}
	}}, true
}

// pauseStopped waits for stopLength, or until the run closes.
func (r *run) pauseStopped() {
	select {
	case <-time.After(stopLength):
	case <-r.closing:
	}
}

// takeStop returns the stop that is due at the next COMMIT of this kind.
func (c *commits) takeStop(kind openCommit) (stop, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.seenOpen == nil {
		c.seenOpen = map[openCommit]int64{}
	}
	c.seenOpen[kind]++
	if c.calmed {
		return stop{}, false
	}
	for i, s := range c.stops {
		if s.kind == kind && s.commit <= c.seenOpen[kind] {
			c.stops = slices.Delete(slices.Clone(c.stops), i, i+1)
			return s, true
		}
	}
	return stop{}, false
}

// stopNames returns the names of the stops that a run must make.
func (p profile) stopNames() (names []string) {
	for _, kind := range stopKinds {
		if p.stops > 0 {
			names = append(names, stop{kind: kind}.name())
		}
	}
	return names
}
