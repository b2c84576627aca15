package server

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/internal/pgserver"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

// Limits of [Config], and of flags. The store wants 5 s between the longest handler and the end of its idle transaction.
const (
	HandlerTimeoutMin = 10 * time.Millisecond
	HandlerTimeoutMax = idleInTransactionMax - 5*time.Second
	AcquireTimeoutMin = time.Millisecond
	ReapIntervalMin   = time.Millisecond
)

const (
	connectTimeout = 5 * time.Second

	// connectionsBeside the pool: the lease, migrations, those that PostgreSQL reserves, and a psql or two.
	connectionsBeside = 16

	// A transaction may be idle for as long as its handler may take and a while longer, but no dead bank may hold a key
	// for a minute.
	idleBeside           = 10 * time.Second
	idleInTransactionMin = 6 * time.Second
	idleInTransactionMax = postgres.IdleInTransactionTimeoutMax - time.Second
)

// storeOptions are those of the store and of the pool that it uses.
func storeOptions(config *Config) *postgres.Options {
	return &postgres.Options{
		Schema: bank.Schema, AcquireTimeout: config.AcquireTimeout,
		IdleInTransactionTimeout: min(max(config.HandlerTimeout+idleBeside, idleInTransactionMin), idleInTransactionMax),
		PoolConfig:               func(pool *pgxpool.Config) { configurePool(pool, config) },
	}
}

func configurePool(pool *pgxpool.Config, config *Config) {
	if pool.ConnConfig.ConnectTimeout == 0 {
		pool.ConnConfig.ConnectTimeout = connectTimeout
	}
	pool.ConnConfig.RuntimeParams["search_path"] = bank.Schema
	pool.MaxConns = int32(config.PoolSize)
	pool.MinConns = pool.MaxConns // made at once and kept: a burst must not wait for connections to be made
	if config.CrashPoint != nil {
		config.CrashPoint.Configure(pool)
	}
}

// database is where the books are.
type database struct {
	url      string
	where    string           // for people
	embedded *pgserver.Server // nil where the database is somebody else's
}

// openDatabase finds the database or starts one.
func openDatabase(ctx context.Context, config *Config) (*database, error) {
	if config.DatabaseURL != "" {
		where := "the given database"
		if parsed, err := pgxpool.ParseConfig(config.DatabaseURL); err == nil { // openStore tells what is wrong with it
			where = fmt.Sprintf("schema %s of database %s at %s", bank.Schema, parsed.ConnConfig.Database, parsed.ConnConfig.Host)
		}
		return &database{url: config.DatabaseURL, where: where}, nil
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

// openStore opens the store of the records, and migrates its tables and the bank's.
func (d *database) openStore(ctx context.Context, config *Config) (*postgres.Store, error) {
	store, err := postgres.Open(ctx, d.url, storeOptions(config))
	if err != nil {
		return nil, fmt.Errorf("the database can't be used: %w: mend --database-url (DATABASE_URL), or leave it out for an embedded PostgreSQL", err)
	}
	err = migrations.Up(ctx, store, nil)
	if err == nil {
		err = bank.Migrate(ctx, store)
	}
	if err == nil {
		err = store.Check(ctx)
	}
	if err != nil {
		store.Close()
		return nil, err
	}
	return store, nil
}

// lookAfter says how to look at the records in an embedded PostgreSQL. Whose database it otherwise is knows its address, which
// may hold a password.
func (d *database) lookAfter() string {
	if d.embedded == nil {
		return ""
	}
	return fmt.Sprintf(`
Look at the records:
  DATABASE_URL='%s' go run ./cmd/idemctl --schema %s key list --recent
`, d.url, bank.Schema)
}

// done is closed when an embedded PostgreSQL ended, and never where the database is somebody else's.
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
