package endtoend_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/internal/pgtest"
)

// plan is the size of a proof.
type plan struct {
	Messages int // divisible by Twins
	Twins    int // messages that are published twice
	Keys     int // no divisor in common with Messages / Twins, so that each key has twins
	Rounds   int // in each a process is paused, and two are killed
}

// books are the counts by SQL in the end.
type books struct {
	Effects    int `json:"effects"`
	Missing    int `json:"missing"`      // messages without an effect
	Doubled    int `json:"doubled"`      // effects beside the first one of a message
	Unexpected int `json:"unexpected"`   // effects of no message
	OutOfOrder int `json:"out_of_order"` // effects behind a later one of their key
	Parked     int `json:"parked"`       // messages that wait, or are dead
}

// read counts the effects of the plan's messages. It knows the messages from the plan, and not from
// the outbox or the broker.
func (b *books) read(ctx context.Context, pool *pgxpool.Pool, plan *plan) error {
	err := pool.QueryRow(ctx, `
		WITH expected AS (
			SELECT $3 || n % $2::int AS key, n / $2::int + 1 AS version FROM generate_series(0, $1::int - 1) AS n
		), found AS (
			SELECT key, version, count(*) AS n FROM effects GROUP BY key, version
		), ordered AS (
			SELECT version, max(version) OVER (PARTITION BY key ORDER BY id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS latest FROM effects
		)
		SELECT (SELECT count(*) FROM effects),
			(SELECT count(*) FROM expected LEFT JOIN found USING (key, version) WHERE found.n IS NULL),
			(SELECT coalesce(sum(n - 1), 0) FROM found),
			(SELECT coalesce(sum(n), 0) FROM found LEFT JOIN expected USING (key, version) WHERE expected.key IS NULL),
			(SELECT count(*) FROM ordered WHERE version < latest)`, plan.Messages, plan.Keys, keyPrefix).
		Scan(&b.Effects, &b.Missing, &b.Doubled, &b.Unexpected, &b.OutOfOrder)
	if err != nil {
		return fmt.Errorf("judge: %w", err)
	}
	return nil
}

// broken returns the faults as sentences; none if all is well.
func (b *books) broken(plan *plan) (wrong []string) {
	for _, c := range []struct {
		n    int
		what string
	}{
		{b.Missing, "messages have no effect"}, {b.Doubled, "effects are doubles"}, {b.Unexpected, "effects are of no message"},
		{b.OutOfOrder, "effects are out of the order of their key"}, {b.Parked, "messages are parked"},
	} {
		if c.n != 0 {
			wrong = append(wrong, fmt.Sprintf("%d %s", c.n, c.what))
		}
	}
	if b.Effects != plan.Messages {
		wrong = append(wrong, fmt.Sprintf("%d effects of %d messages", b.Effects, plan.Messages))
	}
	return wrong
}

// A judge that can find no error proves nothing: here it finds each error that the test plants.
func TestJudgeFindsEachWrong(t *testing.T) {
	t.Parallel()
	plan := &plan{Messages: 20, Twins: 5, Keys: 3}
	good := books{Effects: 20}
	for name, test := range map[string]struct {
		sql  string
		want books
	}{
		"nothing":         {"SELECT 1", good},
		"a missing one":   {"DELETE FROM effects WHERE key = 'account-1' AND version = 7", books{Effects: 19, Missing: 1}},
		"a double":        {"INSERT INTO effects (key, version, process) SELECT key, version, 0 FROM effects WHERE key = 'account-1' AND version = 7", books{Effects: 21, Doubled: 1}},
		"a late double":   {"INSERT INTO effects (key, version, process) VALUES ('account-0', 1, 0)", books{Effects: 21, Doubled: 1, OutOfOrder: 1}},
		"a foreign one":   {"INSERT INTO effects (key, version, process) VALUES ('account-2', 7, 0)", books{Effects: 21, Unexpected: 1}},
		"another order":   {"DELETE FROM effects WHERE key = 'account-0' AND version = 3; INSERT INTO effects (key, version, process) VALUES ('account-0', 3, 0)", books{Effects: 20, OutOfOrder: 1}},
		"nothing is left": {"DELETE FROM effects", books{Missing: 20}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pool := pgtest.Pool(t, pgtest.Database(t), nil)
			if err := makeTables(t.Context(), pool, plan.Keys); err != nil {
				t.Fatal(err)
			}
			for n := range plan.Messages {
				if _, err := pool.Exec(t.Context(), "INSERT INTO effects (key, version, process) VALUES ($1, $2, 0)", fmt.Sprint(keyPrefix, n%plan.Keys), n/plan.Keys+1); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := pool.Exec(t.Context(), test.sql); err != nil {
				t.Fatal(err)
			}
			var got books
			if err := got.read(t.Context(), pool, plan); err != nil || got != test.want {
				t.Errorf("%+v, %v; want %+v", got, err, test.want)
			}
			if wrong := got.broken(plan); (len(wrong) == 0) != (got == good) {
				t.Errorf("%+v: %q", got, wrong)
			}
		})
	}
}
