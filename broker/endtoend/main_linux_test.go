package endtoend_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/paidonce/idempotency/internal/pgtest"
)

// childVariable makes this test binary a child of the proof. It has the JSON of a child.
const childVariable = "PAIDONCE_ENDTOEND_CHILD"

func TestMain(m *testing.M) {
	if text := os.Getenv(childVariable); text != "" {
		os.Exit(runChild(text))
	}
	pgtest.Main(m)
}

// The roles of children.
const (
	roleConsumer = "consumer"
	roleKfake    = "kfake"
	roleNATS     = "nats"
)

// readyLine is what a broker prints once it answers.
const readyLine = "ready"

// child is the task of a process of the proof.
type child struct {
	Role string

	// Of a broker.
	Dir  string
	Port int

	// Of a consumer.
	Number      int
	DatabaseURL string
	Source      source

	Session time.Duration
}

func runChild(text string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	var c child
	err := json.Unmarshal([]byte(text), &c)
	if err == nil {
		switch c.Role {
		case roleConsumer:
			err = c.consume(ctx)
		case roleKfake:
			err = c.serveKafka(ctx)
		case roleNATS:
			err = c.serveNATS(ctx)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// process is a child that runs, or ran.
type process struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed when it has ended and all of its output was read

	mu      sync.Mutex
	trouble []string // its last lines on stderr
}

// startChild starts a child, and calls hear with each line that it prints.
func startChild(c child, hear func(line string)) (*process, error) {
	text, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &process{cmd: exec.Command(program), ended: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), childVariable+"="+string(text))
	p.cmd.Stdout, p.cmd.Stderr = &lines{each: hear}, &lines{each: p.note}
	return p, p.start()
}

func (p *process) start() error {
	// It ends with this process, also if that is killed.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error, 1)
	go func() {
		// The kernel kills a child when the thread that started it ends.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		started <- err
		if err == nil {
			_ = p.cmd.Wait() // ProcessState has it
			close(p.ended)
		}
	}()
	return <-started
}

func (p *process) note(line string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	const most = 8
	if p.trouble = append(p.trouble, line); len(p.trouble) > most {
		p.trouble = p.trouble[1:]
	}
}

func (p *process) said() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.Join(p.trouble, "\n")
}

func (p *process) signal(s syscall.Signal) error { return p.cmd.Process.Signal(s) }

func (p *process) hasEnded() bool {
	select {
	case <-p.ended:
		return true
	default:
		return false
	}
}

// kill is kill -9. It reports whether the process died of it.
func (p *process) kill() bool {
	_ = p.signal(syscall.SIGKILL) // it may have ended
	<-p.ended
	status, ok := p.cmd.ProcessState.Sys().(syscall.WaitStatus)
	return ok && status.Signaled() && status.Signal() == syscall.SIGKILL
}

// isStopped reports whether the kernel has stopped the process.
func (p *process) isStopped() bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(stat), ") ") // behind the name
	return strings.HasPrefix(rest, "T")
}

// lines is a writer that passes its input on, line by line.
type lines struct {
	each func(string)
	rest []byte
}

func (w *lines) Write(p []byte) (int, error) {
	w.rest = append(w.rest, p...)
	for {
		at := slices.Index(w.rest, '\n')
		if at < 0 {
			return len(p), nil
		}
		w.each(string(w.rest[:at]))
		w.rest = w.rest[at+1:]
	}
}
