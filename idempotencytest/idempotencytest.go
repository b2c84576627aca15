// Package idempotencytest runs your handler and your store through crashes and storms of
// duplicates, from your test, and asks your own tables whether each request had its effect once:
//
//	func TestOrdersOutliveCrashes(t *testing.T) {
//		store := openTestStore(t) // postgres.Open, migrations.Up
//		idempotencytest.Run(t, idempotencytest.Config{
//			Store:   store,
//			New:     func(store idempotency.Store) http.Handler { return newRouter(store) },
//			Request: func(n int) *http.Request { return newOrder("acme", n) },
//			Invariant: func(ctx context.Context, told idempotencytest.Told) error {
//				return countOrders(ctx, store.Pool(), len(told.Acknowledged))
//			},
//		})
//	}
//
// It serves the handler on a real port of this machine. It sends requests like a client that
// follows the table in docs/guarantees.md: it keeps its key, and gives up only if it may.
//
// # The parts of a run
//
//   - Crash/<point>: keys with a first attempt that is hit at that point, one subtest for each
//     point
//   - Storm: many keys, each sent by several clients at once and again later, with changed bodies,
//     clients that hang up or give up, and all points mixed
//   - Scope: the same key from two callers, if Config.Other is set
//   - Replay: each key that has its final answer, once more
//
// After each part it waits until nothing is in flight, looks each key up in the store, and calls
// the invariant. A point that was never hit fails its subtest.
//
// # The points
//
//	before_begin           the store is unavailable
//	after_begin            the key is claimed
//	mid_handler            the handler's context ends at one of its uses, which differs by key
//	handler_canceled       the same, but the process lives on
//	after_handler          the handler has returned
//	before_commit          COMMIT was not sent
//	mid_commit             COMMIT's context ends at one of its uses, which differs by key
//	commit_canceled        the same, but the process lives on
//	commit_never_arrived   COMMIT is lost on its way; the process lives on
//	commit_lost            COMMIT happened, its reply is lost; the process lives on
//	resolving              the same, and the process dies while it looks for the COMMIT
//	unresolvable           COMMIT or its reply is lost, and the lookup fails: the client gets unknown
//	after_commit           nothing was sent to the client
//	half_response          half of the answer's body was sent
//
// If Config.Declined is set: also before_decline, mid_decline, decline_never_arrived, decline_lost
// and after_decline.
//
// If the handler makes calls (package effect) or has phases (postgres.Phase), also:
//
//	before_intent          the intent's COMMIT, or a phase's, was not sent
//	intent_never_arrived   that COMMIT is lost on its way; the process lives on
//	intent_lost            that COMMIT happened, its reply is lost; the process lives on
//	before_send            the intent or the phase is committed, and nothing was sent
//	after_reply            the other service has answered, and nothing of the result was recorded
//	result_never_arrived   the result's COMMIT is lost on its way; the process lives on
//	result_lost            that COMMIT happened, its reply is lost; the process lives on
//	after_result           the result is committed
//	replaced               another process has taken the request over, before the result's COMMIT
//	take_over              the request was left open, and the process that took it over dies
//
// # Handlers that make calls
//
// A retry of its client continues an open request. If Config.Resume is set, it also continues
// without the client: that finds a handler that needs its client's context. [Processor] stands in
// for the other service. The invariant compares the calls that it served with the handler's writes,
// in number and amount:
//
//	psp := &idempotencytest.Processor[Card, Charge]{Serve: charge}
//	topUp := newTopUp(effect.New("charge", effect.Effect[Card, Charge]{Do: psp.Do}))
//	...
//	Invariant: func(ctx context.Context, told idempotencytest.Told) error {
//		return samePostings(ctx, pool, psp.Served(), told.Acknowledged)
//	},
//
// The run does not wait for leases and pauses. If a request waits until no earlier send can be
// under way, two minutes seem to pass for it at once. So an effect with a longer SettleAfter, or a
// shorter KeyLifetime, needs a test of its own. A request that only a person can end is a finding,
// so leave MaybeParks unset.
//
// # Limits
//
// No process is killed and no network is cut: a crash is made in this process, at the seams of the
// store. The attempt is rolled back, a panic with http.ErrAbortHandler unwinds its goroutine, and
// the conn to the client is closed. So a run shows how your handler, your wiring and your store
// react to each crash. It does not show how an operating system or PostgreSQL reacts to one: for
// that, the demo bank's chaos command kills real processes.
package idempotencytest

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
)

// Config describes the service under test. Store, New, Request and Invariant are required.
type Config struct {
	// Store keeps the records. It is used only through the interface.
	Store idempotency.Store

	// New returns the service: the handler as in production, with a middleware on the given store,
	// which wraps Store. It is called once.
	New func(store idempotency.Store) http.Handler

	// Request returns the n-th request: one that the handler accepts, without a key, and with a
	// different body or target for each n. Its host does not matter. It is called at most once for
	// each n.
	Request func(n int) *http.Request

	// Invariant checks in the service's own tables that the replies to the clients are true: one
	// effect for each acknowledged request, and no other. Its error is reported unchanged. Nothing
	// is in flight when it is called.
	Invariant func(ctx context.Context, told Told) error

	// Declined returns the n-th request that the handler declines for good with a 4xx. Nil leaves
	// out the checks of declines.
	Declined func(n int) *http.Request

	// Other is like Request, but for another caller, with keys in another scope. Nil leaves out the
	// checks of scopes.
	Other func(n int) *http.Request

	// Resume runs an open request without its client, if the handler makes calls (package effect) or
	// has phases. It calls Middleware.Resume or Engine.Resume of the service under test. Run calls it
	// instead of a completer, so New must not start one. Nil leaves all open requests to the clients'
	// retries.
	Resume func(ctx context.Context, key idempotency.Key) idempotency.Result

	// Keys is the number of keys in the storm, Copies the number of times that each is sent, and
	// Clients the number of keys at work at once, each with half of its copies. They default to 60,
	// 4 and 8. The storm has at least one key for each point.
	Keys, Copies, Clients int

	// Point is the number of keys for each crash point. Defaults to 8.
	Point int

	// Patience is the maximum time for a key to be settled, and for the run to come to rest.
	// Defaults to 20 seconds.
	Patience time.Duration

	// Seed makes all decisions. 0 draws one, which a failing test prints. The same seed makes the
	// same decisions again; the scheduler still decides which goroutine comes first.
	Seed uint64
}

// Told holds the final answers that clients got since the beginning of the run, by rising N.
type Told struct {
	Acknowledged []Answer // executed or replayed, with 2xx or 3xx: each has had its effect once
	Declined     []Answer // executed or replayed, with 4xx: none has left anything
	GivenUp      []Answer // given up after not-executed: none has left anything
}

// full returns a copy of c with every default filled in, or an error.
func (c Config) full() (Config, error) {
	switch {
	case c.Store == nil:
		return c, fmt.Errorf("Config.Store is missing")
	case c.New == nil:
		return c, fmt.Errorf("Config.New is missing")
	case c.Request == nil:
		return c, fmt.Errorf("Config.Request is missing")
	case c.Invariant == nil:
		return c, fmt.Errorf("Config.Invariant is missing: without it nobody knows what the requests did")
	case c.Keys < 0 || c.Copies < 0 || c.Clients < 0 || c.Point < 0 || c.Patience < 0:
		return c, fmt.Errorf("Config.Keys, Copies, Clients, Point and Patience must not be negative")
	}
	c.Keys = cmp.Or(c.Keys, 60)
	c.Copies = cmp.Or(c.Copies, 4)
	c.Clients = cmp.Or(c.Clients, 8)
	c.Point = cmp.Or(c.Point, 8)
	c.Patience = cmp.Or(c.Patience, 20*time.Second)
	for c.Seed == 0 {
		c.Seed = rand.Uint64()
	}
	return c, nil
}

// Run runs the proof, each part as a subtest. The database should belong to the test: Run writes to
// it, and nothing else may write the rows that the invariant counts. It takes a few seconds. Run it
// with -race too.
func Run(t *testing.T, config Config) {
	t.Helper()
	full, err := config.full()
	if err != nil {
		t.Fatalf("idempotencytest: %v", err)
	}
	l := newLab(full)
	t.Cleanup(l.close)
	report := func(t *testing.T, found []finding) {
		t.Helper()
		for _, f := range found {
			t.Errorf("%s: %s", f.check, f.text)
		}
		if len(found) > 0 {
			t.Logf("To repeat it: idempotencytest.Config.Seed = %d, and go test -run '^%s$'", full.Seed, strings.ReplaceAll(t.Name(), "/", "$/^"))
		}
	}
	if found := l.prepare(t.Context()); len(found) > 0 {
		report(t, found)
		t.FailNow()
	}
	t.Run("Crash", func(t *testing.T) {
		for _, p := range plans() {
			t.Run(string(p.point), func(t *testing.T) {
				if why := l.impossible(p); why != "" {
					t.Skip(why)
				}
				report(t, l.crash(t.Context(), p))
			})
		}
	})
	t.Run("Storm", func(t *testing.T) { report(t, l.storm(t.Context())) })
	t.Run("Scope", func(t *testing.T) {
		if full.Other == nil {
			t.Skip("Config.Other is not set")
		}
		report(t, l.scope(t.Context()))
	})
	t.Run("Replay", func(t *testing.T) { report(t, l.replay(t.Context())) })
	t.Log(l.summary())
}
