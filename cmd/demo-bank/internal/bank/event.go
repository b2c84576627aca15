package bank

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/paidonce/idempotency/message"
)

// Topic is the topic of the bank's messages. Each transfer, order and top-up publishes one in its
// transaction, if it has an idempotency key. The message's key is the account that pays or is
// topped up, and its body the JSON of the answer with the field type.
const Topic = "bank-events"

// eventName is the name under which a request publishes its only message.
const eventName = "event"

// Types of messages.
const (
	transferEvent = "transfer"
	orderEvent    = "order"
	topUpEvent    = "topup"
)

// publish adds a message to the transaction of the request, at no round trip. For a request that
// bypassed the middleware it does nothing.
func publish(ctx context.Context, s stamp, kind, account string, body any) error {
	if s.message == nil {
		return nil
	}
	m, err := eventOf(kind, account, body)
	if err != nil {
		return err
	}
	return message.Publish(ctx, eventName, m)
}

// eventOf returns the message about a transfer, an order or a top-up.
func eventOf(kind, account string, body any) (message.Message, error) {
	object, err := json.Marshal(body)
	if err != nil {
		return message.Message{}, fmt.Errorf("encode the message: %w", err)
	}
	return message.Message{Topic: Topic, Key: []byte(account), Body: append([]byte(`{"type":"`+kind+`",`), object[1:]...)}, nil
}

// Entry is a line of an account's statement. Money is in minor units.
type Entry struct {
	Account  string    `json:"-"`
	Transfer string    `json:"transfer"` // id of the transfer, order or top-up
	Amount   int64     `json:"amount"`
	At       time.Time `json:"at"`
}

// Notice is a mail to an account about a transfer.
type Notice struct{ To, Text string }

// Errors of messages that can't be read. They quote nothing of the message.
var (
	errEventJSON = errors.New("its body is no JSON object of the bank's")
	errEventType = errors.New("its type is unknown")
)

// event has the fields of all types of messages.
type event struct {
	Type      string    `json:"type"`
	ID        string    `json:"id"`
	From      string    `json:"from"`
	To        string    `json:"to"`
	Account   string    `json:"account"`
	Amount    int64     `json:"amount"`
	Currency  string    `json:"currency"`
	CreatedAt time.Time `json:"created_at"`
}

func readEvent(body []byte) (e event, err error) {
	if err := json.NewDecoder(bytes.NewReader(body)).Decode(&e); err != nil {
		return e, errEventJSON
	}
	return e, nil
}

// EntriesOf returns the entries that a message adds to statements. An error means that no later try
// can read the message either. The text quotes nothing of it.
func EntriesOf(body []byte) ([]Entry, error) {
	e, err := readEvent(body)
	if err != nil {
		return nil, err
	}
	entry := func(account string, amount int64) Entry {
		return Entry{Account: account, Transfer: e.ID, Amount: amount, At: e.CreatedAt}
	}
	switch e.Type {
	case transferEvent:
		return []Entry{entry(e.From, -e.Amount), entry(e.To, e.Amount)}, nil
	case orderEvent:
		return []Entry{entry(e.Account, -e.Amount), entry(merchant, e.Amount)}, nil
	case topUpEvent:
		return []Entry{entry(e.Account, e.Amount)}, nil
	}
	return nil, errEventType
}

// NoticeOf returns the notice about a transfer, and false for a message about something else.
func NoticeOf(body []byte) (n Notice, ok bool, err error) {
	e, err := readEvent(body)
	if err != nil || e.Type != transferEvent {
		return Notice{}, false, err
	}
	return Notice{To: e.From, Text: fmt.Sprintf("Transfer %s: %d.%02d %s to %s.", e.ID, e.Amount/100, e.Amount%100, e.Currency, e.To)}, true, nil
}

// execer runs a statement: a transaction or a pool.
type execer interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
}

// Project adds entries to the bank's own projection.
func Project(ctx context.Context, tx execer, entries []Entry) error {
	return ownProjection().Write(ctx, tx, entries)
}

// Write adds entries to the projection.
func (p Projection) Write(ctx context.Context, tx execer, entries []Entry) error {
	var accounts, transfers []string
	var amounts []int64
	var times []time.Time
	for _, e := range entries {
		accounts, transfers = append(accounts, e.Account), append(transfers, e.Transfer)
		amounts, times = append(amounts, e.Amount), append(times, e.At)
	}
	if _, err := tx.Exec(ctx, `
		INSERT INTO `+p.Entries+` (account, transfer, amount, at)
		SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::timestamptz[])`, accounts, transfers, amounts, times); err != nil {
		return fmt.Errorf("write the projection: %w", err)
	}
	return nil
}

// CountHandled counts messages that a consumer without an inbox handled.
func CountHandled(ctx context.Context, db execer, consumer string, handled int64) error {
	return count(ctx, db, consumer, handled, 0)
}

// CountCopies counts messages that a consumer dropped because they had been handled before.
func (b *Bank) CountCopies(ctx context.Context, consumer string, copies int64) error {
	return count(ctx, b.pool, consumer, 0, copies)
}

func count(ctx context.Context, db execer, consumer string, handled, copies int64) error {
	if _, err := db.Exec(ctx, `
		INSERT INTO consumers AS c (name, handled, copies) VALUES ($1, $2, $3)
		ON CONFLICT (name) DO UPDATE SET handled = c.handled + $2, copies = c.copies + $3`, consumer, handled, copies); err != nil {
		return fmt.Errorf("count messages: %w", err)
	}
	return nil
}
