package middleware_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/effect"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/middleware/chiroute"
	"github.com/paidonce/idempotency/storage/postgres"
)

// processor is another service, with keys.
type processor struct {
	*httptest.Server
	mu       sync.Mutex
	charges  map[string]bool
	requests int
	mute     bool // applies, and answers 504
	decline  bool
}

func newProcessor(t *testing.T) *processor {
	p := &processor{charges: map[string]bool{}}
	p.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.requests++
		switch {
		case p.decline:
			http.Error(w, "declined", http.StatusPaymentRequired)
			return
		default:
			p.charges[r.Header.Get("Idempotency-Key")] = true
		}
		if p.mute {
			http.Error(w, "too late", http.StatusGatewayTimeout)
			return
		}
		w.WriteHeader(http.StatusCreated)
		_, _ = io.WriteString(w, `{"id":"ch_1"}`)
	}))
	t.Cleanup(p.Close)
	return p
}

func (p *processor) set(change func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change()
}

type card struct {
	Amount int
	Path   string
	Accept string
}

type charged struct{ ID string }

// charge is the effect of the routes below.
func (p *processor) charge() *effect.Declared[card, charged] {
	return effect.New("charge", effect.Effect[card, charged]{
		Do: func(ctx context.Context, key string, in card) (out charged, err error) {
			r, err := http.NewRequestWithContext(ctx, http.MethodPost, p.URL, strings.NewReader("{}"))
			if err != nil {
				return out, effect.NotSent(err)
			}
			r.Header.Set("Idempotency-Key", key)
			response, err := p.Client().Do(r)
			if err := effect.FromHTTP(response, err); err != nil {
				return out, err
			}
			defer func() { _ = response.Body.Close() }()
			return out, json.NewDecoder(response.Body).Decode(&out)
		},
		Timeout: 2 * time.Second, KeepsDeclines: true,
	})
}

// setupTopups serves POST /accounts/{id}/topups on chi: it charges a card and posts the amount.
func setupTopups(t *testing.T, p *processor, options *middleware.Options) (*testBundle, *idempotency.Completer) {
	charge := p.charge()
	topUp := func(w http.ResponseWriter, r *http.Request) {
		account := chi.URLParam(r, "id")
		paid, err := charge.Call(r.Context(), card{5, account, r.Header.Get("Accept")})
		switch {
		case errors.Is(err, effect.ErrDeclined):
			http.Error(w, "declined", http.StatusPaymentRequired)
			return
		case err != nil:
			return
		}
		if _, err := postgres.Tx(r.Context()).Exec(r.Context(), "INSERT INTO effects (name) VALUES ($1)", account); err != nil {
			http.Error(w, "not posted", http.StatusInternalServerError)
			return
		}
		w.WriteHeader(http.StatusCreated)
		_, _ = io.WriteString(w, paid.ID+" "+account)
	}
	var completer *idempotency.Completer
	options.RouterState, options.BackoffMax = chiroute.State, 50*time.Millisecond
	b := setup(t, setupOptions{middleware: options, mount: func(idem *middleware.Middleware, _ http.Handler) http.Handler {
		router := chi.NewRouter()
		router.With(idem.With(func(o *middleware.Options) { o.Resumable = "topup/1" }).Handler).Post("/accounts/{id}/topups", topUp)
		completer = idem.Completer(nil)
		return router
	}}, nil)
	return b, completer
}

// complete runs the completer until nothing is open.
func complete(t *testing.T, b *testBundle, completer *idempotency.Completer) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); b.count(t, "SELECT count(*) FROM idempotency_open WHERE parked IS NULL") > 0; {
		if _, err := completer.Once(t.Context()); err != nil || time.Now().After(deadline) {
			t.Fatalf("it is not completed: %v", err)
		}
		time.Sleep(10 * time.Millisecond) // the pause between two runs
	}
}

func TestCallToAnotherServiceIsBroughtToItsEnd(t *testing.T) {
	t.Parallel()
	for name, options := range map[string]*middleware.Options{"plain": {}, "with a quota": {Quota: middleware.Quota{KeysMax: 1}}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newProcessor(t)
			b, completer := setupTopups(t, p, options)
			post := func(key string) reply {
				return b.post(t, "/accounts/alice/topups", `{"amount":5}`, "Idempotency-Key", key, "Accept", "text/plain")
			}
			p.set(func() { p.mute = true })
			lost := post("k")
			want(t, lost, 503, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
			if !strings.Contains(lost.body, `"accepted":true`) || lost.header.Get("Retry-After") == "" {
				t.Errorf("%s %v", lost.body, lost.header)
			}
			want(t, b.post(t, "/accounts/bob/topups", `{"amount":5}`, "Idempotency-Key", "k"), 422, idempotency.OutcomeMismatch, idempotency.ReasonKeyReused)
			p.set(func() { p.mute = false })
			complete(t, b, completer)
			got := post("k")
			want(t, got, 201, idempotency.OutcomeReplayed, "")
			if got.body != "ch_1 alice" {
				t.Errorf("the resumed run answered %q", got.body)
			}
			if len(p.charges) != 1 || p.requests < 2 || b.count(t, "SELECT count(*) FROM effects WHERE name = 'alice'") != 1 {
				t.Errorf("%d charges in %d requests, %d postings", len(p.charges), p.requests, b.count(t, "SELECT count(*) FROM effects"))
			}
			if options.Quota.KeysMax > 0 {
				want(t, post("k2"), 429, idempotency.OutcomeNotExecuted, idempotency.ReasonQuotaExceeded)
				return
			}
			want(t, post("k2"), 201, idempotency.OutcomeExecuted, "")
			p.set(func() { p.decline = true })
			want(t, post("k3"), 402, idempotency.OutcomeExecuted, "")
			want(t, post("k3"), 402, idempotency.OutcomeReplayed, "")
		})
	}
}

// A service that does not know of open requests, or has no handler of this name, runs nothing.
func TestOpenRequestIsNotRunByOthers(t *testing.T) {
	t.Parallel()
	p := newProcessor(t)
	b, _ := setupTopups(t, p, &middleware.Options{})
	p.set(func() { p.mute = true })
	body := `{"amount":5}`
	want(t, b.post(t, "/accounts/alice/topups", body, "Idempotency-Key", "k"), 503, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
	plain := middleware.New(b.store, byAccount, nil).Handler(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("it ran") }))
	r := httptest.NewRequest(http.MethodPost, "/accounts/alice/topups", strings.NewReader(body))
	r.Header.Set("Account", "acme")
	r.Header.Set("Idempotency-Key", "k")
	r.Header.Set("Content-Type", "application/json")
	w := httptest.NewRecorder()
	plain.ServeHTTP(w, r)
	if w.Code != http.StatusServiceUnavailable || w.Header().Get("Idempotency-Status") != string(idempotency.OutcomeUnknown) {
		t.Errorf("%d %v %s", w.Code, w.Header(), w.Body)
	}
	if _, err := idempotency.NewCompleter(idempotency.NewEngine(b.store, nil), nil).Once(t.Context()); err != nil {
		t.Error(err)
	}
	if n := b.count(t, "SELECT runs FROM idempotency_open"); n != 1 {
		t.Errorf("it was run %d times", n)
	}
}

// FuzzRestoreRequest: a stored request that can be read can be given to a handler.
func FuzzRestoreRequest(f *testing.F) {
	f.Add([]byte(`{"v":1,"method":"POST","path":"L2E=","pattern":"POST /accounts/{id}/topups","path_values":{"id":"/w=="},"header":{"A":["Yg=="]},"body":"e30="}`))
	f.Add([]byte(`{"v":2}`))
	f.Add([]byte(`{"v":1,"method":"PO ST"}`))
	f.Add([]byte(`{"v":1,"method":"POST"} and more`))
	f.Fuzz(func(t *testing.T, stored []byte) {
		r, _, _, err := middleware.RestoreRequest(stored)
		if err == nil && (r.URL == nil || r.Method == "" || r.Header == nil || r.Body != nil) {
			t.Errorf("%+v", r)
		}
	})
}

// FuzzStoredRequest: a resumed run gets the client's bytes, whatever they are.
func FuzzStoredRequest(f *testing.F) {
	f.Add("POST", "/accounts/%FF/topups", "x=%2F&y", "bank.example", "\xff", "text/plain; q=\xfc", []byte("{}"), []byte{0xff})
	f.Add("PATCH", "", "", "", "", "", []byte(nil), []byte(nil))
	f.Add("POST", "topups", "?", "[::1]:80", "{id}", " ", []byte{0, 0xff}, []byte("{"))
	f.Fuzz(func(t *testing.T, method, path, query, host, value, accept string, body, router []byte) {
		r, err := http.NewRequest(method, "/", nil)
		if err != nil || method == "" {
			t.Skip()
		}
		r.URL = &url.URL{Path: path, RawPath: path, RawQuery: query}
		r.Host, r.RequestURI, r.Pattern = host, path+"?"+query, "POST /accounts/{id}/topups"
		r.SetPathValue("id", value)
		r.Header = http.Header{"Accept": {accept, "*/*"}, "Authorization": {"secret"}}
		got, gotRouter, gotBody, err := middleware.RestoreRequest(middleware.StoreRequest(r, []string{"Accept"}, router, body))
		if err != nil {
			t.Fatal(err)
		}
		if got.Method != method || *got.URL != *r.URL || got.Host != host || got.RequestURI != r.RequestURI || got.Pattern != r.Pattern || got.PathValue("id") != value ||
			!slices.Equal(got.Header["Accept"], r.Header["Accept"]) || len(got.Header) != 1 || !bytes.Equal(gotBody, body) || !bytes.Equal(gotRouter, router) {
			t.Errorf("%+v became %+v, body %q, router %q", r, got, gotBody, gotRouter)
		}
	})
}

func TestWildcardsOfAPattern(t *testing.T) {
	t.Parallel()
	for pattern, want := range map[string]string{
		"":                                     "",
		"POST /topups":                         "",
		"POST bank.example/accounts/{id}/{$}":  "id $",
		"/files/{path...}":                     "path",
		"/accounts/{account-id}/topups/*":      "account-id *",
		"/accounts/{id:[a-z]{2,3}.*}/{n:\\d+}": "id n",
		"/broken/{id":                          "",
	} {
		if got := strings.Join(middleware.Wildcards(pattern), " "); got != want {
			t.Errorf("%s: %q, want %q", pattern, got, want)
		}
	}
}

// A request that a later release has stored is not read in part.
func TestStoredRequestOfALaterReleaseIsRefused(t *testing.T) {
	t.Parallel()
	for stored, readable := range map[string]bool{
		`{"v":1,"method":"POST"}`: true, `{"v":2,"method":"POST"}`: false, `{"method":"POST"}`: false, `{"v":1}`: false,
	} {
		if _, _, _, err := middleware.RestoreRequest([]byte(stored)); (err == nil) != readable {
			t.Errorf("%s: %v", stored, err)
		}
	}
}
