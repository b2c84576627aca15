package client_test

import (
	"errors"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
)

// TestOutageIsNotAmplified: the retries of all requests together are at most a share of the
// requests, plus a floor.
func TestOutageIsNotAmplified(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const requests, burst = 1000, 50
		var mu sync.Mutex
		attempts, spent := 0, 0
		transport := client.New(canned(func(r *http.Request) (*http.Response, error) {
			mu.Lock()
			defer mu.Unlock()
			attempts++
			return unavailable(r), nil
		}), &client.Options{BackoffFirst: 1, BackoffMax: 1, AttemptsMax: 4, RetryBurst: burst, RetryPercent: 20, RetriesPerSecond: 10})
		send := func() {
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://bank.example/", nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, err = transport.RoundTrip(r); errors.Is(err, client.ErrRetriesSpent) {
				expectError(t, err, idempotency.OutcomeNotExecuted, nil)
				spent++
			}
		}
		for range requests { // within a few microseconds of the bubble's time
			send()
		}
		if retries := attempts - requests; retries < burst+requests*20/100-1 || retries > burst+requests*20/100+1 || spent == 0 {
			t.Errorf("%d requests were retried %d times, and %d had no retry left", requests, retries, spent)
		}
		time.Sleep(time.Second) // the floor
		attempts = 0
		for range 20 {
			send()
		}
		if retries := attempts - 20; retries < 10+4-1 || retries > 10+4+1 {
			t.Errorf("20 requests a second later were retried %d times, want ten and a share of 20 %%", retries)
		}
		time.Sleep(time.Hour) // only the burst is saved up
		attempts = 0
		for range 100 {
			send()
		}
		if retries := attempts - 100; retries < burst+20-1 || retries > burst+20+1 {
			t.Errorf("100 requests an hour later were retried %d times", retries)
		}
	})
}

func TestRoutesAreForgottenOverTheLimit(t *testing.T) {
	t.Parallel()
	answered := map[string]bool{}
	transport := client.New(canned(func(r *http.Request) (*http.Response, error) {
		if answered[r.URL.Path] {
			return nil, errFailing
		}
		answered[r.URL.Path] = true
		return answerOf(r, 201, "Idempotency-Status", "executed"), nil
	}), &client.Options{BackoffFirst: 1, BackoffMax: 1, AttemptsMax: 2, Unbudgeted: true})
	send := func(i int) error {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://bank.example/"+strings.Repeat("r", i), nil)
		if err != nil {
			t.Fatal(err)
		}
		_, err = transport.RoundTrip(r)
		return err
	}
	unknown := func(n int) (forgotten int) {
		for i := range n {
			if errors.Is(send(i), client.ErrNotHonoured) {
				forgotten++
			}
		}
		return forgotten
	}
	for i := range client.RoutesMax {
		if err := send(i); err != nil {
			t.Fatal(err)
		}
	}
	if n := unknown(client.RoutesMax); n != 0 {
		t.Errorf("at the limit %d routes are forgotten", n)
	}
	if err := send(client.RoutesMax); err != nil {
		t.Fatal(err)
	}
	if n := unknown(client.RoutesMax + 1); n != 1 {
		t.Errorf("over the limit %d routes are forgotten, want 1", n)
	}
}
