package postgres_test

import (
	"context"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/storagetest"
)

func TestConformance(t *testing.T) {
	t.Parallel()
	for name, mode := range map[string]struct {
		exec      pgx.QueryExecMode
		isolation pgx.TxIsoLevel
	}{
		"default":      {exec: pgx.QueryExecModeCacheStatement},
		"exec":         {exec: pgx.QueryExecModeExec},
		"serializable": {exec: pgx.QueryExecModeCacheStatement, isolation: pgx.Serializable},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if name != "default" {
				pgtest.Slow(t, "runs the whole suite again, in another mode")
			}
			// Above READ COMMITTED the claim's snapshot may be older than its lock; the primary key
			// undoes the second run.
			features := storagetest.Features{RunsAgain: mode.isolation != ""}
			// On a slow machine 64 requests wait longer for one of 8 connections than a client
			// should.
			options := &postgres.Options{Isolation: mode.isolation, AcquireTimeout: 20 * time.Second}
			storagetest.Run(t, features, func(t *testing.T) *storagetest.Harness {
				return newHarness(t, options, mode.exec)
			})
		})
	}
}

func newHarness(t *testing.T, options *postgres.Options, mode pgx.QueryExecMode) *storagetest.Harness {
	b := setup(t, &setupOptions{store: options, configure: func(config *pgxpool.Config) {
		config.ConnConfig.DefaultQueryExecMode = mode
		config.MaxConns = 8 // fewer than a case would need if it lost connections
	}})
	exec := func(ctx context.Context, sql string, arguments ...any) error {
		_, err := b.pool.Exec(ctx, sql, arguments...)
		return err
	}
	return &storagetest.Harness{
		Store: b.store,
		Write: func(ctx context.Context, name string) error {
			_, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO effects (name) VALUES ($1)", name)
			return err
		},
		Written: func(ctx context.Context, name string) (n int, err error) {
			err = b.pool.QueryRow(ctx, "SELECT count(*) FROM effects WHERE name = $1", name).Scan(&n)
			return n, err
		},
		Break: func(ctx context.Context) error {
			_, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO effects (name) VALUES (NULL)")
			return err
		},
		Reopen: func(ctx context.Context) (idempotency.Store, error) {
			pool, err := pgxpool.NewWithConfig(ctx, b.pool.Config())
			if err != nil {
				return nil, err
			}
			t.Cleanup(pool.Close)
			return postgres.New(pool, options), nil
		},
		Advance: func(ctx context.Context, d time.Duration) error {
			return exec(ctx, "UPDATE idempotency_keys SET created_at = created_at - $1::interval, expires_at = expires_at - $1::interval", d)
		},
		DeleteExpired: b.store.DeleteExpired,
		Record: func(ctx context.Context, claim *idempotency.Claim, answer *idempotency.Answer) error {
			return exec(ctx, `INSERT INTO idempotency_keys
				(created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)
				VALUES (now(), now() + $1::interval, $2, $3, $4, $5, $6, $7, '\x0100', $8)`,
				claim.TTL, answer.Status, claim.Fingerprint.Version, claim.Attempt.String(), claim.Key.Scope, claim.Key.Value, claim.Fingerprint.Sum[:], answer.Body)
		},
	}
}
