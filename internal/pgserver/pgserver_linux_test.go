package pgserver

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func TestStartAnswersAndStopEndsIt(t *testing.T) {
	t.Parallel()
	begin := time.Now()
	s := startAnyway(t, nil)
	t.Logf("started PostgreSQL %s in %s", s.Version(), time.Since(begin).Round(time.Millisecond))

	for query, want := range map[string]string{
		"SELECT current_user":                               superuser,
		"SELECT split_part(version(), ' ', 2)":              s.Version(),
		"SELECT current_setting('server_encoding')":         "UTF8",
		"SELECT datcollate FROM pg_database LIMIT 1":        "C",
		"SELECT current_setting('fsync')":                   "on",
		"SELECT current_setting('max_connections')":         "100",
		"SELECT current_setting('listen_addresses')":        "",
		"SELECT current_setting('unix_socket_permissions')": "0700",
	} {
		if got := queryText(t, s.URL(), query); got != want {
			t.Errorf("%s = %q, want %q", query, got, want)
		}
	}

	execute(t, s.URL(), "CREATE DATABASE bank")
	if got := queryText(t, s.DatabaseURL("bank"), "SELECT current_database()"); got != "bank" {
		t.Errorf("connected to %q", got)
	}
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-s.Done():
	default:
		t.Error("Done is open after Stop")
	}
	if running(s.PID()) {
		t.Error("postmaster runs after Stop")
	}
}

func TestSettingsWinOverDefaults(t *testing.T) {
	t.Parallel()
	s := startServer(t, &Options{Settings: map[string]string{"fsync": "off", "max_connections": "17"}})
	for name, want := range map[string]string{"fsync": "off", "max_connections": "17"} {
		if got := queryText(t, s.URL(), "SELECT current_setting('"+name+"')"); got != want {
			t.Errorf("%s = %q, want %q", name, got, want)
		}
	}
}

func TestSettingsThatStartDecidesAreRefused(t *testing.T) {
	t.Parallel()
	_, err := Start(t.Context(), &Options{Settings: map[string]string{"Listen_Addresses": "*"}})
	if err == nil || !strings.Contains(err.Error(), "Listen_Addresses") {
		t.Fatalf("err = %v", err)
	}
}

func TestTwoServersAtOnceAreApart(t *testing.T) {
	t.Parallel()
	a, b := startServer(t, nil), startServer(t, nil)
	execute(t, a.URL(), "CREATE TABLE payment (id int)")
	execute(t, b.URL(), "CREATE TABLE payment (id int)")
	if a.URL() == b.URL() || a.PID() == b.PID() {
		t.Errorf("same server: %s, %d", a.URL(), a.PID())
	}
}

func TestDataSurvivesStopAndStart(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(folder(t), "not", "there yet")
	s := startServer(t, &Options{DataDir: dir})
	execute(t, s.URL(), "CREATE TABLE payment AS SELECT 'paid' AS state")
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	again := startServer(t, &Options{DataDir: dir})
	if got := queryText(t, again.URL(), "SELECT state FROM payment"); got != "paid" {
		t.Errorf("state = %q", got)
	}
}

func TestStopMayBeCalledAgainAndAtOnce(t *testing.T) {
	t.Parallel()
	s := startServer(t, nil)
	var calls sync.WaitGroup
	for range 4 {
		calls.Go(func() {
			if err := s.Stop(); err != nil {
				t.Error(err)
			}
			if running(s.PID()) {
				t.Error("Stop returned before the end")
			}
		})
	}
	calls.Wait()
}

func TestStopDoesNotWaitForClients(t *testing.T) {
	t.Parallel()
	s := startServer(t, nil)
	conn := connect(t, s.URL())
	if _, err := conn.Exec(t.Context(), "BEGIN"); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begin); took > stopWaitMax/2 {
		t.Errorf("Stop took %s", took)
	}
}

func TestDoneTellsThatPostgresDied(t *testing.T) {
	t.Parallel()
	s := startServer(t, nil)
	if err := s.process.signalImmediate(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-s.Done():
	case <-time.After(stopWaitMax):
		t.Fatal("Done is open")
	}
	if err := s.Stop(); err != nil {
		t.Errorf("Stop of a dead server: %v", err)
	}
}

// The kernel ends PostgreSQL with the thread that forked it, so that thread must not be the
// caller's.
func TestServerOutlivesTheThreadThatStartedIt(t *testing.T) {
	t.Parallel()
	slow(t)
	started := make(chan *Server)
	var startOnDyingThread func()
	startOnDyingThread = func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if syscall.Gettid() == os.Getpid() {
			// Go does not end the first thread; held here, it cannot run the next goroutine.
			next := make(chan struct{})
			go func() {
				runtime.LockOSThread()
				close(next)
				startOnDyingThread()
			}()
			<-next
			runtime.UnlockOSThread()
			return
		}
		s, err := Start(t.Context(), nil)
		if err != nil {
			t.Error(err)
		}
		started <- s
	}
	go startOnDyingThread()
	s := <-started
	if s == nil {
		return
	}
	defer s.Stop()
	if got := queryText(t, s.URL(), "SELECT pg_sleep(0.5)::text || 'alive'"); got != "alive" {
		t.Errorf("got %q", got)
	}
}

func TestFailedStartShowsTheLog(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(folder(t), "data")
	_, err := Start(t.Context(), &Options{DataDir: dir, Settings: map[string]string{"max_connections": "many"}})
	if err == nil || !strings.Contains(err.Error(), `invalid value for parameter "max_connections"`) {
		t.Fatalf("err = %v", err)
	}
	startServer(t, &Options{DataDir: dir}) // and the folder is free again
}

func TestStartThatGetsNoAnswerLeavesNoPostgres(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(folder(t), "data")
	if err := startServer(t, &Options{DataDir: dir}).Stop(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		defer cancel()
		for ctx.Err() == nil {
			if pid, err := readPostmasterPID(filepath.Join(dir, clusterName, "postmaster.pid")); err != nil || pid != 0 {
				return
			}
			time.Sleep(time.Millisecond)
		}
	}()
	// The setting makes a client wait for one answer for longer than Start waits.
	_, err := Start(ctx, &Options{DataDir: dir, Settings: map[string]string{"pre_auth_delay": "3"}})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("err = %v", err)
	}
	if left := processesNaming(t, dir); len(left) > 0 {
		t.Errorf("left %q", left)
	}
	startServer(t, &Options{DataDir: dir})
}

// Not parallel: TMPDIR shows that nothing is left.
func TestCancelledStartLeavesNothing(t *testing.T) {
	tmp := folder(t)
	t.Setenv("TMPDIR", tmp)
	begin := time.Now()
	if err := startServer(t, nil).Stop(); err != nil {
		t.Fatal(err)
	}
	whole := time.Since(begin)

	const steps = 10
	cancelled := 0
	for i := range steps {
		ctx, cancel := context.WithTimeout(t.Context(), whole*time.Duration(i)/steps)
		dir := filepath.Join(tmp, "data")
		temporary := i%2 == 0
		opts := &Options{DataDir: dir}
		if temporary {
			opts = nil
		}
		s, err := Start(ctx, opts)
		cancel()
		if err == nil {
			if err := s.Stop(); err != nil {
				t.Fatal(err)
			}
		} else if cancelled++; !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("step %d: %v", i, err)
		}
		if _, err := os.Stat(filepath.Join(dir, clusterName)); errors.Is(err, fs.ErrNotExist) {
			if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("step %d left a data folder without data", i)
			}
		} else if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		left, err := filepath.Glob(filepath.Join(tmp, "*"))
		if err != nil || len(left) > 0 {
			t.Errorf("step %d left %q, %v", i, left, err)
		}
		if pids := processesNaming(t, tmp); len(pids) > 0 {
			t.Errorf("step %d left processes %v", i, pids)
		}
	}
	if cancelled < 3 { // there are more, unless the first start was slow
		t.Errorf("only %d of %d starts were cancelled", cancelled, steps)
	}
}

// processesNaming returns the living processes with text in their command line.
func processesNaming(t *testing.T, text string) (names []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if line, err := os.ReadFile(file); err == nil && strings.Contains(string(line), text) {
			names = append(names, strings.ReplaceAll(string(line), "\x00", " "))
		}
	}
	return names
}
