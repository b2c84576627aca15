package boltintent

import (
	"errors"
	"os"

	"golang.org/x/sys/windows"
)

// lockAt is the byte that bbolt locks.
func lockAt() *windows.Overlapped {
	const last = 1<<32 - 1
	return &windows.Overlapped{Offset: last, OffsetHigh: last}
}

// tryLock takes the lock that bbolt takes.
func tryLock(file *os.File) (locked bool, err error) {
	err = windows.LockFileEx(windows.Handle(file.Fd()), windows.LOCKFILE_EXCLUSIVE_LOCK|windows.LOCKFILE_FAIL_IMMEDIATELY, 0, 1, 0, lockAt())
	if errors.Is(err, windows.ERROR_LOCK_VIOLATION) {
		return false, nil
	}
	return err == nil, err
}

// unlock releases the lock and closes the file.
func unlock(file *os.File) error { return errors.Join(leaveLock(file), file.Close()) }

// leaveLock releases the lock for bbolt to take it: on Windows bbolt would wait for our own lock.
func leaveLock(file *os.File) error {
	return windows.UnlockFileEx(windows.Handle(file.Fd()), 0, 1, 0, lockAt())
}

// syncFolder does nothing: Windows writes a new name to its journal.
func syncFolder(string) error { return nil }
