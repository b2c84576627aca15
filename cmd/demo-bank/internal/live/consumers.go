package live

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/process"
	"github.com/paidonce/idempotency/internal/pgfault"
)

// This file runs the consumers of statements.go. They are processes of this program, so that they
// can be killed and paused. A proxy sees their COMMITs.

// ConsumersShown is the number of consumer processes that the page runs, from the first act on.
const ConsumersShown = len(sides) * consumersPerSide

const (
	consumersPerSide = 2                      // so that one can take over from the other
	restartPause     = 200 * time.Millisecond // after a process has ended
	lastWordsMax     = 4 << 10                // bytes from the end of a process's log
)

// consumers are the processes of one side.
type consumers struct {
	members [consumersPerSide]*member
	proxy   *pgfault.Proxy // between them and PostgreSQL; nil if that takes TLS only
	lose    atomic.Bool    // lose the reply to the next COMMIT
}

// startConsumers starts the processes of one side, which end with ctx. Only the reply to a COMMIT
// that was sent together with the bytes of mark can be lost.
func (l *Live) startConsumers(ctx context.Context, inbox bool, mark string) (*consumers, error) {
	program, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find the program of the consumers: %w", err)
	}
	c, database := &consumers{}, l.consumers.DatabaseURL
	if losesCommits(database) {
		network, address, err := pgfault.Upstream(database)
		if err != nil {
			return nil, err
		}
		c.proxy, err = pgfault.Start(pgfault.Options{Network: network, Address: address, OnCommit: func(commit pgfault.Commit) pgfault.Fault {
			if strings.Contains(string(commit.Messages), mark) && c.lose.CompareAndSwap(true, false) {
				return pgfault.Fault{Kind: pgfault.CutAfter}
			}
			return pgfault.Fault{Kind: pgfault.Forward}
		}})
		if err != nil {
			return nil, fmt.Errorf("start the proxy of the consumers: %w", err)
		}
		database = c.proxy.URL(database)
	}
	for i := range c.members {
		arguments := []string{"consume", "--shown", instanceOf(i), "--brokers", strings.Join(l.consumers.Broker.Addresses(), ","), "--log-level", "ERROR"}
		if !inbox {
			arguments = append(arguments, "--no-inbox")
		}
		m := &member{program: program, arguments: arguments, database: database, logger: l.logger}
		c.members[i] = m
		l.storms.Go(func() { m.run(ctx) })
	}
	return c, nil
}

// instanceOf returns the name of a process, which is unique on its side.
func instanceOf(member int) string { return fmt.Sprintf("page-%d", member) }

// close ends the proxy. The processes must have ended.
func (c *consumers) close() {
	if c != nil && c.proxy != nil {
		_ = c.proxy.Close() // nothing is left to lose
	}
}

// losesCommits reports whether a proxy can see the COMMITs of a database: it can't with TLS.
func losesCommits(url string) bool {
	config, err := pgconn.ParseConfig(url)
	if err != nil || !strings.Contains(url, "://") {
		return false
	}
	return config.TLSConfig == nil || slices.ContainsFunc(config.Fallbacks, func(f *pgconn.FallbackConfig) bool { return f.TLSConfig == nil })
}

// member is a process that is started again when it has ended.
type member struct {
	program   string
	arguments []string
	database  string
	logger    *slog.Logger

	mu     sync.Mutex
	cmd    *exec.Cmd // nil while there is no process
	killed bool      // cmd was killed by kill
}

// run runs the process until ctx ends, and then kills it.
func (m *member) run(ctx context.Context) {
	// Linux kills a process when the thread that started it ends: see process.Isolate.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for ctx.Err() == nil {
		m.live(ctx)
		select {
		case <-ctx.Done():
		case <-time.After(restartPause):
		}
	}
}

// live runs the process once.
func (m *member) live(ctx context.Context) {
	var words lastWords
	cmd := exec.Command(m.program, m.arguments...)
	cmd.SysProcAttr, cmd.Stderr = process.Isolate(), &words
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(s string) bool { return strings.HasPrefix(s, "DATABASE_URL=") }), "DATABASE_URL="+m.database)
	input, err := cmd.StdinPipe() // the consumer ends with its input, and so with this process
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		m.logger.WarnContext(ctx, "a consumer of the page did not start; it is tried again", "error", err)
		return
	}
	m.set(cmd)
	stop := context.AfterFunc(ctx, m.kill)
	err = cmd.Wait()
	stop()
	if !m.set(nil) {
		m.logger.WarnContext(ctx, "a consumer of the page has ended; it is started again", "error", err, "said", words.String())
	}
	_ = input.Close() // Wait closed it
}

// set changes the current process, and reports whether the last one was killed.
func (m *member) set(cmd *exec.Cmd) (killed bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	killed = m.killed
	m.cmd, m.killed = cmd, false
	return killed
}

// kill ends the process as kill -9 does.
func (m *member) kill() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.cmd != nil {
		m.killed = m.cmd.Process.Kill() == nil
	}
}

// pause stops the process, and returns a function that continues it.
func (m *member) pause() (resume func(), err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.cmd == nil {
		return func() {}, nil
	}
	paused := m.cmd.Process
	if err := process.Stop(paused); err != nil {
		return nil, fmt.Errorf("pause a consumer: %w", err)
	}
	return func() { _ = process.Continue(paused) }, nil // it may have been killed
}

// lastWords keeps the last bytes that are written to it.
type lastWords struct{ end []byte }

func (w *lastWords) Write(p []byte) (int, error) {
	w.end = append(w.end, p...)
	w.end = w.end[max(0, len(w.end)-lastWordsMax):]
	return len(p), nil
}

func (w *lastWords) String() string { return strings.TrimSpace(string(w.end)) }
