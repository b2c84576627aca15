package pgintent_test

import (
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/client/internal/intenttest"
	"github.com/paidonce/idempotency/client/pgintent"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/storage/postgres"
)

// A service that both sends and receives payments may keep its intents through its store's pool,
// even with channel_binding=require.
func TestIntentsKeepChannelBinding(t *testing.T) {
	t.Parallel()
	pool := setupOn(t, pgtest.TLS(t).TLSURL("postgres")+"&channel_binding=require", func(config *pgxpool.Config) { postgres.Configure(config, nil) })
	intents := pgintent.New(pool, nil)
	if _, err := intents.Save(t.Context(), intenttest.Intent("k")); err != nil {
		t.Fatal(err)
	}
	if keys, err := intents.Pending(t.Context()); err != nil || len(keys) != 1 {
		t.Errorf("pending: %q, %v", keys, err)
	}
	if intent, err := intents.Take(t.Context(), "k"); err != nil || intent == nil {
		t.Errorf("taken: %v, %v", intent, err)
	}
}
