package bank

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/migrations"
)

//go:embed migrations/*.sql
var files embed.FS

// Schema holds all tables of the bank, those of the records included: a database that is lent to it stays tidy. The
// pool's search_path must name it.
const Schema = "demo_bank"

// versionTable keeps the version of the bank's own tables, apart from that of the records' table.
const versionTable = "demo_bank_migrations"

// SchemaVersion is the version of the bank's tables that this program needs.
const SchemaVersion = 2

// Migrate creates or upgrades the bank's tables, in the store's schema, and seeds them once. It is safe to call from several processes at once.
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

// IDSource makes ids that no other process makes. It is safe for concurrent use.
type IDSource interface {
	// Next returns a new id, or an error as long as uniqueness can't be promised.
	Next() (int64, error)
}

// Bank answers requests from the books in one database. It is safe for concurrent use.
type Bank struct {
	pool   *pgxpool.Pool
	ids    IDSource
	ttl    time.Duration
	audits chan struct{} // holds a token for each audit that runs
	logger *slog.Logger

	onTransfer TransferFunc
}

// TransferFunc is called in each transfer's transaction: before its first statement, and with written when its last is
// sent. An error fails the transfer, and so does a panic.
type TransferFunc func(ctx context.Context, tx pgx.Tx, written bool) error

// OnTransfer has f called in each transfer. Call it before anything is served, and once.
func (b *Bank) OnTransfer(f TransferFunc) { b.onTransfer = f }

// auditsMax is how many audits run at once; others wait their turn. Each reads all books, and everybody may ask.
const auditsMax = 4

// New returns a bank on a migrated database. ttl is how long records count: the audit looks no further back.
func New(pool *pgxpool.Pool, ids IDSource, ttl time.Duration, logger *slog.Logger) *Bank {
	return &Bank{
		pool: pool, ids: ids, ttl: ttl, audits: make(chan struct{}, auditsMax), logger: logger,
		onTransfer: func(context.Context, pgx.Tx, bool) error { return nil },
	}
}

// ErrSchema means that the database's tables are not those that this program needs.
var ErrSchema = errors.New("schema of the bank is not current")

// Check reports whether the database answers and has the bank's tables in the version that this program needs.
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
