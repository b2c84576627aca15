package middleware_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/memory"
	"github.com/paidonce/idempotency/storage/postgres"
)

// inFlight waits until that many requests are in flight.
func inFlight(t *testing.T, idem *middleware.Middleware, n int) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); idem.InFlight() != n; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d requests are in flight, want %d", idem.InFlight(), n)
		}
	}
}

// compressing is outer middleware that changes the headers of an answer in place.
type compressing struct {
	http.ResponseWriter
	id string
}

func (w compressing) WriteHeader(status int) {
	h := w.Header()
	h["Vary"] = append(h["Vary"], "Accept-Encoding")
	if len(h["Link"]) == 1 {
		h["Link"][0] += w.id
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w compressing) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Duplicates that wait get the answer and not a conflict. Each of them is authorized, has headers
// of its own, and takes no place in the quota.
func TestDuplicatesThatWaitGetTheAnswer(t *testing.T) {
	t.Parallel()
	const copies = 32
	var authorized atomic.Int64
	var idem *middleware.Middleware
	claimed, released := make(chan struct{}, copies), make(chan struct{})
	b := setup(t, setupOptions{
		middleware: &middleware.Options{
			Wait:            50 * time.Second,
			Quota:           middleware.Quota{KeysMax: 2},
			AuthorizeReplay: func(*http.Request, *idempotency.Record) error { authorized.Add(1); return nil },
		},
		store: &postgres.Options{AcquireTimeout: 20 * time.Second}, // duration does not matter here
		mount: func(m *middleware.Middleware, h http.Handler) http.Handler {
			idem = m
			protected, atOnce := m.Handler(h), m.With(func(o *middleware.Options) { o.Wait = 0 }).Handler(h)
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Header.Get("Prefer") != "" {
					atOnce.ServeHTTP(w, r)
					return
				}
				protected.ServeHTTP(compressing{w, r.Header.Get("Id")}, r)
			})
		},
	}, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/quick" {
			claimed <- struct{}{}
			<-released
		}
		w.Header()["Vary"] = append(make([]string, 0, 4), "Origin")
		w.Header().Set("Link", "first ")
		transfer(w, r)
	})
	release := sync.OnceFunc(func() { close(released) })
	t.Cleanup(release) // before the server is closed, which waits for its handlers
	replies := make([]reply, copies)
	var group sync.WaitGroup
	for i := range copies {
		group.Go(func() { replies[i] = b.post(t, "/", "{}", "Idempotency-Key", "k", "Id", string(rune('A'+i))) })
	}
	inFlight(t, idem, copies)
	<-claimed // else the next request may be the one that runs, and wait for itself
	conflict := b.post(t, "/", "{}", "Idempotency-Key", "k", "Prefer", "respond-at-once")
	want(t, conflict, 409, idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
	wrong := make(chan reply, 1)
	group.Go(func() { wrong <- b.post(t, "/other", "{}", "Idempotency-Key", "k") })
	inFlight(t, idem, copies+1)
	// Within the quota.
	want(t, b.post(t, "/quick", "{}", "Idempotency-Key", "k2"), 201, idempotency.OutcomeExecuted, "")
	release()
	group.Wait()

	executed := 0
	for i, got := range replies {
		if got.outcome == string(idempotency.OutcomeExecuted) {
			executed++
		} else {
			want(t, got, 201, idempotency.OutcomeReplayed, "")
		}
		if got.body != replies[0].body || !slices.Equal(got.header["Vary"], []string{"Origin", "Accept-Encoding"}) ||
			got.header.Get("Link") != "first"+string(rune('A'+i)) && got.header.Get("Link") != "first "+string(rune('A'+i)) {
			t.Errorf("copy %d: %q, Vary %q, Link %q", i, got.body, got.header["Vary"], got.header["Link"])
		}
	}
	want(t, <-wrong, 422, idempotency.OutcomeMismatch, idempotency.ReasonKeyReused)
	if executed != 1 || b.runs.Load() != 2 || b.effects(t) != 2 || authorized.Load() != copies-1 {
		t.Errorf("%d executed, %d runs, %d effects, %d replays authorized", executed, b.runs.Load(), b.effects(t), authorized.Load())
	}
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "k3"), 429, idempotency.OutcomeNotExecuted, idempotency.ReasonQuotaExceeded)
}

// waitServer serves a handler that answers when it is released, on a store in memory: these tests
// are about net/http.
func waitServer(t *testing.T, readTimeout time.Duration) (idem *middleware.Middleware, send func(context.Context) string, release func()) {
	t.Helper()
	released := make(chan struct{})
	idem = middleware.New(memory.New(nil), exampleAccount, &middleware.Options{Wait: 50 * time.Second})
	server := httptest.NewUnstartedServer(idem.Handler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		<-released
		w.WriteHeader(http.StatusOK)
	})))
	server.Config.ReadTimeout = readTimeout
	server.Start()
	release = sync.OnceFunc(func() { close(released) })
	t.Cleanup(server.Close)
	t.Cleanup(release) // before Close, which waits
	return idem, func(ctx context.Context) string {
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, server.URL, strings.NewReader("{}"))
		if err != nil {
			t.Error(err)
			return ""
		}
		r.GetBody = nil
		r.Header.Set("Account", "acme")
		r.Header.Set("Idempotency-Key", "k")
		response, err := server.Client().Do(r)
		if err != nil {
			return err.Error()
		}
		_ = response.Body.Close()
		return response.Header.Get("Idempotency-Status")
	}, release
}

// ReadTimeout is for the body: a client with a request that waits longer does not count as gone.
func TestWaitOutlastsReadTimeout(t *testing.T) {
	t.Parallel()
	const readTimeout = 200 * time.Millisecond
	idem, send, release := waitServer(t, readTimeout)
	outcomes := make(chan string, 2)
	for i := range 2 {
		go func() { outcomes <- send(context.Background()) }()
		inFlight(t, idem, i+1)
	}
	time.Sleep(2 * readTimeout)
	release()
	got := []string{<-outcomes, <-outcomes}
	slices.Sort(got)
	if !slices.Equal(got, []string{"executed", "replayed"}) {
		t.Errorf("outcomes %q", got)
	}
}

// If a client hangs up while its request waits, the request gives up its place.
func TestClientThatHangsUpWaitsNoLonger(t *testing.T) {
	t.Parallel()
	idem, send, release := waitServer(t, 0)
	first, second := make(chan string, 1), make(chan string, 1)
	go func() { first <- send(context.Background()) }()
	inFlight(t, idem, 1)
	ctx, hangUp := context.WithCancel(context.Background())
	defer hangUp()
	go func() { second <- send(ctx) }()
	inFlight(t, idem, 2)
	hangUp()
	<-second
	inFlight(t, idem, 1)
	release()
	if outcome := <-first; outcome != "executed" {
		t.Errorf("the first: %s", outcome)
	}
}
