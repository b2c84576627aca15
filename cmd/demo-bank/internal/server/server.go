// Package server is the whole bank as a program: a listener, a database, the books, the middleware in front of them,
// and an orderly end. [Server.Run] is the program; a test runs it as main does.
package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/live"
	"github.com/paidonce/idempotency/internal/nodeid"
	"github.com/paidonce/idempotency/storage/postgres"
)

// Defaults of [Config], and limits of the server.
const (
	AddrDefault            = "127.0.0.1:8080"
	PoolSizeDefault        = 40 // two banks fit a PostgreSQL with its 100 connections
	AcquireTimeoutDefault  = 3 * time.Second
	ShutdownTimeoutDefault = 30 * time.Second

	readHeaderTimeout = 5 * time.Second
	readTimeout       = 15 * time.Second // a body that takes longer is given up
	answerTimeout     = 5 * time.Second  // for the client to take its answer
	idleTimeout       = 2 * time.Minute
	headerBytesMax    = 64 << 10
	closeTimeout      = time.Second // for connections that are left when all requests are answered
)

// Config says where the bank listens and where its books are. The zero value of each field is its default.
type Config struct {
	// Addr is the address to listen on. The default is [AddrDefault].
	Addr string

	// DatabaseURL is the PostgreSQL that holds the books. Empty: an embedded one.
	DatabaseURL string

	// DataDir keeps the embedded PostgreSQL's data from one run to the next. Empty: a temporary folder, removed at exit.
	DataDir string

	// PoolSize is how many connections the bank uses at most, beside one for the lease of its node number. The default
	// is [PoolSizeDefault].
	PoolSize int

	// ShutdownTimeout bounds the wait for requests in flight when the bank is told to stop. The default is
	// [ShutdownTimeoutDefault].
	ShutdownTimeout time.Duration

	// TTL is how long records count: at least idempotency.TTLMin. Defaults to 24 hours.
	TTL time.Duration

	// ReapInterval is how long the reaper of expired records rests. Defaults to 1 minute.
	ReapInterval time.Duration

	// HandlerTimeout bounds the claim and the handler of a request together, up to [HandlerTimeoutMax].
	// Defaults to 10 seconds.
	HandlerTimeout time.Duration

	// Wait is how long a request waits for another with its key that is in progress, before it is answered 409: at most
	// idempotency.WaitMax, and shorter than TTL. The default, zero, is 409 at once.
	Wait time.Duration

	// AcquireTimeout is how long a request waits for a connection. A bank that people try on a busy laptop may rather be
	// slow than shed: the default, [AcquireTimeoutDefault], is longer than a service under real load should have.
	AcquireTimeout time.Duration

	// CrashPoint kills the process at a point of its own choice. Nil: nothing of it is installed.
	CrashPoint *CrashPoint

	// Stdout is told the URL and what to try, once. Stderr gets the embedded PostgreSQL's progress. Nil: nobody.
	Stdout, Stderr io.Writer

	// Logger is for the operator. Nil logs nothing.
	Logger *slog.Logger

	withoutMiddleware bool // tests show what happens then
}

// Server is one bank. Make it with [New], run it once.
type Server struct {
	config  Config
	logger  *slog.Logger
	metrics *metrics
	gate    *gate
	serving chan struct{}
	url     string
}

// New returns a bank that does nothing until [Server.Run].
func New(config Config) *Server {
	s := &Server{config: config, metrics: newMetrics(config.HandlerTimeout), gate: newGate(), serving: make(chan struct{})}
	c := &s.config
	c.Addr = cmp.Or(c.Addr, AddrDefault)
	c.PoolSize = cmp.Or(max(c.PoolSize, 0), PoolSizeDefault)
	c.ShutdownTimeout = cmp.Or(max(c.ShutdownTimeout, 0), ShutdownTimeoutDefault)
	c.TTL = cmp.Or(c.TTL, 24*time.Hour)
	c.HandlerTimeout = cmp.Or(c.HandlerTimeout, 10*time.Second)
	c.AcquireTimeout = cmp.Or(c.AcquireTimeout, AcquireTimeoutDefault)
	c.Stdout = cmp.Or(c.Stdout, io.Discard)
	c.Stderr = cmp.Or(c.Stderr, io.Discard)
	s.logger = cmp.Or(c.Logger, slog.New(slog.DiscardHandler))
	return s
}

// Serving is closed when requests are answered.
func (s *Server) Serving() <-chan struct{} { return s.serving }

// URL is where the bank listens. It is known once Serving is closed.
func (s *Server) URL() string { return s.url }

// ErrDatabaseGone means that the embedded PostgreSQL ended while the bank was serving.
var ErrDatabaseGone = errors.New("the embedded PostgreSQL has ended")

// Run serves until ctx ends, then stops in order: no new connections, new requests refused, those in flight finished,
// the database stopped. It returns nil after that, and otherwise an error of one line that names the remedy.
func (s *Server) Run(ctx context.Context) (err error) {
	// The port comes first: where it is taken nothing else was started.
	listener, err := listen(ctx, s.config.Addr)
	if err != nil {
		return err
	}
	defer func() { _ = listener.Close() }() // closed long since, but where the start failed

	db, err := openDatabase(ctx, &s.config)
	if err != nil {
		return endOfStart(ctx, err)
	}
	defer func() { err = errors.Join(err, db.stop()) }()
	store, err := db.openStore(ctx, &s.config)
	if err != nil {
		return endOfStart(ctx, err)
	}
	defer store.Close()
	pool := store.Pool()
	s.metrics.observe(store)
	ids, err := nodeid.Open(ctx, pool.Config().ConnConfig, s.logger)
	if err != nil {
		return endOfStart(ctx, err)
	}

	// What runs beside the requests ends after them.
	background, endBackground := context.WithCancel(context.WithoutCancel(ctx))
	var group sync.WaitGroup
	defer group.Wait()
	defer endBackground()
	group.Go(func() { ids.Run(background) })
	group.Go(func() { s.reaper(store).Run(background) })

	books := bank.New(pool, ids, s.config.TTL, s.logger)
	page := live.New(pool, urlOf(listener.Addr()), s.config.TTL, s.logger)
	books.OnTransfer(page.OnTransfer)
	group.Go(func() { page.Run(background) })
	return s.serve(ctx, listener, s.handler(store, books, ids, page), page.Stop, db)
}

// writeTimeout is what net/http gives a request from its headers to the end of its answer: more than all that happens in
// between together, so that an answer which is settled is not kept from a client that waits for it.
func writeTimeout(wait, handlerTimeout time.Duration) time.Duration {
	return readTimeout + wait + handlerTimeout + 2*time.Second + // ROLLBACK, COMMIT and the look for it take as long at most
		5*time.Second + 8*time.Second + answerTimeout
}

// endOfStart tells a start that failed from one that was told to stop.
func endOfStart(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func listen(ctx context.Context, addr string) (net.Listener, error) {
	var config net.ListenConfig
	listener, err := config.Listen(ctx, "tcp", addr)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("the address %s is taken: stop the program that listens there, or choose another with --addr (127.0.0.1:0 takes any free port)", addr)
	case err != nil:
		return nil, fmt.Errorf("can't listen on %s: %w: choose another address with --addr", addr, err)
	}
	return listener, nil
}

// httpServer answers through handler as long as the gate is open.
func (s *Server) httpServer(handler http.Handler) *http.Server {
	return &http.Server{
		Handler:           s.gate.handler(handler),
		ConnState:         s.gate.connState,
		ReadHeaderTimeout: readHeaderTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout(s.config.Wait, s.config.HandlerTimeout),
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    headerBytesMax,
		ErrorLog:          slog.NewLogLogger(s.logger.Handler(), slog.LevelWarn),
	}
}

// serve answers requests until ctx ends or something the bank can't do without does, and then drains. stopping is called
// before, and ends what would go on for ever.
func (s *Server) serve(ctx context.Context, listener net.Listener, handler http.Handler, stopping func(), db *database) error {
	server := s.httpServer(handler)
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	s.url = urlOf(listener.Addr())
	s.greet(db)
	close(s.serving)

	var reason error
	select {
	case <-ctx.Done():
		s.logger.InfoContext(ctx, "stopping: requests in flight are finished, new ones refused")
	case <-db.done():
		reason = fmt.Errorf("%w: its log is postgres.log in the data folder; start the bank again", ErrDatabaseGone)
	case err := <-failed:
		reason = fmt.Errorf("serve: %w", err)
		failed <- nil
	}

	// Shutdown would cut idle keep-alive connections at once, and with them requests that are on their way. So the
	// gate closes first, and answers those. Who finds no listener any more finds a closed gate too.
	s.gate.close()
	stopping()
	_ = listener.Close() // which ends Serve
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.config.ShutdownTimeout)
	defer cancel()
	if err := s.gate.drain(drain); err != nil && reason == nil {
		reason = fmt.Errorf("stop: requests were still in flight after %v", s.config.ShutdownTimeout)
	}
	<-failed
	rest, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
	defer cancel()
	if err := server.Shutdown(rest); err != nil {
		_ = server.Close() // only connections without a request are left
	}
	return reason
}

// reaper deletes expired records and says so.
func (s *Server) reaper(store *postgres.Store) *postgres.Reaper {
	return postgres.NewReaper(store, &postgres.ReaperOptions{
		Interval: s.config.ReapInterval,
		OnWalk: func(deleted int64, duration time.Duration, err error) {
			s.metrics.OnWalk(deleted, duration, err)
			if err != nil {
				s.logger.Warn("expired records were not deleted; the next walk tries again", "error", err)
			} else if deleted > 0 {
				s.logger.Info("expired records deleted", "records", deleted, "duration", duration)
			}
		},
	})
}

// urlOf is where a listener can be reached from this machine.
func urlOf(addr net.Addr) string {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return "http://" + addr.String()
	}
	host := tcp.IP.String()
	if tcp.IP.IsUnspecified() {
		host = "127.0.0.1"
	}
	return "http://" + net.JoinHostPort(host, strconv.Itoa(tcp.Port))
}
