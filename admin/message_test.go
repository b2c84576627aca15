package admin_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/admin"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/relay"
)

// waitingSource is for tests that call Receive themselves.
type waitingSource struct{}

func (waitingSource) Run(ctx context.Context, _ consumer.Receiver) error { <-ctx.Done(); return nil }

func messageID(n int) string { return fmt.Sprintf("00000000-0000-8000-8000-%012d", n) }

// park makes the consumer ledger park two messages: 1, which is dead, and 2, which is behind it.
func (b *testBundle) park(t testing.TB) {
	t.Helper()
	c := consumer.New("ledger", b.Store.Inbox(), waitingSource{}, func(context.Context, *consumer.Delivery) error {
		return consumer.Reject(errors.New("unreadable"))
	}, &consumer.Options{Logger: slog.New(slog.DiscardHandler)})
	var deliveries []consumer.Delivery
	for n := 1; n <= 2; n++ {
		deliveries = append(deliveries, consumer.Delivery{Offset: int64(n), Message: message.Message{ID: messageID(n), Topic: "transfers", Key: []byte("canary-key"), Body: []byte("canary-body"), Header: map[string][]string{"Type": {"canary-header"}}}})
	}
	for deadline := time.Now().Add(30 * time.Second); len(deliveries) > 0; {
		settled, _ := c.Receive(context.Background(), consumer.Partition{Source: "transfers", Number: 3}, deliveries)
		if deliveries = deliveries[settled:]; time.Now().After(deadline) {
			t.Fatal("the messages are not settled")
		}
	}
}

// refuse publishes a message, which the broker refuses, and returns its id.
func (b *testBundle) refuse(t testing.TB) (id string) {
	t.Helper()
	result := b.Engine.Do(context.Background(), testservice.Request(idempotency.Key{Scope: "acme", Value: "publishes"}), func(ctx context.Context) (*idempotency.Answer, error) {
		id = message.ID(ctx, "transfer")
		return paid, message.Publish(ctx, "transfer", message.Message{Topic: "transfers", Key: []byte("canary-key"), Body: []byte("canary-body")})
	})
	if result.Err != nil {
		t.Fatal(result.Err)
	}
	for shard := range 16 {
		if _, err := b.Store.Outbox().Drain(context.Background(), shard, relay.Limits{Messages: 1, Bytes: 1}, func(context.Context, []message.Message) []error {
			return []error{fmt.Errorf("%w: too large", relay.ErrRefused)}
		}); err != nil {
			t.Fatal(err)
		}
	}
	return id
}

const messageAudit = "SELECT action || ' ' || scope || ' ' || key || ' by ' || actor || ': ' || reason FROM idempotency_audit ORDER BY id"

// An operator finds a dead letter on the page, and redrives or drops it, once.
func TestDeadLettersOnThePage(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	c := b.as("alice", everything...)
	for path, want := range map[string]string{"consumers": "There are no consumers", "outbox": "The outbox is empty", "parked": "There are no dead messages"} {
		if page := c.page(t, path); !strings.Contains(page, want) {
			t.Errorf("%s without any: %s", path, page)
		}
	}
	b.park(t)
	consumers := c.page(t, "consumers")
	for _, want := range []string{"ledger", "transfers", "Deaths", "nobody now"} {
		if !strings.Contains(consumers, want) {
			t.Errorf("the page of the consumers does not say %q", want)
		}
	}
	dead, all := c.page(t, "parked"), c.page(t, link(t, consumers, "parked?consumer="))
	if strings.Contains(dead, messageID(2)) || !strings.Contains(dead, messageID(1)) || !strings.Contains(all, messageID(2)) {
		t.Errorf("the dead: %s, and all: %s", dead, all)
	}
	text(t, c.get("parked?state=broken"), http.StatusBadRequest)
	text(t, c.get("parked?q=anything"), http.StatusNotFound)
	text(t, c.get("message?k=anything"), http.StatusNotFound)
	behind := c.page(t, links(all, "message?")[1])
	if !strings.Contains(behind, "Behind") || !strings.Contains(behind, messageID(1)) || len(links(behind, "redrive?")) != 0 {
		t.Errorf("the one behind: %s", behind)
	}
	page := c.page(t, link(t, dead, "message?"))
	if content := c.page(t, link(t, page, "content?")); !strings.Contains(content, "canary-body") || !strings.Contains(content, "canary-key") || !strings.Contains(content, "canary-header") {
		t.Errorf("the content: %s", content)
	} else {
		wantAccessible(t, "content", content)
	}
	looks := b.as("bob", admin.PermissionView, admin.PermissionRedrive)
	text(t, looks.get(link(t, page, "content?")), http.StatusForbidden)
	if len(links(looks.page(t, link(t, dead, "message?")), "content?")) != 0 {
		t.Error("the content is offered to somebody who may not see it")
	}
	confirm := c.page(t, link(t, page, "redrive?"))
	for _, want := range []string{"unreadable", "offset 1", "under the same id", `name="reason"`} {
		if !strings.Contains(confirm, want) {
			t.Errorf("the confirmation does not say %q", want)
		}
	}
	for name, page := range map[string]string{"consumers": consumers, "parked": all, "message": page, "redrive": confirm} {
		wantAccessible(t, name, page)
		if strings.Contains(page, "canary") {
			t.Errorf("the page %s shows a key or a body", name)
		}
	}
	form := url.Values{"ticket": {field(t, confirm, "ticket")}}
	text(t, c.post("redrive", form), http.StatusUnprocessableEntity) // no reason
	form.Set("reason", "mended")
	after := c.page(t, location(t, c.post("redrive", form)))
	for _, want := range []string{"<strong>Done.</strong>", "Redriven by alice: mended", "waiting"} {
		if !strings.Contains(after, want) {
			t.Errorf("the page after does not say %q: %s", want, after)
		}
	}
	text(t, c.post("redrive", form), http.StatusConflict) // the form was made for the dead message

	form = url.Values{"ticket": {field(t, c.page(t, link(t, after, "drop?")), "ticket")}, "reason": {"not wanted"}}
	if page := text(t, c.post("drop", form), http.StatusUnprocessableEntity); !strings.Contains(page, "type the word drop") {
		t.Errorf("%s", page)
	}
	form.Set("confirm", "drop")
	if page := c.page(t, location(t, c.post("drop", form))); !strings.Contains(page, "Dropped by alice: not wanted") || len(links(page, "drop?")) != 0 {
		t.Errorf("after the drop: %s", page)
	}
	text(t, c.post("drop", form), http.StatusNotFound)
	if got, want := b.Strings(t, messageAudit), []string{
		"redrive message:ledger " + messageID(1) + " by alice: mended", "drop message:ledger " + messageID(1) + " by alice: not wanted",
	}; !slices.Equal(got, want) {
		t.Errorf("the audit table has %q", got)
	}
	if log := b.log.String(); strings.Contains(log, "canary") || strings.Contains(log, messageID(1)) || !strings.Contains(log, "act=redrive actor=alice") {
		t.Errorf("the log has %s", log)
	}
}

// A message that the broker refused is retried, or dropped.
func TestOutboxOnThePage(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	id := b.refuse(t)
	c := b.as("alice", everything...)
	outbox := c.page(t, "outbox")
	page := c.page(t, link(t, outbox, "message?"))
	confirm := c.page(t, link(t, page, "retry?"))
	for name, page := range map[string]string{"outbox": outbox, "message": page, "retry": confirm} {
		wantAccessible(t, name, page)
		if strings.Contains(page, "canary") || !strings.Contains(page, "too large") {
			t.Errorf("the page %s shows a key or a body, or not why: %s", name, page)
		}
	}
	form := url.Values{"ticket": {field(t, confirm, "ticket")}, "reason": {"mended"}}
	if page := c.page(t, location(t, c.post("retry", form))); !strings.Contains(page, "Given to the relay again by alice: mended") || len(links(page, "retry?")) != 0 {
		t.Errorf("after the retry: %s", page)
	}
	text(t, c.post("retry", form), http.StatusNotFound)
	b.Exec(t, "UPDATE message_outbox SET refused = 'too large'")
	form = url.Values{"ticket": {field(t, c.page(t, link(t, c.page(t, link(t, c.page(t, "outbox"), "message?")), "drop?")), "ticket")}, "reason": {"x"}, "confirm": {"drop"}}
	location(t, c.post("drop", form))
	if got, want := b.Strings(t, messageAudit), []string{"outbox-retry transfers " + id + " by alice: mended", "outbox-drop transfers " + id + " by alice: x"}; !slices.Equal(got, want) {
		t.Errorf("the audit table has %q", got)
	}
	if n := b.Count(t, "SELECT count(*) FROM message_outbox"); n != 0 {
		t.Error("it is still there")
	}
}

// An act on a message needs its own permission, and a ticket that was made for it.
func TestActsOnMessagesAreAllowedOneByOne(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	secret := func(o *admin.Options) { o.Secret = []byte(strings.Repeat("s", admin.SecretBytesMin)) }
	b.mount(secret)
	b.park(t)
	b.refuse(t)
	all := b.as("alice", everything...)
	parked, refused := link(t, all.page(t, "parked"), "message?"), link(t, all.page(t, "outbox"), "message?")
	acts := map[string]struct {
		page  string
		needs admin.Permission
	}{"redrive": {parked, admin.PermissionRedrive}, "drop": {parked, admin.PermissionDrop}, "retry": {refused, admin.PermissionRedrive}}
	path := func(act string) string { return strings.Replace(acts[act].page, "message?", act+"?", 1) }
	tickets := map[string]string{}
	for act := range acts {
		tickets[act] = field(t, all.page(t, path(act)), "ticket")
	}
	form := func(ticket string) url.Values {
		return url.Values{"ticket": {ticket}, "reason": {"x"}, "confirm": {"drop"}}
	}
	for _, has := range []admin.Permission{admin.PermissionRedrive, admin.PermissionDrop, admin.PermissionSettle, admin.PermissionDelete} {
		c := b.as("alice", admin.PermissionView, has)
		for act, test := range acts {
			if offered := len(links(c.page(t, test.page), act+"?")) > 0; offered != (test.needs == has) {
				t.Errorf("with %s: %s is offered: %v", has, act, offered)
			}
			if test.needs != has {
				text(t, c.get(path(act)), http.StatusForbidden)
				text(t, c.post(act, form(tickets[act])), http.StatusForbidden)
			}
		}
	}
	for act := range acts {
		for other, ticket := range tickets {
			if other != act {
				text(t, all.post(act, form(ticket)), http.StatusForbidden)
			}
		}
		text(t, b.as("bob", everything...).post(act, form(tickets[act])), http.StatusForbidden)
	}
	// An act that is impossible is not offered, and is refused.
	text(t, all.get(strings.Replace(refused, "message?", "redrive?", 1)), http.StatusNotFound)
	text(t, all.get(strings.Replace(parked, "message?", "retry?", 1)), http.StatusNotFound)
	b.mount(func(o *admin.Options) { secret(o); o.ReadOnly = true })
	for act, test := range acts {
		if len(links(all.page(t, test.page), act+"?")) > 0 {
			t.Errorf("%s is offered where one only looks", act)
		}
		text(t, all.post(act, form(tickets[act])), http.StatusForbidden)
	}
	if got := b.Strings(t, messageAudit); got != nil {
		t.Errorf("the audit table has %q", got)
	}
}

// The list continues over several pages, and no id is in a URL.
func TestParkedMessagesArePaged(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.Exec(t, `INSERT INTO message_parked (parked_at, position, partition, attempts, state, consumer, message_id, source, topic, error, headers, body)
		SELECT now(), i, 0, 1, 3, 'ledger', 'message-' || i, 's', 't', 'e', '', '' FROM generate_series(1, 60) AS i`)
	c := b.as("alice", admin.PermissionView)
	seen, pages := map[string]bool{}, 0
	for next := "parked?consumer=ledger&state=dead"; next != ""; pages++ {
		page := c.page(t, next)
		for _, one := range links(page, "message?") {
			if seen[one] || strings.Contains(one, "message-") {
				t.Errorf("%s came before, or names its message", one)
			}
			seen[one] = true
		}
		next = ""
		for _, more := range links(page, "parked?q=") {
			if strings.Contains(page, `href="`+more+`" rel="next"`) {
				next = more
			}
		}
	}
	if len(seen) != 60 || pages != 2 {
		t.Errorf("%d messages on %d pages", len(seen), pages)
	}
}
