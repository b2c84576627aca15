package client_test

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency/client"
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
