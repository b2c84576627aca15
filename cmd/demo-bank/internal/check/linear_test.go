package check

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"pgregory.net/rapid"

	"github.com/paidonce/idempotency"
)

func drawFrom(t *rapid.T) draw {
	return func(n int) int { return rapid.IntRange(0, n-1).Draw(t, "n") }
}

// simulate makes a history of a few keys of two scopes.
func simulate(t *rapid.T) *simulator {
	s := &simulator{draw: drawFrom(t)}
	for i := range 1 + s.draw(3) {
		s.key("acme", fmt.Sprint("k", i), 8)
	}
	s.key("globex", "k0", 4)
	return s
}

func TestWhatACorrectBankAnswersIsAccepted(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		s := simulate(t)
		for _, r := range History(s.ops, s.expected) {
			if !r.OK() {
				t.Fatalf("%s: %q", r.Name, r.Examples)
			}
		}
	})
}

// mutation changes an answer of a correct history, and states why it cannot be correct any more.
type mutation struct {
	name  string
	apply func(g *group, at int) (ops []Operation, broken bool)
}

func acked(g *group) (acks []int) {
	for i, op := range g.ops {
		if op.acknowledged() {
			acks = append(acks, i)
		}
	}
	return acks
}

// later returns a request that is sent after all others have ended.
func later(g *group, number uint64, outcome string) Operation {
	ended := time.Duration(0)
	for _, op := range g.ops {
		ended = max(ended, op.Sent, op.Returned)
	}
	o := op(number, 0, 0, outcome)
	o.Scope, o.Key, o.Sent, o.Returned = g.key.Scope, g.key.Key, ended+1, ended+2
	return o
}

var mutations = []mutation{
	{"a replay's answer changes", func(g *group, at int) ([]Operation, bool) {
		acks := acked(g)
		if len(acks) < 2 {
			return nil, false
		}
		g.ops[acks[at%len(acks)]].Answer = hash("another")
		return nil, true
	}},
	{"a replay goes to another request", func(g *group, at int) ([]Operation, bool) {
		acks := acked(g)
		if len(acks) < 2 {
			return nil, false
		}
		g.ops[acks[at%len(acks)]].Request += 2
		return nil, true
	}},
	{"the one that was executed is told not-executed", func(g *group, at int) ([]Operation, bool) {
		i := slices.IndexFunc(g.ops, func(op *Operation) bool { return op.outcome() == idempotency.OutcomeExecuted })
		maybe := slices.ContainsFunc(g.ops, func(op *Operation) bool { return op.outcome() == idempotency.OutcomeUnknown })
		if i < 0 || maybe || len(acked(g)) < 2 {
			return nil, false
		}
		g.ops[i].Outcome, g.ops[i].Status = "not-executed", 503
		return nil, true
	}},
	{"a mismatch goes to the request that has the key", func(g *group, at int) ([]Operation, bool) {
		acks := acked(g)
		i := slices.IndexFunc(g.ops, func(op *Operation) bool { return op.outcome() == idempotency.OutcomeMismatch })
		if i < 0 || len(acks) == 0 {
			return nil, false
		}
		g.ops[i].Request = g.ops[acks[0]].Request
		return nil, true
	}},
	{"a mismatch without a record", func(g *group, at int) ([]Operation, bool) {
		if len(acked(g)) > 0 || slices.ContainsFunc(g.ops, func(op *Operation) bool { return op.outcome() == idempotency.OutcomeUnknown }) {
			return nil, false
		}
		return []Operation{later(g, 2, "mismatch")}, true
	}},
	{"executed again", func(g *group, at int) ([]Operation, bool) {
		return []Operation{later(g, 1, "executed")}, len(acked(g)) > 0
	}},
	{"in-progress after the record", func(g *group, at int) ([]Operation, bool) {
		return []Operation{later(g, 1, "in-progress")}, len(acked(g)) > 0
	}},
	{"a replay of nothing", func(g *group, at int) ([]Operation, bool) {
		first := *g.ops[0]
		first.Sent, first.Returned, first.Outcome, first.Status, first.Answer = -2, -1, "replayed", 201, hash("x")
		return []Operation{first}, true
	}},
	{"mismatch before anything was sent", func(g *group, at int) ([]Operation, bool) {
		first := *g.ops[0]
		first.Sent, first.Returned, first.Outcome, first.Status, first.Answer = -2, -1, "mismatch", 422, [32]byte{}
		return []Operation{first}, true
	}},
}

func TestOneChangedReplyIsRejected(t *testing.T) {
	t.Parallel()
	for _, m := range mutations {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			broken := 0
			rapid.Check(t, func(t *rapid.T) {
				s := simulate(t)
				gs := groups(s.ops)
				g := &gs[s.draw(len(gs))]
				more, must := m.apply(g, s.draw(8))
				if !must {
					return
				}
				broken++
				if r := linearizable(groups(append(s.ops, more...))); r.OK() {
					t.Fatalf("was accepted: %s %s", g, listing(pointers(more)))
				}
			})
			if broken == 0 {
				t.Error("no history could be changed so")
			}
		})
	}
}

func pointers(ops []Operation) []*Operation {
	p := make([]*Operation, len(ops))
	for i := range ops {
		p[i] = &ops[i]
	}
	return p
}

// plainModel is keyModel without its simplifications: a request with an unknown outcome took effect
// or did not, and no request is left out.
func plainModel() porcupine.Model {
	model := porcupine.NondeterministicModel{
		Init: func() []any { return []any{keyState{}} },
		Step: func(state, input, _ any) []any {
			s, op := state.(keyState), input.(*Operation)
			done := keyState{recorded: true, answered: true, request: op.Request, answer: op.Answer}
			same := s == done || s == keyState{recorded: true, request: op.Request}
			switch {
			case op.Returned == 0 || op.Outcome == "unknown":
				if s.recorded {
					return []any{s}
				}
				return []any{s, keyState{recorded: true, request: op.Request}}
			case op.Outcome == "executed" && !s.recorded, op.Outcome == "replayed" && same:
				return []any{done}
			case op.Outcome == "mismatch" && s.recorded && s.request != op.Request,
				op.Outcome == "in-progress" && !s.recorded,
				op.Outcome == "not-executed":
				return []any{s}
			}
			return nil
		},
	}
	return model.ToModel()
}

// Leaving out redundant requests decides nothing: on any history, most of them wrong, both searches
// agree.
func TestReducedHistoryHasTheVerdictOfTheWhole(t *testing.T) {
	t.Parallel()
	verdicts := map[bool]int{}
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 7).Draw(t, "operations")
		ops := make([]Operation, n)
		for i := range ops {
			sent := rapid.IntRange(0, 20).Draw(t, "sent")
			outcome := rapid.SampledFrom([]string{"executed", "replayed", "replayed", "mismatch", "in-progress", "not-executed", "unknown", "lost"}).Draw(t, "outcome")
			ops[i] = op(uint64(rapid.IntRange(1, 2).Draw(t, "request")), sent, sent+rapid.IntRange(1, 15).Draw(t, "time"), outcome)
			if rapid.IntRange(0, 3).Draw(t, "answer") == 0 {
				ops[i].Answer = hash("another")
			}
		}
		g := groups(ops)[0]
		h := make([]porcupine.Operation, n)
		for i, op := range g.ops {
			h[i] = porcupine.Operation{Input: op, Call: int64(op.Sent), Return: int64(op.Returned)}
			if op.Returned == 0 || op.Outcome == "unknown" {
				h[i].Return = math.MaxInt64
			}
		}
		plain := porcupine.CheckOperations(plainModel(), h)
		reduced := porcupine.CheckOperations(keyModel(), history(reduce(g.ops)))
		if plain != reduced {
			t.Fatalf("the whole is %t, reduced %t: %s", plain, reduced, &g)
		}
		verdicts[plain]++
	})
	if verdicts[true] == 0 || verdicts[false] == 0 {
		t.Errorf("verdicts were %v", verdicts)
	}
}

// Hundreds of overlapping and lost requests of one key, right or wrong, are decided in no time.
func TestManyOverlappingRequestsAreDecided(t *testing.T) {
	t.Parallel()
	ops := []Operation{op(1, 0, 1000, "executed")}
	for i := range 200 {
		ops = append(ops, op(1, 1+i, 0, "lost"), op(1, 1, 2000, "replayed"), op(2, 1, 2000, "mismatch"), op(1, 1, 900, "in-progress"))
	}
	ops = append(ops, end(op(1, 3000, 3001, "replayed")))
	wantWrong(t, []Result{linearizable(groups(ops))})
	ops = append(ops, op(1, 1, 2000, "replayed").with(func(op *Operation) { op.Answer = hash("another") }))
	wantWrong(t, []Result{linearizable(groups(ops))}, Linearizable)
}

// A million operations: 90,000 keys with 11 each. It resembles a run's history, not a case that
// suits the search.
func BenchmarkHistoryOfAMillion(b *testing.B) {
	r := rand.New(rand.NewPCG(1, 2))
	s := &simulator{draw: r.IntN}
	for i := 0; len(s.ops) < 1_000_000; i++ {
		s.key([]string{"acme", "globex", "public"}[i%3], fmt.Sprint("key-", i), 18)
	}
	b.ReportAllocs()
	for b.Loop() {
		for _, r := range History(s.ops, s.expected) {
			if !r.OK() {
				b.Fatalf("%s: %q", r.Name, r.Examples)
			}
		}
	}
	b.ReportMetric(float64(len(s.ops)), "ops/history")
}
