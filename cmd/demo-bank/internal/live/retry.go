package live

import (
	"bytes"
	"io"
	"math/rand/v2"
	"net/http"
	"time"
)

const (
	backoffFirst = 10 * time.Millisecond
	backoffMax   = 200 * time.Millisecond
)

// client is a good client: it sends a request again, with the same key, until it has a definite answer or its context
// ends.
func (l *Live) client(base http.RoundTripper) *http.Client {
	return &http.Client{Transport: &retrying{base}}
}

type retrying struct{ base http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (t *retrying) RoundTrip(r *http.Request) (*http.Response, error) {
	body, err := readAll(r.Body)
	if err != nil {
		return nil, err
	}
	for backoff := backoffFirst; ; backoff = min(2*backoff, backoffMax) {
		attempt := r.Clone(r.Context())
		attempt.Body, attempt.GetBody, attempt.ContentLength = io.NopCloser(bytes.NewReader(body)), nil, int64(len(body))
		response, err := t.base.RoundTrip(attempt)
		if err == nil && definite(response) {
			return response, nil
		}
		if err == nil {
			_ = response.Body.Close() // nobody reads it
		}
		select {
		case <-r.Context().Done():
			return nil, r.Context().Err()
		case <-time.After(backoff/2 + rand.N(backoff)): // or all would come back at once
		}
	}
}

// definite reports whether asking again would be pointless.
func definite(r *http.Response) bool {
	switch r.Header.Get("Idempotency-Status") {
	case "executed", "replayed", "mismatch":
		return true
	case "in-progress", "unknown":
		return false
	}
	return r.StatusCode < 500 && r.StatusCode != http.StatusTooManyRequests
}
