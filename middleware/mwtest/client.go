package mwtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
)

// Reply is an answer as a client sees it.
type Reply struct {
	Status  int
	Header  http.Header
	Body    string
	Outcome string // Idempotency-Status
}

// String returns all but the headers.
func (r Reply) String() string {
	return fmt.Sprintf("%d %q, Idempotency-Status %q", r.Status, r.Body, r.Outcome)
}

// content is the request's body, with a token that the handler has to see.
const content = `{"amount":100,"token":"mwtest-1"}`

// Send sends a request to a service that was made by [New] and is mounted at url, with these values
// of Idempotency-Key, each in a header line of its own. Unlike the cases of the suite, it accepts an
// answer that the middleware did not write.
func (s *Service) Send(url string, do Behavior, keys ...string) Reply {
	s.t.Helper()
	got, err := s.request(s.t.Context(), url, string(do), strings.NewReader(content), keys...)
	if err != nil {
		s.t.Fatalf("POST %s: %v", do, err)
	}
	return got
}

// send sends a request, and checks that the middleware answered.
func (s *Service) send(ctx context.Context, url, do string, body io.Reader, keys ...string) (Reply, error) {
	got, err := s.request(ctx, url, do, body, keys...)
	if n := len(got.Header["Idempotency-Status"]); err == nil && n != 1 {
		return Reply{}, fmt.Errorf("the answer %v has %d headers Idempotency-Status, want 1: the middleware did not write it", got, n)
	}
	return got, err
}

func (s *Service) request(ctx context.Context, url, do string, body io.Reader, keys ...string) (Reply, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, strings.TrimSuffix(url, "/")+Prefix+do, body)
	if err != nil {
		return Reply{}, err
	}
	r.GetBody = nil // otherwise Go's client resends keyed requests by itself
	r.Header.Set("Content-Type", "application/json")
	r.Header["Idempotency-Key"] = keys
	response, err := s.client.Do(r)
	if errors.Is(err, io.EOF) {
		err = fmt.Errorf("the middleware closes the conn if the handler has answered on the writer outside of it: %w", err)
	}
	if err != nil {
		return Reply{}, err
	}
	defer func() { _ = response.Body.Close() }()
	all, err := io.ReadAll(response.Body)
	if err != nil {
		return Reply{}, fmt.Errorf("the answer ended early: %w", err)
	}
	return Reply{response.StatusCode, response.Header, string(all), response.Header.Get("Idempotency-Status")}, nil
}
