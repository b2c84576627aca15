package process

import "syscall"

// Isolate keeps the terminal's Ctrl-C from a process. It dies with the thread that started it, so
// that thread must be locked.
func Isolate() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
