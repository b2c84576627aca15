//go:build unix

package faults_test

import (
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"
)

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

	// The primary is gone, and the service's connections lead to a standby: it has the record, and must not be believed.
	p.primary.Kill()
	s.upstream.set(p.standby.URL())
	idle.upstream.set(p.standby.URL())
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
