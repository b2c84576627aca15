package operator_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/relay"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

var messageAct = operator.MessageAct{Act: act}

// messageBundle has a consumer, ledger, that can't read the messages with the body poison until
// mended is set.
type messageBundle struct {
	*testBundle
	consumer *consumer.Consumer
	mended   bool
	handled  []string // ids
}

func setupMessages(t *testing.T) *messageBundle {
	b := &messageBundle{testBundle: setup(t, nil)}
	b.consumer = consumer.New("ledger", b.Store.Inbox(), waitingSource{}, b.handle, &consumer.Options{Logger: slog.New(slog.DiscardHandler), ParkedInterval: 5 * time.Millisecond})
	return b
}

// waitingSource is for tests that call Receive themselves.
type waitingSource struct{}

func (waitingSource) Run(ctx context.Context, _ consumer.Receiver) error { <-ctx.Done(); return nil }

func (b *messageBundle) handle(ctx context.Context, m *consumer.Delivery) error {
	if string(m.Body) == "canary poison" && !b.mended {
		return consumer.Reject(errors.New("unreadable"))
	}
	b.handled = append(b.handled, m.ID)
	_, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO effects (name) VALUES ($1)", m.ID)
	return err
}

func messageID(n int) string { return fmt.Sprintf("00000000-0000-8000-8000-%012d", n) }

// receive has the consumer receive messages of one key, from an offset on.
func (b *messageBundle) receive(t *testing.T, from int, bodies ...string) {
	t.Helper()
	deliveries := make([]consumer.Delivery, len(bodies))
	for i, body := range bodies {
		deliveries[i] = consumer.Delivery{Offset: int64(from + i), Message: message.Message{
			ID: messageID(from + i), Topic: "transfers", Key: []byte("acme"), Body: []byte(body), Header: map[string][]string{"Type": {"canary"}},
		}}
	}
	for len(deliveries) > 0 {
		settled, pause := b.consumer.Receive(t.Context(), consumer.Partition{Source: "transfers", Number: 3}, deliveries)
		deliveries = deliveries[settled:]
		if settled == 0 && pause > time.Second {
			t.Fatalf("pause %v", pause)
		}
	}
}

// retry runs the consumer's retries until the condition holds.
func (b *messageBundle) retry(t *testing.T, until func() bool) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- b.consumer.Run(ctx) }()
	for deadline := time.Now().Add(30 * time.Second); !until(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Error("it does not happen")
			break
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A redriven message keeps its id, and is handled once. Those behind it follow in order.
func TestRedriveKeepsTheIDAndTheOrder(t *testing.T) {
	t.Parallel()
	b := setupMessages(t)
	b.receive(t, 0, "fine", "canary poison", "after", "last")
	parked, err := b.operator.ListParked(t.Context(), operator.ParkedFilter{}, operator.Page{Rows: 2})
	if err != nil || len(parked.Messages) != 2 || parked.Next == "" {
		t.Fatalf("%+v, %v", parked, err)
	}
	dead, behind := parked.Messages[0], parked.Messages[1]
	if dead.ID != messageID(1) || dead.State != operator.MessageDead || dead.Seen() != "dead-1" || dead.Error == "" || dead.Consumer != "ledger" || dead.Offset != 1 || dead.Partition != 3 ||
		string(dead.Key) != "acme" || dead.Front != "" || !soon(dead.ParkedAt) || dead.BodyBytes != 13 {
		t.Errorf("dead: %+v", dead)
	}
	if behind.State != operator.MessageBehind || behind.Front != dead.ID {
		t.Errorf("behind: %+v", behind)
	}
	next, err := b.operator.ListParked(t.Context(), operator.ParkedFilter{Consumer: "ledger", State: operator.MessageBehind}, operator.Page{After: parked.Next})
	if err != nil || len(next.Messages) != 1 || next.Messages[0].ID != messageID(3) || next.Next != "" {
		t.Errorf("%+v, %v", next, err)
	}
	_, err = b.operator.Redrive(t.Context(), "ledger", behind.ID, messageAct)
	wantError(t, err, operator.ErrBehind)
	wantRemedy(t, err, dead.ID)

	b.mended = true
	a := messageAct
	a.Seen = dead.Seen()
	before, err := b.operator.Redrive(t.Context(), "ledger", dead.ID, a)
	if err != nil || before.State != operator.MessageDead || before.Attempts != 1 {
		t.Fatalf("%+v, %v", before, err)
	}
	_, err = b.operator.Redrive(t.Context(), "ledger", dead.ID, a)
	wantError(t, err, operator.ErrChanged)
	wantRemedy(t, err, "waiting-0", "message get")
	b.retry(t, func() bool { return b.Count(t, "SELECT count(*) FROM message_parked") == 0 })
	if want := []string{messageID(0), messageID(1), messageID(2), messageID(3)}; !slices.Equal(b.handled, want) {
		t.Errorf("handled %q, want %q", b.handled, want)
	}
	_, err = b.operator.Redrive(t.Context(), "ledger", dead.ID, messageAct)
	wantError(t, err, operator.ErrNotParked)
	wantRemedy(t, err, "message get")
	if got, want := b.audits(t), "redrive alice ticket 7 message:ledger "+dead.ID+" 00000000-0000-0000-0000-000000000000 0"; got != want {
		t.Errorf("audit is %q, want %q", got, want)
	}
	if got := b.Text(t, "SELECT (message->>'state') || (message->>'attempts') || (message->>'offset') FROM idempotency_audit"); got != "dead11" {
		t.Errorf("the audit has %q", got)
	}
}

// If a copy was handled meanwhile, a redrive is a duplicate.
func TestRedriveOfWhatWasHandledHasNoEffect(t *testing.T) {
	t.Parallel()
	b := setupMessages(t)
	b.receive(t, 0, "canary poison")
	b.mended = true
	b.Exec(t, "UPDATE message_parked SET message_id = $1", messageID(9))
	b.Exec(t, "INSERT INTO message_offsets SELECT 9, updated_at, incarnation, attempt_id, 9, 0, consumer, source FROM message_offsets")
	b.consumer.Receive(t.Context(), consumer.Partition{Source: "transfers", Number: 9}, []consumer.Delivery{{Offset: 9, Message: message.Message{ID: messageID(8), Topic: "transfers", Body: []byte("canary poison")}}})
	b.Exec(t, "UPDATE message_parked SET message_id = $1", messageID(8))
	if _, err := b.operator.Redrive(t.Context(), "ledger", messageID(8), messageAct); err != nil {
		t.Fatal(err)
	}
	b.retry(t, func() bool { return b.Count(t, "SELECT count(*) FROM message_parked") == 0 })
	if n := b.Effects(t); n != 1 {
		t.Errorf("%d effects of a message with a copy", n)
	}
}

// A dropped message is never handled, and those behind it go on.
func TestDropLetsTheOthersGoOn(t *testing.T) {
	t.Parallel()
	b := setupMessages(t)
	b.receive(t, 0, "canary poison", "after")
	content, err := b.operator.MessageContent(t.Context(), messageID(0))
	if err != nil || string(content.Body) != "canary poison" || content.Header["Type"][0] != "canary" || string(content.Key) != "acme" || content.Topic != "transfers" {
		t.Errorf("%+v, %v", content, err)
	}
	a := messageAct
	a.Seen = "dead-7"
	_, err = b.operator.Drop(t.Context(), "ledger", messageID(0), a)
	wantError(t, err, operator.ErrChanged)
	a.Seen = "dead-1"
	if m, err := b.operator.Drop(t.Context(), "ledger", messageID(0), a); err != nil || m.ID != messageID(0) {
		t.Fatalf("%+v, %v", m, err)
	}
	b.retry(t, func() bool { return b.Count(t, "SELECT count(*) FROM message_parked") == 0 })
	if want := []string{messageID(1)}; !slices.Equal(b.handled, want) {
		t.Errorf("handled %q, want %q", b.handled, want)
	}
	_, err = b.operator.MessageContent(t.Context(), messageID(0))
	wantError(t, err, operator.ErrNoMessage)
	if got := b.Text(t, "SELECT action || ' ' || scope FROM idempotency_audit"); got != "drop message:ledger" {
		t.Errorf("the audit has %q", got)
	}
}

// Either a message is handled or it is dropped, whichever commits first.
func TestDropOfAMessageThatIsBeingHandled(t *testing.T) {
	t.Parallel()
	b := setupMessages(t)
	b.receive(t, 0, "canary poison")
	b.Exec(t, "UPDATE message_parked SET state = 1, not_before = now()")
	inbox := b.Store.Inbox()
	batch, park, err := inbox.BeginParked(t.Context(), &consumer.ParkedClaim{Consumer: "ledger", ID: messageID(0), Attempt: idempotency.NewAttemptID()})
	if err != nil || park.Delivery == nil {
		t.Fatalf("%+v, %v", park, err)
	}
	ctx := batch.Context(t.Context())
	if _, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO effects DEFAULT VALUES"); err != nil {
		t.Error(err)
	}
	if _, err := b.operator.Drop(t.Context(), "ledger", messageID(0), messageAct); err != nil {
		t.Error(err)
	}
	if err := batch.Seal(); err != nil {
		t.Error(err)
	}
	if err := batch.Commit(t.Context(), &consumer.End{Recorded: []int{0}, TTL: time.Hour}); !errors.Is(err, consumer.ErrFenced) {
		t.Errorf("a message that was dropped is committed: %v", err)
	}
	if n := b.Effects(t); n != 0 {
		t.Errorf("%d effects", n)
	}
}

// publish has a request publish messages to a topic, of one key.
func (b *messageBundle) publish(t *testing.T, value string, bodies ...string) (ids []string) {
	t.Helper()
	result := b.Engine.Do(t.Context(), idempotency.Request{Key: key(value), Fingerprint: idempotency.NewFingerprintV1("POST", "/", "", "", []byte(value))}, func(ctx context.Context) (*idempotency.Answer, error) {
		for i, body := range bodies {
			name := fmt.Sprint("m", i)
			ids = append(ids, message.ID(ctx, name))
			if err := message.Publish(ctx, name, message.Message{Topic: "transfers", Key: []byte("acme"), Body: []byte(body)}); err != nil {
				return nil, err
			}
		}
		return &idempotency.Answer{Status: 201}, nil
	})
	if result.Err != nil {
		t.Fatal(result.Err)
	}
	return ids
}

// drain publishes the outbox to a broker that refuses the body large. It returns the bodies that
// the broker took.
func (b *messageBundle) drain(t *testing.T, large string) (taken []string) {
	t.Helper()
	box := b.Store.Outbox()
	shards, err := box.Waiting(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, shard := range shards {
		if _, err := box.Drain(t.Context(), shard, relay.Limits{Messages: 100, Bytes: 1 << 20}, func(_ context.Context, all []message.Message) []error {
			errs := make([]error, len(all))
			for i := range all {
				switch {
				case i > 0 && errs[i-1] != nil:
					errs[i] = errors.New("one in front of it failed")
				case string(all[i].Body) == large:
					errs[i] = fmt.Errorf("%w: too large", relay.ErrRefused)
				default:
					taken = append(taken, string(all[i].Body))
				}
			}
			return errs
		}); err != nil {
			t.Fatal(err)
		}
	}
	return taken
}

// A message that its broker refused is found with the reason. Retried, it goes in front of those
// behind it; dropped, it never goes.
func TestParkedInTheOutbox(t *testing.T) {
	t.Parallel()
	for name, retry := range map[string]bool{"retry": true, "drop": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setupMessages(t)
			ids := b.publish(t, "canary", "canary large", "after")
			box, err := b.operator.Outbox(t.Context())
			if err != nil || box.Pending != 2 || len(box.Shards) != 1 || box.Shards[0].Pending != 2 || box.Shards[0].Oldest <= 0 || box.Shards[0].Relay != nil {
				t.Errorf("%+v, %v", box, err)
			}
			_, err = b.operator.DropOutbox(t.Context(), ids[0], messageAct)
			wantError(t, err, operator.ErrNotParked)
			b.drain(t, "canary large")
			if box, err = b.operator.Outbox(t.Context()); err != nil || box.Pending != 0 || box.Refused != 1 || box.Behind != 1 || box.Shards[0].Oldest != 0 {
				t.Errorf("%+v, %v", box, err)
			}
			list, err := b.operator.ListOutbox(t.Context(), operator.Page{})
			if err != nil || len(list.Messages) != 1 || list.Next != "" {
				t.Fatalf("%+v, %v", list, err)
			}
			if m := list.Messages[0]; m.ID != ids[0] || m.Topic != "transfers" || !strings.Contains(m.Refused, "too large") || string(m.Key) != "acme" || m.BodyBytes != 12 || !soon(m.PublishedAt) {
				t.Errorf("%+v", m)
			}
			state, err := b.operator.Message(t.Context(), ids[1], "")
			if err != nil || len(state.Outbox) != 1 || state.Outbox[0].Front != ids[0] || state.Outbox[0].Refused != "" {
				t.Errorf("%+v, %v", state, err)
			}
			do, want := b.operator.DropOutbox, []string{"after"}
			if retry {
				do, want = b.operator.RetryOutbox, []string{"canary large", "after"}
			}
			if m, err := do(t.Context(), ids[0], messageAct); err != nil || m.Refused == "" {
				t.Fatalf("%+v, %v", m, err)
			}
			if got := b.drain(t, ""); !slices.Equal(got, want) {
				t.Errorf("the broker got %q, want %q", got, want)
			}
			if got := b.Text(t, "SELECT action || ' ' || scope || ' ' || key || ' ' || (message->>'refused') FROM idempotency_audit"); !strings.HasPrefix(got, "outbox-"+name+" transfers "+ids[0]) || !strings.Contains(got, "too large") {
				t.Errorf("the audit has %q", got)
			}
			_, err = do(t.Context(), ids[0], messageAct)
			wantError(t, err, operator.ErrNotParked)
		})
	}
}

// One timeline has all events of a message: those of the outbox, of each consumer and of the
// operators.
func TestTimelineOfAMessage(t *testing.T) {
	t.Parallel()
	b := setupMessages(t)
	id := b.publish(t, "canary", "canary poison")[0]
	deliver := func(name string, c *consumer.Consumer) {
		t.Helper()
		for settled := 0; settled == 0; {
			settled, _ = c.Receive(t.Context(), consumer.Partition{Source: "transfers"}, []consumer.Delivery{{Message: message.Message{ID: id, Topic: "transfers", Body: []byte("canary poison")}}})
		}
	}
	deliver("ledger", b.consumer)
	deliver("mails", consumer.New("mails", b.Store.Inbox(), waitingSource{}, func(context.Context, *consumer.Delivery) error { return nil }, nil))
	if _, err := b.operator.Redrive(t.Context(), "ledger", id, messageAct); err != nil {
		t.Fatal(err)
	}
	state, err := b.operator.Message(t.Context(), id, "")
	if err != nil || len(state.Outbox) != 1 || len(state.Parked) != 1 || len(state.Handled) != 1 || state.Handled[0].Consumer != "mails" || state.Handled[0].Record.Status != 204 {
		t.Fatalf("%+v, %v", state, err)
	}
	var kinds []string
	for i, e := range state.Events {
		kinds = append(kinds, e.Consumer+" "+string(e.Kind))
		if i > 0 && e.At.Before(state.Events[i-1].At) {
			t.Errorf("%v is before %v", e.Kind, state.Events[i-1].Kind)
		}
	}
	slices.Sort(kinds)
	if want := []string{" published", "ledger act-redrive", "ledger next", "ledger parked", "mails expires", "mails recorded"}; !slices.Equal(kinds, want) {
		t.Errorf("events %q, want %q", kinds, want)
	}
	if state, err = b.operator.Message(t.Context(), id, "mails"); err != nil || len(state.Parked) != 0 || len(state.Handled) != 1 {
		t.Errorf("of mails alone: %+v, %v", state, err)
	}
	_, err = b.operator.Message(t.Context(), messageID(77), "")
	wantError(t, err, operator.ErrNoMessage)
	if events, err := b.operator.Timeline(t.Context(), idempotency.Key{Scope: "message:ledger", Value: id}); err != nil || len(events) != 3 {
		t.Errorf("the key's timeline: %+v, %v", events, err)
	}
}

// Consumers shows a consumer's position, its parked messages, and the session that works on a
// partition.
func TestConsumersShowWhoHoldsAPartition(t *testing.T) {
	t.Parallel()
	b := setupMessages(t)
	b.receive(t, 0, "fine", "canary poison", "after")
	b.Exec(t, "INSERT INTO message_parked (parked_at, not_before, position, partition, attempts, state, consumer, message_id, source, topic, error, headers, body)"+
		" VALUES (now(), now() - interval '1 hour', 0, 0, 1, 1, 'mails', 'x', 's', 't', 'e', '', '')")
	look := func() []operator.Consumer {
		t.Helper()
		list, err := b.operator.Consumers(t.Context(), "")
		if err != nil || len(list.Consumers) != 2 || list.Truncated || !soon(list.Now) {
			t.Fatalf("%+v, %v", list, err)
		}
		return list.Consumers
	}
	all := look()
	ledger, mails := all[0], all[1]
	if ledger.Name != "ledger" || ledger.Waiting != 0 || ledger.Behind != 1 || ledger.Dead != 1 || ledger.OldestDead <= 0 || ledger.OldestDue != 0 || len(ledger.Positions) != 1 {
		t.Errorf("%+v", ledger)
	}
	if p := ledger.Positions[0]; p.Source != "transfers" || p.Partition != 3 || p.Next != 3 || p.Deaths != 0 || !soon(p.MovedAt) || p.Holder != nil || p.Attempt.IsZero() {
		t.Errorf("%+v", p)
	}
	if mails.Name != "mails" || mails.Waiting != 1 || mails.OldestDue.Round(time.Minute) != time.Hour || len(mails.Positions) != 0 {
		t.Errorf("%+v", mails)
	}
	partition := consumer.Partition{Source: "transfers", Number: 3}
	batch, err := b.Store.Inbox().Begin(t.Context(), &consumer.Claim{Consumer: "ledger", Partition: partition, Attempt: idempotency.NewAttemptID(), Entries: []consumer.Entry{{ID: messageID(9), Topic: "transfers"}}})
	if err != nil {
		t.Fatal(err)
	}
	if p := look()[0].Positions[0]; p.Holder == nil || p.Holder.PID == 0 {
		t.Errorf("nobody is seen at the partition: %+v", p)
	}
	if err := batch.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if list, err := b.operator.Consumers(t.Context(), "mails"); err != nil || len(list.Consumers) != 1 {
		t.Errorf("%+v, %v", list, err)
	}
}

// While a relay publishes from a shard, it is shown.
func TestOutboxShowsTheRelay(t *testing.T) {
	t.Parallel()
	b := setupMessages(t)
	b.publish(t, "k", "body")
	shards, err := b.Store.Outbox().Waiting(t.Context())
	if err != nil || len(shards) != 1 {
		t.Fatalf("%v, %v", shards, err)
	}
	seen := false
	if _, err := b.Store.Outbox().Drain(t.Context(), shards[0], relay.Limits{Messages: 1, Bytes: 1}, func(context.Context, []message.Message) []error {
		box, err := b.operator.Outbox(t.Context())
		seen = err == nil && len(box.Shards) == 1 && box.Shards[0].Number == shards[0] && box.Shards[0].Relay != nil
		return []error{nil}
	}); err != nil || !seen {
		t.Errorf("seen %v, %v", seen, err)
	}
}

// Each act needs its right, and the ones of the package's documentation suffice.
func TestRightsOfActsOnMessages(t *testing.T) {
	t.Parallel()
	b := setupMessages(t)
	b.receive(t, 0, "canary poison", "after")
	ids := b.publish(t, "k", "large")
	b.drain(t, "large")
	reader := b.role(t, "SELECT ON idempotency_keys, idempotency_audit, idempotency_events, message_outbox, message_offsets, message_parked")
	if _, err := reader.Message(t.Context(), messageID(0), ""); err != nil {
		t.Error(err)
	}
	if _, err := reader.Consumers(t.Context(), ""); err != nil {
		t.Error(err)
	}
	if _, err := reader.Outbox(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := reader.Drop(t.Context(), "ledger", messageID(0), messageAct); err == nil || !strings.Contains(err.Error(), "right") {
		t.Errorf("a reader drops: %v", err)
	}
	o := b.role(t, "SELECT ON idempotency_keys, message_offsets", "SELECT, INSERT ON idempotency_audit", "SELECT, UPDATE, DELETE ON message_outbox, message_parked")
	if _, err := o.Redrive(t.Context(), "ledger", messageID(0), messageAct); err != nil {
		t.Error(err)
	}
	if _, err := o.Drop(t.Context(), "ledger", messageID(0), messageAct); err != nil {
		t.Error(err)
	}
	if _, err := o.RetryOutbox(t.Context(), ids[0], messageAct); err != nil {
		t.Error(err)
	}
	b.drain(t, "large")
	if _, err := o.DropOutbox(t.Context(), ids[0], messageAct); err != nil {
		t.Error(err)
	}
}

// An act that can't be done is refused with the remedy.
func TestInvalidMessageCalls(t *testing.T) {
	t.Parallel()
	b := setupMessages(t)
	ctx := t.Context()
	for name, do := range map[string]func() error{
		"state": func() error {
			_, err := b.operator.ListParked(ctx, operator.ParkedFilter{State: "canary"}, operator.Page{})
			return err
		},
		"rows": func() error {
			_, err := b.operator.ListParked(ctx, operator.ParkedFilter{}, operator.Page{Rows: operator.PageRowsMax + 1})
			return err
		},
		"backward": func() error { _, err := b.operator.ListOutbox(ctx, operator.Page{Descending: true}); return err },
		"cursor":   func() error { _, err := b.operator.ListOutbox(ctx, operator.Page{After: "!"}); return err },
		"reason": func() error {
			_, err := b.operator.Redrive(ctx, "ledger", messageID(0), operator.MessageAct{})
			return err
		},
		"seen": func() error {
			_, err := b.operator.RetryOutbox(ctx, messageID(0), operator.MessageAct{Act: act, Seen: "dead-1"})
			return err
		},
		"attempt": func() error {
			a := messageAct
			a.Attempt = idempotency.NewAttemptID()
			_, err := b.operator.Drop(ctx, "ledger", messageID(0), a)
			return err
		},
	} {
		if err := do(); !errors.Is(err, operator.ErrInvalid) || bytes.Contains([]byte(err.Error()), []byte("canary")) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := b.operator.ListParked(ctx, operator.ParkedFilter{}, operator.Page{Rows: operator.PageRowsMax}); err != nil {
		t.Error(err)
	}
}
