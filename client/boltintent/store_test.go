package boltintent

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/client/internal/intenttest"
)

// childVariable makes the test binary another process: "<kind> <file> <round>".
const childVariable = "PAIDONCE_BOLTINTENT_CHILD"

func TestMain(m *testing.M) {
	if arguments := strings.Fields(os.Getenv(childVariable)); len(arguments) == 3 {
		os.Exit(child(arguments[0], arguments[1], arguments[2]))
	}
	os.Exit(m.Run())
}

func open(t testing.TB, path string, options *Options) *Store {
	t.Helper()
	s, err := Open(path, options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() }) // a test may have broken it
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
	if got, err := s.Pending(context.Background()); err != nil || !slices.Equal(got, want) {
		t.Errorf("pending is %q, %v; want %q", got, err, want)
	}
}

// hasAll reports whether a store has exactly these intents, each as it was saved.
func hasAll(s *Store, keys ...string) bool {
	pending, err := s.Pending(context.Background())
	if err != nil || !slices.Equal(pending, keys) {
		return false
	}
	for _, key := range keys {
		if intent, err := s.Take(context.Background(), key); err != nil || intent == nil || !sameRequest(intent, intenttest.Intent(key)) {
			return false
		}
	}
	return true
}

func TestConformance(t *testing.T) {
	t.Parallel()
	intenttest.Run(t, func(t *testing.T) client.IntentStore { return open(t, newPath(t), nil) })
}

func TestReopened(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	if err := os.WriteFile(path, nil, 0o644); err != nil { // others could read it
		t.Fatal(err)
	}
	s := open(t, path, nil)
	save(t, s, "z", "b", "c")
	if err := errors.Join(s.Done(t.Context(), "z"), s.Abandon(t.Context(), "c"), s.Close(), s.Close()); err != nil {
		t.Fatal(err)
	}
	_, saveErr := s.Save(t.Context(), intenttest.Intent("d"))
	_, pendingErr := s.Pending(t.Context())
	_, takeErr := s.Take(t.Context(), "b")
	for name, err := range map[string]error{
		"save": saveErr, "pending": pendingErr, "take": takeErr, "done": s.Done(t.Context(), "b"), "abandon": s.Abandon(t.Context(), "b"),
	} {
		if !errors.Is(err, ErrClosed) || !errors.Is(err, client.ErrIntentRefused) {
			t.Errorf("%s after Close: %v", name, err)
		}
	}
	s = open(t, path, nil)
	save(t, s, "a")
	expectPending(t, s, "b", "a") // by age
	if info, err := os.Stat(path); err != nil || runtime.GOOS != "windows" && info.Mode().Perm() != 0o600 {
		t.Errorf("mode is %v, %v", info.Mode(), err)
	}
}

// TestCommitsAreDurable: none of bbolt's options that weaken durability is set.
func TestCommitsAreDurable(t *testing.T) {
	t.Parallel()
	if db := open(t, newPath(t), nil).db; db.NoSync || db.NoGrowSync || db.NoFreelistSync {
		t.Errorf("NoSync %t, NoGrowSync %t, NoFreelistSync %t", db.NoSync, db.NoGrowSync, db.NoFreelistSync)
	}
}

// start starts another process, and returns the lines that it prints. Each test ends it.
func start(t *testing.T, what, path, round string) (*exec.Cmd, *bufio.Scanner) {
	t.Helper()
	command := exec.Command(os.Args[0])
	command.Env = append(os.Environ(), childVariable+"="+what+" "+path+" "+round)
	command.Stderr = os.Stderr
	stdout, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = command.Process.Kill() // it may have ended
		_ = command.Wait()
	})
	return command, bufio.NewScanner(stdout)
}

func child(what, path, round string) int {
	// Each line goes out at once, because the process may be killed after it.
	say := func(words ...string) { _, _ = os.Stdout.WriteString(strings.Join(words, " ") + "\n") }
	s, err := Open(path, nil)
	if err != nil {
		fmt.Fprintln(os.Stderr, "child:", err)
		return 2
	}
	say("open")
	if what == "hold" {
		time.Sleep(time.Minute) // it is killed
		return 2
	}
	var group sync.WaitGroup
	for n := range 4 {
		group.Go(func() {
			for i := 0; ; i++ {
				key := fmt.Sprintf("%s-%d-%06d", round, n, i)
				say("saving", key)
				if _, err := s.Save(context.Background(), intenttest.Intent(key)); err != nil {
					fmt.Fprintln(os.Stderr, "child:", err)
					os.Exit(2)
				}
				say("saved", key)
				if i%3 > 0 {
					say("forgets", key)
					if err := s.Abandon(context.Background(), key); err != nil {
						fmt.Fprintln(os.Stderr, "child:", err)
						os.Exit(2)
					}
					say("forgot", key)
				}
			}
		})
	}
	group.Wait()
	return 0
}

// TestOneProcessAtATime: while one process has the file open, another gets an error that names it,
// and gets the file when the holder is killed.
func TestOneProcessAtATime(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	other, lines := start(t, "hold", path, "1")
	if !lines.Scan() {
		t.Fatal("the other process did not open the file")
	}
	began := time.Now()
	_, err := Open(path, &Options{LockTimeout: 50 * time.Millisecond})
	if !errors.Is(err, ErrLocked) || time.Since(began) > 30*time.Second {
		t.Fatalf("after %v: %v", time.Since(began), err)
	}
	if name := fmt.Sprintf("process %d (%.15s", other.Process.Pid, filepath.Base(os.Args[0])); runtime.GOOS == "linux" && !strings.Contains(err.Error(), name) {
		t.Errorf("the error names no %q: %v", name, err)
	}
	opened := make(chan error, 1)
	go func() { // it waits while the other is ending
		s, err := Open(path, &Options{LockTimeout: time.Minute})
		if err == nil {
			_, err = Open(path, &Options{LockTimeout: time.Millisecond})
			if !errors.Is(err, ErrLocked) || runtime.GOOS == "linux" && !strings.Contains(err.Error(), "this process has opened") {
				t.Errorf("opened twice in one process: %v", err)
			}
			err = s.Close()
		}
		opened <- err
	}()
	if err := other.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := <-opened; err != nil {
		t.Error(err)
	}
}

// TestKilledWhileItSaves: a process is killed with kill -9 in the middle of its commits, again and
// again. Saved intents are there, forgotten ones are not, and the file is whole.
func TestKilledWhileItSaves(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	said := map[string]map[string]bool{"saving": {}, "saved": {}, "forgets": {}, "forgot": {}, "open": {}}
	for round := range 12 {
		command, lines := start(t, "save", path, fmt.Sprintf("%02d", round))
		// Read to the end: all lines from before the kill count.
		for left := 20 + rand.IntN(100); lines.Scan(); left-- {
			what, key, _ := strings.Cut(lines.Text(), " ")
			said[what][key] = true
			if left == 0 {
				if err := command.Process.Kill(); err != nil {
					t.Error(err)
				}
			}
		}
	}
	s := open(t, path, nil)
	keys, err := s.Pending(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range keys {
		if said["forgot"][key] || !said["saving"][key] {
			t.Errorf("%s was forgotten, or never saved, and is there", key)
		}
		if intent, err := s.Take(t.Context(), key); err != nil || !sameRequest(intent, intenttest.Intent(key)) {
			t.Errorf("%s can't be read: %v", key, err)
		}
	}
	for key := range said["saved"] {
		if !said["forgets"][key] && !slices.Contains(keys, key) {
			t.Errorf("%s was saved, and is lost", key)
		}
	}
	if len(said["forgot"]) == 0 || len(keys) == 0 {
		t.Error("no child did anything")
	}
}

// TestReplacedFileKeepsNothing: the lock is on the file itself, so there is no lock file that could
// be removed. If the name belongs to another file by now, Save fails: the intent would never be
// found.
func TestReplacedFileKeepsNothing(t *testing.T) {
	t.Parallel()
	for name, replace := range map[string]func(path string) error{
		"removed": os.Remove,
		"renamed": func(path string) error { return os.Rename(path, path+".old") },
		"another file": func(path string) error {
			return errors.Join(os.Rename(path, path+".old"), os.WriteFile(path, nil, 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := newPath(t)
			s := open(t, path, nil)
			save(t, s, "a")
			if err := replace(path); err != nil {
				t.Fatal(err)
			}
			second := open(t, path, nil)
			save(t, second, "b")
			_, saveErr := s.Save(t.Context(), intenttest.Intent("c"))
			_, pendingErr := s.Pending(t.Context())
			_, takeErr := s.Take(t.Context(), "a")
			for call, err := range map[string]error{
				"save": saveErr, "pending": pendingErr, "take": takeErr, "done": s.Done(t.Context(), "a"), "abandon": s.Abandon(t.Context(), "a"),
			} {
				if !errors.Is(err, ErrReplaced) || !errors.Is(err, client.ErrIntentRefused) {
					t.Errorf("%s: %v", call, err)
				}
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			expectPending(t, second, "b")
		})
	}
}

// whole returns the bytes of a file with three intents: one has overflow pages, and one was saved
// after another was forgotten.
func whole(t testing.TB) (content []byte, keys []string) {
	t.Helper()
	path := newPath(t)
	s := open(t, path, nil)
	save(t, s, "a", "gone")
	if _, err := s.Save(context.Background(), big()); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Done(context.Background(), "gone"), s.Done(context.Background(), "big")); err != nil {
		t.Fatal(err)
	}
	save(t, s, "b", "c")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// Leave out the bytes after the pages that the heads count: they are only room to grow.
	page := os.Getpagesize()
	pages := max(order.Uint64(content[headBytes+40:]), order.Uint64(content[page+headBytes+40:]))
	return content[:int(pages)*page], []string{"a", "b", "c"}
}

func big() *client.Intent {
	intent := intenttest.Intent("big")
	intent.Body = make([]byte, 20<<10)
	return intent
}

// reopen opens a file of these bytes, and reports whether all intents are there. An error must be
// ErrDamaged, and leave the file unchanged.
func reopen(t *testing.T, path string, content []byte, keys []string, what string) (intact bool) {
	t.Helper()
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Open(path, nil)
	if err != nil {
		if now, readErr := os.ReadFile(path); !errors.Is(err, ErrDamaged) || readErr != nil || string(now) != string(content) {
			t.Fatalf("%s: %v; %v", what, err, readErr)
		}
		return false
	}
	if !hasAll(s, keys...) {
		t.Fatalf("%s: it opens, and its intents are not what they were", what)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return true
}

// TestDamageIsAnError: every changed bit of the file is an error, unless nothing depends on it.
func TestDamageIsAnError(t *testing.T) {
	t.Parallel()
	content, keys := whole(t)
	path := newPath(t)
	page := os.Getpagesize()
	damages, intact := 0, 0
	for at := range content {
		if offset := at % page; offset > 512 && offset < page-512 && at%11 > 0 {
			continue
		}
		changed := slices.Clone(content)
		changed[at] ^= byte(1 << (at % 8))
		// Each opening takes a few writes to the disk.
		if _, err := readFrom(bytes.NewReader(changed), uint64(len(changed))); err != nil && at%101 > 0 {
			damages++
		} else if err == nil && at%1009 > 0 {
			intact++
		} else if reopen(t, path, changed, keys, fmt.Sprintf("bit %d of byte %d", at%8, at)) {
			intact++
		} else {
			damages++
		}
	}
	for n := range len(content) / page { // a page of zeros, and a copy of another page
		for name, fill := range map[string]func([]byte){
			"shorter by an element": func(b []byte) { order.PutUint16(b[10:], max(order.Uint16(b[10:]), 1)-1) },
			"zeros":                 func(b []byte) { clear(b) },
			"its neighbour":         func(b []byte) { copy(b, content[(n+1)*page%len(content):]) },
		} {
			changed := slices.Clone(content)
			fill(changed[n*page : (n+1)*page])
			if !reopen(t, path, changed, keys, fmt.Sprintf("page %d became %s", n, name)) {
				damages++
			}
		}
	}
	t.Logf("%d of %d changes were noticed", damages, damages+intact)
	if damages < 500 || intact == 0 {
		t.Errorf("%d were noticed, %d did nothing", damages, intact)
	}
}

// TestCutFileIsAnError, wherever it is cut.
func TestCutFileIsAnError(t *testing.T) {
	t.Parallel()
	content, keys := whole(t)
	path := newPath(t)
	for end := 1; end < len(content); end += 997 {
		if reopen(t, path, content[:end], keys, fmt.Sprintf("cut at %d of %d", end, len(content))) && end < len(content)/2 {
			t.Errorf("cut at %d of %d it opens", end, len(content))
		}
	}
}

// TestFileThatIsCutWhileItIsOpen: cutting the file ends no process.
func TestFileThatIsCutWhileItIsOpen(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("Windows cuts no file that is mapped")
	}
	for _, size := range []int64{0, 100, int64(os.Getpagesize()), 2 * int64(os.Getpagesize()), 3 * int64(os.Getpagesize())} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			t.Parallel()
			path := newPath(t)
			s := open(t, path, nil)
			save(t, s, "a")
			if _, err := s.Save(t.Context(), big()); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(path, size); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				_, saveErr := s.Save(t.Context(), intenttest.Intent("b"))
				_, takeErr := s.Take(t.Context(), "big")
				for name, err := range map[string]error{"save": saveErr, "take": takeErr, "abandon": s.Abandon(t.Context(), "big")} {
					if !errors.Is(err, ErrDamaged) {
						t.Errorf("%s: %v", name, err)
					}
				}
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			if _, err := Open(path, nil); size > 0 && !errors.Is(err, ErrDamaged) {
				t.Errorf("opened again: %v", err)
			}
		})
	}
}

// TestNotAFileOfIntents: another program's file is left as it is, even if it is a bbolt file.
func TestNotAFileOfIntents(t *testing.T) {
	t.Parallel()
	text := newPath(t)
	if err := os.WriteFile(text, []byte(strings.Repeat("root:x:0:0\n", 2000)), 0o600); err != nil {
		t.Fatal(err)
	}
	theirs := newPath(t)
	db, err := bbolt.Open(theirs, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		bucket, err := tx.CreateBucket([]byte("theirs"))
		if err != nil {
			return err
		}
		return bucket.Put([]byte("a"), []byte("b"))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{text, theirs} {
		before, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Open(path, nil); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "move it away") {
			t.Errorf("another program's file: %v", err)
		}
		if after, err := os.ReadFile(path); err != nil || string(after) != string(before) {
			t.Errorf("it was changed: %v", err)
		}
	}
	if _, err := Open(filepath.Join(t.TempDir(), "no", "folder"), nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a folder that is not there: %v", err)
	}
}

// TestBodyIsNoRecord: a body that contains a whole file of intents, or a record, stays a body, even
// in a damaged file.
func TestBodyIsNoRecord(t *testing.T) {
	t.Parallel()
	content, _ := whole(t)
	path := newPath(t)
	s := open(t, path, nil)
	save(t, s, "honest")
	forged := &client.Intent{Key: idempotency.Key{Value: "forged"}, Method: http.MethodPost, URL: "https://bank.example/transfers?to=mallory"}
	record, err := encode([]byte("forged"), 1, forged, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	upload := intenttest.Intent("upload")
	upload.Body = slices.Concat(record, content, record)
	if _, err := s.Save(t.Context(), upload); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, path, nil)
	expectPending(t, s, "honest", "upload")
	if got, err := s.Take(t.Context(), "upload"); err != nil || !sameRequest(got, upload) {
		t.Errorf("the upload is not what was saved: %v", err)
	}
	info, err := os.Stat(path)
	if err := errors.Join(err, s.Close(), os.Truncate(path, info.Size()-int64(os.Getpagesize())-3)); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if s, err := Open(path, nil); err == nil {
		expectPending(t, s, "honest", "upload")
		_ = s.Close()
	} else if !errors.Is(err, ErrDamaged) {
		t.Error(err)
	}
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("a cut file keeps Open busy for %v", took)
	}
}

// TestBytesMax: an intent that fits is kept. One that does not is refused until another is
// forgotten.
func TestBytesMax(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	record, err := encode([]byte("a"), 1, intenttest.Intent("a"), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	options := &Options{BytesMax: 2 * size([]byte("a"), record)}
	s := open(t, path, options)
	save(t, s, "a", "b")
	for range 2 { // as it is, and opened again
		if _, err := s.Save(t.Context(), intenttest.Intent("c")); !errors.Is(err, ErrFull) || !errors.Is(err, client.ErrIntentRefused) {
			t.Errorf("over the limit: %v", err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = open(t, path, options)
	}
	save(t, s, "a") // it is there
	if err := s.Done(t.Context(), "a"); err != nil {
		t.Error(err)
	}
	save(t, s, "c")
	expectPending(t, s, "b", "c")
	for name, options := range map[string]*Options{"BytesMax": {BytesMax: -1}, "LockTimeout": {LockTimeout: -1}} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("a negative %s is taken", name)
				}
			}()
			_, _ = Open(newPath(t), options) // it panics
		}()
	}
}

// FuzzRead: reading ends and does no harm, whatever the file contains.
func FuzzRead(f *testing.F) {
	content, _ := whole(f)
	f.Add(content, uint16(0), byte(0))
	f.Add(content[:len(content)/2], uint16(17), byte(1))
	f.Fuzz(func(t *testing.T, content []byte, at uint16, change byte) {
		if len(content) > 0 {
			content = slices.Clone(content)
			content[int(at)%len(content)] ^= change
		}
		_, _ = readFrom(strings.NewReader(string(content)), uint64(len(content))) // it returns
	})
}
