//go:build unix && !linux

package pgserver

import (
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
)

// dieWithParent has nothing to do here: guard does it.
func dieWithParent(*syscall.SysProcAttr) {}

func guard(postmaster *os.Process) (unguard func(), err error) { return startWatcher(postmaster.Pid) }

// isPostmaster reports whether pid is a living postmaster of the cluster, judging by its command
// line. When in doubt it returns true.
func isPostmaster(pid int, cluster string) bool {
	if !alive(pid) {
		return false
	}
	commandLine, err := exec.Command("ps", "-ww", "-o", "command=", "-p", strconv.Itoa(pid)).Output()
	if err != nil {
		return alive(pid)
	}
	return strings.Contains(string(commandLine), cluster)
}
