package pgserver

import (
	"bytes"
	"errors"
	"os"
	"strconv"
	"syscall"
)

// dieWithParent asks the kernel for SIGQUIT, PostgreSQL's immediate shutdown, when the thread that forked ends.
// The signal is set after the credential was dropped and does not reach the postmaster's children, which the
// postmaster ends itself.
func dieWithParent(attr *syscall.SysProcAttr) { attr.Pdeathsig = syscall.SIGQUIT }

// guard has nothing to do here: see dieWithParent.
func guard(*os.Process) (unguard func(), err error) { return func() {}, nil }

// isPostmaster says whether pid is a living postmaster of the cluster, as far as its command line tells; process ids
// are used again soon in containers. When in doubt it says yes.
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
