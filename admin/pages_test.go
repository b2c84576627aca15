package admin_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"html"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/admin"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

var keyCell = regexp.MustCompile(`data-label="Key" class="long"><a href="([^"]*)">([^<]*)</a>`)

// keysOn returns the keys in a page's table.
func keysOn(page string) []string {
	var keys []string
	for _, match := range keyCell.FindAllStringSubmatch(page, -1) {
		keys = append(keys, html.UnescapeString(match[2]))
	}
	return keys
}

var examined = regexp.MustCompile(`([0-9,]+) rows gone through`)

// Every record is on exactly one page of the list, and each page reads only its own rows.
func TestPagesOfTheList(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	const rows = 3*50 + 7
	b.fill(t, rows)
	c := b.as("alice", everything...)
	for _, order := range []string{"ascending", "descending"} {
		var got, sizes []string
		link := c.filter(t, url.Values{"order": {order}})
		for link != "" && len(got) <= rows {
			page := c.page(t, link)
			keys := keysOn(page)
			got, sizes = append(got, keys...), append(sizes, examined.FindStringSubmatch(page)[1])
			if first := strings.Contains(page, ">First page<"); first != (len(got) > len(keys)) {
				t.Errorf("after %d keys a first page is offered: %v", len(got), first)
			}
			match := regexp.MustCompile(`href="([^"]*)" rel="next"`).FindStringSubmatch(page)
			if link = ""; match != nil {
				link = match[1]
			} else if !strings.Contains(page, "End of the list") {
				t.Error("the last page does not say that it is")
			}
		}
		want := b.Strings(t, "SELECT key FROM idempotency_keys ORDER BY scope, key")
		if order == "descending" {
			slices.Reverse(want)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %d keys on the pages, want those %d of the table in order", order, len(got), len(want))
		}
		if !slices.Equal(sizes, []string{"50", "50", "50", "7"}) {
			t.Errorf("%s: the pages go through %q rows", order, sizes)
		}
	}
}

// A page that finds nothing within its bounds says so, and offers to continue.
func TestPageThatFindsNothingYet(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.fill(t, 2000)
	b.handler = admin.New(b.Store, byHeader, &admin.Options{Operator: operator.Options{RowsExaminedMax: 1000}})
	b.site = http.StripPrefix(prefix, b.handler)
	c := b.as("alice", everything...)
	page := c.page(t, c.filter(t, url.Values{"class": {"5"}}))
	if !strings.Contains(page, "Nothing so far") || examined.FindStringSubmatch(page)[1] != "1,000" {
		t.Error("it does not say how far it came")
	}
	page = c.page(t, regexp.MustCompile(`href="([^"]*)" rel="next"`).FindStringSubmatch(page)[1])
	if !strings.Contains(page, "Nothing fits") || strings.Contains(page, "Next page") {
		t.Error("the last page does not say that nothing fits")
	}
}

// Each condition of the form filters the list, and the form shows it again.
func TestFilters(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	for _, key := range []string{"a-1", "a-2", "b-1"} {
		b.record(t, "acme", key, paid)
	}
	b.record(t, "acme", "declined", &idempotency.Answer{Status: 402})
	b.record(t, "other", "a-3", paid)
	b.record(t, `sc<o>&"pe`, "x", paid)
	b.Exec(t, "UPDATE idempotency_keys SET created_at = '2026-01-01 12:00:30Z', expires_at = '2026-01-02 12:00Z' WHERE key = 'b-1'")
	attempt := b.Strings(t, "SELECT attempt_id::text FROM idempotency_keys WHERE key = 'a-2'")[0]
	c := b.as("alice", everything...)
	for _, test := range []struct {
		form url.Values
		want []string
	}{
		{url.Values{}, []string{"a-1", "a-2", "b-1", "declined", "a-3", "x"}},
		{url.Values{"scope": {"acme"}}, []string{"a-1", "a-2", "b-1", "declined"}},
		{url.Values{"scope": {"acme"}, "order": {"descending"}}, []string{"declined", "b-1", "a-2", "a-1"}},
		{url.Values{"scope": {`sc<o>&"pe`}}, []string{"x"}},
		{url.Values{"scope": {"ACME"}}, nil},
		{url.Values{"scope": {"acme"}, "key": {"a-"}}, []string{"a-1", "a-2"}},
		{url.Values{"key": {` "a-" `}}, []string{"a-1", "a-2", "a-3"}},
		{url.Values{"class": {"4"}}, []string{"declined"}},
		{url.Values{"expiry": {"expired"}}, []string{"b-1"}},
		{url.Values{"expiry": {"live"}, "scope": {"acme"}}, []string{"a-1", "a-2", "declined"}},
		{url.Values{"to": {"2026-01-01T12:01"}}, []string{"b-1"}},
		{url.Values{"to": {"2026-01-01T12:00"}}, nil},
		{url.Values{"from": {"2026-01-01T12:00"}, "to": {"2026-01-01T12:01"}}, []string{"b-1"}},
		{url.Values{"from": {"2026-01-01T12:01"}, "scope": {"acme"}}, []string{"a-1", "a-2", "declined"}},
		{url.Values{"trace": {"trace-a-2"}}, []string{"a-2"}},
		{url.Values{"attempt": {attempt}}, []string{"a-2"}},
	} {
		page := c.page(t, c.filter(t, test.form))
		if got := keysOn(page); !slices.Equal(got, test.want) {
			t.Errorf("%v: %q, want %q", test.form, got, test.want)
		}
		for name, values := range test.form {
			value := html.EscapeString(strings.Trim(values[0], ` "`))
			if !strings.Contains(page, `value="`+strings.ReplaceAll(value, "&#34;", "&#34;")+`"`) {
				t.Errorf("%v: the form does not show %s again", test.form, name)
			}
		}
	}
	for _, form := range []url.Values{
		{"class": {"9"}}, {"class": {"x"}}, {"from": {"yesterday"}}, {"to": {"2026-13-01T00:00"}}, {"attempt": {"x"}}, {"expiry": {"never"}},
		{"scope": {"\x00"}}, {"scope": {strings.Repeat("s", 256)}}, {"key": {"a b"}}, {"trace": {"a b"}}, {"open": {"1"}, "key": {"a"}}, {"open": {"1"}, "scope": {"a"}}, {"open": {"1"}, "scope": {"a"}, "key": {"a,b"}},
	} {
		response := c.post("search", form)
		if response.StatusCode == http.StatusSeeOther {
			response = c.get(response.Header.Get("Location"))
		}
		text(t, response, http.StatusBadRequest)
	}
}

// A key is found also if it was copied from a header.
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

// Scopes, keys, headers and reasons that look like a page's code stay text, on every page.
func TestNothingOfARecordActs(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	const evil = `<img/src=x/onerror=alert(1)>`
	header := map[string][]string{"Content-Type": {"text/html"}, "Location": {`javascript:alert(1)"` + evil}}
	b.record(t, evil, evil, &idempotency.Answer{Status: 201, Header: header, Body: []byte(evil)})
	b.record(t, "x", "x", paid)
	c := b.as(evil, everything...)
	key := c.open(t, evil, evil)
	pages := []string{c.page(t, ""), c.page(t, "list"), c.page(t, c.filter(t, url.Values{"scope": {evil}, "key": {evil}})), c.page(t, key)}
	for _, act := range []string{"body", "expire", "delete"} {
		pages = append(pages, c.page(t, strings.Replace(key, "key?", act+"?", 1)))
	}
	form := url.Values{"ticket": {c.ticket(t, evil, evil, admin.PermissionExpire)}, "reason": {evil}}
	pages = append(pages, c.page(t, location(t, c.post("expire", form))))
	form.Set("reason", "")
	for _, page := range pages {
		if strings.Contains(page, "<img/") || !strings.Contains(page, "&lt;img/src=x/onerror=alert(1)&gt;") {
			t.Errorf("it is not escaped: %s", page)
		}
		if len(links(page, "javascript:")) > 0 {
			t.Error("a header became a link")
		}
	}
}

// No URL contains a scope or a key, in any spelling: access logs, histories and Referer headers
// contain URLs.
func TestNoKeyInAURL(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	const scope, key = "canary-scope", "canary-key"
	b.record(t, scope, key, paid)
	b.fill(t, 200)
	c := b.as("alice", everything...)
	open := c.open(t, scope, key)
	filtered := c.filter(t, url.Values{"scope": {scope}, "key": {key[:8]}, "order": {"descending"}})
	form := url.Values{"ticket": {c.ticket(t, scope, key, admin.PermissionExpire)}, "reason": {"x"}}
	after := location(t, c.post("expire", form))
	urls := []string{open, filtered, after}
	for _, page := range []string{"", "list", open, filtered, after, c.filter(t, nil), strings.Replace(open, "key?", "delete?", 1)} {
		urls = append(urls, links(c.page(t, page), "")...)
	}
	if len(urls) < 100 {
		t.Fatalf("only %d URLs", len(urls))
	}
	for _, u := range urls {
		for _, spelled := range spellings(u) {
			if strings.Contains(spelled, "canary") || strings.Contains(spelled, "acct_") {
				t.Errorf("%s holds it: %s", u, spelled)
			}
		}
	}
	// Two searches for one key give two tokens, so a log does not reveal that the key was opened
	// again.
	if again := c.open(t, scope, key); again == open {
		t.Error("links of one key are the same")
	}
}

// spellings returns a URL, and the bytes that base64 and hexadecimal give from it at any offset.
func spellings(u string) []string {
	all := []string{u}
	if unescaped, err := url.QueryUnescape(u); err == nil {
		all = append(all, unescaped)
	}
	_, token, _ := strings.Cut(u, "=")
	for offset := range min(4, len(token)) {
		part := token[offset:]
		if decoded, err := base64.RawURLEncoding.DecodeString(part[:len(part)/4*4]); err == nil {
			all = append(all, string(decoded))
		}
	}
	return all
}

// On an empty table each page says what a user can do.
func TestEmptyTable(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	c := b.as("alice", everything...)
	for link, want := range map[string]string{
		"": "There are no records yet", "list": "There are no records", "stats": "Nobody holds a key",
		c.filter(t, url.Values{"scope": {"acme"}}): "Nothing fits", c.open(t, "acme", "none"): "This key has no record",
	} {
		if page := c.page(t, link); !strings.Contains(page, want) {
			t.Errorf("%s does not say %q", link, want)
		}
	}
	for _, act := range []string{"delete", "expire", "body"} {
		text(t, c.get(strings.Replace(c.open(t, "acme", "none"), "key?", act+"?", 1)), http.StatusNotFound)
	}
	for _, link := range []string{"key", "key?k=", "key?k=abc", "list?q=abc", "delete?k=abc", "body?k=abc"} {
		if body := text(t, c.get(link), http.StatusNotFound); !strings.Contains(body, "leads nowhere") {
			t.Errorf("%s: %s", link, body)
		}
	}
}

// The doctor's findings are shown with their remedies.
func TestDoctor(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.Exec(t, "ALTER TABLE idempotency_keys DROP CONSTRAINT idempotency_keys_pkey")
	page := b.as("alice", admin.PermissionView).page(t, "doctor")
	findings := operator.New(b.Store, nil).Doctor(t.Context())
	if len(findings) < len(operator.Checks()) {
		t.Fatalf("%d findings", len(findings))
	}
	broken := 0
	for _, finding := range findings {
		if !strings.Contains(page, finding.Check) || finding.Level == operator.LevelFail && !strings.Contains(page, html.EscapeString(finding.Remedy)) {
			t.Errorf("%v is not shown", finding)
		}
		if finding.Check == "index" && finding.Level == operator.LevelFail {
			broken++
		}
	}
	if broken == 0 || !strings.Contains(page, ">broken</span>") {
		t.Error("a table without its primary key is not broken")
	}
}

// The figures have the format of the page, and cause one query however many readers there are.
func TestLiveFigures(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.fill(t, 1234)
	c := b.as("alice", admin.PermissionView)
	response := c.get("live")
	body := text(t, response, http.StatusOK)
	var figures map[string]string
	if err := json.Unmarshal([]byte(body), &figures); err != nil || response.Header.Get("Content-Type") != "application/json" {
		t.Fatalf("%s: %v", body, err)
	}
	live := b.Strings(t, "SELECT to_char(count(*) FILTER (WHERE expires_at >= now()), 'FM9,999') FROM idempotency_keys")[0]
	if figures["live"] != live || figures["running"] != "0" || figures["expired"] == "0" {
		t.Errorf("the figures are %v, want %s live", figures, live)
	}
	page := c.page(t, "stats")
	for name, value := range figures {
		if !strings.Contains(page, fmt.Sprintf(`data-figure="%s">%s<`, name, value)) {
			t.Errorf("the page does not show %s as %s", name, value)
		}
	}
}

// Without a database the page says only that.
func TestNoDatabase(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.Pool.Close()
	c := b.as("alice", everything...)
	for _, link := range []string{"", "list", "stats", "live", c.open(t, "acme", "key-1")} {
		if body := text(t, c.get(link), http.StatusServiceUnavailable); !strings.Contains(body, "could not be asked") || strings.Contains(body, "closed pool") {
			t.Errorf("%s: %s", link, body)
		}
	}
	c.page(t, "doctor") // reports it as a finding
}

// With a role that may only SELECT, the page works, and names the privilege that an act lacks.
func TestRoleThatMayOnlySelect(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.record(t, "acme", "key-1", paid)
	b.Exec(t, "CREATE ROLE "+role(b)+" LOGIN PASSWORD 'x'")
	t.Cleanup(func() { b.Exec(t, "DROP OWNED BY "+role(b)); b.Exec(t, "DROP ROLE "+role(b)) })
	for _, table := range []string{"idempotency_keys", "idempotency_audit", "idempotency_events", "idempotency_migrations"} {
		b.Exec(t, "GRANT SELECT ON "+table+" TO "+role(b))
	}
	config := b.Pool.Config()
	config.ConnConfig.User, config.ConnConfig.Password = role(b), "x"
	pool, err := pgxpool.NewWithConfig(context.Background(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	b.site = http.StripPrefix(prefix, admin.New(postgres.New(pool, nil), byHeader, nil))
	c := b.as("alice", everything...)
	for _, link := range []string{"", "list", "stats", "doctor", "live"} {
		c.page(t, link)
	}
	c.page(t, strings.Replace(c.open(t, "acme", "key-1"), "key?", "body?", 1))
	form := url.Values{"ticket": {c.ticket(t, "acme", "key-1", admin.PermissionDelete)}, "reason": {"x"}, "confirm": {"delete"}}
	if body := text(t, c.post("delete", form), http.StatusServiceUnavailable); !strings.Contains(body, "lacks a right") {
		t.Error(body)
	}
	b.wantUntouched(t, "key-1")
}

func role(b *testBundle) string { return b.Pool.Config().ConnConfig.Database + "_reader" }

// serve starts a new handler's server for each test, as a service has one.
func serve(t testing.TB, handler http.Handler) *httptest.Server {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	return server
}
