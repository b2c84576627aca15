package main

import (
	"testing"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/internal/testservice"
)

// The program and its service can connect to a server with channel_binding=require.
func TestProgramKeepsChannelBinding(t *testing.T) {
	t.Parallel()
	b := &testBundle{testservice.On(t, pgtest.TLS(t).TLSURL("postgres")+"&channel_binding=require", nil)}
	b.want(t, 0, "migrate", "up")
	if outcome := b.do(t, "paid"); outcome != idempotency.OutcomeExecuted {
		t.Errorf("the service: %s", outcome)
	}
	wantText(t, b.want(t, 0, "key", "get", "acme", "paid").stdout, "201")
	b.want(t, 0, "key", "list")
	b.want(t, 0, "stats")
	b.want(t, 0, "gc")
	b.want(t, 0, "key", "delete", "acme", "paid", "--reason", "a test", "--yes")
	b.want(t, 0, "doctor")
}
