package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/process"
)

// ServeCommand is the program's hidden command that serves: see [Serve].
const ServeCommand = "bench-serve"

const childStopMax = 10 * time.Second

// child is the serving process.
type child struct {
	cmd     *exec.Cmd
	in      io.WriteCloser
	encoder *json.Encoder
	decoder *json.Decoder
	trouble tail
	ended   chan struct{}
	address string
}

// startChild starts the serving process, which ends with this process.
func startChild(ctx context.Context) (*child, error) {
	program, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find the program that serves: %w", err)
	}
	c := &child{cmd: exec.Command(program, ServeCommand), ended: make(chan struct{})}
	c.cmd.SysProcAttr = process.Isolate()
	c.cmd.Stderr = &c.trouble
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		return nil, fmt.Errorf("start the server: %w", err)
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start the server: %w", err)
	}
	c.encoder, c.decoder = json.NewEncoder(c.in), json.NewDecoder(out)
	started := make(chan error)
	go func() {
		// The kernel ends the child when the thread that started it ends, not when the process
		// does. So the thread is locked.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := c.cmd.Start()
		started <- err
		if err == nil {
			_ = c.cmd.Wait() // its output says how it ended
			close(c.ended)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start the server: %w", err)
	}
	r, err := c.ask(ctx, order{})
	if err != nil {
		return nil, errors.Join(err, c.close())
	}
	c.address = r.Address
	return c, nil
}

// ask sends the server an order and waits for its reply. After an error the child cannot be used
// again.
func (c *child) ask(ctx context.Context, o order) (reply, error) {
	stop := context.AfterFunc(ctx, func() { _ = c.cmd.Process.Kill() }) // it may have ended
	defer stop()
	var r reply
	err := c.encoder.Encode(o)
	if err == nil {
		err = c.decoder.Decode(&r)
	}
	switch {
	case ctx.Err() != nil:
		return r, context.Cause(ctx)
	case err != nil:
		return r, fmt.Errorf("the server ended: %w: %s", err, c.trouble.text())
	case r.Error != "":
		return r, errors.New("the server: " + r.Error)
	}
	return r, nil
}

func (c *child) close() error {
	_ = c.in.Close() // the child ends when its input does; it may have ended
	select {
	case <-c.ended:
		return nil
	case <-time.After(childStopMax):
	}
	_ = c.cmd.Process.Kill()
	<-c.ended
	return fmt.Errorf("the server did not stop within %v", childStopMax)
}

// tail keeps the end of everything that was written to it. It is safe for concurrent use.
type tail struct {
	mu   sync.Mutex
	last []byte
}

const tailBytesMax = 2000

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.last = append(t.last, p...)
	t.last = t.last[max(0, len(t.last)-tailBytesMax):]
	return len(p), nil
}

func (t *tail) text() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.last))
}
