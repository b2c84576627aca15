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

	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// Paths of messages.
const (
	StatementsPath = "/v1/statements/" // followed by an account
	MessagesPath   = "/v1/messages"
	PoisonPath     = "/v1/poison"
)

// ParkedMessage is a message that its consumer could not handle, or that waits behind one.
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

// mountMessages adds the routes of messages, and of the projection.
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
	limit := PageLimitMax
	if query.Get("limit") != "" {
		var err error
		if limit, err = pageLimit(query); err != nil {
			return nil, err
		}
	}
	name := query.Get("consumer")
	if name != "" && !isConsumer(name) {
		return nil, invalid("invalid-page", "consumer must be statements or notices.")
	}
	filter := operator.ParkedFilter{Consumer: name, State: operator.ParkedState(query.Get("state"))}
	list, err := b.operator.ListParked(ctx, filter, operator.Page{Rows: limit})
	switch {
	case errors.Is(err, operator.ErrInvalid):
		return nil, invalid("invalid-page", "state must be waiting, behind or dead.")
	case err != nil:
		return nil, err
	}
	messages := make([]ParkedMessage, 0, len(list.Messages))
	for _, m := range list.Messages {
		parked := ParkedMessage{
			Consumer: m.Consumer, ID: m.ID, State: string(m.State), Topic: m.Topic, Key: string(m.Key), Partition: m.Partition, Offset: m.Offset,
			Attempts: m.Attempts, Error: m.Error, ParkedAt: m.ParkedAt,
		}
		if !m.NotBefore.IsZero() {
			parked.NotBefore = &m.NotBefore
		}
		messages = append(messages, parked)
	}
	return messages, nil
}

func isConsumer(name string) bool { return name == StatementsConsumer || name == NoticesConsumer }

// redrive lets a consumer try a parked message again, under the same id.
func (b *Bank) redrive(w http.ResponseWriter, r *http.Request) {
	name, id := chi.URLParam(r, "consumer"), chi.URLParam(r, "id")
	tenant, err := Tenant(r)
	if err == nil && !isConsumer(name) {
		err = notFound("message-not-found", "There is no consumer of this name. There are statements and notices.")
	}
	if err == nil {
		_, err = b.operator.Redrive(r.Context(), name, id, operator.MessageAct{Act: operator.Act{Actor: "tenant " + tenant, Reason: "redriven over HTTP"}})
	}
	switch {
	case errors.Is(err, operator.ErrNotParked):
		err = notFound("message-not-found", "The consumer has not parked this message.")
	case errors.Is(err, operator.ErrBehind):
		err = refusal(http.StatusConflict, "message-behind", "The message waits behind another", "Another message of its key is parked in front of it. Redrive that one.")
	}
	if err != nil {
		b.writeError(w, r, err)
		return
	}
	WriteJSON(w, http.StatusAccepted, struct {
		Consumer string `json:"consumer"`
		ID       string `json:"id"`
		State    string `json:"state"`
	}{name, id, string(operator.MessageWaiting)})
}

// poisonType is the type of a message that the projection can't read.
const poisonType = "poison"

// poison publishes a message that the consumer of the projection can't read, as a service with a
// mistake does.
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
