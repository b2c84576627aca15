package chaos

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/psp"
	"github.com/paidonce/idempotency/internal/deadline"
	"github.com/paidonce/idempotency/internal/pgfault"
)

// With Config.Effects some requests call a processor, which misbehaves. This file has their faults;
// processor.go is the processor, gateway.go stands between it and the banks, directed.go has the
// schedules that a random one meets rarely, and outside.go what is judged in the end.

// The faults of the processor. Each lasts for a while, and is the only one then, except that half of
// them come with a processor that keeps no declines or whose look-up lags.
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

// openCommitOf returns which of them the messages to PostgreSQL hold, or "".
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

// What happens to a bank at one of its COMMITs, or at one of its calls.
const (
	killBefore  = "kill before" // the COMMIT or the call never arrives
	killOnWire  = "kill on the wire"
	killAfter   = "kill after" // it arrived, and the bank dies before its reply
	stopAt      = "stop after" // SIGSTOP, and SIGCONT after the lease
	callArrives = "call"
)

// openFault is due at the n-th COMMIT of its kind, or at the first later one that it can apply to.
type openFault struct {
	commit int64
	kind   openCommit
	what   string
}

// name is shown in the report.
func (f openFault) name() string { return f.what + " the " + string(f.kind) + "'s COMMIT" }

// callFault is due at the n-th call that writes.
type callFault struct {
	call int64
	what string
}

func (f callFault) name() string { return f.what + " the " + callArrives }

// outsideProfile has the faults of the requests that call the processor, for the profile's
// operations.
type outsideProfile struct {
	open  map[openFault]int // by kind and what
	calls map[string]int    // by what
}

// effectsShare is the share of a profile's operations and faults with Config.Effects: its requests
// take longer.
const effectsShare = 0.2

// withEffects returns the profile of a run whose clients also send requests that call the processor.
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
	p.outside = outsideProfile{open: map[openFault]int{}, calls: map[string]int{killBefore: n, killOnWire: n, killAfter: 2 * n}}
	for _, kind := range []openCommit{intentCommit, resultCommit, answerCommit} {
		for _, what := range []string{killBefore, killOnWire, killAfter} {
			p.outside.open[openFault{kind: kind, what: what}] = n
		}
	}
	for _, kind := range []openCommit{intentCommit, resultCommit} {
		p.outside.open[openFault{kind: kind, what: stopAt}] = max(1, n/2)
	}
	p.shares.topUp, p.shares.payout, p.shares.receipt = 250, 170, 80
	p.shares.leave, p.shares.async = 150, 300
	p.effects = true
	return p
}

// openPerOperation is the minimum number of COMMITs of each kind for each operation, and of calls
// that write.
const openPerOperation = 0.03

// drawOutside adds the faults of the requests that call the processor.
func (s *schedule) drawOutside(p profile, choice *rand.Rand) {
	last := openPerOperation * float64(p.operations)
	kinds := slices.SortedFunc(func(yield func(openFault) bool) {
		for f := range p.outside.open {
			if !yield(f) {
				return
			}
		}
	}, func(a, b openFault) int { return strings.Compare(a.name(), b.name()) })
	for _, f := range kinds {
		for range p.outside.open[f] {
			f.commit = 1 + int64(last*choice.Float64())
			s.open = append(s.open, f)
		}
	}
	slices.SortStableFunc(s.open, func(a, b openFault) int { return int(a.commit - b.commit) })
	for _, what := range []string{killBefore, killOnWire, killAfter} {
		for range p.outside.calls[what] {
			s.calls = append(s.calls, callFault{call: 1 + int64(last*choice.Float64()), what: what})
		}
	}
	slices.SortStableFunc(s.calls, func(a, b callFault) int { return int(a.call - b.call) })
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
	if e.kind != crashProcessor && e.kind != forgetsKeys && choice.IntN(2) == 0 {
		e.with = []eventKind{forgetsNo, lookupLags}[choice.IntN(2)]
	}
}

// faults returns the processor's faults of an event.
func (e *event) faults() psp.Faults {
	f := psp.FaultsDefault()
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
	return true, errors.Join(err, r.processor.set(ctx, psp.FaultsDefault()))
}

// stopLength is longer than the lease of a bank's open request: its call's timeout of 5 s, the
// COMMIT's of 2 s, and 5 s.
const stopLength = 13 * time.Second

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
	f, due := c.takeOpen(kind)
	if !due {
		return pgfault.Fault{}, false
	}
	r := c.run
	r.noteFault()
	r.tally.openFaults.add(f.name())
	r.note("bank %d: key %d: %s", bank, k.index, f.name())
	r.keys.markExempt(k)
	kill := func() { r.banks.kill(bank, arm{}) }
	switch f.what {
	case killBefore:
		kill()
		return pgfault.Fault{Kind: pgfault.CutBefore}, true
	case killOnWire:
		return pgfault.Fault{Kind: pgfault.CallBefore, Hook: kill}, true
	case killAfter:
		return pgfault.Fault{Kind: pgfault.CallAfter, Hook: kill}, true
	}
	return pgfault.Fault{Kind: pgfault.CallAfter, Hook: func() {
		r.allow(r.cluster.proxies[bank].Connections())
		if resume := r.banks.stop(bank); resume != nil {
			r.stops.Go(func() {
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

// takeOpen returns the fault that is due at the next COMMIT of this kind.
func (c *commits) takeOpen(kind openCommit) (openFault, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.seenOpen == nil {
		c.seenOpen = map[openCommit]int64{}
	}
	c.seenOpen[kind]++
	if c.calmed {
		return openFault{}, false
	}
	for i, f := range c.leftOpen {
		if f.kind == kind && f.commit <= c.seenOpen[kind] {
			c.leftOpen = slices.Delete(slices.Clone(c.leftOpen), i, i+1)
			return f, true
		}
	}
	return openFault{}, false
}

// killCalling kills the bank that makes a call.
func (r *run) killCalling(c *call, f callFault) verdict {
	r.noteFault()
	r.tally.openFaults.add(f.name())
	r.note("bank %d: call %s: %s", c.bank, c.name.service, f.name())
	kill := func() { r.banks.kill(c.bank, arm{}) }
	switch f.what {
	case killBefore:
		return verdict{before: kill, lose: true}
	case killOnWire:
		return verdict{before: kill}
	}
	return verdict{after: kill, cut: true}
}

// openFaultNames returns the names of the faults that a run must reach.
func (p profile) openFaultNames() []string {
	var names []string
	for f := range p.outside.open {
		names = append(names, f.name())
	}
	for what := range p.outside.calls {
		names = append(names, callFault{what: what}.name())
	}
	slices.Sort(names)
	return names
}
