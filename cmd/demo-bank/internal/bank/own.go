package bank

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// The bank's own accounts, one of each per currency, such as bank:held:EUR. No client can name
// them: their ids are not valid for one.
const (
	ownPrefix        = "bank:"
	processorAccount = ownPrefix + "processor:" // what came in and went out through the processor
	heldAccount      = ownPrefix + "held:"      // for payouts that are under way
)

// move is an account and one of the bank's own, locked in the order of their ids.
type move struct {
	own     string
	account lockedAccount
}

// lockMove locks the account and the bank's own account of its currency, which it opens if it is
// missing, in one round trip.
func (b *Bank) lockMove(ctx context.Context, tx pgx.Tx, id, prefix string) (move, error) {
	locked := make(map[string]lockedAccount, 2)
	var batch pgx.Batch
	batch.Queue(`
		INSERT INTO accounts (id, currency, opening_balance, balance)
		SELECT $2::text || currency, currency, 0, 0 FROM accounts WHERE id = $1
		ON CONFLICT (id) DO NOTHING`, id, prefix)
	batch.Queue(`
		SELECT id, currency, balance FROM accounts
		WHERE id = $1 OR id = (SELECT $2::text || currency FROM accounts WHERE id = $1)
		ORDER BY id FOR NO KEY UPDATE`, id, prefix).Query(readLocked(locked))
	if err := tx.SendBatch(ctx, &batch).Close(); err != nil {
		return move{}, fmt.Errorf("lock accounts: %w", err)
	}
	account, found := locked[id]
	if !found {
		return move{}, accountNotFound()
	}
	return move{own: prefix + account.currency, account: account}, nil
}
