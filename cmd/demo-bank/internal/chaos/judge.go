package chaos

import (
	"context"
	"fmt"
	"math"
	"net/http"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/check"
	"github.com/paidonce/idempotency/internal/deadline"
)

const (
	ttl          = 24 * time.Hour // the bank's default
	judgeWaitMax = 10 * time.Minute
	quietWaitMax = 20 * time.Second // a half-open transaction ends by itself
	// The consumers share the machine with the load, and may lag. But if they handle nothing for
	// messagesStillMax, they will not handle the rest either.
	messagesWaitMax  = 60 * time.Second
	messagesStillMax = 15 * time.Second
	// The allowed share of unknown answers. Answers to a key are not counted if its COMMIT had a
	// fault that can make the outcome unknown.
	unknownRate = 0.001
	// The number that is always allowed, for a run so short that its rate means nothing.
	unknownAlways = 2

	causesName = "causes"
)

// RunCheck is the check of the run itself: it must have done everything, in time.
const RunCheck = "run"

// judge reaches the verdict, after the last request and the last fault.
func (r *run) judge(ctx context.Context) error {
	// The banks and then the books must be at rest before they are compared with the history.
	r.gateway.rest()
	err := r.awaitMessages(ctx)
	if err != nil {
		return err
	}
	if r.after, err = r.measure(ctx, func(after check.Resources) bool { return baseline(r.before, after).OK() }); err != nil {
		return err
	}
	ops, expected := r.history()
	ops = r.withoutPlanted(ops)
	results := check.History(ops, expected)
	results = append(results, r.money.result(), baseline(r.before, r.after))

	quiet, err := r.awaitQuiet(ctx)
	if err != nil {
		return err
	}
	results = append(results, quiet)
	plain := side{ops, expected}
	var outside []check.Result
	if r.profile.effects {
		_, plain = r.split(ops, expected)
		if outside, err = r.judgeOutside(ctx, ops, expected); err != nil {
			return err
		}
	}
	err = r.cluster.with(ctx, judgeWaitMax, func(ctx context.Context, conn *pgx.Conn) error {
		ledger, err := check.Ledger(ctx, conn, plain.ops, plain.expected, ttl)
		if err != nil {
			return err
		}
		results = append(results, ledger...)
		records := check.Acknowledged(ops)
		limit := check.Bounds{Live: int64(len(records)+len(r.planted.live)+len(r.left.Open)) + r.planted.unsure}
		live, err := check.Live(ctx, conn, append(records, r.planted.live...), limit)
		results = append(results, live)
		return err
	})
	if err != nil {
		return err
	}
	r.stopBanks(ctx)
	verdict := check.Judge(results...)
	for _, name := range verdict.Missing {
		r.findings.add("nobody checked %s", name)
	}
	r.checks = append(append(verdict.Checks, outside...), r.ownChecks()...)
	return nil
}

// awaitMessages blocks until both consumers have handled all messages, have handled none for
// messagesStillMax, or messagesWaitMax has elapsed. If all are handled, the projection must match
// the books.
func (r *run) awaitMessages(ctx context.Context) error {
	began := time.Now()
	moved, least := began, int64(math.MaxInt64)
	for {
		var left, missing, doubled, mismatches int64
		err := r.cluster.with(ctx, databaseTimeout, func(ctx context.Context, conn *pgx.Conn) error {
			return bank.Snapshot(ctx, conn, func(tx pgx.Tx) (err error) {
				if left, err = bank.Unhandled(ctx, tx, bank.StatementsConsumer, bank.NoticesConsumer); err == nil {
					missing, doubled, mismatches, err = bank.CompareProjection(ctx, tx)
				}
				if err == nil {
					err = tx.QueryRow(ctx, "SELECT count(*) FROM idempotency_keys WHERE starts_with(scope, $1)", idempotency.MessageScopePrefix).Scan(&r.handled)
				}
				return err
			})
		})
		now := time.Now()
		if left < least {
			moved, least = now, left
		}
		switch {
		case err != nil:
			return err
		case left > 0 && now.Sub(began) < messagesWaitMax && now.Sub(moved) < messagesStillMax:
		case left > 0:
			r.messages.add("%d messages are not handled %v after the end", left, now.Sub(began).Round(time.Second))
			return nil
		default:
			if missing+doubled+mismatches > 0 {
				r.messages.add("the projection misses %d moves, has %d more than once, and %d accounts differ", missing, doubled, mismatches)
			}
			return nil
		}
		if err := deadline.Sleep(ctx, scrapeInterval); err != nil {
			return err
		}
	}
}

// baseline is [check.BackAtBaseline], for all banks together.
func baseline(before, after check.Resources) check.Result { return check.Baseline(before, after) }

// awaitQuiet blocks until the cluster is quiet, or quietWaitMax has elapsed.
func (r *run) awaitQuiet(ctx context.Context) (quiet check.Result, err error) {
	until := time.Now().Add(quietWaitMax)
	for {
		err = r.cluster.with(ctx, databaseTimeout, func(ctx context.Context, conn *pgx.Conn) error {
			quiet, err = check.Quiet(ctx, conn)
			return err
		})
		if err != nil || quiet.OK() || time.Now().After(until) {
			return quiet, err
		}
		if err := deadline.Sleep(ctx, scrapeInterval); err != nil {
			return quiet, err
		}
	}
}

// stopBanks stops the banks in order. A bank that does not stop is a finding.
func (r *run) stopBanks(ctx context.Context) {
	client := newScraper()
	for _, s := range r.banks.slots {
		_, _ = s.scrape(ctx, client) // the last numbers
	}
	if err := r.banks.close(); err != nil {
		r.findings.add("%v", err)
	}
}

// withoutPlanted rewrites the replays of planted records, under keys that clients then used. To the
// rest of the history they are requests that took no effect but held their key for the moment of
// their lookup. Once such a key has a fresh answer, the planted one must not come back.
func (r *run) withoutPlanted(ops []check.Operation) []check.Operation {
	reused := make(map[check.Key]time.Duration) // when a fresh answer was first seen; 0: not yet
	for _, k := range r.keys.all() {
		if k.asks == askReused {
			reused[check.Key{Scope: tenants[k.tenant].scope, Key: k.text}] = 0
		}
	}
	for i := range ops {
		op := &ops[i]
		key := check.Key{Scope: op.Scope, Key: op.Key}
		if at, ok := reused[key]; ok && op.Answer != plantedAnswer && op.Answer != [32]byte{} && (at == 0 || op.Returned < at) {
			reused[key] = op.Returned
		}
	}
	for i := range ops {
		op := &ops[i]
		at, ok := reused[check.Key{Scope: op.Scope, Key: op.Key}]
		if !ok || op.Answer != plantedAnswer {
			continue
		}
		r.tally.plantedReplays++
		if at != 0 && op.Sent > at {
			r.findings.add("key %s: the answer of its expired record came back after a fresh one", op.Key)
		}
		op.Outcome, op.Status, op.ID, op.Answer = string(idempotency.OutcomeNotExecuted), http.StatusServiceUnavailable, "", [32]byte{}
	}
	return ops
}

// ownChecks are about the run itself, and about errors that the records' primary key would hide.
func (r *run) ownChecks() []check.Result {
	t := &r.tally
	replies := int(t.replies.Load())
	results := []check.Result{
		r.findings.result(RunCheck, "the run did what it should, and no bank died unasked", int(t.kills.Load())),
		r.unexpected.result("answers", "no good request was refused, no changed one answered", replies),
		r.messages.result("messages", "both consumers handled each message, and the projection matches the books", r.handled),
		r.unknownCheck(),
	}

	ran := check.Result{Name: "one run", Title: "no handler ran while another had the key: no record was in the way of a COMMIT", Examples: []string{},
		Seen:  int(r.banks.sum(metricSteps, label("step", "commit"))),
		Count: int(r.banks.sum(metricStepFailures, label("step", "commit"), label("error", "key-recorded")))}
	if ran.Count > 0 {
		ran.Examples = append(ran.Examples, "idempotency_step_failures_total says how often")
	}

	// Clients that hang up are no cause: a transaction ends on a context of its own.
	caused := int(t.allowed.Load())
	for _, count := range t.commitFaults.list(nil) {
		if kind := commitKind(count.Name); kind != delayReply && kind != killCommitting && kind != hangUpAtCommit {
			caused += int(count.Count)
		}
	}
	failed := 0
	for _, step := range []string{"commit", "decline"} {
		for _, kind := range []string{"unknown", "unavailable", "aborted", "transaction-lost", "other"} {
			failed += int(r.banks.sum(metricStepFailures, label("step", step), label("error", kind)))
		}
	}
	causes := check.Result{Name: causesName, Title: "each COMMIT that failed was made to fail", Seen: failed, Count: max(0, failed-caused), Examples: []string{}}
	if causes.Count > 0 {
		causes.Examples = append(causes.Examples, fmt.Sprintf("%d failed, and at most %d were broken", failed, caused))
	}
	r.causesMax = caused
	return append(results, ran, causes)
}

func (r *run) unknownCheck() check.Result {
	t := &r.tally
	others := t.unknown.Load() - t.unknownExempt.Load()
	answers := t.replies.Load() - t.unknownExempt.Load()
	result := check.Result{Name: "unknown", Title: "at most one answer in a thousand is unknown, unless its COMMIT was late, left open or its backend ended", Seen: int(answers), Examples: []string{}}
	if limit := max(unknownAlways, int64(unknownRate*float64(answers))); others > limit {
		result.Count = int(others)
		result.Examples = append(result.Examples, fmt.Sprintf("%d of %d answers, and at most %d may be", others, answers, limit))
	}
	return result
}
