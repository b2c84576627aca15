package pgserver

import (
	"fmt"
	"os/exec"
	"runtime"
	"time"
)

// process is a postmaster that this process started.
type process struct {
	cmd      *exec.Cmd
	binaries binaries
	done     chan struct{} // closed when the postmaster is gone
	exitErr  error         // read after done
}

// startProcess starts cmd and makes it die with this process.
//
// On Linux the kernel ties the child to the thread that forked it, not to the process. So one
// goroutine starts the child, keeps its thread locked until the child is gone, and does nothing
// else.
func startProcess(cmd *exec.Cmd, bin binaries) (*process, error) {
	p := &process{cmd: cmd, binaries: bin, done: make(chan struct{})}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		unguard, err := guard(cmd.Process)
		if err != nil {
			_ = cmd.Process.Kill() // it has no important children yet
			_ = cmd.Wait()
			started <- fmt.Errorf("tie postgres to this process: %w", err)
			return
		}
		started <- nil
		p.exitErr = cmd.Wait()
		unguard()
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return p, nil
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// exit describes how the postmaster ended. It may be called after done is closed.
func (p *process) exit() string {
	if p.exitErr != nil {
		return p.exitErr.Error()
	}
	return "exit status 0"
}

// gone waits for the end, for at most limit, and reports whether the postmaster has ended.
func (p *process) gone(limit time.Duration) bool {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-p.done:
		return true
	case <-timer.C:
		return false
	}
}

// shutdown requests a fast shutdown and kills if that takes too long. It returns when the
// postmaster is gone, with an error if it had to kill.
func (p *process) shutdown() error {
	if p.endsAfter(p.signalFast) {
		return nil
	}
	p.kill()
	return fmt.Errorf("postgres did not end within %s and was stopped immediately; its next start recovers the data",
		stopWaitMax)
}

// kill ends the postmaster and its children without a checkpoint, and returns when the postmaster
// is gone.
func (p *process) kill() {
	if !p.endsAfter(p.signalImmediate) {
		_ = p.cmd.Process.Kill() // fails only when it is gone
		<-p.done
	}
}

// endsAfter sends the signal, waits for at most stopWaitMax, and reports whether the postmaster has
// ended.
func (p *process) endsAfter(signal func() error) bool {
	// The error is ignored: either the postmaster is gone, which the wait notices, or it cannot be
	// signalled, and then the wait times out.
	_ = signal()
	return p.gone(stopWaitMax)
}
