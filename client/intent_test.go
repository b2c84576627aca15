package client_test

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
)

// intents are a store in memory with calls that fail if a test says so. It is for tests of the
// Transport; the stores themselves are tested in their packages.
type intents struct {
	mu     sync.Mutex
	kept   map[string]*client.Intent
	order  []string
	calls  []string
	fail   map[string]error  // by method
	before func(call string) // runs before a call
	age    time.Duration     // of every intent that Take returns
}

func newIntents() *intents {
	return &intents{kept: map[string]*client.Intent{}, fail: map[string]error{}}
}

func (s *intents) call(name string) error {
	if s.before != nil {
		s.before(name)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = append(s.calls, name)
	return s.fail[name]
}

func (s *intents) Save(_ context.Context, i *client.Intent) (bool, error) {
	if err := s.call("save"); err != nil {
		return false, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	key := i.Key.Value
	if _, was := s.kept[key]; was {
		return true, nil
	}
	kept := *i
	kept.SavedAt = time.Now()
	s.kept[key], s.order = &kept, append(s.order, key)
	return false, nil
}

func (s *intents) forget(key string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, was := s.kept[key]
	delete(s.kept, key)
	s.order = slices.DeleteFunc(s.order, func(k string) bool { return k == key })
	return was
}

func (s *intents) Done(_ context.Context, key string) error {
	if err := s.call("done"); err != nil {
		return err
	}
	s.forget(key)
	return nil
}

func (s *intents) Abandon(_ context.Context, key string) error {
	if err := s.call("abandon"); err != nil {
		return err
	}
	if !s.forget(key) {
		return client.ErrIntentTaken
	}
	return nil
}

func (s *intents) Pending(context.Context) ([]string, error) {
	if err := s.call("pending"); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.order), nil
}

func (s *intents) Take(_ context.Context, key string) (*client.Intent, error) {
	if err := s.call("take"); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	kept, was := s.kept[key]
	if !was {
		return nil, nil
	}
	taken := *kept
	taken.SavedAt = taken.SavedAt.Add(-s.age)
	return &taken, nil
}

func (s *intents) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.kept)
}

// TestIntentIsSavedBeforeAndForgottenAfter: an intent is saved before its request is sent, and
// forgotten if the end of the request allows it.
func TestIntentIsSavedBeforeAndForgottenAfter(t *testing.T) {
	t.Parallel()
	failure := errors.New("disk")
	for name, one := range map[string]struct {
		answers  string
		own      bool // the key is the caller's own
		isNew    bool // and the caller promises that the key was never sent
		kept     bool // the intent was kept before the call
		fail     string
		err      error
		calls    string
		left     int
		requests int
		outcome  idempotency.Outcome // of the error; empty: there is an answer
	}{
		"executed":                        {answers: "201 executed", calls: "save,done", requests: 1},
		"mismatch":                        {answers: "422 mismatch", calls: "save,done", requests: 1},
		"an answer about the request":     {answers: "401 not-executed", calls: "save,abandon", requests: 1},
		"no word of it":                   {answers: "404", calls: "save,abandon", requests: 1},
		"not executed":                    {answers: "503 not-executed", calls: "save,abandon", requests: 4, outcome: idempotency.OutcomeNotExecuted},
		"unknown":                         {answers: "lost", calls: "save", left: 1, requests: 4, outcome: idempotency.OutcomeUnknown},
		"own key, not executed":           {answers: "503 not-executed", own: true, calls: "save", left: 1, requests: 4, outcome: idempotency.OutcomeUnknown},
		"own key, about the request":      {answers: "401 not-executed", own: true, calls: "save,abandon", requests: 1},
		"kept before, about the request":  {answers: "401 not-executed", own: true, kept: true, calls: "save", left: 1, requests: 4, outcome: idempotency.OutcomeUnknown},
		"kept before, whatever is said":   {answers: "503 not-executed", own: true, isNew: true, kept: true, calls: "save", left: 1, requests: 4, outcome: idempotency.OutcomeUnknown},
		"kept before, executed":           {answers: "201 executed", own: true, kept: true, calls: "save,done", requests: 1},
		"save is refused":                 {fail: "save", err: client.ErrIntentRefused, calls: "save", outcome: idempotency.OutcomeNotExecuted},
		"save fails, and may have saved":  {fail: "save", err: failure, calls: "save,abandon", outcome: idempotency.OutcomeUnknown},
		"done fails":                      {answers: "201 executed", fail: "done", err: failure, calls: "save,done", left: 1, requests: 1},
		"abandon fails":                   {answers: "503 not-executed", fail: "abandon", err: failure, calls: "save,abandon", left: 1, requests: 4, outcome: idempotency.OutcomeUnknown},
		"somebody has taken it":           {answers: "503 not-executed", fail: "abandon", err: client.ErrIntentTaken, calls: "save,abandon", left: 1, requests: 4, outcome: idempotency.OutcomeUnknown},
		"taken, and about the request":    {answers: "401 not-executed", fail: "abandon", err: client.ErrIntentTaken, calls: "save,abandon", left: 1, requests: 1, outcome: idempotency.OutcomeUnknown},
		"the last of several is executed": {answers: "lost,503 unknown,409 in-progress,201 replayed", calls: "save,done", requests: 4},
		"lost, then about the request":    {answers: "lost,401 not-executed", calls: "save", left: 1, requests: 4, outcome: idempotency.OutcomeUnknown},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newScript(t, each(strings.Split(one.answers, ",")...))
			store := newIntents()
			if one.fail != "" {
				store.fail[one.fail] = one.err
			}
			store.before = func(call string) {
				if call == "save" && len(s.requests()) > 0 {
					t.Error("a request was sent before its intent was saved")
				}
			}
			ctx := t.Context()
			if one.own {
				ctx = client.WithKey(ctx, "mine")
			}
			if one.isNew {
				ctx = client.WithNewKey(ctx, "mine")
			}
			if one.kept {
				store.kept["mine"] = &client.Intent{Key: idempotency.Key{Value: "mine"}}
			}
			_, _, err := post(t, newClient(t, quick(func(o *client.Options) { o.Intents = store })), ctx, s.server.URL, "body")
			if one.outcome != "" {
				expectError(t, err, one.outcome, one.err)
			} else if err != nil {
				t.Error(err)
			}
			if got := strings.Join(store.calls, ","); got != one.calls || store.count() != one.left || len(s.requests()) != one.requests {
				t.Errorf("calls %s, want %s; %d intents are left, want %d; %d requests, want %d",
					got, one.calls, store.count(), one.left, len(s.requests()), one.requests)
			}
		})
	}
}

// TestIntentKeepsNoCredential, and keeps everything that the server compares.
func TestIntentKeepsNoCredential(t *testing.T) {
	t.Parallel()
	s := newScript(t, each("lost"))
	store := newIntents()
	c := newClient(t, quick(func(o *client.Options) {
		o.Intents, o.AttemptsMax, o.IntentHeaders = store, 1, []string{"x-order"}
	}))
	address := strings.Replace(s.server.URL, "http://", "http://user:password@", 1) + "/transfers?dry=1#part"
	r, err := http.NewRequestWithContext(client.WithKey(t.Context(), "mine"), http.MethodPatch, address, strings.NewReader("body"))
	if err != nil {
		t.Fatal(err)
	}
	r.Host = "bank.example"
	for _, name := range []string{"Content-Type", "Authorization", "Cookie", "Proxy-Authorization", "X-Api-Key", "X-Order"} {
		r.Header.Set(name, name+" value")
	}
	_, err = c.Do(r)
	expectError(t, err, idempotency.OutcomeUnknown, nil)
	kept := store.kept["mine"]
	if kept.Method != "PATCH" || kept.URL != s.server.URL+"/transfers?dry=1" || kept.Host != "bank.example" || string(kept.Body) != "body" {
		t.Errorf("kept is %s %s %s %s", kept.Method, kept.URL, kept.Host, kept.Body)
	}
	if len(kept.Header) != 2 || kept.Header.Get("Content-Type") == "" || kept.Header.Get("X-Order") == "" {
		t.Errorf("headers %v are kept", kept.Header)
	}
}

// TestResume sends pending intents unchanged, until they are settled, and reports each.
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
	for _, age := range []time.Duration{time.Hour, -client.IntentSkewMax - time.Minute} { // the age of the second is unknown
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
