package bench

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

// Expiry is the cost of deleting expired records.
type Expiry struct {
	Fsync         string  `json:"fsync"`
	Keys          int64   `json:"keys"`
	TableBytes    int64   `json:"table_bytes"` // with its index, before the DELETE
	DeleteSeconds float64 `json:"delete_seconds"`
	DeleteWAL     int64   `json:"delete_wal_bytes"`
	VacuumSeconds float64 `json:"vacuum_seconds"`
	VacuumWAL     int64   `json:"vacuum_wal_bytes"`
}

const (
	schemaExpiry = "keys_expired"
	expiredSince = "-2 days" // added to an expiry a day from now
)

// measureExpiry fills a table with expired records, and deletes them.
func (r *run) measureExpiry(ctx context.Context) error {
	opts := &postgres.Options{Schema: schemaExpiry}
	config, err := pgxpool.ParseConfig(r.cluster.server.URL())
	if err != nil {
		return err
	}
	postgres.Configure(config, opts)
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return fmt.Errorf("open a pool: %w", err)
	}
	defer pool.Close()
	if err := migrations.Up(ctx, postgres.New(pool, &postgres.Options{Schema: schemaExpiry}), nil); err != nil {
		return err
	}
	f := &filled{keys: r.config.Expired, from: time.Now().Add(-3 * fillBefore).UnixMilli(), body: transferBody(nil, 1, 2, 1, 1)}
	if err := r.copies(ctx, schemaExpiry, "ours-batch", f, expiredSince); err != nil {
		return err
	}
	e := &Expiry{Fsync: r.cluster.fsync, Keys: f.keys}
	table := tableOf(schemaExpiry)
	if err := r.cluster.admin.QueryRow(ctx, "SELECT pg_total_relation_size($1::regclass)", table).Scan(&e.TableBytes); err != nil {
		return fmt.Errorf("measure the table: %w", err)
	}

	r.enter("expiry of %d keys: delete", f.keys)
	deleted := int64(0)
	e.DeleteSeconds, e.DeleteWAL, err = r.spent(ctx, func() (err error) {
		deleted, err = postgres.New(pool, opts).DeleteExpired(ctx)
		return err
	})
	if err != nil {
		return err
	}
	if deleted != f.keys {
		return fmt.Errorf("%d of %d records were deleted", deleted, f.keys)
	}
	r.enter("expiry of %d keys: vacuum", f.keys)
	e.VacuumSeconds, e.VacuumWAL, err = r.spent(ctx, func() error {
		_, err := r.cluster.admin.Exec(ctx, "VACUUM "+table)
		return err
	})
	if err != nil {
		return fmt.Errorf("vacuum: %w", err)
	}
	r.expiry = e
	return nil
}

// spent returns the seconds and the bytes of WAL that do took.
func (r *run) spent(ctx context.Context, do func() error) (seconds float64, wal int64, err error) {
	before, err := r.cluster.walBytes(ctx)
	if err != nil {
		return 0, 0, err
	}
	started := time.Now()
	if err := do(); err != nil {
		return 0, 0, err
	}
	seconds = time.Since(started).Seconds()
	after, err := r.cluster.walBytes(ctx)
	return seconds, after - before, err
}

func (e *Expiry) write(b io.Writer) {
	if e == nil {
		return
	}
	per := func(bytes int64) float64 { return float64(bytes) / float64(e.Keys) }
	us := func(seconds float64) float64 { return seconds * 1e6 / float64(e.Keys) }
	fmt.Fprintf(b, "\nexpiry of %d records, fsync %s; the table and its index have %.0f B each\n", e.Keys, e.Fsync, per(e.TableBytes))
	fmt.Fprintf(b, "delete: %.1f MB of WAL, %.1f s; %.1f B and %.2f us each\n", megabytes(e.DeleteWAL), e.DeleteSeconds, per(e.DeleteWAL), us(e.DeleteSeconds))
	fmt.Fprintf(b, "vacuum: %.1f MB of WAL, %.1f s; %.1f B and %.2f us each\n", megabytes(e.VacuumWAL), e.VacuumSeconds, per(e.VacuumWAL), us(e.VacuumSeconds))
}

func megabytes(bytes int64) float64 { return float64(bytes) / 1e6 }
