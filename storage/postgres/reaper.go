package postgres

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// reaperPagesMax is how many pages of the table one batch of [Store.DeleteExpired] goes through: 8 MB.
const reaperPagesMax = 1000

// ReaperIntervalDefault is how long a [Reaper] rests.
const ReaperIntervalDefault = time.Minute

// DeleteExpired deletes the records whose time was over, by the database's clock, when their batch began, and returns
// how many it deleted, also together with an error.
//
// It goes through the table by place, batch by batch, each in a transaction of its own, and needs no index, which each
// insert would have to pay for. A row is deleted because it has expired and never because of its key: a key that came
// back in the meantime has a new row. Rows that another reaper holds are left to it. Safe for concurrent use.
func (s *Store) DeleteExpired(ctx context.Context) (deleted int64, err error) {
	table := pgx.Identifier{s.options.Schema, TableName}.Sanitize()
	var pages int64
	err = s.pool.QueryRow(ctx, "SELECT pg_relation_size($1::regclass) / current_setting('block_size')::bigint", table).Scan(&pages)
	if err != nil {
		return 0, fmt.Errorf("delete expired: %w", sqlError(err))
	}
	for page := int64(0); page < pages; page += reaperPagesMax {
		// ctid is stable while the row is locked, and rows are never updated. The second look at expires_at costs
		// nothing and needs no argument to be believed.
		tag, err := s.pool.Exec(ctx, `
			DELETE FROM `+table+`
			WHERE ctid = ANY (ARRAY(
			        SELECT ctid FROM `+table+`
			        WHERE ctid >= $1::tid AND ctid < $2::tid AND expires_at < statement_timestamp()
			        FOR UPDATE SKIP LOCKED))
			  AND expires_at < statement_timestamp()`,
			fmt.Sprintf("(%d,0)", page), fmt.Sprintf("(%d,0)", page+reaperPagesMax))
		if err != nil {
			var pgErr *pgconn.PgError
			if errors.As(err, &pgErr) && pgErr.Code == "42501" {
				return deleted, fmt.Errorf("delete expired: %w: GRANT SELECT, DELETE, UPDATE (trace_id) ON %s to the reaper's role", sqlError(err), s.table)
			}
			return deleted, fmt.Errorf("delete expired: %w", sqlError(err))
		}
		deleted += tag.RowsAffected()
	}
	return deleted, nil
}

// ReaperOptions tune a [Reaper]. Nil and the zero value are the defaults.
type ReaperOptions struct {
	// Interval is how long it rests between two walks through the table, give or take a tenth, so that replicas don't
	// walk in step. The default is [ReaperIntervalDefault].
	Interval time.Duration

	// OnWalk is told of every walk: how many records it deleted, how long it took, and its error. A walk that ends with
	// Run's context is not reported. Nil logs the walks that failed to slog.Default().
	OnWalk func(deleted int64, duration time.Duration, err error)
}

// Reaper deletes expired records for as long as it runs. Every replica of a service may run one.
type Reaper struct {
	store   *Store
	options ReaperOptions
}

// NewReaper returns a reaper, which does nothing until [Reaper.Run].
func NewReaper(store *Store, opts *ReaperOptions) *Reaper {
	var o ReaperOptions
	if opts != nil {
		o = *opts
	}
	if o.Interval == 0 {
		o.Interval = ReaperIntervalDefault
	}
	if o.OnWalk == nil {
		o.OnWalk = func(_ int64, _ time.Duration, err error) {
			if err != nil {
				slog.Warn("idempotency: expired records were not deleted; the next walk tries again", "error", err)
			}
		}
	}
	if store == nil || o.Interval < 0 {
		panic("idempotency/postgres: NewReaper needs a store and a positive ReaperOptions.Interval")
	}
	return &Reaper{store: store, options: o}
}

// Run deletes until ctx ends, and returns then. A walk that fails is reported to OnWalk, and the next one tries again.
func (r *Reaper) Run(ctx context.Context) {
	for {
		started := time.Now()
		deleted, err := r.store.DeleteExpired(ctx)
		if ctx.Err() == nil {
			r.options.OnWalk(deleted, time.Since(started), err)
		}
		rest := r.options.Interval + time.Duration((rand.Float64()-0.5)*float64(r.options.Interval)/5)
		select {
		case <-ctx.Done():
			return
		case <-time.After(rest):
		}
	}
}
