//go:build unix

package pgserver

import (
	"errors"
	"os/exec"
	"syscall"
)

const unixSockets = true

func (p *process) signalFast() error      { return p.signal(syscall.SIGINT) }
func (p *process) signalImmediate() error { return p.signal(syscall.SIGQUIT) }

// signal goes through os.Process, which never signals a process id that was already reaped.
func (p *process) signal(sig syscall.Signal) error { return p.cmd.Process.Signal(sig) }

// isolate gives cmd a process group of its own, so that a terminal's Ctrl-C does not reach it, and
// makes a canceled context end the whole group.
func isolate(cmd *exec.Cmd, acct *account) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if acct != nil {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: acct.uid, Gid: acct.gid, Groups: acct.groups}
	}
	dieWithParent(cmd.SysProcAttr)
	if cmd.Cancel != nil {
		cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	}
}

func alive(pid int) bool { return !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) }
