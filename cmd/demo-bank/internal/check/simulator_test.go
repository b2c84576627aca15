package check

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// draw returns a number from 0 up to, but not including, n.
type draw func(n int) int

// simulator is a bank that keeps every promise. It works in virtual microseconds, and has replies
// that get lost, outcomes that stay unknown and conns that die late. It makes histories.
type simulator struct {
	draw     draw
	ops      []Operation
	expected []Expectation
	id       int
}

// fate is the end of a request that claimed its key, and of its reply.
type fate int

const (
	executed        fate = iota
	executedLost         // committed, and no reply
	executedUnknown      // gets unknown, before the commit or after it
	undone               // gets not-executed, while the conn may still be dying
	undoneLost
	undoneUnknown
	fates
)

// request is a request with its time of sending and of its claim.
type request struct {
	number      uint64
	sent, claim int
}

// key lets clients send some requests of one key at once, and then retry until each has its answer.
func (s *simulator) key(scope, name string, requestsMax int) {
	e := Expectation{Scope: scope, Key: name, Declined: s.draw(5) == 0}
	k := &simulatedKey{simulator: s, expectation: &e, answers: make(map[uint64]Operation)}
	requests := []request{{number: 1}}
	for range s.draw(requestsMax) {
		r := request{number: 1, sent: 1 + s.draw(200)}
		if s.draw(4) == 0 {
			r.number = 2
		}
		requests = append(requests, r)
	}
	for i := range requests {
		requests[i].claim = requests[i].sent + s.draw(40)
	}
	slices.SortStableFunc(requests, func(a, b request) int { return cmp.Compare(a.claim, b.claim) })
	down := s.draw(4) == 0 // whether the database is down when the first requests come
	for _, r := range requests {
		f, lost := fate(s.draw(int(fates))), s.draw(6) == 0
		if down {
			f, lost = undone, true
		}
		k.serve(r, f, lost)
	}
	k.settle(requests)
	s.expected = append(s.expected, e)
}

type simulatedKey struct {
	*simulator
	expectation *Expectation
	answers     map[uint64]Operation
	own         []Operation
	recorded    uint64 // the recorded request
	claimant    uint64 // the request that is recorded when the key is released
	heldUntil   int
	ended       int // when the last reply came and the last transaction ended
}

// serve answers one request. Requests come in the order of their claims.
func (k *simulatedKey) serve(r request, f fate, lost bool) {
	if k.heldUntil <= r.claim && k.claimant != 0 {
		k.recorded, k.claimant = k.claimant, 0
	}
	back := 1 + k.draw(30) // the time that the reply takes
	switch {
	case k.recorded == r.number:
		k.reply(r, r.claim+back, "replayed", lost)
	case k.recorded != 0:
		k.reply(r, r.claim+back, "mismatch", lost)
	case k.heldUntil > r.claim:
		k.reply(r, r.claim+back, "in-progress", lost)
	case lost && f == undone:
		k.reply(r, r.claim+back, "not-executed", false) // no conn to check with
	default:
		k.heldUntil = r.claim + 1 + k.draw(80)
		k.ended = max(k.ended, k.heldUntil)
		if f <= executedUnknown {
			k.claimant = r.number
		}
		switch f {
		case executed:
			k.reply(r, k.heldUntil+back, "executed", false)
		case executedLost, undoneLost:
			k.reply(r, k.heldUntil, "", true)
		case executedUnknown, undoneUnknown:
			k.reply(r, r.claim+back, "unknown", false)
		case undone:
			k.reply(r, r.claim+back, "not-executed", false)
		}
	}
}

func (k *simulatedKey) reply(r request, returned int, outcome string, lost bool) {
	o := Operation{
		Client: k.draw(100), Scope: k.expectation.Scope, Key: k.expectation.Key, Request: r.number,
		Sent: time.Duration(r.sent) * time.Microsecond, From: "alice", To: "bob", Amount: int64(r.number),
	}
	k.ended = max(k.ended, returned)
	if !lost {
		o.Returned = time.Duration(returned) * time.Microsecond
		o.Outcome = outcome
		k.answer(&o)
	}
	k.own = append(k.own, o)
}

// answer fills in a reply. The answer of executed and replayed is made once for each request.
func (k *simulatedKey) answer(o *Operation) {
	switch o.Outcome {
	case "executed", "replayed":
		a, found := k.answers[o.Request]
		if !found {
			k.id++
			a.Status, a.ID = 201, fmt.Sprint(k.id)
			if k.expectation.Declined && o.Request == 1 {
				a.Status, a.ID = 402, ""
			}
			a.Answer = hash(fmt.Sprint(k.id))
			k.answers[o.Request] = a
		}
		o.Status, o.ID, o.Answer = a.Status, a.ID, a.Answer
	case "in-progress":
		o.Status = 409
	case "mismatch":
		o.Status = 422
	default:
		o.Status = 503
	}
}

// settle retries each request until it has its answer, unless all got not-executed and the client
// gives up. Then comes the final replay.
func (k *simulatedKey) settle(requests []request) {
	giveUp := k.draw(2) == 0
	for _, o := range k.own {
		giveUp = giveUp && o.Outcome == "not-executed"
	}
	if giveUp {
		k.expectation.GivenUp = true
		k.ops = append(k.ops, k.own...)
		return
	}
	ask := func(number uint64) {
		sent := k.ended + 1 + k.draw(20)
		k.serve(request{number: number, sent: sent, claim: sent + k.draw(5)}, executed, false)
	}
	ask(1)
	if slices.ContainsFunc(requests, func(r request) bool { return r.number == 2 }) {
		ask(2)
	}
	ask(1)
	k.own[len(k.own)-1].Final = true
	k.ops = append(k.ops, k.own...)
}
