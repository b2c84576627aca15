package faults_test

import (
	"testing"

	"github.com/paidonce/idempotency/internal/pgfault"
)

func TestF08CommitThatNeverArrivesIsNotExecuted(t *testing.T) {
	t.Parallel()
	s := commitServe(t, commitPatience(0, 0))
	s.harm("key-1", pgfault.Fault{Kind: pgfault.CutBefore})

	s.mustPay(t, "key-1", 503, "not-executed")
	s.wantHit(t, pgfault.CutBefore, 1)
	if n := s.paid(t, "key-1"); n != 0 {
		t.Fatalf("%d payments after not-executed", n)
	}
	s.settled(t, "key-1", s.mustPay(t, "key-1", 201, "executed"))
}
