package boltintent

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/client/internal/intenttest"
)

// TestFullDiskIsNotExecuted: an intent that finds no room is not kept, nothing is sent, and the
// caller gets ErrNotExecuted. The kept intents stay whole, and there is room again when one is
// forgotten or the disk is cleared.
func TestFullDiskIsNotExecuted(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("THIS FAULT WAS NOT TESTED: only root can mount a small disk")
	}
	disk := t.TempDir()
	if err := syscall.Mount("tmpfs", disk, "tmpfs", syscall.MS_NOSUID|syscall.MS_NODEV, "size=1m"); errors.Is(err, syscall.EPERM) {
		t.Skip("THIS FAULT WAS NOT TESTED: this container may not mount a small disk; give it CAP_SYS_ADMIN")
	} else if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(disk, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	filler := filepath.Join(disk, "filler")
	if err := os.WriteFile(filler, make([]byte, 256<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(disk, "intents")
	s := open(t, path, nil)
	var arrived atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		arrived.Add(1)
		w.Header().Set("Idempotency-Status", "executed")
	}))
	defer server.Close()
	transport := client.New(nil, &client.Options{Honours: client.Everywhere, Intents: s})
	pay := func() error {
		response, err := (&http.Client{Transport: transport}).Post(server.URL, "text/plain", strings.NewReader(strings.Repeat("b", 64<<10)))
		if err == nil {
			_ = response.Body.Close()
		}
		return err
	}
	var keys []string
	full := func() {
		t.Helper()
		for n := len(keys); ; n++ {
			intent := intenttest.Intent(fmt.Sprintf("k%04d", n))
			_, err := s.Save(t.Context(), intent)
			if err == nil && n < 10_000 {
				keys = append(keys, intent.Key.Value)
				continue
			}
			if !errors.Is(err, client.ErrIntentRefused) || !errors.Is(err, syscall.ENOSPC) {
				t.Fatalf("on a full disk, after %d intents: %v", n, err)
			}
			return
		}
	}
	full()
	for range 3 {
		if err := pay(); !errors.Is(err, client.ErrNotExecuted) || !errors.Is(err, syscall.ENOSPC) || arrived.Load() != 0 {
			t.Errorf("%d requests arrived: %v", arrived.Load(), err)
		}
	}
	if !hasAll(s, keys...) {
		t.Error("on a full disk the intents are not what they were")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, path, nil) // it opens on a full disk
	transport = client.New(nil, &client.Options{Honours: client.Everywhere, Intents: s})
	if !hasAll(s, keys...) {
		t.Error("opened again, the intents are not what they were")
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	if err := pay(); err != nil || arrived.Load() != 1 {
		t.Errorf("with room again %d requests arrived: %v", arrived.Load(), err)
	}
	full()
	for len(keys) > 0 { // forgetting needs a little room for a moment
		err := s.Done(t.Context(), keys[0])
		if err != nil && !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
		if err != nil {
			t.Logf("%d are kept, and none can be forgotten: %v", len(keys), err)
			break
		}
		keys = keys[1:]
	}
	if !hasAll(s, keys...) {
		t.Error("in the end the intents are not what they were")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
