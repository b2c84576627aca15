package check

import (
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency/internal/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// hash returns an answer's hash, made from a name.
func hash(name string) [32]byte { return sha256.Sum256([]byte(name)) }

// wantWrong requires that exactly the named checks find errors. Results with the same name count as
// one.
func wantWrong(t *testing.T, results []Result, names ...string) {
	t.Helper()
	var wrong []string
	for _, r := range Judge(results...).Checks {
		if !r.OK() {
			wrong = append(wrong, r.Name)
		}
		if r.Count > 0 && len(r.Examples) != min(r.Count, ExamplesMax) {
			t.Errorf("%s counts %d and shows %q", r.Name, r.Count, r.Examples)
		}
	}
	slices.Sort(names)
	slices.Sort(wrong)
	if !slices.Equal(wrong, names) {
		t.Errorf("wrong are %q, want %q\n%s", wrong, names, describe(results))
	}
}

func describe(results []Result) string {
	var b strings.Builder
	for _, r := range results {
		for _, example := range r.Examples {
			fmt.Fprintf(&b, "  %s: %s\n", r.Name, example)
		}
	}
	return b.String()
}

// at returns a time of the run, in milliseconds.
func at(ms int) time.Duration { return time.Duration(ms) * time.Millisecond }

// op makes a request of the key "k" and its reply: an outcome, or "lost".
func op(request uint64, sent, returned int, outcome string) Operation {
	o := Operation{
		Scope: "acme", Key: "k", Request: request, Sent: at(sent), Returned: at(returned), Outcome: outcome,
		From: "alice", To: "bob", Amount: 100 + int64(request),
	}
	switch outcome {
	case "executed", "replayed":
		o.Status, o.ID, o.Answer = 201, "1", hash("201")
	case "in-progress":
		o.Status, o.Problem = 409, "in-progress"
	case "mismatch":
		o.Status, o.Problem = 422, "key-reused"
	case "not-executed":
		o.Status, o.Problem = 503, "unavailable"
	case "unknown":
		o.Status, o.Problem = 503, "outcome-unknown"
	case "lost":
		o.Returned, o.Outcome = 0, ""
	}
	return o
}

// with returns a changed copy of an operation.
func (op Operation) with(change func(*Operation)) Operation {
	change(&op)
	return op
}

// declined turns the handler's answer into a refusal.
func declined(op *Operation) {
	op.Status, op.Problem, op.ID, op.Answer = 402, "insufficient-funds", "", hash("402")
}

// final makes a request part of the final replay.
func final(op *Operation) { op.Final = true }

// of puts a request under another key. Its transfer has another id.
func of(scope, key string) func(*Operation) {
	return func(op *Operation) {
		op.Scope, op.Key = scope, key
		if op.ID != "" {
			op.ID, op.Answer = scope+"-"+key, hash(scope+"-"+key)
		}
	}
}
