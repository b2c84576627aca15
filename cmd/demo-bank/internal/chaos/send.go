package chaos

import (
	"context"
	"math/rand/v2"
	"net/http"
	"strings"
	"time"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/check"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/storm"
)

// hangUpMax is the maximum time from the last byte of a request to the end of its conn, if its
// reply is to be lost.
const hangUpMax = 30 * time.Millisecond

// lane is a conn of a client. It carries one request at a time, and its bank changes.
type lane struct {
	*storm.Client
	run    *run
	pinned bool // its bank does not change
	// For choices that no seed has to repeat: pauses, the bank, whether to give up.
	choice *rand.Rand
	bank   int
	ops    []check.Operation
}

func newLane(r *run, id int) *lane {
	return &lane{Client: storm.NewClient(id, r.clock, hangUpMax), run: r, choice: rand.New(rand.NewPCG(r.config.Seed, uint64(id)<<32|0x1a9e))}
}

// send sends a key's request once, records it as an operation, and returns the result.
func (l *lane) send(ctx context.Context, k *key, changed, final bool, t storm.Trouble) result {
	// Otherwise the last bank again: conns are kept.
	if !l.pinned && l.choice.IntN(3) == 0 {
		l.bank = l.choice.IntN(l.run.config.Banks)
	}
	tenant := tenants[k.tenant]
	asked := check.Operation{
		Scope: tenant.scope, Key: k.text, Request: uint64(2 * k.index), From: k.from, To: k.to, Amount: k.amount, Final: final, Calls: k.asks.calls(),
	}
	if k.asks == askOrder {
		asked.Amount = 0 // of money; the price is the bank's
	}
	if changed {
		asked.Request, asked.Amount = asked.Request+1, asked.Amount+1
	}
	ctx, hangUp := context.WithCancel(ctx)
	defer hangUp()
	if t != storm.Cut {
		k.waits(l, hangUp)
		defer k.waits(l, nil)
	}
	var location string
	op, _, sent := l.Send(ctx, &storm.Request{
		Async: k.async, OnReply: func(header http.Header) { location = header.Get("Location") },
		Asked: asked, URL: "http://" + l.run.banks.address(l.bank) + k.path(), Authorization: tenant.authorization, Body: k.body(changed),
	}, t)
	if !sent {
		if t != storm.HalfSent {
			l.run.tally.unsent.Add(1)
		}
		return resultUnsent
	}
	what := resultLost
	if op.Outcome == "pending" {
		l.pending(ctx, k, &op, location)
	}
	if op.Returned != 0 {
		what = l.read(k, &op)
		if what == resultParked {
			k.park()
		}
		l.run.tally.observe(op.Returned - op.Sent)
	}
	l.run.tally.count(&op, k)
	l.ops = append(l.ops, op)
	return what
}

// pending notes a 202, which names the status resource, and reads that. For the checks a 202 means
// no more than unknown.
func (l *lane) pending(ctx context.Context, k *key, op *check.Operation, location string) {
	l.run.tally.clientFaults.add("told to look later")
	if op.Status != http.StatusAccepted || !strings.HasPrefix(location, operationsPath) || !k.async {
		l.run.unexpected.add("key %s: pending came with status %d and Location %q, asked for: %t", k.text, op.Status, location, k.async)
	}
	k.mu.Lock()
	k.status = location
	k.mu.Unlock()
	op.Outcome, op.Status = "unknown", http.StatusServiceUnavailable
	if _, shown := l.run.operation(ctx, newScraper(), l.bank, location, tenants[k.tenant].authorization); shown.Status == needsAttention {
		op.Problem = needsAttention
	}
}

// needsAttention is the problem and the status of a request that is left to a person.
const needsAttention = "needs-attention"

const operationsPath = "/v1/operations/"

// read interprets an answer.
func (l *lane) read(k *key, op *check.Operation) result {
	switch op.Outcome {
	case "executed", "replayed":
		if op.Answer == plantedAnswer && k.asks == askReused {
			return resultAgain
		}
		return resultAnswered
	case "mismatch":
		return resultMismatch
	case "not-executed":
		// A bank that was stopped had no time to read the body.
		slept := op.Status == http.StatusRequestTimeout && l.run.profile.stops > 0
		if op.Status < 500 && !slept {
			l.run.unexpected.add("key %s: a good request was refused with %d %s", k.text, op.Status, op.Problem)
		}
		return resultNotExecuted
	case "unknown":
		if op.Problem == needsAttention {
			return resultParked
		}
		return resultAgain
	case "in-progress":
		return resultAgain
	}
	l.run.unexpected.add("key %s: an answer with status %d says nothing of the key", k.text, op.Status)
	return resultAgain
}
