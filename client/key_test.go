package client_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/memory"
)

func TestKeys(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	for name, one := range map[string]struct {
		ctx    context.Context
		header string
		bare   bool
		sent   string // a regular expression
	}{
		"minted":                     {ctx, "", false, `^"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"$`},
		"minted, bare":               {ctx, "", true, `^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f-]+$`},
		"the request's own":          {ctx, "mine", false, `^mine$`},
		"the request's own, quoted":  {ctx, `"mine"`, true, `^"mine"$`},
		"of the context":             {client.WithKey(ctx, "mine"), "", false, `^"mine"$`},
		"new, of the context, bare":  {client.WithNewKey(ctx, "mine"), "", true, `^mine$`},
		"the request's own wins":     {client.WithKey(ctx, "context"), "mine", false, `^mine$`},
		"with a backslash, escaped":  {client.WithKey(ctx, `a\b`), "", false, `^"a\\\\b"$`},
		"of as many as there may be": {client.WithKey(ctx, strings.Repeat("k", idempotency.KeyBytesMax)), "", true, `^k{255}$`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newScript(t, each("201 executed"))
			c := newClient(t, quick(func(o *client.Options) { o.BareKeys = one.bare }))
			r, err := http.NewRequestWithContext(one.ctx, http.MethodPost, s.server.URL, strings.NewReader("body"))
			if err != nil {
				t.Fatal(err)
			}
			if one.header != "" {
				r.Header.Set(client.HeaderKey, one.header)
			}
			response, err := c.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			_ = response.Body.Close()
			sent := s.requests()[0].key
			if !regexp.MustCompile(one.sent).MatchString(sent) {
				t.Errorf("the key was sent as %s", sent)
			}
			want := strings.ReplaceAll(strings.Trim(sent, `"`), `\\`, `\`)
			if got := client.KeyFrom(response); got != want {
				t.Errorf("KeyFrom is %q, want %q", got, want)
			}
			if one.header == "" && r.Header.Get(client.HeaderKey) != "" {
				t.Error("the caller's request was changed")
			}
		})
	}
	if client.KeyFrom(nil) != "" || client.KeyFrom(&http.Response{}) != "" {
		t.Error("there is a key where there was no request")
	}
}

func TestMintedKeysAreNew(t *testing.T) {
	t.Parallel()
	s := newScript(t, each("201 executed"))
	c := newClient(t, quick())
	seen := map[string]bool{}
	for range 20 {
		response, _, err := post(t, c, t.Context(), s.server.URL, "body")
		if err != nil {
			t.Fatal(err)
		}
		seen[client.KeyFrom(response)] = true
	}
	if len(seen) != 20 {
		t.Errorf("20 requests had %d keys", len(seen))
	}
}

// TestBadKeysAreNotSent: no server would accept them, so it is proven that nothing was executed.
func TestBadKeysAreNotSent(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(r *http.Request) *http.Request{
		"empty":   func(r *http.Request) *http.Request { return r.WithContext(client.WithKey(r.Context(), "")) },
		"a space": func(r *http.Request) *http.Request { return r.WithContext(client.WithNewKey(r.Context(), "a b")) },
		"too long": func(r *http.Request) *http.Request {
			return r.WithContext(client.WithKey(r.Context(), strings.Repeat("k", 256)))
		},
		"two":       func(r *http.Request) *http.Request { r.Header[client.HeaderKey] = []string{"a", "b"}; return r },
		"unclosed":  func(r *http.Request) *http.Request { r.Header.Set(client.HeaderKey, `"a`); return r },
		"a quote":   func(r *http.Request) *http.Request { r.Header.Set(client.HeaderKey, `"a"b"`); return r },
		"an escape": func(r *http.Request) *http.Request { r.Header.Set(client.HeaderKey, `"a\x"`); return r },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newScript(t, each("201 executed"))
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.server.URL, strings.NewReader("body"))
			if err != nil {
				t.Fatal(err)
			}
			_, err = newClient(t, quick()).Do(change(r))
			expectError(t, err, idempotency.OutcomeNotExecuted, idempotency.ErrKeyInvalid)
			if n := len(s.requests()); n != 0 {
				t.Errorf("%d requests arrived", n)
			}
		})
	}
}

// TestOwnKeyIsNeverProvenNotExecuted: another call may have sent it, unless the caller promises
// that it is new.
func TestOwnKeyIsNeverProvenNotExecuted(t *testing.T) {
	t.Parallel()
	s := newScript(t, each("503 not-executed"))
	c := newClient(t, quick())
	_, _, err := post(t, c, client.WithKey(t.Context(), "mine"), s.server.URL, "body")
	if e := expectError(t, err, idempotency.OutcomeUnknown, client.ErrAttemptsSpent); e.Key.Value != "mine" || e.Status != 503 || e.Last != idempotency.OutcomeNotExecuted {
		t.Errorf("error says %q %d %s", e.Key.Value, e.Status, e.Last)
	}
	r, err := http.NewRequestWithContext(client.WithNewKey(t.Context(), "not this one"), http.MethodPost, s.server.URL, strings.NewReader("body"))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set(client.HeaderKey, "mine")
	_, err = c.Do(r)
	expectError(t, err, idempotency.OutcomeUnknown, client.ErrAttemptsSpent)
	_, _, err = post(t, c, client.WithNewKey(t.Context(), "mine"), s.server.URL, "body")
	expectError(t, err, idempotency.OutcomeNotExecuted, client.ErrAttemptsSpent)
}

// TestKeyOfAContextIsForOneRequest: a second request with the context has the same key. The server
// refuses it, and it is not executed in place of the first.
func TestKeyOfAContextIsForOneRequest(t *testing.T) {
	t.Parallel()
	var paths []string
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		paths = append(paths, r.URL.Path)
		w.WriteHeader(http.StatusCreated)
	})
	account := func(*http.Request) (string, error) { return "acme", nil }
	server := httptest.NewServer(middleware.New(memory.New(nil), account, nil).Handler(handler))
	t.Cleanup(server.Close)
	c := newClient(t, quick())
	ctx := client.WithKey(t.Context(), "order-1")
	if response, _, err := post(t, c, ctx, server.URL+"/customers", "body"); err != nil || response.StatusCode != http.StatusCreated {
		t.Fatal(response, err)
	}
	response, _, err := post(t, c, ctx, server.URL+"/charges", "body")
	if err != nil || response.StatusCode != http.StatusUnprocessableEntity || response.Header.Get("Idempotency-Status") != "mismatch" {
		t.Errorf("%v, %v", response, err)
	}
	if len(paths) != 1 {
		t.Errorf("executed: %q", paths)
	}
}
