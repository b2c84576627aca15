package pgserver

import (
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/windows"
)

const noFollow = 0

// tryLock takes the exclusive lock of an open file without waiting. Windows releases it when this
// process ends.
func tryLock(f *os.File) (locked bool, err error) {
	err = windows.LockFileEx(windows.Handle(f.Fd()), windows.LOCKFILE_EXCLUSIVE_LOCK|windows.LOCKFILE_FAIL_IMMEDIATELY,
		0, 1, 0, new(windows.Overlapped))
	if errors.Is(err, windows.ERROR_LOCK_VIOLATION) {
		return false, nil
	}
	return err == nil, err
}

func unlock(f *os.File) error { return f.Close() }

// openDir opens a file in the folder that stands for it: Windows cannot lock a folder.
func openDir(path string) (*os.File, error) {
	return os.OpenFile(filepath.Join(path, lockName), os.O_RDWR|os.O_CREATE, 0o600)
}
