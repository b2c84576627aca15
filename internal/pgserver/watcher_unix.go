//go:build unix

package pgserver

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"
)

// startWatcher starts a shell that sends SIGQUIT to pid when this process is gone. The shell waits
// on a pipe; only this process holds the other end, so the kernel closes it however this process
// ends. unwatch must be called when pid is gone, before its number can be reused. Linux does not
// need it (see dieWithParent); it is built there for its test.
func startWatcher(pid int) (unwatch func(), err error) {
	read, write, err := os.Pipe() // both close-on-exec
	if err != nil {
		return nil, fmt.Errorf("make pipe: %w", err)
	}
	defer read.Close()
	cmd := exec.Command("/bin/sh", "-c", `read x; kill -QUIT "$1"`, "sh", strconv.Itoa(pid))
	cmd.Stdin = read
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C must not end it either
	if err := cmd.Start(); err != nil {
		write.Close()
		return nil, fmt.Errorf("start watcher: %w", err)
	}
	return func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // "signal: killed" is expected
		write.Close()
	}, nil
}
