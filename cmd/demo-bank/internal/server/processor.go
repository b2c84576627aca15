package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/live"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/psp"
)

const (
	// pspFile is the inside processor's file in the data folder.
	pspFile = "processor.jsonl"
	// pspStopTimeout limits the stop of the inside processor. By then no call waits for its answer.
	pspStopTimeout = 100 * time.Millisecond
)

// openProcessor returns the configured processor, or starts one inside. stop closes its
// connections, and ends the one inside.
func (s *Server) openProcessor(ctx context.Context, watch *live.Live) (processor *bank.Processor, stop func(), err error) {
	s.psp, stop = s.config.PSP, func() {}
	if s.psp == "" {
		if s.psp, stop, err = s.startProcessor(ctx); err != nil {
			return nil, nil, err
		}
	}
	transport := s.config.CrashPoint.transport()
	if transport == nil {
		transport = bank.NewTransport()
	}
	processor, err = bank.NewProcessor(bank.ProcessorOptions{
		URL: s.psp, KeyLifetime: s.config.KeyLifetime, Transport: watch.Wire(transport),
	})
	if err != nil {
		stop()
		return nil, nil, fmt.Errorf("the URL of the processor can't be used: %w: mend --psp, or leave it out for one inside", err)
	}
	end := stop
	return processor, func() { processor.Close(); end() }, nil
}

// startProcessor starts a processor inside, and returns its URL.
func (s *Server) startProcessor(ctx context.Context) (url string, stop func(), err error) {
	config := psp.Config{Addr: "127.0.0.1:0", ShutdownTimeout: pspStopTimeout}
	if dir := s.config.DataDir; dir != "" {
		if err := os.MkdirAll(dir, 0o755); err != nil { // it exists unless --database-url is given
			return "", nil, fmt.Errorf("can't make the data folder: %w: choose another with --data-dir", err)
		}
		config.File = filepath.Join(dir, pspFile)
	}
	inside := psp.New(config)
	// It ends when stop is called, not with ctx: the bank finishes its calls before that.
	running, end := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan error, 1)
	var group sync.WaitGroup
	group.Go(func() {
		err := inside.Run(running)
		if err != nil && running.Err() == nil {
			s.logger.Error("the processor inside has ended, and calls fail until the bank is started again", "error", err)
		}
		ended <- err
	})
	stop = func() {
		end()
		group.Wait()
	}
	select {
	case <-inside.Serving():
		return inside.URL(), stop, nil
	case err := <-ended:
		stop()
		return "", nil, fmt.Errorf("the processor inside can't start: %w", errors.Join(err, ctx.Err()))
	case <-ctx.Done():
		stop()
		return "", nil, ctx.Err()
	}
}

// wherePSP describes for people where the processor is.
func (s *Server) wherePSP() string {
	switch {
	case s.config.PSP != "":
		return "as configured"
	case s.config.DataDir != "":
		return "inside, kept in " + filepath.Join(s.config.DataDir, pspFile)
	}
	return "inside, in memory"
}
