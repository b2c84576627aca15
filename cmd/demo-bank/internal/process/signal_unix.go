//go:build unix

package process

import (
	"os"
	"syscall"
)

// CanStop reports whether the system has signals that stop a process and continue it.
const CanStop = true

// Quit requests PostgreSQL's immediate shutdown.
func Quit(pid int) error { return syscall.Kill(pid, syscall.SIGQUIT) }

// Kill ends a process as kill -9 does.
func Kill(pid int) error { return syscall.Kill(pid, syscall.SIGKILL) }

// Stop pauses a process until Continue.
func Stop(process *os.Process) error { return process.Signal(syscall.SIGSTOP) }

// Continue ends a Stop.
func Continue(process *os.Process) error { return process.Signal(syscall.SIGCONT) }

// Terminate requests an orderly end of a process (SIGTERM).
func Terminate(process *os.Process) error { return process.Signal(syscall.SIGTERM) }

// DiedOfKill reports whether SIGKILL ended the process.
func DiedOfKill(state *os.ProcessState) bool {
	status, ok := state.Sys().(syscall.WaitStatus)
	return ok && status.Signaled() && status.Signal() == syscall.SIGKILL
}
