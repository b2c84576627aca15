package check

import (
	"slices"

	"github.com/paidonce/idempotency"
)

// History judges a history by itself, as far as clients see it. It takes a few seconds for a
// million operations. They may come in any order, and must not change meanwhile.
func History(ops []Operation, expected []Expectation) []Result {
	gs := groups(ops)
	return []Result{
		executedOnce(gs),
		oneAnswer(gs),
		oneID(gs),
		givenUp(gs, expected),
		settled(gs, expected),
		linearizable(gs),
	}
}

// executedOnce is [EffectsCounted] in the history: no key gets "executed" twice, whatever it got in
// between.
func executedOnce(gs []group) Result {
	r := result(EffectsCounted)
	for i := range gs {
		executed := 0
		for _, op := range gs[i].ops {
			if op.paid() && op.outcome() == idempotency.OutcomeExecuted {
				executed++
			}
		}
		if executed > 0 {
			r.Seen++
		}
		if executed > 1 {
			r.add("executed %d times: %s", executed, &gs[i])
		}
	}
	return r
}

// oneAnswer is [OneAnswer]. It also finds replies that our middleware never sends: their bytes
// cannot have waited for the commit.
func oneAnswer(gs []group) Result {
	r := result(OneAnswer)
	for i := range gs {
		g := &gs[i]
		var first, other *Operation
		final, finals := false, false
		for _, op := range g.ops {
			if wrong := stray(op); wrong != "" {
				r.add("%s: %s: %s", g.key, wrong, op)
			}
			finals = finals || op.Final
			if !op.acknowledged() {
				// If another request won the key, the key's real request gets no answer of its own.
				final = final || op.Final && op.outcome() == idempotency.OutcomeMismatch
				continue
			}
			final = final || op.Final
			switch {
			case first == nil:
				first = op
			case other == nil && (op.Answer != first.Answer || op.Status != first.Status || op.Request != first.Request):
				other = op
			}
		}
		if first == nil {
			continue
		}
		r.Seen++
		if other != nil {
			r.add("%s: two answers: %s, then %s", g.key, first, other)
		}
		if !final {
			r.add("%s: was acknowledged, and has no answer in the final replay (asked: %t)", g.key, finals)
		}
	}
	return r
}

// stray describes why the middleware cannot have sent a reply, or returns "".
func stray(op *Operation) string {
	switch {
	case op.Returned == 0:
		if op.Status != 0 || op.Outcome != "" {
			return "a reply that never came"
		}
	case op.Outcome == "":
		// A 5xx that is no problem document may come from before the middleware. It counts as no
		// reply.
		if op.Status >= 200 && op.Status < 400 || op.Problem != "" {
			return "a reply without Idempotency-Status"
		}
	case !known(op.Outcome):
		return "an Idempotency-Status that does not exist"
	case success(op.Status) && !op.acknowledged():
		return "a 2xx that is neither executed nor replayed"
	case op.acknowledged() && idempotency.DefaultDisposition(idempotency.Answer{Status: op.Status}) == idempotency.DispositionForget:
		return "an answer that is never recorded"
	case op.acknowledged() && op.Answer == [32]byte{}:
		return "an answer without its hash"
	}
	return ""
}

// oneID is [InTheBooks] in the history: a key's 2xx answers name one transfer or order, and no
// other key's answers name it. It finds an answer that went to another scope even if every key has
// one answer.
func oneID(gs []group) Result {
	r := result(InTheBooks)
	owner := make(map[string]Key)
	for i := range gs {
		g := &gs[i]
		first := g.firstPaid()
		if first == nil {
			continue
		}
		r.Seen++
		if first.ID == "" {
			r.add("%s: a 2xx names no id: %s", g.key, first)
			continue
		}
		for _, op := range g.ops {
			if op.paid() && op.ID != first.ID {
				r.add("%s: was acknowledged as %s, then as %q", g.key, first.ID, op.ID)
				break
			}
		}
		if other, found := owner[first.ID]; found {
			r.add("%s and %s were both acknowledged as %s", other, g.key, first.ID)
		}
		owner[first.ID] = g.key
	}
	return r
}

// givenUp is [GivenUpForGood] in the history. If a client gives up when the promise does not allow
// it, that is an error of the run itself: it would hide a lost payment.
func givenUp(gs []group, expected []Expectation) Result {
	r := result(GivenUpForGood)
	wanted := expectations(expected)
	for i := range gs {
		g := &gs[i]
		if !wanted[g.key].GivenUp {
			continue
		}
		r.Seen++
		notExecuted := false
		for _, op := range g.ops {
			notExecuted = notExecuted || op.outcome() == idempotency.OutcomeNotExecuted
		}
		switch {
		case slices.ContainsFunc(g.ops, (*Operation).acknowledged):
			r.add("took effect: %s", g)
		case slices.ContainsFunc(g.ops, func(op *Operation) bool { return op.outcome() == idempotency.OutcomeUnknown }):
			r.add("was given up although it may have taken effect: %s", g)
		case !notExecuted:
			r.add("was given up without a not-executed: %s", g)
		}
	}
	return r
}

// settled is [Settled]: a client that follows the table of statuses gets an answer, and the right
// one.
func settled(gs []group, expected []Expectation) Result {
	r := result(Settled)
	byKey := make(map[Key]*group, len(gs))
	for i := range gs {
		byKey[gs[i].key] = &gs[i]
	}
	seen := make(map[Key]struct{}, len(expected))
	for _, e := range expected {
		key := Key{e.Scope, e.Key}
		if _, twice := seen[key]; twice {
			r.add("%s: has two expectations", key)
			continue
		}
		seen[key] = struct{}{}
		if e.GivenUp {
			continue
		}
		r.Seen++
		g := byKey[key]
		if g == nil {
			r.add("%s: was never sent", key)
		} else if e.Parked {
			if slices.ContainsFunc(g.ops, (*Operation).acknowledged) {
				r.add("was left to a person, and has an answer: %s", g)
			}
		} else if wrong := unsettled(g, e.Declined); wrong != "" {
			r.add("%s: %s", wrong, g)
		}
	}
	for i := range gs {
		if _, found := seen[gs[i].key]; !found {
			r.add("%s: has no expectation", gs[i].key)
		}
	}
	return r
}

// unsettled describes what a key's real request still lacks, or returns "".
func unsettled(g *group, declined bool) string {
	answered, refused, other := false, false, false
	for _, op := range g.ops {
		switch {
		case op.acknowledged() && op.Request != g.real():
			other = true
		case op.acknowledged():
			answered = true
			if declined && (op.Status < 400 || op.Status > 499) {
				return "should have been declined"
			}
			if !declined && !success(op.Status) {
				return "was declined"
			}
		case op.outcome() == idempotency.OutcomeMismatch && op.Request == g.real():
			refused = true
		}
	}
	// If the real request took no effect, a changed body may win the key. That is an answer too.
	if answered || refused && other {
		return ""
	}
	return "has no answer"
}
