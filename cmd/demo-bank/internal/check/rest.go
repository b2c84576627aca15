package check

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/nodeid"
)

// Bounds limits the size of the table of records.
type Bounds struct {
	Live    int64 // rows that have not expired
	Expired int64 // expired rows that the reaper may have left
}

// Live is [LiveRecordsKept]: each of the keys has its record, and the table is within limit. The
// keys must be younger than the TTL: pass those that were acknowledged, and those of planted
// records that the reaper must not delete.
func Live(ctx context.Context, conn *pgx.Conn, live []Key, limit Bounds) (Result, error) {
	r := result(LiveRecordsKept)
	r.Seen = len(live)
	scopes, keys := make([]string, len(live)), make([]string, len(live))
	for i, key := range live {
		scopes[i], keys[i] = key.Scope, key.Key
	}
	err := snapshot(ctx, conn, func(tx pgx.Tx) error {
		rows, err := tx.Query(ctx, `
			SELECT w.scope, w.key FROM unnest($1::text[], $2::text[]) AS w (scope, key)
			WHERE NOT EXISTS (SELECT FROM idempotency_keys k
				WHERE (k.scope, k.key) = (w.scope COLLATE "C", w.key COLLATE "C"))`, scopes, keys)
		if err != nil {
			return err
		}
		var key Key
		if _, err := pgx.ForEachRow(rows, []any{&key.Scope, &key.Key}, func() error {
			r.add("%s: its live record is gone", key)
			return nil
		}); err != nil {
			return err
		}
		var rest, expired int64
		if err := tx.QueryRow(ctx, `
			SELECT count(*) FILTER (WHERE expires_at > clock_timestamp()), count(*) FILTER (WHERE expires_at <= clock_timestamp())
			FROM idempotency_keys WHERE NOT starts_with(scope, $1)`, idempotency.MessageScopePrefix).Scan(&rest, &expired); err != nil {
			return err
		}
		if rest > limit.Live {
			r.add("%d live records, and at most %d were made", rest, limit.Live)
		}
		if expired > limit.Expired {
			r.add("%d expired records are left, and at most %d may be", expired, limit.Expired)
		}
		return nil
	})
	return r, wrap("records", err)
}

// Quiet is [Quieted]: besides conn, no session of its database holds or awaits an advisory lock
// (except the lease of a node number), is idle in a transaction, or waits for a lock. Quiet looks
// once. The role of conn must see the sessions of others: it is a superuser, a member of
// pg_read_all_stats, or the role of all of these sessions. Otherwise Quiet returns an error.
func Quiet(ctx context.Context, conn *pgx.Conn) (Result, error) {
	r := result(Quieted)
	var hidden int64
	err := conn.QueryRow(ctx, `
		SELECT count(*) FILTER (WHERE backend_type = 'client backend'), count(*) FILTER (WHERE backend_type IS NULL)
		FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()`).
		Scan(&r.Seen, &hidden)
	if err != nil {
		return r, wrap("sessions", err)
	}
	if hidden > 0 {
		return r, wrap("sessions", errors.New("some are another role's and can't be seen: GRANT pg_read_all_stats"))
	}
	rows, err := conn.Query(ctx, `
		SELECT format('session %s holds or awaits the advisory lock %s/%s', pid, classid, objid) FROM pg_locks
		WHERE locktype = 'advisory' AND pid IS DISTINCT FROM pg_backend_pid()
			AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
			AND NOT (objsubid = 2 AND classid = $1::bigint::oid)
		UNION ALL
		SELECT format('session %s is %s', pid, state) FROM pg_stat_activity
		WHERE datname = current_database() AND pid <> pg_backend_pid() AND state LIKE 'idle in transaction%'
		UNION ALL
		SELECT format('session %s waits for a lock (%s)', pid, wait_event) FROM pg_stat_activity
		WHERE datname = current_database() AND pid <> pg_backend_pid() AND wait_event_type = 'Lock'
		ORDER BY 1`, int64(nodeid.LockNamespace))
	if err != nil {
		return r, wrap("sessions", err)
	}
	var example string
	_, err = pgx.ForEachRow(rows, []any{&example}, func() error {
		r.add("%s", example)
		return nil
	})
	return r, wrap("sessions", err)
}

// Resources counts what a process holds.
type Resources struct {
	Goroutines, FileDescriptors, Connections int
}

// The surplus over its baseline that a process may hold: a goroutine of a collector or timer, a
// file or kept conn of the client that asks for the numbers. A leak under load is in the hundreds.
const (
	GoroutinesMore      = 10
	FileDescriptorsMore = 10
	ConnectionsMore     = 2
)

// Baseline is [BackAtBaseline]: after holds no more than before, plus GoroutinesMore,
// FileDescriptorsMore and ConnectionsMore. A count of 0 goroutines or file descriptors means that
// they were not measured, which is an error.
func Baseline(before, after Resources) Result {
	r := result(BackAtBaseline)
	for _, resource := range []struct {
		name                string
		before, after, more int
	}{
		{"goroutines", before.Goroutines, after.Goroutines, GoroutinesMore},
		{"file descriptors", before.FileDescriptors, after.FileDescriptors, FileDescriptorsMore},
		{"connections", before.Connections, after.Connections, ConnectionsMore},
	} {
		r.Seen++
		if resource.after > resource.before+resource.more {
			r.add("%d %s, and %d before; %d more are allowed", resource.after, resource.name, resource.before, resource.more)
		}
	}
	// A process always has both.
	for _, resources := range []Resources{before, after} {
		if resources.Goroutines <= 0 || resources.FileDescriptors <= 0 {
			r.add("goroutines or file descriptors were not measured")
		}
	}
	return r
}

// wrap names the thing that could not be read; nil stays nil.
func wrap(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("check %s: %w", what, err)
}
