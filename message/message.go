// Package message publishes messages in the transaction of a handler.
//
//	err := message.Publish(ctx, "transfer-made", message.Message{
//		Topic: "transfers", Key: []byte(t.From), Body: body,
//	})
//
// [Publish] sends nothing. The message is written to the outbox in the commit that has the
// handler's writes and its answer, at no extra round trip. A relay (package relay) takes it to the
// broker later. So the message exists if and only if its effect does, and it reaches the broker at
// least once. Its id is derived from the request's key: a consumer that records ids (package
// consumer) handles it once.
package message

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/paidonce/idempotency"
)

// Limits of a message. Kafka's and NATS's defaults take up to 1 MiB in all.
const (
	NameBytesMax   = 100
	TopicBytesMax  = 249
	KeyBytesMax    = 4 << 10
	HeaderBytesMax = 64 << 10 // names and values of all headers
	BodyBytesMax   = 896 << 10
	PublishedMax   = 1000 // messages of one transaction
)

// ErrInvalid: the message breaks a rule or a limit of this package. The text names the rule, and
// quotes nothing of the message.
var ErrInvalid = errors.New("message is invalid")

// Message is a message as it is published, and as a consumer gets it.
type Message struct {
	// ID is the same for each copy of the message. [Publish] derives it; a consumer gets the one that
	// the broker delivered.
	ID string

	// Topic is 1 to 249 bytes ([TopicBytesMax]): letters, digits, dots, underscores and hyphens, but
	// neither "." nor "..".
	Topic string

	// Key keeps the order: messages of one topic with one key arrive in the order of their commits,
	// if the handlers lock a common row. At most 4 KiB ([KeyBytesMax]). Nil if there is no order to
	// keep.
	Key []byte

	// Header has further fields, by the rules of HTTP: names are tokens, and no value has a control
	// character. All names and values have at most 64 KiB ([HeaderBytesMax]). May be nil.
	Header map[string][]string

	// Body is at most 896 KiB ([BodyBytesMax]).
	Body []byte
}

// Validate returns an error that wraps [ErrInvalid] if the message can't be published.
func (m *Message) Validate() error {
	wrong := ""
	switch {
	case m.Topic == "" || len(m.Topic) > TopicBytesMax || m.Topic == "." || m.Topic == ".." || strings.ContainsFunc(m.Topic, notOfTopic):
		wrong = fmt.Sprintf("its topic must be 1 to %d letters, digits, dots, underscores and hyphens", TopicBytesMax)
	case len(m.Key) > KeyBytesMax:
		wrong = fmt.Sprintf("its key has %d bytes, over the limit of %d", len(m.Key), KeyBytesMax)
	case len(m.Body) > BodyBytesMax:
		wrong = fmt.Sprintf("its body has %d bytes, over the limit of %d", len(m.Body), BodyBytesMax)
	}
	if wrong != "" {
		return fmt.Errorf("%w: %s", ErrInvalid, wrong)
	}
	if err := (&idempotency.Answer{Status: idempotency.StatusMin, Header: m.Header}).Validate(); err != nil {
		return fmt.Errorf("%w: a header's name is not a token, a value has a control character, or they have more than %d bytes", ErrInvalid, HeaderBytesMax)
	}
	return nil
}

func notOfTopic(r rune) bool {
	return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '.' && r != '_' && r != '-'
}

// Outbox takes the messages of one transaction. A store offers it to [Publish] under [OutboxKey] in
// the context of a handler.
type Outbox interface {
	// Add adds a valid message with its ID. It fails if the transaction has a message with this ID,
	// or has [PublishedMax] messages. After an error the message is not added, and the transaction
	// is not committed even if the handler ignores the error: see [Publish] for the exceptions.
	Add(m *Message) error
	// Refuse makes the transaction fail because of err, which Publish returns.
	Refuse(err error)
}

// OutboxKey is the key of an [Outbox] in a context.
type OutboxKey struct{}

// Publish adds a message to the transaction of the handler that runs with this context. It sends
// nothing: an answer that undoes the handler's writes undoes the message too. A message that was
// published while a nested transaction was open is dropped if that is rolled back. The bytes of the
// message must not change until the request has ended.
//
// The name is 1 to 100 visible ASCII characters ([NameBytesMax]), and stands for this message among
// those of the handler: with the request's key it makes the message's id ([ID]), so that every run
// of the request publishes under the same id. Publish overwrites Message.ID.
//
// The error wraps [ErrInvalid] if the message breaks a rule, if the transaction has one of this
// name, or if it has [PublishedMax] messages. Other errors say that the transaction can't be used
// now. After an error nothing of the transaction is committed, even if the handler ignores the
// error. There are three exceptions: the error came in a nested transaction that is rolled back, or
// in one that had ended; or the handler had returned.
//
// Inside a postgres.Phase the message leaves with the phase's COMMIT. On a resumable route, outside
// of a phase, Publish counts as a use of the transaction: no call to another service may follow.
//
// Publish is for one goroutine at a time, as the transaction is. It panics outside an idempotent
// handler, and if the store has no outbox.
func Publish(ctx context.Context, name string, m Message) error {
	outbox, ok := ctx.Value(OutboxKey{}).(Outbox)
	if !ok {
		panic(idempotency.UsageError("idempotency/message: Publish outside an idempotent handler of a store with an outbox: mount the middleware with a postgres store on the route, and pass the request's context on"))
	}
	err := m.Validate()
	if err == nil && !validName(name) {
		err = fmt.Errorf("%w: its name must be 1 to %d visible ASCII characters", ErrInvalid, NameBytesMax)
	}
	if err != nil {
		err = fmt.Errorf("publish: %w", err)
		outbox.Refuse(err)
		return err
	}
	m.ID = ID(ctx, name)
	if err := outbox.Add(&m); err != nil {
		return fmt.Errorf("publish %s: %w", name, err)
	}
	return nil
}

func validName(name string) bool {
	return name != "" && len(name) <= NameBytesMax && !strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r >= 0x7f })
}

// ID returns the id that [Publish] gives to the message of this name: a version 8 UUID (RFC 9562)
// that is the same for every run of the request. It panics outside an idempotent handler.
func ID(ctx context.Context, name string) string { return idempotency.DerivedID(ctx, "message/"+name) }
