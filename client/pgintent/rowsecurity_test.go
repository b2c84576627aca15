package pgintent_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/client/internal/intenttest"
	"github.com/paidonce/idempotency/client/pgintent"
	"github.com/paidonce/idempotency/internal/pgtest"
)

// TestHiddenIntentIsNotCalledDone: an intent that row-level security hides is never reported as
// gone, taken or not pending, and no intent is saved that would never be resumed. The remedies
// work, also on connections that were open before.
func TestHiddenIntentIsNotCalledDone(t *testing.T) {
	t.Parallel()
	for way, name := range []string{"DISABLE", "BYPASSRLS"} {
		for _, policy := range []string{"", "FOR INSERT WITH CHECK (true)"} {
			t.Run(strings.TrimSpace(name+" "+policy), func(t *testing.T) {
				t.Parallel()
				ctx := t.Context()
				database := pgtest.Database(t)
				owner := setupOn(t, database)
				exec := func(sql string) {
					t.Helper()
					if _, err := owner.Exec(ctx, sql); err != nil {
						t.Fatalf("%s: %v", sql, err)
					}
				}
				role := "test_" + strings.ReplaceAll(uuid.NewString(), "-", "")
				exec("CREATE ROLE " + role + " LOGIN PASSWORD '" + role + "'")
				exec("GRANT SELECT, INSERT, UPDATE, DELETE ON idempotency_intents TO " + role)
				defer func() { exec("DROP OWNED BY " + role); exec("DROP ROLE " + role) }()
				config, err := pgxpool.ParseConfig(database)
				if err != nil {
					t.Fatal(err)
				}
				config.ConnConfig.User, config.ConnConfig.Password, config.MaxConns = role, role, 1
				pool, err := pgxpool.NewWithConfig(ctx, config)
				if err != nil {
					t.Fatal(err)
				}
				defer pool.Close()
				store := pgintent.New(pool, &pgintent.Options{PendingAfter: time.Microsecond})
				if _, err := store.Save(ctx, intenttest.Intent("k")); err != nil {
					t.Fatal(err)
				}
				exec("ALTER TABLE idempotency_intents ENABLE ROW LEVEL SECURITY")
				if policy != "" {
					exec("CREATE POLICY p ON idempotency_intents " + policy)
				}
				var text string
				for name, call := range map[string]func() error{
					"save":    func() error { _, err := store.Save(ctx, intenttest.Intent("k")); return err },
					"a new":   func() error { _, err := store.Save(ctx, intenttest.Intent("l")); return err },
					"pending": func() error { _, err := store.Pending(ctx); return err },
					"take":    func() error { _, err := store.Take(ctx, "k"); return err },
					"abandon": func() error { return store.Abandon(ctx, "k") },
					"done":    func() error { return store.Done(ctx, "k") },
				} {
					err := call()
					if !errors.Is(err, pgintent.ErrRowSecurityActive) || errors.Is(err, client.ErrIntentTaken) ||
						errors.Is(err, client.ErrIntentRefused) != (name == "save" || name == "a new") {
						t.Errorf("%s: %v", name, err)
						continue
					}
					text = err.Error()
				}
				_, text, _ = strings.Cut(text, pgintent.ErrRowSecurityActive.Error()+": ")
				remedies := strings.Split(text, ", or ")
				if len(remedies) != 2 {
					t.Fatalf("remedies are %q", remedies)
				}
				remedy, _, _ := strings.Cut(strings.Replace(remedies[way], "...", role, 1), " for ")
				exec(remedy)
				if keys, err := store.Pending(ctx); err != nil || len(keys) != 1 {
					t.Errorf("after %s, %q are pending, %v", remedy, keys, err)
				}
				if intent, err := store.Take(ctx, "k"); err != nil || intent == nil {
					t.Errorf("after %s: %v, %v", remedy, intent, err)
				}
				if before, err := store.Save(ctx, intenttest.Intent("l")); err != nil || before {
					t.Errorf("after %s: %v, %v", remedy, before, err)
				}
			})
		}
	}
}
