package chaos

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/process"
)

// The beginnings of the lines that a bank prints when it serves, and when it dies at a crash point.
const (
	servingLine    = "demo-bank is at "
	crashPointLine = "demo-bank: crash point "
)

// life is one process of a bank.
type life struct {
	cmd     *exec.Cmd
	armed   arm
	serving chan struct{} // closed when the bank serves
	ended   chan struct{} // closed when the process has ended and was waited for

	mu      sync.Mutex
	said    string   // the crash point at which it announced its death
	serves  bool     // it serves, or did
	killed  bool     // by the run
	trouble []string // the last lines on stderr
}

// hear reads a line of the bank's stdout.
func (l *life) hear(run *run, line string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if strings.HasPrefix(line, servingLine) && !l.serves {
		run.note("a bank serves: %s", strings.TrimPrefix(line, servingLine))
		l.serves = true
		close(l.serving)
	}
}

// overhear reads a line of the bank's stderr.
func (l *life) overhear(line string, log *os.File) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if point, ok := strings.CutPrefix(line, crashPointLine); ok {
		l.said = point
	}
	if l.trouble = append(l.trouble, line); len(l.trouble) > 3 {
		l.trouble = l.trouble[1:]
	}
	_, _ = fmt.Fprintln(log, line) // a log that can't be written is no reason to stop
}

func (l *life) kill() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.killed {
		return false
	}
	l.killed = true
	return process.Kill(l.cmd.Process.Pid) == nil
}

func (l *life) dying() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.killed
}

// lines passes everything that is written to it to each, line by line.
type lines struct {
	each func(string)
	rest []byte
}

const lineBytesMax = 64 << 10

func (w *lines) Write(p []byte) (int, error) {
	w.rest = append(w.rest, p...)
	for {
		at := slices.Index(w.rest, '\n')
		if at < 0 {
			if len(w.rest) > lineBytesMax {
				w.rest = w.rest[:0]
			}
			return len(p), nil
		}
		w.each(string(w.rest[:at]))
		w.rest = w.rest[at+1:]
	}
}
