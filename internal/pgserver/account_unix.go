//go:build unix

package pgserver

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
)

// rootStandIns are the users to which root drops; the first that exists is used.
var rootStandIns = []string{"postgres", "nobody"}

// pickAccount chooses the user that PostgreSQL runs as. An ordinary user runs it as itself. Root
// runs it as the owner of the data folder, so that its owner can still use the folder after a start
// with sudo, or else as the first stand-in.
func pickAccount(dataPath string) (*account, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	if dataPath != "" {
		for _, path := range []string{filepath.Join(dataPath, clusterName), dataPath} {
			if uid, gid, err := owner(path); err == nil && uid != 0 {
				return accountOf(uid, gid)
			}
		}
	}
	for _, name := range rootStandIns {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, uidErr := strconv.ParseUint(u.Uid, 10, 32)
		gid, gidErr := strconv.ParseUint(u.Gid, 10, 32)
		if err := errors.Join(uidErr, gidErr); err != nil {
			return nil, fmt.Errorf("look up user %s: %w", name, err)
		}
		return accountOf(uint32(uid), uint32(gid))
	}
	return nil, errors.New("PostgreSQL refuses to run as root, and there is no user postgres or nobody to run it as; " +
		"start as an ordinary user")
}

// accountOf fills in name and supplementary groups; a uid without a name has none.
func accountOf(uid, gid uint32) (*account, error) {
	a := &account{name: "uid " + strconv.FormatUint(uint64(uid), 10), uid: uid, gid: gid}
	u, err := user.LookupId(strconv.FormatUint(uint64(uid), 10))
	if err != nil {
		return a, nil
	}
	a.name = u.Username
	ids, err := u.GroupIds()
	if err != nil {
		return nil, fmt.Errorf("look up groups of user %s: %w", a.name, err)
	}
	for _, id := range ids {
		group, err := strconv.ParseUint(id, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("look up groups of user %s: %w", a.name, err)
		}
		a.groups = append(a.groups, uint32(group))
	}
	return a, nil
}

// reach returns an error if the account cannot enter path or, if path does not exist yet, its
// nearest existing parent. The error names the folder in the way. The kernel decides, because it
// knows about modes, ACLs and mounts.
func (a *account) reach(path, cure string) error {
	if a == nil {
		return nil
	}
	for parent := filepath.Dir(path); ; path, parent = parent, filepath.Dir(parent) {
		_, err := os.Stat(path)
		if err == nil || path == parent {
			break
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if a.enter(path) == nil {
		return nil
	}
	blocked := path
	for parent := filepath.Dir(blocked); a.enter(parent) != nil && parent != blocked; parent = filepath.Dir(parent) {
		blocked = parent
	}
	return fmt.Errorf("PostgreSQL refuses to run as root, so it runs as user %s, and that user may not enter %s; %s",
		a.name, blocked, cure)
}

func (a *account) enter(dir string) error { return a.command(dir, "/bin/sh", "-c", ":").Run() }

// own makes the account the owner of path.
func (a *account) own(path string) error {
	if a == nil {
		return nil
	}
	return os.Lchown(path, int(a.uid), int(a.gid))
}

// ownTree makes the account the owner of everything under root, unless it owns root already.
func (a *account) ownTree(root string) error {
	if a == nil {
		return nil
	}
	if uid, _, err := owner(root); err != nil || uid == a.uid {
		return err
	}
	return filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return a.own(path)
	})
}

// handToOwner gives a file that root made in dir to dir's owner, which may start without root next
// time.
func handToOwner(f *os.File, dir string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	uid, gid, err := owner(dir)
	if err != nil {
		return err
	}
	return f.Chown(int(uid), int(gid))
}

func ownedByThisUser(info os.FileInfo) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(stat.Uid) == os.Geteuid()
}

func owner(path string) (uid, gid uint32, err error) {
	info, err := os.Lstat(path)
	if err != nil {
		return 0, 0, err
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, 0, fmt.Errorf("owner of %s: unknown", path)
	}
	return stat.Uid, stat.Gid, nil
}
