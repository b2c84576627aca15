package rulestest

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"regexp"
	"slices"
	"testing"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql/parser"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/observe/internal/fixture"
)

// rules are the alerts of rules.yaml, as Prometheus reads them.
func rules(t *testing.T) map[string]rulefmt.Rule {
	t.Helper()
	groups, errs := rulefmt.ParseFile("../rules.yaml", false, model.UTF8Validation, parser.NewParser(parser.Options{}), slog.New(slog.DiscardHandler))
	if len(errs) > 0 {
		t.Fatalf("rules.yaml: %v", errs)
	}
	all := map[string]rulefmt.Rule{}
	for _, group := range groups.Groups {
		for _, rule := range group.Rules {
			all[rule.Alert] = rule
		}
	}
	return all
}

// Every alert has a remedy, and docs/metrics.md names each of them and no other.
func TestRulesTellWhatToDo(t *testing.T) {
	t.Parallel()
	all := rules(t)
	for name, rule := range all {
		if len(rule.Annotations["runbook"]) < 80 || rule.Annotations["summary"] == "" {
			t.Errorf("%s has no runbook or no summary", name)
		}
		if severity := rule.Labels["severity"]; severity != "page" && severity != "ticket" {
			t.Errorf("%s has the severity %q", name, severity)
		}
	}
	doc, err := os.ReadFile("../../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]bool{}
	for _, name := range regexp.MustCompile(`\bIdempotency[A-Z]\w+`).FindAllString(string(doc), -1) {
		documented[name] = true
		if _, ok := all[name]; !ok {
			t.Errorf("docs/metrics.md names %s, which rules.yaml has not", name)
		}
	}
	for name := range all {
		if !documented[name] {
			t.Errorf("docs/metrics.md does not name %s", name)
		}
	}
}

const (
	patience  = 20 * time.Second // for a busy machine
	goodTicks = 40               // 20 minutes
	badTicks  = 44               // 22 minutes; the longest window and hold together are longer
)

// Each alert fires when its cause happens, and on a good day none does. The row names the other
// alerts that may fire, because causes have effects.
func TestAlertsFireWhereTheyShould(t *testing.T) {
	t.Parallel()
	all := rules(t)
	usual := func(w *world, n int) { w.usual(n) }
	tested := map[string]bool{}
	for name, test := range map[string]struct {
		happens func(w *world, n int) // in each interval of the bad time
		ticks   int                   // of the bad time; default: badTicks
		fires   []string
		may     []string
	}{
		"a good day": {happens: usual},
		"the database is gone at COMMIT": {func(w *world, n int) {
			w.usual(n)
			if n%6 == 0 {
				w.LoseDatabase()
			}
		}, 0, []string{"IdempotencyUnknown", "IdempotencyResolverFails"}, []string{"IdempotencyStoreFails"}},
		"COMMITs lose their replies": {func(w *world, n int) {
			w.usual(n)
			w.LoseCommit(n%2 == 0)
		}, 0, []string{"IdempotencyStoreFails"}, nil},
		"a record is changed": {func(w *world, n int) {
			w.usual(n)
			if n == 0 {
				w.Corrupt()
			}
		}, 0, []string{"IdempotencyRecordCorrupt"}, nil},
		"no connections": {func(w *world, n int) {
			w.usual(n)
			w.Unavailable(1)
		}, 0, []string{"IdempotencyStoreFails"}, nil},
		"the pool is held": {func(w *world, n int) {
			w.usual(n)
			w.Saturate(w.scrapeNow)
		}, 0, []string{"IdempotencyPoolSaturated"}, []string{"IdempotencyFiguresStale"}},
		"handlers are slow": {func(w *world, n int) {
			w.usual(n)
			w.Send(fixture.Transfers, w.NewKey(), "slow", w.NewKey(), idempotency.OutcomeExecuted)
		}, 0, []string{"IdempotencyHandlersSlow"}, nil},
		"handlers fail": {func(w *world, n int) {
			w.usual(n)
			w.Fail()
		}, 0, []string{"IdempotencyHandlersFail"}, nil},
		"clients do not wait": {func(w *world, n int) {
			w.usual(n)
			w.Conflict(3)
		}, 0, []string{"IdempotencyInProgressStorm"}, nil},
		"keys are reused": {func(w *world, n int) {
			w.usual(n)
			w.Mismatch()
		}, 0, []string{"IdempotencyMismatches"}, nil},
		"keys are lost": {func(w *world, n int) {
			w.usual(n)
			w.LoseKey()
		}, 0, []string{"IdempotencyLostKeys"}, nil},
		"answers reach nobody": {func(w *world, n int) {
			w.usual(n)
			key := w.Execute(fixture.Transfers, 1)[0]
			for range 12 {
				w.Send(fixture.Transfers, key, "pay", key, idempotency.OutcomeReplayed)
			}
		}, 0, []string{"IdempotencyDuplicatesSpike"}, nil},
		"the reaper has stopped": {func(w *world, n int) {
			w.Execute(fixture.Transfers, 3)
			if n == 0 {
				w.Expire(time.Minute)
			}
		}, 80, []string{"IdempotencyReaperStopped"}, nil},
		"the reaper does not keep up": {func(w *world, n int) {
			w.Execute(fixture.Transfers, 3)
			w.Expire(2 * time.Hour)
			w.tracer.OnWalk(0, time.Second, nil)
		}, 0, []string{"IdempotencyExpiredBacklog"}, nil},
		"a request is parked": {func(w *world, n int) {
			w.usual(n)
			if n == 0 {
				w.Park()
			}
		}, 0, []string{"IdempotencyParked"}, []string{"IdempotencyUnknown"}},
		"a request stays open": {func(w *world, n int) {
			w.usual(n)
			if n == 0 {
				w.LoseReply()
				w.Age(time.Hour)
			}
		}, 0, []string{"IdempotencyOpenTooLong", "IdempotencyOpenNotRun"}, []string{"IdempotencyUnknown"}},
		"the other service is down": {func(w *world, n int) {
			w.usual(n)
			w.LoseReply()
			w.Abandon()
		}, 0, []string{"IdempotencyEffectUnknown", "IdempotencyUnknown"}, nil},
		"a handler changes its mind": {func(w *world, n int) {
			w.usual(n)
			w.Charge()
			if n == badTicks-1 {
				w.LoseReply()
				w.Complete(1)
			}
		}, 0, []string{"IdempotencyEffectDrift"}, []string{"IdempotencyUnknown"}},
		"a result comes too late": {func(w *world, n int) {
			w.usual(n)
			w.Charge()
			if n == badTicks-1 {
				w.tracer.TraceEffect(context.Background(), idempotency.EffectEnd{Name: "charge", Result: idempotency.EffectResultFenced, Sent: true})
			}
		}, 0, []string{"IdempotencyEffectFenced"}, nil},
		"no relay runs": {func(w *world, n int) {
			w.usual(n)
			if n == 0 {
				w.exec(outboxRow + "now() - interval '1 hour', NULL)")
			}
		}, 0, []string{"IdempotencyOutboxStopped"}, nil},
		"the broker refuses a message": {func(w *world, n int) {
			w.usual(n)
			if n == 0 {
				w.exec(outboxRow + "now(), 'too large')")
			}
		}, 0, []string{"IdempotencyOutboxRefused"}, nil},
		"a message is dead": {func(w *world, n int) {
			w.usual(n)
			if n == 0 {
				w.exec(parkedRow + "now(), NULL, 3)")
			}
		}, 0, []string{"IdempotencyDeadLetters"}, nil},
		"no consumer takes what is due": {func(w *world, n int) {
			w.usual(n)
			if n == 0 {
				w.exec(parkedRow + "now(), now() - interval '1 hour', 1)")
			}
		}, 0, []string{"IdempotencyConsumerStopped"}, nil},
		"a consumer dies in a batch": {func(w *world, n int) {
			w.usual(n)
			if n == 0 {
				w.exec(offsetsRow + "now() - interval '1 hour', 3)")
			}
		}, 0, []string{"IdempotencyConsumerStopped"}, nil},
		"a handler of messages fails": {func(w *world, n int) {
			w.usual(n)
			w.consume(errors.New(fixture.Canary))
		}, 0, []string{"IdempotencyConsumerFails"}, nil},
		"figures can't be read": {func(w *world, n int) {
			w.usual(n)
			w.unread = errors.New("no")
		}, 0, []string{"IdempotencyFiguresStale"}, nil},
	} {
		for _, alert := range test.fires {
			tested[alert] = true
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			handlerTimeout := 10 * time.Second
			if slices.Contains(test.fires, "IdempotencyHandlersSlow") {
				handlerTimeout = fixture.Slow + 5*time.Millisecond
			}
			recordsTimeout := patience
			if slices.Contains(test.fires, "IdempotencyPoolSaturated") {
				recordsTimeout = 20 * time.Millisecond // of each scrape that gets no connection
			}
			w := newWorld(t, handlerTimeout, recordsTimeout)
			for n := range goodTicks {
				w.tick(func() { w.usual(n) })
			}
			// On a busy machine any handler may take that long.
			if handlerTimeout == 10*time.Second {
				for alert, rule := range all {
					if w.fires(rule.Expr, time.Duration(rule.For)) {
						t.Errorf("%s fires before anything happened", alert)
					}
				}
			}
			ticks := test.ticks
			if ticks == 0 {
				ticks = badTicks
			}
			for n := range ticks {
				w.tick(func() { test.happens(w, n) })
			}
			for alert, rule := range all {
				fires := w.fires(rule.Expr, time.Duration(rule.For))
				switch {
				case fires && !slices.Contains(test.fires, alert) && !slices.Contains(test.may, alert):
					t.Errorf("%s fires", alert)
				case !fires && slices.Contains(test.fires, alert):
					t.Errorf("%s does not fire", alert)
				}
			}
		})
	}
	for alert := range all {
		if !tested[alert] {
			t.Errorf("nothing happens for which %s should fire", alert)
		}
	}
}
