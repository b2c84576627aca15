//go:build unix

package pgserver

import (
	"errors"
	"os"
	"syscall"
)

// noFollow keeps root from writing through a symbolic link that the folder's owner has planted.
const noFollow = syscall.O_NOFOLLOW

// tryLock takes the exclusive lock of an open file or folder without waiting. The kernel releases
// it when this process ends.
func tryLock(f *os.File) (locked bool, err error) {
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return false, nil
	}
	return err == nil, err
}

// unlock releases the lock and closes the file. The explicit release matters: a child that is
// forked at this moment holds a copy of the file until it executes its program. If the file were
// only closed, that copy would keep the lock.
func unlock(f *os.File) error {
	return errors.Join(syscall.Flock(int(f.Fd()), syscall.LOCK_UN), f.Close())
}

// openDir opens a folder to lock it.
func openDir(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NOFOLLOW, 0)
}
