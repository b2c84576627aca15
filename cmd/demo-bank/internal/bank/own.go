package bank

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// The bank's own accounts, one of each per currency, such as bank:held:EUR. No client can name
// them, because their ids are not valid account ids of clients.
const (
	ownPrefix        = "bank:"
	processorAccount = ownPrefix + "processor:" // money that came in or went out through the processor
	heldAccount      = ownPrefix + "held:"      // for payouts that are under way
)

// lockWithOwn locks an account, and the bank's own accounts with these prefixes in the same
// currency: all in the order of their ids, in one round trip. It opens the bank's own accounts that
// are missing.
func (b *Bank) lockWithOwn(ctx context.Context, tx pgx.Tx, id string, prefixes ...string) (lockedAccount, error) {
	locked := make(map[string]lockedAccount, 1+len(prefixes))
	var batch pgx.Batch
	batch.Queue(`
		INSERT INTO accounts (id, currency, opening_balance, balance)
		SELECT prefix || currency, currency, 0, 0 FROM accounts, unnest($2::text[]) AS prefix WHERE id = $1
		ON CONFLICT (id) DO NOTHING`, id, prefixes)
	batch.Queue(`
		SELECT id, currency, balance FROM accounts
		WHERE id = $1 OR id IN (SELECT prefix || currency FROM accounts, unnest($2::text[]) AS prefix WHERE id = $1)
		ORDER BY id FOR NO KEY UPDATE`, id, prefixes).Query(readLocked(locked))
	if err := tx.SendBatch(ctx, &batch).Close(); err != nil {
		return lockedAccount{}, fmt.Errorf("lock accounts: %w", err)
	}
	account, found := locked[id]
	if !found {
		return lockedAccount{}, accountNotFound()
	}
	return account, nil
}
