package faults_test

import (
	"testing"
	"time"

	"github.com/paidonce/idempotency/internal/pgfault"
)

func TestF10SilenceAfterCommitIsExecuted(t *testing.T) {
	t.Parallel()
	const commitTimeout = time.Second
	s := commitServe(t, commitPatience(commitTimeout, 0))
	s.mustPay(t, "warm-up", 201, "executed")
	s.harm("key-1", pgfault.Fault{Kind: pgfault.Silence})

	started := time.Now()
	first := s.mustPay(t, "key-1", 201, "executed")
	if took := time.Since(started); took < commitTimeout {
		t.Errorf("it took %v: a reply came within Timeouts.Commit", took)
	}
	s.wantHit(t, pgfault.Silence, 1)
	s.settled(t, "key-1", first)
}
