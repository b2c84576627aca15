package fileintent

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/client/internal/intenttest"
)

const childVariable = "PAIDONCE_FILEINTENT_CHILD"

func TestMain(m *testing.M) {
	if path := os.Getenv(childVariable); path != "" {
		os.Exit(child(path))
	}
	goleak.VerifyTestMain(m)
}

func open(t testing.TB, path string, options *Options) *Store {
	t.Helper()
	s, err := Open(path, options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() }) // a test may have closed it
	return s
}

func newPath(t testing.TB) string { return filepath.Join(t.TempDir(), "intents") }

func save(t testing.TB, s *Store, keys ...string) {
	t.Helper()
	for _, key := range keys {
		if _, err := s.Save(context.Background(), intenttest.Intent(key)); err != nil {
			t.Fatal(err)
		}
	}
}

func expectPending(t testing.TB, s *Store, want ...string) {
	t.Helper()
	if got, err := s.Pending(context.Background()); err != nil || strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("pending is %q, %v; want %q", got, err, want)
	}
}

func TestConformance(t *testing.T) {
	t.Parallel()
	intenttest.Run(t, func(t *testing.T) client.IntentStore { return open(t, newPath(t), nil) })
}

// TestConformanceWithConstantCompaction replaces the file after nearly every forgotten intent.
func TestConformanceWithConstantCompaction(t *testing.T) {
	t.Parallel()
	intenttest.Run(t, func(t *testing.T) client.IntentStore { return open(t, newPath(t), &Options{CompactBytes: 1}) })
}

func TestReopened(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	s := open(t, path, nil)
	save(t, s, "a", "b", "c")
	if err := errors.Join(s.Done(t.Context(), "a"), s.Abandon(t.Context(), "c"), s.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Save(t.Context(), intenttest.Intent("d")); !errors.Is(err, ErrClosed) || !errors.Is(err, client.ErrIntentRefused) {
		t.Errorf("save after Close: %v", err)
	}
	for _, err := range []error{s.Done(t.Context(), "b"), s.Abandon(t.Context(), "b")} {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("forgotten after Close: %v", err)
		}
	}
	s = open(t, path, nil)
	expectPending(t, s, "b")
	if info, err := os.Stat(path); err != nil || runtime.GOOS != "windows" && info.Mode().Perm() != 0o600 {
		t.Errorf("mode is %v, %v", info.Mode(), err)
	}
}

// TestModeIsTakenBack: a file that others could read is made the owner's.
func TestModeIsTakenBack(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("Windows has no modes")
	}
	path := newPath(t)
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	open(t, path, nil)
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode is %v, %v", info.Mode(), err)
	}
}

func TestOneProcessAtATime(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	s := open(t, path, nil)
	if _, err := Open(path, nil); !errors.Is(err, ErrLocked) {
		t.Errorf("a second opening: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, path, nil)
}

// TestTornTailIsDropped wherever a crash cut the last record, and what was whole before it is kept.
func TestTornTailIsDropped(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	s := open(t, path, nil)
	save(t, s, "a", "b")
	whole := s.size
	save(t, s, "c")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for cut := whole; cut < int64(len(content)); cut++ {
		if cut > whole+2*int64(headBytes) && cut%17 != 0 { // each opening takes a few writes to the disk
			continue
		}
		torn := filepath.Join(t.TempDir(), "intents")
		if err := os.WriteFile(torn, content[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		s := open(t, torn, nil)
		expectPending(t, s, "a", "b")
		if s.size != whole {
			t.Errorf("cut at %d of %d: the file has %d bytes after it, want %d", cut, len(content), s.size, whole)
		}
		_ = s.Close()
	}
	for cut := range len(magic) { // while it was being made
		torn := filepath.Join(t.TempDir(), "intents")
		if err := os.WriteFile(torn, content[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		expectPending(t, open(t, torn, nil))
	}
	// What a crash of the machine may leave: room for the record and nothing in it.
	if err := os.WriteFile(path, append(content[:whole:whole], make([]byte, 5000)...), 0o600); err != nil {
		t.Fatal(err)
	}
	expectPending(t, open(t, path, nil), "a", "b")
}

// TestDamageIsAnError: a byte that changes anywhere but in the last record may be an intent that is lost.
func TestDamageIsAnError(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	s := open(t, path, nil)
	save(t, s, "a")
	one := s.size
	save(t, s, "b", "c")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for at := range one {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		damaged := bytes.Clone(content)
		damaged[at] ^= 0x20
		if err := os.WriteFile(path, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(path, nil); !errors.Is(err, ErrDamaged) {
			t.Fatalf("byte %d was changed: %v", at, err)
		}
	}
	// The last loop left the last byte of a's record changed.
	s = open(t, path, &Options{DropDamaged: true})
	expectPending(t, s, "b", "c")
	if kept, err := os.ReadFile(path + ".damaged"); err != nil || len(kept) != len(content) {
		t.Errorf("%d bytes of the damaged file were kept: %v", len(kept), err)
	}
	save(t, s, "d")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	expectPending(t, open(t, path, nil), "b", "c", "d")
}

func TestNotOurFile(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	if err := os.WriteFile(path, []byte("root:x:0:0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path, nil); !errors.Is(err, ErrDamaged) {
		t.Errorf("another program's file: %v", err)
	}
	if content, err := os.ReadFile(path); err != nil || string(content) != "root:x:0:0\n" {
		t.Errorf("it was changed: %q, %v", content, err)
	}
	if _, err := Open(filepath.Join(t.TempDir(), "no", "folder"), nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a folder that is not there: %v", err)
	}
}

// TestBytesMax: what fits is kept, and what does not is refused until something is forgotten.
func TestBytesMax(t *testing.T) {
	t.Parallel()
	length := int64(len(encode(entry{key: "a", intent: intenttest.Intent("a")})))
	s := open(t, newPath(t), &Options{BytesMax: 2 * length})
	save(t, s, "a", "b")
	if _, err := s.Save(t.Context(), intenttest.Intent("c")); !errors.Is(err, ErrFull) || !errors.Is(err, client.ErrIntentRefused) {
		t.Errorf("over the limit: %v", err)
	}
	save(t, s, "a") // it is there
	if err := s.Done(t.Context(), "a"); err != nil {
		t.Error(err)
	}
	save(t, s, "c")
	expectPending(t, s, "b", "c")

	big := intenttest.Intent("big")
	big.Body = make([]byte, RecordBytesMax)
	if _, err := open(t, newPath(t), &Options{BytesMax: 4 * RecordBytesMax}).Save(t.Context(), big); !errors.Is(err, client.ErrIntentRefused) {
		t.Errorf("an intent over RecordBytesMax: %v", err)
	}
	defer func() {
		if recover() == nil {
			t.Error("a negative limit is taken")
		}
	}()
	_, _ = Open(newPath(t), &Options{BytesMax: -1})
}

// TestFileIsCompacted once more than CompactBytes of it, and more than is kept, is forgotten; and not before.
func TestFileIsCompacted(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	const compactBytes = 10_000
	s := open(t, path, &Options{CompactBytes: compactBytes})
	save(t, s, "kept")
	var most int64
	for i := range 500 {
		key := fmt.Sprintf("%04d", i)
		save(t, s, key)
		before, replaced := s.size-s.live, s.replace
		if err := s.Done(t.Context(), key); err != nil {
			t.Fatal(err)
		}
		if s.replace > replaced && before+2000 < compactBytes {
			t.Errorf("it was written anew with %d bytes forgotten", before)
		}
		most = max(most, s.size)
	}
	if s.replace == 0 || most > compactBytes+2000 {
		t.Errorf("it was written anew %d times, and had up to %d bytes", s.replace, most)
	}
	expectPending(t, s, "kept")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path+".new", []byte("half of a file"), 0o600); err != nil { // of a process that died at it
		t.Fatal(err)
	}
	expectPending(t, open(t, path, nil), "kept")
	if _, err := os.Stat(path + ".new"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the half is left: %v", err)
	}
}

// child saves intents and forgets some until it is killed, and says on stdout what was acknowledged.
func child(path string) int {
	s, err := Open(path, &Options{CompactBytes: 2000})
	if err != nil {
		fmt.Fprintln(os.Stderr, "child:", err)
		return 2
	}
	var group sync.WaitGroup
	for n := range 4 {
		group.Go(func() {
			for i := 0; ; i++ {
				key := fmt.Sprintf("%d-%d-%06d", os.Getpid(), n, i)
				if _, err := s.Save(context.Background(), intenttest.Intent(key)); err != nil {
					fmt.Fprintln(os.Stderr, "child:", err)
					os.Exit(2)
				}
				_, _ = os.Stdout.WriteString("saved " + key + "\n") // one write
				if i%2 == 0 {
					_, _ = os.Stdout.WriteString("forgets " + key + "\n")
					if err := s.Abandon(context.Background(), key); err != nil {
						fmt.Fprintln(os.Stderr, "child:", err)
						os.Exit(2)
					}
					_, _ = os.Stdout.WriteString("forgot " + key + "\n")
				}
			}
		})
	}
	group.Wait()
	return 0
}

// TestKilledWriterLosesNothing: what was acknowledged before kill -9 is there after it, and what was forgotten is not.
func TestKilledWriterLosesNothing(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	saved, forgets, forgot := map[string]bool{}, map[string]bool{}, map[string]bool{}
	for range 6 {
		command := exec.Command(os.Args[0])
		command.Env = append(os.Environ(), childVariable+"="+path)
		command.Stderr = os.Stderr
		stdout, err := command.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := command.Start(); err != nil {
			t.Fatal(err)
		}
		left := 20 + rand.IntN(300)
		for lines := bufio.NewScanner(stdout); lines.Scan(); left-- {
			what, key, _ := strings.Cut(lines.Text(), " ")
			map[string]map[string]bool{"saved": saved, "forgets": forgets, "forgot": forgot}[what][key] = true
			if left == 0 {
				if err := command.Process.Kill(); err != nil {
					t.Error(err)
				}
			}
		}
		if err := command.Wait(); err == nil || left > 0 {
			t.Fatalf("a child ended by itself: %v", err)
		}
	}
	s := open(t, path, nil)
	keys, err := s.Pending(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	pending := map[string]bool{}
	for _, key := range keys {
		pending[key] = true
		if forgot[key] {
			t.Errorf("%s was forgotten, and is there", key)
		}
		if intent, err := s.Take(t.Context(), key); err != nil || !sameRequest(intent, intenttest.Intent(key)) {
			t.Errorf("%s can't be read: %v", key, err)
		}
	}
	for key := range saved {
		if !pending[key] && !forgets[key] {
			t.Errorf("%s was saved, and is lost", key)
		}
	}
	if len(saved) == 0 || len(forgot) == 0 {
		t.Error("the children did nothing")
	}
}

// FuzzScan: whatever is in a file, reading it does no harm, and what it finds is written back as the same bytes.
func FuzzScan(f *testing.F) {
	var log []byte
	log = append(log, magic...)
	log = append(log, encode(entry{key: "a", intent: intenttest.Intent("a")})...)
	log = append(log, encode(entry{key: "a"})...)
	f.Add(log)
	f.Add(log[:len(log)-3])
	f.Add(append(log[:len(log):len(log)], make([]byte, 100)...))
	f.Add([]byte(magic))
	f.Fuzz(func(t *testing.T, content []byte) {
		written := []byte(magic)
		end, err := scan(bytes.NewReader(content), int64(len(content)), func(offset, length int64, e entry) {
			if offset != int64(len(written)) {
				t.Fatalf("a record at %d comes after one that ends at %d", offset, len(written))
			}
			written = append(written, encode(e)...)
			if int64(len(written)) != offset+length {
				t.Fatalf("a record of %d bytes was written back with %d", length, int64(len(written))-offset)
			}
		})
		if end > int64(len(content)) || end > 0 && !bytes.Equal(content[:end], written) {
			t.Fatalf("what was read up to %d is not what was written (%v)", end, err)
		}
	})
}

// FuzzDecode is FuzzScan behind the checksum.
func FuzzDecode(f *testing.F) {
	f.Add(encode(entry{key: "a", intent: intenttest.Intent("a")})[headBytes:])
	f.Add(encode(entry{key: "a"})[headBytes:])
	f.Fuzz(func(t *testing.T, payload []byte) {
		e, err := decode(payload)
		if err != nil {
			return
		}
		if again := encode(e)[headBytes:]; !bytes.Equal(again, payload) {
			t.Fatalf("%q was read and written back as %q", payload, again)
		}
	})
}
