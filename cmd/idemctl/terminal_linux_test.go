package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/paidonce/idempotency"
)

// person runs the program at a terminal, reads and types.
type person struct {
	t      *testing.T
	cmd    *exec.Cmd
	keys   *os.File
	mu     sync.Mutex
	screen bytes.Buffer
	ended  chan struct{}
}

// at starts the program at a terminal.
func (b *testBundle) at(t *testing.T, args ...string) *person {
	t.Helper()
	keys, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("there is no terminal to be had: %v", err)
	}
	t.Cleanup(func() { _ = keys.Close() })
	connection, err := keys.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var number int
	var failed error
	if err := connection.Control(func(fd uintptr) {
		if failed = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); failed == nil {
			number, failed = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
		}
	}); err != nil || failed != nil {
		t.Fatal(err, failed)
	}
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tty.Close() }() // the program has its own
	ctx, cancel := context.WithTimeout(context.Background(), waitMax)
	t.Cleanup(cancel)
	term := &person{t: t, cmd: command(ctx, b.URL, args...), keys: keys, ended: make(chan struct{})}
	term.cmd.Stdin, term.cmd.Stdout, term.cmd.Stderr = tty, tty, tty
	term.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := term.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { // until the program has ended
		defer close(term.ended)
		page := make([]byte, 4096)
		for {
			n, err := keys.Read(page)
			term.mu.Lock()
			term.screen.Write(page[:n])
			term.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return term
}

func (term *person) text() string {
	term.mu.Lock()
	defer term.mu.Unlock()
	return term.screen.String()
}

// sees waits until the screen shows the text.
func (term *person) sees(text string) {
	term.t.Helper()
	for deadline := time.Now().Add(waitMax); !strings.Contains(term.text(), text); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			term.t.Fatalf("there is no %q on the screen:\n%s", text, term.text())
		}
	}
}

func (term *person) types(text string) {
	term.t.Helper()
	if _, err := term.keys.WriteString(text); err != nil {
		term.t.Fatal(err)
	}
}

// code waits for the program to end and returns its exit code.
func (term *person) code() int {
	_ = term.cmd.Wait() // ProcessState has the code
	<-term.ended
	return term.cmd.ProcessState.ExitCode()
}

// At a terminal, delete shows the record, and deletes it only after a yes.
func TestDeleteAsksAtATerminal(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.do(t, "k")
	// The last one ends the input.
	for _, answer := range []string{"\n", "no\n", "y\n", "yes please\n", "\x04"} {
		term := b.at(t, "key", "delete", "acme", "k", "--reason", "ticket 7")
		term.sees("Type yes to go on")
		wantText(t, term.text(), "acme / k: status 201", "RUNS AGAIN", "PAY TWICE")
		term.types(answer)
		if code := term.code(); code != exitRefused || !strings.Contains(term.text(), "nothing was done") {
			t.Errorf("after %q: exit code %d\n%s", answer, code, term.text())
		}
	}
	if n := b.Count(t, "SELECT count(*) FROM idempotency_audit"); n != 0 || b.do(t, "k") != idempotency.OutcomeReplayed {
		t.Fatalf("%d acts without a yes", n)
	}

	// If the record shown is gone when the yes comes, the next record stays.
	term := b.at(t, "key", "delete", "acme", "k", "--reason", "ticket 7")
	term.sees("Type yes to go on")
	b.Exec(t, "DELETE FROM idempotency_keys")
	b.do(t, "k")
	term.types("yes\n")
	if code := term.code(); code != exitRefused || b.do(t, "k") != idempotency.OutcomeReplayed {
		t.Errorf("of another attempt: exit code %d\n%s", code, term.text())
	}

	term = b.at(t, "key", "delete", "acme", "k", "--reason", "ticket 7")
	term.sees("Type yes to go on")
	term.types("yes\n")
	if code := term.code(); code != 0 || b.do(t, "k") != idempotency.OutcomeExecuted {
		t.Errorf("after a yes: exit code %d\n%s", code, term.text())
	}
}

// At a terminal top draws a screen, and ends with q or Ctrl-C.
func TestTopAtATerminal(t *testing.T) {
	t.Parallel()
	b := setup(t)
	finish := b.running(t, "k")
	defer finish()
	for _, key := range []string{"q", "\x03"} {
		term := b.at(t, "top", "--interval", "500ms")
		term.sees("in flight 1")
		term.sees("idle in transaction")
		term.sees("q ends")
		term.types(key)
		if code := term.code(); code != 0 {
			t.Errorf("after %q: exit code %d\n%s", key, code, term.text())
		}
	}
}
