// Package check decides whether a history of requests, and the books that it left behind, keep the
// bank's promises. It knows nothing of faults: whatever happened, a promise holds or it does not.
//
// The history is the clients' view: one [Operation] for each request that was sent, with or without
// a reply. [History] judges the history by itself, [Ledger] compares it with the books, and [Live],
// [Quiet] and [Baseline] check the rest of a run's traces. A result counts the things that its
// check saw. A verdict fails if a check is missing: nothing passes in silence.
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

// ExamplesMax is the maximum number of examples that a Result shows.
const ExamplesMax = bank.ExamplesMax

// Operation is one request and the result that its client saw. A retry is an Operation of its own.
type Operation struct {
	Client int
	Scope  string // the tenant
	Key    string
	// Request numbers the content of the request: two bodies of one key have different numbers. The
	// first request of a key is its real one; a changed body has another number.
	Request uint64
	// Since the start of the run, by a monotonic clock, taken before the first byte was written.
	Sent time.Duration
	// The same clock, taken after the last byte was read; 0: no reply came (lost).
	Returned time.Duration
	Outcome  string // Idempotency-Status; empty: no reply, or a reply without it
	Status   int    // HTTP status; 0: no reply
	// The end of the problem's type if the answer is a problem document; it may be the handler's
	// own, such as account-not-found.
	Problem string
	// A hash of status, recorded headers and body bytes. Set only for executed and replayed.
	Answer [32]byte
	ID     string // of the transfer, order or account, from a 2xx answer
	// The content of the request. An order has its account in From and no To. Its Amount may be 0,
	// which is not compared.
	From, To string
	Amount   int64
	// Calls is true if the request calls another service. Another run may end it, so even its first
	// answer may be a replay or in-progress.
	Calls bool
	// Final is true in the final replay, which repeats the real request of every key that was not
	// given up. An acknowledged key must have an answer there.
	Final bool
}

// outcome returns the outcome that the reply states, or unknown if there is no reply or its outcome
// cannot be trusted.
func (op *Operation) outcome() idempotency.Outcome {
	if op.Returned == 0 || !known(op.Outcome) {
		return idempotency.OutcomeUnknown
	}
	if outcome := idempotency.Outcome(op.Outcome); outcome != idempotency.OutcomePending {
		return outcome
	}
	return idempotency.OutcomeUnknown // which it is, for a client that does not wait
}

// acknowledged reports whether the reply is the key's recorded answer.
func (op *Operation) acknowledged() bool {
	o := op.outcome()
	return o == idempotency.OutcomeExecuted || o == idempotency.OutcomeReplayed
}

// paid reports whether the reply states that the request took effect.
func (op *Operation) paid() bool { return op.acknowledged() && success(op.Status) }

func success(status int) bool { return status >= 200 && status < 300 }

// known reports whether a value of Idempotency-Status is one of those that exist.
func known(outcome string) bool {
	switch idempotency.Outcome(outcome) {
	case idempotency.OutcomeExecuted, idempotency.OutcomeReplayed, idempotency.OutcomeInProgress,
		idempotency.OutcomeMismatch, idempotency.OutcomeNotExecuted, idempotency.OutcomeUnknown, idempotency.OutcomePending:
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

// short formats a time in seconds, to the microsecond: requests of one key can be that close.
func short(d time.Duration) string { return fmt.Sprintf("%.6f", d.Seconds()) }

// Key is a key within its scope.
type Key struct{ Scope, Key string }

// String is for examples: the keys of a run are random ids, not secrets.
func (k Key) String() string { return k.Scope + "/" + k.Key }

// Expectation states the end that a key's first request must have. Each key of a run has one. A
// request with a changed body has none, but it may win the key if the first request took no effect.
// So its client also retries it, until the reply is executed, replayed or mismatch, or is
// not-executed and no earlier reply was lost or unknown.
type Expectation struct {
	Scope, Key string
	// The client gave up after not-executed, and no reply was lost or unknown: the request must
	// never take effect.
	GivenUp bool
	// The handler must refuse the request: its answer is a 4xx.
	Declined bool
	// The request is left to a person, and has no answer.
	Parked bool
}

// Result is one check's findings.
type Result struct {
	Name     string   `json:"name"`     // one of Names
	Title    string   `json:"title"`    // the promise, in one line
	Seen     int      `json:"seen"`     // number of things that were checked: 0 proves nothing
	Count    int      `json:"count"`    // number of wrongs
	Examples []string `json:"examples"` // the first ExamplesMax wrongs; no bodies
}

// OK reports whether no wrong was found.
func (r Result) OK() bool { return r.Count == 0 }

// add records a wrong.
func (r *Result) add(format string, args ...any) {
	r.Count++
	if len(r.Examples) < ExamplesMax {
		r.Examples = append(r.Examples, fmt.Sprintf(format, args...))
	}
}

// Verdict sums up all checks of a run.
type Verdict struct {
	OK     bool     `json:"ok"`
	Checks []Result `json:"checks"`
	// The checks that were not run. If there is one, OK is false.
	Missing []string `json:"missing"`
}

// Judge combines results into a verdict, in the order of Names. Two results of one name become one.
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
