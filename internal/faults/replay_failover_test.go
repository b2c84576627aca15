//go:build unix

package faults_test

import (
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/internal/pgserver"
	"github.com/paidonce/idempotency/storage/postgres"
)

// A replay that is quick, by a look-up alone or from the cache, is one of the primary's: a standby is not asked, and once
// another server was heard of nothing of the old one is replayed.
func TestF21QuickReplaysFollowTheFailover(t *testing.T) {
	t.Parallel()
	p := startPair(t, false)
	quick := func() *service {
		return serveOn(t, p.primary.URL(), &serviceOptions{
			store: &postgres.Options{CacheBytesMax: postgres.CacheBytesMin},
			pool:  func(config *pgxpool.Config) { config.MaxConns = 4 },
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
		one.mustPay(t, lost, 201, "replayed") // from the cache
	}

	// The primary is gone, and the service's connections lead to a standby: it has the record, and must not be believed.
	p.primary.Kill()
	s.upstream.set(p.standby.URL())
	idle.upstream.set(p.standby.URL())
	for begin := time.Now(); time.Since(begin) < awaitMax; time.Sleep(10 * time.Millisecond) { // while the cache believes in the primary
		if got, err := s.pay("kept"); err != nil || !got.is(201, "replayed") {
			break
		}
	}
	for range 2 {
		s.mustPay(t, "kept", 503, "not-executed")
	}

	// It takes over. What it never got was never paid.
	paused.kill(t)
	p.promote(t)
	s.mustPay(t, "lost", 201, "executed")
	if again := s.mustPay(t, "kept", 201, "replayed"); again.body != kept.body {
		t.Errorf("replayed %s, first %s", again.body, kept.body)
	}
	// Nor where the first that is heard of the new one is about another key.
	idle.mustPay(t, "new", 201, "executed")
	idle.mustPay(t, "lost-too", 201, "executed")
	s.onePayment(t, "kept", "lost", "lost-too", "new")
}

// Nothing has to fail for a connection to lead to another server, where a name or an address moves while the old one
// lives on. The first answer of the new one empties the cache.
func TestF21CacheKnowsOneServerFromAnother(t *testing.T) {
	t.Parallel()
	var urls []string
	for range 2 {
		server, err := pgserver.Start(t.Context(), &pgserver.Options{Settings: fast})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = server.Stop() })
		migrateUp(t, server.URL())
		urls = append(urls, server.URL())
	}
	for _, first := range []string{"claim", "look-up"} {
		s := serveOn(t, urls[0], &serviceOptions{
			store: &postgres.Options{CacheBytesMax: postgres.CacheBytesMin},
			pool:  func(config *pgxpool.Config) { config.MaxConns = 2 },
		})
		lost, other := "lost-"+first, "other-"+first
		payer := serveOn(t, urls[0], nil)
		for _, key := range []string{lost, other} {
			payer.mustPay(t, key, 201, "executed")
			s.mustPay(t, key, 201, "replayed") // which knows nothing of it, and claims
			s.mustPay(t, key, 201, "replayed")
		}
		old, err := s.pool.Acquire(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(old.Release)
		s.upstream.set(urls[1])
		if first == "look-up" { // of a key that both servers have
			elsewhere := serveOn(t, urls[1], nil)
			elsewhere.mustPay(t, other, 201, "executed")
			time.Sleep(1100 * time.Millisecond) // so that the cache asks
			s.mustPay(t, other, 201, "replayed")
		} else {
			s.mustPay(t, "new", 201, "executed")
		}
		s.mustPay(t, lost, 201, "executed")
		if n := s.payments(t, lost); n != 1 {
			t.Errorf("%d payments on the new server", n)
		}
	}
}
