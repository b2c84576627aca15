package pgserver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"

	"github.com/jackc/pgx/v5/pgconn"
)

// ErrNoBaseBackup says that there is no pg_basebackup to copy a primary with: a downloaded PostgreSQL has none.
var ErrNoBaseBackup = errors.New("pg_basebackup is not installed (Debian: apt install postgresql-client)")

// Standby copies the running primary with pg_basebackup and starts the copy as its hot standby. It returns when the
// standby answers queries, which is not yet when it follows: the primary's pg_stat_replication tells. The primary's
// commits don't wait for it until the primary's synchronous_standby_names says so; the name of the standby is
// "walreceiver". opts are as for [Start], but DataDir must be new, and a setting that sizes shared memory, such as
// max_connections, must not be smaller than the primary's. Each of the two is stopped on its own. Without a
// pg_basebackup the error is [ErrNoBaseBackup]. Not on Windows.
func Standby(ctx context.Context, primary *Server, opts *Options) (*Server, error) {
	if opts == nil {
		opts = &Options{}
	}
	s, err := start(ctx, opts, primary)
	if err != nil {
		return nil, fmt.Errorf("start standby: %w", err)
	}
	return s, nil
}

// copyArgs are pg_basebackup's. The copy has the socket's address in its primary_conninfo, and the signal file that
// makes it a standby. initdb lets the superuser replicate over the socket.
func (s *Server) copyArgs(dir string) []string {
	return []string{"-D", dir, "--dbname=" + s.URL(), "--write-recovery-conf", "--wal-method=stream", "--checkpoint=fast"}
}

// basebackup is pg_basebackup beside the server, or else the one in PATH: it copies servers up to its own version.
func (b binaries) basebackup() (string, error) {
	if path := b.program("pg_basebackup"); isFile(path) {
		return path, nil
	}
	path, err := exec.LookPath("pg_basebackup")
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrNoBaseBackup, err)
	}
	return path, nil
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

// Promote makes a standby a primary, and returns when it takes writes.
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

// Kill ends PostgreSQL as a crash does: no checkpoint, no word to clients and standbys. It returns when the postmaster is
// gone. The next start on its data recovers what was committed. Stop must still be called, for the folders.
func (s *Server) Kill() { s.process.kill() }
