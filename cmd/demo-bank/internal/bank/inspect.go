package bank

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
)

// Checks that need only the books. Package check uses the same names in its results.
const (
	MoneyKept          = "money kept"
	OneEffect          = "one effect"
	TwoEntries         = "two entries"
	BalancesAddUp      = "balances add up"
	EffectsRecorded    = "effects recorded"
	RecordsHaveEffects = "records have effects"
)

// ExamplesMax is the maximum number of examples in a [Finding].
const ExamplesMax = 5

// Finding is the result of one check of the books.
type Finding struct {
	Name     string
	Seen     int // number of things checked
	Count    int // number of errors
	Examples []string
}

// Snapshot calls read in one REPEATABLE READ, read-only transaction.
func Snapshot(ctx context.Context, db interface {
	BeginTx(ctx context.Context, options pgx.TxOptions) (pgx.Tx, error)
}, read func(pgx.Tx) error) error {
	tx, err := db.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly})
	if err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rollbackTimeout)
		defer cancel()
		_ = tx.Rollback(ctx) // it wrote nothing
	}()
	return read(tx)
}

// Inspect runs the named checks, or all if none is named, in a snapshot with a search_path that
// finds the bank's schema. ttl is the store's TTL: older rows may have lost their record. An error
// says nothing about the books.
func Inspect(ctx context.Context, tx pgx.Tx, ttl time.Duration, names ...string) ([]Finding, error) {
	var batch pgx.Batch
	findings := inspect(&batch, ttl, names...)
	if err := tx.SendBatch(ctx, &batch).Close(); err != nil {
		return nil, fmt.Errorf("inspect the books: %w", err)
	}
	return findings, nil
}

// inspect queues the statements. The findings are filled in when the batch's results are read.
func inspect(batch *pgx.Batch, ttl time.Duration, names ...string) []Finding {
	findings := make([]Finding, 0, len(statements))
	for _, s := range statements {
		if len(names) > 0 && !slices.Contains(names, s.name) {
			continue
		}
		sql := "WITH " + s.with + " wrong (example) AS MATERIALIZED (" + s.wrong + `)
			SELECT (SELECT count(*) FROM ` + s.subject + `), (SELECT count(*) FROM wrong),
				ARRAY(SELECT example FROM wrong ORDER BY example LIMIT ` + fmt.Sprint(ExamplesMax) + `)`
		var args []any
		if strings.Contains(sql, "$1") {
			args = []any{ttl / time.Microsecond}
		}
		findings = append(findings, Finding{Name: s.name})
		f := &findings[len(findings)-1] // it does not move: the slice has room for all
		batch.Queue(sql, args...).QueryRow(func(row pgx.Row) error { return row.Scan(&f.Seen, &f.Count, &f.Examples) })
	}
	return findings
}

// Cutoff is the common table expression that limits comparisons with records to rows that are
// younger than the TTL, because older records may have expired. $1 is the TTL in microseconds.
//
// It is evaluated while its statement runs, and so after the snapshot was taken. If the snapshot
// lacks a record because the reaper deleted it, that record had expired earlier by the same clock.
// So the reaper can't have deleted the record of a row younger than the cutoff, even if the two
// race. A row and its record have the same created_at, that of their transaction, so both are cut
// at the same point. For a request that called the processor, the record's created_at is earlier
// than the row's, and the record expires more than a TTL after the row was written. So each row
// after the cutoff still has its record, and each record after the cutoff has a row after the
// cutoff.
const Cutoff = `cutoff AS MATERIALIZED (SELECT clock_timestamp() - $1 * interval '1 microsecond' AS at)`

// effects selects the rows that keyed requests wrote.
const effects = `
	SELECT 'transfer ' || id AS effect, scope, key, attempt_id, created_at FROM transfers WHERE key IS NOT NULL
	UNION ALL
	SELECT 'order ' || id, scope, key, attempt_id, created_at FROM orders WHERE key IS NOT NULL
	UNION ALL
	SELECT 'account ' || id, scope, key, attempt_id, created_at FROM accounts WHERE key IS NOT NULL
	UNION ALL
	SELECT 'top-up ' || id, scope, key, attempt_id, created_at FROM topups WHERE key IS NOT NULL
	UNION ALL
	SELECT 'payout ' || id, scope, key, attempt_id, ended_at FROM payouts WHERE key IS NOT NULL AND state = 'posted'
	UNION ALL
	SELECT 'receipt ' || id, scope, key, attempt_id, created_at FROM receipts WHERE key IS NOT NULL`

// written selects the effects after the cutoff, all records of 2xx answers, and of these records
// the ones after the cutoff.
const written = Cutoff + `,
	effects AS MATERIALIZED (SELECT e.* FROM cutoff, (` + effects + `) e WHERE e.created_at > cutoff.at),
	all_records AS MATERIALIZED (
		SELECT r.scope, r.key, r.attempt_id, r.created_at FROM idempotency_keys r
		WHERE r.status BETWEEN 200 AND 299 AND NOT starts_with(r.scope, '` + idempotency.MessageScopePrefix + `')
	),
	records AS (SELECT r.* FROM all_records r, cutoff WHERE r.created_at > cutoff.at),`

// atProcessor and atHeld select entries on the bank's own accounts, and ofHold the two entries with
// which a payout begins.
const (
	atProcessor = `starts_with(e.account, '` + processorAccount + `')`
	atHeld      = `starts_with(e.account, '` + heldAccount + `')`
	ofHold      = `e.account = p.account AND e.amount = -p.amount OR ` + atHeld + ` AND e.amount = p.amount`
)

// negative selects accounts with a negative balance, except the processor's: it owes the money that
// came in.
const negative = `balance < 0 AND NOT starts_with(id, '` + processorAccount + `')`

// statement is one check of the books: subject selects the things to check, and wrong selects one
// row for each error with one column, example.
type statement struct {
	name           string
	with           string // common table expressions for both
	subject, wrong string // after FROM, after WITH
}

// statements run in this order.
var statements = [...]statement{
	{
		name: MoneyKept, subject: "accounts",
		wrong: `
			SELECT format('balances are %s where %s were put in', sum(balance), sum(opening_balance))
			FROM accounts HAVING sum(balance) <> sum(opening_balance)
			UNION ALL
			SELECT format('account %s has %s', id, balance) FROM accounts WHERE ` + negative,
	},
	{
		name: OneEffect, subject: "keys",
		with: `
			keys AS MATERIALIZED (
				SELECT scope, key, count(*) AS effects, min(effect) AS one, max(effect) AS other FROM (` + effects + `) e GROUP BY scope, key
			),`,
		wrong: `
			SELECT format('%s/%s: has %s effects, among them %s and %s', scope, key, effects, one, other) FROM keys WHERE effects > 1`,
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
				UNION ALL
				SELECT 'top-up ' || t.id, count(e.id), COALESCE(sum(e.amount), 0),
					count(*) FILTER (WHERE ` + atProcessor + ` AND e.amount = -t.amount),
					count(*) FILTER (WHERE e.account = t.account AND e.amount = t.amount)
				FROM topups t LEFT JOIN entries e ON e.topup_id = t.id GROUP BY t.id
				UNION ALL
				SELECT 'hold of payout ' || p.id, count(e.id), COALESCE(sum(e.amount), 0),
					count(*) FILTER (WHERE e.account = p.account), count(*) FILTER (WHERE ` + atHeld + `)
				FROM payouts p LEFT JOIN entries e ON e.payout_id = p.id AND (` + ofHold + `) GROUP BY p.id
				UNION ALL
				-- A payout has no end while its request is open.
				SELECT 'end of payout ' || p.id || ', ' || p.state, count(e.id), COALESCE(sum(e.amount), 0),
					count(*) FILTER (WHERE ` + atHeld + ` AND e.amount = -p.amount),
					count(*) FILTER (WHERE e.amount = p.amount AND CASE p.state WHEN 'posted' THEN ` + atProcessor + ` WHEN 'released' THEN e.account = p.account END)
				FROM payouts p LEFT JOIN entries e ON e.payout_id = p.id AND NOT (` + ofHold + `)
				WHERE p.state <> 'held' OR e.id IS NOT NULL OR NOT EXISTS (SELECT FROM idempotency_open o WHERE o.scope = p.scope AND o.key = p.key)
				GROUP BY p.id
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
			WHERE NOT EXISTS (SELECT FROM all_records r WHERE r.attempt_id = e.attempt_id AND r.scope = e.scope AND r.key = e.key)`,
	},
	{
		name: RecordsHaveEffects, subject: "records", with: written,
		wrong: `
			SELECT format('%s/%s: a recorded 2xx whose attempt made nothing', r.scope, r.key) FROM records r
			WHERE NOT EXISTS (SELECT FROM effects e WHERE e.attempt_id = r.attempt_id AND e.scope = r.scope AND e.key = r.key)`,
	},
}
