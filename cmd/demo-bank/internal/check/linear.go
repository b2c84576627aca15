package check

import (
	"math"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/paidonce/idempotency"
)

const (
	// HolderMax is the longest time that a request may still hold its key after its client got
	// not-executed: its conn was cut, and PostgreSQL ends the transaction when it notices, at the
	// latest after the idle-in-transaction timeout.
	HolderMax = time.Minute

	// decideMax bounds the search for one key. A reduced history needs microseconds.
	decideMax = 10 * time.Second
)

// linearizable searches an order of each key's requests, one at a time, that explains every reply.
func linearizable(gs []group) Result {
	r := result(Linearizable)
	r.Seen = len(gs)
	wrongs := make([]string, len(gs))
	var next atomic.Int64
	var workers sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), len(gs)) {
		workers.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(gs)); i = next.Add(1) - 1 {
				wrongs[i] = unexplained(&gs[i])
			}
		})
	}
	workers.Wait()
	for i, wrong := range wrongs {
		if wrong != "" {
			r.add("%s: %s", wrong, &gs[i])
		}
	}
	return r
}

// unexplained returns the reason why no order of a key's requests explains their replies, or "".
func unexplained(g *group) string {
	for _, op := range g.ops {
		if op.Returned != 0 && op.Returned < op.Sent || op.Returned == 0 && op.Outcome != "" {
			return "a reply came before its request, or at no time"
		}
	}
	if stuck := stuckKey(g.ops); stuck != nil {
		return "in-progress with nobody at work (" + short(stuck.Sent) + ")"
	}
	switch porcupine.CheckOperationsTimeout(keyModel(), history(reduce(g.ops)), decideMax) {
	case porcupine.Ok:
		return ""
	case porcupine.Unknown:
		return "no order of its requests was found in time"
	default:
		return "no order of its requests explains its replies"
	}
}

// keyState is the database's state of a key.
type keyState struct {
	recorded bool
	answered bool // a client saw the answer; until then any answer may be it
	request  uint64
	answer   [32]byte
}

// keyModel models one key as it was designed. One commit claims and records a key, so there is no
// state between.
func keyModel() porcupine.Model {
	return porcupine.Model{
		Init: func() any { return keyState{} },
		Step: func(state, input, _ any) (bool, any) { return step(state.(keyState), input.(*Operation)) },
	}
}

// step reports whether a request in this state gets this reply, and returns the next state. A
// request with an unknown outcome takes effect if it can. The case that it took no effect needs no
// second state: its time has no end, so the search may put it last, after every reply.
func step(s keyState, op *Operation) (bool, keyState) {
	switch op.outcome() {
	case idempotency.OutcomeExecuted:
		return !s.recorded, keyState{recorded: true, answered: true, request: op.Request, answer: op.Answer}
	case idempotency.OutcomeReplayed:
		ok := s.recorded && s.request == op.Request && (!s.answered || s.answer == op.Answer) || !s.recorded && op.Calls
		return ok, keyState{recorded: true, answered: true, request: op.Request, answer: op.Answer}
	case idempotency.OutcomeMismatch:
		return s.recorded && s.request != op.Request, s
	case idempotency.OutcomeInProgress:
		return !s.recorded, s // a record wins over the lock of its reader
	case idempotency.OutcomeNotExecuted:
		return true, s
	}
	if !s.recorded {
		s = keyState{recorded: true, request: op.Request}
	}
	return true, s
}

// history converts a key's requests for porcupine. A request with an unknown outcome may take
// effect at any time after it was sent, even long after its client gave up on it.
func history(ops []*Operation) []porcupine.Operation {
	h := make([]porcupine.Operation, len(ops))
	for i, op := range ops {
		h[i] = porcupine.Operation{ClientId: op.Client, Input: op, Call: int64(op.Sent), Return: int64(op.Returned)}
		if op.outcome() == idempotency.OutcomeUnknown {
			h[i].Return = math.MaxInt64
		}
	}
	return h
}

// reduce leaves out the requests that other requests of the key make redundant. The search takes
// exponential time in the requests that overlap, and a lost one overlaps with all later ones.
//
// It changes no verdict, because a key goes from absent to recorded once and never back:
//
//   - Of lost requests with the same content only one can take effect. The one that was sent first
//     can do so whenever a later one can.
//   - Of equal replays, and of mismatches with the same content, the first to return leaves the
//     record the least time to appear.
//   - Of those in progress, the last to be sent leaves the record the least time to be absent.
//   - A not-executed request says nothing about the key.
func reduce(ops []*Operation) []*Operation {
	kept := make([]*Operation, 0, len(ops))
	for _, op := range ops {
		outcome := op.outcome()
		if outcome == idempotency.OutcomeNotExecuted {
			continue
		}
		i := slices.IndexFunc(kept, func(k *Operation) bool { return k.outcome() == outcome && alike(k, op, outcome) })
		switch {
		case i < 0:
			kept = append(kept, op)
		case stricter(op, kept[i], outcome):
			kept[i] = op
		}
	}
	return kept
}

// alike reports whether one of two requests of the same outcome makes the other redundant.
func alike(a, b *Operation, outcome idempotency.Outcome) bool {
	switch outcome {
	case idempotency.OutcomeExecuted:
		return false
	case idempotency.OutcomeReplayed:
		return a.Request == b.Request && a.Answer == b.Answer
	case idempotency.OutcomeInProgress:
		return true
	}
	return a.Request == b.Request
}

// stricter reports whether, of two alike requests, a is the one to keep.
func stricter(a, b *Operation, outcome idempotency.Outcome) bool {
	switch outcome {
	case idempotency.OutcomeReplayed, idempotency.OutcomeMismatch:
		return a.Returned < b.Returned
	case idempotency.OutcomeInProgress:
		return a.Sent > b.Sent
	}
	return a.Sent < b.Sent
}

// stuckKey returns a request that got in-progress although no other request can have held the key,
// or nil. A request that got in-progress needs another request that held the key at that time. That
// one either got a different reply, or it got in-progress itself later, because a third request
// then held the key. So each chain of such requests must end at a request that got a different
// reply.
func stuckKey(ops []*Operation) *Operation {
	var open, excused []*Operation
	for _, op := range ops {
		// A request that calls another service may be run by the completer. Or it gets in-progress
		// because of itself: it slept, and another owner has taken it over.
		if op.outcome() != idempotency.OutcomeInProgress || op.Calls {
			continue
		}
		if slices.ContainsFunc(ops, func(other *Operation) bool {
			return other.outcome() != idempotency.OutcomeInProgress && mayHold(other, op)
		}) {
			excused = append(excused, op)
		} else {
			open = append(open, op)
		}
	}
	for len(open) > 0 && len(excused) > 0 {
		op := excused[len(excused)-1]
		excused = excused[:len(excused)-1]
		open = slices.DeleteFunc(open, func(o *Operation) bool {
			if !mayHold(op, o) {
				return false
			}
			excused = append(excused, o)
			return true
		})
	}
	if len(open) == 0 {
		return nil
	}
	return open[0]
}

// mayHold reports whether holder can have held the key when op was answered.
func mayHold(holder, op *Operation) bool {
	if holder.Sent > op.Returned {
		return false
	}
	switch holder.outcome() {
	case idempotency.OutcomeUnknown:
		return true
	case idempotency.OutcomeNotExecuted:
		return holder.Returned+HolderMax >= op.Sent
	}
	return holder.Returned >= op.Sent
}
