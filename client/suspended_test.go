package client_test

import (
	"context"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
)

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
