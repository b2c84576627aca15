//go:build unix && !linux

package process

import "syscall"

// Isolate returns attributes that keep the terminal's Ctrl-C from a process.
func Isolate() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }
