package faults_test

import (
	"strings"
	"testing"
	"time"
)

func TestF13SlowNetworkIsExecuted(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name           string
		latency        time.Duration
		bytesPerSecond int
	}{
		{"50ms", 50 * time.Millisecond, 0},
		{"500ms", 500 * time.Millisecond, 0},
		{"10KB a second", 0, 10_000},
		{"200ms and 10KB a second", 200 * time.Millisecond, 10_000},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			opts := commitPatience(0, 0)
			opts.memo = strings.Repeat("m", 5_000) // half a second
			s := commitServe(t, opts)
			s.mustPay(t, "warm-up", 201, "executed") // a new connection prepares its statements one by one
			s.proxy.SetLatency(test.latency)
			s.proxy.SetRate(test.bytesPerSecond)

			started := time.Now()
			first := s.mustPay(t, "key-1", 201, "executed")
			least := 6 * test.latency // claim, INSERT, COMMIT
			if test.bytesPerSecond > 0 {
				least += time.Duration(len(opts.memo)) * time.Second / time.Duration(test.bytesPerSecond)
			}
			if took := time.Since(started); took < least {
				t.Errorf("it took %v, want at least %v", took, least)
			}
			s.settled(t, "key-1", first)
		})
	}
}
