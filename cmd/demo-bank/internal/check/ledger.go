package check

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
)

// snapshot reads the bank's schema in one snapshot.
func snapshot(ctx context.Context, conn *pgx.Conn, read func(pgx.Tx) error) error {
	return bank.Snapshot(ctx, conn, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "SET LOCAL search_path TO "+pgx.Identifier{bank.Schema}.Sanitize()); err != nil {
			return fmt.Errorf("find the schema: %w", err)
		}
		return read(tx)
	})
}

// Ledger compares the history with the books, at rest. It reads one snapshot of the schema
// demo_bank; conn's role must be able to read it. ttl is the store's: an older effect may have lost
// its record. An error means that the books could not be read, and says nothing about the promises.
func Ledger(ctx context.Context, conn *pgx.Conn, ops []Operation, expected []Expectation, ttl time.Duration) ([]Result, error) {
	var results []Result
	err := snapshot(ctx, conn, func(tx pgx.Tx) error {
		var err error
		if results, err = inspected(ctx, tx, ttl); err != nil {
			return err
		}
		b, err := readBooks(ctx, tx)
		if err != nil {
			return err
		}
		if b.declined, err = recorded(ctx, tx, expected); err != nil {
			return err
		}
		gs := groups(ops)
		wanted := expectations(expected)
		results = append(results, b.counted(gs, wanted), b.acknowledged(gs), b.abandoned(expected))
		return nil
	})
	if err != nil {
		return nil, wrap("the books", err)
	}
	return results, nil
}

// Money is [MoneyKept] in one snapshot, for reads while the bank is at work.
func Money(ctx context.Context, conn *pgx.Conn) (r Result, err error) {
	err = snapshot(ctx, conn, func(tx pgx.Tx) error {
		results, err := inspected(ctx, tx, 0, MoneyKept)
		if err == nil {
			r = results[0]
		}
		return err
	})
	return r, wrap("the money", err)
}

// inspected returns the results of the checks that need only the books.
func inspected(ctx context.Context, tx pgx.Tx, ttl time.Duration, names ...string) (results []Result, err error) {
	findings, err := bank.Inspect(ctx, tx, ttl, names...)
	for _, f := range findings {
		r := result(f.Name)
		r.Seen, r.Count, r.Examples = f.Seen, f.Count, f.Examples
		results = append(results, r)
	}
	return results, err
}

// effect is a row that a keyed request wrote.
type effect struct {
	kind, id, from, to string
	amount             int64
}

func (e effect) String() string { return e.kind + " " + e.id }

// books are the effects of all keys in one snapshot.
type books struct {
	effects map[Key][]effect
	// Keys by their first effect, so that examples don't change from run to run.
	order   []Key
	keyless []effect // transfers and orders without a key
	// declined are keys that were given up but have a record.
	declined map[Key]struct{}
}

func readBooks(ctx context.Context, tx pgx.Tx) (*books, error) {
	b := &books{effects: make(map[Key][]effect)}
	rows, err := tx.Query(ctx, `
		SELECT 'transfer', id::text, from_account, to_account, amount, COALESCE(scope, ''), key FROM transfers
		UNION ALL
		SELECT 'order', id::text, account, '', amount, COALESCE(scope, ''), key FROM orders
		UNION ALL
		SELECT 'account', id, '', '', opening_balance, COALESCE(scope, ''), key FROM accounts WHERE key IS NOT NULL
		ORDER BY 1, 2`)
	if err != nil {
		return nil, fmt.Errorf("effects: %w", err)
	}
	var e effect
	var scope string
	var value *string
	if _, err := pgx.ForEachRow(rows, []any{&e.kind, &e.id, &e.from, &e.to, &e.amount, &scope, &value}, func() error {
		if value == nil {
			b.keyless = append(b.keyless, e)
			return nil
		}
		key := Key{scope, *value}
		if len(b.effects[key]) == 0 {
			b.order = append(b.order, key)
		}
		b.effects[key] = append(b.effects[key], e)
		return nil
	}); err != nil {
		return nil, fmt.Errorf("effects: %w", err)
	}
	return b, nil
}

// recorded returns the keys that were given up but have a record.
func recorded(ctx context.Context, tx pgx.Tx, expected []Expectation) (map[Key]struct{}, error) {
	var scopes, keys []string
	for _, e := range expected {
		if e.GivenUp {
			scopes, keys = append(scopes, e.Scope), append(keys, e.Key)
		}
	}
	found := make(map[Key]struct{})
	rows, err := tx.Query(ctx, `
		SELECT k.scope, k.key FROM unnest($1::text[], $2::text[]) AS g (scope, key)
		JOIN idempotency_keys k ON (k.scope, k.key) = (g.scope COLLATE "C", g.key COLLATE "C")`, scopes, keys)
	if err != nil {
		return nil, fmt.Errorf("records: %w", err)
	}
	var key Key
	if _, err := pgx.ForEachRow(rows, []any{&key.Scope, &key.Key}, func() error {
		found[key] = struct{}{}
		return nil
	}); err != nil {
		return nil, fmt.Errorf("records: %w", err)
	}
	return found, nil
}

// counted is [EffectsCounted]: the keys with an effect are those that were acknowledged with 2xx.
// Keys that were given up belong to [GivenUpForGood].
func (b *books) counted(gs []group, wanted map[Key]Expectation) Result {
	r := result(EffectsCounted)
	sent := make(map[Key]bool, len(gs)) // whether it was acknowledged with 2xx
	for i := range gs {
		g := &gs[i]
		first := g.firstPaid()
		sent[g.key] = first != nil
		if first == nil {
			continue
		}
		r.Seen++
		if len(b.effects[g.key]) == 0 {
			r.add("%s: was acknowledged, and nothing is in the books: %s", g.key, first)
		}
	}
	for _, key := range b.order {
		acknowledged, known := sent[key]
		switch {
		case !known:
			r.add("%s: nobody sent this key, and it has %s", key, b.effects[key][0])
		case !acknowledged && !wanted[key].GivenUp:
			r.add("%s: was never acknowledged with 2xx, and has %s", key, b.effects[key][0])
		}
	}
	for _, e := range b.keyless {
		r.add("%s has no key", e)
	}
	return r
}

// acknowledged is [InTheBooks].
func (b *books) acknowledged(gs []group) Result {
	r := result(InTheBooks)
	for i := range gs {
		g := &gs[i]
		first := g.firstPaid()
		if first == nil {
			continue
		}
		r.Seen++
		found := false
		for _, e := range b.effects[g.key] {
			if e.id != first.ID {
				continue
			}
			found = true
			if !e.is(first) {
				r.add("%s: %s is %s -> %s %d, and was asked as %s -> %s %d", g.key, e, e.from, e.to, e.amount, first.From, first.To, first.Amount)
			}
		}
		if !found {
			r.add("%s: %q was acknowledged, and is not in the books under this key", g.key, first.ID)
		}
	}
	return r
}

// is reports whether an effect is the one that the request asked for.
func (e effect) is(op *Operation) bool {
	kind := "transfer"
	switch {
	case op.To == "" && op.From == "":
		kind = "account"
	case op.To == "":
		kind = "order"
	}
	sameAmount := e.amount == op.Amount || kind != "transfer" && op.Amount == 0
	return e.kind == kind && e.from == op.From && e.to == op.To && sameAmount
}

// abandoned is [GivenUpForGood].
func (b *books) abandoned(expected []Expectation) Result {
	r := result(GivenUpForGood)
	for _, e := range expected {
		if !e.GivenUp {
			continue
		}
		r.Seen++
		key := Key{e.Scope, e.Key}
		if effects := b.effects[key]; len(effects) > 0 {
			r.add("%s: was given up after not-executed, and has %s", key, effects[0])
		} else if _, found := b.declined[key]; found {
			r.add("%s: was given up after not-executed, and has a record", key)
		}
	}
	return r
}
