package promobserve_test

import (
	"context"
	"errors"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/observe/internal/fixture"
	"github.com/paidonce/idempotency/observe/lostkey"
	promobserve "github.com/paidonce/idempotency/observe/prometheus"
	"github.com/paidonce/idempotency/storage/postgres"
)

// observed is a service with every metric on.
type observed struct {
	*fixture.Service
	registry *prometheus.Registry
	// Only the pool: in the other registry the scrape itself holds a connection for a moment.
	pool     *prometheus.Registry
	tracer   *promobserve.Tracer
	messages *promobserve.Messages
	unread   error // the error of reading the figures about the table
}

func observe(t *testing.T, opts *promobserve.Options) *observed {
	t.Helper()
	o := &observed{registry: prometheus.NewRegistry()}
	o.tracer = promobserve.New(o.registry, opts)
	o.Service = fixture.New(t, fixture.Options{Tracer: o.tracer})
	o.pool = prometheus.NewRegistry()
	o.pool.MustRegister(promobserve.NewPoolCollector(o.Pool.Stat))
	o.registry.MustRegister(promobserve.NewPoolCollector(o.Pool.Stat), promobserve.NewRecordsCollector(func(ctx context.Context) (postgres.Statistics, error) {
		if o.unread != nil {
			return postgres.Statistics{}, o.unread
		}
		return o.Store.Statistics(ctx)
	}, &promobserve.RecordsOptions{Interval: time.Nanosecond, Timeout: 20 * time.Second}), promobserve.NewOpenCollector(func(ctx context.Context) (postgres.OpenStatistics, error) {
		if o.unread != nil {
			return postgres.OpenStatistics{}, o.unread
		}
		return o.Store.OpenStatistics(ctx)
	}, &promobserve.RecordsOptions{Interval: time.Nanosecond, Timeout: 20 * time.Second}), promobserve.NewMessagesCollector(func(ctx context.Context) (postgres.MessageStatistics, error) {
		if o.unread != nil {
			return postgres.MessageStatistics{}, o.unread
		}
		return o.Store.MessageStatistics(ctx)
	}, &promobserve.RecordsOptions{Interval: time.Nanosecond, Timeout: 20 * time.Second}))
	o.messages = promobserve.NewMessages(o.registry)
	return o
}

// Each metric is caused, has the right value, and is documented as it is.
func TestEveryMetricSaysWhatHappened(t *testing.T) {
	t.Parallel()
	// The detector of lost keys remembers only two requests here. It still finds duplicates that
	// come right after each other.
	o := observe(t, &promobserve.Options{Timeouts: idempotency.Timeouts{Handler: 7 * time.Second}, LostKeys: lostkey.Options{RequestsMax: 2}})
	o.Execute(fixture.Transfers, 3)
	o.Replay(fixture.Payments)
	o.Decline()
	o.Forget()
	o.Fail()
	o.Mismatch()
	o.LoseKey()
	o.Settle()
	o.Hold(fixture.Transfers, func(key string) {
		// From memory: counted, without an attempt.
		o.Send(fixture.Transfers, key, "hold", key, idempotency.OutcomeInProgress)
		wantLines(t, scrape(t, o.registry), "idempotency_requests_in_flight 1")
		wantLines(t, scrape(t, o.pool), "idempotency_pool_connections_acquired 1")
	})
	o.Conflict(2)
	o.Wait(func() bool { return strings.Contains(scrape(t, o.registry), "\nidempotency_requests_waiting 1\n") })
	o.Unavailable(1)
	o.GiveUp()
	o.LoseCommit(true)
	o.LoseCommit(false)
	o.LoseDatabase()
	o.Corrupt()
	o.Refuse()
	o.unread = errors.New(fixture.Canary)
	scrape(t, o.registry)
	o.unread = nil
	wantLines(t, scrape(t, o.registry), "idempotency_records_expired_estimate 0", "idempotency_records_overdue_estimate_seconds 0")
	o.Expire(90 * time.Second)
	o.Execute(fixture.Transfers, 1)

	o.Settle()
	wantLines(t, scrape(t, o.pool), "idempotency_pool_connections_acquired 0")
	// These were executed: 3 requests by themselves, one each of replay, mismatch, hold, conflict,
	// wait, found COMMIT, corrupt, refuse and the last, and two of the lost key. Handlers ran for
	// those and for five more, and COMMIT was sent for two of the five.
	text := scrape(t, o.registry)
	wantLines(t, text,
		`idempotency_requests_total{outcome="executed",reason=""} 14`,
		`idempotency_requests_total{outcome="declined",reason=""} 1`,
		// Also for a corrupt record and a denied one: the middleware rejects those.
		`idempotency_requests_total{outcome="replayed",reason=""} 4`,
		`idempotency_requests_total{outcome="in-progress",reason="in-progress"} 3`,
		`idempotency_requests_total{outcome="mismatch",reason="key-reused"} 1`,
		`idempotency_requests_total{outcome="not-executed",reason=""} 1`,
		`idempotency_requests_total{outcome="not-executed",reason="handler-failed"} 1`,
		`idempotency_requests_total{outcome="not-executed",reason="unavailable"} 2`,
		`idempotency_requests_total{outcome="unknown",reason="outcome-unknown"} 1`,
		`idempotency_request_duration_seconds_count{outcome="executed"} 14`,
		`idempotency_attempts_total 27`,
		`idempotency_requests_in_flight 0`, `idempotency_requests_waiting 0`,
		`idempotency_step_duration_seconds_count{step="claim"} 27`, `idempotency_step_duration_seconds_count{step="handler"} 19`,
		`idempotency_step_duration_seconds_count{step="commit"} 16`, `idempotency_step_duration_seconds_count{step="decline"} 1`,
		`idempotency_step_duration_seconds_count{step="rollback"} 2`, `idempotency_step_duration_seconds_count{step="resolve"} 3`,
		`idempotency_step_duration_seconds_count{step="wait"} 1`,
		`idempotency_step_failures_total{error="in-progress",step="claim"} 2`, `idempotency_step_failures_total{error="unavailable",step="claim"} 1`,
		`idempotency_step_failures_total{error="unknown",step="commit"} 3`, `idempotency_step_failures_total{error="unknown",step="resolve"} 1`,
		`idempotency_step_failures_total{error="other",step="handler"} 1`,
		`idempotency_handler_timeout_seconds 7`,
		`idempotency_refused_total{reason="key-missing"} 1`, `idempotency_refused_total{reason="key-invalid"} 1`, `idempotency_refused_total{reason="scope"} 1`,
		`idempotency_refused_total{reason="body-too-large"} 1`, `idempotency_refused_total{reason="replay-denied"} 1`, `idempotency_refused_total{reason="record-corrupt"} 1`,
		`idempotency_refused_total{reason="body-unread"} 0`, `idempotency_refused_total{reason="handler-failed"} 0`, `idempotency_refused_total{reason="quota-exceeded"} 0`,
		`idempotency_resolved_total{result="found"} 1`, `idempotency_resolved_total{result="not-found"} 1`, `idempotency_resolved_total{result="unknown"} 1`,
		`idempotency_duplicates_total{outcome="replayed",route="POST /transfers"} 2`, `idempotency_duplicates_total{outcome="replayed",route="POST /payments"} 2`,
		`idempotency_duplicates_total{outcome="in-progress",route="POST /transfers"} 3`, `idempotency_duplicates_total{outcome="in-progress",route="POST /payments"} 0`,
		`idempotency_lost_keys_total{route="POST /transfers"} 1`, `idempotency_lost_keys_total{route="POST /payments"} 0`,
		`idempotency_pool_connections_max 4`, `idempotency_pool_acquires_canceled_total 1`,
		`idempotency_records_live_estimate 1`, `idempotency_records_expired_estimate 15`,
		`idempotency_records_read_failures_total 1`,
	)

	deleted, err := o.Store.DeleteExpired(context.Background())
	o.tracer.OnWalk(deleted, time.Second, err)
	o.tracer.OnWalk(0, time.Second, errors.New(fixture.Canary))
	text = scrape(t, o.registry)
	wantLines(t, text, `idempotency_records_deleted_total 15`, `idempotency_reaper_walks_total{result="ok"} 1`, `idempotency_reaper_walks_total{result="failed"} 1`,
		`idempotency_reaper_walk_duration_seconds_count 2`, `idempotency_records_live_estimate 1`, `idempotency_records_expired_estimate 0`)
	if strings.Contains(text, fixture.Canary) {
		t.Error("the scrape holds what a client sent, or an error's text")
	}
	o.Expire(90 * time.Second)
	o.Execute(fixture.Transfers, 1)

	// Calls to another service: one that is made, one that is refused, one that a person must settle
	// and one whose reply is lost, which is completed later, with another input of the handler's.
	o.Charge()
	key := o.NewKey()
	o.Send(fixture.TopUps, key, "decline", key, idempotency.OutcomeExecuted)
	o.Park()
	o.LoseReply()
	o.Age(90 * time.Second)
	text = scrape(t, o.registry)
	wantLines(t, text, `idempotency_open_requests 2`, `idempotency_open_parked 1`, `idempotency_open_due 1`, `idempotency_open_read_failures_total 1`)
	for _, metric := range []string{"oldest_seconds", "oldest_parked_seconds", "oldest_due_seconds"} {
		if s := regexp.MustCompile(`(?m)^idempotency_open_` + metric + ` (9\d|1\d\d)(\.|$)`).FindString(text); s == "" {
			t.Errorf("%s is not about 90 seconds", metric)
		}
	}
	o.LoseReply()
	o.Complete(2)
	text = scrape(t, o.registry)
	wantLines(t, text, `idempotency_open_requests 1`, `idempotency_open_due 0`, `idempotency_open_oldest_seconds 0`, `idempotency_take_overs_total 2`,
		`idempotency_effects_total{effect="charge",result="done",sent="true"} 3`, `idempotency_effects_total{effect="charge",result="declined",sent="true"} 1`,
		`idempotency_effects_total{effect="charge",result="parked",sent="true"} 1`, `idempotency_effects_total{effect="charge",result="unknown",sent="true"} 2`,
		`idempotency_effects_total{effect="charge",result="fenced",sent="true"} 0`, `idempotency_effects_total{effect="charge",result="done",sent="false"} 0`,
		`idempotency_effect_drifts_total{effect="charge"} 2`, `idempotency_effect_duration_seconds_count{effect="charge"} 7`)
	if strings.Contains(text, fixture.Canary) {
		t.Error("the scrape holds what a client sent, or an error's text")
	}
	o.LoseReply()
	o.Age(time.Second)
	o.speak(t)
	wantDocumented(t, o.registry)
}

// wantDocumented compares the registry with the table in docs/metrics.md, and requires that every
// metric was caused.
func wantDocumented(t *testing.T, registry *prometheus.Registry) {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, family := range families {
		names := map[string]bool{}
		caused := false
		for _, metric := range family.GetMetric() {
			for _, label := range metric.GetLabel() {
				names[label.GetName()] = true
			}
			caused = caused || value(metric) != 0
		}
		inOrder := []string{}
		for _, name := range []string{"route", "effect", "consumer", "outcome", "reason", "step", "error", "result", "sent"} {
			if names[name] {
				inOrder = append(inOrder, name)
				delete(names, name)
			}
		}
		for name := range names {
			t.Errorf("%s has the label %s, which nobody knows", family.GetName(), name)
		}
		if name := family.GetName(); !caused && name != "idempotency_requests_in_flight" && name != "idempotency_requests_waiting" && name != "idempotency_pool_connections_acquired" {
			// The three are zero by now; they were checked above.
			t.Errorf("%s was not caused", name)
		}
		got = append(got, strings.Join([]string{family.GetName(), strings.ToLower(family.GetType().String()), strings.Join(inOrder, ", ")}, " | "))
	}
	doc, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for line := range strings.Lines(string(doc)) {
		cells := strings.Split(line, "|")
		if len(cells) < 6 || !strings.HasPrefix(cells[1], " `idempotency_") {
			continue
		}
		want = append(want, strings.Join([]string{strings.Trim(cells[1], " `"), strings.TrimSpace(cells[2]), strings.TrimSpace(cells[3])}, " | "))
		if strings.TrimSpace(cells[4]) == "" {
			t.Errorf("%s has no meaning", cells[1])
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("the registry has\n%s\nand docs/metrics.md\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func value(metric *dto.Metric) float64 {
	return metric.GetCounter().GetValue() + metric.GetGauge().GetValue() + float64(metric.GetHistogram().GetSampleCount())
}

// find returns the only series of a metric.
func find(t *testing.T, registry *prometheus.Registry, name string) *dto.Metric {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() == name && len(family.GetMetric()) == 1 {
			return family.GetMetric()[0]
		}
	}
	t.Fatalf("there is no %s", name)
	return nil
}
