package middleware_test

import (
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
)

// stopped is a clock that stands still until a test moves it.
type stopped struct {
	mu  sync.Mutex
	now time.Time
}

func (c *stopped) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *stopped) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// Over its quota an account gets 429 for a new key, its handler does not run, and everything that has a record is
// answered as before.
func TestQuotaRefusesNewKeysAlone(t *testing.T) {
	t.Parallel()
	clock, told := &stopped{now: time.Now()}, &tracer{}
	b := setup(t, setupOptions{middleware: &middleware.Options{
		Quota:    middleware.Quota{KeysMax: 3, Window: 90 * time.Second, Now: clock.Now},
		Optional: true,
		Engine:   idempotency.Options{Tracer: told},
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
	for range 10 { // what leaves no record does not count
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
	want(t, b.post(t, "/", "{}"), 201, idempotency.OutcomeExecuted, "") // nothing is recorded of it
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

	clock.advance(90*time.Second - time.Millisecond)
	want(t, post("/", "4"), 429, idempotency.OutcomeNotExecuted, idempotency.ReasonQuotaExceeded)
	clock.advance(time.Millisecond)
	want(t, post("/", "4"), 201, idempotency.OutcomeExecuted, "")
}

// A policy that keeps every answer does not keep the 429: it would be replayed for good.
func TestQuotaIsNeverRecorded(t *testing.T) {
	t.Parallel()
	clock := &stopped{now: time.Now()}
	b := setup(t, setupOptions{middleware: &middleware.Options{
		Quota:  middleware.Quota{KeysMax: 1, Now: clock.Now},
		Engine: idempotency.Options{Disposition: func(int) idempotency.Disposition { return idempotency.Commit }},
	}}, transfer)
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "1"), 201, idempotency.OutcomeExecuted, "")
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "2"), 429, idempotency.OutcomeNotExecuted, idempotency.ReasonQuotaExceeded)
	if b.records(t) != 1 {
		t.Errorf("%d records", b.records(t))
	}
	clock.advance(middleware.QuotaWindowDefault)
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "2"), 201, idempotency.OutcomeExecuted, "")
}

// Requests that run at once can't slip past the quota together, and a key that is being worked on counts once.
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
	// The one that failed made room, for one.
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "3"), 201, idempotency.OutcomeExecuted, "")
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "4"), 429, idempotency.OutcomeNotExecuted, idempotency.ReasonQuotaExceeded)
	if b.records(t) != 2 {
		t.Errorf("%d records, want 2", b.records(t))
	}
}
