//go:build unix

package chaos

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/process"
	"github.com/paidonce/idempotency/internal/pgtest"
)

// TestAKillThatHitsNobodyIsNotAwaited: a backend that was about to exit does not die of its
// SIGKILL, so the cluster continues; a backend that does die restarts the cluster.
func TestAKillThatHitsNobodyIsNotAwaited(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("starts PostgreSQL and crashes it")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	r := &run{started: time.Now(), tally: newTally()}
	r.cluster = newCluster(r, filepath.Join(pgtest.Folder(t), "data"))
	if err := r.cluster.start(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.cluster.close() })

	var pid int32
	before, err := r.postmasterStart(ctx, func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, `SELECT pg_backend_pid()`).Scan(&pid)
	})
	if err != nil {
		t.Fatal(err)
	}
	if crashed, err := r.awaitRestart(ctx, before, time.Millisecond); crashed || err != nil || r.tally.crashes.Load() != 0 {
		t.Errorf("after no kill: crashed is %t, error %v, crashes counted %d; want false, nil, 0", crashed, err, r.tally.crashes.Load())
	}
	if err := process.Kill(int(pid)); err != nil {
		t.Fatal(err)
	}
	if crashed, err := r.awaitRestart(ctx, before, crashNoticeMax); !crashed || err != nil || r.tally.crashes.Load() != 1 {
		t.Errorf("after a kill: crashed is %t, error %v, crashes counted %d; want true, nil, 1", crashed, err, r.tally.crashes.Load())
	}
}
