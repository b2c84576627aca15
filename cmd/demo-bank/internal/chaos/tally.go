package chaos

import (
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/check"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/storm"
)

// tally counts faults and answers. It is safe for concurrent use.
type tally struct {
	finished atomic.Int64 // operations of the load
	replays  atomic.Int64 // of the final replay
	unsent   atomic.Int64 // tries that found no bank

	answers      counters
	clientFaults counters
	faults       counters
	commitFaults counters
	crashPoints  counters
	stops        counters // of banks, at COMMITs of requests that call the processor

	kills   atomic.Int64 // bank processes that died of SIGKILL
	crashes atomic.Int64 // of PostgreSQL
	allowed atomic.Int64 // maximum number of COMMITs that events may have broken

	replies atomic.Int64 // of the load and the settling
	unknown atomic.Int64
	// The unknown answers of keys with a COMMIT that was late, was left open or lost its backend.
	unknownExempt atomic.Int64

	plantedReplays int64 // counted by the judge

	mu      sync.Mutex
	latency *hdrhistogram.Histogram // of replies, in microseconds
}

func newTally() tally {
	return tally{latency: hdrhistogram.New(1, storm.RequestTimeout.Microseconds(), 3)}
}

// count adds an operation.
func (t *tally) count(op *check.Operation, k *key) {
	switch {
	case op.Returned == 0:
		t.answers.add("none")
		return
	case op.Outcome == "":
		t.answers.add("other")
	default:
		t.answers.add(op.Outcome)
	}
	t.replies.Add(1)
	if op.Outcome != "unknown" || k.asks.calls() {
		return // a request that calls the processor may be open for long
	}
	t.unknown.Add(1)
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.exempt {
		t.unknownExempt.Add(1)
	}
}

// asked counts the request of a key.
func (t *tally) asked(k *key) {
	switch k.asks {
	case askDeclined:
		t.clientFaults.add("declined request")
	case askOrder:
		t.clientFaults.add("order")
	case askAccount:
		t.clientFaults.add("account")
	case askReused:
		t.clientFaults.add("expired key used again")
	case askTopUp:
		t.clientFaults.add("top-up")
	case askPayout:
		t.clientFaults.add("payout")
	case askReceipt:
		t.clientFaults.add("receipt")
	}
	if k.named() != k.index {
		t.clientFaults.add("key of another tenant")
	}
}

func (t *tally) trouble(one storm.Trouble) {
	switch one {
	case storm.Cut:
		t.clientFaults.add("connection cut")
	case storm.HangUp:
		t.clientFaults.add("hang-up")
	case storm.HalfSent:
		t.clientFaults.add("half-sent body")
	case storm.Slow:
		t.clientFaults.add("slow body")
	}
}

func (t *tally) observe(d time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	// A longer time exceeds the range; such a request had timed out.
	_ = t.latency.RecordValue(max(1, d.Microseconds()))
}

// quantile returns a quantile in milliseconds.
func (t *tally) quantile(percent float64) float64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return float64(t.latency.ValueAtQuantile(percent)) / 1000
}

// counters count by name. The zero value is ready. They are safe for concurrent use.
type counters struct {
	mu     sync.Mutex
	counts map[string]int64
}

func (c *counters) add(name string) { c.addN(name, 1) }

func (c *counters) addN(name string, n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.counts == nil {
		c.counts = make(map[string]int64)
	}
	c.counts[name] += n
}

func (c *counters) get(name string) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.counts[name]
}

func (c *counters) total() (n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, count := range c.counts {
		n += count
	}
	return n
}

// list returns the counts of the required names, in their order, and then of all others.
func (c *counters) list(required []string) []Count {
	c.mu.Lock()
	defer c.mu.Unlock()
	list := make([]Count, 0, len(c.counts))
	for _, name := range required {
		list = append(list, Count{Name: name, Count: c.counts[name], Least: 1})
	}
	for _, name := range slices.Sorted(maps.Keys(c.counts)) {
		if !slices.Contains(required, name) {
			list = append(list, Count{Name: name, Count: c.counts[name]})
		}
	}
	return list
}
