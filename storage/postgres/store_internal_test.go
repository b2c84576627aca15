package postgres

import (
	"testing"

	"github.com/paidonce/idempotency"
)

func TestLockNumberIsFrozen(t *testing.T) {
	t.Parallel()
	if got := (idempotency.Key{Scope: "acme", Value: "k"}).LockNumber("public." + TableName); got != lockNumberOfAcmeK {
		t.Errorf("lock number %d, want %d: programs of different versions would not meet", got, int64(lockNumberOfAcmeK))
	}
}

const lockNumberOfAcmeK = -4293143674885497847
