//go:build unix

package psp

import (
	"errors"
	"os"
	"syscall"
)

// tryLock takes the exclusive lock of an open file without waiting. The kernel releases it when
// this process ends.
func tryLock(f *os.File) (locked bool, err error) {
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return false, nil
	}
	return err == nil, err
}

// unlock releases the lock and closes the file. The explicit release matters: a child that is
// forked at this moment holds a copy of the file until it executes its program.
func unlock(f *os.File) error {
	return errors.Join(syscall.Flock(int(f.Fd()), syscall.LOCK_UN), f.Close())
}
