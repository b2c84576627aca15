// Package pgserver runs a PostgreSQL of its own for the demo bank and for the tests.
//
// It looks for installed server binaries first and downloads them only if there are none.
// PostgreSQL listens on a Unix socket in a private folder (on Windows: on 127.0.0.1 with a random
// password), drops root, ignores the terminal's Ctrl-C, and dies with the process that started it,
// even if SIGKILL ends that process.
package pgserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/paidonce/idempotency/internal/deadline"
)

const (
	superuser       = "postgres"
	defaultDatabase = "postgres"

	// startWaitMax bounds the time until a postmaster answers, crash recovery included.
	startWaitMax = 60 * time.Second
	// stopWaitMax bounds the fast shutdown. The immediate shutdown after it gets as long again.
	stopWaitMax = 10 * time.Second
	// oldPostmasterWaitMax bounds the wait for the postmaster of a killed owner that is still
	// dying.
	oldPostmasterWaitMax = 10 * time.Second
	// oldChildrenWaitMax bounds the wait for the children of a postmaster that was killed. On
	// PostgreSQL 14 an autovacuum launcher may wait twice 10 seconds for statistics from a
	// collector that is gone. Only then does it notice that its postmaster is gone too.
	oldChildrenWaitMax = 25 * time.Second

	readyPollInterval = 10 * time.Millisecond
	readyConnectMax   = time.Second
	retryInterval     = 100 * time.Millisecond
)

// ErrDataDirInUse means that a living process holds the data folder. It is wrapped with the
// folder's name.
var ErrDataDirInUse = errors.New("data folder is held by a living process")

// Options are optional. Nil means a temporary PostgreSQL with PostgreSQL's own defaults.
type Options struct {
	// DataDir holds the data, the log (postgres.log) and a lock file, and outlives the Server. It
	// is made if missing. A folder that is not empty and was not made by this package is refused
	// and left as it is. Empty: a temporary folder that Stop removes or, after a kill, the next
	// Start.
	DataDir string

	// TempDir is the folder for temporary files: the socket, and the data if DataDir is empty. The
	// next Start in it removes the files that a killed process left there. Defaults to os.TempDir.
	TempDir string

	// Settings are postgresql.conf settings such as "fsync": "off". They override the defaults
	// (fsync on, max_connections 100) and ALTER SYSTEM. Settings that decide where PostgreSQL lives
	// and listens are refused.
	Settings map[string]string

	// Env are variables ("NAME=value") for PostgreSQL itself, but not for the programs that make
	// its data.
	Env []string

	// TLS makes PostgreSQL listen on 127.0.0.1 as well, for clients that use TLS and log in with a
	// password by SCRAM-SHA-256; see [Server.TLSURL]. Start makes the certificate, which is valid
	// for a day. Not for standbys, and not on Windows. Defaults to false: only a socket.
	TLS bool

	// Progress gets one line for each thing that takes long (a download, an old PostgreSQL that is
	// still stopping). It is not used after Start has returned. Nil: none.
	Progress io.Writer
}

// Server is a running PostgreSQL. Its methods are safe for concurrent use.
type Server struct {
	binaries binaries
	process  *process
	address  url.URL      // without the database
	tls      *tlsListener // nil without Options.TLS
	release  func() error
	stop     func() error
}

// Start starts a PostgreSQL and returns when it answers queries; it takes about a second for a new
// data folder. ctx bounds only Start, not the life of the Server. If Start fails or ctx ends, no
// process and no temporary folder is left behind (a download in progress ends on its own). If
// PostgreSQL refused to start, the error contains the last lines of its log. If another Server
// holds the folder, of this process or another, the error is ErrDataDirInUse.
func Start(ctx context.Context, opts *Options) (*Server, error) {
	if opts == nil {
		opts = &Options{}
	}
	s, err := start(ctx, opts, nil)
	if err != nil {
		return nil, fmt.Errorf("start postgresql: %w", err)
	}
	return s, nil
}

// start starts a PostgreSQL, as a standby of primary unless primary is nil.
func start(ctx context.Context, opts *Options, primary *Server) (_ *Server, err error) {
	if err := checkSettings(opts.Settings); err != nil {
		return nil, err
	}
	progress := opts.Progress
	if progress == nil {
		progress = io.Discard
	}

	dataPath := ""
	if opts.DataDir != "" {
		if dataPath, err = canonicalPath(opts.DataDir); err != nil {
			return nil, err
		}
	}
	acct, err := pickAccount(dataPath)
	if err != nil {
		return nil, err
	}
	if dataPath != "" {
		if err := inspectDataDir(dataPath, acct); err != nil {
			return nil, err
		}
	}
	major, err := dataMajor(dataPath)
	if err != nil {
		return nil, err
	}
	var bin binaries
	if primary != nil {
		bin = primary.binaries
	} else if bin, err = findBinaries(ctx, acct, major, progress); err != nil {
		return nil, err
	}

	var undo cleanups
	defer func() {
		if err != nil {
			_ = undo.run() // the start's own error says more
		}
	}()
	run, err := newRunDir(acct, opts.TempDir)
	if err != nil {
		return nil, err
	}
	undo.add(run.remove)
	temporary := dataPath == ""
	if temporary {
		dataPath = filepath.Join(run.path, "data")
	}
	data, err := claimDataDir(dataPath)
	if err != nil {
		return nil, err
	}
	undo.add(data.release)
	if err := data.init(ctx, bin, acct, temporary, primary); err != nil {
		return nil, err
	}

	s := &Server{binaries: bin}
	listen, err := s.listen(run.socketDir(), data)
	if err != nil {
		return nil, err
	}
	if opts.TLS {
		if s.tls, err = newTLSListener(run.path, acct); err != nil {
			return nil, err
		}
		maps.Copy(listen, s.tls.settings())
		s.address.RawQuery = url.Values{"host": {run.socketDir()}, "port": {s.tls.port}, "sslmode": {"disable"}}.Encode()
	}
	if err := s.launch(ctx, data, acct, listen, opts, progress); err != nil {
		return nil, err
	}
	if s.tls != nil {
		if err := s.tls.setPassword(ctx, s.URL()); err != nil {
			s.process.kill()
			return nil, err
		}
	}
	s.release = undo.run
	s.stop = sync.OnceValue(s.shutdown)
	return s, nil
}

// listen decides where PostgreSQL listens and returns the settings for that.
func (s *Server) listen(socketDir string, data *dataDir) (map[string]string, error) {
	s.address = url.URL{Scheme: "postgres", User: url.User(superuser)}
	if unixSockets {
		query := url.Values{"host": {socketDir}, "port": {strconv.Itoa(socketPort)}, "sslmode": {"disable"}}
		s.address.RawQuery = query.Encode()
		return map[string]string{
			"listen_addresses": "",
			"port":             strconv.Itoa(socketPort),
			// The setting is a list: without the quotes a comma in the path would split it.
			"unix_socket_directories": `"` + socketDir + `"`,
			"unix_socket_permissions": "0700",
		}, nil
	}
	password, err := data.password()
	if err != nil {
		return nil, err
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	s.address.User = url.UserPassword(superuser, password)
	s.address.Host = net.JoinHostPort("127.0.0.1", port)
	s.address.RawQuery = url.Values{"sslmode": {"disable"}}.Encode()
	return map[string]string{"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": ""}, nil
}

// launch starts the postmaster. It first waits for the processes of an earlier one that still hold
// the folder.
func (s *Server) launch(ctx context.Context, data *dataDir, acct *account, listen map[string]string, opts *Options,
	progress io.Writer) error {
	started := time.Now()
	stalePID, err := data.awaitOldPostmaster(ctx, started.Add(oldPostmasterWaitMax), progress)
	if err != nil {
		return err
	}
	for {
		err := s.launchOnce(ctx, data, acct, listen, opts, stalePID)
		// The postmaster is gone but its children have not ended yet: PostgreSQL finds their shared
		// memory in use. A refused start has no SQLSTATE, so this is the one place that reads the
		// text (in locale C, so it is not translated).
		if err == nil || !strings.Contains(err.Error(), "pre-existing shared memory block") || time.Since(started) > oldChildrenWaitMax {
			return err
		}
		if deadline.Sleep(ctx, retryInterval) != nil {
			return context.Cause(ctx)
		}
	}
}

func (s *Server) launchOnce(ctx context.Context, data *dataDir, acct *account, listen map[string]string, opts *Options,
	stalePID int) error {
	log, err := data.openLog()
	if err != nil {
		return err
	}
	defer log.file.Close() // the postmaster has its own copy

	args := []string{"-D", data.cluster()}
	args = append(args, settingArgs(map[string]string{
		"max_connections":   "100",
		"fsync":             "on",
		"log_destination":   "stderr",
		"logging_collector": "off",
	})...)
	args = append(args, settingArgs(listen)...)
	args = append(args, settingArgs(opts.Settings)...) // the last one wins
	cmd := acct.command(data.cluster(), s.binaries.postgres(), args...)
	cmd.Env = append(cmd.Env, opts.Env...)
	if stalePID != 0 {
		// The number in postmaster.pid now belongs to another process. With this variable pg_ctl
		// tells PostgreSQL that such a number is no postmaster. Unlike removing the file, it keeps
		// the check for orphaned children.
		cmd.Env = append(cmd.Env, "PG_GRANDPARENT_PID="+strconv.Itoa(stalePID))
	}
	cmd.Stdout, cmd.Stderr = log.file, log.file
	if s.process, err = startProcess(cmd, s.binaries); err != nil {
		return fmt.Errorf("run %s: %w", s.binaries.postgres(), err)
	}
	if err := s.awaitReady(ctx, log); err != nil {
		s.process.kill()
		return err
	}
	return nil
}

// awaitReady returns when PostgreSQL accepts a client.
func (s *Server) awaitReady(ctx context.Context, log *serverLog) error {
	ctx, cancel := context.WithTimeoutCause(ctx, startWaitMax, fmt.Errorf("no answer within %s", startWaitMax))
	defer cancel()
	poll := time.NewTicker(readyPollInterval)
	defer poll.Stop()
	var last error
	for {
		select {
		case <-s.process.done:
			return fmt.Errorf("postgres ended at once (%v); the end of %s:\n%s", s.process.exit(), log.path, log.tail())
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.Canceled) {
				return context.Cause(ctx)
			}
			return fmt.Errorf("%w (%v); the end of %s:\n%s", context.Cause(ctx), last, log.path, log.tail())
		case <-poll.C:
		}
		connectCtx, cancelConnect := context.WithTimeout(ctx, readyConnectMax)
		conn, err := pgconn.Connect(connectCtx, s.URL())
		if err == nil {
			err = conn.Close(connectCtx)
		}
		cancelConnect()
		if err == nil {
			return nil
		}
		last = err
	}
}

// URL returns the address of the default database, for the superuser "postgres".
func (s *Server) URL() string { return s.DatabaseURL(defaultDatabase) }

// DatabaseURL returns the address of the named database, which need not exist. It has no side
// effects.
func (s *Server) DatabaseURL(name string) string {
	address := s.address
	address.Path = "/" + name
	return address.String()
}

// Version returns PostgreSQL's version, such as "17.5".
func (s *Server) Version() string { return s.binaries.version }

// Program returns the path of a program that was installed with the server, such as pg_dump. It
// reports false if there is none: downloads contain only the server.
func (s *Server) Program(name string) (path string, ok bool) {
	bin := s.binaries
	if postgres, err := filepath.EvalSymlinks(bin.postgres()); err == nil {
		bin.dir = filepath.Dir(postgres)
	}
	info, err := os.Stat(bin.program(name))
	return bin.program(name), err == nil && info.Mode().IsRegular()
}

// PID returns the postmaster's process id.
func (s *Server) PID() int { return s.process.pid() }

// Done returns a channel that is closed when the postmaster is gone, whether by Stop or not.
func (s *Server) Done() <-chan struct{} { return s.process.done }

// Stop ends PostgreSQL without waiting for its clients, waits until it is gone, releases the data
// folder and removes everything temporary. It returns an error if the fast shutdown took over 10 s
// and an immediate one followed: committed data is then safe, but the next start has to recover it.
// A second call waits for the first and returns the same error. It is no error if PostgreSQL ended
// earlier.
func (s *Server) Stop() error { return s.stop() }

func (s *Server) shutdown() error {
	err := s.process.shutdown()
	if releaseErr := s.release(); releaseErr != nil {
		err = errors.Join(err, releaseErr)
	}
	if err != nil {
		return fmt.Errorf("stop postgresql: %w", err)
	}
	return nil
}

// cleanups run once, in the reverse order of their addition.
type cleanups []func() error

func (c *cleanups) add(f func() error) { *c = append(*c, f) }

func (c *cleanups) run() error {
	var errs []error
	for i := len(*c) - 1; i >= 0; i-- {
		errs = append(errs, (*c)[i]())
	}
	return errors.Join(errs...)
}

func freePort() (string, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("find a free port: %w", err)
	}
	_, port, err := net.SplitHostPort(listener.Addr().String())
	if err != nil {
		return "", fmt.Errorf("find a free port: %w", err)
	}
	return port, listener.Close()
}

// canonicalPath makes path absolute and resolves the symbolic links of the part that exists, so
// that one folder has one name in postmaster command lines.
func canonicalPath(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return "", fmt.Errorf("data folder: %w", err)
	}
	missing := ""
	for existing := path; ; existing = filepath.Dir(existing) {
		resolved, err := filepath.EvalSymlinks(existing)
		if err == nil {
			return filepath.Join(resolved, missing), nil
		}
		if !errors.Is(err, os.ErrNotExist) {
			return "", fmt.Errorf("data folder: %w", err)
		}
		missing = filepath.Join(filepath.Base(existing), missing)
	}
}
