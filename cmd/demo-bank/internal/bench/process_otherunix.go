//go:build unix && !linux

package bench

import "syscall"

// isolate keeps the terminal's Ctrl-C from the server.
func isolate() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }
