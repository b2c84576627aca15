package admin_test

import (
	"net/http"
	"strings"
	"testing"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/admin"
)

// A key is found even if it was copied from a header, with its quotes and spaces.
func TestKeyIsOpenedAsItIsCopied(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.record(t, "acme", "key-1", paid)
	c := b.as("alice", everything...)
	for _, key := range []string{"key-1", " key-1\n", `"key-1"`, ` "key-1" `} {
		if page := c.page(t, c.open(t, "acme", key)); !strings.Contains(page, "201 executed") {
			t.Errorf("%q is not found", key)
		}
	}
}

// The page of a key shows its record, its headers, and the events of services and operators.
func TestKeyPage(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.record(t, "acme", "key-1", &idempotency.Answer{
		Status: 201, Header: map[string][]string{"Content-Type": {"application/json"}, "Link": {"</a>", "</b>"}}, Body: []byte("hidden body"),
	})
	b.Exec(t, `INSERT INTO idempotency_events (at, duration_us, outcome, reason, attempts, scope, key, trace_id)
		SELECT clock_timestamp() + interval '1 second' * n, 2500, (ARRAY['replayed', 'mismatch', 'unknown'])[n], (ARRAY[NULL, 'key-reused', 'outcome-unknown'])[n], 1, 'acme', 'key-1', 'trace-' || n FROM generate_series(1, 3) AS n`)
	b.Exec(t, `INSERT INTO idempotency_audit (action, actor, reason, scope, key, attempt_id, status, record_created_at, record_expires_at)
		SELECT 'expire', 'bob <b>', 'why <i>', scope, key, attempt_id, status, created_at, expires_at FROM idempotency_keys`)
	record := b.Strings(t, "SELECT unnest(ARRAY[attempt_id::text, encode(fingerprint, 'hex'), trace_id, to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS'), to_char(expires_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS')]) FROM idempotency_keys")
	c := b.as("alice", admin.PermissionView)
	page := c.page(t, c.open(t, "acme", "key-1"))
	for _, want := range append(record, "acme", "key-1", "201 executed", "application/json", "&lt;/a&gt;", "&lt;/b&gt;", "11 B",
		"Attempt executed, its answer recorded", "Retry answered with a replay", "the key is another request&#39;s", "Outcome unknown", "Took 2.5 ms", "trace-3",
		"Expired by bob &lt;b&gt;", "why &lt;i&gt;", "Record expires") {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not say %q", want)
		}
	}
	if strings.Contains(page, "hidden body") {
		t.Error("the body is shown unasked")
	}
	b.Exec(t, "UPDATE idempotency_keys SET headers = '\\x07'")
	if page := c.page(t, c.open(t, "acme", "key-1")); !strings.Contains(page, "They can&#39;t be read") && !strings.Contains(page, "They can't be read") {
		t.Error("headers that can't be read are not told")
	}
}

// A body is shown as inert text: only its beginning if it is long, and in hexadecimal if it is not
// text.
func TestBody(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	c := b.as("alice", everything...)
	json := map[string][]string{"Content-Type": {"application/json; charset=utf-8"}}
	long := strings.Repeat("é", admin.BodyShownBytesMax/2)
	for key, test := range map[string]struct {
		header map[string][]string
		body   string
		want   []string
		absent []string
	}{
		"script":  {nil, `<script>alert("1")</script>`, []string{"&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt;", "text, as it was recorded"}, []string{"<script>alert", "These are the first"}},
		"json":    {json, `{"a":1,"big":12345678901234567890.10}`, []string{"{\n  &#34;a&#34;: 1,\n  &#34;big&#34;: 12345678901234567890.10\n}", "indented here"}, nil},
		"no-json": {json, `{"a":`, []string{"{&#34;a&#34;:", "text, as it was recorded"}, nil},
		"binary":  {nil, "\x00\x01PNG", []string{"00 01 50 4e 47", "hexadecimal"}, nil},
		"hex-max": {nil, strings.Repeat("\x00", admin.BodyHexBytesMax+1), []string{"These are the first 4,096 bytes of 4,097", "00000ff0"}, []string{"00001000"}},
		"max":     {nil, long, []string{long}, []string{"These are the first"}},
		"over":    {nil, "x" + long, []string{"x" + long[:len(long)-2], "These are the first 65,535 bytes of 65,537"}, []string{"x" + long}},
		"empty":   {nil, "", []string{"The body is empty"}, nil},
	} {
		b.record(t, "acme", key, &idempotency.Answer{Status: 200, Header: test.header, Body: []byte(test.body)})
		page := c.page(t, link(t, c.page(t, c.open(t, "acme", key)), "body?"))
		for _, want := range test.want {
			if !strings.Contains(page, want) {
				t.Errorf("%s: the page does not say %.60q: %.3000s", key, want, page)
			}
		}
		for _, absent := range test.absent {
			if strings.Contains(page, absent) {
				t.Errorf("%s: the page says %.60q", key, absent)
			}
		}
	}
	text(t, c.get(strings.Replace(c.open(t, "acme", "none"), "key?", "body?", 1)), http.StatusNotFound)
}
