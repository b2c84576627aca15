package chaos

import (
	"maps"
	"math"
	"slices"
	"time"

	"github.com/paidonce/idempotency/internal/crashpoint"
)

// profile sets the load and the faults of a run. The numbers of faults are for its number of
// operations; another number of operations scales them.
type profile struct {
	operations  int
	durationMax time.Duration

	events       map[eventKind]int  // number of each kind
	points       []string           // crash points of the banks, each hit at least once
	commits      int                // faults of COMMITs
	weights      map[commitKind]int // their shares
	reapInterval time.Duration      // of the banks' reapers, which walk the whole table each time
	giveUp       float64            // probability to give up after not-executed
	shares       shares             // of the clients' actions
	effects      bool               // some requests call the processor
	stops        int                // of banks, at each kind of COMMIT

	// The minimums for a run with the profile's number of operations. Each kind must also be
	// reached at least once.
	killsMin, crashesMin, commitsMin int
}

// shares are the probabilities, in thousandths, of a client's actions on a key.
type shares struct {
	declined, order, account, reused int // kinds of requests; the rest are transfers
	twin                             int // the same key under another tenant
	changed                          int // another body under the key
	cut, hangUp, halfSent, slow      int // trouble of a copy's first request
	crowd                            int // as many copies at once as a client can send
	topUp, payout, receipt           int // requests that call the processor
	leave, async                     int // of those: the client does not wait for the end, or prefers not to
}

var allWeights = map[commitKind]int{
	cutBefore: 24, cutAfter: 26, delayReply: 14, terminateBefore: 10, terminateAfter: 10, lateCommit: 7, silence: 4,
	halfOpen: 4, killCommitting: 1, hangUpAtCommit: 8,
}

var allShares = shares{
	declined: 40, order: 30, account: 20, reused: 10, twin: 30, changed: 20, cut: 70, hangUp: 40, halfSent: 15, slow: 15,
}

var profiles = map[string]profile{
	"smoke": {
		operations: 20_000, durationMax: 3 * time.Minute,
		events: map[eventKind]int{
			killBank: 11, crashPostmaster: 3, crashBackend: 2, crashCommitting: 2, terminateBackends: 8, cutAll: 6,
			refuse: 3, pause: 4, latency: 4, slowLink: 3, rowLocks: 3, squeeze: 2, deadlock: 3, lull: 1,
		},
		points: crashpoint.Bank(), reapInterval: 300 * time.Millisecond, commits: 325, weights: allWeights, giveUp: 0.5, shares: allShares,
		killsMin: 20, crashesMin: 5, commitsMin: 300,
	},
	"nightly": {
		operations: 200_000, durationMax: 20 * time.Minute,
		events: map[eventKind]int{
			killBank: 40, crashPostmaster: 12, crashBackend: 6, crashCommitting: 6, terminateBackends: 60, cutAll: 24,
			refuse: 12, pause: 16, latency: 16, slowLink: 12, rowLocks: 12, squeeze: 10, deadlock: 12, lull: 2,
		},
		points: crashpoint.Bank(), reapInterval: time.Second, commits: 2800, weights: allWeights, giveUp: 0.5, shares: allShares,
		killsMin: 60, crashesMin: 20, commitsMin: 2500,
	},
	"release": {
		operations: 1_000_000, durationMax: 75 * time.Minute,
		events: map[eventKind]int{
			killBank: 130, crashPostmaster: 60, crashBackend: 25, crashCommitting: 25, terminateBackends: 200, cutAll: 80,
			refuse: 40, pause: 40, latency: 40, slowLink: 30, rowLocks: 40, squeeze: 30, deadlock: 40, lull: 6,
		},
		points: crashpoint.Bank(), reapInterval: 4 * time.Second, commits: 11_000, weights: allWeights, giveUp: 0.5, shares: allShares,
		killsMin: 200, crashesMin: 100, commitsMin: 10_000,
	},
	// For variants of the bank with a known bug: short and dense, and every client gives up as soon
	// as it may.
	"mutant": {
		operations: 3_000, durationMax: 2 * time.Minute,
		events:       map[eventKind]int{killBank: 5, terminateBackends: 3, latency: 2},
		points:       []string{crashpoint.AfterHandler, crashpoint.BeforeCommit, crashpoint.AfterCommit, crashpoint.HalfResponse, crashpoint.Resolving},
		reapInterval: 50 * time.Millisecond, commits: 210, weights: map[commitKind]int{cutBefore: 30, cutAfter: 34, lateCommit: 18, terminateBefore: 6, terminateAfter: 6, killCommitting: 2, halfOpen: 2, hangUpAtCommit: 40},
		giveUp:   1,
		shares:   shares{declined: 30, order: 20, account: 10, reused: 200, twin: 80, changed: 80, cut: 120, hangUp: 120, halfSent: 10, slow: 10, crowd: 400},
		killsMin: 6, commitsMin: 170,
	},
}

// lullFrom is the minimum number of operations of a run with a lull: thousands of operations pass
// in a lull.
const lullFrom = 15_000

// Profiles returns the names of all profiles.
func Profiles() []string { return slices.Sorted(maps.Keys(profiles)) }

// scaled returns the profile for another number of operations. Every kind of fault that it has
// remains.
func (p profile) scaled(operations int) profile {
	factor := float64(operations) / float64(p.operations)
	scale := func(n, least int) int {
		if n == 0 {
			return 0
		}
		return max(least, int(math.Round(float64(n)*factor)))
	}
	events := make(map[eventKind]int, len(p.events))
	for kind, n := range p.events {
		events[kind] = scale(n, 1)
	}
	if operations < lullFrom {
		delete(events, lull)
	}
	// Each crash point is armed at least once. There are at least four faults of COMMITs for each
	// kind, on average.
	events[killBank] = max(events[killBank], len(p.points))
	p.events = events
	p.commits = scale(p.commits, 4*len(p.weights))
	p.stops = scale(p.stops, 1)
	if factor < 1 { // the minimums are those of the profile's own size
		p.killsMin, p.crashesMin, p.commitsMin = scale(p.killsMin, 1), scale(p.crashesMin, 1), scale(p.commitsMin, 1)
	}
	p.operations = operations
	return p
}
