package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/live"
	"github.com/paidonce/idempotency/internal/pgserver"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

// Limits of [Config] and of flags. The store requires 5 seconds between the longest handler and
// idle_in_transaction_session_timeout.
const (
	HandlerTimeoutMin = 10 * time.Millisecond
	HandlerTimeoutMax = idleInTransactionMax - 5*time.Second
	AcquireTimeoutMin = time.Millisecond
	ReapIntervalMin   = time.Millisecond
)

const (
	connectTimeout = 5 * time.Second

	// connectionsBeside is the number of connections outside the pool: the lease, migrations,
	// PostgreSQL's reserved ones, one or two for psql, eight processes of consumers and relays, and
	// those that the page shows.
	connectionsBeside = 16 + 8*ApartPoolSize + live.ConsumersShown*ShownPoolSize + shownOperatorPoolSize

	// A transaction may be idle for as long as its handler may run, plus idleBeside. But a dead
	// bank must not hold a key for a minute.
	idleBeside           = 10 * time.Second
	idleInTransactionMin = 6 * time.Second
	idleInTransactionMax = postgres.IdleInTransactionTimeoutMax - time.Second
)

// storeOptions returns the options of the store.
func storeOptions(config *Config) *postgres.Options {
	return &postgres.Options{
		Schema: bank.Schema, AcquireTimeout: config.AcquireTimeout, LockTimeout: lockTimeout(config.DatabaseURL),
		IdleInTransactionTimeout: min(max(config.HandlerTimeout+idleBeside, idleInTransactionMin), idleInTransactionMax),
	}
}

// lockTimeout returns the lock_timeout of a database URL, in which it is a number of milliseconds.
// It returns zero, the store's default, if the URL has none. The store refuses a pool with another
// lock_timeout than its own.
func lockTimeout(url string) time.Duration {
	config, err := pgxpool.ParseConfig(url)
	if err != nil {
		return 0 // the store reports the error
	}
	ms, err := strconv.Atoi(config.ConnConfig.RuntimeParams["lock_timeout"])
	if err != nil {
		return 0
	}
	return time.Duration(ms) * time.Millisecond
}

// findSchema sets the search_path of a pool's connections to the bank's tables.
func findSchema(pool *pgxpool.Config) {
	pool.ConnConfig.ConnectTimeout = cmp.Or(pool.ConnConfig.ConnectTimeout, connectTimeout)
	pool.ConnConfig.RuntimeParams["search_path"] = bank.Schema
}

func configurePool(pool *pgxpool.Config, config *Config) {
	findSchema(pool)
	pool.MaxConns = int32(config.PoolSize)
	// Made at once and kept: a burst must not wait for new connections.
	pool.MinConns = pool.MaxConns
	if config.CrashPoint != nil {
		config.CrashPoint.Configure(pool)
	}
}

// database is the database with the books.
type database struct {
	url      string
	where    string           // for people
	embedded *pgserver.Server // nil for --database-url

	otherwise string // a second remedy if url is wrong, for the error
}

// openDatabase uses the configured database, or starts an embedded one.
func openDatabase(ctx context.Context, config *Config) (*database, error) {
	if config.DatabaseURL != "" {
		where := "the given database"
		// If it does not parse, openStore reports the error.
		if parsed, err := pgxpool.ParseConfig(config.DatabaseURL); err == nil {
			where = fmt.Sprintf("schema %s of database %s at %s", bank.Schema, parsed.ConnConfig.Database, parsed.ConnConfig.Host)
		}
		return &database{url: config.DatabaseURL, where: where, otherwise: ", or leave it out for an embedded PostgreSQL"}, nil
	}
	server, err := pgserver.Start(ctx, &pgserver.Options{
		DataDir:  config.DataDir,
		Settings: map[string]string{"max_connections": strconv.Itoa(config.PoolSize + connectionsBeside)},
		Progress: config.Stderr,
	})
	switch {
	case errors.Is(err, pgserver.ErrDataDirInUse):
		return nil, fmt.Errorf("the data folder %s is held by a bank that is running: stop that one, or choose another with --data-dir", config.DataDir)
	case err != nil:
		return nil, err
	}
	where := "PostgreSQL " + server.Version() + ", embedded; its money is gone at exit"
	if config.DataDir != "" {
		where = "PostgreSQL " + server.Version() + ", embedded, kept in " + config.DataDir
	}
	return &database{url: server.URL(), where: where, embedded: server}, nil
}

// openStore migrates the tables of the records and of the bank, and opens the store.
func (d *database) openStore(ctx context.Context, config *Config) (*postgres.Store, error) {
	const unusable = "the database can't be used: %w: mend --database-url (DATABASE_URL)%s"
	options := storeOptions(config)
	options.PoolConfig = func(pool *pgxpool.Config) { configurePool(pool, config) }
	// Migrations run first, on a store of their own: they reset the pool, and pgxpool would take a
	// minute to fill it again.
	first := *options
	first.PoolConfig = findSchema
	migrating, err := postgres.Open(ctx, d.url, &first)
	if err != nil {
		return nil, fmt.Errorf(unusable, err, d.otherwise)
	}
	err = migrations.Up(ctx, migrating, nil)
	if err == nil {
		err = bank.Migrate(ctx, migrating)
	}
	migrating.Close()
	if err != nil {
		return nil, err
	}
	store, err := postgres.Open(ctx, d.url, options)
	if err != nil {
		return nil, fmt.Errorf(unusable, err, d.otherwise)
	}
	return store, nil
}

// lookAfter returns a hint on how to look at the records in an embedded PostgreSQL. It returns none
// for --database-url: the operator knows that URL, and it may contain a password.
func (d *database) lookAfter() string {
	if d.embedded == nil {
		return ""
	}
	return fmt.Sprintf(`
Look at the records:
  DATABASE_URL='%s' go run ./cmd/idemctl --schema %s key list --recent
`, d.url, bank.Schema)
}

// done returns a channel that is closed when an embedded PostgreSQL has ended. It is nil for
// --database-url.
func (d *database) done() <-chan struct{} {
	if d.embedded == nil {
		return nil
	}
	return d.embedded.Done()
}

// stop ends an embedded PostgreSQL.
func (d *database) stop() error {
	if d.embedded == nil {
		return nil
	}
	return d.embedded.Stop()
}
