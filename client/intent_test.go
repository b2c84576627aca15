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

// TestIntentKeepsNoCredential: an intent has no credential, and everything that the server
// compares.
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
