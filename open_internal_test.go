package idempotency

import (
	"testing"
	"time"
)

// The pause between two runs of an open request is never zero, and never over its limit, however
// many runs there were.
func TestBackoffStaysWithinItsLimit(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		runs       int
		limit, max time.Duration // max: the longest possible pause
	}{
		{1, 5 * time.Minute, time.Second}, {4, 5 * time.Minute, 8 * time.Second}, {10, 5 * time.Minute, 5 * time.Minute},
		{64, 5 * time.Minute, 5 * time.Minute}, {1 << 30, 5 * time.Minute, 5 * time.Minute}, {3, 50 * time.Millisecond, 50 * time.Millisecond},
	} {
		longest := time.Duration(0)
		for range 1000 {
			pause := backoff(c.runs, c.limit)
			if pause <= 0 || pause > c.max+time.Millisecond {
				t.Fatalf("after %d runs: %v, limit %v", c.runs, pause, c.limit)
			}
			longest = max(longest, pause)
		}
		if longest < c.max/2 {
			t.Errorf("after %d runs the longest of 1000 pauses is %v, and %v is allowed", c.runs, longest, c.max)
		}
	}
}
