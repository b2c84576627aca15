package faults_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/client/pgintent"
	"github.com/paidonce/idempotency/internal/pgserver"
	"github.com/paidonce/idempotency/internal/pgtest"
)

// TestFullDiskUnderIntentsIsNotExecuted: the client's own database has no room for an intent.
// Nothing is sent, the caller gets ErrNotExecuted, and the kept intents are resumed when there is
// room again.
func TestFullDiskUnderIntentsIsNotExecuted(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "starts a PostgreSQL of its own")
	ctx := t.Context()
	disk := smallDisk(t)
	server, err := pgserver.Start(ctx, &pgserver.Options{DataDir: filepath.Join(disk, "data"), Settings: map[string]string{
		// The disk fills under the table, not under the WAL: all writes here fit into its first
		// segment.
		"max_wal_size": "64MB", "min_wal_size": "32MB", "checkpoint_timeout": "1h", "autovacuum": "off",
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		server.Kill()
		_ = server.Stop()
	})
	pool, err := pgxpool.New(ctx, server.URL())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	if err := pgintent.Create(ctx, pool, nil); err != nil {
		t.Fatal(err)
	}
	var arrived atomic.Int64
	var answers atomic.Bool
	bank := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// A server that closes a connection with unread data on it resets it, and the reset may
		// overtake the answer.
		_, _ = io.Copy(io.Discard, r.Body)
		arrived.Add(1)
		if !answers.Load() {
			panic(http.ErrAbortHandler)
		}
		w.Header().Set("Idempotency-Status", "executed")
	}))
	defer bank.Close()
	transport := client.New(&http.Transport{DisableKeepAlives: true}, &client.Options{Honours: client.Everywhere, AttemptsMax: 1, Intents: pgintent.New(pool, nil)})
	body := make([]byte, 64<<10) // each needs new pages, so that none fits into the table's free space
	for i := range body {
		body[i] = byte(rand.IntN(256))
	}
	pay := func() error {
		response, err := (&http.Client{Transport: transport}).Post(bank.URL, "application/octet-stream", bytes.NewReader(body))
		if err == nil {
			_ = response.Body.Close()
		}
		return err
	}
	if err := pay(); !errors.Is(err, client.ErrUnknown) || arrived.Load() != 1 {
		t.Fatalf("with room %d requests arrived: %v", arrived.Load(), err)
	}
	filler := fillDisk(t, disk)
	for range 3 {
		if err := pay(); !errors.Is(err, client.ErrNotExecuted) || !errors.Is(err, client.ErrIntentRefused) || !strings.Contains(err.Error(), "53100") || arrived.Load() != 1 {
			t.Errorf("on a full disk %d requests arrived: %v", arrived.Load(), err)
		}
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	answers.Store(true)
	if report, err := transport.Resume(ctx, nil); err != nil || report != (client.Report{Settled: 1}) || arrived.Load() != 2 {
		t.Errorf("with room again: %+v, %v; %d requests arrived", report, err, arrived.Load())
	}
	if err := pay(); err != nil || arrived.Load() != 3 {
		t.Errorf("with room again %d requests arrived: %v", arrived.Load(), err)
	}
}
