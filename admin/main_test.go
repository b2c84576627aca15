package admin_test

import (
	"bytes"
	"context"
	"errors"
	"html"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/admin"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/internal/testservice"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// everything is all permissions.
var everything = []admin.Permission{admin.PermissionView, admin.PermissionViewBody, admin.PermissionExpire, admin.PermissionDelete, admin.PermissionSettle, admin.PermissionAbandon, admin.PermissionRedrive, admin.PermissionDrop}

// testBundle has the pages of a service's records, mounted under a prefix, on a database of its
// own.
type testBundle struct {
	*testservice.Service
	handler *admin.Handler
	site    http.Handler // the handler under /ops/keys/
	log     *logBuffer

	resumable sync.Once
}

const prefix = "/ops/keys"

// byHeader takes the actor from the header User, and the permissions from May; without a User the
// actor is unknown.
func byHeader(r *http.Request, want admin.Permission) (string, error) {
	user := r.Header.Get("User")
	if user == "" {
		return "", admin.ErrUnauthenticated
	}
	if !slices.Contains(strings.Split(r.Header.Get("May"), " "), string(want)) {
		return "", errors.New("secret reason")
	}
	return user, nil
}

func setup(t testing.TB, change func(*admin.Options)) *testBundle {
	t.Helper()
	b := &testBundle{Service: testservice.New(t, nil), log: &logBuffer{}}
	b.mount(change)
	return b
}

// mount makes a new handler.
func (b *testBundle) mount(change func(*admin.Options)) {
	options := admin.Options{Logger: slog.New(slog.NewTextHandler(b.log, nil))}
	if change != nil {
		change(&options)
	}
	b.handler = admin.New(b.Store, byHeader, &options)
	mux := http.NewServeMux()
	mux.Handle(prefix+"/", http.StripPrefix(prefix, b.handler))
	b.site = mux
}

// fill makes records by SQL, with UUIDv7 keys of the last 26 hours, of 400 scopes; the oldest have
// expired.
func (b *testBundle) fill(t testing.TB, rows int) {
	t.Helper()
	// A million rows take longer than the pool's statement_timeout.
	conn, err := pgx.Connect(t.Context(), b.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.Background()) }()
	begin := float64(time.Now().Unix() - 26*3600)
	for _, statement := range []struct {
		sql       string
		arguments []any
	}{
		// Building the index at the end is quicker.
		{"ALTER TABLE idempotency_keys DROP CONSTRAINT idempotency_keys_pkey", nil},
		{`INSERT INTO idempotency_keys (created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)
		SELECT to_timestamp(at), to_timestamp(at + 86400), CASE WHEN n % 50 = 0 THEN 402 WHEN n % 2 = 0 THEN 200 ELSE 201 END, 1,
		       id, 'acct_' || (100 + n * 7 % 400), substr(ms, 1, 8) || '-' || substr(ms, 9, 4) || '-7' || substr(id::text, 16),
		       '\x00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff', '\x0100', '\x7b226964223a2231227d'
		FROM (SELECT n, at, gen_random_uuid() AS id, '0' || to_hex((at * 1000)::bigint) AS ms
		      FROM (SELECT n, $2::float8 + n * $3::float8 AS at FROM generate_series(1, $1::int) AS n OFFSET 0) AS times OFFSET 0) AS made`,
			[]any{rows, begin, 26 * 3600 / float64(rows)}},
		{"ALTER TABLE idempotency_keys ADD CONSTRAINT idempotency_keys_pkey PRIMARY KEY (scope, key)", nil},
		{"ANALYZE idempotency_keys", nil},
	} {
		if _, err := conn.Exec(t.Context(), statement.sql, statement.arguments...); err != nil {
			t.Fatal(err)
		}
	}
}

// record makes the service execute a request, and record an answer.
func (b *testBundle) record(t testing.TB, scope, key string, answer *idempotency.Answer) {
	t.Helper()
	b.Do(t, idempotency.Key{Scope: scope, Value: key}, answer)
}

var paid = &idempotency.Answer{
	Status: 201, Header: map[string][]string{"Content-Type": {"application/json"}, "Location": {"/v1/transfers/1"}}, Body: []byte(`{"id":"1","amount":1250}`),
}

// caller sends requests as one user with some permissions.
type caller struct {
	b      *testBundle
	user   string
	may    []admin.Permission
	header http.Header // additional headers
}

func (b *testBundle) as(user string, may ...admin.Permission) *caller {
	return &caller{b: b, user: user, may: may, header: http.Header{}}
}

func (c *caller) with(name, value string) *caller {
	next := *c
	next.header = c.header.Clone()
	next.header.Set(name, value)
	return &next
}

func (c *caller) send(r *http.Request) *http.Response {
	if c.user != "" {
		r.Header.Set("User", c.user)
		var may []string
		for _, one := range c.may {
			may = append(may, string(one))
		}
		r.Header.Set("May", strings.Join(may, " "))
	}
	for name, values := range c.header {
		r.Header[name] = values
	}
	recorder := httptest.NewRecorder()
	c.b.site.ServeHTTP(recorder, r)
	return recorder.Result()
}

// get requests a page by its link, which is relative.
func (c *caller) get(link string) *http.Response {
	return c.send(httptest.NewRequest(http.MethodGet, prefix+"/"+strings.TrimPrefix(link, "./"), nil))
}

// post sends a form as a browser does from a page of the same origin.
func (c *caller) post(link string, form url.Values) *http.Response {
	r := httptest.NewRequest(http.MethodPost, prefix+"/"+link, strings.NewReader(form.Encode()))
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	r.Header.Set("Sec-Fetch-Site", "same-origin")
	return c.send(r)
}

// page requests a page that must exist, and returns its text.
func (c *caller) page(t testing.TB, link string) string {
	t.Helper()
	return text(t, c.get(link), http.StatusOK)
}

// open searches for a key, and returns the link to its page.
func (c *caller) open(t testing.TB, scope, key string) string {
	t.Helper()
	return location(t, c.post("search", url.Values{"open": {"1"}, "scope": {scope}, "key": {key}}))
}

// filter searches by a form, and returns the link to the list.
func (c *caller) filter(t testing.TB, form url.Values) string {
	t.Helper()
	return location(t, c.post("search", form))
}

func text(t testing.TB, response *http.Response, want int) string {
	t.Helper()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	if response.StatusCode != want {
		t.Fatalf("status is %d, want %d: %s", response.StatusCode, want, body)
	}
	return string(body)
}

func location(t testing.TB, response *http.Response) string {
	t.Helper()
	text(t, response, http.StatusSeeOther)
	return response.Header.Get("Location")
}

// links returns the targets of a page's links that have this beginning.
func links(page, begin string) []string {
	var all []string
	for _, match := range regexp.MustCompile(`(?:href|action|src)="(`+regexp.QuoteMeta(begin)+`[^"]*)"`).FindAllStringSubmatch(page, -1) {
		all = append(all, html.UnescapeString(match[1]))
	}
	return all
}

// link returns the only link of a page that has this beginning.
func link(t testing.TB, page, begin string) string {
	t.Helper()
	all := links(page, begin)
	if len(all) == 0 {
		t.Fatalf("no link to %s on the page: %s", begin, page)
	}
	return all[0]
}

// field returns the value of a form's hidden field.
func field(t testing.TB, page, name string) string {
	t.Helper()
	match := regexp.MustCompile(`<input type="hidden" name="` + name + `" value="([^"]*)">`).FindStringSubmatch(page)
	if match == nil {
		t.Fatalf("no field %s on the page: %s", name, page)
	}
	return match[1]
}

// ticket opens the confirmation page of an act, and returns the ticket of its form.
func (c *caller) ticket(t testing.TB, scope, key string, act admin.Permission) string {
	t.Helper()
	return field(t, c.page(t, link(t, c.page(t, c.open(t, scope, key)), string(act)+"?k=")), "ticket")
}

type logBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}
