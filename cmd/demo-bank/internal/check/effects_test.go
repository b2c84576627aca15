package check

import (
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
)

// outsideWorld is a state without errors: a top-up, a refused top-up, one that was refunded, a
// payout, a receipt, a parked payout, and a key that was given up.
type outsideWorld struct {
	Outside
	ops      []Operation
	expected []Expectation
}

func keyed(name string) Key { return Key{Scope: "acme", Key: name} }

func newOutsideWorld() *outsideWorld {
	w := &outsideWorld{}
	told := func(key, outcome string, status int, id string) {
		n := time.Duration(len(w.ops) + 1)
		op := Operation{Scope: "acme", Key: key, Sent: 2 * n, Returned: 2*n + 1, Outcome: outcome, Status: status, ID: id}
		w.ops = append(w.ops, op)
	}
	row := func(key, name string, kind idempotency.EffectKind, state idempotency.EffectState) {
		w.Effects = append(w.Effects, RecordedEffect{Key: keyed(key), Name: name, Kind: kind, State: state, DerivedKey: key + "/" + name})
	}
	w.Answers = map[Key]int{keyed("paid"): 201, keyed("declined"): 402, keyed("undone"): 409, keyed("out"): 201, keyed("mailed"): 201, keyed("maybe"): 201}
	row("paid", "charge", idempotency.EffectCall, idempotency.EffectDone)
	row("declined", "charge", idempotency.EffectCall, idempotency.EffectDeclined)
	row("undone", "charge", idempotency.EffectCall, idempotency.EffectDone)
	row("undone", "undo/charge", idempotency.EffectUndo, idempotency.EffectDone)
	row("out", "hold", idempotency.EffectPhase, idempotency.EffectDone)
	row("out", "payout", idempotency.EffectCall, idempotency.EffectDone)
	row("mailed", "mail", idempotency.EffectAtMostOnce, idempotency.EffectDone)
	row("maybe", "mail", idempotency.EffectAtMostOnce, idempotency.EffectMaybe)
	row("parked", "payout", idempotency.EffectCall, idempotency.EffectIntended)
	w.Charges = []Item{{ID: "ch1", Key: "paid/charge", Amount: 7}, {ID: "ch2", Key: "undone/charge", Amount: 8}}
	w.Refunds = []Item{{ID: "re1", Key: "undone/undo/charge", Of: "ch2", Amount: 8}}
	w.Payouts = []Item{{ID: "po1", Key: "out/payout", Amount: 9}}
	w.Mails = []Item{{ID: "ma1", Of: MailOf(keyed("mailed"))}}
	w.Postings = []Posting{
		{Kind: TopUp, Key: keyed("paid"), ID: "t1", Item: "ch1", Amount: 7},
		{Kind: Payout, Key: keyed("out"), ID: "p1", Item: "po1", Amount: 9},
		{Kind: Receipt, Key: keyed("mailed"), ID: "r1", Sent: "yes"},
		{Kind: Receipt, Key: keyed("maybe"), ID: "r2", Sent: "maybe"},
	}
	w.Open = []OpenRequest{{Key: keyed("parked"), Parked: "its key may be forgotten", Explained: "the same error for ever", Holds: 5}}
	w.Held = 5
	w.Inputs = map[string][]string{"paid/charge": {"{}"}}
	told("paid", "unknown", 503, "")
	told("paid", "executed", 201, "t1")
	told("declined", "executed", 402, "")
	told("undone", "executed", 409, "")
	told("out", "replayed", 201, "p1")
	told("mailed", "executed", 201, "r1")
	told("maybe", "executed", 201, "r2")
	told("parked", "unknown", 503, "")
	told("gone", "not-executed", 503, "")
	told("mixed", "not-executed", 503, "")
	told("mixed", "unknown", 503, "")
	row("mixed", "charge", idempotency.EffectCall, idempotency.EffectDeclined) // one refusal says nothing
	w.Answers[keyed("mixed")] = 402
	w.expected = []Expectation{{Scope: "acme", Key: "gone", GivenUp: true}}
	return w
}

// broken returns the names of the checks that found something, in their order.
func (w *outsideWorld) broken() (names []string) {
	for _, r := range w.Judge(w.ops, w.expected) {
		if !r.OK() {
			names = append(names, r.Name)
		}
	}
	return names
}

// TestEachWrongOfEffectsIsFound plants one error at a time.
func TestEachWrongOfEffectsIsFound(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		plant func(w *outsideWorld)
		want  []string
	}{
		"nothing": {func(*outsideWorld) {}, nil},
		"double charge": {func(w *outsideWorld) {
			w.Charges = append(w.Charges, Item{ID: "ch3", Key: "paid/charge", Amount: 7})
		}, []string{PostedOnce}},
		"charge without a posting": {func(w *outsideWorld) { w.Postings = w.Postings[1:] }, []string{PostedOnce, ToldIsTrue}},
		"posting without a charge": {func(w *outsideWorld) { w.Charges = w.Charges[1:] }, []string{PostedOnce, EffectsKnown}},
		"two postings": {func(w *outsideWorld) {
			w.Postings = append(w.Postings, Posting{Kind: TopUp, Key: keyed("paid"), ID: "t2", Item: "ch1", Amount: 7})
		}, []string{PostedOnce}},
		"another amount": {func(w *outsideWorld) { w.Postings[0].Amount = 70 }, []string{PostedOnce}},
		"a refunded charge is posted": {func(w *outsideWorld) {
			w.Postings = append(w.Postings, Posting{Kind: TopUp, Key: keyed("undone"), ID: "t3", Item: "ch2", Amount: 8})
		}, []string{PostedOnce, ToldIsTrue}},
		"posting for another key's charge": {func(w *outsideWorld) { w.Postings[0].Item = "ch2" }, []string{PostedOnce}},
		"payout without a posting": {func(w *outsideWorld) {
			w.Payouts = append(w.Payouts, Item{ID: "po2", Key: "declined/charge", Amount: 1})
		}, []string{PostedOnce, RefusalsTookNone, EffectsKnown}},
		"402 with a charge": {func(w *outsideWorld) {
			w.Charges = append(w.Charges, Item{ID: "ch4", Key: "declined/charge", Amount: 1})
		}, []string{PostedOnce, RefusalsTookNone, EffectsKnown}},
		"a lost undo":                  {func(w *outsideWorld) { w.Refunds = nil }, []string{PostedOnce, RefusalsTookNone, EffectsKnown}},
		"no answer, charged":           {func(w *outsideWorld) { delete(w.Answers, keyed("paid")) }, []string{RefusalsTookNone, ToldIsTrue}},
		"another answer":               {func(w *outsideWorld) { w.Answers[keyed("declined")] = 404 }, []string{ToldIsTrue}},
		"201 for nothing":              {func(w *outsideWorld) { w.ops[1].ID = "t9" }, []string{ToldIsTrue}},
		"a lost receipt that says yes": {func(w *outsideWorld) { w.Mails = nil }, []string{MailsOnce, EffectsKnown}},
		"a maybe that says yes":        {func(w *outsideWorld) { w.Postings[3].Sent = "yes" }, []string{MailsOnce}},
		"two mails": {func(w *outsideWorld) {
			w.Mails = append(w.Mails, Item{ID: "ma2", Of: MailOf(keyed("mailed"))})
		}, []string{MailsOnce}},
		"two receipts": {func(w *outsideWorld) {
			w.Postings = append(w.Postings, Posting{Kind: Receipt, Key: keyed("maybe"), ID: "r3", Sent: "maybe"})
		}, []string{MailsOnce}},
		"a mail of nobody":        {func(w *outsideWorld) { w.Mails = append(w.Mails, Item{ID: "ma3", Of: "who"}) }, []string{EffectsKnown}},
		"a charge of nobody":      {func(w *outsideWorld) { w.Charges = append(w.Charges, Item{ID: "ch5", Key: "who"}) }, []string{EffectsKnown}},
		"an unexplained parked":   {func(w *outsideWorld) { w.Open[0].Explained = "" }, []string{OpenExplained}},
		"still open":              {func(w *outsideWorld) { w.Open[0].Parked = "" }, []string{OpenExplained}},
		"held for nobody":         {func(w *outsideWorld) { w.Held = 6 }, []string{NothingHeld}},
		"held less than nothing":  {func(w *outsideWorld) { w.Held = -1 }, []string{NothingHeld}},
		"not-executed, an intent": {func(w *outsideWorld) { w.ops[10].Outcome = "not-executed" }, []string{NotExecutedHolds}},
		"given up, an intent": {func(w *outsideWorld) {
			w.Effects = append(w.Effects, RecordedEffect{Key: keyed("gone"), Name: "charge", Kind: 1, State: 1})
		}, []string{NotExecutedHolds}},
		"given up, an answer": {func(w *outsideWorld) { w.Answers[keyed("gone")] = 402 }, []string{NotExecutedHolds}},
		"given up, open": {func(w *outsideWorld) {
			w.Open = append(w.Open, OpenRequest{Key: keyed("gone"), Parked: "p", Explained: "e"})
		}, []string{NotExecutedHolds}},
		"two inputs": {func(w *outsideWorld) { w.Inputs["paid/charge"] = []string{"{}", "{ }"} }, []string{OneInput}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newOutsideWorld()
			test.plant(w)
			if got := w.broken(); !slices.Equal(got, test.want) {
				t.Errorf("found %v, want %v", got, test.want)
				for _, r := range w.Judge(w.ops, w.expected) {
					t.Log(r.Name, r.Examples)
				}
			}
		})
	}
}

// TestEachCheckOfEffectsSeesSomething: in a state without errors each check has something to look
// at.
func TestEachCheckOfEffectsSeesSomething(t *testing.T) {
	t.Parallel()
	w := newOutsideWorld()
	names := map[string]bool{}
	for _, r := range w.Judge(w.ops, w.expected) {
		names[r.Name] = true
		if r.Seen == 0 || r.Title == "" || r.Examples == nil {
			t.Errorf("%+v", r)
		}
	}
	if want := slices.Sorted(maps.Keys(effectsTitles)); !slices.Equal(slices.Sorted(maps.Keys(names)), want) {
		t.Errorf("the checks are %v, want %v", names, want)
	}
}

// TestReplayOfARequestThatOthersEnded: the first answer to a request that calls another service may
// be a replay. For any other request it may not. In both cases the replay is final.
func TestReplayOfARequestThatOthersEnded(t *testing.T) {
	t.Parallel()
	for _, calls := range []bool{true, false} {
		ops := []Operation{
			{Sent: 1, Returned: 2, Outcome: "in-progress", Status: 409, Calls: calls},
			{Sent: 3, Returned: 4, Outcome: "replayed", Status: 201, Calls: calls},
			{Sent: 6, Returned: 7, Outcome: "replayed", Status: 201, Calls: calls},
		}
		if wrong := unexplained(&groups(ops)[0]); (wrong == "") != calls {
			t.Errorf("calls %t: %q", calls, wrong)
		}
		ops[2].Outcome = "executed"
		if unexplained(&groups(ops)[0]) == "" {
			t.Errorf("calls %t: executed after a replay", calls)
		}
	}
}
