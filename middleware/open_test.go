package middleware_test

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/middleware/chiroute"
	"github.com/paidonce/idempotency/storage/postgres"
)

// The states of an open request, as a client sees them. The handlers call the engine directly, as
// package effect does.

// teller is a processor that applies a charge once per key.
type teller struct {
	*httptest.Server
	mu      sync.Mutex
	charges map[string]int // requests by key
}

func newTeller(t *testing.T) *teller {
	c := &teller{charges: map[string]int{}}
	c.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.charges[r.Header.Get("Idempotency-Key")]++
		_, _ = io.WriteString(w, "ch_1")
	}))
	t.Cleanup(c.Close)
	return c
}

func (c *teller) count() (charges, requests int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, n := range c.charges {
		charges, requests = charges+1, requests+n
	}
	return charges, requests
}

// charge makes one call. before and after run around the send.
func (c *teller) charge(ctx context.Context, before, after func()) error {
	effects, err := idempotency.EffectsFrom(ctx)
	if err != nil {
		return err
	}
	effect, _, _, err := effects.Begin(idempotency.Intent{Name: "charge", Kind: idempotency.EffectCall, Input: []byte("5"), Timeout: time.Second})
	if err != nil || effect.State == idempotency.EffectDone {
		return err
	}
	before()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, c.URL, nil)
	if err != nil {
		return err
	}
	r.Header.Set("Idempotency-Key", effect.DerivedKey)
	response, err := c.Client().Do(r)
	if err != nil {
		effects.Lapse(idempotency.Lapse{Reason: "no reply"})
		return idempotency.ErrUnsettled
	}
	defer func() { _ = response.Body.Close() }()
	if effect.Output, err = io.ReadAll(response.Body); err != nil {
		effects.Lapse(idempotency.Lapse{Reason: "no reply"})
		return idempotency.ErrUnsettled
	}
	after()
	effect.State = idempotency.EffectDone
	return effects.Settle(effect)
}

// openBundle is a service with one resumable route, POST /topups.
type openBundle struct {
	*testBundle
	teller    *teller
	idem      *middleware.Middleware
	completer *idempotency.Completer

	before, after, last func() // called in the handler; nil does nothing
	status              atomic.Int64
	handled             atomic.Int64
}

func do(f *func()) {
	if f := *f; f != nil {
		f()
	}
}

func (o *openBundle) topUp(w http.ResponseWriter, r *http.Request) {
	o.handled.Add(1)
	if o.teller.charge(r.Context(), func() { do(&o.before) }, func() { do(&o.after) }) != nil {
		return
	}
	if _, err := postgres.Tx(r.Context()).Exec(r.Context(), "INSERT INTO effects (name) VALUES ('posting')"); err != nil {
		http.Error(w, "not posted", http.StatusInternalServerError)
		return
	}
	do(&o.last)
	w.WriteHeader(int(o.status.Load()))
	_, _ = io.WriteString(w, "paid")
}

func setupOpen(t *testing.T, options *middleware.Options) *openBundle {
	o := &openBundle{teller: newTeller(t)}
	o.status.Store(http.StatusCreated)
	if options == nil {
		options = &middleware.Options{}
	}
	options.BackoffMax = 50 * time.Millisecond
	o.testBundle = setup(t, setupOptions{middleware: options, mount: func(idem *middleware.Middleware, _ http.Handler) http.Handler {
		o.idem = idem
		o.completer = idem.Completer(nil)
		return idem.With(func(o *middleware.Options) { o.Resumable = "topup/1" }).Handler(http.HandlerFunc(o.topUp))
	}}, nil)
	return o
}

func (o *openBundle) topUpBy(t *testing.T, key string) reply {
	return o.post(t, "/topups", "{}", "Idempotency-Key", key)
}

// serve calls a handler without a server, as a process that dies has none.
func serve(handler http.Handler, key, body string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodPost, "/topups", strings.NewReader(body))
	r.Header.Set("Account", "acme")
	r.Header.Set("Idempotency-Key", key)
	r.Header.Set("Content-Type", "application/json")
	w := httptest.NewRecorder()
	handler.ServeHTTP(w, r)
	return w
}

// due ends the lease of all open requests.
func (o *openBundle) due(t *testing.T) {
	if _, err := o.pool.Exec(t.Context(), "UPDATE idempotency_open SET next_at = now()"); err != nil {
		t.Fatal(err)
	}
}

// settled checks that there is one charge and one posting, and that a retry gets the replay.
func (o *openBundle) settled(t *testing.T, key string, requests int) {
	t.Helper()
	got := o.topUpBy(t, key)
	want(t, got, 201, idempotency.OutcomeReplayed, "")
	if got.body != "paid" {
		t.Errorf("replayed %q", got.body)
	}
	charges, sent := o.teller.count()
	if postings := o.effects(t); charges != 1 || sent != requests || postings != 1 {
		t.Errorf("%d charges in %d requests, %d postings; want 1 in %d, 1", charges, sent, postings, requests)
	}
	if n := o.count(t, "SELECT count(*) FROM idempotency_open"); n != 0 {
		t.Errorf("%d are open", n)
	}
}

// A process dies at each point around its call, and nobody retries: the completer ends the request
// with one charge and one posting.
func TestDeadProcessIsCompleted(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		point    func(o *openBundle) *func()
		requests int
	}{
		"before the send":   {func(o *openBundle) *func() { return &o.before }, 1},
		"after the reply":   {func(o *openBundle) *func() { return &o.after }, 2},
		"in the last phase": {func(o *openBundle) *func() { return &o.last }, 1},
	} {
		for death, die := range map[string]func(){"panics": func() { panic("died") }, "ends its goroutine": runtime.Goexit} {
			t.Run(name+" it "+death, func(t *testing.T) {
				t.Parallel()
				o := setupOpen(t, nil)
				point := c.point(o)
				*point = die
				handler := o.server.Config.Handler
				gone := make(chan *httptest.ResponseRecorder, 1)
				go func() {
					defer close(gone)
					gone <- serve(handler, "k", "{}")
				}()
				if w := <-gone; death == "panics" && (w == nil || w.Code != http.StatusServiceUnavailable || !strings.Contains(w.Body.String(), `"accepted":true`)) {
					t.Errorf("%+v", w)
				}
				*point = nil
				if death != "panics" {
					// The dead owner did not give it up: it is in progress for the rest of the
					// lease.
					got := o.topUpBy(t, "k")
					want(t, got, 409, idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
					if rest, err := strconv.Atoi(got.header.Get("Retry-After")); err != nil || rest < 5 || rest > 20 {
						t.Errorf("Retry-After %q, want the rest of the lease", got.header.Get("Retry-After"))
					}
				}
				o.due(t)
				if found, err := o.completer.Once(t.Context()); found != 1 || err != nil {
					t.Fatalf("%d found: %v", found, err)
				}
				o.settled(t, "k", c.requests)
			})
		}
	}
}

// On a client's retry another process with the same route takes the request over, but only when its
// lease has run out. Then both processes replay the answer.
func TestAnotherProcessTakesOver(t *testing.T) {
	t.Parallel()
	o := setupOpen(t, nil)
	o.after = runtime.Goexit
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		serve(o.server.Config.Handler, "k", "{}")
	}()
	<-gone
	o.after = nil
	other := middleware.New(o.store, byAccount, &middleware.Options{Resumable: "topup/1"}).Handler(http.HandlerFunc(o.topUp))
	if w := serve(other, "k", "{}"); w.Code != http.StatusConflict {
		t.Errorf("within the lease: %d %s", w.Code, w.Body)
	}
	if w := serve(other, "k", `{"other":1}`); w.Code != http.StatusUnprocessableEntity {
		t.Errorf("another request: %d %s", w.Code, w.Body)
	}
	o.due(t)
	if w := serve(other, "k", `{"other":1}`); w.Code != http.StatusUnprocessableEntity {
		t.Errorf("another request, when it is due: %d %s", w.Code, w.Body)
	}
	if w := serve(other, "k", "{}"); w.Code != http.StatusCreated || w.Header().Get("Idempotency-Status") != "executed" {
		t.Errorf("when it is due: %d %s", w.Code, w.Body)
	}
	o.settled(t, "k", 2)
}

// A refusal after a charge is never given to a client: the request waits for a person, and nobody
// runs it.
func TestRefusalAfterAChargeNeedsAttention(t *testing.T) {
	t.Parallel()
	authorized := false
	o := setupOpen(t, &middleware.Options{AuthorizeReplay: func(*http.Request, *idempotency.Record) error { authorized = true; return nil }})
	o.status.Store(http.StatusConflict)
	for range 2 {
		got := o.topUpBy(t, "k")
		want(t, got, 503, idempotency.OutcomeUnknown, idempotency.ReasonNeedsAttention)
		if !strings.Contains(got.body, `"accepted":true`) || got.header.Get("Retry-After") == "" {
			t.Errorf("%s %v", got.body, got.header)
		}
		o.due(t)
	}
	if found, err := o.completer.Once(t.Context()); found != 0 || err != nil {
		t.Errorf("%d found: %v", found, err)
	}
	if authorized || o.records(t) != 1 || o.effects(t) != 0 {
		t.Errorf("a replay was asked for: %v; %d records, %d postings", authorized, o.records(t), o.effects(t))
	}
	if logs := o.logs.String(); strings.Count(logs, "waits for a person") != 1 || !strings.Contains(logs, "made and not undone") {
		t.Errorf("the log does not say so once, with the reason: %s", logs)
	}
}

// The claim of a resumable request travels with its first statement: a retry of a request that is
// recorded gets the replay, in this process and in another, whatever its handler does before.
func TestRetryOfARecordedRequestIsReplayed(t *testing.T) {
	t.Parallel()
	o := setupOpen(t, nil)
	want(t, o.topUpBy(t, "k"), 201, idempotency.OutcomeExecuted, "")
	o.settled(t, "k", 1)
	for name, handler := range map[string]http.HandlerFunc{
		"a call first":         o.topUp,
		"a statement first":    func(w http.ResponseWriter, r *http.Request) { transfer(w, r) },
		"nothing, an answer":   func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusAccepted) },
		"nothing, a refusal":   func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusConflict) },
		"nothing, a failure":   func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) },
		"nothing, and a panic": func(http.ResponseWriter, *http.Request) { panic("died") },
	} {
		pool := o.pool.Config().Copy()
		fresh, err := postgres.Open(t.Context(), pool.ConnString(), nil) // knows nothing of the key
		if err != nil {
			t.Fatal(err)
		}
		other := middleware.New(fresh, byAccount, &middleware.Options{Resumable: "topup/1"}).Handler(handler)
		w := serve(other, "k", "{}")
		if w.Code != http.StatusCreated || w.Header().Get("Idempotency-Status") != "replayed" || w.Body.String() != "paid" {
			t.Errorf("%s: %d %s %s", name, w.Code, w.Header().Get("Idempotency-Status"), w.Body)
		}
		fresh.Close()
	}
	o.settled(t, "k", 1)
}

// A resumed run has no router outside: it gets the parameters and the path that chi had found, and
// the headers that the route keeps, byte by byte.
func TestResumedRunSeesTheRequestThatCame(t *testing.T) {
	t.Parallel()
	type mounted func(idem func(http.Handler) http.Handler, handler http.HandlerFunc) http.Handler
	for name, mount := range map[string]mounted{
		"net/http": func(idem func(http.Handler) http.Handler, handler http.HandlerFunc) http.Handler {
			mux := http.NewServeMux()
			mux.Handle("POST /accounts/{id}/topups/{rest...}", idem(handler))
			return mux
		},
		"chi With": func(idem func(http.Handler) http.Handler, handler http.HandlerFunc) http.Handler {
			r := chi.NewRouter()
			r.With(idem).Post("/accounts/{id:[^/]{1,9}}/topups/*", handler)
			return r
		},
		"chi Route": func(idem func(http.Handler) http.Handler, handler http.HandlerFunc) http.Handler {
			r := chi.NewRouter()
			r.Route("/accounts/{id}", func(r chi.Router) {
				r.Use(idem)
				r.Route("/topups", func(r chi.Router) { r.Post("/*", handler) })
			})
			return r
		},
		"chi Use": func(idem func(http.Handler) http.Handler, handler http.HandlerFunc) http.Handler {
			r := chi.NewRouter()
			r.Use(idem)
			r.Post("/accounts/{id}/topups/*", handler)
			return r
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			teller := newTeller(t)
			var seen []string
			var completer *idempotency.Completer
			handler := func(w http.ResponseWriter, r *http.Request) {
				body, err := io.ReadAll(r.Body)
				if err != nil {
					t.Error(err)
				}
				id, rest := r.PathValue("id"), r.PathValue("rest")
				if chi.RouteContext(r.Context()) != nil {
					id, rest = chi.URLParam(r, "id"), chi.URLParam(r, "*")
				}
				caller, _ := r.Context().Value(callerKey{}).(string)
				seen = append(seen, strings.Join([]string{r.Method, r.Host, r.URL.Path, r.URL.RawQuery, id, rest, r.Header.Get("Accept"), r.Header.Get("X-Kept"), string(body), caller}, "|"))
				if len(seen) == 1 && r.Header.Get("Authorization") == "" || len(seen) > 1 && r.Header.Get("Authorization") != "" {
					t.Errorf("run %d: credentials %q", len(seen), r.Header.Get("Authorization"))
				}
				if err := teller.charge(r.Context(), func() {}, func() {
					if len(seen) == 1 {
						panic("died")
					}
				}); err != nil {
					return
				}
				w.WriteHeader(http.StatusCreated)
			}
			b := setup(t, setupOptions{
				middleware: &middleware.Options{
					RouterState: chiroute.State, StoreHeaders: []string{"x-kept"}, BackoffMax: time.Millisecond,
					ResumeContext: func(ctx context.Context, scope string, _ *http.Request) context.Context {
						return context.WithValue(ctx, callerKey{}, scope)
					},
				},
				mount: func(idem *middleware.Middleware, _ http.Handler) http.Handler {
					completer = idem.Completer(nil)
					authenticated := func(next http.Handler) http.Handler {
						return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
							next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), callerKey{}, r.Header.Get("Account"))))
						})
					}
					return authenticated(mount(idem.With(func(o *middleware.Options) { o.Resumable = "topup/1" }).Handler, handler))
				},
			}, nil)
			want(t, b.post(t, "/accounts/a%FFb/topups/x/y?q=%2F&z", `{"amount":5}`, "Idempotency-Key", "k", "Accept", "text/\xfcx", "X-Kept", "kept", "Authorization", "Bearer secret"),
				503, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
			complete(t, b, completer)
			if len(seen) != 2 || seen[0] != seen[1] || !strings.Contains(seen[0], "|a\xffb|x/y|text/\xfcx|kept|{\"amount\":5}|acme") {
				t.Errorf("%q", seen)
			}
		})
	}
}

type callerKey struct{}

// A stored request that this program can't read stays open, and does not keep others from ending.
func TestUnreadableRequestsDoNotStopTheOthers(t *testing.T) {
	t.Parallel()
	o := setupOpen(t, nil)
	o.after = func() { panic("died") }
	const broken = 8 // as many as the completer takes at once
	for i := range broken + 1 {
		want(t, o.topUpBy(t, strconv.Itoa(i)), 503, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
	}
	o.after = nil
	if _, err := o.pool.Exec(t.Context(), "UPDATE idempotency_open SET next_at = now() - interval '1 hour', request = '{\"v\":9}' WHERE key <> '0'"); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ran := make(chan struct{})
	go func() {
		defer close(ran)
		o.completer.Run(ctx)
	}()
	for deadline := time.Now().Add(20 * time.Second); o.count(t, "SELECT count(*) FROM idempotency_open WHERE key = '0'") > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the one that can be read is not completed")
		}
	}
	stop()
	<-ran
	if n := o.count(t, "SELECT count(*) FROM idempotency_open WHERE last_reason <> ''"); n != broken {
		t.Errorf("%d are left with a reason", n)
	}
	if !strings.Contains(o.logs.String(), "can't be read") {
		t.Errorf("the log does not say so: %s", o.logs)
	}
}

// Options that can't work are refused when the service starts.
func TestResumableOptionsAreChecked(t *testing.T) {
	t.Parallel()
	o := setupOpen(t, nil)
	for remedy, options := range map[string]*middleware.Options{
		"needs a key":   {Resumable: "a/1", Optional: true},
		"Authorization": {Resumable: "a/1", StoreHeaders: []string{"authorization"}},
		"Cookie":        {Resumable: "a/1", StoreHeaders: []string{"COOKIE"}},
		"visible ASCII": {Resumable: "a 1"},
		"1 to 100":      {Resumable: strings.Repeat("a", 101)},
	} {
		func() {
			defer func() {
				if text, ok := recover().(string); !ok || !strings.Contains(text, remedy) {
					t.Errorf("%s: %q", remedy, text)
				}
			}()
			middleware.New(o.store, byAccount, options).Handler(http.NotFoundHandler())
		}()
	}
	defer func() {
		if text, ok := recover().(string); !ok || !strings.Contains(text, "topup/1") {
			t.Errorf("a name taken twice: %q", text)
		}
	}()
	o.idem.With(func(o *middleware.Options) { o.Resumable = "topup/1" }).Handler(http.NotFoundHandler())
}

// A quota counts an open request once, when its key is new: neither its retries nor its end count.
func TestQuotaCountsAnOpenRequestOnce(t *testing.T) {
	t.Parallel()
	o := setupOpen(t, &middleware.Options{Quota: middleware.Quota{KeysMax: 2}})
	o.after = func() { panic("died") }
	for range 3 {
		want(t, o.topUpBy(t, "k"), 503, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
		o.due(t)
	}
	o.after = nil
	want(t, o.topUpBy(t, "k"), 201, idempotency.OutcomeExecuted, "")
	want(t, o.topUpBy(t, "k2"), 201, idempotency.OutcomeExecuted, "")
	runs := o.handled.Load()
	want(t, o.topUpBy(t, "k3"), 429, idempotency.OutcomeNotExecuted, idempotency.ReasonQuotaExceeded)
	want(t, o.topUpBy(t, "k"), 201, idempotency.OutcomeReplayed, "")
	if o.handled.Load() != runs {
		t.Errorf("the handler ran for a replay or a refusal")
	}
}
