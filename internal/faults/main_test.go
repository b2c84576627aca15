package faults_test

import (
	"os"
	"testing"

	"github.com/paidonce/idempotency/internal/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// need skips the test if a requirement is missing, or fails it if every fault is required. remedy
// says how to run it.
func need(t *testing.T, missing, remedy string) {
	t.Helper()
	if os.Getenv("PAIDONCE_FAULTS") == "required" {
		t.Fatalf("THIS FAULT WAS NOT TESTED, and PAIDONCE_FAULTS=required: %s; %s", missing, remedy)
	}
	t.Skipf("THIS FAULT WAS NOT TESTED: %s; %s", missing, remedy)
}
