package operator

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// gcPagesMax is the maximum number of pages of a table that one statement of [Operator.GC] reads.
const gcPagesMax = 1000

// GCOptions tune [Operator.GC]. Nil and the zero value are the defaults.
type GCOptions struct {
	// EventsAgeMax is the age, by the services' clock, above which events of the history are
	// deleted. Defaults to 30 days; negative keeps all of them.
	EventsAgeMax time.Duration

	// AuditAgeMax is the age above which rows of the audit table are deleted. Zero, the default,
	// keeps all of them.
	AuditAgeMax time.Duration

	// Progress, if not nil, is called after each batch, on the goroutine that called GC.
	Progress func(GCProgress)
}

// GCProgress is the progress of a walk.
type GCProgress struct {
	Table     string // its name
	Pages, Of int64  // read so far, and in total
	Deleted   int64  // rows deleted so far
}

// GCResult has the number of rows that a walk deleted from each table.
type GCResult struct {
	Records, Events, Audit int64
}

// GC deletes expired records as a reaper does (postgres.Store.DeleteExpired), then rows of the
// history and of the audit table that are too old. Each batch is a transaction of its own. So if
// ctx ends the call, deleted rows stay deleted, and the result is returned together with the error.
// Services and reapers may run meanwhile. GC skips tables that do not exist yet.
func (o *Operator) GC(ctx context.Context, opts *GCOptions) (GCResult, error) {
	var options GCOptions
	if opts != nil {
		options = *opts
	}
	options.EventsAgeMax = cmp.Or(options.EventsAgeMax, 30*24*time.Hour)
	if options.AuditAgeMax < 0 {
		return GCResult{}, fmt.Errorf("gc: %w: AuditAgeMax is negative", ErrInvalid)
	}
	if options.Progress == nil {
		options.Progress = func(GCProgress) {}
	}
	var result GCResult
	var err error
	result.Records, err = o.store.DeleteExpiredTold(ctx, func(pages, of, deleted int64) {
		options.Progress(GCProgress{Table: "idempotency_keys", Pages: pages, Of: of, Deleted: deleted})
	})
	if err != nil {
		return result, fmt.Errorf("gc: %w", o.remedy(err))
	}
	if options.EventsAgeMax > 0 {
		if result.Events, err = o.deleteOld(ctx, EventsTableName, o.events, options.EventsAgeMax, options.Progress); err != nil {
			return result, fmt.Errorf("gc: history: %w", err)
		}
	}
	if options.AuditAgeMax > 0 {
		if result.Audit, err = o.deleteOld(ctx, AuditTableName, o.audit, options.AuditAgeMax, options.Progress); err != nil {
			return result, fmt.Errorf("gc: audit: %w", err)
		}
	}
	return result, nil
}

// deleteOld walks the table page by page, as the reaper does, so that inserts need not maintain an
// index on the time.
func (o *Operator) deleteOld(ctx context.Context, name, table string, age time.Duration, progress func(GCProgress)) (deleted int64, err error) {
	var pages int64
	err = o.read(ctx, func(ctx context.Context, tx pgx.Tx) error {
		return tx.QueryRow(ctx, "SELECT COALESCE(pg_relation_size(to_regclass($1)), 0) / current_setting('block_size')::bigint", table).Scan(&pages)
	})
	for page := int64(0); err == nil && page < pages; page += gcPagesMax {
		next := min(page+gcPagesMax, pages)
		err = o.in(ctx, pgx.TxOptions{IsoLevel: pgx.ReadCommitted, AccessMode: pgx.ReadWrite}, func(ctx context.Context, tx pgx.Tx) error {
			tag, err := tx.Exec(ctx, "DELETE FROM ONLY "+table+" WHERE ctid >= $1::tid AND ctid < $2::tid AND at < statement_timestamp() - $3::float8 * interval '1 second'",
				fmt.Sprintf("(%d,0)", page), fmt.Sprintf("(%d,0)", next), age.Seconds())
			deleted += tag.RowsAffected()
			return err
		})
		if err == nil {
			progress(GCProgress{Table: name, Pages: next, Of: pages, Deleted: deleted})
		}
	}
	return deleted, err
}
