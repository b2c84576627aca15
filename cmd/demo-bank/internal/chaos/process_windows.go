package chaos

import (
	"errors"
	"os"
	"syscall"
)

var errSignals = errors.New("chaos needs a Unix system: Windows has no signals to break things with")

func signalQuit(int) error             { return errSignals }
func signalKill(int) error             { return errSignals }
func signalTerm(*os.Process) error     { return errSignals }
func signalStop(*os.Process) error     { return errSignals }
func signalContinue(*os.Process) error { return errSignals }
func diedOfKill(*os.ProcessState) bool { return false }
func isolate() *syscall.SysProcAttr    { return nil }
