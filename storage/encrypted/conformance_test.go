package encrypted_test

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/storage/encrypted"
	"github.com/paidonce/idempotency/storage/memory"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/storagetest"
)

// Encryption breaks no promise of the wrapped store.
func TestConformance(t *testing.T) {
	t.Parallel()
	t.Run("memory", func(t *testing.T) {
		t.Parallel()
		features := storagetest.Features{WritesStay: true, NotDurable: true, ClaimsAreCertain: true, NotKept: true}
		storagetest.Run(t, features, func(*testing.T) *storagetest.Harness {
			var now atomic.Int64
			now.Store(time.Date(2025, 7, 1, 12, 0, 0, 0, time.UTC).UnixNano())
			inner := memory.New(&memory.Options{Now: func() time.Time { return time.Unix(0, now.Load()) }})
			return &storagetest.Harness{
				Store:         encrypted.New(inner, oneKey),
				Advance:       func(_ context.Context, d time.Duration) error { now.Add(int64(d)); return nil },
				DeleteExpired: inner.DeleteExpired,
			}
		})
	})
	t.Run("postgres", func(t *testing.T) {
		t.Parallel()
		storagetest.Run(t, storagetest.Features{}, newHarness)
	})
}

func newHarness(t *testing.T) *storagetest.Harness {
	// On a slow machine many requests wait for few connections.
	options := &postgres.Options{AcquireTimeout: 20 * time.Second}
	d := testservice.New(t, options)
	store := encrypted.New(d.Store, oneKey)
	exec := func(ctx context.Context, sql string, arguments ...any) error {
		_, err := d.Pool.Exec(ctx, sql, arguments...)
		return err
	}
	return &storagetest.Harness{
		Store: store,
		Write: func(ctx context.Context, name string) error {
			_, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO effects (name) VALUES ($1)", name)
			return err
		},
		Written: func(ctx context.Context, name string) (n int, err error) {
			err = d.Pool.QueryRow(ctx, "SELECT count(*) FROM effects WHERE name = $1", name).Scan(&n)
			return n, err
		},
		Break: func(ctx context.Context) error {
			_, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO effects (name) VALUES (NULL)")
			return err
		},
		Reopen: func(ctx context.Context) (idempotency.Store, error) {
			pool, err := pgxpool.NewWithConfig(ctx, d.Pool.Config())
			if err != nil {
				return nil, err
			}
			t.Cleanup(pool.Close)
			return encrypted.New(postgres.New(pool, options), oneKey), nil
		},
		Advance: func(ctx context.Context, d time.Duration) error {
			return exec(ctx, "UPDATE idempotency_keys SET created_at = created_at - $1::interval, expires_at = expires_at - $1::interval", d)
		},
		DeleteExpired: d.Store.DeleteExpired,
		Record: func(ctx context.Context, claim *idempotency.Claim, answer *idempotency.Answer) error {
			return exec(ctx, `INSERT INTO idempotency_keys
				(created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)
				VALUES (now(), now() + $1::interval, $2, $3, $4, $5, $6, $7, '\x0100', $8)`,
				claim.TTL, answer.Status, claim.Fingerprint.Version, claim.Attempt.String(), claim.Key.Scope, claim.Key.Value, claim.Fingerprint.Sum[:], store.Seal(claim, answer).Body)
		},
	}
}

// The timeouts of a wrapped store are still compared with the engine's.
func TestBudgetOfTheStoreWithinIsChecked(t *testing.T) {
	t.Parallel()
	d := testservice.New(t, nil)
	for handlerTimeout, fits := range map[time.Duration]bool{10 * time.Second: true, 30 * time.Second: false} {
		panicked := func() (panicked bool) {
			defer func() { panicked = recover() != nil }()
			idempotency.NewEngine(encrypted.New(d.Store, oneKey), &idempotency.Options{Timeouts: idempotency.Timeouts{Handler: handlerTimeout}})
			return false
		}()
		if panicked == fits {
			t.Errorf("a Timeouts.Handler of %v panics: %v", handlerTimeout, panicked)
		}
	}
	// This store has no timeouts.
	idempotency.NewEngine(encrypted.New(memory.New(nil), oneKey), &idempotency.Options{Timeouts: idempotency.Timeouts{Handler: time.Hour}})
}
