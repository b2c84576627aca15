package process

import "syscall"

// Isolate returns attributes that keep the terminal's Ctrl-C from a process. The process dies with
// the thread that started it, so the goroutine must have locked its thread.
func Isolate() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
