// Package server is the whole bank as a program: a listener, a database, the books, the middleware,
// and an orderly shutdown. [Server.Run] is the program. Tests run it the way main does.
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
	"sync"
	"time"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/live"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/port"
	"github.com/paidonce/idempotency/internal/nodeid"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/postgres"
)

// Defaults of [Config], and limits of the server.
const (
	AddrDefault            = "127.0.0.1:8080"
	PoolSizeDefault        = 40 // two banks fit into PostgreSQL's default of 100 connections
	AcquireTimeoutDefault  = 3 * time.Second
	ShutdownTimeoutDefault = 30 * time.Second

	readHeaderTimeout = 5 * time.Second
	readTimeout       = 15 * time.Second // for a whole request, including its body
	answerTimeout     = 5 * time.Second  // for the client to read its answer
	idleTimeout       = 2 * time.Minute
	headerBytesMax    = 64 << 10
	closeTimeout      = time.Second // for idle connections after the last answer

	// readyGrace is the maximum time for which the background work waits for the first probe that
	// finds the bank ready.
	readyGrace = 250 * time.Millisecond
)

// Config configures the bank. The zero value of each field is its default.
type Config struct {
	// Addr is the address to listen on. Defaults to 127.0.0.1:8080.
	Addr string

	// DatabaseURL is the PostgreSQL that holds the books. If it is empty, Run starts an embedded
	// one.
	DatabaseURL string

	// DataDir is the folder that keeps the embedded PostgreSQL's data between runs. If it is empty,
	// Run uses a temporary folder and removes it at exit.
	DataDir string

	// PoolSize is the maximum number of connections in the pool. The lease of the bank's node
	// number takes one more. Defaults to 40.
	PoolSize int

	// ShutdownTimeout is the maximum time that a stopping bank waits for requests in progress.
	// Defaults to 30 seconds.
	ShutdownTimeout time.Duration

	// TTL is the lifetime of records, at least idempotency.TTLMin. Defaults to 24 hours.
	TTL time.Duration

	// ReapInterval is the pause between two walks of the reaper of expired records. Defaults to 1
	// minute.
	ReapInterval time.Duration

	// HandlerTimeout limits the claim and the handler of a request together. It is at most
	// [HandlerTimeoutMax]. Defaults to 10 seconds.
	HandlerTimeout time.Duration

	// Wait is the maximum time that a request waits for another request in progress with the same
	// key, before it gets a 409. It is at most idempotency.WaitMax and less than TTL. Defaults to
	// 0, a 409 at once.
	Wait time.Duration

	// AcquireTimeout is the maximum time that a request waits for a connection. Defaults to 3
	// seconds, which is longer than a service under real load should have: on a busy laptop, a slow
	// demo is better than a refusal.
	AcquireTimeout time.Duration

	// PSP is the URL of the processor that the bank calls. If it is empty, Run starts one inside,
	// on a loopback port. That one keeps its state in a file in DataDir, or in memory without a
	// DataDir.
	PSP string

	// KeyLifetime is the time for which the processor surely knows a key: nothing is sent again
	// after nine tenths of it. It must be at least bank.KeyLifetimeMin. Defaults to 24 hours.
	KeyLifetime time.Duration

	// Brokers are some brokers of the Kafka cluster that gets the bank's messages, host:port of
	// each. If it is empty, Run starts a broker inside, on a loopback port, which keeps its log in
	// DataDir, or in memory if there is no DataDir.
	Brokers []string

	// NoRelay leaves messages in the outbox, for a relay of another process.
	NoRelay bool

	// NoConsumers leaves messages at the broker, for consumers of another process.
	NoConsumers bool

	// CrashPoint kills the process at a chosen point. If it is nil, nothing is installed.
	CrashPoint *CrashPoint

	// Stdout gets the URL and commands to try, once. Stderr gets the embedded PostgreSQL's
	// progress. Nil discards the output.
	Stdout, Stderr io.Writer

	// Logger is for the operator. Nil logs nothing.
	Logger *slog.Logger

	withoutMiddleware bool // tests show the consequences
}

// Server is one bank. Create it with [New] and run it once.
type Server struct {
	config  Config
	logger  *slog.Logger
	metrics *metrics
	gate    *gate
	serving chan struct{}
	ready   chan struct{} // closed by the first probe that finds the bank ready
	probed  func()        // closes ready
	url     string
	psp     string   // URL of the processor
	brokers []string // host:port of each
}

// New returns a bank that does nothing until [Server.Run].
func New(config Config) *Server {
	s := &Server{config: config, metrics: newMetrics(config.HandlerTimeout), gate: newGate(), serving: make(chan struct{}), ready: make(chan struct{})}
	s.probed = sync.OnceFunc(func() { close(s.ready) })
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

// Serving returns a channel that is closed when the bank answers requests.
func (s *Server) Serving() <-chan struct{} { return s.serving }

// URL returns the bank's URL. It is valid after Serving is closed.
func (s *Server) URL() string { return s.url }

// ErrDatabaseGone means that the embedded PostgreSQL ended while the bank was serving.
var ErrDatabaseGone = errors.New("the embedded PostgreSQL has ended")

// Run serves until ctx ends. Then it shuts down in order: it stops accepting connections, refuses
// new requests, finishes those in progress and stops the database. It returns nil after that, and
// otherwise an error of one line that names the remedy.
func (s *Server) Run(ctx context.Context) (err error) {
	// The port comes first: if it is taken, nothing else has been started.
	listener, err := port.Listen(ctx, s.config.Addr)
	if err != nil {
		return err
	}
	defer func() { _ = listener.Close() }() // a no-op after serve, which closes it

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

	page := live.New(pool, port.URL(listener.Addr()), s.config.TTL, s.logger)
	processor, stopProcessor, err := s.openProcessor(ctx, page)
	if err != nil {
		return endOfStart(ctx, err)
	}
	defer stopProcessor() // after everything that calls it

	books := bank.New(pool, ids, s.config.TTL, s.logger)
	broker, err := s.openBroker(ctx, store, books)
	if err != nil {
		return endOfStart(ctx, err)
	}
	defer broker.Close() // after everything that uses it
	if err := s.leaveAddresses(ctx, books); err != nil {
		return endOfStart(ctx, err)
	}

	// The background work ends after the requests.
	background, endBackground := context.WithCancel(context.WithoutCancel(ctx))
	var group sync.WaitGroup
	defer group.Wait()
	defer endBackground()
	group.Go(func() { ids.Run(background) })

	books.OnTransfer(page.OnTransfer)
	page.WithoutEffects(books.TopUpWithoutEffects)
	if broker.Inside() {
		page.Consumers(live.Consumers{
			DatabaseURL: db.url, Broker: broker, Books: books,
			Open: func(ctx context.Context) (*postgres.Store, error) { return makeShown(ctx, db.url) },
		})
	}
	books.Call(processor)
	feed, err := s.feed(ctx, db, store, books, broker, processor)
	if err != nil {
		return endOfStart(ctx, err)
	}
	secret, err := books.OperationsSecret(ctx)
	if err != nil {
		return endOfStart(ctx, err)
	}
	idem := s.idempotency(store, page)
	handler := s.handler(idem, middleware.NewStatus(bank.OperationsPath, secret), store, books, ids, page)
	completing, stopCompleter := context.WithCancel(background)
	defer stopCompleter()
	completer := idem.Completer(nil)
	// All this may start after the bank is ready. Started before, it would delay that.
	group.Go(func() {
		s.awaitReady(background)
		for _, run := range append(feed,
			s.reaper(store).Run,
			page.Run,
			func(context.Context) { completer.Run(s.config.CrashPoint.completing(completing)) },
		) {
			group.Go(func() { run(background) })
		}
	})
	stopping := func() {
		page.Stop()
		stopCompleter() // requests that it runs are finished
	}
	return s.serve(ctx, listener, handler, stopping, db)
}

// awaitReady blocks until a probe has found the bank ready, the bank has served for readyGrace, or
// ctx ends.
func (s *Server) awaitReady(ctx context.Context) {
	select {
	case <-s.serving:
	case <-ctx.Done():
		return
	}
	select {
	case <-s.ready:
	case <-time.After(readyGrace):
	case <-ctx.Done():
	}
}

// writeTimeout returns the time that net/http gives a request from its headers to the end of its
// answer. It exceeds the sum of all steps in between, so that a client that waits gets an answer
// that is already settled.
func writeTimeout(wait, handlerTimeout time.Duration) time.Duration {
	// ROLLBACK, COMMIT and the look-up of a lost COMMIT take at most this long.
	return readTimeout + wait + handlerTimeout + 2*time.Second +
		5*time.Second + 8*time.Second + answerTimeout
}

// endOfStart returns nil if the start failed because ctx ended, and err otherwise.
func endOfStart(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// httpServer returns the HTTP server, which answers through handler while the gate is open.
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

// serve answers requests until ctx ends, or the listener or the embedded PostgreSQL fails, and then
// drains. It calls stopping before it drains, to end work that would never finish.
func (s *Server) serve(ctx context.Context, listener net.Listener, handler http.Handler, stopping func(), db *database) error {
	server := s.httpServer(handler)
	failed := make(chan error, 1)
	s.url = port.URL(listener.Addr())
	s.greet(db) // before the first answer, so that all lines are out when the bank is ready
	go func() { failed <- server.Serve(listener) }()
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

	// Shutdown would cut idle keep-alive connections at once, and with them requests on their way.
	// So the gate closes first, and refuses those. It closes before the listener, so a client that
	// finds no listener also finds a closed gate.
	s.gate.close()
	stopping()
	_ = listener.Close() // ends Serve
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.config.ShutdownTimeout)
	defer cancel()
	if err := s.gate.drain(drain); err != nil && reason == nil {
		reason = fmt.Errorf("stop: requests were still in flight after %v", s.config.ShutdownTimeout)
	}
	<-failed
	rest, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
	defer cancel()
	if err := server.Shutdown(rest); err != nil {
		_ = server.Close() // the connections left have no request
	}
	return reason
}

// reaper returns the reaper, which deletes expired records and logs that.
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
