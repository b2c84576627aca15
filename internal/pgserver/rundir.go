package pgserver

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
)

const (
	runPrefix = "paidonce-pg-"
	// runPathBytesMax leaves room for "/socket/.s.PGSQL.5432.lock" within the 103 bytes of a socket
	// address on macOS (Linux has 107).
	runPathBytesMax = 103 - len("/socket/.s.PGSQL.5432.lock")
	runTries        = 5
)

// runDir is the private folder of one running Server: its socket, and its data if that is
// temporary. The folder is locked while its owner lives.
type runDir struct {
	path string
	lock *os.File
}

// newRunDir makes a folder that the account may enter, after removing those of dead owners.
func newRunDir(acct *account, tempDir string) (*runDir, error) {
	parent, err := runParent(acct, cmp.Or(tempDir, os.TempDir()))
	if err != nil {
		return nil, err
	}
	sweep(parent)
	// The sweep of another process may remove a folder that is not locked yet.
	for range runTries {
		path, err := os.MkdirTemp(parent, runPrefix)
		if err != nil {
			return nil, fmt.Errorf("make temporary folder: %w", err)
		}
		r, err := lockRunDir(path)
		if err != nil {
			_ = os.RemoveAll(path)
			return nil, fmt.Errorf("lock temporary folder: %w", err)
		}
		if r == nil {
			continue
		}
		if err := r.fill(acct); err != nil {
			return nil, errors.Join(fmt.Errorf("make temporary folder: %w", err), r.remove())
		}
		return r, nil
	}
	return nil, fmt.Errorf("make temporary folder in %s: others removed it %d times", parent, runTries)
}

// runParent returns the folder for temporary files, or /tmp if that folder makes the
// socket's path too long or is closed to the account.
func runParent(acct *account, tempDir string) (string, error) {
	parents := []string{tempDir}
	if unixSockets {
		parents = append(parents, "/tmp")
	}
	var errs []error
	for _, parent := range parents {
		parent, err := canonicalPath(parent)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if unixSockets && len(filepath.Join(parent, runPrefix+"4294967295")) > runPathBytesMax {
			errs = append(errs, fmt.Errorf("%s is too long for the path of a socket", parent))
			continue
		}
		if err := acct.reach(parent, "set TMPDIR to a folder it may enter"); err != nil {
			errs = append(errs, err)
			continue
		}
		return parent, nil
	}
	return "", fmt.Errorf("temporary folder: %w", errors.Join(errs...))
}

// lockRunDir returns nil if the folder is locked or already gone.
func lockRunDir(path string) (*runDir, error) {
	lock, err := openDir(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	locked, err := tryLock(lock)
	if err != nil || !locked {
		lock.Close()
		return nil, err
	}
	r := &runDir{path: path, lock: lock}
	if runtime.GOOS != "windows" && !stillNamed(lock, path) {
		return nil, unlock(lock)
	}
	return r, nil
}

func (r *runDir) fill(acct *account) error {
	if acct != nil {
		if err := os.Chmod(r.path, 0o711); err != nil { // only to pass through
			return err
		}
	}
	if err := os.Mkdir(r.socketDir(), 0o700); err != nil {
		return err
	}
	return acct.own(r.socketDir())
}

func (r *runDir) socketDir() string { return filepath.Join(r.path, "socket") }

func (r *runDir) remove() error {
	err := unlock(r.lock) // first: Windows does not remove an open file
	if removeErr := os.RemoveAll(r.path); removeErr != nil {
		err = errors.Join(err, fmt.Errorf("remove temporary folder: %w", removeErr))
	}
	return err
}

// sweep removes the folders of dead owners. It only helps, so it reports nothing.
func sweep(parent string) {
	entries, err := os.ReadDir(parent)
	if err != nil {
		return
	}
	for _, entry := range entries {
		path := filepath.Join(parent, entry.Name())
		if !entry.IsDir() || !strings.HasPrefix(entry.Name(), runPrefix) {
			continue
		}
		if info, err := os.Lstat(path); err != nil || !ownedByThisUser(info) {
			continue
		}
		if r, err := lockRunDir(path); err == nil && r != nil {
			_ = os.RemoveAll(path) // still locked, so that no process uses it
			_ = unlock(r.lock)
		}
	}
}
