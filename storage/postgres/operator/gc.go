package operator

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// gcPagesMax is how many pages of a table one statement of [Operator.GC] goes through at most.
const gcPagesMax = 1000

// GCOptions tune [Operator.GC]. Nil and the zero value are the defaults.
type GCOptions struct {
	// EventsAgeMax is how long the history is kept, by the services' clock. Defaults to 30 days;
	// negative keeps all of it.
	EventsAgeMax time.Duration

	// AuditAgeMax is how long the rows of the audit table are kept. Zero, the default, keeps them for good.
	AuditAgeMax time.Duration

	// Progress, unless it is nil, is called after each batch, from the goroutine that called GC.
	Progress func(GCProgress)
}

// GCProgress says how far a walk is.
type GCProgress struct {
	Table     string // its name
	Pages, Of int64  // gone through, and in all
	Deleted   int64  // rows so far
}

// GCResult is how many rows of each table a walk deleted.
type GCResult struct {
	Records, Events, Audit int64
}

// GC deletes what is past its time: expired records as a reaper does (postgres.Store.DeleteExpired), then what is too old of the
// history and of the audit table. Each batch is a transaction of its own, so what is deleted stays deleted where ctx ends it,
// and the result is returned with the error too. It needs no reaper to stand still, and no service. Tables that are not
// there yet are left out.
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

// deleteOld deletes by place, as the reaper does, so that no index on the time is paid for by each insert.
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
