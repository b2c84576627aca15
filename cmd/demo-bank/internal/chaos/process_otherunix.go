//go:build unix && !linux

package chaos

import "syscall"

// isolate keeps the terminal's Ctrl-C from a bank.
func isolate() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }
