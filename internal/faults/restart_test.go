package faults_test

import (
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/paidonce/idempotency/internal/pgserver"
	"github.com/paidonce/idempotency/internal/pgtest"
)

func TestF07PostgresStoppedAgainAndAgainPaysOnce(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "starts a PostgreSQL of its own, again and again")
	const (
		clients  = 4
		restarts = 3
		runMax   = time.Minute // of a slow machine
		downMin  = 100 * time.Millisecond
		upMin    = 300 * time.Millisecond
	)
	data := filepath.Join(pgtest.Folder(t), "data")
	start := func() (*pgserver.Server, error) {
		return pgserver.Start(t.Context(), &pgserver.Options{DataDir: data}) // fsync on
	}
	server, err := start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		server.Kill()
		_ = server.Stop()
	})
	s := serve(t, server.URL(), nil)

	// Each client pays one key after another, each until it gets 201. Until then it may get only
	// 503.
	var refused, settled atomic.Int64
	stop := make(chan struct{})
	deadline := time.Now().Add(runMax)
	answers := make([]map[string]string, clients) // key -> body
	var load sync.WaitGroup
	for client := range clients {
		answers[client] = map[string]string{}
		load.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				key := fmt.Sprintf("client-%d-%d", client, n)
				for {
					got, err := s.pay(key)
					if err != nil || got.status != 201 && got.status != 503 {
						t.Errorf("%s: %v, %v, want 503, then 201", key, got, err)
						return
					}
					if got.status == 201 {
						answers[client][key] = got.body
						settled.Add(1)
						break
					}
					if refused.Add(1); time.Now().After(deadline) {
						t.Errorf("%s: still %v", key, got)
						return
					}
					time.Sleep(20 * time.Millisecond)
				}
			}
		})
	}
	// settle waits until the load has made progress, and then for a while.
	settle := func(while time.Duration) {
		for before := settled.Load(); settled.Load() < before+clients && time.Now().Before(deadline) && !t.Failed(); {
			time.Sleep(time.Millisecond)
		}
		time.Sleep(while)
	}
	for range restarts {
		settle(upMin)
		server.Kill()
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
		time.Sleep(downMin)
		again, err := start()
		if err != nil {
			t.Error(err)
			break
		}
		server = again
		s.upstream.set(server.URL())
	}
	settle(0)
	close(stop)
	load.Wait()
	if refused.Load() == 0 {
		t.Error("nothing was refused: the load did not meet the fault")
	}
	t.Logf("%d keys, %d times 503, %d restarts", settled.Load(), refused.Load(), restarts)
	for _, bodies := range answers {
		for key, body := range bodies {
			if again := s.mustPay(t, key, 201, "replayed"); again.body != body {
				t.Errorf("%s: replayed %s, first %s", key, again.body, body)
			}
		}
	}
	const other = `SELECT count(*) FROM (SELECT key, count(*) AS n FROM payments GROUP BY key) AS p
		FULL JOIN idempotency_keys USING (key) WHERE n IS DISTINCT FROM 1 OR scope IS NULL`
	if n := count(t, s.upstream.get(), other); n != 0 {
		t.Errorf("%d keys don't have one payment and one record", n)
	}
	if paid := count(t, s.upstream.get(), "SELECT count(*) FROM payments"); int64(paid) != settled.Load() {
		t.Errorf("%d payments of %d keys", paid, settled.Load())
	}
}
