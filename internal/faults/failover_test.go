//go:build unix

package faults_test

import (
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/internal/pgserver"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/postgres"
)

func TestF19FailoverToASynchronousStandbyLosesNothing(t *testing.T) {
	t.Parallel()
	p := startPair(t, true)
	s := serveOn(t, p.primary.URL(), nil)
	heard := s.mustPay(t, "heard", 201, "executed")
	unheard := s.payUnheard(t, "unheard")
	if !unheard.is(201, "executed") {
		t.Fatalf("the payment whose reply was lost: %v", unheard)
	}

	p.primary.Kill()
	for _, key := range []string{"heard", "unheard", "new"} {
		if got, err := s.pay(key); err != nil || !got.is(503, "not-executed") {
			t.Errorf("%s while the primary is down: %v, %v", key, got, err)
		}
	}
	p.promote(t)
	s.upstream.set(p.standby.URL())

	for key, first := range map[string]reply{"heard": heard, "unheard": unheard} {
		if again := s.mustPay(t, key, 201, "replayed"); again.body != first.body {
			t.Errorf("%s: replayed %s, first %s", key, again.body, first.body)
		}
	}
	s.mustPay(t, "new", 201, "executed")
	s.onePayment(t, "heard", "unheard", "new")
}

// A service may name both servers in its URL: the store finds the primary.
func TestF19ServiceThatNamesBothServersFollowsTheFailover(t *testing.T) {
	t.Parallel()
	p := startPair(t, true)
	both := fmt.Sprintf("host=%s,%s user=postgres dbname=postgres target_session_attrs=primary",
		hostOf(t, p.standby.URL()), hostOf(t, p.primary.URL()))
	s := serveOn(t, p.primary.URL(), &serviceOptions{pool: func(config *pgxpool.Config) {
		multi, err := pgxpool.ParseConfig(both)
		if err != nil {
			t.Error(err)
			return
		}
		*config = *multi
	}})
	first := s.mustPay(t, "heard", 201, "executed")
	p.primary.Kill()
	s.mustPay(t, "heard", 503, "not-executed")
	p.promote(t)
	s.upstream.set(p.standby.URL()) // for the counts
	if again := s.mustPay(t, "heard", 201, "replayed"); again.body != first.body {
		t.Errorf("replayed %s, first %s", again.body, first.body)
	}
	s.onePayment(t, "heard")
}

func TestF20CancelledWaitForTheStandbyIsNeverPaid(t *testing.T) {
	t.Parallel()
	p := startPair(t, true)
	s := serveOn(t, p.primary.URL(), nil)
	hasty := serveOn(t, p.primary.URL(), &serviceOptions{middleware: &middleware.Options{Timeouts: idempotency.Timeouts{Handler: 2 * time.Second, Commit: time.Second, Resolve: time.Second}}})
	s.mustPay(t, "before", 201, "executed")

	// Each of these ends the wait of a COMMIT: the record is visible here, and the standby does not
	// have it.
	paused := p.pause(t)
	stop := cancelWaits(t, p.primary.URL())
	hasty.mustPay(t, "cancelled-by-an-operator", 503, "unknown")
	if cancelled := stop(); cancelled == 0 {
		t.Fatal("no wait was cancelled")
	}
	hasty.mustPay(t, "cancelled-by-the-service", 503, "unknown") // its Timeouts.Commit
	keys := []string{"cancelled-by-an-operator", "cancelled-by-the-service"}
	s.onePayment(t, keys...) // a replay without a barrier would use this record

	// A retry does not get it either while the standby is away, whatever ends its wait.
	stop = cancelWaits(t, p.primary.URL())
	for _, key := range keys {
		hasty.mustPay(t, key, 503, "unknown")
	}
	if cancelled := stop(); cancelled < len(keys) {
		t.Errorf("%d waits of the retries were cancelled", cancelled)
	}
	hasty.mustPay(t, keys[0], 503, "unknown")
	hasty.mustPay(t, "before", 503, "unknown") // it is safe, but that can't be known now

	paused.resume(t)
	for _, key := range append(keys, "before") {
		s.mustPay(t, key, 201, "replayed")
	}
	s.onePayment(t, append(keys, "before")...)

	// And if the standby takes over, the payment never happened.
	paused = p.pause(t)
	hasty.mustPay(t, "lost", 503, "unknown")
	s.onePayment(t, "lost")
	p.primary.Kill()
	paused.kill(t)
	p.promote(t)
	s.upstream.set(p.standby.URL())
	if payments, records := s.payments(t, "lost"), s.records(t, "lost"); payments != 0 || records != 0 {
		t.Fatalf("the standby has %d payments and %d records of what it never got", payments, records)
	}
	s.mustPay(t, "lost", 201, "executed")
	s.onePayment(t, append(keys, "before", "lost")...)
}

// cancelWaits cancels every wait for the standby, as an operator who sees sessions hang may do.
// stop returns the number of canceled waits.
func cancelWaits(t *testing.T, databaseURL string) (stop func() int) {
	t.Helper()
	var cancelled int
	var failed error
	done := make(chan struct{})
	var loop sync.WaitGroup
	loop.Go(func() {
		for failed == nil {
			select {
			case <-done:
				return
			case <-time.After(20 * time.Millisecond):
			}
			var n int
			failed = tryQuery(databaseURL, &n, "SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
			cancelled += n
		}
	})
	return func() int {
		t.Helper()
		close(done)
		loop.Wait()
		if failed != nil {
			t.Fatal(failed)
		}
		return cancelled
	}
}

// The loss that docs/guarantees.md describes: payments that the standby did not have are lost
// together with their records.
func TestF21FailoverToAnAsynchronousStandbyLosesRecordAndMoneyTogether(t *testing.T) {
	t.Parallel()
	p := startPair(t, false)
	s := serveOn(t, p.primary.URL(), nil)
	kept := s.mustPay(t, "kept", 201, "executed")
	await(t, p.standby.URL(), "the standby has it", "EXISTS (SELECT FROM payments WHERE key = 'kept')")
	paused := p.pause(t)
	s.mustPay(t, "lost", 201, "executed")
	s.mustPay(t, "lost", 201, "replayed")

	p.primary.Kill()
	s.mustPay(t, "lost", 503, "not-executed")
	paused.kill(t)
	p.promote(t)
	s.upstream.set(p.standby.URL())
	if payments, records := s.payments(t, "lost"), s.records(t, "lost"); payments != 0 || records != 0 {
		t.Errorf("%d payments and %d records are left, want neither", payments, records)
	}
	if again := s.mustPay(t, "kept", 201, "replayed"); again.body != kept.body {
		t.Errorf("replayed %s, first %s", again.body, kept.body)
	}
	s.mustPay(t, "lost", 201, "executed")
	s.onePayment(t, "kept", "lost")
}

// With an asynchronous standby a fail-over forgets an intent with everything else that the standby
// did not have: only the other service knows of the charge. A retry with the same key sends the
// same derived key, so it is charged once all the same.
func TestF21AsynchronousFailoverForgetsAnIntent(t *testing.T) {
	t.Parallel()
	p := startPair(t, false)
	u := &upstream{}
	u.set(p.primary.URL())
	n := serveCharges(t, p.primary.URL(), &postgres.Options{PoolConfig: func(config *pgxpool.Config) { config.ConnConfig.DialFunc = u.dial }})
	await(t, p.standby.URL(), "the standby has the tables", "to_regclass('postings') IS NOT NULL")
	paused := p.pause(t)
	n.set(false, true)
	if got := sendTransfer(t, n.URL+"/v1/transfers", "lost"); !got.is(503, "unknown") {
		t.Fatalf("%v", got)
	}
	if charges, open := n.charges(), count(t, p.primary.URL(), "SELECT count(*) FROM idempotency_open"); charges != 1 || open != 1 {
		t.Fatalf("%d charges, %d open requests", charges, open)
	}
	n.set(false, false)

	p.primary.Kill()
	paused.kill(t)
	p.promote(t)
	u.set(p.standby.URL())
	for begin := time.Now(); ; {
		found, err := n.completer.Once(t.Context()) // its connections are those of the old primary
		if err == nil && found == 0 {
			break
		}
		if err == nil || time.Since(begin) > awaitMax {
			t.Fatalf("%d open requests, %v", found, err)
		}
	}
	if known := count(t, p.standby.URL(), "SELECT (SELECT count(*) FROM idempotency_effects) + (SELECT count(*) FROM idempotency_open) + (SELECT count(*) FROM idempotency_keys)"); known != 0 {
		t.Errorf("%d rows know of the charge", known)
	}
	var got reply
	for begin := time.Now(); !got.is(201, "executed"); {
		if got = sendTransfer(t, n.URL+"/v1/transfers", "lost"); time.Since(begin) > awaitMax {
			t.Fatalf("%v", got)
		}
	}
	if charges, postings := n.charges(), count(t, p.standby.URL(), "SELECT count(*) FROM postings"); charges != 1 || postings != 1 {
		t.Errorf("%d charges and %d postings", charges, postings)
	}
}

// At whatever place in the stream the crash happens, the standby has both a payment and its record,
// or neither.
func TestF21CrashUnderLoadNeverPartsRecordAndMoney(t *testing.T) {
	t.Parallel()
	p := startPair(t, false)
	s := serveOn(t, p.primary.URL(), nil)
	const clients, enough = 4, 40
	var paid sync.Map // key -> body of its 201
	crash, crashed := make(chan struct{}), make(chan struct{})
	var total int
	var mu sync.Mutex
	var load sync.WaitGroup
	for client := range clients {
		load.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-crashed:
					return
				default:
				}
				key := fmt.Sprintf("client-%d-%d", client, n)
				got, err := s.pay(key)
				switch {
				case err != nil || got.status != 201 && got.status != 503:
					t.Errorf("%s: %v, %v", key, got, err)
				case got.status == 201:
					paid.Store(key, got.body)
					mu.Lock()
					if total++; total == enough {
						close(crash)
					}
					mu.Unlock()
				}
			}
		})
	}
	select {
	case <-crash:
	case <-time.After(awaitMax):
		t.Error("the load does not get on")
	}
	p.primary.Kill()
	close(crashed)
	load.Wait()
	p.promote(t)
	s.upstream.set(p.standby.URL())

	const parted = `SELECT count(*) FROM (SELECT key FROM payments) AS p FULL JOIN (SELECT key FROM idempotency_keys) AS r USING (key)
		WHERE p.key IS NULL OR r.key IS NULL`
	if n := count(t, s.upstream.get(), parted); n != 0 {
		t.Errorf("%d keys have a payment without a record, or a record without a payment", n)
	}
	paid.Range(func(key, body any) bool {
		survived := s.records(t, key.(string)) == 1
		got, err := s.pay(key.(string))
		switch {
		case err != nil || got.status != 201:
			t.Errorf("%s: %v, %v", key, got, err)
		case survived && (got.outcome != "replayed" || got.body != body):
			t.Errorf("%s survived: %v %s, first %s", key, got, got.body, body)
		case !survived && got.outcome != "executed":
			t.Errorf("%s was lost: %v", key, got)
		}
		return !t.Failed()
	})
	const twice = "SELECT count(*) FROM (SELECT key FROM payments GROUP BY key HAVING count(*) > 1) AS twice"
	if n := count(t, s.upstream.get(), twice); n != 0 {
		t.Errorf("%d keys were paid twice", n)
	}
}

func TestF32CheckRefusesAStandby(t *testing.T) {
	t.Parallel()
	p := startPair(t, false)
	s := serveOn(t, p.standby.URL(), nil)
	err := s.store.Check(t.Context())
	if !errors.Is(err, postgres.ErrNotPrimary) {
		t.Errorf("Check of a standby: %v", err)
	}
	s.mustPay(t, "key", 503, "not-executed")
	p.primary.Kill()
	p.promote(t)
	if err := s.store.Check(t.Context()); err != nil {
		t.Errorf("Check after it was promoted: %v", err)
	}
	s.mustPay(t, "key", 201, "executed")
	s.onePayment(t, "key")
}

// A replay by one look-up comes from the primary: a standby's record is not trusted, and a record
// that a fail-over lost is not replayed.
func TestF21QuickReplaysFollowTheFailover(t *testing.T) {
	t.Parallel()
	p := startPair(t, false)
	quick := func() *service {
		return serveOn(t, p.primary.URL(), &serviceOptions{
			pool: func(config *pgxpool.Config) { config.MaxConns = 4 },
		})
	}
	s, idle := quick(), quick()
	s.mustPay(t, "kept", 201, "executed")
	kept := s.mustPay(t, "kept", 201, "replayed")
	await(t, p.standby.URL(), "the standby has it", "EXISTS (SELECT FROM idempotency_keys WHERE key = 'kept')")
	paused := p.pause(t)
	for _, one := range []*service{s, idle} {
		lost := map[*service]string{s: "lost", idle: "lost-too"}[one]
		one.mustPay(t, lost, 201, "executed")
		one.mustPay(t, lost, 201, "replayed")
	}

	// The primary is gone, and the service's connections lead to a standby. It has the record, and
	// must not be trusted.
	p.primary.Kill()
	s.upstream.set(p.standby.URL())
	idle.upstream.set(p.standby.URL())
	for range 2 {
		s.mustPay(t, "kept", 503, "not-executed")
	}

	// The standby takes over. Payments that it did not receive never happened.
	paused.kill(t)
	p.promote(t)
	s.mustPay(t, "lost", 201, "executed")
	if again := s.mustPay(t, "kept", 201, "replayed"); again.body != kept.body {
		t.Errorf("replayed %s, first %s", again.body, kept.body)
	}
	// The same holds if the first request to the new primary is about another key.
	idle.mustPay(t, "new", 201, "executed")
	idle.mustPay(t, "lost-too", 201, "executed")
	s.onePayment(t, "kept", "lost", "lost-too", "new")
}

// If a resolver connects to an old primary that was not stopped, it finds no record there. That
// proves nothing.
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

// lostThenLedTo lets a service lose the reply to a COMMIT on one server, and look the record up on
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
