//go:build unix

package chaos

import (
	"os"
	"syscall"
)

// signalQuit requests PostgreSQL's immediate shutdown.
func signalQuit(pid int) error { return syscall.Kill(pid, syscall.SIGQUIT) }

// signalKill is kill -9.
func signalKill(pid int) error { return syscall.Kill(pid, syscall.SIGKILL) }

// signalStop stops a process until signalContinue.
func signalStop(process *os.Process) error { return process.Signal(syscall.SIGSTOP) }

func signalContinue(process *os.Process) error { return process.Signal(syscall.SIGCONT) }

// signalTerm asks a process to stop in order.
func signalTerm(process *os.Process) error { return process.Signal(syscall.SIGTERM) }

// diedOfKill reports whether SIGKILL ended the process.
func diedOfKill(state *os.ProcessState) bool {
	status, ok := state.Sys().(syscall.WaitStatus)
	return ok && status.Signaled() && status.Signal() == syscall.SIGKILL
}
