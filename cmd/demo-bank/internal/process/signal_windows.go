package process

import (
	"errors"
	"os"
	"syscall"
)

// CanStop reports whether the system has signals that stop a process and continue it.
const CanStop = false

var errSignals = errors.New("this needs a Unix system: Windows has no signals to break things with")

// Quit returns an error.
func Quit(int) error { return errSignals }

// Kill returns an error.
func Kill(int) error { return errSignals }

// Terminate returns an error.
func Terminate(*os.Process) error { return errSignals }

// Stop returns an error.
func Stop(*os.Process) error { return errSignals }

// Continue returns an error.
func Continue(*os.Process) error { return errSignals }

// DiedOfKill returns false.
func DiedOfKill(*os.ProcessState) bool { return false }

// Isolate returns nil: a process ends with its input.
func Isolate() *syscall.SysProcAttr { return nil }
