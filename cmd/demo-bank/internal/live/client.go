package live

import (
	"net/http"
	"time"

	"github.com/paidonce/idempotency/client"
)

// newClient returns the client that pays on both sides: it sends a request again, with the same key, until it knows what
// became of it. That it believes every route to honour keys is what costs the unprotected side its money.
func newClient(base http.RoundTripper) *http.Client {
	return &http.Client{Transport: client.New(base, &client.Options{
		Honours:      client.Everywhere,
		BackoffFirst: 10 * time.Millisecond, BackoffMax: 200 * time.Millisecond, RetryAfterMax: 40 * time.Millisecond, // a storm is short
		TotalMax: StormMax, AttemptsMax: attemptsMax, Unbudgeted: true,
	})}
}

// attemptsMax is how often one copy is sent at most.
const attemptsMax = 200
