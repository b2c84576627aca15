package faults_test

import (
	"testing"

	"github.com/paidonce/idempotency/internal/pgfault"
)

func TestF09LostReplyToCommitIsExecuted(t *testing.T) {
	t.Parallel()
	s := commitServe(t, commitPatience(0, 0))
	s.harm("key-1", pgfault.Fault{Kind: pgfault.CutAfter})

	first := s.mustPay(t, "key-1", 201, "executed")
	s.wantHit(t, pgfault.CutAfter, 1)
	s.settled(t, "key-1", first)
}
