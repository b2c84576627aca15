package postgres_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
)

// State that a handler leaves in its session may fail a later handler that leaves the same. It
// never separates an effect from its record.
func TestWhatAHandlerLeavesInItsSessionPartsNoEffectFromItsRecord(t *testing.T) {
	t.Parallel()
	for _, sql := range []string{
		"CREATE TEMP TABLE batch (id int)", "PREPARE mine AS SELECT 1", "DEALLOCATE ALL", "DISCARD TEMP", "SELECT pg_advisory_lock(1)",
		"CREATE TEMP TABLE idempotency_keys (LIKE public.idempotency_keys)", "SET search_path = pg_temp, public",
	} {
		t.Run(sql, func(t *testing.T) {
			t.Parallel()
			b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns = 1 }})
			other := setupOther(t, b)
			for i := range 6 {
				result := b.do(t, request(fmt.Sprint(i/2), ""), func(ctx context.Context, tx pgx.Tx) int {
					if _, err := tx.Exec(ctx, sql); err != nil {
						return 500
					}
					if _, err := tx.Exec(ctx, "INSERT INTO public.effects (name) VALUES ('x')"); err != nil {
						return 500
					}
					return 201
				})
				effects, records := other.effects(t), other.count(t, "SELECT count(*) FROM idempotency_keys")
				if effects != records || effects > i/2+1 {
					t.Fatalf("request %d, %s: %d effects and %d records", i, result.Outcome, effects, records)
				}
				if known := result.Outcome == idempotency.OutcomeExecuted || result.Outcome == idempotency.OutcomeReplayed; known && records != i/2+1 {
					t.Errorf("request %d is %s, and there are %d records", i, result.Outcome, records)
				}
			}
		})
	}
}
