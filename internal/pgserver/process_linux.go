package pgserver

import (
	"bytes"
	"errors"
	"os"
	"strconv"
	"syscall"
)

// dieWithParent asks the kernel to send SIGQUIT, PostgreSQL's immediate shutdown, when the thread
// that forked ends. The signal is set after the credentials were dropped. It does not reach the
// postmaster's children; the postmaster ends them itself.
func dieWithParent(attr *syscall.SysProcAttr) { attr.Pdeathsig = syscall.SIGQUIT }

// guard has nothing to do here: see dieWithParent.
func guard(*os.Process) (unguard func(), err error) { return func() {}, nil }

// isPostmaster reports whether pid is a living postmaster of the cluster, judging by its command
// line: containers reuse process ids soon. When in doubt it returns true.
func isPostmaster(pid int, cluster string) bool {
	if !alive(pid) {
		return false
	}
	commandLine, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline") // empty for a zombie
	if err != nil {
		return !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.ESRCH)
	}
	return bytes.Contains(commandLine, []byte(cluster+"\x00"))
}
