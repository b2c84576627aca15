package events

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/storage/postgres"
)

// The consumers that the bank's page shows, kills and pauses. They read the bank's topic, and write
// to a schema of their own, so a fault in them changes nothing in the bank's books.
const (
	ShownSchema   = "demo_shown"
	ShownAccounts = "shown-"               // prefix of the accounts that they handle
	ShownPace     = 100 * time.Millisecond // pause in a handler, so that a fault meets one that runs

	shownBatchMax = 20 // at this pace much less than batchTimeout

	shownInbox = "statements-inbox"
	shownNaive = "statements-naive"
)

// ShownProjection returns the projection of the consumer with an inbox, or of the one without, for
// the accounts with this prefix.
func ShownProjection(inbox bool, accounts string) bank.Projection {
	name, table := shownNaive, "entries_naive"
	if inbox {
		name, table = shownInbox, "entries_inbox"
	}
	return bank.Projection{Consumer: name, Entries: ShownSchema + "." + table, Parked: ShownSchema + ".message_parked", Accounts: accounts}
}

// ShownName returns the application_name of a process of the shown consumers in pg_stat_activity.
func ShownName(inbox bool, instance string) string {
	return ShownProjection(inbox, "").Consumer + " " + instance
}

// MakeShown makes the tables of the projections in the schema of the store, beside those of the
// library. It is safe to call from several processes at once.
func MakeShown(ctx context.Context, store *postgres.Store) error {
	err := pgx.BeginFunc(ctx, store.Pool(), func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock(hashtextextended('`+ShownSchema+`', 0))`)
		for _, inbox := range []bool{true, false} {
			if err == nil {
				// No unique constraint, on purpose: it would hide doubles from the audit.
				table := ShownProjection(inbox, "").Entries
				_, err = tx.Exec(ctx, `CREATE TABLE IF NOT EXISTS `+table+` (LIKE demo_statements.entries INCLUDING ALL)`)
			}
		}
		if err == nil {
			_, err = tx.Exec(ctx, `CREATE TABLE IF NOT EXISTS `+ShownSchema+`.unreadable (account text COLLATE "C" PRIMARY KEY)`)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("make the tables of %s: %w", ShownSchema, err)
	}
	return nil
}

// SetReadable makes the messages of an account readable for the shown consumers, or unreadable, as
// if the consumers had a mistake.
func SetReadable(ctx context.Context, store *postgres.Store, account string, readable bool) error {
	sql := `INSERT INTO ` + ShownSchema + `.unreadable (account) VALUES ($1) ON CONFLICT DO NOTHING`
	if readable {
		sql = `DELETE FROM ` + ShownSchema + `.unreadable WHERE account = $1`
	}
	_, err := store.Pool().Exec(ctx, sql, account)
	return err
}

// Shown is one process of the shown consumers.
type Shown struct {
	Broker *Broker
	Store  *postgres.Store // in ShownSchema
	Logger *slog.Logger
}

// Run handles messages with an inbox, as [Consumers.Run] does.
func (s *Shown) Run(ctx context.Context) error {
	if s.Broker.Ready(ctx) != nil {
		return nil
	}
	projection := ShownProjection(true, "")
	handler := func(ctx context.Context, d *consumer.Delivery) error {
		err := projectShown(ctx, postgres.Tx(ctx), projection, d.Key, d.Body)
		if errors.Is(err, errUnreadable) {
			return consumer.Reject(err)
		}
		return err
	}
	return consumer.New(projection.Consumer, s.Store.Inbox(), s.Broker.source(projection.Consumer), handler, &consumer.Options{
		BatchMax: shownBatchMax, InFlightMax: 1, BatchTimeout: batchTimeout, Retention: Retention, Logger: s.Logger,
	}).Run(ctx)
}

// RunNaive handles messages without an inbox, as [Consumers.RunNaive] does.
func (s *Shown) RunNaive(ctx context.Context) error {
	if s.Broker.Ready(ctx) != nil {
		return nil
	}
	naive := &Consumers{Broker: s.Broker, Store: s.Store, Logger: s.Logger}
	projection := ShownProjection(false, "")
	return naive.naive(ctx, projection.Consumer, func(ctx context.Context, record *kgo.Record) error {
		ctx, cancel := context.WithTimeout(ctx, batchTimeout)
		defer cancel()
		if !shows(record.Key) {
			return nil
		}
		err := pgx.BeginFunc(ctx, s.Store.Pool(), func(tx pgx.Tx) error {
			return projectShown(ctx, tx, projection, record.Key, record.Value)
		})
		if errors.Is(err, errUnreadable) { // lost: a naive consumer has nowhere to put it
			s.Logger.ErrorContext(ctx, "a message can't be read and is skipped", "partition", record.Partition, "offset", record.Offset, "error", err)
			return nil
		}
		return err
	})
}

// querier runs statements: a transaction.
type querier interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

var errUnreadable = errors.New("this version of the consumer can't read it")

// shows reports whether a message with this key is about a shown account.
func shows(key []byte) bool { return strings.HasPrefix(string(key), ShownAccounts) }

// projectShown adds a message to a projection, unless it is about an account that is not shown.
func projectShown(ctx context.Context, tx querier, projection bank.Projection, key, body []byte) error {
	if !shows(key) {
		return nil
	}
	entries, err := bank.EntriesOf(body)
	if err != nil {
		return errUnreadable
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(ShownPace):
	}
	var unreadable bool
	if err := tx.QueryRow(ctx, `SELECT EXISTS (SELECT FROM `+ShownSchema+`.unreadable WHERE account = $1)`, string(key)).Scan(&unreadable); err != nil {
		return fmt.Errorf("read the message: %w", err)
	}
	if unreadable {
		return errUnreadable
	}
	return projection.Write(ctx, tx, entries)
}
