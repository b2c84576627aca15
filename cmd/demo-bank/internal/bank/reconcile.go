package bank

import (
	"context"

	"github.com/jackc/pgx/v5"
)

// made has the processor's lists, which an audit compares with the books. It is nil if the bank has
// no processor.
type made struct {
	processor *Processor
	instance  string
	reachable bool
	kinds     [2]madeKind // charges and payouts
}

// madeKind is one list, and the result of its comparison.
type madeKind struct {
	path     string
	postings string // selects the postings of an instance: id at the processor, amount
	items    []item

	withoutPosting int64
	// Postings without an item in the list, and second and later postings of an item.
	missing []posting
}

type posting struct {
	id     string
	amount int64
	nth    int64 // 1 for its item's first posting
}

// made reads the processor's lists. If that fails, the result is not reachable.
func (p *Processor) made(ctx context.Context) *made {
	if p == nil {
		return nil
	}
	m := &made{processor: p, kinds: [2]madeKind{
		{path: "/charges", postings: `SELECT charge, amount, id FROM topups WHERE instance = $4`},
		{path: "/payouts", postings: `SELECT payout, amount, id FROM payouts WHERE instance = $4 AND state = 'posted'`},
	}}
	m.reachable = m.read(ctx, func(k *madeKind, items []item) { k.items = items })
	return m
}

// read reads both lists. It reports false if that fails, or if the lists come from another instance
// than the earlier ones.
func (m *made) read(ctx context.Context, take func(*madeKind, []item)) bool {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	for i := range m.kinds {
		items, instance, err := m.processor.list(ctx, m.kinds[i].path)
		if err != nil || m.instance != "" && instance != m.instance {
			return false
		}
		m.instance = instance
		take(&m.kinds[i], items)
	}
	return true
}

// compare queues the comparison with the books.
func (m *made) compare(batch *pgx.Batch) {
	if m == nil || !m.reachable {
		return
	}
	for i := range m.kinds {
		k := &m.kinds[i]
		var ids, keys []string
		var amounts []int64
		for _, item := range k.items {
			ids, amounts, keys = append(ids, item.ID), append(amounts, item.Amount), append(keys, item.Key)
		}
		with := `
			WITH made AS MATERIALIZED (SELECT * FROM unnest($1::text[], $2::bigint[], $3::text[]) AS m (id, amount, key)),
			posted AS MATERIALIZED (
				SELECT id, amount, row_number() OVER (PARTITION BY id ORDER BY number) AS nth FROM (` + k.postings + `) AS p (id, amount, number)
			) `
		batch.Queue(with+`
			SELECT count(*) FROM made m
			WHERE NOT EXISTS (SELECT FROM posted p WHERE p.id = m.id AND p.amount = m.amount)
				AND key NOT IN (SELECT derived_key::text FROM idempotency_effects JOIN idempotency_open USING (scope, key))`,
			ids, amounts, keys, m.instance).QueryRow(func(row pgx.Row) error { return row.Scan(&k.withoutPosting) })
		batch.Queue(with+`
			SELECT id, amount, nth FROM posted p
			WHERE nth > 1 OR NOT EXISTS (SELECT FROM made m WHERE p.id = m.id AND p.amount = m.amount)`,
			ids, amounts, keys, m.instance).Query(func(rows pgx.Rows) error {
			var p posting
			_, err := pgx.ForEachRow(rows, []any{&p.id, &p.amount, &p.nth}, func() error {
				k.missing = append(k.missing, p)
				return nil
			})
			return err
		})
	}
}

// fill sets the audit's fields about the processor, after the snapshot was read.
func (m *made) fill(ctx context.Context, a *Audit) {
	if m == nil {
		return
	}
	a.PSP = ProcessorUnreachable
	if !m.reachable {
		return
	}
	if len(m.kinds[0].missing)+len(m.kinds[1].missing) > 0 {
		// They may have been made after the first look.
		if !m.read(ctx, (*madeKind).found) {
			return
		}
	}
	a.PSP = m.instance
	charges, payouts := &m.kinds[0], &m.kinds[1]
	count := func(n int64) *int64 { return &n }
	a.Charges = count(int64(len(charges.items)))
	a.ChargesWithoutPosting, a.PostingsWithoutCharge = count(charges.withoutPosting), count(int64(len(charges.missing)))
	a.PayoutsWithoutPosting, a.PostingsWithoutPayout = count(payouts.withoutPosting), count(int64(len(payouts.missing)))
}

// found removes from missing the postings with an item in a later list.
func (k *madeKind) found(items []item) {
	amounts := make(map[string]int64, len(items))
	for _, item := range items {
		amounts[item.ID] = item.Amount
	}
	var missing []posting
	for _, p := range k.missing {
		if amount, ok := amounts[p.id]; !ok || amount != p.amount || p.nth > 1 {
			missing = append(missing, p)
		}
	}
	k.missing = missing
}
