package idempotency_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

func TestCINamesItsLanes(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("Windows has no bash")
	}
	lanes, err := filepath.Glob(".ci/lanes/*")
	if err != nil || len(lanes) == 0 {
		t.Fatalf("lanes: %q, %v", lanes, err)
	}
	for _, c := range []struct {
		arguments []string
		code      int
	}{
		{[]string{"--help"}, 0},
		{[]string{"no-such-lane"}, 2},
		{[]string{"../run"}, 2},
		{[]string{""}, 2},
		{[]string{"check", "mutants"}, 2},
	} {
		cmd := exec.Command("bash", append([]string{".ci/run"}, c.arguments...)...)
		// If a lane starts all the same, it fails at once.
		cmd.Env = append(os.Environ(), "PATH="+toolsWithoutGo(t))
		output, _ := cmd.CombinedOutput()
		if code := cmd.ProcessState.ExitCode(); code != c.code {
			t.Errorf(".ci/run %q: exit code %d, want %d:\n%s", c.arguments, code, c.code, output)
		}
		for _, lane := range lanes {
			if !strings.Contains(string(output), "\n  "+filepath.Base(lane)+" ") {
				t.Errorf(".ci/run %q does not name %s:\n%s", c.arguments, lane, output)
			}
		}
	}
}

// .ci/release is strict about its arguments: it makes tags that can't be taken back.
func TestReleaseRefusesWhatIsNoVersion(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("Windows has no bash")
	}
	for _, arguments := range [][]string{nil, {"--dry-run"}, {"0.1.0"}, {"v0.1"}, {"v2.0.0"}, {"v0.1.0", "v0.2.0"}, {"v0.1.0 "}} {
		cmd := exec.Command("bash", append([]string{".ci/release"}, arguments...)...)
		cmd.Env = append(os.Environ(), "PATH="+toolsWithoutGo(t))
		output, _ := cmd.CombinedOutput()
		if code := cmd.ProcessState.ExitCode(); code != 2 || !strings.Contains(string(output), "usage: ") {
			t.Errorf(".ci/release %q: exit code %d, want 2 and the usage:\n%s", arguments, code, output)
		}
	}
}

// toolsWithoutGo is a PATH with the programs that the usage needs.
func toolsWithoutGo(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"dirname", "sed"} {
		path, err := exec.LookPath(name)
		if err == nil {
			err = os.Symlink(path, filepath.Join(dir, name))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}
