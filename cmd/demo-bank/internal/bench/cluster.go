package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/internal/pgserver"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

// cluster is a PostgreSQL. Its data outlives its restarts, which switch fsync.
type cluster struct {
	dir    string
	config Config
	server *pgserver.Server
	admin  *pgx.Conn
	proxy  *pgfault.Proxy
	fsync  string // the current setting; empty if it does not run
	made   bool   // the tables exist
}

// restart starts PostgreSQL, or restarts it if its fsync differs.
func (c *cluster) restart(ctx context.Context, fsync string) error {
	if c.fsync == fsync {
		return nil
	}
	if err := c.stop(); err != nil {
		return err
	}
	if fsync == "on" {
		// Pages written without fsync must not slow down the measurements with it.
		syncDisks()
	}
	if c.dir == "" {
		dir, err := os.MkdirTemp("", "demo-bank-bench-")
		if err != nil {
			return fmt.Errorf("make a folder for the run: %w", err)
		}
		c.dir = dir
		if err := os.Chmod(dir, 0o755); err != nil { // PostgreSQL's account passes through
			return fmt.Errorf("make a folder for the run: %w", err)
		}
	}
	server, err := pgserver.Start(ctx, &pgserver.Options{DataDir: filepath.Join(c.dir, "postgres"), Settings: c.settings(fsync)})
	if err != nil {
		return err
	}
	c.server, c.fsync = server, fsync
	if c.admin, err = pgx.Connect(ctx, server.URL()); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	return c.make(ctx, server.URL())
}

// settings returns PostgreSQL's settings. Checkpoints and autovacuum run only when requested,
// between two settings: otherwise chance would decide which designs they slow down.
func (c *cluster) settings(fsync string) map[string]string {
	connections := 32 // our own, and the reserved ones
	for _, clients := range append([]int{waitPoolSize}, c.config.Clients...) {
		connections = max(connections, 32+(1+2*2)*max(clients, c.config.PoolSize))
	}
	return map[string]string{
		"fsync": fsync, "max_connections": strconv.Itoa(connections), "shared_buffers": "256MB",
		"autovacuum": "off", "checkpoint_timeout": "1d", "max_wal_size": "8GB", "min_wal_size": "1GB",
	}
}

// make makes the bank's tables, those of the rivals, and a table of records for each number of
// keys, if they are missing.
func (c *cluster) make(ctx context.Context, url string) error {
	if _, err := c.admin.Exec(ctx, "SET search_path = "+bank.Schema); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	if c.made {
		return nil
	}
	c.made = true
	pool, err := pgxpool.New(ctx, url)
	if err != nil {
		return fmt.Errorf("make the tables: %w", err)
	}
	defer pool.Close()
	if err := bank.Migrate(ctx, postgres.New(pool, &postgres.Options{Schema: bank.Schema})); err != nil {
		return err
	}
	for _, keys := range append([]int64{0}, c.config.Keys...) {
		if err := migrations.Up(ctx, postgres.New(pool, &postgres.Options{Schema: schemaOf(keys)}), nil); err != nil {
			return err
		}
	}
	if _, err := c.admin.Exec(ctx, sqlRivalTables); err != nil {
		return fmt.Errorf("make the tables: %w", err)
	}
	return c.makeMessages(ctx)
}

// schemaOf returns the schema of the table that is filled with this number of records.
func schemaOf(keys int64) string { return "keys_" + strconv.FormatInt(keys, 10) }

func tableOf(schema string) string { return pgx.Identifier{schema, postgres.TableName}.Sanitize() }

// reset gives each account its opening balance, and empties all other tables except those that were
// filled. It does not ANALYZE the empty ones: sessions would keep plans that become slow once the
// tables have grown.
func (c *cluster) reset(ctx context.Context) error {
	for _, sql := range []string{
		"TRUNCATE transfers, entries, insert_first_keys, lease_keys, " + tableOf(schemaOf(0)) + " CASCADE", // the tables that refer to these are empty
		"UPDATE accounts SET balance = opening_balance WHERE balance <> opening_balance",
		"VACUUM (ANALYZE) accounts",
		"CHECKPOINT",
	} {
		if _, err := c.admin.Exec(ctx, sql); err != nil {
			return fmt.Errorf("empty the tables: %w", err)
		}
	}
	return nil
}

// check compares the books with each other and with the number of acknowledged transfers.
func (c *cluster) check(ctx context.Context, acknowledged int64) error {
	var made, lost, mismatched, transfers, entries int64
	err := c.admin.QueryRow(ctx, `
		SELECT (SELECT coalesce(sum(balance - opening_balance), 0)::bigint FROM accounts),
		       (SELECT coalesce(sum(amount), 0)::bigint FROM entries),
		       (SELECT count(*) FROM accounts a WHERE balance - opening_balance <> (SELECT coalesce(sum(amount), 0) FROM entries e WHERE e.account = a.id)),
		       (SELECT count(*) FROM transfers),
		       (SELECT count(*) FROM entries)`).Scan(&made, &lost, &mismatched, &transfers, &entries)
	switch {
	case err != nil:
		return fmt.Errorf("check the books: %w", err)
	case made != 0 || lost != 0 || mismatched != 0 || entries != 2*transfers:
		return fmt.Errorf("the books don't balance: %d made, entries' sum %d, %d accounts differ from theirs, %d entries of %d transfers", made, lost, mismatched, entries, transfers)
	case transfers != acknowledged:
		return fmt.Errorf("there are %d transfers, and clients were told of %d", transfers, acknowledged)
	}
	return nil
}

// url returns the URL for the service: through a slow network unless delay is 0.
func (c *cluster) url(delay time.Duration) (string, error) {
	if delay == 0 {
		return c.server.URL(), nil
	}
	network, address, err := pgfault.Upstream(c.server.URL())
	if err != nil {
		return "", err
	}
	if c.proxy == nil {
		if c.proxy, err = pgfault.Start(pgfault.Options{Network: network, Address: address}); err != nil {
			return "", fmt.Errorf("start a proxy: %w", err)
		}
	}
	c.proxy.SetUpstream(network, address)
	c.proxy.SetLatency(delay)
	return c.proxy.URL(c.server.URL()), nil
}

// walBytes returns the amount of WAL so far.
func (c *cluster) walBytes(ctx context.Context) (bytes int64, err error) {
	err = c.admin.QueryRow(ctx, "SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint").Scan(&bytes)
	return bytes, err
}

func (c *cluster) stop() error {
	if c.server == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if c.admin != nil {
		_ = c.admin.Close(ctx) // on an error too the conn is closed
	}
	err := c.server.Stop()
	c.server, c.admin, c.fsync = nil, nil, ""
	return err
}

func (c *cluster) close() error {
	var proxyErr error
	if c.proxy != nil {
		proxyErr = c.proxy.Close()
	}
	err := errors.Join(proxyErr, c.stop())
	if c.dir != "" {
		err = errors.Join(err, os.RemoveAll(c.dir))
	}
	return err
}
