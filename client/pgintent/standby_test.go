package pgintent_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/client/internal/intenttest"
	"github.com/paidonce/idempotency/client/pgintent"
	"github.com/paidonce/idempotency/internal/pgserver"
	"github.com/paidonce/idempotency/internal/pgtest"
)

// TestCanceledWaitForTheStandbyIsAnError: a failover could undo a write if its COMMIT did not wait.
// An abandoned intent would be sent after its caller got not-executed, and two holders would each
// believe to be the only one.
func TestCanceledWaitForTheStandbyIsAnError(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "starts a PostgreSQL of its own")
	ctx := t.Context()
	server, err := pgserver.Start(ctx, &pgserver.Options{Settings: map[string]string{"fsync": "off", "synchronous_standby_names": "nobody"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Stop() })
	pool := setupOn(t, server.URL(), func(c *pgxpool.Config) {
		c.ConnConfig.RuntimeParams["synchronous_commit"] = "local" // for Create; the store itself demands more
		c.ConnConfig.RuntimeParams["client_min_messages"] = "error"
		pgintent.Configure(c.ConnConfig)
	})
	holder := pgintent.New(pool, nil)
	hasty := pgintent.New(pool, &pgintent.Options{PendingAfter: time.Microsecond})
	for _, step := range []struct {
		name string
		do   func(ctx context.Context) error
	}{
		{"Save", func(ctx context.Context) error { _, err := holder.Save(ctx, intenttest.Intent("k")); return err }},
		{"Save that takes over", func(ctx context.Context) error { _, err := hasty.Save(ctx, intenttest.Intent("k")); return err }},
		{"Take", func(ctx context.Context) error { _, err := hasty.Take(ctx, "k"); return err }},
		{"Abandon", func(ctx context.Context) error { return hasty.Abandon(ctx, "k") }},
	} {
		done := make(chan error, 1)
		go func() { done <- step.do(ctx) }()
		cancelWaiting(t, pool)
		if err := <-done; err == nil || errors.Is(err, client.ErrIntentRefused) || errors.Is(err, client.ErrIntentTaken) {
			t.Errorf("%s: error is %v, want one of which nothing is known", step.name, err)
		}
	}
}

// TestWarningOfATriggerIsItsOwn: only the server's own warning means that a commit did not wait.
// Take and Abandon of a key that is not kept find that out on the same connection: the pool may
// have only one.
func TestWarningOfATriggerIsItsOwn(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	pool := setup(t, func(c *pgxpool.Config) {
		c.MaxConns = 1
		pgintent.Configure(c.ConnConfig)
	})
	if _, err := pool.Exec(ctx, `CREATE FUNCTION warn() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE WARNING 'low funds'; RETURN NULL; END $$;
		CREATE TRIGGER warn AFTER INSERT OR UPDATE OR DELETE ON idempotency_intents FOR EACH ROW EXECUTE FUNCTION warn()`); err != nil {
		t.Fatal(err)
	}
	store := pgintent.New(pool, nil)
	if _, err := store.Save(ctx, intenttest.Intent("k")); err != nil {
		t.Error(err)
	}
	if intent, err := store.Take(ctx, "k"); intent == nil || err != nil {
		t.Error(err)
	}
	if err := store.Abandon(ctx, "k"); err != nil {
		t.Error(err)
	}
	if intent, err := store.Take(ctx, "k"); intent != nil || err != nil {
		t.Error(err)
	}
	if err := store.Abandon(ctx, "k"); !errors.Is(err, client.ErrIntentTaken) {
		t.Error(err)
	}
}

// cancelWaiting cancels the next wait for a standby.
func cancelWaiting(t *testing.T, pool *pgxpool.Pool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		var n int
		err := pool.QueryRow(context.Background(), "SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity WHERE wait_event = 'SyncRep'").Scan(&n)
		switch {
		case err != nil:
			t.Fatal(err)
		case n > 0:
			return
		case time.Now().After(deadline):
			t.Fatal("no COMMIT waits for a standby")
		}
	}
}
