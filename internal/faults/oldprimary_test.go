//go:build unix

package faults_test

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/internal/pgserver"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/middleware"
)

// If a resolver connects to an old primary, which nobody has stopped, it finds no record there.
// That proves nothing.
func TestF19AbsenceOnAnOldPrimaryIsNoProof(t *testing.T) {
	t.Parallel()
	p := startPair(t, false)
	p.promote(t) // and the primary runs on
	lostThenLedTo(t, p.standby.URL(), p.primary.URL())
}

// A copy of the primary's disk that runs beside it has the same timeline, and is behind.
func TestAbsenceOnACopyOfThePrimaryIsNoProof(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "starts a primary and a copy of it")
	dir := pgtest.Folder(t)
	start := func(name string) *pgserver.Server {
		server, err := pgserver.Start(t.Context(), &pgserver.Options{DataDir: filepath.Join(dir, name), Settings: fast})
		if err != nil {
			t.Fatal(err)
		}
		return server
	}
	primary := start("primary")
	migrateUp(t, primary.URL())
	if err := primary.Stop(); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "cp", "-a", filepath.Join(dir, "primary"), filepath.Join(dir, "copy")).CombinedOutput(); err != nil {
		t.Fatalf("copy: %v: %s", err, out)
	}
	primary, copied := start("primary"), start("copy")
	t.Cleanup(func() { _ = primary.Stop(); _ = copied.Stop() })
	execute(t, primary.URL(), "CREATE TABLE later AS SELECT generate_series(1, 100000)")
	lostThenLedTo(t, primary.URL(), copied.URL())
}

// lostThenLedTo lets a service lose the reply to a COMMIT on one server, and look for it on
// another, which does not have it. Once the service is back on the first, a retry is a replay.
func lostThenLedTo(t *testing.T, database, other string) {
	t.Helper()
	network, address, err := pgfault.Upstream(database)
	if err != nil {
		t.Fatal(err)
	}
	var s *service
	proxy, err := pgfault.Start(pgfault.Options{Network: network, Address: address, OnCommit: func(c pgfault.Commit) pgfault.Fault {
		if !bytes.Contains(c.Messages, []byte("lost")) {
			return pgfault.Fault{}
		}
		s.upstream.set(other)
		return pgfault.Fault{Kind: pgfault.CutAfter}
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = proxy.Close() })
	s = serveOn(t, proxy.URL(database), &serviceOptions{middleware: &middleware.Options{Timeouts: idempotency.Timeouts{Commit: 5 * time.Second, Resolve: 3 * time.Second}}})
	s.mustPay(t, "before", 201, "executed")
	s.mustPay(t, "lost", 503, "unknown")
	if hits := proxy.Hits()[pgfault.CutAfter]; hits != 1 {
		t.Fatalf("%d COMMITs lost their replies", hits)
	}
	s.upstream.set(database)
	s.pool.Reset()
	s.mustPay(t, "lost", 201, "replayed")
	s.onePayment(t, "before", "lost")
}
