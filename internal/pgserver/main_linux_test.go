package pgserver

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	ossignal "os/signal"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/goleak"
)

// helperVariable makes the test binary a process that a test can kill. Its value is the helper's
// name.
const helperVariable = "PAIDONCE_PGSERVER_HELPER"

func TestMain(m *testing.M) {
	if name := os.Getenv(helperVariable); name != "" {
		if err := helpers[name](os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		sweep(os.TempDir()) // of the killed helpers
		os.Exit(code)
	}))
}

var helpers = map[string]func(args []string) error{
	// serve DATADIR: starts, prints "PID URL", and waits for the end of its input without stopping
	// PostgreSQL.
	"serve": func(args []string) error {
		ossignal.Ignore(os.Interrupt)
		s, err := Start(context.Background(), &Options{DataDir: args[0]})
		if err != nil {
			return err
		}
		fmt.Println(s.PID(), s.URL())
		_, err = io.Copy(io.Discard, os.Stdin)
		return err
	},
	// roundtrip DATADIR: starts, queries, stops.
	"roundtrip": func(args []string) error {
		s, err := Start(context.Background(), &Options{DataDir: args[0]})
		if err != nil {
			return err
		}
		conn, err := pgx.Connect(context.Background(), s.URL())
		if err == nil {
			err = conn.Close(context.Background())
		}
		fmt.Println("uid", os.Getuid())
		if stopErr := s.Stop(); err == nil {
			err = stopErr
		}
		return err
	},
	// watch PID: starts a watcher for the process and prints a line.
	"watch": func(args []string) error {
		var pid int
		if _, err := fmt.Sscan(args[0], &pid); err != nil {
			return err
		}
		if _, err := startWatcher(pid); err != nil {
			return err
		}
		fmt.Println(pid, "watched")
		_, err := io.Copy(io.Discard, os.Stdin)
		return err
	},
}

// helper is a running copy of the test binary.
type helper struct {
	cmd    *exec.Cmd
	stderr bytes.Buffer
	pid    int    // as it printed it
	url    string // as it printed it
}

// slow skips a test under -short.
func slow(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("left out by -short, because it starts PostgreSQL: one test of a start and a stop is kept")
	}
}

// startHelper starts a helper in a process group of its own and waits for its first line.
func startHelper(t *testing.T, name string, args ...string) *helper {
	t.Helper()
	slow(t)
	h := &helper{cmd: exec.Command(os.Args[0], args...)}
	h.cmd.Env = append(os.Environ(), helperVariable+"="+name)
	h.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	h.cmd.Stderr = &h.stderr
	stdin, err := h.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := h.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := h.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		h.kill()
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatalf("helper %s: %v: %s", name, err, h.stderr.String())
	}
	if _, err := fmt.Sscan(line, &h.pid, &h.url); err != nil {
		t.Fatalf("helper %s said %q: %v", name, line, err)
	}
	return h
}

// kill ends the helper with SIGKILL and waits for it. It may be called again.
func (h *helper) kill() {
	_ = h.cmd.Process.Kill() // fails if it is gone
	_ = h.cmd.Wait()
}

// startServer starts a Server that stops when the test ends. -short skips the test.
func startServer(t *testing.T, opts *Options) *Server {
	t.Helper()
	slow(t)
	return startAnyway(t, opts)
}

func startAnyway(t *testing.T, opts *Options) *Server {
	t.Helper()
	s, err := Start(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Errorf("Stop: %v", err)
		}
	})
	return s
}

// folder returns a temporary folder that PostgreSQL's account may enter, unlike t.TempDir when the
// tests run as root.
func folder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "paidonce-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("remove folder: %v", err)
		}
	})
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	return dir
}

func connect(t *testing.T, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) }) // its server may be gone
	return conn
}

func execute(t *testing.T, url, statement string) {
	t.Helper()
	conn := connect(t, url)
	defer conn.Close(t.Context())
	if _, err := conn.Exec(t.Context(), statement); err != nil {
		t.Fatal(err)
	}
}

func queryText(t *testing.T, url, query string) (text string) {
	t.Helper()
	conn := connect(t, url)
	defer conn.Close(t.Context())
	if err := conn.QueryRow(t.Context(), query).Scan(&text); err != nil {
		t.Fatal(err)
	}
	return text
}

// running reports whether pid is a process that has not ended; a zombie has ended.
func running(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, state, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(state, "Z") && !strings.HasPrefix(state, "X")
}

// awaitGone returns the time that the process took to end.
func awaitGone(t *testing.T, pid int) time.Duration {
	t.Helper()
	begin := time.Now()
	for running(pid) {
		if time.Since(begin) > 10*time.Second {
			t.Fatalf("process %d still runs", pid)
		}
		time.Sleep(5 * time.Millisecond)
	}
	return time.Since(begin)
}
