package client_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/memory"
)

// TestResumeSendsFewAtOnce: at most ResumeAtOnce intents are in progress, and the next one starts
// when one has ended.
func TestResumeSendsFewAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := newIntents()
		for n := range client.ResumeAtOnce + 1 {
			intent := &client.Intent{Key: idempotency.Key{Value: fmt.Sprint("k", n)}, Method: http.MethodPost, URL: "http://bank.example/"}
			if _, err := store.Save(t.Context(), intent); err != nil {
				t.Fatal(err)
			}
		}
		var sent atomic.Int64
		answer := make(chan struct{})
		transport := client.New(canned(func(r *http.Request) (*http.Response, error) {
			sent.Add(1)
			<-answer
			return answerOf(r, 201, "Idempotency-Status", "executed"), nil
		}), &client.Options{Honours: client.Everywhere, Intents: store})
		ended := make(chan client.Report, 1)
		go func() {
			report, err := transport.Resume(t.Context(), nil)
			if err != nil {
				t.Error(err)
			}
			ended <- report
		}()
		synctest.Wait()
		if n := sent.Load(); n != client.ResumeAtOnce {
			t.Errorf("%d are sent at once, want %d", n, client.ResumeAtOnce)
		}
		answer <- struct{}{}
		synctest.Wait()
		if n := sent.Load(); n != client.ResumeAtOnce+1 {
			t.Errorf("%d are sent when one has its answer, want %d", n, client.ResumeAtOnce+1)
		}
		close(answer)
		if report := <-ended; report != (client.Report{Settled: client.ResumeAtOnce + 1}) || store.count() != 0 {
			t.Errorf("%+v, and %d are kept", report, store.count())
		}
	})
}

// TestResumedRequestIsTheSameRequest: a header selects the account. Without it the resumed request
// would be paid out of another one, so it is kept, or nothing is sent.
func TestResumedRequestIsTheSameRequest(t *testing.T) {
	t.Parallel()
	for name, one := range map[string]struct {
		kept []string
		want []string // effects
	}{"not named": {nil, nil}, "kept": {[]string{"x-tenant"}, []string{"north"}}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var mu sync.Mutex
			var effects []string
			handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				mu.Lock()
				defer mu.Unlock()
				effects = append(effects, r.Header.Get("X-Tenant"))
				w.WriteHeader(http.StatusCreated)
			})
			scope := func(r *http.Request) (string, error) { return "tenant/" + r.Header.Get("X-Tenant"), nil }
			idempotent := middleware.New(memory.New(nil), scope, nil).Handler(handler)
			var lost atomic.Bool
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if lost.CompareAndSwap(false, true) {
					idempotent.ServeHTTP(httptest.NewRecorder(), r)
					lose()
				}
				idempotent.ServeHTTP(w, r)
			}))
			t.Cleanup(server.Close)
			store := newIntents()
			transport := client.New(&http.Transport{DisableKeepAlives: true}, quick(func(o *client.Options) {
				o.AttemptsMax, o.Intents, o.IntentHeaders = 1, store, one.kept
			}))
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL, strings.NewReader("10"))
			if err != nil {
				t.Fatal(err)
			}
			r.Header["x-tenant"] = []string{"north"} // set without Set, as some programs do
			_, err = transport.RoundTrip(r)
			if one.kept == nil {
				expectError(t, err, idempotency.OutcomeNotExecuted, client.ErrIntentRefused)
				if !strings.Contains(err.Error(), "X-Tenant") || !strings.Contains(err.Error(), "Options.IntentHeaders") {
					t.Errorf("the error names no remedy: %v", err)
				}
			} else {
				expectError(t, err, idempotency.OutcomeUnknown, client.ErrAttemptsSpent)
			}
			report, err := transport.Resume(t.Context(), nil)
			if err != nil || report.Settled != len(one.want) || store.count() != 0 {
				t.Errorf("report is %+v, %v; %d intents are left", report, err, store.count())
			}
			if !slices.Equal(effects, one.want) {
				t.Errorf("effects are %q, want %q", effects, one.want)
			}
		})
	}
}

// TestIntentHeaders lists headers that are kept, left out and refused.
func TestIntentHeaders(t *testing.T) {
	t.Parallel()
	for name, one := range map[string]struct {
		headers, keep, omit []string
		kept                []string
		refused             bool
	}{
		"of the content":            {headers: []string{"Content-Type", "Content-Encoding", "Content-Digest"}, kept: []string{"Content-Digest", "Content-Encoding", "Content-Type"}},
		"a condition":               {headers: []string{"If-Match", "Prefer"}, kept: []string{"If-Match", "Prefer"}},
		"credentials":               {headers: []string{"Authorization", "Cookie", "Proxy-Authorization", "X-Api-Key"}},
		"of the connection":         {headers: []string{"Connection", "Keep-Alive", "Te"}},
		"trace context":             {headers: []string{"Traceparent", "Tracestate"}},
		"unknown":                   {headers: []string{"Account"}, refused: true},
		"unknown, and one is kept":  {headers: []string{"Account", "Stripe-Account"}, keep: []string{"Account"}, refused: true},
		"kept":                      {headers: []string{"Account", "Stripe-Account"}, keep: []string{"account", "stripe-account"}, kept: []string{"Account", "Stripe-Account"}},
		"a credential of their own": {headers: []string{"X-Token"}, omit: []string{"x-token"}},
		"a default that is omitted": {headers: []string{"User-Agent", "Accept"}, omit: []string{"User-Agent"}, kept: []string{"Accept"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newScript(t, each("lost"))
			store := newIntents()
			c := newClient(t, quick(func(o *client.Options) {
				o.Intents, o.AttemptsMax, o.IntentHeaders, o.IntentHeadersOmitted = store, 1, one.keep, one.omit
			}))
			r, err := http.NewRequestWithContext(client.WithNewKey(t.Context(), "mine"), http.MethodPost, s.server.URL, strings.NewReader("body"))
			if err != nil {
				t.Fatal(err)
			}
			for _, header := range one.headers {
				r.Header[header] = []string{"secret 1", "secret 2"}
			}
			_, err = c.Do(r)
			if one.refused {
				expectError(t, err, idempotency.OutcomeNotExecuted, client.ErrIntentRefused)
				if strings.Contains(err.Error(), "secret") || len(s.requests()) > 0 || store.count() > 0 {
					t.Errorf("%d requests arrived, %d intents are kept: %v", len(s.requests()), store.count(), err)
				}
				return
			}
			expectError(t, err, idempotency.OutcomeUnknown, client.ErrAttemptsSpent)
			var kept []string
			for header, values := range store.kept["mine"].Header {
				kept = append(kept, header)
				if len(values) != 2 {
					t.Errorf("of %s %d values are kept", header, len(values))
				}
			}
			if slices.Sort(kept); !slices.Equal(kept, one.kept) {
				t.Errorf("kept is %q, want %q", kept, one.kept)
			}
		})
	}
}

// TestURLThatCannotBeWrittenDownIsRefused: an intent keeps a URL as text, which must parse to the
// same request.
func TestURLThatCannotBeWrittenDownIsRefused(t *testing.T) {
	t.Parallel()
	for name, one := range map[string]struct {
		url  url.URL
		kept string // "": refused
	}{
		"a path that is escaped": {url.URL{Path: "/a b/c", RawPath: "/a%20b%2Fc"}, "/a%20b%2Fc"},
		"escaped otherwise":      {url.URL{Path: "/a/b", RawPath: "/a%2Fb", RawQuery: "x=%2f&&"}, "/a%2Fb?x=%2f&&"},
		"a lone question mark":   {url.URL{Path: "/", ForceQuery: true}, "/?"},
		"opaque":                 {url.URL{Opaque: "/a%2Fb"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var sent []string
			store := newIntents()
			transport := client.New(canned(func(r *http.Request) (*http.Response, error) {
				sent = append(sent, r.URL.RequestURI())
				return nil, errFailing
			}), quick(func(o *client.Options) { o.Intents, o.AttemptsMax = store, 1 }))
			r, err := http.NewRequestWithContext(client.WithKey(t.Context(), "mine"), http.MethodPost, "http://bank.example/", nil)
			if err != nil {
				t.Fatal(err)
			}
			one.url.Scheme, one.url.Host = r.URL.Scheme, r.URL.Host
			r.URL = &one.url
			_, err = transport.RoundTrip(r)
			if one.kept == "" {
				if !errors.Is(err, client.ErrIntentRefused) || len(sent) > 0 {
					t.Errorf("%d were sent: %v", len(sent), err)
				}
				return
			}
			if _, err := transport.Resume(t.Context(), nil); err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(sent, []string{one.kept, one.kept}) {
				t.Errorf("sent was %q, want twice %s", sent, one.kept)
			}
		})
	}
}

// TestBaseAddsCredentialsToResumedRequests, which are kept nowhere.
func TestBaseAddsCredentialsToResumedRequests(t *testing.T) {
	t.Parallel()
	s := newScript(t, each("lost", "201 replayed"))
	store := newIntents()
	transport := client.New(authorizing{&http.Transport{DisableKeepAlives: true}, "Bearer secret", nil}, quick(func(o *client.Options) {
		o.Intents, o.AttemptsMax = store, 1
	}))
	_, _, err := post(t, &http.Client{Transport: transport}, client.WithKey(t.Context(), "mine"), s.server.URL, "body")
	expectError(t, err, idempotency.OutcomeUnknown, client.ErrAttemptsSpent)
	report, err := transport.Resume(t.Context(), func(_ context.Context, r *client.Resumed) error {
		if r.Intent.Header.Get("Authorization") != "" {
			t.Error("a credential is kept")
		}
		return nil
	})
	if err != nil || report.Settled != 1 {
		t.Errorf("%+v, %v", report, err)
	}
	for _, r := range s.requests() {
		if r.header.Get("Authorization") != "Bearer secret" {
			t.Errorf("it arrived with %q", r.header.Get("Authorization"))
		}
	}
}
