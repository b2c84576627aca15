//go:build unix && !linux

package kafkaserver

import (
	"os/exec"
	"syscall"
)

// isolate keeps a terminal's Ctrl-C from the process.
func isolate(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }
