package bank

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/nodeid"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// Names of the consumers of the bank's messages.
const (
	StatementsConsumer = "statements" // writes the projection
	NoticesConsumer    = "notices"    // sends mails
)

// Broker is where the bank's messages go. It is safe for concurrent use.
type Broker interface {
	// Publish sends a message and waits for the broker's confirmation. It does not use the outbox.
	Publish(ctx context.Context, m message.Message) error

	// Ends returns for each partition of the topic the offset after its last message, and the name
	// of the source under which consumers keep their positions.
	Ends(ctx context.Context) (source string, ends map[int32]int64, err error)

	// Committed returns the offsets that a consumer has committed at the broker.
	Committed(ctx context.Context, consumer string) (map[int32]int64, error)

	// Inside reports whether the broker is a part of this process. If it is, another bank on the
	// same database has a broker of its own.
	Inside() bool
}

// Feed sets the broker of the bank's messages, and the operator for parked messages. It must be
// called once, before serving.
func (b *Bank) Feed(broker Broker, messages *operator.Operator) {
	b.broker, b.operator, b.fed = broker, messages, time.Now()
}

// feed has the state of the broker, which an audit compares with the books. It is nil if the bank
// has no broker.
type feed struct {
	broker    Broker
	committed map[int32]int64 // before the snapshot
	failed    bool
	// Messages that an earlier broker inside has lost are not all published again yet.
	republishing bool

	positions map[string]map[int32]int64 // by source, in the snapshot
	moved     map[string]time.Duration   // by source: the time since a position of it was moved
	banks     int64                      // that are alive
	age       time.Duration              // of the broker
}

// feedTimeout limits the requests of an audit to the broker.
const feedTimeout = 2 * time.Second

// look reads the offsets that a consumer without an inbox has committed. It must be called before
// the snapshot, which then has the effects of the messages before them.
func (b *Bank) look(ctx context.Context) *feed {
	if b.broker == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, feedTimeout)
	defer cancel()
	committed, err := b.broker.Committed(ctx, StatementsConsumer)
	return &feed{
		republishing: b.republishing.Load(),
		broker:       b.broker, committed: committed, failed: err != nil, positions: map[string]map[int32]int64{}, moved: map[string]time.Duration{}, age: time.Since(b.fed),
	}
}

// countBanks counts the banks that are alive on the database.
const countBanks = `
	SELECT count(*) FROM pg_locks
	WHERE locktype = 'advisory' AND classid = $1::bigint AND granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`

// Banks returns the number of banks that are alive on the database. If each has a broker of its
// own, a bank's relay may publish messages of the others.
func (b *Bank) Banks(ctx context.Context) (number int64, err error) {
	if err := b.pool.QueryRow(ctx, countBanks, nodeid.LockNamespace).Scan(&number); err != nil {
		return 0, fmt.Errorf("count the banks: %w", err)
	}
	return number, nil
}

// read queues the statements that read the positions.
func (f *feed) read(batch *pgx.Batch) {
	if f == nil {
		return
	}
	batch.Queue(countBanks, nodeid.LockNamespace).QueryRow(func(row pgx.Row) error { return row.Scan(&f.banks) })
	batch.Queue(`
		SELECT source, partition, next_offset, extract(epoch FROM clock_timestamp() - updated_at)::float8
		FROM message_offsets WHERE consumer = $1`, StatementsConsumer).Query(func(rows pgx.Rows) error {
		var source string
		var partition int32
		var next int64
		var seconds float64
		_, err := pgx.ForEachRow(rows, []any{&source, &partition, &next, &seconds}, func() error {
			moved := time.Duration(seconds * float64(time.Second))
			if last, ok := f.moved[source]; !ok || moved < last {
				f.moved[source] = moved
			}
			if f.positions[source] == nil {
				f.positions[source] = map[int32]int64{}
			}
			f.positions[source][partition] = next
			return nil
		})
		return err
	})
}

// lag returns the number of messages that the projection lacks. It must be called after the
// snapshot was read: messages that have left the outbox there are at the broker by then. It returns
// nil if the number is not known, because the broker can't be reached or has only a part of the
// messages.
func (f *feed) lag(ctx context.Context) *int64 {
	if f == nil || f.failed || f.republishing || f.broker.Inside() && f.banks > 1 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, feedTimeout)
	defer cancel()
	source, ends, err := f.broker.Ends(ctx)
	if err != nil {
		return nil
	}
	for other, moved := range f.moved {
		if other != source && moved < f.age && f.broker.Inside() { // another bank's broker, now gone
			return nil
		}
	}
	var lag int64
	for partition, end := range ends {
		lag += max(0, end-max(f.positions[source][partition], f.committed[partition], 0))
	}
	return &lag
}

// Projection is where a consumer keeps the moves of money.
type Projection struct {
	Consumer string // its name
	Entries  string // the table that it writes, with the schema
	Parked   string // the table of the messages that it has parked
	Accounts string // the prefix of the accounts that it is about; empty for all
}

// ownProjection is the bank's.
func ownProjection() Projection {
	return Projection{Consumer: StatementsConsumer, Entries: "demo_statements.entries", Parked: "message_parked"}
}

// compare returns SQL that compares a projection with the moves in the books that have a message. A
// move with a parked message is not expected in the projection. The names in p must be trusted.
func (p Projection) compare() string {
	return `
	WITH moves AS MATERIALIZED (
		SELECT m.* FROM (
			SELECT message_id, id::text AS transfer, from_account AS account, -amount AS amount FROM transfers
			UNION ALL
			SELECT message_id, id::text, to_account, amount FROM transfers
			UNION ALL
			SELECT message_id, id::text, account, -amount FROM orders
			UNION ALL
			SELECT message_id, id::text, '` + merchant + `', amount FROM orders
			UNION ALL
			SELECT message_id, id::text, account, amount FROM topups
		) AS m
		WHERE message_id IS NOT NULL` + p.about("account") + `
			AND message_id::text NOT IN (SELECT p.message_id FROM ` + p.Parked + ` p WHERE p.consumer = '` + p.Consumer + `')
	),
	written AS NOT MATERIALIZED (
		SELECT transfer, account, amount FROM ` + p.Entries + ` WHERE true` + p.about("account") + `
	),
	lines AS MATERIALIZED (
		SELECT transfer, account, amount, count(*) AS copies FROM written GROUP BY transfer, account, amount
	),
	sums AS (
		SELECT account, sum(amount) AS total FROM (
			SELECT account, amount FROM moves UNION ALL SELECT account, -amount FROM written
		) AS both_sides GROUP BY account
	)
	SELECT
		(SELECT count(DISTINCT transfer) FROM moves m WHERE NOT EXISTS (
			SELECT FROM lines l WHERE l.transfer = m.transfer AND l.account = m.account AND l.amount = m.amount)),
		(SELECT count(DISTINCT transfer) FROM lines WHERE copies > 1),
		(SELECT count(*) FROM sums WHERE total <> 0)`
}

func (p Projection) about(column string) string {
	if p.Accounts == "" {
		return ""
	}
	return ` AND starts_with(` + column + `, '` + p.Accounts + `')`
}

// counted selects the other counts of messages.
const counted = `
	SELECT
		(SELECT count(*) FROM message_outbox),
		(SELECT count(*) FROM idempotency_keys WHERE starts_with(scope, '` + idempotency.MessageScopePrefix + `')) + (SELECT COALESCE(sum(handled), 0)::bigint FROM consumers),
		(SELECT COALESCE(sum(copies), 0)::bigint FROM consumers),
		(SELECT count(*) FROM message_parked WHERE state = 3)`

// Unhandled returns the number of messages in the outbox plus the number of moves with a message
// that one of these consumers has not handled. It is 0 if no message is under way. A parked message
// counts as handled, and one that is in the outbox may count twice.
func Unhandled(ctx context.Context, tx pgx.Tx, consumers ...string) (number int64, err error) {
	err = tx.QueryRow(ctx, `
		SELECT (SELECT count(*) FROM message_outbox) + (SELECT count(*) FROM (
			SELECT message_id FROM transfers UNION ALL SELECT message_id FROM orders UNION ALL SELECT message_id FROM topups
		) AS m WHERE message_id IS NOT NULL AND `+unhandledBy+`)`, consumers).Scan(&number)
	if err != nil {
		return 0, fmt.Errorf("count unhandled messages: %w", err)
	}
	return number, nil
}

// CompareProjection compares the bank's own projection: see [Projection.Compare].
func CompareProjection(ctx context.Context, tx pgx.Tx) (missing, doubled, mismatches int64, err error) {
	return ownProjection().Compare(ctx, tx)
}

// Compare returns the number of moves that are missing in the projection, of moves that are in it
// more than once, and of accounts with another sum than in the books. All are 0 once no message is
// under way.
func (p Projection) Compare(ctx context.Context, tx pgx.Tx) (missing, doubled, mismatches int64, err error) {
	if err := tx.QueryRow(ctx, p.compare()).Scan(&missing, &doubled, &mismatches); err != nil {
		return 0, 0, 0, fmt.Errorf("compare the projection: %w", err)
	}
	return missing, doubled, mismatches, nil
}

// unhandledBy is a condition on a move m: one of the consumers $1 has neither recorded nor parked
// its message.
const unhandledBy = `EXISTS (
			SELECT FROM unnest($1::text[]) AS c (name)
			WHERE NOT EXISTS (SELECT FROM idempotency_keys k WHERE k.scope = '` + idempotency.MessageScopePrefix + `' || c.name AND k.key = m.message_id::text)
				AND NOT EXISTS (SELECT FROM message_parked p WHERE p.consumer = c.name AND p.message_id = m.message_id::text)
		)`

// lost selects the moves with a message that is not in the outbox, and that one of the consumers
// has neither recorded nor parked. They were made at $3 or up to $2 microseconds earlier.
const lost = `
	FROM %s AS m WHERE m.message_id IS NOT NULL AND m.created_at <= $3 AND m.created_at > $3 - $2 * interval '1 microsecond'
		AND NOT EXISTS (SELECT FROM message_outbox o WHERE o.message_id = m.message_id)
		AND ` + unhandledBy + `
	ORDER BY m.id`

// Lost returns a function that publishes messages again, from the books: those of moves that were
// made before the call of Lost, have left the outbox, and are not handled by all consumers. It is
// for a broker that begins with an empty log. Consumers drop messages that they have handled, by
// their ids. The function skips moves that are older than retention. Until it has succeeded, audits
// do not judge the projection.
func (b *Bank) Lost(ctx context.Context, retention time.Duration, consumers ...string) (republish func(context.Context) (published int, err error), err error) {
	var before time.Time // by the clock of the moves
	if err := b.pool.QueryRow(ctx, `SELECT clock_timestamp()`).Scan(&before); err != nil {
		return nil, fmt.Errorf("read the database's clock: %w", err)
	}
	b.republishing.Store(true)
	return func(ctx context.Context) (published int, err error) {
		if published, err = b.republish(ctx, before, retention, consumers); err == nil {
			b.republishing.Store(false)
		}
		return published, err
	}, nil
}

func (b *Bank) republish(ctx context.Context, before time.Time, retention time.Duration, consumers []string) (published int, err error) {
	var all []message.Message
	add := func(id, kind, account string, body any) error {
		m, err := eventOf(kind, account, body)
		m.ID = id
		all = append(all, m)
		return err
	}
	read := func(columns, table string, scan func(pgx.CollectableRow) error) error {
		rows, err := b.pool.Query(ctx, "SELECT "+columns+fmt.Sprintf(lost, table), consumers, retention.Microseconds(), before)
		if err != nil {
			return err
		}
		_, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (struct{}, error) { return struct{}{}, scan(row) })
		return err
	}
	err = errors.Join(
		read(transferColumns, "transfers", func(row pgx.CollectableRow) error {
			m, err := transferMessage(row)
			all = append(all, m)
			return err
		}),
		read("message_id::text, id, account, sku, quantity, amount, currency, created_at", "orders", func(row pgx.CollectableRow) error {
			var o Order
			var messageID string
			var id int64
			err := row.Scan(&messageID, &id, &o.Account, &o.SKU, &o.Quantity, &o.Amount, &o.Currency, &o.CreatedAt)
			o.ID, o.CreatedAt = strconv.FormatInt(id, 10), o.CreatedAt.UTC()
			return errors.Join(err, add(messageID, orderEvent, o.Account, o))
		}),
		read("message_id::text, id, account, amount, charge, created_at", "topups", func(row pgx.CollectableRow) error {
			var t TopUp
			var messageID string
			var id int64
			err := row.Scan(&messageID, &id, &t.Account, &t.Amount, &t.Charge, &t.CreatedAt)
			t.ID, t.CreatedAt = strconv.FormatInt(id, 10), t.CreatedAt.UTC()
			return errors.Join(err, add(messageID, topUpEvent, t.Account, t))
		}),
	)
	if err != nil {
		return 0, fmt.Errorf("read unhandled moves: %w", err)
	}
	return b.publishAll(ctx, all)
}

func (b *Bank) publishAll(ctx context.Context, all []message.Message) (published int, err error) {
	for i := range all {
		if err := b.broker.Publish(ctx, all[i]); err != nil {
			return i, fmt.Errorf("publish again: %w", err)
		}
	}
	return len(all), nil
}

// transferColumns are the columns of [transferMessage].
const transferColumns = "message_id::text, id, from_account, to_account, amount, currency, reference, created_at"

// transferMessage returns the message about the transfer in a row of transferColumns, as it was
// published.
func transferMessage(row pgx.CollectableRow) (message.Message, error) {
	var t Transfer
	var messageID string
	var id int64
	if err := row.Scan(&messageID, &id, &t.From, &t.To, &t.Amount, &t.Currency, &t.Reference, &t.CreatedAt); err != nil {
		return message.Message{}, err
	}
	t.ID, t.CreatedAt = strconv.FormatInt(id, 10), t.CreatedAt.UTC()
	m, err := eventOf(transferEvent, t.From, t)
	m.ID = messageID
	return m, err
}

// PublishAgain publishes the messages about the transfers of these accounts with this reference
// once more, under the same ids, as if a relay had died between the broker's confirmation and its
// DELETE.
func (b *Bank) PublishAgain(ctx context.Context, reference string, accounts []string) (published int, err error) {
	rows, err := b.pool.Query(ctx, "SELECT "+transferColumns+`
		FROM transfers WHERE from_account = ANY($1) AND reference = $2 AND message_id IS NOT NULL ORDER BY id`, accounts, reference)
	if err != nil {
		return 0, fmt.Errorf("read transfers: %w", err)
	}
	all, err := pgx.CollectRows(rows, transferMessage)
	if err != nil {
		return 0, fmt.Errorf("read transfers: %w", err)
	}
	return b.publishAll(ctx, all)
}

// statement reads the projection of an account.
func (b *Bank) statement(ctx context.Context, account string) (entries []Entry, err error) {
	rows, err := b.pool.Query(ctx, `SELECT transfer, amount, at FROM demo_statements.entries WHERE account = $1 ORDER BY at, id`, account)
	if err != nil {
		return nil, fmt.Errorf("read the statement: %w", err)
	}
	entries, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (Entry, error) {
		e := Entry{Account: account}
		err := row.Scan(&e.Transfer, &e.Amount, &e.At)
		e.At = e.At.UTC()
		return e, err
	})
	if err != nil {
		return nil, fmt.Errorf("read the statement: %w", err)
	}
	return entries, nil
}

// Address returns an address that a process of the bank left with [Bank.LeaveAddress], or "".
func (b *Bank) Address(ctx context.Context, name string) (value string, err error) {
	err = b.pool.QueryRow(ctx, `SELECT value FROM addresses WHERE name = $1`, name).Scan(&value)
	if errors.Is(err, pgx.ErrNoRows) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read an address: %w", err)
	}
	return value, nil
}

// Names of addresses.
const (
	ProcessorAddress = "psp"     // URL of the processor
	BrokersAddress   = "brokers" // host:port of the brokers, separated by commas
)

// LeaveAddress stores an address for other processes of the bank, which read it with
// [Bank.Address].
func (b *Bank) LeaveAddress(ctx context.Context, name, value string) error {
	if _, err := b.pool.Exec(ctx, `
		INSERT INTO addresses (name, value) VALUES ($1, $2)
		ON CONFLICT (name) DO UPDATE SET value = $2`, name, value); err != nil {
		return fmt.Errorf("leave an address: %w", err)
	}
	return nil
}
