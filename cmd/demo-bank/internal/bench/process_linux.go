package bench

import "syscall"

// isolate keeps the terminal's Ctrl-C from the server. The server dies with the thread that started
// it.
func isolate() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
