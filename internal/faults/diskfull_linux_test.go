package faults_test

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/paidonce/idempotency/internal/pgserver"
	"github.com/paidonce/idempotency/internal/pgtest"
)

func TestF17DiskFullIsNotExecutedUntilThereIsSpace(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "starts a PostgreSQL of its own")
	disk := smallDisk(t)
	server, err := pgserver.Start(t.Context(), &pgserver.Options{DataDir: filepath.Join(disk, "data"), Settings: map[string]string{
		// The disk fills under the tables, not under the WAL: all writes here fit into its first
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
	// Each payment needs new pages, so that none fits into the tables' free space.
	memo := make([]byte, 64<<10)
	for i := range memo {
		memo[i] = 'a' + byte(rand.IntN(26))
	}
	s := serve(t, server.URL(), &serviceOptions{memo: string(memo)})
	first := s.mustPay(t, "before", 201, "executed")

	filler := fillDisk(t, disk)
	for _, key := range []string{"one", "two", "one"} {
		s.mustPay(t, key, 503, "not-executed")
	}
	if reason := whyFull(server.URL(), string(memo)); !strings.Contains(reason, "53100") {
		t.Errorf("the disk is not full for PostgreSQL: %q", reason)
	}
	s.mustPay(t, "before", 201, "replayed") // existing records can be read
	for _, key := range []string{"one", "two"} {
		if payments, records := s.payments(t, key), s.records(t, key); payments != 0 || records != 0 {
			t.Errorf("%s left %d payments and %d records", key, payments, records)
		}
	}

	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"one", "two"} {
		s.mustPay(t, key, 201, "executed")
		s.mustPay(t, key, 201, "replayed")
	}
	if again := s.mustPay(t, "before", 201, "replayed"); again.body != first.body {
		t.Errorf("replayed %s, first %s", again.body, first.body)
	}
	s.onePayment(t, "before", "one", "two")
}

// smallDisk mounts a file system of 90 MB, which a new PostgreSQL leaves half empty. If the right
// to mount is missing no package helps, so the test is skipped even if faults are required.
func smallDisk(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("THIS FAULT WAS NOT TESTED: only root can mount a small disk; run as root: go test ./internal/faults -run TestF17")
	}
	disk := pgtest.Folder(t)
	if err := unix.Mount("tmpfs", disk, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "size=90m,mode=0711"); err != nil {
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
			t.Skip("THIS FAULT WAS NOT TESTED: this container may not mount a small disk; give it CAP_SYS_ADMIN (docker run --privileged)")
		}
		t.Fatalf("mount: %v", err)
	}
	t.Cleanup(func() {
		err := unix.Unmount(disk, 0)
		for begin := time.Now(); errors.Is(err, unix.EBUSY) && time.Since(begin) < awaitMax; err = unix.Unmount(disk, 0) {
			time.Sleep(10 * time.Millisecond) // the last of PostgreSQL's processes still has its folder open
		}
		if err != nil {
			t.Errorf("unmount %s: %v", disk, err)
		}
	})
	return disk
}

// fillDisk writes a file until not a page is left, and returns its name.
func fillDisk(t *testing.T, disk string) string {
	t.Helper()
	name := filepath.Join(disk, "filler")
	file, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for _, size := range []int{1 << 20, 4 << 10} {
		for block := make([]byte, size); err == nil; {
			_, err = file.Write(block)
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatalf("fill: %v", err)
		}
		err = nil
	}
	return name
}

// whyFull tries a payment behind the service's back and returns why it failed.
func whyFull(databaseURL, memo string) string {
	if err := tryQuery(databaseURL, nil, "INSERT INTO payments (key, memo) VALUES ('behind', $1)", memo); err != nil {
		return err.Error()
	}
	return ""
}
