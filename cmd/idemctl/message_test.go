package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/relay"
)

// waitingSource is for tests that call Receive themselves.
type waitingSource struct{}

func (waitingSource) Run(ctx context.Context, _ consumer.Receiver) error { <-ctx.Done(); return nil }

// An operator finds, reads, redrives and drops a dead letter. An error names the flag that is
// missing.
func TestMessageCommands(t *testing.T) {
	t.Parallel()
	b := setup(t)
	c := consumer.New("ledger", b.Store.Inbox(), waitingSource{}, func(_ context.Context, m *consumer.Delivery) error {
		if string(m.Body) == "canary poison" {
			return consumer.Reject(errors.New("unreadable\x1b[31m"))
		}
		return nil
	}, &consumer.Options{Logger: slog.New(slog.DiscardHandler)})
	id := func(n int) string { return fmt.Sprintf("00000000-0000-8000-8000-%012d", n) }
	var deliveries []consumer.Delivery
	for n, body := range []string{"fine", "canary poison", "after"} {
		deliveries = append(deliveries, consumer.Delivery{Offset: int64(n), Message: message.Message{ID: id(n), Topic: "transfers", Key: []byte("acme"), Body: []byte(body), Header: map[string][]string{"Type": {"canary"}}}})
	}
	for len(deliveries) > 0 {
		settled, _ := c.Receive(t.Context(), consumer.Partition{Source: "transfers", Number: 3}, deliveries)
		deliveries = deliveries[settled:]
	}

	wantText(t, b.want(t, 0, "message", "consumers").stdout, "ledger", "transfers", "DEATHS")
	seen := object[consumerJSON](t, b.want(t, 0, "--json", "message", "consumers", "--consumer", "ledger"))
	if seen.Dead != 1 || seen.Behind != 1 || len(seen.Positions) != 1 || seen.Positions[0].Next != 3 || seen.Positions[0].Partition != 3 {
		t.Errorf("%+v", seen)
	}
	list := b.want(t, 0, "message", "parked", "--consumer", "ledger", "--state", "dead").stdout
	wantText(t, list, id(1), "dead-1", "unreadable", "1 parked message")
	if strings.Contains(list, "\x1b") || strings.Contains(list, "canary") || strings.Contains(list, id(2)) {
		t.Errorf("%q", list)
	}
	page := b.want(t, 0, "--json", "message", "parked", "--rows", "1")
	if parked := objects[parkedJSON](t, page); len(parked) != 2 || parked[0].Seen != "dead-1" || parked[0].Key != "acme" || parked[0].Offset != 1 {
		t.Errorf("%+v", parked)
	}
	end := objects[pageEnd](t, page)
	rest := objects[parkedJSON](t, b.want(t, 0, "--json", "message", "parked", "--after", end[1].Page.Next))
	if len(rest) != 2 || rest[0].Front != id(1) || rest[0].State != "behind" {
		t.Errorf("%+v", rest)
	}
	b.want(t, exitUsage, "message", "parked", "--state", "broken")
	got := b.want(t, 0, "message", "get", id(1)).stdout
	wantText(t, got, "dead-1", "offset 1", "parked")
	if strings.Contains(got, "canary") {
		t.Errorf("the content is shown though nobody asked: %s", got)
	}
	wantText(t, b.want(t, 0, "message", "get", id(1), "--body").stdout, "canary poison", "Type: canary")
	wantText(t, b.want(t, 0, "message", "get", id(0)).stdout, "ledger: handled", "recorded")
	wantText(t, b.want(t, exitNotFound, "message", "get", id(7)).stderr, "nothing is known")

	act := func(code int, what, of string, more ...string) result {
		t.Helper()
		return b.want(t, code, append([]string{"message", what, of, "--reason", "ticket 7"}, more...)...)
	}
	wantText(t, act(exitUsage, "redrive", id(1), "--consumer", "ledger").stderr, "message get", "--seen", "--any-seen")
	act(exitUsage, "redrive", id(1), "--consumer", "ledger", "--seen", "dead-1", "--any-seen")
	wantText(t, act(exitUsage, "drop", id(1)).stderr, "--consumer", "--outbox")
	act(exitUsage, "drop", id(1), "--consumer", "ledger")
	wantText(t, act(exitRefused, "redrive", id(2), "--consumer", "ledger", "--any-seen").stderr, id(1))
	wantText(t, act(exitRefused, "redrive", id(1), "--consumer", "ledger", "--seen", "dead-7").stderr, "dead-1", "message get")
	act(exitNotFound, "redrive", id(1), "--consumer", "mails", "--any-seen")
	wantText(t, act(0, "redrive", id(1), "--consumer", "ledger", "--seen", "dead-1").stdout, "redriven", id(1))
	wantText(t, b.want(t, 0, "message", "get", id(1)).stdout, "waiting-0", "act-redrive", "ticket 7")
	done := object[struct {
		Done   string
		Before parkedJSON
	}](t, act(0, "drop", id(1), "--consumer", "ledger", "--seen", "waiting-0", "--json"))
	if done.Done != "dropped" || done.Before.ID != id(1) {
		t.Errorf("%+v", done)
	}
	wantText(t, act(exitNotFound, "drop", id(1), "--consumer", "ledger", "--any-seen").stderr, "message get")
	wantText(t, b.want(t, 0, "message", "get", id(1)).stdout, "act-drop")
	if got, want := b.Strings(t, "SELECT action FROM idempotency_audit ORDER BY id"), []string{"redrive", "drop"}; !slices.Equal(got, want) {
		t.Errorf("the audit has %q", got)
	}
}

// A message that the broker refused is shown with the broker's words, retried, and dropped.
func TestOutboxCommands(t *testing.T) {
	t.Parallel()
	b := setup(t)
	var id string
	result := b.Engine.Do(t.Context(), idempotency.Request{Key: key("k"), Fingerprint: idempotency.NewFingerprintV1("POST", "/", "", "", nil)}, func(ctx context.Context) (*idempotency.Answer, error) {
		id = message.ID(ctx, "transfer")
		return &idempotency.Answer{Status: 201}, message.Publish(ctx, "transfer", message.Message{Topic: "transfers", Key: []byte{0xff}, Body: []byte("canary")})
	})
	if result.Err != nil {
		t.Fatal(result.Err)
	}
	refuse := func() {
		t.Helper()
		shards, err := b.Store.Outbox().Waiting(t.Context())
		if err != nil || len(shards) != 1 {
			t.Fatalf("%v, %v", shards, err)
		}
		if _, err := b.Store.Outbox().Drain(t.Context(), shards[0], relay.Limits{Messages: 1, Bytes: 1}, func(context.Context, []message.Message) []error {
			return []error{fmt.Errorf("%w: too large", relay.ErrRefused)}
		}); err != nil {
			t.Fatal(err)
		}
	}
	wantText(t, b.want(t, 0, "message", "outbox").stdout, "PENDING", "1 pending, 0 refused")
	wantText(t, b.want(t, 0, "message", "get", id).stdout, "waits for a relay", "published")
	retry := []string{"message", "retry", id, "--reason", "x"}
	wantText(t, b.want(t, exitNotFound, retry...).stderr, "not parked")
	refuse()
	wantText(t, b.want(t, 0, "message", "outbox").stdout, id, "too large", "0 pending, 1 refused")
	r := b.want(t, 0, "--json", "message", "outbox")
	if first := objects[struct{ Outbox outboxJSON }](t, r); len(first) != 3 || first[0].Outbox.Refused != 1 || len(first[0].Outbox.Shards) != 1 {
		t.Errorf("%+v", first)
	}
	if m := objects[outboxMessageJSON](t, r)[1]; m.ID != id || string(m.KeyBytes) != "\xff" || m.Refused == "" {
		t.Errorf("%+v", m)
	}
	wantText(t, b.want(t, 0, retry...).stdout, "retried", id)
	refuse()
	b.want(t, exitUsage, "message", "drop", id, "--outbox", "--seen", "dead-1", "--reason", "x")
	wantText(t, b.want(t, 0, "message", "drop", id, "--outbox", "--reason", "x").stdout, "dropped", "nobody gets it")
	wantText(t, b.want(t, 0, "message", "get", id).stdout, "act-outbox-retry", "act-outbox-drop")
	wantText(t, b.want(t, 0, "message", "outbox").stdout, "0 pending, 0 refused")
}
