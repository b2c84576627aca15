package boltintent

import (
	"fmt"
	"os"
	"time"
)

const lockPause = 10 * time.Millisecond

// waitForLock takes the lock of a file before any byte of it is read.
func waitForLock(file *os.File, timeout time.Duration) error {
	for began := time.Now(); ; time.Sleep(lockPause) {
		locked, err := tryLock(file)
		if locked || err != nil {
			return err
		}
		if time.Since(began) >= timeout {
			return heldBy(file)
		}
	}
}

// heldBy returns the error for a file that another process or Store has.
func heldBy(file *os.File) error {
	switch pid, name := holder(file); {
	case pid == os.Getpid():
		return fmt.Errorf("%w: this process has opened %s before: use one Store, or close it first", ErrLocked, file.Name())
	case pid > 0:
		return fmt.Errorf("%w: process %d (%s) has %s: end it, or give this process a file of its own", ErrLocked, pid, name, file.Name())
	}
	return fmt.Errorf("%w: find out who has %s (fuser, lsof) and end it, or give this process a file of its own", ErrLocked, file.Name())
}
