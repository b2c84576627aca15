package bank

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/message"
)

// Paths of messages.
const (
	StatementsPath = "/v1/statements/" // followed by an account
	MessagesPath   = "/v1/messages"
	PoisonPath     = "/v1/poison"
)

// ParkedMessage is a message that its consumer could not handle, or one that waits behind it.
type ParkedMessage struct {
	Consumer  string     `json:"consumer"`
	ID        string     `json:"id"`
	State     string     `json:"state"` // waiting, behind, dead
	Topic     string     `json:"topic"`
	Key       string     `json:"key"`
	Partition int32      `json:"partition"`
	Offset    int64      `json:"offset"`
	Attempts  int        `json:"attempts"`
	Error     string     `json:"error"`
	ParkedAt  time.Time  `json:"parked_at"`
	NotBefore *time.Time `json:"not_before"` // of the next try, if it waits for one
}

// parkStates are the states of a parked message, as clients see them.
var parkStates = map[string]consumer.ParkState{"waiting": consumer.Waiting, "behind": consumer.WaitingFor, "dead": consumer.Dead}

// mountMessages adds the routes of messages and of what consumers made of them.
func (b *Bank) mountMessages(r chi.Router) {
	r.Get(StatementsPath+"{account}", b.getStatement)
	r.Get(MessagesPath, b.getMessages)
	r.Post(MessagesPath+"/{consumer}/{id}/redrive", b.redrive)
	r.Post(PoisonPath, b.poison)
}

func (b *Bank) getStatement(w http.ResponseWriter, r *http.Request) {
	account, err := b.account(r.Context(), chi.URLParam(r, "account"))
	var entries []Entry
	if err == nil {
		entries, err = b.statement(r.Context(), account.ID)
	}
	if err != nil {
		b.writeError(w, r, err)
		return
	}
	var change int64
	for _, e := range entries {
		change += e.Amount
	}
	w.Header().Set("Cache-Control", "no-store")
	WriteJSON(w, http.StatusOK, struct {
		Account       string  `json:"account"`
		BalanceChange int64   `json:"balance_change"`
		Entries       []Entry `json:"entries"`
	}{account.ID, change, entries})
}

func (b *Bank) getMessages(w http.ResponseWriter, r *http.Request) {
	messages, err := b.parkedMessages(r.Context(), r.URL.Query())
	if err != nil {
		b.writeError(w, r, err)
		return
	}
	w.Header().Set("Cache-Control", "no-store")
	WriteJSON(w, http.StatusOK, struct {
		Messages []ParkedMessage `json:"messages"`
	}{messages})
}

// parkedMessages reads the parked messages that the query selects, oldest first.
func (b *Bank) parkedMessages(ctx context.Context, query url.Values) ([]ParkedMessage, error) {
	limit, err := pageLimit(query)
	if err != nil {
		return nil, err
	}
	state, known := parkStates[query.Get("state")]
	if !known && query.Get("state") != "" {
		return nil, invalid("invalid-page", "state must be waiting, behind or dead.")
	}
	rows, err := b.pool.Query(ctx, `
		SELECT consumer, message_id, state, topic, key, partition, position, attempts, error, parked_at, not_before
		FROM message_parked WHERE ($1 = 0 OR state = $1) AND ($2 = '' OR consumer = $2) ORDER BY id LIMIT $3`, int16(state), query.Get("consumer"), limit)
	if err != nil {
		return nil, fmt.Errorf("list parked messages: %w", err)
	}
	messages, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (m ParkedMessage, err error) {
		var key []byte
		var state consumer.ParkState
		err = row.Scan(&m.Consumer, &m.ID, &state, &m.Topic, &key, &m.Partition, &m.Offset, &m.Attempts, &m.Error, &m.ParkedAt, &m.NotBefore)
		for name, number := range parkStates {
			if number == state {
				m.State = name
			}
		}
		m.Key, m.ParkedAt = string(key), m.ParkedAt.UTC()
		return m, err
	})
	if err != nil {
		return nil, fmt.Errorf("list parked messages: %w", err)
	}
	return messages, nil
}

// redrive lets a consumer try a dead message again, under the same id.
func (b *Bank) redrive(w http.ResponseWriter, r *http.Request) {
	name, id := chi.URLParam(r, "consumer"), chi.URLParam(r, "id")
	if err := b.redriveDead(r.Context(), name, id); err != nil {
		b.writeError(w, r, err)
		return
	}
	WriteJSON(w, http.StatusAccepted, struct {
		Consumer string `json:"consumer"`
		ID       string `json:"id"`
		State    string `json:"state"`
	}{name, id, "waiting"})
}

func (b *Bank) redriveDead(ctx context.Context, name, id string) error {
	var known, dead bool
	if err := b.pool.QueryRow(ctx, `
		WITH redriven AS (
			UPDATE message_parked SET state = $3, not_before = clock_timestamp() WHERE consumer = $1 AND message_id = $2 AND state = $4 RETURNING 1
		)
		SELECT EXISTS (SELECT FROM message_parked WHERE consumer = $1 AND message_id = $2), EXISTS (SELECT FROM redriven)`,
		name, id, int16(consumer.Waiting), int16(consumer.Dead)).Scan(&known, &dead); err != nil {
		return fmt.Errorf("redrive a message: %w", err)
	}
	switch {
	case !known:
		return notFound("message-not-found", "The consumer has no parked message with this id.")
	case !dead:
		return refusal(http.StatusConflict, "message-not-dead", "The message is not dead", "Only a dead message is redriven. This one is tried again by itself.")
	}
	return nil
}

// poisonType is the type of a message that the projection can't read.
const poisonType = "poison"

// poison publishes a message that the consumer of the projection can't read, as a service with a
// mistake would.
func (b *Bank) poison(w http.ResponseWriter, r *http.Request) {
	body, err := readBody(r.Body)
	var key text
	if err == nil {
		err = decodeObject(body, "invalid-poison", map[string]json.Unmarshaler{"key": &key})
	}
	id := uuid.NewString()
	if err == nil {
		err = b.publishPoison(r.Context(), string(key), id)
	}
	if err != nil {
		b.writeError(w, r, err)
		return
	}
	WriteJSON(w, http.StatusAccepted, struct {
		MessageID string `json:"message_id"`
	}{id})
}

func (b *Bank) publishPoison(ctx context.Context, key, id string) error {
	m := message.Message{ID: id, Topic: Topic, Key: []byte(key), Body: []byte(`{"type":"` + poisonType + `"}`)}
	switch {
	case key == "":
		return invalid("invalid-poison", "key must be given: the account whose messages it is among.")
	case m.Validate() != nil:
		return invalid("invalid-poison", fmt.Sprintf("key must be at most %d bytes.", message.KeyBytesMax))
	case b.broker == nil:
		return brokerAway()
	}
	ctx, cancel := context.WithTimeout(ctx, poisonTimeout)
	defer cancel()
	if err := b.broker.Publish(ctx, m); err != nil {
		return errors.Join(brokerAway(), err)
	}
	return nil
}

// poisonTimeout limits the broker's confirmation.
const poisonTimeout = 5 * time.Second

func brokerAway() *Problem {
	return refusal(http.StatusServiceUnavailable, "broker-unavailable", "The broker does not answer", "The message may or may not have been published.")
}
