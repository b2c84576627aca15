package pgserver

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestKilledOwnerLeavesNoPostgres(t *testing.T) {
	t.Parallel()
	h := startHelper(t, "serve", "")
	if !running(h.pid) {
		t.Fatal("no postmaster")
	}
	h.kill()
	t.Logf("postmaster gone %s after its owner", awaitGone(t, h.pid).Round(time.Millisecond))
}

func TestStartRightAfterKilledOwnerHasTheData(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(folder(t), "data")
	h := startHelper(t, "serve", dir)
	execute(t, h.url, "CREATE TABLE payment (id int)")
	for i := range 3 {
		execute(t, h.url, fmt.Sprintf("INSERT INTO payment VALUES (%d)", i))
		h.kill()
		begin := time.Now()
		s := startServer(t, &Options{DataDir: dir})
		t.Logf("started again %s after the kill", time.Since(begin).Round(time.Millisecond))
		if got := queryText(t, s.URL(), "SELECT count(*)::text FROM payment"); got != fmt.Sprint(i+1) {
			t.Errorf("%s payments, want %d", got, i+1)
		}
		if running(h.pid) {
			t.Error("the old postmaster runs beside the new one")
		}
		if err := s.Stop(); err != nil {
			t.Fatal(err)
		}
		h = startHelper(t, "serve", dir)
	}
}

func TestInterruptOfTheTerminalDoesNotReachPostgres(t *testing.T) {
	t.Parallel()
	h := startHelper(t, "serve", "")
	if err := syscall.Kill(-h.cmd.Process.Pid, syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	// A fast shutdown would end this query.
	if got := queryText(t, h.url, "SELECT pg_sleep(0.5)::text || 'alive'"); got != "alive" {
		t.Errorf("got %q", got)
	}
}

// A dying PostgreSQL is still there when the new one starts: a stopped backend keeps the shared
// memory in use.
func TestStartWaitsForOrphanedBackends(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(folder(t), "data")
	s := startServer(t, &Options{DataDir: dir})
	execute(t, s.URL(), "CREATE TABLE payment AS SELECT 'paid' AS state")
	backend := int(connect(t, s.URL()).PgConn().PID())
	signal(t, backend, syscall.SIGSTOP)
	signal(t, s.PID(), syscall.SIGKILL)
	<-s.Done()
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	const held = time.Second
	begin := time.Now()
	resume := time.AfterFunc(held, func() { _ = syscall.Kill(backend, syscall.SIGCONT) })
	defer resume.Stop()
	again := startServer(t, &Options{DataDir: dir})
	if took := time.Since(begin); took < held {
		t.Errorf("started after %s beside a backend of the old server", took)
	}
	if got := queryText(t, again.URL(), "SELECT state FROM payment"); got != "paid" {
		t.Errorf("state = %q", got)
	}
}

func TestStartWaitsForADyingPostmaster(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	// Another name of the folder must not hide the postmaster.
	link := filepath.Join(folder(t), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	h := startHelper(t, "serve", link)
	backend := int(connect(t, h.url).PgConn().PID())
	signal(t, backend, syscall.SIGSTOP) // the postmaster waits for it
	h.kill()
	const held = time.Second
	begin := time.Now()
	resume := time.AfterFunc(held, func() { _ = syscall.Kill(backend, syscall.SIGCONT) })
	defer resume.Stop()
	var progress bytes.Buffer
	startServer(t, &Options{DataDir: dir, Progress: &progress})
	if took := time.Since(begin); took < held {
		t.Errorf("started after %s beside the old postmaster", took)
	}
	if !strings.Contains(progress.String(), "waiting for the last PostgreSQL") {
		t.Errorf("progress %q", progress.String())
	}
}

func TestStartGivesUpOnAPostmasterThatNobodyHolds(t *testing.T) {
	t.Parallel()
	slow(t)
	dir := filepath.Join(folder(t), "data")
	s := startServer(t, &Options{DataDir: dir})
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	acct, err := pickAccount(dir)
	if err != nil {
		t.Fatal(err)
	}
	cluster := filepath.Join(dir, clusterName)
	other := acct.command(cluster, s.binaries.postgres(), append([]string{"-D", cluster}, settingArgs(map[string]string{
		"listen_addresses": "", "unix_socket_directories": cluster,
	})...)...)
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Process.Signal(syscall.SIGQUIT); _ = other.Wait() }()
	for pid := 0; pid == 0; time.Sleep(oldPollPeriod) {
		if pid, err = readPostmasterPID(filepath.Join(cluster, "postmaster.pid")); err != nil {
			t.Fatal(err)
		}
	}
	_, err = Start(t.Context(), &Options{DataDir: dir})
	if err == nil || !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), fmt.Sprint(other.Process.Pid)) {
		t.Errorf("err = %v", err)
	}
	if !running(other.Process.Pid) {
		t.Error("the other postmaster was ended")
	}
}

// After a crash the number in postmaster.pid may belong to any process of the same user.
func TestReusedProcessIDInPostmasterPIDDoesNotStopTheStart(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(folder(t), "data")
	s := startServer(t, &Options{DataDir: dir})
	signal(t, s.PID(), syscall.SIGKILL)
	<-s.Done()
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	acct, err := pickAccount(dir)
	if err != nil {
		t.Fatal(err)
	}
	other := acct.command("/", "/bin/sleep", "60")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Process.Kill(); _ = other.Wait() }()
	file := filepath.Join(dir, clusterName, "postmaster.pid")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "\n")
	if err := os.WriteFile(file, []byte(fmt.Sprintf("%d\n%s", other.Process.Pid, rest)), 0o600); err != nil {
		t.Fatal(err)
	}
	startServer(t, &Options{DataDir: dir})
}

func TestStopOfAHangingServerIsImmediateAndSaysSo(t *testing.T) {
	t.Parallel()
	slow(t)
	s, err := Start(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	signal(t, int(connect(t, s.URL()).PgConn().PID()), syscall.SIGSTOP)
	err = s.Stop()
	if err == nil || !strings.Contains(err.Error(), "stopped immediately") {
		t.Errorf("err = %v", err)
	}
	if again := s.Stop(); again != err {
		t.Errorf("second Stop: %v", again)
	}
	if running(s.PID()) {
		t.Error("postmaster runs after Stop")
	}
}

func TestFolderOfAKilledOwnerIsSweptAndNoOther(t *testing.T) {
	t.Parallel()
	living := startServer(t, nil)
	h := startHelper(t, "serve", "")
	folders, err := filepath.Glob("/tmp/" + runPrefix + "*/data/" + lockName)
	if err != nil {
		t.Fatal(err)
	}
	stale := ""
	for _, lock := range folders {
		if text, err := os.ReadFile(lock); err == nil && string(text) == fmt.Sprintln(h.cmd.Process.Pid) {
			stale = filepath.Dir(filepath.Dir(lock))
		}
	}
	if stale == "" {
		t.Fatal("the helper has no folder")
	}
	h.kill()
	awaitGone(t, h.pid)
	startServer(t, nil)
	if _, err := os.Stat(stale); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left: %v", stale, err)
	}
	queryText(t, living.URL(), "SELECT 'alive'")
}

func TestWatcherEndsTheProcessWithItsOwnerOnly(t *testing.T) {
	t.Parallel()
	watched := exec.Command("/bin/sleep", "60")
	if err := watched.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = watched.Process.Kill(); _ = watched.Wait() }()

	unwatch, err := startWatcher(watched.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	unwatch()
	h := startHelper(t, "watch", fmt.Sprint(watched.Process.Pid))
	if !running(watched.Process.Pid) {
		t.Fatal("ended while its owners lived or had let go")
	}
	h.kill()
	awaitGone(t, watched.Process.Pid)
}

func signal(t *testing.T, pid int, sig syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(pid, sig); err != nil {
		t.Fatalf("signal %d: %v", pid, err)
	}
}
