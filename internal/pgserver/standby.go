package pgserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/paidonce/idempotency/internal/deadline"
)

// Standby copies the running primary and starts the copy as its hot standby. It returns when the
// standby answers queries and follows. The primary's commits don't wait for it unless the primary's
// synchronous_standby_names names it; the standby's name is "walreceiver". opts are as for [Start],
// but DataDir must be new, and a setting that sizes shared memory, such as max_connections, must
// not be smaller than the primary's. The two are stopped separately. Not on Windows.
func Standby(ctx context.Context, primary *Server, opts *Options) (*Server, error) {
	if opts == nil {
		opts = &Options{}
	}
	s, err := primary.startStandby(ctx, opts)
	if err != nil {
		return nil, fmt.Errorf("start standby: %w", err)
	}
	return s, nil
}

func (s *Server) startStandby(ctx context.Context, opts *Options) (*Server, error) {
	if opts.TLS {
		return nil, errors.New("TLS: not for standbys")
	}
	conn, err := pgx.Connect(ctx, s.URL())
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	// The slot keeps the WAL that the copy and the standby need. It ends with the conn.
	const reserve = "SELECT now() FROM pg_create_physical_replication_slot('standby_' || pg_backend_pid(), true, true)"
	var begin time.Time
	if err := conn.QueryRow(ctx, reserve).Scan(&begin); err != nil {
		return nil, err
	}
	standby, err := start(ctx, opts, s)
	if err != nil {
		return nil, err
	}
	if err := awaitSender(ctx, conn, begin); err != nil {
		standby.Kill() // a clean stop could take long
		return nil, errors.Join(err, standby.Stop())
	}
	return standby, nil
}

// awaitSender returns when the primary of conn sends to a standby that connected after begin. The
// standby's own pg_stat_wal_receiver reports that too early.
func awaitSender(ctx context.Context, conn *pgx.Conn, begin time.Time) error {
	ctx, cancel := context.WithTimeoutCause(ctx, startWaitMax, fmt.Errorf("it does not follow within %s", startWaitMax))
	defer cancel()
	for {
		const ask = "SELECT EXISTS (SELECT FROM pg_stat_replication WHERE state = 'streaming' AND backend_start > $1)"
		var follows bool
		err := conn.QueryRow(ctx, ask, begin).Scan(&follows)
		if err == nil && !follows {
			err = deadline.Sleep(ctx, readyPollInterval)
		}
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil || follows:
			return err
		}
	}
}

// A copy of a primary's data folder leaves out the files of its process and the contents of these
// folders. pg_wal and pg_control come last.
var (
	notCopiedFiles   = []string{"postmaster.pid", "postmaster.opts", pgControl}
	notCopiedFolders = []string{
		pgWAL, "pg_dynshmem", "pg_notify", "pg_replslot", "pg_serial", "pg_snapshots", "pg_stat_tmp", "pg_subtrans",
	}
)

const (
	pgControl = "global/pg_control"
	pgWAL     = "pg_wal"
)

// copyTo writes a copy of the running server's data to the empty folder dir, with the files that
// make it a standby of this server. It uses the backup functions of SQL: downloads have no
// pg_basebackup, and an installed one may be older than the server and refuse it. If sync is true
// the files are on disk when it returns.
func (s *Server) copyTo(ctx context.Context, dir string, sync bool) error {
	conn, err := pgx.Connect(ctx, s.URL())
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx)) // this ends a backup that failed
	start, stop := "pg_backup_start('standby', true)", "pg_backup_stop(false)"
	if s.binaries.major < 15 {
		start, stop = "pg_start_backup('standby', true, false)", "pg_stop_backup(false, false)"
	}
	var source string
	if _, err := conn.Exec(ctx, "SELECT "+start); err != nil {
		return err
	}
	if err := conn.QueryRow(ctx, "SHOW data_directory").Scan(&source); err != nil {
		return err
	}
	root, err := os.OpenRoot(source) // a link that leads elsewhere is not followed
	if err != nil {
		return err
	}
	defer root.Close()
	c := copying{ctx: ctx, from: root, to: dir, sync: sync}
	err = fs.WalkDir(root.FS(), ".", func(name string, entry fs.DirEntry, err error) error {
		switch {
		case name == ".":
			return err
		case slices.Contains(notCopiedFiles, name):
			return nil
		}
		if err := c.copy(name, entry, err); err != nil || !slices.Contains(notCopiedFolders, name) {
			return err
		}
		return fs.SkipDir
	})
	if err != nil {
		return err
	}

	var label, tablespaces string
	if err := conn.QueryRow(ctx, "SELECT labelfile, spcmapfile FROM "+stop).Scan(&label, &tablespaces); err != nil {
		return err
	}
	if tablespaces != "" {
		return errors.New("a standby of a server with tablespaces is not supported")
	}
	err = fs.WalkDir(root.FS(), pgWAL, func(name string, entry fs.DirEntry, err error) error {
		if name == pgWAL {
			return err
		}
		return c.copy(name, entry, err)
	})
	if err != nil {
		return err
	}
	if err := c.file(pgControl); err != nil {
		return err
	}
	follow := "\nprimary_conninfo = '" + strings.ReplaceAll(s.URL(), "'", "''") + "'\n"
	return errors.Join(
		c.write("backup_label", strings.NewReader(label)),
		c.write("standby.signal", strings.NewReader("")),
		c.write("postgresql.auto.conf", strings.NewReader(follow)),
	)
}

// copying copies files to a folder.
type copying struct {
	ctx  context.Context
	from *os.Root
	to   string
	sync bool
}

// copy copies a file, or a folder without its contents. err is the error of the walk. A file that
// has vanished meanwhile is not needed.
func (c copying) copy(name string, entry fs.DirEntry, err error) error {
	if err == nil {
		err = c.ctx.Err()
	}
	switch {
	case err != nil:
	case entry.IsDir():
		return os.Mkdir(filepath.Join(c.to, name), 0o700)
	case entry.Type().IsRegular():
		err = c.file(name)
	default:
		return nil // a link to a tablespace, which is refused at the end
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func (c copying) file(name string) error {
	f, err := c.from.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	return c.write(name, f)
}

func (c copying) write(name string, content io.Reader) error {
	f, err := os.OpenFile(filepath.Join(c.to, name), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, content)
	if err == nil && c.sync {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// Promote makes a standby a primary, and returns when it accepts writes.
func (s *Server) Promote(ctx context.Context) error {
	conn, err := pgconn.Connect(ctx, s.URL())
	if err != nil {
		return fmt.Errorf("promote standby: %w", err)
	}
	results, err := conn.Exec(ctx, "SELECT pg_promote()").ReadAll()
	err = errors.Join(err, conn.Close(ctx))
	if err == nil && (len(results) != 1 || len(results[0].Rows) != 1 || string(results[0].Rows[0][0]) != "t") {
		err = errors.New("it is still in recovery")
	}
	if err != nil {
		return fmt.Errorf("promote standby: %w", err)
	}
	return nil
}

// Kill ends PostgreSQL like a crash: no checkpoint, no message to clients or standbys. It returns
// when the postmaster is gone. The next start on its data recovers the committed transactions. Stop
// must still be called, for the folders.
func (s *Server) Kill() { s.process.kill() }
