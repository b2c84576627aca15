package endtoend_test

import (
	"context"
	"errors"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/internal/pgserver"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

const (
	crashMax = 60 * time.Second // until PostgreSQL is back
	// noticeMax is the time that PostgreSQL may take to notice that a backend died. A backend that is
	// about to exit does not die of its SIGKILL.
	noticeMax = 10 * time.Second
)

// makeTables makes the tables of the service. A unique constraint on effects would hide doubles.
func makeTables(ctx context.Context, pool *pgxpool.Pool, keys int) error {
	_, err := pool.Exec(ctx, `
		CREATE TABLE accounts (key text PRIMARY KEY, version integer NOT NULL);
		CREATE TABLE effects (id bigint GENERATED ALWAYS AS IDENTITY, key text NOT NULL, version integer NOT NULL, process integer NOT NULL)`)
	if err != nil {
		return err
	}
	_, err = pool.Exec(ctx, "INSERT INTO accounts SELECT $1 || n, 0 FROM generate_series(0, $2::int - 1) AS n", keyPrefix, keys)
	return err
}

// database is a PostgreSQL with real fsync, and a proxy in front of it that keeps the address.
type database struct {
	dir   string
	proxy *pgfault.Proxy

	mu     sync.Mutex
	server *pgserver.Server
	pool   *pgxpool.Pool // of the proof itself
}

func (d *database) start(ctx context.Context, keys int) error {
	if err := d.launch(ctx); err != nil {
		return err
	}
	network, address, err := pgfault.Upstream(d.server.URL())
	if err != nil {
		return err
	}
	if d.proxy, err = pgfault.Start(pgfault.Options{Network: network, Address: address}); err != nil {
		return err
	}
	if d.pool, err = pgxpool.New(ctx, d.url("proof")); err != nil {
		return err
	}
	if err := migrations.Up(ctx, postgres.New(d.pool, nil), nil); err != nil {
		return err
	}
	return makeTables(ctx, d.pool, keys)
}

func (d *database) launch(ctx context.Context) (err error) {
	d.server, err = pgserver.Start(ctx, &pgserver.Options{DataDir: d.dir})
	return err
}

// url returns the database's URL for a program of this name.
func (d *database) url(name string) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.proxy.URL(d.server.URL()) + "&application_name=" + name
}

// crashPostmaster is an immediate shutdown and a start on the same data. It is like a crash of the
// machine, except that the disk loses nothing that was not written yet.
func (d *database) crashPostmaster(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := syscall.Kill(d.server.PID(), syscall.SIGQUIT); err != nil {
		return err
	}
	select {
	case <-d.server.Done():
	case <-ctx.Done():
		return ctx.Err()
	}
	if err := d.server.Stop(); err != nil {
		return err
	}
	if err := d.launch(ctx); err != nil {
		return err
	}
	network, address, err := pgfault.Upstream(d.server.URL())
	if err != nil {
		return err
	}
	d.proxy.SetUpstream(network, address)
	return nil
}

// crashBackend kills a backend of a consumer, one in a transaction if there is one. PostgreSQL then
// ends all others, and recovers.
func (d *database) crashBackend(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, crashMax)
	defer cancel()
	var before time.Time
	var killedAt time.Time
	for ; ctx.Err() == nil; sleep(ctx, 20*time.Millisecond) {
		var now time.Time
		// It changes with each recovery; pg_postmaster_start_time does not.
		if d.pool.QueryRow(ctx, "SELECT backend_start FROM pg_stat_activity WHERE backend_type = 'checkpointer'").Scan(&now) != nil {
			continue
		}
		switch {
		case !killedAt.IsZero() && !now.Equal(before):
			return nil
		case !killedAt.IsZero() && time.Since(killedAt) < noticeMax:
			continue
		}
		var pid int
		err := d.pool.QueryRow(ctx, "SELECT pid FROM pg_stat_activity WHERE application_name LIKE $1 ORDER BY state = 'idle', random() LIMIT 1", consumerName+"-%").Scan(&pid)
		if err == nil && syscall.Kill(pid, syscall.SIGKILL) == nil {
			before, killedAt = now, time.Now()
		}
	}
	return errors.New("PostgreSQL did not recover after the death of a backend")
}

// count returns the number that a query returns, and false if the database is away.
func (d *database) count(ctx context.Context, sql string, arguments ...any) (n int, ok bool) {
	ctx, cancel := context.WithTimeout(ctx, askMax)
	defer cancel()
	return n, d.pool.QueryRow(ctx, sql, arguments...).Scan(&n) == nil
}

// positions returns the offset of the consumer's next message in each partition.
func (d *database) positions(ctx context.Context) map[int32]int64 {
	all := map[int32]int64{}
	rows, err := d.pool.Query(ctx, "SELECT partition, next_offset FROM message_offsets WHERE consumer = $1 AND source = $2", consumerName, topic)
	if err != nil {
		return nil
	}
	var partition int32
	var next int64
	if _, err := pgx.ForEachRow(rows, []any{&partition, &next}, func() error {
		all[partition] = next
		return nil
	}); err != nil {
		return nil
	}
	return all
}

func (d *database) close() error {
	var errs []error
	if d.pool != nil {
		d.pool.Close()
	}
	if d.proxy != nil {
		errs = append(errs, d.proxy.Close())
	}
	if d.server != nil {
		errs = append(errs, d.server.Stop())
	}
	return errors.Join(errs...)
}
