package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/process"
	"github.com/paidonce/idempotency/internal/crashpoint"
)

const (
	poolSizeBig   = 10 // of the first bank
	poolSizeSmall = 6  // of the others: too small for 32 clients

	// If a COMMIT stays half-open, its transaction ends ten seconds after this timeout. By then its
	// request has been answered as unknown.
	handlerTimeout = 4 * time.Second
	// handlerTimeoutCalls is longer than the time for which a bank is stopped. A bank that slept
	// must not send, and this timeout must not be the reason.
	handlerTimeoutCalls = 20 * time.Second
	acquireTimeout      = time.Second

	// duplicateWait is shorter than the time that an attempt may hold a key, so that some requests
	// still get in-progress.
	duplicateWait = 50 * time.Millisecond

	serveWaitMax = 30 * time.Second // from a bank's start until it serves, including failed starts
	restartPause = 100 * time.Millisecond
	stopWaitMax  = 20 * time.Second
)

// banks are the processes under test, each in a slot with its own address. A bank that dies is
// restarted.
type banks struct {
	run    *run
	slots  []*slot
	ended  sync.WaitGroup
	closed bool
}

func newBanks(r *run) *banks { return &banks{run: r} }

// slot is one bank's place. Its lives follow one another.
type slot struct {
	run     *run
	number  int
	address string
	url     string
	program string
	log     *os.File

	mu       sync.Mutex
	stopping bool
	next     arm   // of the next life
	pending  []arm // crash points that no life has reached
	life     *life // the current one; nil between two
	scrapes  scrapes
}

// arm is a crash point, and the number of the pass at which the bank dies there. The zero value is
// none.
type arm struct {
	point string
	nth   int
}

func (a arm) String() string { return a.point + ":" + strconv.Itoa(a.nth) }

func (b *banks) start(ctx context.Context) error {
	program := b.run.config.Bank
	if program == "" {
		var err error
		if program, err = os.Executable(); err != nil {
			return fmt.Errorf("find the program that serves: %w", err)
		}
	}
	for i := range b.run.config.Banks {
		address, err := freeAddress()
		if err != nil {
			return err
		}
		url, err := b.run.cluster.urlOf(i)
		if err != nil {
			return err
		}
		log, err := os.Create(filepath.Join(b.run.dir, fmt.Sprintf("bank-%d.log", i)))
		if err != nil {
			return fmt.Errorf("open a bank's log: %w", err)
		}
		b.slots = append(b.slots, &slot{run: b.run, number: i, address: address, url: url, program: program, log: log})
	}
	failed := make(chan error, len(b.slots))
	for _, s := range b.slots {
		b.ended.Go(func() { failed <- s.supervise() })
	}
	for _, s := range b.slots {
		if err := s.awaitServing(ctx, failed); err != nil {
			return err
		}
	}
	return nil
}

// The banks' ports are below the range from which systems assign free ports, so that no other
// program gets a bank's port between two of its lives.
const (
	portMin   = 20_000
	portMax   = 32_000
	portTries = 100
)

// freeAddress returns an address that no program listens on now.
func freeAddress() (string, error) {
	for range portTries {
		address := net.JoinHostPort("127.0.0.1", strconv.Itoa(portMin+rand.IntN(portMax-portMin)))
		if listener, err := net.Listen("tcp", address); err == nil {
			return address, listener.Close()
		}
	}
	return "", fmt.Errorf("find a free port: %d of those from %d to %d are taken", portTries, portMin, portMax)
}

// address returns the address on which a bank listens, the same in each of its lives.
func (b *banks) address(bank int) string { return b.slots[bank].address }

// awaitServing blocks until the slot's bank serves, in any of its lives.
func (s *slot) awaitServing(ctx context.Context, failed <-chan error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, serveWaitMax, fmt.Errorf("bank %d did not serve within %v", s.number, serveWaitMax))
	defer cancel()
	for {
		if l := s.current(); l != nil {
			serving := l.serving
			if l.dying() {
				serving = nil // the next life will serve
			}
			select {
			case <-serving:
				return nil
			case <-l.ended:
			case err := <-failed:
				return err
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		select {
		case err := <-failed:
			return err
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(idlePause):
		}
	}
}

func (s *slot) current() *life {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.life
}

// supervise starts life after life until the slot is stopped. A life that ends unasked is a
// finding.
func (s *slot) supervise() error {
	// The kernel ends a bank when the thread that started it ends, not when the process does. So
	// the thread is locked.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	refusedSince := time.Time{}
	for {
		l, err := s.begin()
		if err != nil {
			s.run.findings.add("bank %d can't be started: %v", s.number, err)
			return err
		}
		if l == nil {
			return nil
		}
		_ = l.cmd.Wait() // judge reads how it ended
		served, stopped := s.judge(l)
		close(l.ended)
		if stopped {
			return nil
		}
		switch {
		case served:
			refusedSince = time.Time{}
		case refusedSince.IsZero():
			refusedSince = time.Now()
		case time.Since(refusedSince) > serveWaitMax:
			err := fmt.Errorf("bank %d did not serve for %v: %s", s.number, serveWaitMax, strings.Join(l.trouble, " "))
			s.run.findings.add("%v", err)
			return err
		}
		if !served {
			time.Sleep(restartPause)
		}
	}
}

// begin starts the next life. It returns nil if the slot is stopped.
func (s *slot) begin() (*life, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return nil, nil
	}
	poolSize := poolSizeSmall
	if s.number == 0 {
		poolSize = poolSizeBig
	}
	l := &life{serving: make(chan struct{}), ended: make(chan struct{})}
	l.armed, s.next = s.next, arm{}
	if l.armed.point == "" && len(s.pending) > 0 && !s.run.healed.Load() {
		l.armed, s.pending = s.pending[0], s.pending[1:]
	}
	l.cmd = exec.Command(s.program, "serve", "--addr", s.address, "--database-url", s.url, "--log-level", "WARN",
		"--brokers", s.run.brokers,
		"--pool-size", strconv.Itoa(poolSize),
		"--acquire-timeout", acquireTimeout.String(), "--reap-interval", s.run.profile.reapInterval.String())
	timeout := handlerTimeout
	if s.run.profile.effects {
		timeout = handlerTimeoutCalls
		l.cmd.Args = append(l.cmd.Args, "--psp", s.run.gateway.urls[s.number], "--psp-key-lifetime", keyLifetime.String())
	}
	l.cmd.Args = append(l.cmd.Args, "--handler-timeout", timeout.String())
	if s.run.config.Wait {
		l.cmd.Args = append(l.cmd.Args, "--wait", duplicateWait.String())
	}
	l.cmd.SysProcAttr = process.Isolate()
	l.cmd.Env = slices.DeleteFunc(os.Environ(), func(entry string) bool {
		return strings.HasPrefix(entry, "DATABASE_URL=") || strings.HasPrefix(entry, crashpoint.BankVariable+"=")
	})
	if l.armed.point != "" {
		l.cmd.Env = append(l.cmd.Env, crashpoint.BankVariable+"="+l.armed.String())
	}
	l.cmd.Stdout, l.cmd.Stderr = &lines{each: func(line string) { l.hear(s.run, line) }}, &lines{each: func(line string) { l.overhear(line, s.log) }}
	if err := l.cmd.Start(); err != nil {
		return nil, err
	}
	s.life = l
	return l, nil
}

// judge reports whether a life that has ended had served, and whether it is the slot's last.
func (s *slot) judge(l *life) (served, stopped bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	s.life = nil
	s.scrapes.endLife()
	state := l.cmd.ProcessState
	reached := l.said != "" && l.said == l.armed.point && process.DiedOfKill(state)
	switch {
	case l.armed.point == "" || reached:
	case !l.serves && s.next.point == "":
		s.next = l.armed
	default:
		s.pending = append(s.pending, l.armed)
	}
	tally := &s.run.tally
	s.run.note("bank %d: %v; armed %v, said %q, killed %t", s.number, state, l.armed, l.said, l.killed)
	switch {
	case reached:
		tally.crashPoints.add(l.said)
		tally.kills.Add(1)
		s.run.noteFault()
	case l.killed && process.DiedOfKill(state):
		tally.kills.Add(1)
	case s.stopping && state.ExitCode() == 0:
	case !l.serves && !s.stopping && state.ExitCode() == 1: // the database could not be reached
		tally.faults.add("start refused")
	default:
		s.run.findings.add("bank %d died unasked (%v): %s", s.number, state, strings.Join(l.trouble, " | "))
	}
	return l.serves, s.stopping
}

// kill is kill -9. It gives the bank's next life a crash point.
func (b *banks) kill(bank int, next arm) bool {
	s := b.slots[bank]
	s.mu.Lock()
	defer s.mu.Unlock()
	if next.point != "" {
		if s.next.point != "" {
			s.pending = append(s.pending, s.next)
		}
		s.next = next
	}
	return s.life != nil && s.life.kill()
}

// stop is SIGSTOP. It returns a function for SIGCONT, or nil if there is no process.
func (b *banks) stop(bank int) (resume func()) {
	l := b.slots[bank].current()
	if l == nil || process.Stop(l.cmd.Process) != nil {
		return nil
	}
	return func() { _ = process.Continue(l.cmd.Process) } // it may have been killed
}

// disarmed reports whether every crash point that a life was given has been reached. If a kill
// prevented one, it is given to another life.
func (b *banks) disarmed() bool {
	all := true
	for _, s := range b.slots {
		s.mu.Lock()
		armed := s.next.point != "" || s.life != nil && s.life.armed.point != ""
		if !armed && len(s.pending) > 0 && s.life != nil && s.run.eventsLeft.Load() == 0 {
			s.life.kill()
		}
		all = all && !armed && len(s.pending) == 0 && s.life != nil
		s.mu.Unlock()
	}
	return all
}

// awaitsResolve reports whether a bank is to die while it resolves.
func (b *banks) awaitsResolve(bank int) bool {
	l := b.slots[bank].current()
	return l != nil && l.armed.point == crashpoint.Resolving
}

// heal kills the banks that still have an armed crash point, and blocks until all serve.
func (b *banks) heal(ctx context.Context) error {
	for _, s := range b.slots {
		s.mu.Lock()
		s.next, s.pending = arm{}, nil
		if s.life != nil && s.life.armed.point != "" && s.life.kill() {
			b.run.noteFault()
		}
		s.mu.Unlock()
	}
	for _, s := range b.slots {
		if err := s.awaitServing(ctx, nil); err != nil {
			return err
		}
	}
	return nil
}

// close stops the banks in order, and kills those that do not stop in time. A second call does
// nothing.
func (b *banks) close() error {
	if b.closed {
		return nil
	}
	b.closed = true
	for _, s := range b.slots {
		s.mu.Lock()
		s.stopping = true
		if s.life != nil {
			_ = process.Terminate(s.life.cmd.Process) // it may have ended
		}
		s.mu.Unlock()
	}
	done := make(chan struct{})
	go func() {
		b.ended.Wait()
		close(done)
	}()
	var err error
	select {
	case <-done:
	case <-time.After(stopWaitMax):
		err = fmt.Errorf("banks did not stop within %v", stopWaitMax)
		for _, s := range b.slots {
			if l := s.current(); l != nil {
				l.kill()
			}
		}
		<-done
	}
	for _, s := range b.slots {
		err = errors.Join(err, s.log.Close())
	}
	return err
}
