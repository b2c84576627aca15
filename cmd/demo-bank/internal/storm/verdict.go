package storm

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/check"
	"github.com/paidonce/idempotency/cmd/internal/terminal"
)

// fault is a kind of error that a storm finds.
type fault string

const (
	faultTwoAnswers  fault = "two different answers for one key"
	faultMissing     fault = "an acknowledged transfer is missing"
	faultForgotten   fault = "an answered key was executed again"
	faultChangedBody fault = "a changed body was not refused as a mismatch"
	faultUnexpected  fault = "an answer that no good request gets"
	faultMoney       fault = "money is not conserved"
	faultDoubles     fault = "a key has two transfers"
	faultAudit       fault = "the audit is not ok"
	faultSettled     fault = "a key has no answer of its own"
	faultIDs         fault = "an answer is that of another key"
	faultOrder       fault = "no order of a key's requests explains their answers"
)

// faultOf maps a check of the history to the fault that it finds.
var faultOf = map[string]fault{
	check.EffectsCounted: faultForgotten, check.OneAnswer: faultTwoAnswers, check.InTheBooks: faultIDs,
	check.Settled: faultSettled, check.Linearizable: faultOrder,
}

// examplesMax is the maximum number of faults that are described. All are counted.
const examplesMax = 10

// faults collects errors. The zero value is ready to use. It is safe for concurrent use.
type faults struct {
	mu       sync.Mutex
	counts   map[fault]int
	order    []fault
	examples []string
}

func (f *faults) add(kind fault, format string, args ...any) {
	f.addAll(kind, 1, fmt.Sprintf(format, args...))
}

func (f *faults) addAll(kind fault, count int, examples ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.counts == nil {
		f.counts = make(map[fault]int)
	}
	if f.counts[kind] == 0 {
		f.order = append(f.order, kind)
	}
	f.counts[kind] += count
	f.examples = append(f.examples, examples[:min(len(examples), examplesMax-len(f.examples))]...)
}

// list returns each kind of fault with its count, in the order of their first appearance.
func (f *faults) list() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	list := []string{}
	for _, kind := range f.order {
		list = append(list, fmt.Sprintf("%s (%d)", kind, f.counts[kind]))
	}
	return list
}

// Report is the result of a storm. Its JSON is one object.
type Report struct {
	Verdict  string   `json:"verdict"` // ok or broken
	Broken   []string `json:"broken"`  // the broken invariants, each with a count
	Examples []string `json:"examples"`

	Keys        int    `json:"keys"`
	Copies      int    `json:"copies"`
	Clients     int    `json:"clients"`
	Seed        uint64 `json:"seed"`
	Requests    int64  `json:"requests"`
	Executed    int64  `json:"executed"`
	Replayed    int64  `json:"replayed"`
	InProgress  int64  `json:"in_progress"`
	Mismatches  int64  `json:"mismatches"`
	NotExecuted int64  `json:"not_executed"`
	Unknown     int64  `json:"unknown"`
	Retries     int64  `json:"retries"`
	LostReplies int64  `json:"lost_replies"`

	KeysAcknowledged int `json:"keys_acknowledged"` // with a 2xx
	KeysDeclined     int `json:"keys_declined"`     // for lack of money
	// Kinds of answers that did not occur in this storm.
	NotSeen []string `json:"not_seen"`

	P50MS   float64 `json:"p50_ms"`
	P99MS   float64 `json:"p99_ms"`
	Seconds float64 `json:"seconds"` // from the first to the last copy sent

	AuditBefore *bank.Audit `json:"audit_before"`
	Audit       *bank.Audit `json:"audit"`
}

// OK reports whether every invariant holds.
func (r *Report) OK() bool { return len(r.Broken) == 0 }

// report returns the verdict. Call it after the last request.
func (s *storm) report(before, after *bank.Audit, sent time.Duration) *Report {
	r := &Report{
		Keys: s.config.Keys, Copies: s.config.Copies, Clients: s.config.Clients, Seed: s.config.Seed,
		Requests: s.requests.Load(), Retries: s.retries.Load(), Seconds: sent.Seconds(), AuditBefore: before, Audit: after,
	}
	var ops []check.Operation
	for _, c := range s.clients {
		ops = append(ops, c.ops...)
	}
	r.count(ops)
	expected := make([]check.Expectation, 0, len(s.transfers))
	for _, t := range s.transfers {
		declined := t.first != nil && !t.first.acknowledged()
		expected = append(expected, check.Expectation{Scope: scope, Key: t.key, Declined: declined})
		switch {
		case declined:
			r.KeysDeclined++
		case t.first != nil: // otherwise every answer was a fault, and is counted as one
			r.KeysAcknowledged++
		}
	}
	for _, result := range check.History(ops, expected) {
		if !result.OK() {
			s.faults.addAll(faultOf[result.Name], result.Count, result.Examples...)
		}
	}
	if after.BalanceTotal != after.OpeningTotal || after.EntriesTotal != "0" {
		s.faults.add(faultMoney, "balances are %s where %s were put in; the entries' sum is %s", after.BalanceTotal, after.OpeningTotal, after.EntriesTotal)
	}
	if after.KeysWithManyTransfers > 0 {
		s.faults.add(faultDoubles, "%d keys have more than one transfer", after.KeysWithManyTransfers)
	}
	if !after.OK {
		s.faults.add(faultAudit, "the audit before the storm said ok: %t", before.OK)
	}
	r.Broken, r.Examples = s.faults.list(), append([]string{}, s.faults.examples...)
	r.NotSeen = []string{}
	for _, kind := range []struct {
		name  string
		count int64
	}{{"executed", r.Executed}, {"replayed", r.Replayed}, {"in-progress", r.InProgress}, {"mismatch", r.Mismatches}} {
		if kind.count == 0 {
			r.NotSeen = append(r.NotSeen, kind.name)
		}
	}
	switch {
	case !r.OK():
		r.Verdict = "broken"
	case r.KeysAcknowledged == 0:
		r.Verdict = VerdictNone
	default:
		r.Verdict = "ok"
	}
	return r
}

// count adds the numbers of answers and their latencies.
func (r *Report) count(ops []check.Operation) {
	took := make([]time.Duration, 0, len(ops))
	for i := range ops {
		op := &ops[i]
		if op.Returned == 0 {
			r.LostReplies++
			continue
		}
		took = append(took, op.Returned-op.Sent)
		switch idempotency.Outcome(op.Outcome) {
		case idempotency.OutcomeExecuted:
			r.Executed++
		case idempotency.OutcomeReplayed:
			r.Replayed++
		case idempotency.OutcomeInProgress:
			r.InProgress++
		case idempotency.OutcomeMismatch:
			r.Mismatches++
		case idempotency.OutcomeNotExecuted:
			r.NotExecuted++
		case idempotency.OutcomeUnknown:
			r.Unknown++
		}
	}
	if len(took) > 0 {
		slices.Sort(took)
		at := func(percent int) float64 { return took[(len(took)-1)*percent/100].Seconds() * 1000 }
		r.P50MS, r.P99MS = at(50), at(99)
	}
}

// VerdictNone is the verdict on a bank that moved no money: nothing was wrong, but nothing was
// proven.
const VerdictNone = "none"

// WriteJSON writes the report as one JSON object.
func (r *Report) WriteJSON(w io.Writer) error {
	return terminal.WriteJSON(w, r, "")
}

// WriteText writes the report for people.
func (r *Report) WriteText(w io.Writer) error {
	var b strings.Builder
	table := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	row := func(name string, value any, note string) {
		_, _ = fmt.Fprintf(table, "%s\t%v\t%s\n", name, value, note)
	}
	row("keys", r.Keys, fmt.Sprintf("each sent %d times by %d clients, and once more at the end; seed %d", r.Copies, r.Clients, r.Seed))
	row("requests", r.Requests, fmt.Sprintf("all copies sent in %.1f s", r.Seconds))
	row("executed", r.Executed, "answers; more may have been lost")
	row("replayed", r.Replayed, "")
	row("in-progress", r.InProgress, "")
	row("mismatches", r.Mismatches, "changed bodies, refused")
	row("not-executed", r.NotExecuted, "")
	row("unknown", r.Unknown, "")
	row("retries", r.Retries, "")
	row("lost replies", r.LostReplies, "")
	row("latency p50", fmt.Sprintf("%.1f ms", r.P50MS), "")
	row("latency p99", fmt.Sprintf("%.1f ms", r.P99MS), "")
	row("acknowledged", r.KeysAcknowledged, fmt.Sprintf("keys; %d declined for lack of money", r.KeysDeclined))
	row("transfers", r.Audit.Transfers, fmt.Sprintf("in the books; %d before the storm", r.AuditBefore.Transfers))
	row("balances", r.Audit.BalanceTotal, fmt.Sprintf("minor units; %s put in", r.Audit.OpeningTotal))
	row("audit ok", r.Audit.OK, "")
	if err := table.Flush(); err != nil {
		return err
	}
	lines := strings.Split(b.String(), "\n")
	b.Reset()
	for _, line := range lines[:len(lines)-1] {
		b.WriteString(strings.TrimRight(line, " ") + "\n")
	}
	if len(r.NotSeen) > 0 {
		fmt.Fprintf(&b, "\nnot seen: %s (a storm with more keys and clients provokes them)\n", strings.Join(r.NotSeen, ", "))
	}
	fmt.Fprintf(&b, "\nverdict: %s\n", r.Verdict)
	for _, broken := range r.Broken {
		fmt.Fprintf(&b, "  broken: %s\n", terminal.Clean(broken))
	}
	for _, example := range r.Examples {
		fmt.Fprintf(&b, "  %s\n", terminal.Clean(example))
	}
	_, err := io.WriteString(w, b.String())
	return err
}
