package postgres

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

// reaperPagesMax is the maximum number of pages of the table in one batch of [Store.DeleteExpired]:
// 8 MB. It is also the size of the ranges that reapers divide among themselves.
const reaperPagesMax = 1000

// If another session holds a row, a walk waits for it for reaperLockTimeoutMS milliseconds, which
// is under the server's deadlock_timeout of 1 second, so that the reaper is the one to give way. It
// does so reaperHeldMax times, some ten of them for one held page, and then gives up.
const (
	reaperLockTimeoutMS = "20"
	reaperHeldMax       = 100
)

// DeleteExpired deletes the records that had expired, by the database's clock, when their batch
// began. It returns the number of deleted records, even if it also returns an error.
//
// It goes through the table by place, batch by batch, each in a transaction of its own, and needs
// no index, which each insert would have to pay for. A row is deleted because it has expired and
// never because of its key: a key that came back in the meantime has a new row. If expired records
// may be hidden from the role, it deletes those it sees and returns [ErrRowSecurityActive]. It
// skips a range of the table that another reaper works on, and leaves a page on which anybody else
// holds a row to the next walk. If statement_timeout cuts a batch off, it retries in halves, down
// to one page. Safe for concurrent use.
func (s *Store) DeleteExpired(ctx context.Context) (deleted int64, err error) {
	return s.DeleteExpiredTold(ctx, nil)
}

// DeleteExpiredTold does what [Store.DeleteExpired] does. It also calls progress, unless it is nil,
// after each range of the table, with the number of pages done, the number of all pages, and the
// number of deleted records.
func (s *Store) DeleteExpiredTold(ctx context.Context, progress func(pages, of, deleted int64)) (deleted int64, err error) {
	table := pgx.Identifier{s.options.Schema, TableName}.Sanitize()
	var pages int64
	var hidden bool
	err = s.pool.QueryRow(ctx, "SELECT pg_relation_size($1::regclass) / current_setting('block_size')::bigint, row_security_active($1::regclass)", pgx.QueryExecModeExec, table).Scan(&pages, &hidden)
	if err != nil {
		return 0, fmt.Errorf("delete expired: %w", wire.SQLError(err))
	}
	w := &walk{store: s, batchPages: reaperPagesMax, table: table}
	for page := int64(0); page < pages; page += reaperPagesMax {
		// No request has an empty scope.
		lock := idempotency.Key{Scope: "", Value: fmt.Sprintf("reaper %d", page)}.LockNumber(s.table)
		next := min(page+reaperPagesMax, pages)
		if err := w.deleteRange(ctx, lock, page, next); err != nil {
			return w.deleted, fmt.Errorf("delete expired: %w", err)
		}
		if progress != nil {
			progress(next, pages, w.deleted)
		}
	}
	if hidden { // the rows that it saw are deleted all the same
		return w.deleted, fmt.Errorf("delete expired: %w", rowSecurity(s.table, ""))
	}
	return w.deleted, nil
}

// walk is one walk of a reaper through the table.
type walk struct {
	store      *Store
	table      string // sanitized
	batchPages int64  // fewer than reaperPagesMax once a batch took too long
	deleted    int64
	held       int // how often rows were held
}

// deleteRange deletes the expired records on the pages from the first to before the last, all of
// them in the range of the lock.
func (w *walk) deleteRange(ctx context.Context, lock, first, last int64) error {
	for first < last {
		next := min(first+w.batchPages, last)
		half := (next - first) / 2
		err := w.deleteBatch(ctx, lock, first, next)
		var pgErr *pgconn.PgError
		switch {
		case err == nil:
			first = next
		case !errors.As(err, &pgErr) || ctx.Err() != nil:
			return err
		case pgErr.Code == "57014" && half > 0:
			// statement_timeout: large bodies lie on many pages of their own.
			w.batchPages = half
		case pgErr.Code == "55P03" && w.held < reaperHeldMax:
			w.held++
			if half > 0 {
				if err := w.deleteRange(ctx, lock, first, first+half); err != nil {
					return err
				}
				first += half
			} else {
				first = next // left to the next walk
			}
		case pgErr.Code == "42501":
			return fmt.Errorf("%w: GRANT SELECT, DELETE ON %s to the reaper's role", wire.SQLError(err), w.store.table)
		default:
			return wire.SQLError(err)
		}
	}
	return nil
}

// deleteBatch deletes the expired records on the pages from the first to before the last, unless
// another reaper holds the lock. The lock keeps reapers from waiting for each other and ends with
// the statement. Correctness does not depend on it: a row that two reapers delete is deleted once.
//
// There is no FOR UPDATE SKIP LOCKED: each row's lock would go to the WAL beside its deletion, and
// would need the privilege to update. ctid can't lead to another row: while this statement runs, no
// place that held a row when it began is used again. ONLY: the same place in a child table is
// another row.
func (w *walk) deleteBatch(ctx context.Context, lock, first, last int64) error {
	tag, err := w.store.pool.Exec(ctx, `
		DELETE FROM ONLY `+w.table+`
		WHERE ctid >= $1::tid AND ctid < $2::tid AND expires_at < statement_timestamp() AND status <> 0
		  AND (SELECT pg_try_advisory_xact_lock($3) AND set_config('lock_timeout', '`+reaperLockTimeoutMS+`', true) IS NOT NULL)`,
		pgx.QueryExecModeExec, // never from a cached plan: see ErrRowSecurityActive
		fmt.Sprintf("(%d,0)", first), fmt.Sprintf("(%d,0)", last), lock)
	w.deleted += tag.RowsAffected()
	return err
}

// ReaperOptions tune a [Reaper]. Nil and the zero value are the defaults.
type ReaperOptions struct {
	// Interval is the pause between two walks through the table, give or take a tenth, so
	// that replicas don't walk in step. Defaults to 1 minute.
	Interval time.Duration

	// OnWalk is called after every walk, with the number of deleted records, the duration and the
	// error, but not if the walk ended with Run's context. Nil logs failed walks to slog.Default().
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
	o.Interval = cmp.Or(o.Interval, time.Minute)
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

// Run deletes expired records until ctx ends. A failed walk is passed to OnWalk, and the next one
// tries again.
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
