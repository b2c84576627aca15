package admin_test

import (
	"context"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/admin"
	"github.com/paidonce/idempotency/internal/testservice"
)

// openRequest makes a request that calls another service and gets no reply, parked.
func (b *testBundle) openRequest(t testing.TB, key, parked string) {
	t.Helper()
	run := func(ctx context.Context) (*idempotency.Answer, error) {
		effect, err := testservice.Call(ctx, idempotency.Intent{Name: "charge", Kind: idempotency.EffectCall, Input: []byte(`"canary-input"`), Timeout: time.Second},
			idempotency.Lapse{Pause: time.Hour, Parked: parked, Reason: "effect charge: no reply"})
		switch {
		case err != nil:
			return nil, err
		case effect.State == idempotency.EffectDeclined:
			return &idempotency.Answer{Status: 402}, nil
		}
		return &idempotency.Answer{Status: 201, Body: effect.Output}, nil
	}
	b.resumable.Do(func() {
		b.Engine.Resumable("topup/1", func(idempotency.Key, []byte) (idempotency.RunFunc, error) { return run, nil })
	})
	request := testservice.Request(idempotency.Key{Scope: "acme", Value: key})
	request.Resumable, request.Stored = "topup/1", func() []byte { return []byte("canary-request") }
	if result := b.Engine.Do(t.Context(), request, run); !result.Accepted {
		t.Fatalf("%+v", result)
	}
}

const openAudit = "SELECT action || ' ' || COALESCE(effect, '-') || ' ' || key || ' by ' || actor || ': ' || reason FROM idempotency_audit ORDER BY id"

// act opens the confirmation of an act, and sends its form.
func (c *caller) act(t testing.TB, key, act string, form url.Values) *http.Response {
	t.Helper()
	form.Set("ticket", field(t, c.page(t, link(t, c.page(t, c.open(t, "acme", key)), act+"?k=")), "ticket"))
	return c.post(act, form)
}

// The list has the open requests, the oldest first, and can be narrowed to a route and to those
// that wait for a person. It shows nothing of an input or a request.
func TestOpenRequestsAreListed(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	c := b.as("alice", admin.PermissionView)
	if page := c.page(t, "open"); !strings.Contains(page, "There are no open requests") {
		t.Errorf("without any: %s", page)
	}
	b.openRequest(t, "parked-1", "no reply")
	b.openRequest(t, "waits-1", "")
	b.record(t, "acme", "ended-1", paid)
	page := c.page(t, "open")
	if first, second := strings.Index(page, "parked-1"), strings.Index(page, "waits-1"); first < 0 || second < first || strings.Contains(page, "ended-1") {
		t.Errorf("the list is %s", page)
	}
	for query, want := range map[string][2]bool{
		"parked=1": {true, false}, "route=topup%2F1": {true, true}, "route=topup%2F2": {false, false}, "parked=&route=": {true, true},
	} {
		page := c.page(t, "open?"+query)
		if got := [2]bool{strings.Contains(page, "parked-1"), strings.Contains(page, "waits-1")}; got != want {
			t.Errorf("%s: %v, want %v", query, got, want)
		}
	}
	text(t, c.get("open?q=anything"), http.StatusNotFound)
	detail := c.page(t, link(t, page, "key?"))
	for _, want := range []string{"topup/1", "charge", "intended", "no reply", "parked", b.Text(t, "SELECT derived_key::text FROM idempotency_effects WHERE key = 'parked-1'"), "Parked: it waits for a person"} {
		if !strings.Contains(detail, want) {
			t.Errorf("the page of the request does not say %q: %s", want, detail)
		}
	}
	settle := c.b.as("alice", everything...).page(t, link(t, b.as("alice", everything...).page(t, link(t, page, "key?")), "settle?"))
	for name, page := range map[string]string{"open": page, "key": detail, "settle": settle} {
		wantAccessible(t, name, page)
		if strings.Contains(page, "canary") {
			t.Errorf("the page %s shows an input or a request", name)
		}
	}
	if all := c.page(t, "list"); !strings.Contains(all, "none while it is open") {
		t.Error("the list of all keys does not say that it is open")
	}
}

// The list goes on over pages, and no key is in a URL.
func TestOpenRequestsArePaged(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.Exec(t, `INSERT INTO idempotency_keys (created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)
		SELECT now(), '2200-01-01', 0, 1, gen_random_uuid(), 'acme', 'open-' || i, sha256(''), '\x0100', '' FROM generate_series(1, 60) AS i`)
	b.Exec(t, `INSERT INTO idempotency_open (next_at, started_at, epoch, lease_ms, ttl_ms, runs, owned, scope, key, route, request)
		SELECT now(), now() + i * interval '1 second', 1, 1, 1, 1, false, 'acme', 'open-' || i, 'topup/1', '' FROM generate_series(1, 60) AS i`)
	c := b.as("alice", admin.PermissionView)
	seen, pages := map[string]bool{}, 0
	for next := "open?route=topup%2F1"; next != ""; pages++ {
		page := c.page(t, next)
		for _, key := range links(page, "key?") {
			if seen[key] || strings.Contains(key, "open-") {
				t.Errorf("%s came before, or names its key", key)
			}
			seen[key] = true
		}
		next = ""
		for _, more := range links(page, "open?q=") {
			if strings.Contains(page, `href="`+more+`" rel="next"`) {
				next = more
			}
		}
	}
	if len(seen) != 60 || pages < 2 {
		t.Errorf("%d requests on %d pages", len(seen), pages)
	}
}

// An operator settles the effect, and the service's handler makes the answer.
func TestSettledOnThePageAnsweredByTheHandler(t *testing.T) {
	t.Parallel()
	for as, test := range map[string]struct {
		output string
		status int
	}{"done": {`{"id":"ch_1"}`, 201}, "declined": {"", 402}} {
		b := setup(t, nil)
		b.openRequest(t, "key-1", "no reply")
		b.Exec(t, "UPDATE idempotency_effects SET sent_first_at = sent_first_at - interval '1 hour'") // its send is over
		c := b.as("alice", everything...)
		confirm := c.page(t, link(t, c.page(t, c.open(t, "acme", "key-1")), "settle?k="))
		for _, want := range []string{"What you say is believed", "charge", "handler makes the answer", `name="reason"`} {
			if !strings.Contains(confirm, want) {
				t.Errorf("the confirmation does not say %q", want)
			}
		}
		form := url.Values{"ticket": {field(t, confirm, "ticket")}, "as": {as}, "output": {test.output}, "reason": {"seen at the processor"}}
		after := c.page(t, location(t, c.post("settle", form)))
		state := map[string]string{"done": "stated", "declined": "declined"}[as]
		for _, want := range []string{"<strong>Done.</strong>", "settled as " + as + " by alice", "seen at the processor", `data-label="State">` + state} {
			if !strings.Contains(after, want) {
				t.Errorf("the page after does not say %q", want)
			}
		}
		// The form was made for the request before the act.
		text(t, c.post("settle", form), http.StatusConflict)
		if got := b.Strings(t, openAudit); !slices.Equal(got, []string{"settle-" + as + " charge key-1 by alice: seen at the processor"}) {
			t.Errorf("the audit table has %q", got)
		}
		if got := b.Text(t, "SELECT status::text FROM idempotency_keys"); got != "0" {
			t.Errorf("the page made the answer: %s", got)
		}
		if _, err := idempotency.NewCompleter(b.Engine, nil).Once(t.Context()); err != nil {
			t.Fatal(err)
		}
		if result := b.Engine.LookUp(t.Context(), testservice.Request(idempotency.Key{Scope: "acme", Value: "key-1"})); result.Answer == nil || result.Answer.Status != test.status || string(result.Answer.Body) != test.output {
			t.Errorf("%s: %+v", as, result)
		}
		text(t, c.post("settle", form), http.StatusNotFound)
		if strings.Contains(b.log.String(), "canary") || strings.Contains(b.log.String(), "ch_1") || !strings.Contains(b.log.String(), "act=settle actor=alice") {
			t.Errorf("the log has %s", b.log.String())
		}
	}
}

func TestResumeParkAndAbandonOnThePage(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.openRequest(t, "key-1", "no reply")
	c := b.as("alice", everything...)
	if page := c.page(t, location(t, c.act(t, "key-1", "resume", url.Values{"reason": {"r"}}))); !strings.Contains(page, "Resumed by alice") || b.Text(t, "SELECT (parked IS NULL AND next_at <= now())::text FROM idempotency_open") != "true" {
		t.Error("it is not due")
	}
	if page := c.page(t, location(t, c.act(t, "key-1", "park", url.Values{"reason": {"p"}}))); !strings.Contains(page, "Parked by alice") || len(links(page, "park?")) != 0 {
		t.Error("it is not parked, or can be parked again")
	}
	// The names of the effects that may have been sent must be typed.
	for _, typed := range []string{"", "abandon", "charge,mail"} {
		if page := text(t, c.act(t, "key-1", "abandon", url.Values{"reason": {"a"}, "confirm": {typed}}), http.StatusUnprocessableEntity); !strings.Contains(page, "Nothing was done") {
			t.Errorf("%q: %s", typed, page)
		}
	}
	page := c.page(t, location(t, c.act(t, "key-1", "abandon", url.Values{"reason": {"a"}, "confirm": {"charge"}})))
	if !strings.Contains(page, "Abandoned by alice") || b.Text(t, "SELECT count(*)::text FROM idempotency_keys") != "0" {
		t.Errorf("it is not abandoned: %s", page)
	}
	if got, want := b.Strings(t, openAudit), []string{"resume - key-1 by alice: r", "park - key-1 by alice: p", "abandon - key-1 by alice: a"}; !slices.Equal(got, want) {
		t.Errorf("the audit table has %q, want %q", got, want)
	}
}

// Wrong input does nothing, and the form keeps it.
func TestFormOfAnOpenRequestSaysWhatIsMissing(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.openRequest(t, "key-1", "no reply")
	c := b.as("alice", everything...)
	for name, test := range map[string]struct {
		form url.Values
		says string
	}{
		"nothing known":         {url.Values{"reason": {"x"}}, "say what is known"},
		"another settlement":    {url.Values{"reason": {"x"}, "as": {"paid"}}, "say what is known"},
		"done without a result": {url.Values{"reason": {"x"}, "as": {"done"}}, "needs the result"},
		"no JSON":               {url.Values{"reason": {"typed before"}, "as": {"done"}, "output": {"{ch_1"}}, "is not JSON"},
		"a result of a retry":   {url.Values{"reason": {"x"}, "as": {"retry"}, "output": {"{}"}}, "only what is done or declined"},
		"no reason":             {url.Values{"as": {"retry"}}, "say why"},
		"a long reason":         {url.Values{"as": {"retry"}, "reason": {strings.Repeat("r", 1001)}}, "too long"},
	} {
		page := text(t, c.act(t, "key-1", "settle", test.form), http.StatusUnprocessableEntity)
		if !strings.Contains(page, `role="alert"`) || !strings.Contains(page, "Nothing was done") || !strings.Contains(page, test.says) {
			t.Errorf("%s: it is not said", name)
		}
		if name == "no JSON" && (!strings.Contains(page, "{ch_1</textarea>") || !strings.Contains(page, "typed before</textarea>")) {
			t.Error("what was typed is lost")
		}
	}
	if got := b.Strings(t, openAudit); got != nil {
		t.Errorf("the audit table has %q", got)
	}
	location(t, c.act(t, "key-1", "settle", url.Values{"as": {"retry"}, "reason": {strings.Repeat("r", 1000)}}))
}

// An act on an open request needs its own permission, a ticket that was made for it, and a page
// that is not read-only.
func TestActsOnOpenRequestsAreAllowedOneByOne(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	now := time.Now()
	b.openRequest(t, "key-1", "")
	secret := func(o *admin.Options) { o.Secret = []byte(strings.Repeat("s", admin.SecretBytesMin)) }
	b.mount(secret)
	b.handler.SetNow(func() time.Time { return now })
	acts := map[string]admin.Permission{"settle": admin.PermissionSettle, "resume": admin.PermissionSettle, "park": admin.PermissionSettle, "abandon": admin.PermissionAbandon}
	all := b.as("alice", everything...)
	key := strings.TrimPrefix(all.open(t, "acme", "key-1"), "./")
	tickets := map[string]string{}
	path := func(act string) string { return strings.Replace(key, "key?", act+"?", 1) + "&e=charge" }
	for act := range acts {
		tickets[act] = field(t, all.page(t, path(act)), "ticket")
	}
	form := func(act string) url.Values {
		return url.Values{"ticket": {tickets[act]}, "as": {"retry"}, "reason": {"x"}, "confirm": {"charge"}}
	}
	for _, has := range []admin.Permission{admin.PermissionSettle, admin.PermissionAbandon, admin.PermissionExpire, admin.PermissionDelete} {
		c := b.as("alice", admin.PermissionView, has)
		page := c.page(t, key)
		for act, needs := range acts {
			if offered := len(links(page, act+"?")) > 0; offered != (needs == has) {
				t.Errorf("with %s: %s is offered: %v", has, act, offered)
			}
			if needs != has {
				text(t, c.get(path(act)), http.StatusForbidden)
				text(t, c.post(act, form(act)), http.StatusForbidden)
			}
		}
	}
	for act := range acts {
		for other, ticket := range tickets {
			wrong := form(act)
			wrong.Set("ticket", ticket)
			if other != act {
				text(t, all.post(act, wrong), http.StatusForbidden)
			}
		}
		text(t, b.as("bob", everything...).post(act, form(act)), http.StatusForbidden)
	}
	// No act on a record is offered, and one that is tried anyway is refused.
	page := all.page(t, key)
	for _, act := range []string{"expire", "delete", "body"} {
		if len(links(page, act+"?")) > 0 {
			t.Errorf("%s is offered", act)
		}
	}
	text(t, all.get(strings.Replace(key, "key?", "delete?", 1)), http.StatusConflict)
	now = now.Add(admin.FormAgeMax + time.Second)
	text(t, all.post("park", form("park")), http.StatusForbidden)
	b.mount(func(o *admin.Options) { secret(o); o.ReadOnly = true })
	page = all.page(t, key)
	for act := range acts {
		if len(links(page, act+"?")) > 0 {
			t.Errorf("%s is offered where one only looks", act)
		}
		text(t, all.get(path(act)), http.StatusForbidden)
		text(t, all.post(act, form(act)), http.StatusForbidden)
	}
	if got := b.Strings(t, openAudit); got != nil {
		t.Errorf("the audit table has %q", got)
	}
}

// A request that runs, one that somebody took over since, and an effect that has a result meanwhile
// are left alone.
func TestOpenRequestThatChangedIsLeftAlone(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.openRequest(t, "key-1", "")
	c := b.as("alice", everything...)
	page := c.page(t, c.open(t, "acme", "key-1"))
	ticket := field(t, c.page(t, link(t, page, "settle?k=")), "ticket")
	form := url.Values{"ticket": {ticket}, "as": {"retry"}, "reason": {"x"}}
	b.Exec(t, "UPDATE idempotency_open SET owned = true, next_at = now() + interval '1 minute'")
	if !strings.Contains(c.page(t, link(t, page, "settle?k=")), "An attempt runs") {
		t.Error("the form does not say that it runs")
	}
	text(t, c.post("settle", form), http.StatusConflict)
	b.Exec(t, "UPDATE idempotency_open SET owned = false, epoch = epoch + 1")
	text(t, c.post("settle", form), http.StatusConflict)
	b.Exec(t, "UPDATE idempotency_effects SET state = 2, output = '1', settled_at = now()")
	text(t, c.get(link(t, page, "settle?k=")), http.StatusConflict)
	if got := b.Strings(t, openAudit); got != nil {
		t.Errorf("the audit table has %q", got)
	}
}
