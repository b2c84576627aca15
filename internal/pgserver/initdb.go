package pgserver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
)

// init makes the database cluster if it is missing, as a copy of primary's unless primary is nil.
// The cluster gets its name only when it is complete.
func (d *dataDir) init(ctx context.Context, bin binaries, acct *account, temporary bool, primary *Server) (err error) {
	leftovers, err := filepath.Glob(globQuote(d.path) + string(filepath.Separator) + unfinished + "*")
	if err != nil {
		return fmt.Errorf("find unfinished clusters: %w", err)
	}
	for _, leftover := range leftovers {
		// A dying initdb may still write to this folder; then the next start removes the folder.
		_ = os.RemoveAll(leftover)
	}
	if err := d.letIn(acct); err != nil {
		return err
	}
	if _, err := os.Stat(d.cluster()); !errors.Is(err, fs.ErrNotExist) {
		if err == nil && primary != nil {
			err = errors.New("it has data already, and a standby begins with a copy of its primary's")
		}
		if err == nil {
			err = acct.ownTree(d.cluster())
		}
		if err != nil {
			return fmt.Errorf("data folder: %w", err)
		}
		return nil
	}

	dir, err := os.MkdirTemp(d.path, unfinished)
	if err != nil {
		return fmt.Errorf("make database cluster: %w", err)
	}
	defer func() {
		if err != nil {
			_ = os.RemoveAll(dir)
		}
	}()
	if primary != nil {
		err = d.copy(ctx, dir, acct, !temporary, primary)
	} else {
		err = d.initdb(ctx, dir, bin, acct, !temporary)
	}
	if err != nil {
		return err
	}
	if err := os.Rename(dir, d.cluster()); err != nil {
		return fmt.Errorf("make database cluster: %w", err)
	}
	return syncDir(d.path)
}

// copy copies the primary's cluster to dir. The account becomes its owner only when the copy is
// complete: root never writes to a folder that the account can write to.
func (d *dataDir) copy(ctx context.Context, dir string, acct *account, sync bool, primary *Server) error {
	if err := primary.copyTo(ctx, dir, sync); err != nil {
		return fmt.Errorf("copy the primary: %w", err)
	}
	if err := acct.ownTree(dir); err != nil {
		return fmt.Errorf("copy the primary: %w", err)
	}
	return nil
}

// initdb makes an empty cluster in dir.
func (d *dataDir) initdb(ctx context.Context, dir string, bin binaries, acct *account, sync bool) error {
	if err := acct.own(dir); err != nil {
		return fmt.Errorf("make database cluster: %w", err)
	}
	args := []string{"-D", dir, "--username=" + superuser, "--encoding=UTF8", "--no-locale", "--no-instructions"}
	if unixSockets {
		// The socket's folder is private.
		args = append(args, "--auth-local=trust", "--auth-host=reject")
	} else {
		if _, err := d.password(); err != nil {
			return err
		}
		args = append(args, "--auth=scram-sha-256", "--pwfile="+d.file(passwordName))
	}
	if !sync {
		args = append(args, "--no-sync")
	}
	return runToEnd(ctx, acct.commandContext(ctx, dir, bin.initdb(), args...))
}

// letIn lets PostgreSQL's account pass through a folder of root's that is closed to others.
func (d *dataDir) letIn(acct *account) error {
	if acct == nil || acct.enter(d.path) == nil {
		return nil
	}
	info, err := os.Stat(d.path)
	if err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	if err := os.Chmod(d.path, info.Mode().Perm()|0o111); err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	return nil
}

// runToEnd runs a program on a locked thread, because the kernel would end it together with the
// thread that forked it.
func runToEnd(ctx context.Context, cmd *exec.Cmd) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	output, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("%s: %w:\n%s", cmd.Path, err, lastLines(string(output)))
	}
	return nil
}

// syncDir makes a rename in the folder durable. Windows has no such call.
func syncDir(path string) error {
	if runtime.GOOS == "windows" {
		return nil
	}
	dir, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("sync data folder: %w", err)
	}
	defer dir.Close()
	if err := dir.Sync(); err != nil {
		return fmt.Errorf("sync data folder: %w", err)
	}
	return nil
}

// globQuote makes filepath.Glob take path literally. Windows has no escape; its paths cannot have *
// and ?.
func globQuote(path string) string {
	if runtime.GOOS == "windows" {
		return path
	}
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(path)
}
