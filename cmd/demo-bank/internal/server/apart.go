package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/events"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/port"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

// ApartPoolSize is the size of the connection pool of a process beside the bank: of its consumers,
// or of its relay.
const ApartPoolSize = 6

// ApartConfig configures a process of the bank's consumers, or of its relay.
type ApartConfig struct {
	// DatabaseURL is the bank's PostgreSQL. It is required.
	DatabaseURL string

	// Brokers are some brokers of the Kafka cluster, host:port of each. Defaults to those that the
	// bank left in its database.
	Brokers []string

	// PSP is the URL of the processor that sends mails. Defaults to the one that the bank left in
	// its database. A relay needs none.
	PSP string

	// NoInbox makes the consumers naive: first the effect, then the commit of the offset at the
	// broker.
	NoInbox bool

	// Addr is the address on which consumers answer probes and scrapes. Consumers require it; a
	// relay needs none.
	Addr string

	// Stdout gets one line when the process has started. Nil discards it.
	Stdout io.Writer

	// Logger is for the operator. Nil logs nothing.
	Logger *slog.Logger
}

// apart has what a process beside the bank needs: its store, the books and the broker.
type apart struct {
	config ApartConfig
	logger *slog.Logger
	store  *postgres.Store
	books  *bank.Bank
	broker *events.Broker
}

func openApart(ctx context.Context, config ApartConfig) (a *apart, err error) {
	if config.DatabaseURL == "" {
		return nil, errors.New("no database is named: pass the bank's with --database-url (DATABASE_URL)")
	}
	s := New(Config{DatabaseURL: config.DatabaseURL, PoolSize: ApartPoolSize, Stdout: config.Stdout, Logger: config.Logger})
	db := &database{url: config.DatabaseURL}
	a = &apart{config: config, logger: s.logger}
	a.config.Stdout = s.config.Stdout
	if a.store, err = db.openStore(ctx, &s.config); err != nil {
		return nil, err
	}
	a.books = bank.New(a.store.Pool(), nil, s.config.TTL, s.logger) // it makes no ids
	brokers := config.Brokers
	if len(brokers) == 0 {
		var left string
		if left, err = a.books.Address(ctx, bank.BrokersAddress); err == nil && left == "" {
			err = errors.New("no bank has left the address of its broker in the database: start the bank first, or pass --brokers")
		}
		brokers = strings.Split(left, ",")
	}
	if err == nil {
		a.broker, err = events.Connect(brokers, events.Instance(config.Addr), s.logger)
	}
	if err != nil {
		a.store.Close()
		return nil, err
	}
	return a, nil
}

func (a *apart) close() {
	a.broker.Close()
	a.store.Close()
}

func (a *apart) say(format string, args ...any) {
	_, _ = fmt.Fprintf(a.config.Stdout, format+"\n", args...) // a closed stdout is no reason not to work
}

// Relay publishes the messages of the bank's outbox until ctx ends.
func Relay(ctx context.Context, config ApartConfig) error {
	a, err := openApart(ctx, config)
	if err != nil {
		return endOfStart(ctx, err)
	}
	defer a.close()
	a.say("demo-bank relay publishes to Kafka %s", strings.Join(a.broker.Addresses(), ","))
	events.Relay(ctx, a.broker, a.store, nil, a.logger)
	return nil
}

// Consume runs the bank's consumers until ctx ends, or an operator must decide where to go on.
func Consume(ctx context.Context, config ApartConfig) error {
	listener, err := port.Listen(ctx, config.Addr)
	if err != nil {
		return err
	}
	defer func() { _ = listener.Close() }() // a no-op after the server's end
	a, err := openApart(ctx, config)
	if err != nil {
		return endOfStart(ctx, err)
	}
	defer a.close()
	mailer := events.Found(a.books)
	if config.PSP != "" {
		processor, err := bank.NewProcessor(bank.ProcessorOptions{URL: config.PSP})
		if err != nil {
			return fmt.Errorf("the URL of the processor can't be used: %w: mend --psp", err)
		}
		defer processor.Close()
		mailer = func(context.Context) (*bank.Processor, error) { return processor, nil }
	}

	r := chi.NewRouter()
	r.Get("/healthz", func(w http.ResponseWriter, _ *http.Request) { alive(w) })
	r.Get("/readyz", a.ready)
	metrics := newMetrics(0)
	metrics.observe(a.store)
	r.Get("/metrics", metrics.handler().ServeHTTP)
	probes := &http.Server{Handler: r, ReadHeaderTimeout: readHeaderTimeout, ReadTimeout: readTimeout, MaxHeaderBytes: headerBytesMax}
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	go func() { end(probes.Serve(listener)) }()
	defer func() { _ = probes.Close() }()

	consumers := &events.Consumers{Broker: a.broker, Store: a.store, Books: a.books, Mailer: mailer, OnBatch: metrics.messages.OnBatch, Logger: a.logger}
	run, how := consumers.Run, "with an inbox"
	if config.NoInbox {
		run, how = consumers.RunNaive, "without an inbox"
	}
	a.say("demo-bank consume reads Kafka %s %s, and answers probes at %s", strings.Join(a.broker.Addresses(), ","), how, port.URL(listener.Addr()))
	return run(ctx)
}

func (a *apart) ready(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), readyTimeout)
	defer cancel()
	if err := errors.Join(a.store.Check(ctx), a.books.Check(ctx)); err != nil {
		a.logger.WarnContext(ctx, "not ready", "error", err)
		bank.WriteProblem(w, &bank.Problem{
			Status: http.StatusServiceUnavailable, Slug: "not-ready", Title: "Not ready",
			Detail: "The database does not answer, or its schema is not current.",
		})
		return
	}
	alive(w)
}

// ShownConfig configures a process of the consumers that the page shows.
type ShownConfig struct {
	DatabaseURL string
	Brokers     []string
	NoInbox     bool   // see ApartConfig
	Instance    string // of the process among those of its consumer, the same after a crash
	Logger      *slog.Logger
}

// ConsumeShown runs a consumer for the page until ctx ends. The bank must have made its tables.
func ConsumeShown(ctx context.Context, config ShownConfig) error {
	store, err := openShown(ctx, config.DatabaseURL, events.ShownName(!config.NoInbox, config.Instance), ShownPoolSize)
	if err != nil {
		return endOfStart(ctx, err)
	}
	defer store.Close()
	broker, err := events.Connect(config.Brokers, config.Instance, config.Logger)
	if err != nil {
		return err
	}
	defer broker.Close()
	shown := &events.Shown{Broker: broker, Store: store, Logger: config.Logger}
	if config.NoInbox {
		return shown.RunNaive(ctx)
	}
	return shown.Run(ctx)
}

// ShownPoolSize is the size of the connection pool of a consumer that the page shows.
const ShownPoolSize = 4

// openShown opens a store of the consumers that the page shows.
func openShown(ctx context.Context, url, name string, poolSize int) (*postgres.Store, error) {
	options := storeOptions(&Config{DatabaseURL: url, AcquireTimeout: AcquireTimeoutDefault})
	options.Schema, options.IdleInTransactionTimeout = events.ShownSchema, shownIdleMax
	options.PoolConfig = func(pool *pgxpool.Config) {
		findSchema(pool)
		pool.ConnConfig.RuntimeParams["application_name"] = name
		pool.MaxConns = int32(poolSize)
	}
	store, err := postgres.Open(ctx, url, options)
	if err != nil {
		return nil, fmt.Errorf("open the database of the consumers: %w", err)
	}
	return store, nil
}

// shownIdleMax is the time after which PostgreSQL ends the session of a consumer that the page has
// paused, and so frees its partition. It is longer than a batch may take.
const shownIdleMax = 10 * time.Second

// makeShown opens the page's store of the shown consumers, and makes their tables.
func makeShown(ctx context.Context, url string) (*postgres.Store, error) {
	store, err := openShown(ctx, url, "demo-bank page", shownOperatorPoolSize)
	if err != nil {
		return nil, err
	}
	if err = migrations.Up(ctx, store, nil); err == nil {
		err = events.MakeShown(ctx, store)
	}
	if err != nil {
		store.Close()
		return nil, err
	}
	return store, nil
}

const shownOperatorPoolSize = 2

// ConsumeAddrDefault is the address on which consumers answer probes.
const ConsumeAddrDefault = "127.0.0.1:8081"
