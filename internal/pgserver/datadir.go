package pgserver

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/paidonce/idempotency/internal/deadline"
)

// The names in a data folder. The lock file also marks a folder as made by this package. The folder
// and these files belong to the user who started the server. Only the cluster belongs to the
// account that PostgreSQL runs as, so that root never writes where that account could have planted
// something.
const (
	lockName    = "paidonce.lock"
	clusterName = "postgres"
	// An initdb that has not finished. If it was killed, the next start removes it.
	unfinished    = "postgres.tmp-"
	logName       = "postgres.log"
	oldLogName    = "postgres.log.old"
	passwordName  = "password" // Windows only
	oldPollPeriod = 20 * time.Millisecond
)

// dataDir is a data folder that this process has locked.
type dataDir struct {
	path string
	lock *os.File
	made bool // by this start
}

// inspectDataDir returns an error if the folder cannot serve. It changes nothing.
func inspectDataDir(path string, acct *account) error {
	parent := filepath.Dir(path)
	if err := acct.reach(parent, "choose a data folder it may enter, for example under /var/lib, "+
		"or start as an ordinary user"); err != nil {
		return fmt.Errorf("data folder %s: %w", path, err)
	}
	entries, err := os.ReadDir(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	for _, entry := range entries {
		if entry.Name() == lockName {
			return nil
		}
	}
	if len(entries) > 0 {
		return fmt.Errorf("data folder %s is not empty and was not made by this program (it has %s); "+
			"nothing was changed, choose an empty or a new folder", path, entries[0].Name())
	}
	return nil
}

// dataMajor returns the major version that made the data, or 0 if there is none yet.
func dataMajor(path string) (int, error) {
	if path == "" {
		return 0, nil
	}
	file := filepath.Join(path, clusterName, "PG_VERSION")
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("data folder: %w", err)
	}
	major, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return 0, fmt.Errorf("data folder: read version in %s: %w", file, err)
	}
	return major, nil
}

// claimDataDir makes the folder if it is missing and takes its lock, or returns ErrDataDirInUse.
func claimDataDir(path string) (*dataDir, error) {
	mode := fs.FileMode(0o700)
	if os.Geteuid() == 0 {
		mode = 0o711 // PostgreSQL's account passes through to its cluster
	}
	d := &dataDir{path: path}
	for {
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			if err := os.MkdirAll(path, 0o755); err != nil {
				return nil, fmt.Errorf("make data folder: %w", err)
			}
			if err := os.Chmod(path, mode); err != nil { // whatever the umask is
				return nil, fmt.Errorf("make data folder: %w", err)
			}
			d.made = true
		}
		lock, err := os.OpenFile(d.file(lockName), os.O_RDWR|os.O_CREATE|noFollow, 0o600)
		if err != nil {
			return nil, fmt.Errorf("lock data folder: %w", err)
		}
		locked, err := tryLock(lock)
		if err != nil {
			lock.Close()
			return nil, fmt.Errorf("lock data folder %s: %w", path, err)
		}
		if !locked {
			holder, _ := io.ReadAll(io.LimitReader(lock, 32)) // it only improves the message
			lock.Close()
			return nil, fmt.Errorf("%w: %s (process %s)", ErrDataDirInUse, path, strings.TrimSpace(string(holder)))
		}
		// A failed first start has just removed it.
		if !stillNamed(lock, d.file(lockName)) {
			_ = unlock(lock)
			continue
		}
		d.lock = lock
		if err := d.signLock(); err != nil {
			return nil, errors.Join(fmt.Errorf("lock data folder: %w", err), d.release())
		}
		return d, nil
	}
}

// stillNamed reports whether path still names the open file: it may have been removed before it was
// locked.
func stillNamed(f *os.File, path string) bool {
	opened, openedErr := f.Stat()
	named, namedErr := os.Lstat(path)
	return openedErr == nil && namedErr == nil && os.SameFile(opened, named)
}

// signLock writes the holder's process id, for the error message of the next process.
func (d *dataDir) signLock() error {
	if err := handToOwner(d.lock, d.path); err != nil {
		return err
	}
	if err := d.lock.Truncate(0); err != nil {
		return err
	}
	_, err := d.lock.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	return err
}

// release releases the lock. If this start made the folder and it has no data yet, release removes
// it.
func (d *dataDir) release() error {
	if _, err := os.Stat(d.cluster()); d.made && errors.Is(err, fs.ErrNotExist) {
		_ = os.Remove(d.file(lockName))
		_ = os.Remove(d.path)
	}
	return unlock(d.lock)
}

func (d *dataDir) file(name string) string { return filepath.Join(d.path, name) }
func (d *dataDir) cluster() string         { return d.file(clusterName) }

// awaitOldPostmaster blocks until no postmaster runs on the data: after a SIGKILL of its owner it
// needs a moment to die. If the process id in postmaster.pid is not that of such a postmaster,
// stalePID is that id.
func (d *dataDir) awaitOldPostmaster(ctx context.Context, until time.Time, progress io.Writer) (stalePID int, err error) {
	for announced := false; ; {
		pid, err := readPostmasterPID(filepath.Join(d.cluster(), "postmaster.pid"))
		if err != nil || pid == 0 {
			return 0, err
		}
		if !isPostmaster(pid, d.cluster()) {
			return pid, nil
		}
		if time.Now().After(until) {
			return 0, fmt.Errorf("data folder %s: a PostgreSQL that nobody holds still runs on it (process %d) after %s; "+
				"stop it first", d.path, pid, oldPostmasterWaitMax)
		}
		if !announced {
			fmt.Fprintf(progress, "waiting for the last PostgreSQL of %s to end (process %d)\n", d.path, pid)
			announced = true
		}
		if deadline.Sleep(ctx, oldPollPeriod) != nil {
			return 0, context.Cause(ctx)
		}
	}
}

// readPostmasterPID returns 0 if there is no file, or only part of one because the machine stopped
// while it was written.
func readPostmasterPID(path string) (int, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read postmaster.pid: %w", err)
	}
	line, _, _ := strings.Cut(string(text), "\n")
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		return 0, nil // PostgreSQL itself decides, and logs its decision
	}
	return max(pid, -pid), nil // negative: a single-user backend
}

// password returns the superuser's password, which is made with the data folder. Windows only.
func (d *dataDir) password() (string, error) {
	text, err := os.ReadFile(d.file(passwordName))
	if errors.Is(err, fs.ErrNotExist) {
		text = []byte(rand.Text())
		err = os.WriteFile(d.file(passwordName), text, 0o600)
	}
	if err != nil {
		return "", fmt.Errorf("password of the data folder: %w", err)
	}
	return string(text), nil
}
