package kafkaserver

import (
	"os/exec"
	"syscall"
)

// isolate keeps a terminal's Ctrl-C from the process, and makes it die with the thread that starts
// it.
func isolate(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
