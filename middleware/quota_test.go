package middleware_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/testclock"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/memory"
	"github.com/paidonce/idempotency/storage/postgres"
)

// Over its quota an account gets 429 for a new key, and its handler does not run. Recorded requests
// are answered as before.
func TestQuotaRefusesNewKeysAlone(t *testing.T) {
	t.Parallel()
	clock, told := testclock.New(), &tracer{}
	b := setup(t, setupOptions{middleware: &middleware.Options{
		Quota:    middleware.Quota{KeysMax: 3, Window: 90 * time.Second, Now: clock.Now},
		Optional: true,
		Tracer:   told,
	}}, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/declined":
			w.WriteHeader(http.StatusNotFound)
		case "/failed":
			w.WriteHeader(http.StatusInternalServerError)
		case "/panic":
			panic("handler")
		default:
			transfer(w, r)
		}
	})
	post := func(path, key string, headers ...string) reply {
		t.Helper()
		return b.post(t, path, "{}", append([]string{"Idempotency-Key", key}, headers...)...)
	}
	for range 10 { // requests that leave no record do not count
		want(t, post("/failed", "f"), 500, idempotency.OutcomeNotExecuted, "")
		want(t, post("/panic", "p"), 500, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
		want(t, b.post(t, "/", "{}"), 201, idempotency.OutcomeExecuted, "") // without a key
	}
	want(t, post("/", "1"), 201, idempotency.OutcomeExecuted, "")
	want(t, post("/", "2"), 201, idempotency.OutcomeExecuted, "")
	want(t, post("/declined", "3"), 404, idempotency.OutcomeExecuted, "")
	runs := b.runs.Load()

	over := post("/", "4")
	want(t, over, 429, idempotency.OutcomeNotExecuted, idempotency.ReasonQuotaExceeded)
	if after := over.header.Get("Retry-After"); after != "90" || over.header.Get("Cache-Control") != "no-store" {
		t.Errorf("Retry-After %q, Cache-Control %q", after, over.header.Get("Cache-Control"))
	}
	want(t, post("/", "1"), 201, idempotency.OutcomeReplayed, "")
	want(t, post("/", "2"), 201, idempotency.OutcomeReplayed, "")
	want(t, post("/declined", "3"), 404, idempotency.OutcomeReplayed, "")
	want(t, post("/other", "1"), 422, idempotency.OutcomeMismatch, idempotency.ReasonKeyReused)
	want(t, post("/", "4", "Account", "globex"), 201, idempotency.OutcomeExecuted, "")
	want(t, b.post(t, "/", "{}"), 201, idempotency.OutcomeExecuted, "") // nothing of it is recorded
	if b.runs.Load() != runs+2 || b.records(t) != 4 {
		t.Errorf("%d runs more, %d records; want globex's and the one without a key, and 4", b.runs.Load()-runs, b.records(t))
	}
	if len(told.refused) != 1 {
		t.Fatalf("told %+v", told.refused)
	}
	last := told.refused[0]
	if last.Reason != idempotency.ReasonQuotaExceeded || last.Status != 429 || last.Err == nil || strings.Contains(last.Err.Error(), "acme") {
		t.Errorf("told %+v", last)
	}

	clock.Advance(90*time.Second - time.Millisecond)
	want(t, post("/", "4"), 429, idempotency.OutcomeNotExecuted, idempotency.ReasonQuotaExceeded)
	clock.Advance(time.Millisecond)
	want(t, post("/", "4"), 201, idempotency.OutcomeExecuted, "")
}

// A policy that keeps every answer does not record the 429: each retry would get it.
func TestQuotaIsNeverRecorded(t *testing.T) {
	t.Parallel()
	clock := testclock.New()
	b := setup(t, setupOptions{middleware: &middleware.Options{
		Quota:       middleware.Quota{KeysMax: 1, Now: clock.Now},
		Disposition: func(idempotency.Answer) idempotency.Disposition { return idempotency.DispositionCommit },
	}}, transfer)
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "1"), 201, idempotency.OutcomeExecuted, "")
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "2"), 429, idempotency.OutcomeNotExecuted, idempotency.ReasonQuotaExceeded)
	if b.records(t) != 1 {
		t.Errorf("%d records", b.records(t))
	}
	clock.Advance(time.Hour)
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "2"), 201, idempotency.OutcomeExecuted, "")
}

// Concurrent requests can't exceed the quota together, and a key in progress counts once.
func TestQuotaHoldsForRequestsAtOnce(t *testing.T) {
	t.Parallel()
	entered, release := make(chan struct{}), make(chan struct{})
	b := setup(t, setupOptions{middleware: &middleware.Options{Quota: middleware.Quota{KeysMax: 2}}}, func(w http.ResponseWriter, r *http.Request) {
		if key, _ := idempotency.KeyFrom(r.Context()); key.Value == "1" || key.Value == "2" {
			entered <- struct{}{}
			<-release
		}
		if body, _ := io.ReadAll(r.Body); string(body) == "fail" {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		transfer(w, r)
	})
	answers := make(chan reply, 2)
	for key, body := range map[string]string{"1": "{}", "2": "fail"} {
		go func() { answers <- b.post(t, "/", body, "Idempotency-Key", key) }()
	}
	<-entered
	<-entered
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "1"), 409, idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "3"), 429, idempotency.OutcomeNotExecuted, idempotency.ReasonQuotaExceeded)
	close(release)
	<-answers
	<-answers
	// The one that failed made room for another.
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "3"), 201, idempotency.OutcomeExecuted, "")
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "4"), 429, idempotency.OutcomeNotExecuted, idempotency.ReasonQuotaExceeded)
	if b.records(t) != 2 {
		t.Errorf("%d records, want 2", b.records(t))
	}
}

// broken panics, or ends the goroutine, in one of the service's own functions.
type broken struct {
	at    string
	exits bool
	hit   bool
}

func (b *broken) maybe(at string) {
	if b.at != at {
		return
	}
	b.hit = true
	if b.exits {
		runtime.Goexit()
	}
	panic("a bug of " + at)
}

func (b *broken) TraceRequestStart(ctx context.Context, _ idempotency.RequestStart) context.Context {
	b.maybe("start")
	return ctx
}
func (b *broken) TraceStep(_ context.Context, data idempotency.StepEnd)   { b.maybe(string(data.Step)) }
func (b *broken) TraceRequestEnd(context.Context, idempotency.RequestEnd) { b.maybe("end") }
func (b *broken) TraceRefused(context.Context, idempotency.Refused)       { b.maybe("refused") }
func (b *broken) Enabled(context.Context, slog.Level) bool                { return true }
func (b *broken) Handle(context.Context, slog.Record) error               { b.maybe("logger"); return nil }
func (b *broken) WithAttrs([]slog.Attr) slog.Handler                      { return b }
func (b *broken) WithGroup(string) slog.Handler                           { return b }

// serializing fails each first commit as a serialization failure does.
type serializing struct {
	idempotency.Store
	n int
}

func (s *serializing) Begin(ctx context.Context, claim *idempotency.Claim) (idempotency.Attempt, *idempotency.Record, error) {
	attempt, record, err := s.Store.Begin(ctx, claim)
	if attempt == nil {
		return nil, record, err
	}
	return &serialized{attempt, s}, nil, nil
}

type serialized struct {
	idempotency.Attempt
	s *serializing
}

func (a *serialized) Commit(ctx context.Context, answer *idempotency.Answer) error {
	if a.s.n++; a.s.n == 1 {
		return errors.Join(idempotency.ErrNotSerializable, a.Rollback(ctx))
	}
	return a.Attempt.Commit(ctx, answer)
}

// Whichever of the service's own functions panics or ends its goroutine: a key counts for the quota
// if it was recorded, and not otherwise. Only if the goroutine ended after its handler, when the
// outcome is not known, may it count without a record. Nothing is in flight.
func TestQuotaCountsRecordsWhateverPanics(t *testing.T) {
	t.Parallel()
	places := []string{"start", "claim", "handler", "commit", "decline", "rollback", "end", "reduce", "disposition", "fingerprint", "scope", "traceid",
		"route", "routerstate", "restore", "clock", "logger", "the handler itself"}
	afterHandler := []string{"handler", "commit", "decline", "rollback", "end", "reduce", "disposition"}
	for _, place := range places {
		hit := false
		for _, exits := range []bool{false, true} {
			for _, status := range []int{201, 404, 500} {
				// again: the first commit fails, and the request starts again.
				for _, again := range []bool{false, true} {
					bug := &broken{at: place, exits: exits}
					records := memory.New(nil)
					var store idempotency.Store = records
					if again {
						store = &serializing{Store: store}
					}
					idem := middleware.New(store, func(*http.Request) (string, error) { bug.maybe("scope"); return "acme", nil }, &middleware.Options{
						Quota:          middleware.Quota{KeysMax: 1, Now: func() time.Time { bug.maybe("clock"); return time.Now() }},
						Logger:         slog.New(bug),
						TraceID:        func(*http.Request) string { bug.maybe("traceid"); return "" },
						Route:          func(*http.Request) string { bug.maybe("route"); return "" },
						Fingerprinters: []middleware.Fingerprinter{{Version: 100, Content: func(_ *http.Request, body []byte) []byte { bug.maybe("fingerprint"); return body }}},
						RouterState: func(context.Context, []byte) (middleware.RouterState, error) {
							bug.maybe("routerstate")
							return restoring(func(ctx context.Context) context.Context { bug.maybe("restore"); return ctx }), nil
						},
						Tracer: bug,
						Reduce: func(answer idempotency.Answer) idempotency.Answer { bug.maybe("reduce"); return answer },
						Disposition: func(answer idempotency.Answer) idempotency.Disposition {
							bug.maybe("disposition")
							return idempotency.DefaultDisposition(answer)
						},
					})
					handler := idem.Handler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
						bug.maybe("the handler itself")
						w.Header().Set("Idempotency-Status", "for the logger")
						w.WriteHeader(status)
					}))
					send := func(key string) int {
						w, done := httptest.NewRecorder(), make(chan struct{})
						go func() {
							defer close(done)
							defer func() { _ = recover() }()
							r := httptest.NewRequest(http.MethodPost, "/", nil)
							r.Header.Set("Idempotency-Key", key)
							handler.ServeHTTP(w, r)
						}()
						<-done
						return w.Code
					}
					send("first")
					hit = hit || bug.hit
					bug.at = ""
					recorded := len(records.Records())
					status = 201
					want := map[int]int{0: 201, 1: 429}[recorded]
					if exits && recorded == 0 && slices.Contains(afterHandler, place) {
						want = 0 // it is not known whether it was recorded: its place may be kept
					}
					if got := send("second"); got != want && want != 0 || idem.InFlight() != 0 {
						t.Errorf("%s, exits %t, again %t: %d records, then %d, want %d; %d in flight", place, exits, again, recorded, got, want, idem.InFlight())
					}
				}
			}
		}
		if !hit {
			t.Errorf("nothing ever called %s", place)
		}
	}
}

// A flood of duplicates of a running request takes nothing from the others: none of them takes a
// connection, waits or runs anything.
func TestFloodOfDuplicatesTakesNothingFromOthers(t *testing.T) {
	t.Parallel()
	entered, release := make(chan struct{}), make(chan struct{})
	b := setup(t, setupOptions{
		poolMax:    4,
		store:      &postgres.Options{AcquireTimeout: 20 * time.Second, IdleInTransactionTimeout: 59 * time.Second},
		middleware: &middleware.Options{Timeouts: idempotency.Timeouts{Handler: 50 * time.Second}},
	}, func(w http.ResponseWriter, r *http.Request) {
		if key, _ := idempotency.KeyFrom(r.Context()); key.Value == "running" {
			close(entered)
			<-release
		}
		transfer(w, r)
	})
	const duplicates, others = 500, 50
	before := b.pool.Stat()
	first := make(chan reply, 1)
	go func() { first <- b.post(t, "/", "{}", "Idempotency-Key", "running") }()
	<-entered
	var mu sync.Mutex
	seen := map[string]int{}
	post := func(name, key string) {
		got := b.post(t, "/", "{}", "Idempotency-Key", key)
		mu.Lock()
		defer mu.Unlock()
		seen[fmt.Sprint(name, " ", got.status, " ", got.outcome)]++
	}
	var senders sync.WaitGroup
	for range 10 {
		senders.Go(func() {
			for range duplicates / 10 {
				post("duplicate", "running")
			}
		})
	}
	for sender := range 5 {
		senders.Go(func() {
			for i := range others / 5 {
				post("other", fmt.Sprint("other-", sender, "-", i))
			}
		})
	}
	senders.Wait()
	close(release)
	want(t, <-first, 201, idempotency.OutcomeExecuted, "")
	if fmt.Sprint(seen) != fmt.Sprintf("map[duplicate 409 in-progress:%d other 201 executed:%d]", duplicates, others) {
		t.Errorf("answers %v", seen)
	}
	after := b.pool.Stat()
	if n := after.AcquireCount() - before.AcquireCount(); n != 1+others || after.CanceledAcquireCount() != before.CanceledAcquireCount() {
		t.Errorf("%d connections were taken by %d requests, %d waited in vain", n, 1+others, after.CanceledAcquireCount())
	}
	if after.TotalConns() > 4 || after.AcquiredConns() != 0 {
		t.Errorf("%d connections, %d held", after.TotalConns(), after.AcquiredConns())
	}
	if b.runs.Load() != 1+others || b.effects(t) != 1+others {
		t.Errorf("%d runs, %d effects; want %d", b.runs.Load(), b.effects(t), 1+others)
	}
}
