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
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/client/pgintent"
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
// would be paid out of another account, so the header is kept, or nothing is sent.
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

// TestBaseAddsCredentialsToResumedRequests: credentials are kept nowhere, so the base adds them
// again.
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

// TestResume: pending intents are sent unchanged until they are settled, and each is reported.
func TestResume(t *testing.T) {
	t.Parallel()
	s := newScript(t, func(n int, w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/good":
			each("lost", "409 in-progress", "201 replayed")(n, w, r)
		case "/mismatch":
			say(w, 422, "mismatch")
		case "/refused":
			say(w, 401, "not-executed")
		case "/portal":
			say(w, 200, "")
		}
	})
	for path, one := range map[string]struct {
		status, requests int
		handleErr        error
		settled, kept    int
	}{
		"/good":     {201, 3, nil, 1, 0},
		"/good?x":   {201, 3, errFailing, 0, 1}, // its handling fails
		"/mismatch": {422, 1, nil, 1, 0},
		"/refused":  {0, 4, nil, 0, 1}, // an earlier attempt may have been executed
		"/portal":   {0, 1, nil, 0, 1}, // an answer without a status settles nothing
	} {
		s.mu.Lock()
		s.arrived = nil
		s.mu.Unlock()
		store := newIntents()
		transport := client.New(&http.Transport{DisableKeepAlives: true}, quick(func(o *client.Options) { o.Intents = store }))
		_, err := store.Save(t.Context(), &client.Intent{
			Key: idempotency.Key{Value: "mine"}, Method: "POST", URL: s.server.URL + path, Header: http.Header{"Content-Type": {"text/plain"}}, Body: []byte("body"),
		})
		if err != nil {
			t.Fatal(err)
		}
		var resumed *client.Resumed
		report, err := transport.Resume(t.Context(), func(_ context.Context, r *client.Resumed) error {
			resumed = r
			if store.count() != 1 {
				t.Errorf("%s was forgotten before it was handled", path)
			}
			return one.handleErr
		})
		if !errors.Is(err, one.handleErr) || report.Settled != one.settled || report.Kept != one.kept || store.count() != one.kept {
			t.Errorf("%s: report is %+v, %v; %d are left", path, report, err, store.count())
		}
		if one.status > 0 && (resumed.Response == nil || resumed.Response.StatusCode != one.status || resumed.Err != nil) {
			t.Errorf("%s: resumed with %+v, %v", path, resumed.Response, resumed.Err)
		}
		if one.status == 0 {
			expectError(t, resumed.Err, idempotency.OutcomeUnknown, nil)
		}
		arrived := s.requests()
		if len(arrived) != one.requests {
			t.Errorf("%s: %d requests arrived, want %d", path, len(arrived), one.requests)
		}
		for _, r := range arrived {
			if r.key != `"mine"` || r.body != "body" || r.header.Get("Content-Type") != "text/plain" || r.method != "POST" {
				t.Errorf("%s arrived as %+v", path, r)
			}
		}
	}
}

// TestResumeLeavesAlone: intents in progress, abandoned since they were listed, or too old are not
// sent.
func TestResumeLeavesAlone(t *testing.T) {
	t.Parallel()
	inside, goOn := make(chan struct{}), make(chan struct{})
	s := newScript(t, func(_ int, w http.ResponseWriter, _ *http.Request) {
		close(inside)
		<-goOn
		say(w, 201, "executed")
	})
	store := newIntents()
	transport := client.New(&http.Transport{DisableKeepAlives: true}, quick(func(o *client.Options) { o.Intents, o.IntentAgeMax = store, time.Hour }))
	var group sync.WaitGroup
	group.Go(func() {
		if _, _, err := post(t, &http.Client{Transport: transport}, t.Context(), s.server.URL, "body"); err != nil {
			t.Error(err)
		}
	})
	<-inside
	if report, err := transport.Resume(t.Context(), nil); err != nil || report != (client.Report{}) {
		t.Errorf("what is under way was resumed: %+v, %v", report, err)
	}
	close(goOn)
	group.Wait()

	save := func() {
		if _, err := store.Save(t.Context(), &client.Intent{Key: idempotency.Key{Value: "old"}, Method: "POST", URL: s.server.URL}); err != nil {
			t.Fatal(err)
		}
	}
	save()
	store.before = func(call string) {
		if call == "take" {
			store.forget("old")
		}
	}
	if report, err := transport.Resume(t.Context(), nil); err != nil || report != (client.Report{}) {
		t.Errorf("what was abandoned was resumed: %+v, %v", report, err)
	}
	store.before = nil
	save()
	// The second intent comes from the future, so its age is unknown.
	for _, age := range []time.Duration{time.Hour, -client.IntentSkewMax - time.Minute} {
		store.age = age
		report, err := transport.Resume(t.Context(), func(_ context.Context, r *client.Resumed) error {
			expectError(t, r.Err, idempotency.OutcomeUnknown, client.ErrIntentTooOld)
			return nil
		})
		if err != nil || report.Kept != 1 || store.count() != 1 || len(s.requests()) != 1 {
			t.Errorf("at %v report is %+v, %v; %d requests arrived", age, report, err, len(s.requests()))
		}
	}
	if _, err := client.New(nil, nil).Resume(t.Context(), nil); err == nil {
		t.Error("Resume without a store has a report")
	}
	store.fail["pending"] = errFailing
	if _, err := transport.Resume(t.Context(), nil); !errors.Is(err, errFailing) {
		t.Errorf("Resume of a store that fails ended with %v", err)
	}
}

// TestResumeSpellsTheKeyAsBefore: for a server that does not parse strings of RFC 8941 the two
// spellings of a key are two keys.
func TestResumeSpellsTheKeyAsBefore(t *testing.T) {
	t.Parallel()
	for _, bare := range []bool{false, true} {
		for _, header := range []string{`mine`, `"mine"`} {
			s := newScript(t, each("lost", "lost", "201 executed"))
			transport := client.New(&http.Transport{DisableKeepAlives: true}, quick(func(o *client.Options) {
				o.Intents, o.AttemptsMax, o.BareKeys = newIntents(), 2, bare
			}))
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.server.URL, strings.NewReader("body"))
			if err != nil {
				t.Fatal(err)
			}
			r.Header.Set(client.HeaderKey, header)
			_, err = transport.RoundTrip(r)
			expectError(t, err, idempotency.OutcomeUnknown, client.ErrAttemptsSpent)
			if report, err := transport.Resume(t.Context(), nil); err != nil || report.Settled != 1 {
				t.Errorf("report is %+v, %v", report, err)
			}
			for _, arrived := range s.requests() {
				if arrived.key != s.requests()[0].key {
					t.Errorf("with BareKeys %t the key %s was sent as %s, then as %s", bare, header, s.requests()[0].key, arrived.key)
				}
			}
		}
	}
}

// TestIntentsInPostgreSQLAreResumed: another store, like another process, resumes them, with one
// effect.
func TestIntentsInPostgreSQLAreResumed(t *testing.T) {
	t.Parallel()
	service := onPostgreSQL(t)
	if err := pgintent.Create(t.Context(), service.pool, nil); err != nil {
		t.Fatal(err)
	}
	const requests = 12
	first := newClient(t, quick(func(o *client.Options) { o.AttemptsMax, o.Intents = 1, pgintent.New(service.pool, nil) }))
	left := 0
	for range requests {
		if _, _, err := post(t, first, t.Context(), service.url, "body"); err != nil {
			expectError(t, err, idempotency.OutcomeUnknown, client.ErrAttemptsSpent)
			left++
		}
	}
	second := client.New(&http.Transport{DisableKeepAlives: true}, quick(func(o *client.Options) {
		o.AttemptsMax, o.Unbudgeted, o.Intents = 50, true, pgintent.New(service.pool, &pgintent.Options{PendingAfter: 1000})
	}))
	report, err := second.Resume(t.Context(), nil)
	if err != nil || report != (client.Report{Settled: left}) || left == 0 {
		t.Errorf("of %d intents: %+v, %v", left, report, err)
	}
	if n := service.effects(); n != requests {
		t.Errorf("%d requests had %d effects", requests, n)
	}
}
