// Package check decides whether a history of requests, and the books that it left behind, keep the bank's promises.
// It knows nothing of faults: whatever happened, a promise holds or it does not.
//
// The history is what clients saw: one [Operation] for each request that was sent, replies or none. [History] judges it
// alone, [Ledger] holds it against the books, and [Live], [Quiet] and [Baseline] look at what else a run leaves behind.
// A result says how much its check saw, and a verdict fails where a check is missing: nothing passes in silence.
package check

import (
	"fmt"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
)

// The names of all checks.
const (
	MoneyKept          = bank.MoneyKept
	EffectsCounted     = "effects counted"
	OneEffect          = bank.OneEffect
	TwoEntries         = bank.TwoEntries
	BalancesAddUp      = bank.BalancesAddUp
	EffectsRecorded    = bank.EffectsRecorded
	RecordsHaveEffects = bank.RecordsHaveEffects
	OneAnswer          = "one answer"
	InTheBooks         = "in the books"
	GivenUpForGood     = "given up for good"
	Settled            = "settled"
	Quieted            = "quiet"
	BackAtBaseline     = "back at baseline"
	LiveRecordsKept    = "live records kept"
	Linearizable       = "linearizable"
)

// ExamplesMax is how many examples a Result shows.
const ExamplesMax = bank.ExamplesMax

// Operation is one request and what its client saw of it. A retry is an Operation of its own.
type Operation struct {
	Client int
	Scope  string // the tenant
	Key    string
	// Request names what was asked: two bodies of one key differ in it. The first request of a key is the real one; a
	// changed body has another number.
	Request  uint64
	Sent     time.Duration // since the start of the run, by a monotonic clock, taken before the first byte was written
	Returned time.Duration // the same, taken after the last byte was read; 0: no reply came (lost)
	Outcome  string        // Idempotency-Status; empty: no reply, or a reply without it
	Status   int           // HTTP status; 0: no reply
	Problem  string        // end of the problem's type, where the answer is one; also a handler's own, as account-not-found
	Answer   [32]byte      // hash of status, recorded headers and body bytes; of executed and replayed only
	ID       string        // of the transfer, order or account, from a 2xx answer
	// What was asked. An order has its account in From and no To; its Amount may be 0, which is not compared.
	From, To string
	Amount   int64
	// Final: part of the final replay, in which every key is asked for once more with its real request, but for those
	// that were given up. A key that was acknowledged must have an answer there.
	Final bool
}

// outcome is what the reply says of the request; unknown where there is none, or none that can be trusted.
func (op *Operation) outcome() idempotency.Outcome {
	if op.Returned == 0 || !known(op.Outcome) {
		return idempotency.OutcomeUnknown
	}
	return idempotency.Outcome(op.Outcome)
}

// acknowledged reports whether the reply is the key's recorded answer.
func (op *Operation) acknowledged() bool {
	o := op.outcome()
	return o == idempotency.OutcomeExecuted || o == idempotency.OutcomeReplayed
}

// paid reports whether the reply says that the request took effect.
func (op *Operation) paid() bool { return op.acknowledged() && success(op.Status) }

func success(status int) bool { return status >= 200 && status < 300 }

// known reports whether a value of Idempotency-Status is one of those there are.
func known(outcome string) bool {
	switch idempotency.Outcome(outcome) {
	case idempotency.OutcomeExecuted, idempotency.OutcomeReplayed, idempotency.OutcomeInProgress,
		idempotency.OutcomeMismatch, idempotency.OutcomeNotExecuted, idempotency.OutcomeUnknown:
		return true
	}
	return false
}

func (op *Operation) String() string {
	outcome := op.Outcome
	switch {
	case op.Returned == 0:
		return fmt.Sprintf("lost #%d %s-", op.Request, short(op.Sent))
	case outcome == "":
		outcome = "no outcome"
	}
	return fmt.Sprintf("%d %s #%d %s-%s", op.Status, outcome, op.Request, short(op.Sent), short(op.Returned))
}

// short is a time in seconds, to the microsecond: requests of one key can be that close.
func short(d time.Duration) string { return fmt.Sprintf("%.6f", d.Seconds()) }

// Key is a key within its scope.
type Key struct{ Scope, Key string }

// String is for examples: keys of a run are random ids and no secrets.
func (k Key) String() string { return k.Scope + "/" + k.Key }

// Expectation says what a key's client did and wanted. Each key of a run has one; it is about the key's first request.
// A changed body needs none, but may win the key where the first request took no effect: so whoever sent it goes on too,
// until it is told executed, replayed, mismatch or not-executed with nothing lost or unknown before.
type Expectation struct {
	Scope, Key string
	GivenUp    bool // abandoned after not-executed, with nothing lost or unknown before: it must never take effect
	Declined   bool // the handler must refuse the request: its answer is a 4xx
}

// Result is one check's findings.
type Result struct {
	Name     string   `json:"name"`     // one of Names
	Title    string   `json:"title"`    // the promise, in one line
	Seen     int      `json:"seen"`     // how many things were looked at: 0 proves nothing
	Count    int      `json:"count"`    // of wrongs
	Examples []string `json:"examples"` // the first ExamplesMax of them; no bodies
}

// OK reports whether no wrong was found.
func (r Result) OK() bool { return r.Count == 0 }

// add notes a wrong.
func (r *Result) add(format string, args ...any) {
	r.Count++
	if len(r.Examples) < ExamplesMax {
		r.Examples = append(r.Examples, fmt.Sprintf(format, args...))
	}
}

// Verdict is what all checks of a run come to.
type Verdict struct {
	OK      bool     `json:"ok"`
	Checks  []Result `json:"checks"`
	Missing []string `json:"missing"` // the checks that were not run; one is enough for a verdict that is not ok
}

// Judge makes the verdict of results, in the order of Names; two results of one name become one.
func Judge(results ...Result) Verdict {
	v := Verdict{OK: true, Checks: []Result{}, Missing: []string{}}
	for _, name := range Names() {
		merged := result(name)
		found := false
		for _, r := range results {
			if r.Name != name {
				continue
			}
			found = true
			merged.Seen += r.Seen
			merged.Count += r.Count
			merged.Examples = append(merged.Examples, r.Examples[:min(len(r.Examples), ExamplesMax-len(merged.Examples))]...)
		}
		if !found {
			v.OK, v.Missing = false, append(v.Missing, name)
			continue
		}
		v.OK = v.OK && merged.OK()
		v.Checks = append(v.Checks, merged)
	}
	return v
}

// titles are the promises, in the order in which they are shown.
var titles = [...]struct{ name, title string }{
	{MoneyKept, "money is neither made nor lost, and no balance is negative"},
	{EffectsCounted, "there are as many transfers and orders as keys acknowledged with 2xx"},
	{OneEffect, "no key has more than one transfer or order"},
	{TwoEntries, "each transfer and order has two entries, which sum to 0"},
	{BalancesAddUp, "each balance is the opening balance plus the account's entries"},
	{EffectsRecorded, "each keyed transfer, order and account has its attempt's recorded 2xx"},
	{RecordsHaveEffects, "each recorded 2xx has its attempt's transfer, order or account"},
	{OneAnswer, "each key has one answer, the same status, headers and bytes in every reply"},
	{InTheBooks, "what was acknowledged first is in the books: id, accounts and amount"},
	{GivenUpForGood, "a key given up after not-executed never took effect"},
	{Settled, "every key that was not given up has its answer in the end"},
	{Quieted, "no advisory lock, no idle transaction and no waiting session is left"},
	{BackAtBaseline, "goroutines, file descriptors and connections are back at their baseline"},
	{LiveRecordsKept, "no live record was deleted, and the table stayed bounded"},
	{Linearizable, "each key's replies are those of some order of its requests, one at a time"},
}

// Names returns the names of all checks, in the order in which they are shown.
func Names() []string {
	names := make([]string, len(titles))
	for i, t := range titles {
		names[i] = t.name
	}
	return names
}

// result starts the named check's result.
func result(name string) Result {
	for _, t := range titles {
		if t.name == name {
			return Result{Name: t.name, Title: t.title, Examples: []string{}}
		}
	}
	panic("check: no check is named " + name)
}
