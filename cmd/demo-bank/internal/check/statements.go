package check

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// statement is a check that the books alone decide: subject is what it looks at, wrong has a row for each wrong, with
// one column, example.
type statement struct {
	name string
	with string // common table expressions, of both
	// after FROM and WITH
	subject, wrong string
}

func (s *statement) run(ctx context.Context, tx pgx.Tx, ttl time.Duration) (Result, error) {
	r := result(s.name)
	sql := "WITH " + s.with + " wrong (example) AS MATERIALIZED (" + s.wrong + `)
		SELECT (SELECT count(*) FROM ` + s.subject + `), (SELECT count(*) FROM wrong),
			ARRAY(SELECT example FROM wrong ORDER BY example LIMIT ` + fmt.Sprint(ExamplesMax) + `)`
	var args []any
	if strings.Contains(sql, "$1") {
		args = []any{ttl / time.Microsecond}
	}
	if err := tx.QueryRow(ctx, sql, args...).Scan(&r.Seen, &r.Count, &r.Examples); err != nil {
		return r, fmt.Errorf("%s: %w", s.name, err)
	}
	return r, nil
}

// written is what keyed requests wrote and recorded what was recorded of them, among those younger than the TTL. The
// cutoff is read after the snapshot was taken: a record whose deletion the snapshot sees was older by then. A row and
// its record carry the created_at of their one transaction, so both are cut at the same point.
const written = `
	cutoff AS MATERIALIZED (SELECT clock_timestamp() - $1 * interval '1 microsecond' AS at),
	effects AS MATERIALIZED (
		SELECT e.* FROM cutoff, (
			SELECT 'transfer ' || id AS effect, scope, key, attempt_id, created_at FROM transfers WHERE key IS NOT NULL
			UNION ALL
			SELECT 'order ' || id, scope, key, attempt_id, created_at FROM orders WHERE key IS NOT NULL
			UNION ALL
			SELECT 'account ' || id, scope, key, attempt_id, created_at FROM accounts WHERE key IS NOT NULL
		) e WHERE e.created_at > cutoff.at
	),
	records AS MATERIALIZED (
		SELECT r.scope, r.key, r.attempt_id FROM idempotency_keys r, cutoff
		WHERE r.status BETWEEN 200 AND 299 AND r.created_at > cutoff.at
	),`

// statements are run in this order; the first is Money's.
var statements = [...]statement{
	{
		name: MoneyKept, subject: "accounts",
		wrong: `
			SELECT format('balances are %s where %s were put in', sum(balance), sum(opening_balance))
			FROM accounts HAVING sum(balance) <> sum(opening_balance)
			UNION ALL
			SELECT format('account %s has %s', id, balance) FROM accounts WHERE balance < 0`,
	},
	{
		name: TwoEntries, subject: "moves",
		with: `
			moves AS MATERIALIZED (
				SELECT 'transfer ' || t.id AS move, count(e.id) AS entries, COALESCE(sum(e.amount), 0) AS total,
					count(*) FILTER (WHERE e.account = t.from_account AND e.amount = -t.amount) AS debits,
					count(*) FILTER (WHERE e.account = t.to_account AND e.amount = t.amount) AS credits
				FROM transfers t LEFT JOIN entries e ON e.transfer_id = t.id GROUP BY t.id
				UNION ALL
				SELECT 'order ' || o.id, count(e.id), COALESCE(sum(e.amount), 0),
					count(*) FILTER (WHERE e.account = o.account AND e.amount = -o.amount),
					count(*) FILTER (WHERE e.account <> o.account AND e.amount = o.amount)
				FROM orders o LEFT JOIN entries e ON e.order_id = o.id GROUP BY o.id
			),`,
		wrong: `
			SELECT format('%s has %s entries that sum to %s, %s of its debit and %s of its credit', move, entries, total, debits, credits)
			FROM moves WHERE (entries, debits, credits) <> (2, 1, 1)`,
	},
	{
		name: BalancesAddUp, subject: "accounts",
		with: `totals AS (SELECT account, sum(amount) AS total FROM entries GROUP BY account),`,
		wrong: `
			SELECT format('account %s has %s, and its opening balance and entries make %s', a.id, a.balance, a.opening_balance + COALESCE(t.total, 0))
			FROM accounts a LEFT JOIN totals t ON t.account = a.id
			WHERE a.balance <> a.opening_balance + COALESCE(t.total, 0)`,
	},
	{
		name: EffectsRecorded, subject: "effects", with: written,
		wrong: `
			SELECT format('%s/%s: no recorded 2xx of the attempt that made %s', e.scope, e.key, e.effect) FROM effects e
			WHERE NOT EXISTS (SELECT FROM records r WHERE r.attempt_id = e.attempt_id AND r.scope = e.scope AND r.key = e.key)`,
	},
	{
		name: RecordsHaveEffects, subject: "records", with: written,
		wrong: `
			SELECT format('%s/%s: a recorded 2xx whose attempt made nothing', r.scope, r.key) FROM records r
			WHERE NOT EXISTS (SELECT FROM effects e WHERE e.attempt_id = r.attempt_id AND e.scope = r.scope AND e.key = r.key)`,
	},
}
