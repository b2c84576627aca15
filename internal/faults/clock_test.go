package faults_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/middleware"
)

// The service runs in a bubble with a clock that is wrong and stands still, while PostgreSQL's is
// right. Timeouts don't elapse in there; everything else must work.
func TestF18ApplicationClockIsNotAsked(t *testing.T) {
	t.Parallel()
	for name, off := range map[string]time.Duration{
		"an hour ahead": time.Hour, "an hour behind": -time.Hour, "years ahead": 10 * 365 * 24 * time.Hour,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url := pgtest.Database(t)
			migrateUp(t, url)
			truth := time.Now().Round(0)
			synctest.Test(t, func(t *testing.T) {
				time.Sleep(truth.Add(off).Sub(time.Now().Round(0)))
				if now := time.Now().Round(0); !now.Equal(truth.Add(off)) {
					t.Fatalf("the application's clock says %v, want %v", now, truth.Add(off))
				}
				const ttl = 30 * time.Minute
				s := serveOn(t, url, ttlOf(ttl))
				first := s.mustPay(t, "long", 201, "executed")
				const right = `SELECT count(*) FROM idempotency_keys WHERE abs(extract(epoch FROM clock_timestamp() - created_at)) < 60
					AND expires_at - created_at BETWEEN $1 AND $1 + interval '60 s'`
				if n := count(t, url, right, ttl); n != 1 {
					t.Errorf("the record's times are not the database's")
				}
				if deleted, err := s.store.DeleteExpired(t.Context()); err != nil || deleted != 0 {
					t.Errorf("the reaper deleted %d, %v, of a record that has half an hour left", deleted, err)
				}

				brief := serveOn(t, url, ttlOf(time.Second))
				brief.mustPay(t, "brief", 201, "executed")
				execute(t, url, "SELECT pg_sleep(1.1)")
				brief.mustPay(t, "brief", 201, "replayed") // a record counts until it is deleted
				if deleted, err := s.store.DeleteExpired(t.Context()); err != nil || deleted != 1 {
					t.Errorf("the reaper deleted %d, %v, want the record whose second is over", deleted, err)
				}
				if again := s.mustPay(t, "long", 201, "replayed"); again.body != first.body {
					t.Errorf("replayed %s, first %s", again.body, first.body)
				}
				brief.mustPay(t, "brief", 201, "executed")
				s.onePayment(t, "long")
			})
		})
	}
}

func ttlOf(ttl time.Duration) *serviceOptions {
	return &serviceOptions{middleware: &middleware.Options{TTL: ttl}}
}
