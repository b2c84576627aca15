package chaos

import "syscall"

// isolate keeps the terminal's Ctrl-C from a bank. The bank dies with the thread that started it.
func isolate() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
