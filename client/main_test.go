package client_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/internal/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// request is a request as a server received it.
type request struct {
	method string
	key    string // the header as received
	body   string
	header http.Header
}

// script is a server with the answers that the test prescribes. It notes each request. Its answers
// follow the middleware's contract; transport_test.go also has the answers of the middleware
// itself.
type script struct {
	t       *testing.T
	server  *httptest.Server
	answer  func(n int, w http.ResponseWriter, r *http.Request) // of the n-th request, from 1
	mu      sync.Mutex
	arrived []request
}

func newScript(t *testing.T, answer func(n int, w http.ResponseWriter, r *http.Request)) *script {
	t.Helper()
	s := &script{t: t, answer: answer}
	s.server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body) // a body that breaks off is noted up to there
		s.mu.Lock()
		s.arrived = append(s.arrived, request{r.Method, r.Header.Get(client.HeaderKey), string(body), r.Header.Clone()})
		n := len(s.arrived)
		s.mu.Unlock()
		s.answer(n, w, r)
	}))
	t.Cleanup(s.server.Close)
	return s
}

func (s *script) requests() []request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.arrived[:len(s.arrived):len(s.arrived)]
}

// say answers with a status and an outcome, which may be empty.
func say(w http.ResponseWriter, status int, outcome string) {
	if outcome != "" {
		w.Header().Set("Idempotency-Status", outcome)
	}
	w.WriteHeader(status)
	_, _ = io.WriteString(w, "answer "+outcome)
}

// lose breaks the connection in place of an answer.
func lose() { panic(http.ErrAbortHandler) }

// each answers "status outcome" in turn, or breaks the connection for "lost". The last one repeats.
func each(answers ...string) func(int, http.ResponseWriter, *http.Request) {
	return func(n int, w http.ResponseWriter, _ *http.Request) {
		answer := answers[min(n, len(answers))-1]
		if answer == "lost" {
			lose()
		}
		var status int
		var outcome string
		_, _ = fmt.Sscan(answer, &status, &outcome) // an outcome may be missing
		say(w, status, outcome)
	}
}

// quick are options with short pauses and timeouts.
func quick(change ...func(*client.Options)) *client.Options {
	o := &client.Options{
		Honours: client.Everywhere, BackoffFirst: time.Millisecond, BackoffMax: 2 * time.Millisecond, RetryAfterMax: time.Millisecond, AttemptsMax: 4,
	}
	for _, f := range change {
		f(o)
	}
	return o
}

// newClient returns an http.Client over a Transport with connections that no other test uses.
func newClient(t *testing.T, o *client.Options) *http.Client {
	t.Helper()
	transport := client.New(&http.Transport{MaxIdleConnsPerHost: 64}, o)
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

func post(t *testing.T, c *http.Client, ctx context.Context, url, body string) (*http.Response, string, error) {
	t.Helper()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "text/plain")
	response, err := c.Do(r)
	if err != nil {
		return nil, "", err
	}
	defer func() { _ = response.Body.Close() }() // it is in memory
	content, err := io.ReadAll(response.Body)
	if err != nil {
		t.Error(err)
	}
	return response, string(content), nil
}

// expectError requires an *Error of the given outcome.
func expectError(t *testing.T, err error, outcome idempotency.Outcome, why error) *client.Error {
	t.Helper()
	var e *client.Error
	if !errors.As(err, &e) {
		t.Fatalf("error is %v, want an *Error", err)
	}
	if e.Outcome != outcome || errors.Is(err, client.ErrNotExecuted) != (outcome == idempotency.OutcomeNotExecuted) ||
		errors.Is(err, client.ErrUnknown) != (outcome == idempotency.OutcomeUnknown) {
		t.Errorf("outcome is %s: %v; want %s", e.Outcome, err, outcome)
	}
	if why != nil && !errors.Is(err, why) {
		t.Errorf("error is %v, want one that wraps %v", err, why)
	}
	return e
}
