package operator

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// Limits of [Operator.Stats].
const (
	CountExactBytesMax = 32 << 20 // up to this size a table's rows are counted, above it a sample's
	SamplePages        = 1000     // the approximate number of pages in the sample
	HoldersMax         = 100      // the maximum number of attempts listed
)

// Count is a number of rows. If Estimated, it comes from a sample: it is off by about a tenth, and
// by more if it is small.
type Count struct {
	Rows      int64
	Estimated bool
}

// Stats are the figures of one table of records.
type Stats struct {
	Now     time.Time
	Live    Count
	Expired Count // expired, and not yet deleted by the reaper

	// OldestCreated is the creation time of the oldest counted record; of the sample if the counts
	// are estimated. Zero if there is none.
	OldestCreated time.Time
	// OldestExpired is the time since the oldest expired record in the table expired: the reaper's
	// delay.
	OldestExpired time.Duration

	Open       int           // requests that have called another service and have no answer yet
	Parked     int           // of these, that wait for a person
	OldestOpen time.Duration // the age of the oldest

	TableBytes, IndexBytes, ToastBytes int64
	AuditBytes, EventsBytes            int64 // with their indexes; 0 before migration 3

	// From the server's statistics, which lag by up to a second and are lost in a crash. Inserted
	// and Deleted count rows ever, including rolled back ones: subtract two readings to get a rate.
	Inserted, Deleted int64
	DeadRows          int64 // not yet removed by vacuum
	LastVacuum        time.Time
	LastAnalyze       time.Time

	// InFlight is the number of sessions that hold keys now. Holders are the oldest of them, at
	// most [HoldersMax]. The lock does not reveal which key a session holds; see [Operator.Get].
	InFlight int
	Holders  []Holder
}

// Stats returns the figures of the table. Above [CountExactBytesMax] it reads a sample of
// [SamplePages] pages.
func (o *Operator) Stats(ctx context.Context) (Stats, error) {
	var s Stats
	err := o.read(ctx, func(ctx context.Context, tx pgx.Tx) error {
		s = Stats{}
		if err := o.sizes(ctx, tx, &s); err != nil {
			return err
		}
		if err := o.counts(ctx, tx, &s); err != nil {
			return err
		}
		if err := o.openCounts(ctx, tx, &s); err != nil {
			return err
		}
		return o.inFlight(ctx, tx, &s)
	})
	if err != nil {
		return Stats{}, fmt.Errorf("stats: %w", err)
	}
	return s, nil
}

func (o *Operator) sizes(ctx context.Context, tx pgx.Tx, s *Stats) error {
	var vacuum, analyze *time.Time
	err := tx.QueryRow(ctx, `
		SELECT statement_timestamp(), pg_relation_size(c.oid), pg_indexes_size(c.oid), COALESCE(pg_total_relation_size(NULLIF(c.reltoastrelid, 0)), 0),
		       COALESCE(pg_total_relation_size(to_regclass($2)), 0), COALESCE(pg_total_relation_size(to_regclass($3)), 0),
		       COALESCE(u.n_tup_ins, 0), COALESCE(u.n_tup_del, 0), COALESCE(u.n_dead_tup, 0),
		       greatest(u.last_vacuum, u.last_autovacuum), greatest(u.last_analyze, u.last_autoanalyze)
		FROM pg_class AS c LEFT JOIN pg_stat_user_tables AS u ON u.relid = c.oid
		WHERE c.oid = $1::text::regclass`, o.keys, o.audit, o.events).Scan(
		&s.Now, &s.TableBytes, &s.IndexBytes, &s.ToastBytes, &s.AuditBytes, &s.EventsBytes,
		&s.Inserted, &s.Deleted, &s.DeadRows, &vacuum, &analyze)
	if vacuum != nil {
		s.LastVacuum = vacuum.UTC()
	}
	if analyze != nil {
		s.LastAnalyze = analyze.UTC()
	}
	s.Now = s.Now.UTC()
	return err
}

func (o *Operator) counts(ctx context.Context, tx pgx.Tx, s *Stats) error {
	sample, factor := "", 1.0
	if s.TableBytes > CountExactBytesMax {
		pages, err := o.pages(ctx, tx)
		if err != nil {
			return err
		}
		if share := float64(SamplePages) / float64(pages); share < 1 {
			sample, factor = fmt.Sprintf(" TABLESAMPLE SYSTEM (%.6f)", share*100), 1/share
		}
	}
	var live, expired int64
	var created, expiredAt *time.Time
	err := tx.QueryRow(ctx, `
		SELECT count(*) FILTER (WHERE expires_at >= statement_timestamp() ), count(*) FILTER (WHERE expires_at < statement_timestamp()),
		       min(created_at), min(expires_at) FILTER (WHERE expires_at < statement_timestamp())
		FROM ONLY `+o.keys+sample+` WHERE status <> 0`).Scan(&live, &expired, &created, &expiredAt)
	if err != nil {
		return err
	}
	s.Live = Count{Rows: int64(float64(live) * factor), Estimated: sample != ""}
	s.Expired = Count{Rows: int64(float64(expired) * factor), Estimated: sample != ""}
	if created != nil {
		s.OldestCreated = created.UTC()
	}
	if expiredAt != nil {
		s.OldestExpired = max(s.Now.Sub(*expiredAt), 0)
	}
	return nil
}

// openCounts counts open requests, if the schema has their table and the role may read it.
func (o *Operator) openCounts(ctx context.Context, tx pgx.Tx, s *Stats) error {
	var readable bool
	if err := tx.QueryRow(ctx, "SELECT COALESCE(has_table_privilege(to_regclass($1)::oid, 'SELECT'), false)", o.open).Scan(&readable); err != nil || !readable {
		return err
	}
	var seconds float64
	err := tx.QueryRow(ctx, "SELECT count(*), count(parked), COALESCE(extract(epoch FROM statement_timestamp() - min(started_at)), 0)::float8 FROM "+o.open).Scan(&s.Open, &s.Parked, &seconds)
	s.OldestOpen = time.Duration(max(seconds, 0) * float64(time.Second))
	return err
}

// inFlight finds the sessions that hold a 64-bit advisory lock and have read the table of records
// in the same transaction: the lock on a table lasts as long as the transaction.
func (o *Operator) inFlight(ctx context.Context, tx pgx.Tx, s *Stats) error {
	rows, err := tx.Query(ctx, `
		WITH held AS MATERIALIZED (SELECT * FROM pg_locks WHERE granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())),
		l AS (
			SELECT DISTINCT pid FROM held
			WHERE locktype = 'advisory' AND objsubid = 1 AND pid <> pg_backend_pid()
			  AND pid IN (SELECT pid FROM held WHERE locktype = 'relation' AND relation = $1::text::regclass)
		)
		SELECT `+holderColumns+`, count(*) OVER ()
		FROM l LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
		ORDER BY a.xact_start, l.pid LIMIT $2::int`, o.keys, HoldersMax)
	if err != nil {
		return err
	}
	s.Holders, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (Holder, error) { return scanHolder(row, &s.InFlight) })
	return err
}
