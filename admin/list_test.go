package admin_test

import (
	"html"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/admin"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

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
