package live

import (
	"net/http"
	"time"

	"github.com/paidonce/idempotency/client"
)

// newClient returns the client that pays on both sides: it repeats a request with the same key
// until it gets a definite answer. It assumes that every route honours keys. That is wrong on the
// unprotected side, and costs it money.
func newClient(base http.RoundTripper) *http.Client {
	return &http.Client{Transport: client.New(base, &client.Options{
		Honours: client.Everywhere,
		// A storm is short.
		BackoffFirst: 10 * time.Millisecond, BackoffMax: 200 * time.Millisecond, RetryAfterMax: 40 * time.Millisecond,
		TotalMax: StormMax, AttemptsMax: attemptsMax, Unbudgeted: true,
	})}
}

// attemptsMax is the maximum number of times that one copy is sent.
const attemptsMax = 200
