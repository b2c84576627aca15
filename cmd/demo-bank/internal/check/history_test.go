package check

import (
	"testing"
	"time"

	"github.com/paidonce/idempotency"
)

// historyCase is a history of the key "k" (and of others that it names), and the checks that must
// find an error in it.
type historyCase struct {
	name     string
	ops      []Operation
	expected []Expectation // nil: k, which is not given up and not declined
	wrong    []string
}

func (c historyCase) run(t *testing.T) {
	t.Parallel()
	expected := c.expected
	if expected == nil {
		expected = []Expectation{{Scope: "acme", Key: "k"}}
	}
	wantWrong(t, History(c.ops, expected), c.wrong...)
}

func end(op Operation) Operation { return op.with(final) }

var gaveUp = []Expectation{{Scope: "acme", Key: "k", GivenUp: true}}
var mustDecline = []Expectation{{Scope: "acme", Key: "k", Declined: true}}

func TestHealthyHistoriesPass(t *testing.T) {
	t.Parallel()
	for _, c := range []historyCase{
		{name: "nothing was sent", expected: []Expectation{}},
		{name: "executed, then replays", ops: []Operation{
			op(1, 0, 10, "executed"), op(1, 20, 30, "replayed"), end(op(1, 40, 50, "replayed")),
		}},
		{name: "any order of operations", ops: []Operation{
			end(op(1, 40, 50, "replayed")), op(1, 0, 10, "executed"), op(1, 20, 30, "replayed"),
		}},
		{name: "a lost request took effect", ops: []Operation{
			op(1, 0, 0, "lost"), op(1, 20, 30, "replayed"), end(op(1, 40, 50, "replayed")),
		}},
		{name: "a lost request took none", ops: []Operation{
			op(1, 0, 0, "lost"), op(1, 20, 30, "executed"), end(op(1, 40, 50, "replayed")),
		}},
		{name: "an unknown request took effect after it was told", ops: []Operation{
			op(1, 0, 10, "unknown"), op(1, 20, 30, "in-progress"), op(1, 40, 50, "not-executed"), op(1, 60, 70, "replayed"),
			end(op(1, 80, 90, "replayed")),
		}},
		{name: "a 502 of somebody between, without a status", ops: []Operation{
			op(1, 0, 10, "").with(func(op *Operation) { op.Status = 502 }), op(1, 20, 30, "replayed"), end(op(1, 40, 50, "replayed")),
		}},
		{name: "duplicates at once", ops: []Operation{
			op(1, 0, 30, "executed"), op(1, 1, 5, "in-progress"), op(1, 2, 31, "replayed"), op(1, 3, 6, "in-progress"),
			end(op(1, 40, 50, "replayed")),
		}},
		{name: "a replay overtakes the reply of the first run", ops: []Operation{
			op(1, 0, 100, "executed"), op(1, 20, 30, "replayed"), end(op(1, 110, 120, "replayed")),
		}},
		{name: "in-progress while a cut connection dies", ops: []Operation{
			op(1, 0, 10, "not-executed"), op(1, 20, 30, "in-progress"), op(1, 40, 50, "executed"), end(op(1, 60, 70, "replayed")),
		}},
		{name: "a chain of restarts", ops: []Operation{
			op(1, 0, 20, "in-progress"), op(1, 10, 40, "in-progress"), op(1, 30, 60, "executed"), end(op(1, 70, 80, "replayed")),
		}},
		{name: "a changed body after the record", ops: []Operation{
			op(1, 0, 10, "executed"), op(2, 20, 30, "mismatch"), end(op(1, 40, 50, "replayed")),
		}},
		{name: "a changed body after a lost one that took effect", ops: []Operation{
			op(1, 0, 0, "lost"), op(2, 20, 30, "mismatch"), op(1, 40, 50, "replayed"), end(op(1, 60, 70, "replayed")),
		}},
		{name: "a changed body wins the key", ops: []Operation{
			op(1, 0, 10, "not-executed"), op(2, 20, 30, "executed"), op(1, 40, 50, "mismatch"), end(op(1, 60, 70, "mismatch")),
		}},
		{name: "given up", expected: gaveUp, ops: []Operation{
			op(1, 0, 10, "not-executed"), op(1, 20, 30, "not-executed"),
		}},
		{name: "declined", expected: mustDecline, ops: []Operation{
			op(1, 0, 10, "executed").with(declined), end(op(1, 20, 30, "replayed")).with(declined),
		}},
		{name: "one key of two scopes", expected: []Expectation{{Scope: "acme", Key: "k"}, {Scope: "globex", Key: "k"}}, ops: []Operation{
			op(1, 0, 10, "executed"), op(2, 0, 10, "executed").with(of("globex", "k")),
			end(op(1, 20, 30, "replayed")), end(op(2, 20, 30, "replayed")).with(of("globex", "k")),
		}},
	} {
		t.Run(c.name, c.run)
	}
}

func TestBrokenHistoriesAreCaught(t *testing.T) {
	t.Parallel()
	other := func(op *Operation) { op.ID, op.Answer = "2", hash("other") }
	both := []Expectation{{Scope: "acme", Key: "k"}, {Scope: "globex", Key: "k"}}
	for _, c := range []historyCase{
		{name: "executed twice", wrong: []string{EffectsCounted, OneAnswer, InTheBooks, Linearizable}, ops: []Operation{
			op(1, 0, 10, "executed"), op(1, 20, 30, "executed").with(other), end(op(1, 40, 50, "replayed")),
		}},
		{name: "told twice that it was executed now", wrong: []string{EffectsCounted, Linearizable}, ops: []Operation{
			op(1, 0, 30, "executed"), op(1, 0, 30, "executed"), end(op(1, 40, 50, "replayed")),
		}},
		{name: "a decline executed twice", wrong: []string{Linearizable}, expected: mustDecline, ops: []Operation{
			op(1, 0, 10, "executed").with(declined), op(1, 20, 30, "executed").with(declined), end(op(1, 40, 50, "replayed")).with(declined),
		}},
		{name: "executed again after it was replayed", wrong: []string{Linearizable}, ops: []Operation{
			op(1, 0, 0, "lost"), op(1, 20, 30, "replayed"), op(1, 40, 50, "executed"), end(op(1, 60, 70, "replayed")),
		}},
		{name: "a replay changes", wrong: []string{OneAnswer, Linearizable}, ops: []Operation{
			op(1, 0, 10, "executed"), end(op(1, 20, 30, "replayed")).with(func(op *Operation) { op.Answer = hash("bytes") }),
		}},
		{name: "the final replay alone changes, after a lost reply", wrong: []string{OneAnswer, InTheBooks, Linearizable}, ops: []Operation{
			op(1, 0, 0, "lost"), op(1, 20, 30, "replayed"), end(op(1, 40, 50, "replayed")).with(other),
		}},
		{name: "a replay with another status", wrong: []string{OneAnswer}, ops: []Operation{
			op(1, 0, 10, "executed"), end(op(1, 20, 30, "replayed")).with(func(op *Operation) { op.Status = 200 }),
		}},
		{name: "another transfer in the same bytes", wrong: []string{InTheBooks}, ops: []Operation{
			op(1, 0, 10, "executed"), end(op(1, 20, 30, "replayed")).with(func(op *Operation) { op.ID = "2" }),
		}},
		{name: "a 2xx without an id", wrong: []string{InTheBooks}, ops: []Operation{
			op(1, 0, 10, "executed").with(func(op *Operation) { op.ID = "" }), end(op(1, 20, 30, "replayed")).with(func(op *Operation) { op.ID = "" }),
		}},
		{name: "not-executed was false", wrong: []string{Linearizable}, ops: []Operation{
			op(1, 0, 10, "not-executed"), op(1, 20, 30, "replayed"), end(op(1, 40, 50, "replayed")),
		}},
		{name: "a replay of nothing, by request 0", wrong: []string{Linearizable}, ops: []Operation{
			op(0, 0, 10, "replayed"), end(op(0, 20, 30, "replayed")),
		}},
		{name: "a replay before anything was sent that could be it", wrong: []string{Linearizable}, ops: []Operation{
			op(1, 0, 10, "replayed"), op(1, 20, 0, "lost"), end(op(1, 40, 50, "replayed")),
		}},
		{name: "a changed body gets the real one's answer", wrong: []string{OneAnswer, Linearizable}, ops: []Operation{
			op(1, 0, 10, "executed"), op(2, 20, 30, "replayed"), end(op(1, 40, 50, "replayed")),
		}},
		{name: "a changed body is executed under a key that is held", wrong: []string{EffectsCounted, OneAnswer, InTheBooks, Linearizable}, ops: []Operation{
			op(1, 0, 10, "executed"), op(2, 20, 30, "executed").with(other), end(op(1, 40, 50, "replayed")),
		}},
		{name: "mismatch without a record", wrong: []string{Linearizable}, ops: []Operation{
			op(1, 0, 10, "not-executed"), op(2, 20, 30, "mismatch"), op(1, 40, 50, "executed"), end(op(1, 60, 70, "replayed")),
		}},
		{name: "mismatch for the very request", wrong: []string{Linearizable}, ops: []Operation{
			op(1, 0, 10, "executed"), op(1, 20, 30, "mismatch"), end(op(1, 40, 50, "replayed")),
		}},
		{name: "the changed body held the key, then the real one is executed", wrong: []string{Linearizable}, ops: []Operation{
			op(1, 0, 10, "not-executed"), op(2, 20, 0, "lost"), op(1, 40, 50, "mismatch"), op(1, 60, 70, "executed"),
			end(op(1, 80, 90, "replayed")),
		}},
		{name: "a stuck key", wrong: []string{Linearizable}, ops: []Operation{
			op(1, 0, 10, "in-progress"), op(1, 20, 30, "executed"), end(op(1, 60, 70, "replayed")),
		}},
		{name: "a key stuck long after a connection was cut", wrong: []string{Linearizable}, ops: []Operation{
			op(1, 0, 10, "not-executed"), op(1, 11+int(HolderMax/time.Millisecond), 70_020, "in-progress"),
			op(1, 70_030, 70_040, "executed"), end(op(1, 70_050, 70_060, "replayed")),
		}},
		{name: "nobody but the refused ones", wrong: []string{Linearizable}, ops: []Operation{
			op(1, 0, 20, "in-progress"), op(1, 10, 30, "in-progress"), op(1, 40, 50, "executed"), end(op(1, 60, 70, "replayed")),
		}},
		{name: "in-progress after the record", wrong: []string{Linearizable}, ops: []Operation{
			op(1, 0, 0, "lost"), op(1, 10, 20, "replayed"), op(1, 30, 40, "in-progress"), end(op(1, 50, 60, "replayed")),
		}},
		{name: "another scope's answer", wrong: []string{InTheBooks}, expected: both, ops: []Operation{
			op(1, 0, 10, "executed"), end(op(1, 20, 30, "replayed")),
			op(1, 0, 10, "executed").with(func(op *Operation) { op.Scope = "globex" }),
			end(op(1, 20, 30, "replayed")).with(func(op *Operation) { op.Scope = "globex" }),
		}},
		{name: "another scope's record", wrong: []string{InTheBooks, Linearizable}, expected: both, ops: []Operation{
			op(1, 0, 10, "executed"), end(op(1, 20, 30, "replayed")),
			op(1, 40, 50, "replayed").with(func(op *Operation) { op.Scope = "globex" }),
			end(op(1, 60, 70, "replayed")).with(func(op *Operation) { op.Scope = "globex" }),
		}},
		{name: "a 2xx without a status", wrong: []string{OneAnswer}, ops: []Operation{
			op(1, 0, 10, "").with(func(op *Operation) { op.Status, op.ID = 201, "1" }), op(1, 20, 30, "replayed"), end(op(1, 40, 50, "replayed")),
		}},
		{name: "a problem without a status", wrong: []string{OneAnswer}, ops: []Operation{
			op(1, 0, 10, "").with(func(op *Operation) { op.Status, op.Problem = 402, "insufficient-funds" }),
			op(1, 20, 30, "executed"), end(op(1, 40, 50, "replayed")),
		}},
		{name: "a status that does not exist", wrong: []string{OneAnswer}, ops: []Operation{
			op(1, 0, 10, "done"), op(1, 20, 30, "executed"), end(op(1, 40, 50, "replayed")),
		}},
		{name: "a 2xx that says not-executed", wrong: []string{OneAnswer}, ops: []Operation{
			op(1, 0, 10, "not-executed").with(func(op *Operation) { op.Status = 201 }), op(1, 20, 30, "executed"), end(op(1, 40, 50, "replayed")),
		}},
		{name: "a 5xx that was recorded", wrong: []string{OneAnswer, Settled}, ops: []Operation{
			op(1, 0, 10, "executed").with(func(op *Operation) { op.Status = 500 }), end(op(1, 20, 30, "replayed")).with(func(op *Operation) { op.Status = 500 }),
		}},
		{name: "answers that nobody hashed", wrong: []string{OneAnswer}, ops: []Operation{
			op(1, 0, 10, "executed").with(func(op *Operation) { op.Answer = [32]byte{} }), end(op(1, 20, 30, "replayed")).with(func(op *Operation) { op.Answer = [32]byte{} }),
		}},
		{name: "no final replay", wrong: []string{OneAnswer}, ops: []Operation{op(1, 0, 10, "executed")}},
		{name: "the final replay finds nothing out", wrong: []string{OneAnswer}, ops: []Operation{
			op(1, 0, 10, "executed"), end(op(1, 20, 30, "unknown")),
		}},
		{name: "a given-up key took effect", wrong: []string{GivenUpForGood, Linearizable}, expected: gaveUp, ops: []Operation{
			op(1, 0, 10, "not-executed"), end(op(1, 20, 30, "replayed")),
		}},
		{name: "a given-up key is executed by the final look", wrong: []string{GivenUpForGood}, expected: gaveUp, ops: []Operation{
			op(1, 0, 10, "not-executed"), end(op(1, 20, 30, "executed")),
		}},
		{name: "given up after a lost reply", wrong: []string{GivenUpForGood}, expected: gaveUp, ops: []Operation{
			op(1, 0, 0, "lost"), op(1, 20, 30, "not-executed"),
		}},
		{name: "given up after unknown", wrong: []string{GivenUpForGood}, expected: gaveUp, ops: []Operation{
			op(1, 0, 10, "unknown"), op(1, 20, 30, "not-executed"),
		}},
		{name: "given up for nothing", wrong: []string{GivenUpForGood, Linearizable}, expected: gaveUp, ops: []Operation{
			op(1, 0, 10, "in-progress"),
		}},
		{name: "a payment without an answer", wrong: []string{Settled}, ops: []Operation{
			op(1, 0, 0, "lost"), op(1, 20, 30, "unknown"), end(op(1, 40, 50, "not-executed")),
		}},
		{name: "a payment that was never sent", wrong: []string{Settled}},
		{name: "a payment that was declined", wrong: []string{Settled}, ops: []Operation{
			op(1, 0, 10, "executed").with(declined), end(op(1, 20, 30, "replayed")).with(declined),
		}},
		{name: "a payment that should have been declined", wrong: []string{Settled}, expected: mustDecline, ops: []Operation{
			op(1, 0, 10, "executed"), end(op(1, 20, 30, "replayed")),
		}},
		{name: "refused as a mismatch of nothing", wrong: []string{Settled, Linearizable}, ops: []Operation{
			op(1, 0, 10, "mismatch"), end(op(1, 20, 30, "mismatch")),
		}},
		{name: "a key that nobody expected", wrong: []string{Settled}, expected: []Expectation{}, ops: []Operation{
			op(1, 0, 10, "executed"), end(op(1, 20, 30, "replayed")),
		}},
		{name: "two expectations", wrong: []string{Settled}, expected: append(both[:1:1], both[0]), ops: []Operation{
			op(1, 0, 10, "executed"), end(op(1, 20, 30, "replayed")),
		}},
		{name: "a reply before its request", wrong: []string{Linearizable}, ops: []Operation{
			op(1, 20, 10, "not-executed"), op(1, 20, 30, "executed"), end(op(1, 40, 50, "replayed")),
		}},
		{name: "a reply at no time", wrong: []string{OneAnswer, Linearizable}, ops: []Operation{
			op(1, 0, 0, "executed"), op(1, 20, 30, "replayed"), end(op(1, 40, 50, "replayed")),
		}},
	} {
		t.Run(c.name, c.run)
	}
}

// The statuses that a history may have are those that the middleware sends.
func TestKnownOutcomes(t *testing.T) {
	t.Parallel()
	for _, o := range []idempotency.Outcome{
		idempotency.OutcomeExecuted, idempotency.OutcomeReplayed, idempotency.OutcomeInProgress,
		idempotency.OutcomeMismatch, idempotency.OutcomeNotExecuted, idempotency.OutcomeUnknown, idempotency.OutcomePending,
	} {
		if !known(string(o)) {
			t.Errorf("%s is not known", o)
		}
	}
	if o := (&Operation{Returned: 1, Outcome: string(idempotency.OutcomePending)}).outcome(); o != idempotency.OutcomeUnknown {
		t.Errorf("pending counts as %s", o)
	}
	if known("") || known("Executed") {
		t.Error("others are known")
	}
}

// Each check counts the things that it saw, so that a run can tell a kept promise from one that was
// never tested.
func TestHistorySaysHowMuchItSaw(t *testing.T) {
	t.Parallel()
	ops := []Operation{
		op(1, 0, 10, "executed"), end(op(1, 20, 30, "replayed")),
		op(1, 0, 10, "not-executed").with(of("acme", "given up")),
		op(1, 0, 10, "executed").with(declined).with(of("acme", "declined")), end(op(1, 20, 30, "replayed")).with(declined).with(of("acme", "declined")),
	}
	results := History(ops, []Expectation{
		{Scope: "acme", Key: "k"}, {Scope: "acme", Key: "given up", GivenUp: true}, {Scope: "acme", Key: "declined", Declined: true},
	})
	wantWrong(t, results)
	want := map[string]int{EffectsCounted: 1, OneAnswer: 2, InTheBooks: 1, GivenUpForGood: 1, Settled: 2, Linearizable: 3}
	for _, r := range results {
		if r.Seen != want[r.Name] {
			t.Errorf("%s saw %d, want %d", r.Name, r.Seen, want[r.Name])
		}
		delete(want, r.Name)
	}
	if len(want) > 0 {
		t.Errorf("missing are %v", want)
	}
}
