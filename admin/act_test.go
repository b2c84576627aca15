package admin_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/admin"
)

const auditRows = "SELECT action || ' ' || scope || ' ' || key || ' ' || status || ' by ' || actor || ': ' || reason FROM idempotency_audit ORDER BY id"

// Deleting needs a confirmation, deletes the record and adds a row to the audit table; a retry runs
// again.
func TestDelete(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.record(t, "acme", "key-1", paid)
	b.record(t, "acme", "key-2", paid)
	c := b.as("alice", everything...)

	confirm := c.page(t, link(t, c.page(t, c.open(t, "acme", "key-1")), "delete?"))
	for _, want := range []string{"will run again, and may pay twice", "key-1", "acme", `name="reason"`, `name="confirm"`, "201 executed"} {
		if !strings.Contains(confirm, want) {
			t.Errorf("the confirmation does not say %q", want)
		}
	}
	b.wantUntouched(t, "key-1")

	after := location(t, c.post("delete", url.Values{"ticket": {field(t, confirm, "ticket")}, "reason": {" OPS-7: wrong amount "}, "confirm": {"delete"}}))
	if got := b.Strings(t, "SELECT key FROM idempotency_keys"); !slices.Equal(got, []string{"key-2"}) {
		t.Errorf("records left are %q", got)
	}
	if got := b.Strings(t, auditRows); !slices.Equal(got, []string{"delete acme key-1 201 by alice: OPS-7: wrong amount"}) {
		t.Errorf("the audit table has %q", got)
	}
	page := c.page(t, after)
	for _, want := range []string{"<strong>Deleted.</strong>", "This key has no record", "Deleted by alice", "OPS-7: wrong amount"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page after does not say %q: %s", want, page)
		}
	}
	if page := b.as("bob", everything...).page(t, after); strings.Contains(page, "<strong>Deleted.</strong>") {
		t.Error("another is told that it was he")
	}
	runs := 0
	result := b.Engine.Do(t.Context(), idempotency.Request{
		Key: idempotency.Key{Scope: "acme", Value: "key-1"}, Fingerprint: idempotency.NewFingerprintV1("POST", "/transfers", "", "application/json", []byte("key-1")),
	}, func(context.Context) (*idempotency.Answer, error) { runs++; return paid, nil })
	if result.Outcome != idempotency.OutcomeExecuted || runs != 1 {
		t.Errorf("a retry is %s, after %d runs", result.Outcome, runs)
	}
}

// Expiring a record sets its expiry to now; it still counts until the reaper deletes it.
func TestExpire(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.record(t, "acme", "key-1", paid)
	c := b.as("alice", everything...)
	confirm := c.page(t, link(t, c.page(t, c.open(t, "acme", "key-1")), "expire?"))
	for _, want := range []string{"may pay twice", `name="reason"`} {
		if !strings.Contains(confirm, want) {
			t.Errorf("the confirmation does not say %q", want)
		}
	}
	if strings.Contains(confirm, `name="confirm"`) {
		t.Error("a word is to be typed")
	}
	after := location(t, c.post("expire", url.Values{"ticket": {field(t, confirm, "ticket")}, "reason": {"done with it"}}))
	if got := b.Strings(t, "SELECT (expires_at <= now())::text FROM idempotency_keys"); !slices.Equal(got, []string{"true"}) {
		t.Errorf("its time is over: %q", got)
	}
	if got := b.Strings(t, auditRows); !slices.Equal(got, []string{"expire acme key-1 201 by alice: done with it"}) {
		t.Errorf("the audit table has %q", got)
	}
	page := c.page(t, after)
	for _, want := range []string{"<strong>Expired.</strong>", "Expired by alice", "replayed until the reaper deletes it"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page after does not say %q", want)
		}
	}
}

// A form that this handler did not make for this actor, act and record, or made too long ago, does
// nothing.
func TestFormWithoutItsTicketIsRefused(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.record(t, "acme", "key-1", paid)
	alice, bob := b.as("alice", everything...), b.as("bob", everything...)
	now := time.Now()
	b.handler.SetNow(func() time.Time { return now })
	good := alice.ticket(t, "acme", "key-1", admin.PermissionDelete)
	link, err := url.Parse(alice.open(t, "acme", "key-1"))
	if err != nil {
		t.Fatal(err)
	}
	flipped := []byte(good)
	flipped[len(flipped)/2] ^= 1
	other := setup(t, nil)
	other.record(t, "acme", "key-1", paid)

	for name, ticket := range map[string]string{
		"none":                 "",
		"anything":             "anything",
		"a link's token":       link.Query().Get("k"),
		"changed":              string(flipped),
		"cut short":            good[:len(good)-4],
		"for another act":      alice.ticket(t, "acme", "key-1", admin.PermissionExpire),
		"another's":            bob.ticket(t, "acme", "key-1", admin.PermissionDelete),
		"of another process":   other.as("alice", everything...).ticket(t, "acme", "key-1", admin.PermissionDelete),
		"twice the same field": "",
	} {
		form := url.Values{"reason": {"x"}, "confirm": {"delete"}, "ticket": {ticket}}
		if name == "twice the same field" {
			form["ticket"] = []string{"anything", good}
		}
		if body := text(t, alice.post("delete", form), http.StatusForbidden); !strings.Contains(body, "Nothing was done") {
			t.Errorf("%s: %s", name, body)
		}
	}
	// A ticket in the URL does not count.
	text(t, alice.post("delete?ticket="+good+"&reason=x&confirm=delete", nil), http.StatusForbidden)
	now = now.Add(admin.FormAgeMax + time.Second)
	form := url.Values{"reason": {"x"}, "confirm": {"delete"}, "ticket": {good}}
	if body := text(t, alice.post("delete", form), http.StatusForbidden); !strings.Contains(body, "too old") {
		t.Errorf("a form of half an hour ago: %s", body)
	}
	b.wantUntouched(t, "key-1")
	now = now.Add(-time.Second)
	location(t, alice.post("delete", form))
}

// Deleting needs the word and a reason. The refused form keeps the reason.
func TestDeleteNeedsTheWordAndAReason(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.record(t, "acme", "key-1", paid)
	c := b.as("alice", everything...)
	ticket := c.ticket(t, "acme", "key-1", admin.PermissionDelete)
	for name, form := range map[string]url.Values{
		"no word":          {"reason": {"typed before"}},
		"another word":     {"reason": {"typed before"}, "confirm": {"forge"}},
		"no reason":        {"confirm": {"delete"}},
		"an empty reason":  {"confirm": {"delete"}, "reason": {" \n"}},
		"a long reason":    {"confirm": {"delete"}, "reason": {strings.Repeat("r", 1001)}},
		"a reason of NULs": {"confirm": {"delete"}, "reason": {"a\x00b"}},
	} {
		form.Set("ticket", ticket)
		page := text(t, c.post("delete", form), http.StatusUnprocessableEntity)
		if !strings.Contains(page, `role="alert"`) || !strings.Contains(page, "Nothing was done") {
			t.Errorf("%s: it is not said", name)
		}
		if reason := form.Get("reason"); reason == "typed before" && !strings.Contains(page, reason+"</textarea>") {
			t.Errorf("%s: what was typed is lost", name)
		}
		ticket = field(t, page, "ticket") // the form in the answer works
	}
	b.wantUntouched(t, "key-1")
	location(t, c.post("delete", url.Values{"ticket": {ticket}, "confirm": {"delete"}, "reason": {strings.Repeat("r", 1000)}}))
}

// An actor who looked at one record does not delete the next one of the same key.
func TestRecordThatChangedIsNotDeleted(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.record(t, "acme", "key-1", paid)
	c := b.as("alice", everything...)
	form := url.Values{"ticket": {c.ticket(t, "acme", "key-1", admin.PermissionDelete)}, "reason": {"x"}, "confirm": {"delete"}}
	b.Exec(t, "DELETE FROM idempotency_keys")
	text(t, c.post("delete", form), http.StatusNotFound)
	b.record(t, "acme", "key-1", paid)
	if body := text(t, c.post("delete", form), http.StatusConflict); !strings.Contains(body, "Nothing was done") {
		t.Error(body)
	}
	b.wantUntouched(t, "key-1")
}

// A held key is shown as held, and not changed.
func TestHeldKey(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.record(t, "acme", "key-1", paid)
	c := b.as("alice", everything...)
	form := url.Values{"ticket": {c.ticket(t, "acme", "key-1", admin.PermissionDelete)}, "reason": {"x"}, "confirm": {"delete"}}

	tx, err := b.Pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.Background()) }()
	number := idempotency.Key{Scope: "acme", Value: "key-1"}.LockNumber("public.idempotency_keys")
	if _, err := tx.Exec(t.Context(), "SELECT pg_advisory_xact_lock($1)", number); err != nil {
		t.Fatal(err)
	}
	if page := c.page(t, c.open(t, "acme", "key-1")); !strings.Contains(page, "Somebody holds this key now") {
		t.Error("the page does not say that it is held")
	}
	text(t, c.post("delete", form), http.StatusConflict)
	b.wantUntouched(t, "key-1")
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	location(t, c.post("delete", form))
}

// An attempt that has not committed is shown while it runs.
func TestRunningAttemptIsShown(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	c := b.as("alice", everything...)
	begun, finish, ended := make(chan struct{}), make(chan struct{}), make(chan idempotency.Result)
	go func() {
		ended <- b.Engine.Do(context.Background(), idempotency.Request{
			Key: idempotency.Key{Scope: "acme", Value: "slow"}, Fingerprint: idempotency.NewFingerprintV1("POST", "/", "", "", nil),
		}, func(context.Context) (*idempotency.Answer, error) { close(begun); <-finish; return paid, nil })
	}()
	<-begun
	page := c.page(t, c.open(t, "acme", "slow"))
	figures := c.page(t, "stats")
	close(finish)
	if result := <-ended; result.Err != nil {
		t.Fatal(result.Err)
	}
	for _, want := range []string{"Somebody holds this key now", "Not recorded yet"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not say %q", want)
		}
	}
	if !strings.Contains(figures, `<dd data-figure="running">1</dd>`) {
		t.Error("the figures do not count it")
	}
	if page := c.page(t, c.open(t, "acme", "slow")); strings.Contains(page, "Somebody holds") || !strings.Contains(page, "201 executed") {
		t.Error("once it has ended the page is not the record's")
	}
}

// An act that has begun is finished even if the client is gone.
func TestActIsFinishedThoughTheClientLeft(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.record(t, "acme", "key-1", paid)
	c := b.as("alice", everything...)
	form := url.Values{"ticket": {c.ticket(t, "acme", "key-1", admin.PermissionDelete)}, "reason": {"x"}, "confirm": {"delete"}}
	r := httptest.NewRequest(http.MethodPost, prefix+"/delete", strings.NewReader(form.Encode()))
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	gone, cancel := context.WithCancel(r.Context())
	cancel()
	location(t, c.send(r.WithContext(gone)))
	if got := b.Strings(t, auditRows); len(got) != 1 {
		t.Errorf("the audit table has %q", got)
	}
}

// Without its audit row no act is done.
func TestNoActWithoutItsAuditRow(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.record(t, "acme", "key-1", paid)
	c := b.as("alice", everything...)
	form := url.Values{"ticket": {c.ticket(t, "acme", "key-1", admin.PermissionDelete)}, "reason": {"x"}, "confirm": {"delete"}}
	b.Exec(t, "ALTER TABLE idempotency_audit RENAME TO away")
	if body := text(t, c.post("delete", form), http.StatusServiceUnavailable); !strings.Contains(body, "Run the migrations") {
		t.Error(body)
	}
	b.Exec(t, "ALTER TABLE away RENAME TO idempotency_audit")
	b.wantUntouched(t, "key-1")
}

// With a shared secret a process accepts the forms and links of another process; without one it
// does not.
func TestSecretIsSharedByProcesses(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.record(t, "acme", "key-1", paid)
	c := b.as("alice", everything...)
	secret := []byte(strings.Repeat("s", admin.SecretBytesMin))
	share := func(o *admin.Options) { o.Secret = secret }
	b.mount(share)
	key := c.open(t, "acme", "key-1")
	form := url.Values{"ticket": {c.ticket(t, "acme", "key-1", admin.PermissionDelete)}, "reason": {"x"}, "confirm": {"delete"}}
	b.mount(nil)
	text(t, c.get(key), http.StatusNotFound)
	text(t, c.post("delete", form), http.StatusForbidden)
	b.mount(share)
	c.page(t, key)
	location(t, c.post("delete", form))
}
