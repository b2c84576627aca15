package migrations_test

import (
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

// Migrations run on connections with channel_binding=require, and with a store's pool.
func TestMigrationsKeepChannelBinding(t *testing.T) {
	t.Parallel()
	url := pgtest.TLS(t).TLSURL("postgres") + "&channel_binding=require"
	for name, change := range map[string]func(*pgxpool.Config){
		"a plain pool":   func(*pgxpool.Config) {},
		"a store's pool": func(config *pgxpool.Config) { postgres.Configure(config, nil) },
	} {
		pool := open(t, url, change)
		if err := migrations.Up(t.Context(), postgres.New(pool, nil), nil); err != nil {
			t.Errorf("%s: up: %v", name, err)
		}
		if err := migrations.Down(t.Context(), postgres.New(pool, nil), nil); err != nil {
			t.Errorf("%s: down: %v", name, err)
		}
	}
}
