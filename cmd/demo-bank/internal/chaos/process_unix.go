//go:build unix

package chaos

import (
	"os"
	"syscall"
)

// signalQuit is PostgreSQL's immediate shutdown.
func signalQuit(pid int) error { return syscall.Kill(pid, syscall.SIGQUIT) }

// signalKill is kill -9.
func signalKill(pid int) error { return syscall.Kill(pid, syscall.SIGKILL) }

// signalTerm asks a process to stop in order.
func signalTerm(process *os.Process) error { return process.Signal(syscall.SIGTERM) }

// diedOfKill reports whether a process was ended by SIGKILL.
func diedOfKill(state *os.ProcessState) bool {
	status, ok := state.Sys().(syscall.WaitStatus)
	return ok && status.Signaled() && status.Signal() == syscall.SIGKILL
}
