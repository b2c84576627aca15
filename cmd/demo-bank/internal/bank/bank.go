package bank

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

//go:embed migrations/*.sql
var files embed.FS

// Schema holds all tables of the bank, including those of the records, so that the bank can share a
// database with other programs. The pool's search_path must name it.
const Schema = "demo_bank"

// versionTable holds the version of the bank's own tables. The records' tables have their own.
const versionTable = "demo_bank_migrations"

// SchemaVersion is the version of the bank's tables that this program needs.
const SchemaVersion = 4

// Migrate creates or upgrades the bank's tables in the store's schema, and seeds them once. It is
// safe to call from several processes at once.
func Migrate(ctx context.Context, store migrations.Store) error {
	sql, err := fs.Sub(files, "migrations")
	if err != nil {
		return fmt.Errorf("migrate the bank: %w", err)
	}
	if err := migrations.Up(ctx, store, &migrations.Options{Files: sql, VersionTable: versionTable}); err != nil {
		return fmt.Errorf("migrate the bank: %w", err)
	}
	return nil
}

// IDSource makes ids that are unique across processes. It is safe for concurrent use.
type IDSource interface {
	// Next returns a new id, or an error while uniqueness can't be guaranteed.
	Next() (int64, error)
}

// Bank answers requests from the books of one database. It is safe for concurrent use.
type Bank struct {
	pool   *pgxpool.Pool
	ids    IDSource
	ttl    time.Duration
	audits chan struct{} // holds a token for each running audit
	logger *slog.Logger

	onTransfer TransferFunc
	processor  *Processor // nil if there is none
	broker     Broker     // nil if there is none
	operator   *operator.Operator
	fed        time.Time // when these two were set
	// Messages that an earlier broker inside has lost are not all published again yet.
	republishing atomic.Bool
}

// Call sets the processor for the bank's calls. It must be called once, before MountCalls.
func (b *Bank) Call(processor *Processor) { b.processor = processor }

// TransferFunc is called in each transfer's transaction: before its first statement, and with
// written set after its last one. If it returns an error or panics, the transfer fails.
type TransferFunc func(ctx context.Context, tx pgx.Tx, written bool) error

// OnTransfer sets the function that is called in each transfer. Call it once, before serving.
func (b *Bank) OnTransfer(f TransferFunc) { b.onTransfer = f }

// auditsMax is the maximum number of concurrent audits; further ones wait. Each reads all books,
// and anyone may request one.
const auditsMax = 4

// New returns a bank on a migrated database. ttl is the store's TTL: the audit looks no further
// back.
func New(pool *pgxpool.Pool, ids IDSource, ttl time.Duration, logger *slog.Logger) *Bank {
	return &Bank{
		pool: pool, ids: ids, ttl: ttl, audits: make(chan struct{}, auditsMax), logger: logger,
		onTransfer: func(context.Context, pgx.Tx, bool) error { return nil },
	}
}

// OperationsSecret returns the secret of the ids of open requests. It is the same in all processes
// on one database.
func (b *Bank) OperationsSecret(ctx context.Context) (secret []byte, err error) {
	if err := b.pool.QueryRow(ctx, `SELECT value FROM secrets WHERE name = 'operations'`).Scan(&secret); err != nil {
		return nil, fmt.Errorf("read the secret of operations: %w", err)
	}
	return secret, nil
}

// ErrSchema means that the database's tables are older than this program needs, or that their
// migration failed in the middle.
var ErrSchema = errors.New("schema of the bank is not current")

// Check returns nil if the database answers and the version of the bank's tables is at least the
// one that this program needs.
func (b *Bank) Check(ctx context.Context) error {
	var version int64
	var dirty bool
	err := b.pool.QueryRow(ctx, `SELECT version, dirty FROM `+versionTable).Scan(&version, &dirty)
	switch {
	case err != nil:
		return fmt.Errorf("check the bank's schema: %w", err)
	case dirty || version < SchemaVersion:
		return fmt.Errorf("%w: it has version %d (dirty: %t) and needs %d: start the bank again to migrate it", ErrSchema, version, dirty, SchemaVersion)
	}
	return nil
}
