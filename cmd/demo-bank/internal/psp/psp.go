// Package psp is a stand-in for the services that a bank calls: a card processor, a bank rail and a
// mail service. It keeps its actions in a file that survives its own kill -9, and misbehaves on
// request.
//
//   - [Server.Run] is the program
//   - handler.go has the routes, and the place where each fault happens
//   - ledger.go decides the outcome of a request under its key
//   - order.go has the four requests with their items
//   - journal.go is the file
package psp

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/port"
)

// Defaults of [Config], and limits of the server.
const (
	AddrDefault            = "127.0.0.1:8090"
	EntriesMaxDefault      = 500_000
	ShutdownTimeoutDefault = 10 * time.Second

	readHeaderTimeout = 5 * time.Second
	readTimeout       = 15 * time.Second // for a whole request, including its body
	answerTimeout     = 30 * time.Second // for the client to read its answer
	idleTimeout       = 2 * time.Minute
	headerBytesMax    = 64 << 10
)

// Config configures a processor. The zero value of each field is its default.
type Config struct {
	// Addr is the address to listen on. Defaults to 127.0.0.1:8090.
	Addr string

	// File keeps the actions of the processor, its faults, and the id of its instance. If it is
	// empty, they are in memory and gone at exit.
	File string

	// EntriesMax is the maximum number of items and refusals that are kept. Further requests get
	// 507. Defaults to 500,000.
	EntriesMax int

	// ShutdownTimeout is the maximum time that a stopping processor waits for requests in progress.
	// Defaults to 10 seconds.
	ShutdownTimeout time.Duration

	// Stdout gets the URL and commands to try, once. Nil discards the output.
	Stdout io.Writer

	// Logger is for the operator. Nil logs nothing.
	Logger *slog.Logger

	now func() time.Time // the time of keys and items; tests move it
}

// Server is one processor. Create it with [New] and run it once.
type Server struct {
	config  Config
	logger  *slog.Logger
	serving chan struct{}
	url     string
	ledger  *ledger
}

// New returns a processor that does nothing until [Server.Run].
func New(config Config) *Server {
	c := &config
	c.Addr = cmp.Or(c.Addr, AddrDefault)
	c.EntriesMax = cmp.Or(max(c.EntriesMax, 0), EntriesMaxDefault)
	c.ShutdownTimeout = cmp.Or(max(c.ShutdownTimeout, 0), ShutdownTimeoutDefault)
	c.Stdout = cmp.Or(c.Stdout, io.Discard)
	if c.now == nil {
		c.now = time.Now
	}
	return &Server{
		config: config, serving: make(chan struct{}),
		logger: cmp.Or(c.Logger, slog.New(slog.DiscardHandler)),
	}
}

// Serving returns a channel that is closed when the processor answers requests.
func (s *Server) Serving() <-chan struct{} { return s.serving }

// URL returns the processor's URL. It is valid after Serving is closed.
func (s *Server) URL() string { return s.url }

// Instance returns the id of the processor's instance, which its file keeps. It is valid after
// Serving is closed.
func (s *Server) Instance() string { return s.ledger.instance }

// Run serves until ctx ends. Then it refuses new connections, finishes the requests in progress and
// returns nil. Requests that are late leave nothing, as after a kill. Otherwise it returns an error
// of one line that names the remedy.
func (s *Server) Run(ctx context.Context) (err error) {
	// The port comes first: if it is taken, the file is not touched.
	listener, err := port.Listen(ctx, s.config.Addr)
	if err != nil {
		return err
	}
	defer func() { _ = listener.Close() }() // a no-op after serve, which closes it
	ledger, err := openLedger(&s.config)
	if err != nil {
		return openError(s.config.File, err)
	}
	processor := newProcessor(ledger, s.logger)
	defer func() { err = errors.Join(err, processor.close()) }()
	return s.serve(ctx, listener, processor)
}

func openError(file string, err error) error {
	switch {
	case errors.Is(err, ErrFileInUse):
		return fmt.Errorf("the file %s is held by a processor that is running: stop that one, or choose another with --file", file)
	case errors.Is(err, ErrFileFormat):
		return fmt.Errorf("the file %s can't be used: %w: choose another with --file; it was not changed", file, err)
	}
	return fmt.Errorf("can't open the file: %w: choose another with --file", err)
}

// serve answers requests until ctx ends, or the listener or the file fails, and then drains.
func (s *Server) serve(ctx context.Context, listener net.Listener, p *processor) error {
	server := &http.Server{
		Handler:           p.handler(),
		ReadHeaderTimeout: readHeaderTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      readTimeout + DelayMax + answerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    headerBytesMax,
		ErrorLog:          slog.NewLogLogger(s.logger.Handler(), slog.LevelWarn),
	}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	s.url, s.ledger = port.URL(listener.Addr()), p.ledger
	s.greet()
	close(s.serving)

	var reason error
	select {
	case <-ctx.Done():
		s.logger.InfoContext(ctx, "stopping: requests in progress are finished, new ones refused")
	case <-p.ledger.journal.failed:
		reason = fmt.Errorf("the file %s can't be written: %w: make room and start again", s.config.File, p.ledger.journal.reason())
	case err := <-failed:
		reason = fmt.Errorf("serve: %w", err)
		failed <- nil
	}
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.config.ShutdownTimeout)
	defer cancel()
	if err := server.Shutdown(drain); err != nil {
		_ = server.Close()
		if reason == nil {
			reason = fmt.Errorf("stop: requests were still in progress after %v", s.config.ShutdownTimeout)
		}
	}
	<-failed
	return reason
}

// greet prints the processor's URL and commands to try.
func (s *Server) greet() {
	where := "in memory, gone at exit"
	if s.config.File != "" {
		where = "kept in " + s.config.File
	}
	_, _ = fmt.Fprintf(s.config.Stdout, `demo-bank psp is at %[1]s (instance %[2]s, %[3]s)

Charge a card, twice with one key: one charge
  curl -i %[1]s/charges -H 'Idempotency-Key: try-1' -d '{"card":"tok_visa","amount":1250,"reference":"order 1"}'

Lose half of the replies, and be good again
  curl -i -X PUT %[1]s/faults -d '{"lose_reply":0.5}'
  curl -i -X PUT %[1]s/faults -d '{}'
`, s.url, s.ledger.instance, where) // a closed stdout is no reason not to serve
}
