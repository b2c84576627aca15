package chaos

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/process"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/psp"
	"github.com/paidonce/idempotency/internal/deadline"
)

const (
	processorLine      = "demo-bank psp is at " // it prints this when it serves
	processorWaitMax   = 20 * time.Second       // from its start until it serves
	processorOutageMin = 200 * time.Millisecond // from its kill to its next start
	processorTimeout   = 5 * time.Second        // of a request to it
)

// processor is the process that the banks call: a demo-bank psp with a file. It is restarted when
// it dies.
type processor struct {
	run     *run
	program string
	address string
	log     *os.File
	client  *http.Client
	ended   sync.WaitGroup

	mu       sync.Mutex
	stopping bool
	killed   bool
	cmd      *exec.Cmd     // nil between two lives
	serving  chan struct{} // closed when the current or next life serves
}

func newProcessor(r *run) *processor {
	return &processor{run: r, client: &http.Client{Timeout: processorTimeout, Transport: &http.Transport{DisableKeepAlives: true}}}
}

// start starts the first life and blocks until it serves.
func (p *processor) start(ctx context.Context) (err error) {
	if p.program, err = os.Executable(); err != nil {
		return fmt.Errorf("find the program of the processor: %w", err)
	}
	if p.address, err = freeAddress(); err != nil {
		return err
	}
	if p.log, err = os.Create(filepath.Join(p.run.dir, "processor.log")); err != nil {
		return fmt.Errorf("open the processor's log: %w", err)
	}
	p.serving = make(chan struct{})
	failed := make(chan error, 1)
	p.ended.Go(func() { failed <- p.supervise() })
	return p.awaitServing(ctx, failed)
}

func (p *processor) awaitServing(ctx context.Context, failed <-chan error) error {
	p.mu.Lock()
	serving := p.serving
	p.mu.Unlock()
	select {
	case <-serving:
		return nil
	case err := <-failed:
		return errors.Join(errors.New("the processor ended"), err)
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(processorWaitMax):
		return fmt.Errorf("the processor did not serve within %v", processorWaitMax)
	}
}

// supervise starts life after life until the processor is stopped.
func (p *processor) supervise() error {
	// The kernel ends the process when the thread that started it ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for {
		p.mu.Lock()
		if p.stopping {
			p.mu.Unlock()
			return nil
		}
		serving := p.serving
		cmd := exec.Command(p.program, "psp", "--addr", p.address, "--file", filepath.Join(p.run.dir, "processor.jsonl"), "--log-level", "WARN")
		cmd.SysProcAttr = process.Isolate()
		served := false
		cmd.Stdout = &lines{each: func(line string) {
			if strings.HasPrefix(line, processorLine) && !served {
				served = true
				close(serving)
			}
		}}
		cmd.Stderr = p.log
		err := cmd.Start()
		if err == nil {
			p.cmd, p.killed = cmd, false
		}
		p.mu.Unlock()
		if err != nil {
			p.run.findings.add("the processor can't be started: %v", err)
			return err
		}
		_ = cmd.Wait() // how it ended is judged below
		p.mu.Lock()
		stopping, killed := p.stopping, p.killed
		p.cmd = nil
		if served {
			p.serving = make(chan struct{})
		}
		p.mu.Unlock()
		switch {
		case stopping:
			return nil
		case !killed:
			p.run.findings.add("the processor died unasked (%v)", cmd.ProcessState)
			return errors.New("it died unasked")
		}
		time.Sleep(processorOutageMin)
	}
}

// crash is kill -9, and blocks until the next life serves.
func (p *processor) crash(ctx context.Context) (bool, error) {
	p.mu.Lock()
	if p.cmd == nil || p.killed {
		p.mu.Unlock()
		return false, nil
	}
	p.killed = true
	err := process.Kill(p.cmd.Process.Pid)
	p.mu.Unlock()
	if err != nil {
		return false, nil // it has just ended
	}
	// The channel of the killed life is closed already, and is replaced when that life has ended.
	for {
		p.mu.Lock()
		gone := !p.killed || p.cmd == nil
		p.mu.Unlock()
		if gone {
			break
		}
		if err := deadline.Sleep(ctx, idlePause); err != nil {
			return true, err
		}
	}
	return true, p.awaitServing(ctx, nil)
}

// set makes the processor misbehave, and waits until it does. It tries until ctx ends: the
// processor may be between two lives.
func (p *processor) set(ctx context.Context, faults psp.Faults) error {
	body, err := json.Marshal(faults)
	if err != nil {
		return err
	}
	for {
		r, err := http.NewRequestWithContext(ctx, http.MethodPut, "http://"+p.address+"/faults", bytes.NewReader(body))
		if err != nil {
			return err
		}
		if response, err := p.client.Do(r); err == nil {
			_ = response.Body.Close()
			if response.StatusCode == http.StatusNoContent {
				return nil
			}
			return fmt.Errorf("the processor refuses its faults with %d", response.StatusCode)
		}
		if err := deadline.Sleep(ctx, idlePause); err != nil {
			return err
		}
	}
}

// processorItem is an item of the processor's lists.
type processorItem struct {
	ID     string `json:"id"`
	Key    string `json:"key"`
	Amount int64  `json:"amount"`
	Charge string `json:"charge"` // of a refund
	To     string `json:"to"`     // of a mail
}

// list reads one of the processor's lists.
func (p *processor) list(ctx context.Context, kind string) ([]processorItem, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+p.address+"/"+kind, nil)
	if err != nil {
		return nil, err
	}
	response, err := p.client.Do(r)
	if err != nil {
		return nil, fmt.Errorf("read the processor's %s: %w", kind, err)
	}
	defer func() { _ = response.Body.Close() }() // it was read to its end, or is of no use
	var list struct {
		Items []processorItem `json:"items"`
	}
	if err := json.NewDecoder(response.Body).Decode(&list); err != nil || response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("read the processor's %s: status %d: %w", kind, response.StatusCode, err)
	}
	return list.Items, nil
}

func (p *processor) close() error {
	p.mu.Lock()
	p.stopping = true
	if p.cmd != nil {
		_ = process.Kill(p.cmd.Process.Pid) // it may have ended
	}
	p.mu.Unlock()
	p.ended.Wait()
	if p.log == nil {
		return nil
	}
	return p.log.Close()
}
