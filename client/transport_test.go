package client_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/memory"
)

// TestAnswersAreActedUpon has the rows of the table in docs/client.md. want is the caller's answer,
// or the outcome of its error.
func TestAnswersAreActedUpon(t *testing.T) {
	t.Parallel()
	for _, one := range []struct {
		answers  string // comma-separated, the last one for ever
		requests int
		want     string
	}{
		{"201 executed", 1, "201 executed"},
		{"201 replayed", 1, "201 replayed"},
		{"402 executed", 1, "402 executed"},
		{"503 executed", 1, "503 executed"},
		{"422 mismatch", 1, "422 mismatch"},
		{"409 in-progress,201 replayed", 2, "201 replayed"},
		{"503 unknown,201 executed", 2, "201 executed"},
		{"403 unknown", 4, "unknown"},
		{"409 in-progress", 4, "unknown"},
		{"503 something-new", 4, "unknown"},
		{"503 not-executed,500 not-executed,429 not-executed,201 executed", 4, "201 executed"},
		{"503 not-executed", 4, "not-executed"},
		{"408 not-executed", 4, "not-executed"},
		{"499 not-executed", 4, "not-executed"},
		{"425 not-executed", 4, "not-executed"},
		{"409 not-executed", 4, "not-executed"},
		{"400 not-executed", 1, "400 not-executed"},
		{"401 not-executed", 1, "401 not-executed"},
		{"413 not-executed", 1, "413 not-executed"},
		{"503 not-executed,404 not-executed", 2, "404 not-executed"},
		// Once an attempt may have been executed, not-executed of a later one does not end the
		// call.
		{"lost,401 not-executed,201 replayed", 3, "201 replayed"},
		{"lost,503 not-executed", 4, "unknown"},
		{"503 unknown,400 not-executed", 4, "unknown"},
		{"409 in-progress,404 not-executed", 4, "unknown"},
		{"503 not-executed,lost,503 not-executed", 4, "unknown"},
		{"lost", 4, "unknown"},
		{"lost,lost,lost,201 replayed", 4, "201 replayed"},
		// Without Idempotency-Status nothing is proven, and a success is not requested again.
		{"502", 4, "unknown"},
		{"429,201 executed", 2, "201 executed"},
		{"504,503 not-executed", 4, "unknown"},
		{"404", 1, "404 "},
		{"200", 1, "200 "},
		{"302", 1, "302 "},
		{"lost,401,201 replayed", 3, "201 replayed"},
		{"lost,200", 2, "200 "},
		// A redirect is no success. A client that follows it sends another request with another
		// key.
		{"lost,307,201 replayed", 3, "201 replayed"},
		{"lost,302", 4, "unknown"},
	} {
		t.Run(one.answers, func(t *testing.T) {
			t.Parallel()
			s := newScript(t, each(strings.Split(one.answers, ",")...))
			c := newClient(t, quick())
			c.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
			response, _, err := post(t, c, t.Context(), s.server.URL, "body")
			got := ""
			var e *client.Error
			if errors.As(err, &e) {
				got = string(e.Outcome)
			} else if err == nil {
				got = fmt.Sprintf("%d %s", response.StatusCode, response.Header.Get("Idempotency-Status"))
			}
			arrived := s.requests()
			if got != one.want || len(arrived) != one.requests {
				t.Errorf("after %d requests the caller got %q (%v), want %q after %d", len(arrived), got, err, one.want, one.requests)
			}
			for _, r := range arrived {
				if r.key != arrived[0].key || r.body != "body" || r.header.Get("Content-Type") != "text/plain" {
					t.Errorf("a retry is another request: %+v, first %+v", r, arrived[0])
				}
			}
			if e != nil && (e.Attempts != one.requests || `"`+e.Key.Value+`"` != arrived[0].key || time.Since(e.Started) > time.Minute) {
				t.Errorf("the error says %d attempts, key %q, started %v", e.Attempts, e.Key.Value, e.Started)
			}
		})
	}
}

// TestRedirectAfterALostReplyPaysOnce: http.Client follows a 307 with another request, which has
// another key.
func TestRedirectAfterALostReplyPaysOnce(t *testing.T) {
	t.Parallel()
	s := newScript(t, func(n int, w http.ResponseWriter, r *http.Request) {
		switch n {
		case 1: // it was executed
			lose()
		case 2: // something in front of the server
			http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
		default:
			say(w, 201, "replayed")
		}
	})
	if _, _, err := post(t, newClient(t, quick()), t.Context(), s.server.URL, "body"); err != nil {
		t.Error(err)
	}
	for _, r := range s.requests() {
		if r.key != s.requests()[0].key {
			t.Errorf("the same thing was asked for with keys %s and %s", s.requests()[0].key, r.key)
		}
	}
}

// TestTwoStatusesProveNothing: an intermediary added its own, and which one is the server's is
// unknown.
func TestTwoStatusesProveNothing(t *testing.T) {
	t.Parallel()
	for _, statuses := range [][]string{{"not-executed", "unknown"}, {"unknown", "not-executed"}, {"executed", "not-executed"}, {"Not-Executed"}} {
		s := newScript(t, func(_ int, w http.ResponseWriter, _ *http.Request) {
			w.Header()["Idempotency-Status"] = statuses
			w.WriteHeader(503)
		})
		_, _, err := post(t, newClient(t, quick()), t.Context(), s.server.URL, "body")
		expectError(t, err, idempotency.OutcomeUnknown, client.ErrAttemptsSpent)
	}
}

// TestBodyThatDidNotArriveIsSentAgain: this 400 is the only one that the network causes.
func TestBodyThatDidNotArriveIsSentAgain(t *testing.T) {
	t.Parallel()
	s := newScript(t, func(n int, w http.ResponseWriter, _ *http.Request) {
		if n == 1 {
			w.Header().Set("Content-Type", "application/problem+json")
			w.Header().Set("Idempotency-Status", "not-executed")
			w.WriteHeader(400)
			_, _ = io.WriteString(w, `{"type":"https://example.org/problems#body-unread"}`)
			return
		}
		say(w, 201, "executed")
	})
	response, _, err := post(t, newClient(t, quick()), t.Context(), s.server.URL, "body")
	if err != nil || response.StatusCode != 201 {
		t.Errorf("answer is %v, %v", response, err)
	}
}

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

func TestOtherMethodsPassUntouched(t *testing.T) {
	t.Parallel()
	s := newScript(t, each("503"))
	c := newClient(t, quick(func(o *client.Options) { o.Methods = []string{"PUT"} }))
	for _, method := range []string{"GET", "HEAD", "OPTIONS", "TRACE", "QUERY", "POST", "DELETE"} {
		before := len(s.requests())
		r, err := http.NewRequestWithContext(t.Context(), method, s.server.URL, nil)
		if err != nil {
			t.Fatal(err)
		}
		response, err := c.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		_ = response.Body.Close()
		if arrived := s.requests()[before:]; len(arrived) != 1 || arrived[0].key != "" {
			t.Errorf("%s arrived as %+v", method, arrived)
		}
	}
	r, err := http.NewRequestWithContext(t.Context(), "PUT", s.server.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Do(r)
	expectError(t, err, idempotency.OutcomeUnknown, nil)
}

// TestErrorNeverShowsTheKey in any verb, nor does a value that contains the error.
func TestErrorNeverShowsTheKey(t *testing.T) {
	t.Parallel()
	s := newScript(t, each("lost"))
	var mu sync.Mutex
	var events []client.Event
	c := newClient(t, quick(func(o *client.Options) {
		o.Trace = func(_ context.Context, e client.Event) {
			mu.Lock()
			defer mu.Unlock()
			events = append(events, e)
		}
	}))
	key := uuid.NewString()
	_, _, err := post(t, c, client.WithKey(t.Context(), key), s.server.URL, "body")
	e := expectError(t, err, idempotency.OutcomeUnknown, nil)
	intent := client.Intent{Key: e.Key, Body: []byte("secret body")}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x"} {
		for _, value := range []any{err, e, *e, events, intent, &intent} {
			if text := fmt.Sprintf(verb, value); strings.Contains(text, key) || strings.Contains(text, "secret") || strings.Contains(text, fmt.Sprintf("%x", key)) {
				t.Errorf("%s of a %T shows the key: %s", verb, value, text)
			}
		}
	}
	if e.Key.Value != key {
		t.Errorf("the error carries %q", e.Key.Value)
	}
	if _, err := intent.MarshalJSON(); err == nil {
		t.Error("an intent has JSON")
	}
}

// TestEvents: the trace of a request that loses a reply, waits, and is answered.
func TestEvents(t *testing.T) {
	t.Parallel()
	s := newScript(t, each("lost", "409 in-progress", "201 replayed"))
	type name struct{}
	var kinds []string
	c := newClient(t, quick(func(o *client.Options) {
		o.Trace = func(ctx context.Context, e client.Event) {
			if ctx.Value(name{}) != "x" || e.Key.Value != "mine" {
				t.Errorf("event of another request: %+v", e)
			}
			kinds = append(kinds, fmt.Sprintf("%s %d %d %s", e.Kind, e.Attempt, e.Status, e.Outcome))
		}
	}))
	if _, _, err := post(t, c, client.WithKey(context.WithValue(t.Context(), name{}, "x"), "mine"), s.server.URL, "body"); err != nil {
		t.Fatal(err)
	}
	want := "started 1 0 ,lost 1 0 ,waiting 1 0 ,started 2 0 ,answered 2 409 in-progress,waiting 2 0 ,started 3 0 ,answered 3 201 replayed,ended 3 201 replayed"
	if got := strings.Join(kinds, ","); got != want {
		t.Errorf("events are\n%s, want\n%s", got, want)
	}
}

// TestServerThatDoesNotHonourKeys: after a lost reply a request is not sent again before the route
// has shown that it honours keys, nor after an answer without Idempotency-Status.
func TestServerThatDoesNotHonourKeys(t *testing.T) {
	t.Parallel()
	s := newScript(t, each("lost", "503", "201 executed", "lost", "201 replayed", "200", "lost"))
	c := newClient(t, quick(func(o *client.Options) { o.Honours = nil }))
	send := func(path string) (*http.Response, error) {
		response, _, err := post(t, c, t.Context(), s.server.URL+path, "body")
		return response, err
	}
	_, err := send("/a")
	expectError(t, err, idempotency.OutcomeUnknown, client.ErrNotHonoured)
	if response, err := send("/a"); err != nil || response.StatusCode != 503 { // unchanged
		t.Errorf("answer is %v, %v", response, err)
	}
	if _, err := send("/a"); err != nil { // executed: now the route is known
		t.Error(err)
	}
	if response, err := send("/a"); err != nil || response.Header.Get("Idempotency-Status") != "replayed" {
		t.Errorf("the lost reply was not asked for again: %v, %v", response, err)
	}
	if response, err := send("/a"); err != nil || response.StatusCode != 200 {
		t.Errorf("answer is %v, %v", response, err)
	}
	_, err = send("/a") // the 200 had no status
	expectError(t, err, idempotency.OutcomeUnknown, client.ErrNotHonoured)
	_, err = send("/b") // never seen
	expectError(t, err, idempotency.OutcomeUnknown, client.ErrNotHonoured)
	if n := len(s.requests()); n != 8 {
		t.Errorf("%d requests arrived, want 8", n)
	}
}

// TestNobodyThere: no connection was made, so nothing was executed, whatever the server is.
func TestNobodyThere(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := "http://" + listener.Addr().String()
	_ = listener.Close()
	_, _, err = post(t, newClient(t, quick(func(o *client.Options) { o.Honours = nil })), t.Context(), address, "body")
	if e := expectError(t, err, idempotency.OutcomeNotExecuted, client.ErrAttemptsSpent); e.Attempts != 4 {
		t.Errorf("there were %d attempts", e.Attempts)
	}
}

// TestUnseenAttemptIsCounted: net/http sends a request without a body twice by itself if a kept
// connection breaks. The first may have been executed, and not-executed of the second proves
// nothing about it.
func TestUnseenAttemptIsCounted(t *testing.T) {
	t.Parallel()
	var posts atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Method == http.MethodGet:
			say(w, 200, "")
		case posts.Add(1) == 1:
			lose() // and it may have been executed
		default:
			say(w, 503, "not-executed")
		}
	}))
	defer server.Close()
	c := newClient(t, quick(func(o *client.Options) { o.AttemptsMax = 1 }))
	warm, err := c.Get(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, warm.Body)
	_ = warm.Body.Close()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Do(r)
	if e := expectError(t, err, idempotency.OutcomeUnknown, client.ErrAttemptsSpent); e.Attempts != 1 || posts.Load() != 2 {
		t.Errorf("%d attempts, %d requests: net/http did not do what this is about", e.Attempts, posts.Load())
	}
}

// TestRequestIsSentOnceByNetHTTP: net/http can't repeat a request with a body, because it does not
// get GetBody.
func TestRequestIsSentOnceByNetHTTP(t *testing.T) {
	t.Parallel()
	s := newScript(t, each("201 executed", "lost", "201 replayed"))
	var started atomic.Int64
	c := newClient(t, quick(func(o *client.Options) {
		o.Trace = func(_ context.Context, e client.Event) {
			if e.Kind == client.EventStarted {
				started.Add(1)
			}
		}
	}))
	for range 2 {
		if _, _, err := post(t, c, t.Context(), s.server.URL, "body"); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(s.requests()); int64(n) != started.Load() || n != 3 {
		t.Errorf("%d requests arrived, %d were started", n, started.Load())
	}
}

// TestBodies: the same bytes are sent again, up to the limit; a longer body only with GetBody.
func TestBodies(t *testing.T) {
	t.Parallel()
	const limit = 1000
	fits, over := strings.Repeat("b", limit), strings.Repeat("b", limit+1)
	stream := func(s string) io.Reader { return io.MultiReader(strings.NewReader(s)) } // of unknown length, without GetBody
	for name, one := range map[string]struct {
		body io.Reader
		want string
		err  error
	}{
		"at the limit":                  {strings.NewReader(fits), fits, nil},
		"at the limit, a stream":        {stream(fits), fits, nil},
		"over the limit, with GetBody":  {strings.NewReader(over), over, nil},
		"over the limit, a stream":      {stream(over), "", client.ErrBodyTooLarge},
		"empty stream":                  {stream(""), "", nil},
		"none":                          {nil, "", nil},
		"a body that can't be read":     {io.MultiReader(strings.NewReader("b"), failing{}), "", errFailing},
		"another length than announced": {nil, "", nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newScript(t, each("lost", "503 unknown", "201 executed"))
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.server.URL, one.body)
			if err != nil {
				t.Fatal(err)
			}
			response, err := newClient(t, quick(func(o *client.Options) { o.BodyBytesMax = limit })).Do(r)
			if one.err != nil {
				expectError(t, err, idempotency.OutcomeNotExecuted, one.err)
				if n := len(s.requests()); n != 0 {
					t.Errorf("%d requests arrived", n)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			_ = response.Body.Close()
			for _, arrived := range s.requests() {
				if arrived.body != one.want {
					t.Errorf("a body of %d bytes arrived, want %d", len(arrived.body), len(one.want))
				}
			}
			if n := len(s.requests()); n != 3 {
				t.Errorf("%d requests arrived, want 3", n)
			}
		})
	}
}

var errFailing = errors.New("no more")

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errFailing }

// closing notes that a body was closed.
type closing struct {
	io.Reader
	closed *atomic.Int64
}

func (c closing) Close() error {
	c.closed.Add(1)
	return nil
}

func TestBodyIsClosedAndAsLongAsAnnounced(t *testing.T) {
	t.Parallel()
	s := newScript(t, each("201 executed"))
	c := newClient(t, quick())
	for _, one := range []struct {
		length int64
		ctx    context.Context
		sent   int
	}{{4, t.Context(), 1}, {5, t.Context(), 0}, {1<<20 + 1, t.Context(), 0}, {4, client.WithKey(t.Context(), "a b"), 0}} {
		before := len(s.requests())
		var closed atomic.Int64
		r, err := http.NewRequestWithContext(one.ctx, http.MethodPost, s.server.URL, closing{strings.NewReader("body"), &closed})
		if err != nil {
			t.Fatal(err)
		}
		r.ContentLength = one.length
		response, err := c.Transport.RoundTrip(r)
		if err == nil {
			_ = response.Body.Close()
		} else {
			expectError(t, err, idempotency.OutcomeNotExecuted, nil)
		}
		if n := len(s.requests()) - before; n != one.sent || closed.Load() == 0 {
			t.Errorf("length %d: %d requests arrived, the body was closed %d times", one.length, n, closed.Load())
		}
	}
}

// TestAnswerThatBreaksOffIsLost up to the limit for reading answers. Beyond it the caller reads the
// rest.
func TestAnswerThatBreaksOffIsLost(t *testing.T) {
	t.Parallel()
	const limit = 64 << 10
	for name, one := range map[string]struct {
		length, cut int // of the first answer's body, and the offset at which the connection breaks
		requests    int
		readErr     bool
	}{
		"whole, at the limit":        {limit, limit, 1, false},
		"whole, over the limit":      {limit + 1, limit + 1, 1, false},
		"cut at once":                {limit, 0, 2, false},
		"cut before the limit":       {limit, limit - 1, 2, false},
		"cut far beyond the limit":   {4 * limit, 3 * limit, 1, true},
		"over, and cut before it is": {4 * limit, limit / 2, 2, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newScript(t, func(n int, w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Idempotency-Status", "executed")
				if n > 1 {
					_, _ = io.WriteString(w, "replay")
					return
				}
				w.Header().Set("Content-Length", fmt.Sprint(one.length))
				_, _ = w.Write(bytes.Repeat([]byte("a"), one.cut))
				if one.cut < one.length {
					_ = http.NewResponseController(w).Flush()
					lose()
				}
			})
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.server.URL, strings.NewReader("body"))
			if err != nil {
				t.Fatal(err)
			}
			response, err := newClient(t, quick(func(o *client.Options) { o.AnswerBytesMax = limit })).Do(r)
			if err != nil {
				t.Fatal(err)
			}
			content, err := io.ReadAll(response.Body)
			if closeErr := response.Body.Close(); closeErr != nil {
				t.Error(closeErr)
			}
			if (err != nil) != one.readErr || len(s.requests()) != one.requests {
				t.Errorf("%d requests; the caller read %d bytes: %v", len(s.requests()), len(content), err)
			}
			if one.requests == 1 && !one.readErr && len(content) != one.length {
				t.Errorf("the caller read %d bytes of %d", len(content), one.length)
			}
		})
	}
}

// TestAnswerThatNeverEndsIsLost: a byte comes now and then. The attempt's time bounds it, and all
// attempts have one key.
func TestAnswerThatNeverEndsIsLost(t *testing.T) {
	t.Parallel()
	s := newScript(t, func(_ int, w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Idempotency-Status", "executed")
		for tick := time.NewTicker(time.Millisecond); ; {
			_, _ = io.WriteString(w, "x") // the client leaves
			_ = http.NewResponseController(w).Flush()
			select {
			case <-tick.C:
			case <-r.Context().Done():
				tick.Stop()
				return
			}
		}
	})
	c := newClient(t, quick(func(o *client.Options) { o.AttemptTimeout, o.AttemptsMax = 50*time.Millisecond, 3 }))
	_, _, err := post(t, c, t.Context(), s.server.URL, "body")
	expectError(t, err, idempotency.OutcomeUnknown, client.ErrAttemptTimedOut)
	for _, r := range s.requests() {
		if r.key != s.requests()[0].key {
			t.Errorf("keys %s and %s", r.key, s.requests()[0].key)
		}
	}
}

// TestCompressedAnswerTakesWhatItMay: 64 MB of zeros are 64 kB on the wire. An answer is read up to
// AnswerBytesMax, unpacked.
func TestCompressedAnswerTakesWhatItMay(t *testing.T) { // not parallel: it measures what is allocated
	const attempts, announced, most = 3, 64 << 20, 1 << 20
	zeros := make([]byte, 1<<20)
	var packed strings.Builder
	z := gzip.NewWriter(&packed)
	for range announced / len(zeros) {
		if _, err := z.Write(zeros); err != nil {
			t.Fatal(err)
		}
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	s := newScript(t, func(_ int, w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		w.Header().Set("Idempotency-Status", "unknown")
		w.WriteHeader(http.StatusServiceUnavailable)
		_, _ = io.WriteString(w, packed.String()) // the client leaves
	})
	c := newClient(t, quick(func(o *client.Options) { o.AnswerBytesMax, o.AttemptsMax = most, attempts }))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, _, err := post(t, c, t.Context(), s.server.URL, "body")
	runtime.ReadMemStats(&after)
	expectError(t, err, idempotency.OutcomeUnknown, client.ErrAttemptsSpent)
	if mb := (after.TotalAlloc - before.TotalAlloc) >> 20; mb > attempts*16*most>>20 {
		t.Errorf("%d MB were allocated for %d answers of which %d MB may be read", mb, attempts, most>>20)
	}
}

// TestCompressedAnswerIsWhatTheBaseMakesOfIt: the base unpacks it if it asked for it, and leaves it
// alone otherwise.
func TestCompressedAnswerIsWhatTheBaseMakesOfIt(t *testing.T) {
	t.Parallel()
	var packed strings.Builder
	z := gzip.NewWriter(&packed)
	_, _ = io.WriteString(z, `{"id":1}`) // in memory
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	s := newScript(t, func(_ int, w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		w.Header().Set("Idempotency-Status", "executed")
		w.WriteHeader(http.StatusCreated)
		_, _ = io.WriteString(w, packed.String())
	})
	for left, want := range map[bool]string{false: `{"id":1}`, true: packed.String()} {
		base := &http.Transport{DisableCompression: left}
		t.Cleanup(base.CloseIdleConnections)
		response, body, err := post(t, &http.Client{Transport: client.New(base, quick())}, t.Context(), s.server.URL, "body")
		if err != nil {
			t.Fatal(err)
		}
		if encoding := response.Header.Get("Content-Encoding"); body != want || response.Uncompressed == left || (encoding == "gzip") != left {
			t.Errorf("%q, unpacked %t, Content-Encoding %q", body, response.Uncompressed, encoding)
		}
	}
}

// TestRedirectsInACircleEnd, as http.Client ends them. Nothing is retried.
func TestRedirectsInACircleEnd(t *testing.T) {
	t.Parallel()
	s := newScript(t, func(n int, w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, fmt.Sprint("/", n), http.StatusTemporaryRedirect)
	})
	_, _, err := post(t, newClient(t, quick()), t.Context(), s.server.URL, "body")
	if n := len(s.requests()); err == nil || n != 10 {
		t.Errorf("%d requests, %v", n, err)
	}
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

// TestConnectionThatWasClosedWhileIdleLosesNothing: a balancer closes idle connections. Each
// request is served once, and answered.
func TestConnectionThatWasClosedWhileIdleLosesNothing(t *testing.T) {
	t.Parallel()
	var served atomic.Int64
	var mu sync.Mutex
	var conns []net.Conn
	closed := make(chan struct{}, 10)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		served.Add(1)
		say(w, 201, "executed")
	}))
	server.Config.ConnState = func(conn net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			mu.Lock()
			conns = append(conns, conn)
			mu.Unlock()
		case http.StateIdle:
			_ = conn.Close()
			closed <- struct{}{}
		}
	}
	server.Start()
	t.Cleanup(server.Close)
	c := newClient(t, quick())
	const requests = 3
	for range requests {
		if _, _, err := post(t, c, t.Context(), server.URL, "body"); err != nil {
			t.Fatal(err)
		}
		<-closed
	}
	mu.Lock()
	defer mu.Unlock()
	if served.Load() != requests || len(conns) != requests {
		t.Errorf("%d requests were served over %d connections, want %d", served.Load(), len(conns), requests)
	}
}

// TestRequestThatStoodStillIsNotSentAgain: a process may be stopped during a pause for longer than
// the server keeps a key. If it sent the request again, it would be executed again.
func TestRequestThatStoodStillIsNotSentAgain(t *testing.T) {
	t.Parallel()
	for name, stopped := range map[string]time.Duration{"within TotalMax": 9 * time.Second, "past TotalMax": 25 * time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			sent := 0
			transport := client.New(canned(func(r *http.Request) (*http.Response, error) {
				if sent++; sent == 2 {
					return answerOf(r, 201, "Idempotency-Status", "executed"), nil
				}
				return answerOf(r, 503, "Idempotency-Status", "unknown"), nil
			}), &client.Options{
				Honours: client.Everywhere, TotalMax: 10 * time.Second, BackoffFirst: 1, BackoffMax: 1,
				Trace: func(_ context.Context, e client.Event) {
					if e.Kind == client.EventWaiting {
						time.Sleep(stopped) // the request's goroutine stands still, and all clocks go on
					}
				},
			})
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://bank.example/", strings.NewReader("body"))
			if err != nil {
				t.Fatal(err)
			}
			response, err := transport.RoundTrip(r)
			if stopped < 10*time.Second {
				if err != nil || response.StatusCode != 201 || sent != 2 {
					t.Errorf("%s: sent %d times: %v", name, sent, err)
				}
				return
			}
			if sent != 1 {
				t.Errorf("%s: sent %d times", name, sent)
			}
			expectError(t, err, idempotency.OutcomeUnknown, client.ErrTimeSpent)
		})
	}
}
