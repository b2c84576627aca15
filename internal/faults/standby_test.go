//go:build unix

package faults_test

import (
	"syscall"
	"testing"

	"github.com/paidonce/idempotency/internal/pgserver"
	"github.com/paidonce/idempotency/internal/pgtest"
)

// pair is a primary and its standby, each with a socket and data of its own.
type pair struct{ primary, standby *pgserver.Server }

// fast are settings for servers on which PostgreSQL may crash but the machine does not.
var fast = map[string]string{"fsync": "off", "full_page_writes": "off"}

// startPair starts a primary with the tables, and a standby that follows it. If synchronous, each
// COMMIT waits for the standby.
func startPair(t *testing.T, synchronous bool) *pair {
	t.Helper()
	pgtest.Slow(t, "starts a primary and a standby of its own")
	p := &pair{}
	var err error
	if p.primary, err = pgserver.Start(t.Context(), &pgserver.Options{Settings: fast}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.primary.Kill() // a clean stop would wait for a standby that may be paused
		_ = p.primary.Stop()
	})
	migrateUp(t, p.primary.URL())
	p.standby, err = pgserver.Standby(t.Context(), p.primary, &pgserver.Options{Settings: fast})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.standby.Kill()
		_ = p.standby.Stop()
	})
	await(t, p.primary.URL(), "the standby follows",
		"EXISTS (SELECT FROM pg_stat_replication WHERE application_name = 'walreceiver' AND state = 'streaming')")
	if synchronous {
		// Not in the settings: a promoted copy must not wait for a standby of its own.
		execute(t, p.primary.URL(), "ALTER SYSTEM SET synchronous_standby_names = 'walreceiver'")
		execute(t, p.primary.URL(), "SELECT pg_reload_conf()")
		await(t, p.primary.URL(), "the standby is synchronous",
			"EXISTS (SELECT FROM pg_stat_replication WHERE sync_state = 'sync') AND current_setting('synchronous_standby_names') = 'walreceiver'")
	}
	return p
}

// receiver is the standby's paused walreceiver.
type receiver struct {
	pid     int
	standby *pgserver.Server
	gone    bool
}

// pause stops the standby's walreceiver: the primary's connection to it stays, and nothing more is
// acknowledged.
func (p *pair) pause(t *testing.T) *receiver {
	t.Helper()
	r := &receiver{standby: p.standby}
	query(t, p.standby.URL(), &r.pid, "SELECT pid FROM pg_stat_wal_receiver WHERE status = 'streaming'")
	r.signal(t, syscall.SIGSTOP)
	t.Cleanup(func() {
		if !r.gone {
			_ = syscall.Kill(r.pid, syscall.SIGCONT) // else the standby does not end
		}
	})
	return r
}

func (r *receiver) resume(t *testing.T) {
	t.Helper()
	r.signal(t, syscall.SIGCONT)
	r.gone = true
}

// kill ends the walreceiver, and all that it had not read is lost. PostgreSQL restarts the
// standby's other processes.
func (r *receiver) kill(t *testing.T) {
	t.Helper()
	r.signal(t, syscall.SIGKILL)
	r.gone = true
	await(t, r.standby.URL(), "the standby is back without its walreceiver",
		"NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)", r.pid)
}

func (r *receiver) signal(t *testing.T, sig syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(r.pid, sig); err != nil {
		t.Fatalf("signal the walreceiver: %v", err)
	}
}

// promote makes the standby the primary.
func (p *pair) promote(t *testing.T) {
	t.Helper()
	if err := p.standby.Promote(t.Context()); err != nil {
		t.Fatal(err)
	}
}
