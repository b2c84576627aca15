package pgserver

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestHeldDataDirIsInUse(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(folder(t), "data")
	s := startServer(t, &Options{DataDir: dir})
	link := dir + "-link"
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{dir, link} {
		_, err := Start(t.Context(), &Options{DataDir: name})
		if !errors.Is(err, ErrDataDirInUse) || !strings.Contains(err.Error(), dir) ||
			!strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
			t.Errorf("err = %v", err)
		}
	}
	queryText(t, s.URL(), "SELECT 'alive'")
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	startServer(t, &Options{DataDir: dir})
}

func TestDataDirHeldByAnotherProcessIsInUse(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(folder(t), "data")
	h := startHelper(t, "serve", dir)
	_, err := Start(t.Context(), &Options{DataDir: dir})
	if !errors.Is(err, ErrDataDirInUse) || !strings.Contains(err.Error(), fmt.Sprint(h.cmd.Process.Pid)) {
		t.Errorf("err = %v", err)
	}
}

func TestForeignFolderIsRefusedAndUntouched(t *testing.T) {
	t.Parallel()
	for name, file := range map[string]string{"someone's files": "thesis.txt", "another PostgreSQL": "PG_VERSION"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := folder(t)
			if err := os.WriteFile(filepath.Join(dir, file), []byte("15\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			before := listing(t, dir)
			_, err := Start(t.Context(), &Options{DataDir: dir})
			if err == nil || !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), file) {
				t.Errorf("err = %v", err)
			}
			if after := listing(t, dir); after != before {
				t.Errorf("changed from\n%sto\n%s", before, after)
			}
		})
	}
}

func TestEmptyFolderIsTaken(t *testing.T) {
	t.Parallel()
	for _, mode := range []fs.FileMode{0o700, 0o755} {
		dir := filepath.Join(folder(t), "data")
		if err := os.Mkdir(dir, mode); err != nil {
			t.Fatal(err)
		}
		s := startServer(t, &Options{DataDir: dir})
		if err := s.Stop(); err != nil {
			t.Fatal(err)
		}
	}
}

// An initdb that was killed leaves its folder under a name that is not that of the cluster.
func TestHalfFinishedInitdbIsRecovered(t *testing.T) {
	t.Parallel()
	slow(t)
	dir := filepath.Join(folder(t), "data [1]")
	half := filepath.Join(dir, unfinished+"123")
	if err := os.MkdirAll(filepath.Join(half, "base"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{filepath.Join(dir, lockName), filepath.Join(half, "PG_VERSION")} {
		if err := os.WriteFile(file, []byte("15\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s := startServer(t, &Options{DataDir: dir})
	queryText(t, s.URL(), "SELECT 'alive'")
	if _, err := os.Stat(half); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is left: %v", half, err)
	}
}

func TestKilledDuringInitdbIsRecovered(t *testing.T) {
	t.Parallel()
	slow(t)
	dir := filepath.Join(folder(t), "data")
	cmd := exec.Command(os.Args[0], dir)
	cmd.Env = append(os.Environ(), helperVariable+"=serve")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	for begin := time.Now(); ; time.Sleep(time.Millisecond) { // until initdb is at work
		if found, err := filepath.Glob(filepath.Join(dir, unfinished+"*", "base")); err != nil || len(found) > 0 {
			break
		}
		if time.Since(begin) > startWaitMax {
			t.Fatal("no initdb")
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	s := startServer(t, &Options{DataDir: dir})
	queryText(t, s.URL(), "SELECT 'alive'")
}

// Not parallel: PAIDONCE_PG_BIN keeps the search from a download.
func TestDataOfAnotherVersionIsRefused(t *testing.T) {
	dir := filepath.Join(folder(t), "data")
	s := startServer(t, &Options{DataDir: dir})
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	other := majorMin
	if s.binaries.major == other {
		other++
	}
	file := filepath.Join(dir, clusterName, "PG_VERSION")
	if err := os.WriteFile(file, []byte(fmt.Sprintln(other)), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv(binVariable, s.binaries.dir)
	_, err := Start(t.Context(), &Options{DataDir: dir})
	want := fmt.Sprintf("PostgreSQL %s cannot use data of PostgreSQL %d", s.Version(), other)
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("err = %v", err)
	}
}

func TestLongLogIsSetAside(t *testing.T) {
	t.Parallel()
	for size, aside := range map[int64]bool{logBytesMax: false, logBytesMax + 1: true} {
		d := &dataDir{path: folder(t)}
		if err := os.WriteFile(d.file(logName), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(d.file(logName), size); err != nil {
			t.Fatal(err)
		}
		log, err := d.openLog()
		if err != nil {
			t.Fatal(err)
		}
		log.file.Close()
		if _, err := os.Stat(d.file(oldLogName)); (err == nil) != aside {
			t.Errorf("log of %d bytes: %v", size, err)
		}
	}
}

func TestOrdinaryUserRunsItAsItself(t *testing.T) {
	t.Parallel()
	slow(t)
	cmd, dir := ordinaryUser(t, "roundtrip")
	output, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, output)
	}
	want := cmd.SysProcAttr.Credential.Uid
	if string(output) != fmt.Sprintln("uid", want) {
		t.Errorf("output %q", output)
	}
	if uid, _, err := owner(filepath.Join(dir, clusterName)); err != nil || uid != want {
		t.Errorf("cluster of uid %d, %v", uid, err)
	}
}

// A start with sudo must not take the folder away from its owner.
func TestRootRunsItAsTheOwnerOfTheFolder(t *testing.T) {
	t.Parallel()
	cmd, dir := ordinaryUser(t, "roundtrip")
	uid, gid := cmd.SysProcAttr.Credential.Uid, cmd.SysProcAttr.Credential.Gid
	if err := errors.Join(os.Mkdir(dir, 0o700), os.Chown(dir, int(uid), int(gid))); err != nil {
		t.Fatal(err)
	}
	s := startServer(t, &Options{DataDir: dir})
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	if output, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("its owner cannot start it any more: %v: %s", err, output)
	}
	startServer(t, &Options{DataDir: dir})
}

func TestRootDropsToAnotherUser(t *testing.T) {
	t.Parallel()
	needRoot(t)
	s := startServer(t, nil)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.PID()))
	if err != nil {
		t.Fatal(err)
	}
	acct, err := pickAccount("")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		fmt.Sprintf("Uid:\t%d\t%[1]d\t%[1]d\t%[1]d\n", acct.uid),
		fmt.Sprintf("Gid:\t%d\t%[1]d\t%[1]d\t%[1]d\n", acct.gid),
	} {
		if !strings.Contains(string(status), want) {
			t.Errorf("no %q in\n%s", want, status)
		}
	}
	u, err := user.Lookup(acct.name)
	if err != nil {
		t.Fatal(err)
	}
	want, err := u.GroupIds()
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(status), "\n") {
		groups, found := strings.CutPrefix(line, "Groups:")
		if found && len(strings.Fields(groups)) != len(want) {
			t.Errorf("supplementary groups %s, want %v", groups, want)
		}
	}
}

func TestFolderThatTheAccountCannotReachIsExplained(t *testing.T) {
	t.Parallel()
	needRoot(t)
	closed := filepath.Join(folder(t), "closed")
	if err := os.Mkdir(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	before := listing(t, closed)
	dir := filepath.Join(closed, "not", "there yet")
	_, err := Start(t.Context(), &Options{DataDir: dir})
	if err == nil || !strings.Contains(err.Error(), "may not enter "+closed+";") ||
		!strings.Contains(err.Error(), "start as an ordinary user") {
		t.Errorf("err = %v", err)
	}
	if after := listing(t, closed); after != before {
		t.Errorf("changed from\n%sto\n%s", before, after)
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root drops to another user")
	}
}

// ordinaryUser returns a helper that runs as the user nobody. Its argument is a data folder in a
// folder that belongs to nobody (the user).
func ordinaryUser(t *testing.T, name string) (cmd *exec.Cmd, dataDir string) {
	t.Helper()
	needRoot(t) // an ordinary user runs all other tests as itself
	dir := folder(t)
	program := filepath.Join(dir, "helper")
	copyFile(t, os.Args[0], program)
	home := filepath.Join(dir, "home")
	const uid, gid = 65534, 65534
	if err := os.Mkdir(home, 0o711); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(home, uid, gid); err != nil {
		t.Fatal(err)
	}
	dataDir = filepath.Join(home, "data")
	cmd = exec.Command(program, dataDir)
	cmd.Dir = "/"
	cmd.Env = []string{helperVariable + "=" + name, "PATH=" + os.Getenv("PATH"), binVariable + "=" + os.Getenv(binVariable)}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid}}
	return cmd, dataDir
}

// copyFile has another process write the copy: if this process wrote a program, a child forked
// meanwhile would have the file open, and the program could not run.
func copyFile(t *testing.T, from, to string) {
	t.Helper()
	if output, err := exec.Command("cp", from, to).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, output)
	}
	if err := os.Chmod(to, 0o755); err != nil {
		t.Fatal(err)
	}
}

// listing describes everything in a folder: names, modes, sizes, times.
func listing(t *testing.T, dir string) string {
	t.Helper()
	var text strings.Builder
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		fmt.Fprintln(&text, path, info.Mode(), info.Size(), info.ModTime())
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return text.String()
}
