package client_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/effect"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/middleware"
)

// pending answers "202 pending" with a Location, and a body that says so.
func pending(w http.ResponseWriter, state string, locations ...string) {
	for _, location := range locations {
		w.Header().Add("Location", location)
	}
	w.Header().Set("Idempotency-Status", "pending")
	operation(w, http.StatusAccepted, state)
}

func operation(w http.ResponseWriter, status int, state string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = fmt.Fprintf(w, `{"id":"x","status":%q}`, state)
}

// polled is a server that answers a request with pending, until a poll says that the operation is
// done. It answers the polls in turn, and repeats the last answer.
func polled(polls ...func(w http.ResponseWriter)) func(int, http.ResponseWriter, *http.Request) {
	var mu sync.Mutex
	done, n := false, 0
	return func(_ int, w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		switch {
		case r.Method == http.MethodPost && done:
			say(w, http.StatusCreated, "replayed")
		case r.Method == http.MethodPost:
			pending(w, "pending", "/v1/operations/x")
		default:
			poll := polls[min(n, len(polls)-1)]
			n++
			if done = poll == nil; done {
				operation(w, http.StatusOK, "done")
				return
			}
			poll(w)
		}
	}
}

func stillPending(w http.ResponseWriter) { operation(w, http.StatusOK, "pending") }

func methods(requests []request) string {
	var names []string
	for _, r := range requests {
		names = append(names, r.method)
	}
	return strings.Join(names, " ")
}

// postAs sends a request with a caller's headers.
func postAs(t *testing.T, c *http.Client, url string, headers http.Header) (*http.Response, error) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader("body"))
	if err != nil {
		t.Fatal(err)
	}
	r.Header = headers.Clone()
	response, err := c.Do(r)
	if err == nil {
		t.Cleanup(func() { _ = response.Body.Close() })
	}
	return response, err
}

func TestPendingIsPolledUntilItIsDone(t *testing.T) {
	t.Parallel()
	for _, prefers := range []bool{false, true} {
		t.Run(fmt.Sprint(prefers), func(t *testing.T) {
			t.Parallel()
			s := newScript(t, polled(stillPending, stillPending, nil))
			c := newClient(t, quick(func(o *client.Options) { o.PreferAsync = prefers }))
			response, err := postAs(t, c, s.server.URL+"/v1/topups?x=1", http.Header{
				"Account": {"acme"}, "Authorization": {"Bearer token"}, "Content-Type": {"text/plain"}, "If-Match": {"1"}, "Prefer": {"wait=1"},
			})
			if err != nil || response.StatusCode != http.StatusCreated || response.Header.Get("Idempotency-Status") != "replayed" {
				t.Fatalf("%+v, %v", response, err)
			}
			arrived := s.requests()
			if got := methods(arrived); got != "POST GET GET GET POST" {
				t.Fatalf("it sent %s", got)
			}
			for _, r := range arrived {
				if r.header.Get("Account") != "acme" || r.header.Get("Authorization") != "Bearer token" {
					t.Errorf("%s without its caller: %v", r.method, r.header)
				}
				if r.method == http.MethodGet && (r.key != "" || r.body != "" || r.header.Get("Content-Type") != "" || r.header.Get("If-Match") != "" || r.header.Get("Prefer") != "" || r.header.Get("Accept") != "application/json") {
					t.Errorf("a poll with the headers of the request: %v %q", r.header, r.body)
				}
				if want := "wait=1 respond-async"; r.method == http.MethodPost && slices.Contains(r.header["Prefer"], "respond-async") != prefers || r.method == http.MethodPost && prefers && strings.Join(r.header["Prefer"], " ") != want {
					t.Errorf("Prefer is %q", r.header["Prefer"])
				}
			}
			if arrived[4].key != arrived[0].key || arrived[4].body != "body" {
				t.Errorf("the last is another request: %+v", arrived[4])
			}
		})
	}
}

// If a poll gives no certain state, the next attempt sends the request again.
func TestPollThatFailsSettlesNothing(t *testing.T) {
	t.Parallel()
	for name, poll := range map[string]func(w http.ResponseWriter){
		"404":       func(w http.ResponseWriter) { http.Error(w, "not found", http.StatusNotFound) },
		"503":       func(w http.ResponseWriter) { http.Error(w, "outage", http.StatusServiceUnavailable) },
		"done, 500": func(w http.ResponseWriter) { operation(w, http.StatusInternalServerError, "done") },
		"half an answer": func(w http.ResponseWriter) {
			w.Header().Set("Content-Length", "1000")
			operation(w, http.StatusOK, "done")
		},
		"another word": func(w http.ResponseWriter) { operation(w, http.StatusOK, "sleeping") },
		"no JSON":      func(w http.ResponseWriter) { _, _ = io.WriteString(w, `{"status":"done"}`) },
		"a redirect": func(w http.ResponseWriter) {
			w.Header().Set("Location", "http://evil.invalid/")
			w.WriteHeader(http.StatusFound)
		},
		"an outcome of its own": func(w http.ResponseWriter) {
			w.Header().Set("Idempotency-Status", "not-executed")
			operation(w, http.StatusBadRequest, "done")
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newScript(t, func(n int, w http.ResponseWriter, r *http.Request) {
				switch {
				case r.Method == http.MethodGet:
					poll(w)
				case n == 1:
					pending(w, "pending", "/x")
				default:
					say(w, http.StatusCreated, "replayed")
				}
			})
			response, err := postAs(t, newClient(t, quick()), s.server.URL, nil)
			if err != nil || response.StatusCode != http.StatusCreated {
				t.Errorf("%+v, %v", response, err)
			}
			if got := methods(s.requests()); got != "POST GET POST" {
				t.Errorf("it sent %s", got)
			}
			// It was an attempt of its own.
			s = newScript(t, func(_ int, w http.ResponseWriter, r *http.Request) {
				if r.Method == http.MethodGet {
					poll(w)
					return
				}
				pending(w, "pending", "/x")
			})
			_, err = postAs(t, newClient(t, quick(func(o *client.Options) { o.AttemptsMax = 2 })), s.server.URL, nil)
			expectError(t, err, idempotency.OutcomeUnknown, client.ErrAttemptsSpent)
			if got := methods(s.requests()); got != "POST GET" {
				t.Errorf("with two attempts it sent %s", got)
			}
		})
	}
}

// Credentials go to the server of the request and to no other.
func TestPollGoesToTheServerOfTheRequest(t *testing.T) {
	t.Parallel()
	evil := newScript(t, func(_ int, w http.ResponseWriter, _ *http.Request) { operation(w, http.StatusOK, "done") })
	host := strings.TrimPrefix(evil.server.URL, "http://")
	for name, c := range map[string]struct {
		locations []string
		polls     bool
	}{
		"a path":             {[]string{"/v1/operations/x"}, true},
		"a relative path":    {[]string{"operations/x"}, true},
		"itself":             {[]string{"http://SELF/v1/operations/x"}, true},
		"itself, a fragment": {[]string{"http://SELF/v1/operations/x#there"}, true},
		"another port":       {[]string{evil.server.URL + "/v1/operations/x"}, false},
		"without a scheme":   {[]string{"//" + host + "/v1/operations/x"}, false},
		"another scheme":     {[]string{"https://SELF/v1/operations/x"}, false},
		"a user":             {[]string{"http://user:word@SELF/v1/operations/x"}, false},
		"itself as a user":   {[]string{"http://SELF@" + host + "/x"}, false},
		"no URL":             {[]string{"http://[/x"}, false},
		"no server":          {[]string{"mailto:x"}, false},
		"two":                {[]string{"/x", "/y"}, false},
		"none":               {nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newScript(t, func(n int, w http.ResponseWriter, r *http.Request) {
				switch {
				case r.Method == http.MethodGet:
					operation(w, http.StatusOK, "done")
				case n == 1:
					var locations []string
					for _, location := range c.locations {
						locations = append(locations, strings.ReplaceAll(location, "SELF", r.Host))
					}
					pending(w, "pending", locations...)
				default:
					say(w, http.StatusCreated, "replayed")
				}
			})
			lost := 0 // polls that reach no server
			options := quick(func(o *client.Options) {
				o.Trace = func(_ context.Context, e client.Event) {
					if e.Kind == client.EventLost {
						lost++
					}
				}
			})
			response, err := postAs(t, newClient(t, options), s.server.URL+"/v1/topups", http.Header{"Authorization": {"Bearer token"}})
			if err != nil || response.StatusCode != http.StatusCreated || lost > 0 {
				t.Errorf("%+v, %v, %d lost", response, err, lost)
			}
			want := "POST POST"
			if c.polls {
				want = "POST GET POST"
			}
			if got := methods(s.requests()); got != want {
				t.Errorf("it sent %s, want %s", got, want)
			}
		})
	}
	t.Cleanup(func() {
		if n := len(evil.requests()); n > 0 {
			t.Errorf("another server got %d requests", n)
		}
	})
}

func TestRequestThatNeedsAPersonIsNotAskedForAgain(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		answer func(int, http.ResponseWriter, *http.Request)
		sent   string
	}{
		"at once": {func(_ int, w http.ResponseWriter, _ *http.Request) { pending(w, "needs-attention", "/x") }, "POST"},
		"later":   {polled(stillPending, func(w http.ResponseWriter) { operation(w, http.StatusOK, "needs-attention") }), "POST GET GET"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newScript(t, c.answer)
			_, err := postAs(t, newClient(t, quick()), s.server.URL, nil)
			e := expectError(t, err, idempotency.OutcomeUnknown, client.ErrNeedsAttention)
			if !e.Accepted || e.Last != idempotency.OutcomePending || e.Status != http.StatusAccepted {
				t.Errorf("%+v", e)
			}
			if got := methods(s.requests()); got != c.sent {
				t.Errorf("it sent %s", got)
			}
		})
	}
}

// Polls are attempts: they are bounded, wait for Retry-After, and end with the state that is known.
func TestPollsAreBounded(t *testing.T) {
	t.Parallel()
	s := newScript(t, polled(func(w http.ResponseWriter) {
		w.Header().Set("Retry-After", "60")
		stillPending(w)
	}))
	const least = 20 * time.Millisecond
	var pauses []time.Duration
	c := newClient(t, quick(func(o *client.Options) {
		o.AttemptsMax, o.RetryAfterMax = 4, least
		o.Trace = func(_ context.Context, e client.Event) {
			if e.Kind == client.EventWaiting {
				pauses = append(pauses, e.Pause)
			}
		}
	}))
	_, err := postAs(t, c, s.server.URL, nil)
	e := expectError(t, err, idempotency.OutcomeUnknown, client.ErrAttemptsSpent)
	if !e.Accepted || e.Attempts != 4 || !strings.Contains(e.Error(), "accepted") {
		t.Errorf("%+v", e)
	}
	if got := methods(s.requests()); got != "POST GET GET GET" {
		t.Errorf("it sent %s", got)
	}
	if len(pauses) != 3 || pauses[1] < least || pauses[2] < least {
		t.Errorf("it paused %v", pauses)
	}
	// The last poll may find the answer.
	s = newScript(t, polled(stillPending, stillPending, nil))
	if response, err := postAs(t, newClient(t, quick()), s.server.URL, nil); err != nil || response.StatusCode != http.StatusCreated {
		t.Errorf("%+v, %v", response, err)
	}
}

// A status resource takes only as much memory and time as an answer may.
func TestPollTakesWhatAnAnswerMay(t *testing.T) {
	t.Parallel()
	const head, tail = `{"status":"done","answer":"`, `"}`
	const limit = 1000
	// At the limit the poll says that it is done, so the request is sent in the same attempt.
	for size, want := range map[int]string{limit: "POST GET POST", limit + 1: "POST GET"} {
		s := newScript(t, func(_ int, w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPost {
				pending(w, "pending", "/x")
				return
			}
			w.Header().Set("Content-Type", "application/json")
			_, _ = io.WriteString(w, head+strings.Repeat("a", size-len(head)-len(tail))+tail)
		})
		_, err := postAs(t, newClient(t, quick(func(o *client.Options) { o.AnswerBytesMax, o.AttemptsMax = limit, 2 })), s.server.URL, nil)
		expectError(t, err, idempotency.OutcomeUnknown, client.ErrAttemptsSpent)
		if got := methods(s.requests()); got != want {
			t.Errorf("%d bytes: it sent %s", size, got)
		}
	}
	hung := make(chan struct{})
	s := newScript(t, func(n int, w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Method == http.MethodGet:
			<-hung
		case n == 1:
			pending(w, "pending", "/x")
		default:
			say(w, http.StatusCreated, "replayed")
		}
	})
	t.Cleanup(func() { close(hung) })
	if response, err := postAs(t, newClient(t, quick(func(o *client.Options) { o.AttemptTimeout = time.Second })), s.server.URL, nil); err != nil || response.StatusCode != http.StatusCreated {
		t.Errorf("%+v, %v", response, err)
	}
}

// A pending answer settles no intent, and Resume goes on through the status resource.
func TestPendingSettlesNoIntent(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	done, polledSince := false, false
	s := newScript(t, func(_ int, w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		switch {
		case r.Method == http.MethodGet && done:
			polledSince = true
			operation(w, http.StatusOK, "done")
		case r.Method == http.MethodGet:
			stillPending(w)
		case done && polledSince:
			say(w, http.StatusCreated, "replayed")
		default:
			pending(w, "pending", "/x")
		}
	})
	kept := newIntents()
	transport := client.New(nil, quick(func(o *client.Options) { o.Intents, o.PreferAsync = kept, true }))
	t.Cleanup(transport.CloseIdleConnections)
	_, err := postAs(t, &http.Client{Transport: transport}, s.server.URL, nil)
	e := expectError(t, err, idempotency.OutcomeUnknown, client.ErrAttemptsSpent)
	intent := kept.kept[e.Key.Value]
	if !e.Accepted || intent == nil || intent.Header.Get("Prefer") != "" {
		t.Fatalf("%v, kept %v", e, intent)
	}
	mu.Lock()
	done = true
	mu.Unlock()
	before := len(s.requests())
	var resumed *client.Resumed
	report, err := transport.Resume(t.Context(), func(_ context.Context, r *client.Resumed) error { resumed = r; return nil })
	if err != nil || report.Settled != 1 || resumed == nil || resumed.Response == nil || len(kept.kept) != 0 {
		t.Errorf("%+v, %v, %+v", report, err, resumed)
	}
	if got := s.requests()[before:]; got[0].header.Get("Prefer") != "respond-async" || got[0].key != `"`+e.Key.Value+`"` {
		t.Errorf("it resumed with %+v", got[0])
	}
}

// The client and the middleware, with a processor that loses replies and a completer: one charge,
// and the answer with its headers, byte by byte.
func TestPendingThroughTheMiddleware(t *testing.T) {
	t.Parallel()
	service := testservice.New(t, nil)
	var mu sync.Mutex
	charges, asked := map[string]bool{}, 0
	charge := effect.New("charge", effect.Effect[int, string]{
		Do: func(_ context.Context, key string, _ int) (string, error) {
			mu.Lock()
			defer mu.Unlock()
			charges[key] = true
			if asked++; asked < 3 {
				return "", errors.New("connection reset by peer")
			}
			return "ch_1", nil
		},
	})
	status := middleware.NewStatus("/v1/operations/", []byte(strings.Repeat("s", 32)))
	idem := middleware.New(service.Store, func(r *http.Request) (string, error) { return r.Header.Get("Account"), nil },
		&middleware.Options{Resumable: "topup/1", Accepted: status, BackoffMax: 20 * time.Millisecond})
	mux := http.NewServeMux()
	mux.Handle("POST /v1/topups", idem.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, err := charge.Call(r.Context(), 5)
		if err != nil {
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Location", "/v1/topups/1")
		w.WriteHeader(http.StatusCreated)
		_, _ = fmt.Fprintf(w, "{ \"charge\": %q }\n", id)
	})))
	mux.Handle("GET /v1/operations/{id}", status)
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	t.Cleanup(func() { stop(); <-ended })
	go func() {
		defer close(ended)
		idem.Completer(&idempotency.CompleterOptions{Interval: 20 * time.Millisecond}).Run(ctx)
	}()

	var outcomes []string
	c := newClient(t, &client.Options{
		Honours: client.Everywhere, PreferAsync: true, AttemptsMax: 1000, BackoffMax: 100 * time.Millisecond, RetryAfterMax: time.Millisecond,
		Trace: func(_ context.Context, e client.Event) {
			if e.Kind == client.EventAnswered {
				outcomes = append(outcomes, string(e.Outcome))
			}
		},
	})
	response, err := postAs(t, c, server.URL+"/v1/topups", http.Header{"Account": {"acme"}, "Content-Type": {"application/json"}})
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != http.StatusCreated || string(body) != "{ \"charge\": \"ch_1\" }\n" || response.Header.Get("Location") != "/v1/topups/1" {
		t.Errorf("%d %s %v, %v", response.StatusCode, body, response.Header, err)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(charges) != 1 || outcomes[0] != "pending" || outcomes[len(outcomes)-1] != "replayed" {
		t.Errorf("%d charges, outcomes %v", len(charges), outcomes)
	}
}
