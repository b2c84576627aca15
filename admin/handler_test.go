package admin_test

import (
	"context"
	"encoding/base64"
	"errors"
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
)

// Without an authorization function there is no page: New panics, and a zero Handler refuses
// everything.
func TestRefusesToServeWithoutAuthorization(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	store := b.Store
	for name, test := range map[string]struct {
		make func()
		want string
	}{
		"no authorization": {func() { admin.New(store, nil, nil) }, "needs an AuthorizeFunc"},
		"no store":         {func() { admin.New(nil, byHeader, nil) }, "needs a store"},
		"a short secret":   {func() { admin.New(store, byHeader, &admin.Options{Secret: make([]byte, admin.SecretBytesMin-1)}) }, "at least 32"},
		"an empty secret":  {func() { admin.New(store, byHeader, &admin.Options{Secret: []byte{}}) }, "at least 32"},
	} {
		func() {
			defer func() {
				if said, _ := recover().(string); !strings.HasPrefix(said, "idempotency/admin: ") || !strings.Contains(said, test.want) {
					t.Errorf("%s: New says %q, want %q", name, said, test.want)
				}
			}()
			test.make()
			t.Errorf("%s: New returned", name)
		}()
	}
	admin.New(store, byHeader, &admin.Options{Secret: make([]byte, admin.SecretBytesMin)})

	for _, path := range []string{"/", "/list", "/live", "/delete"} {
		recorder := httptest.NewRecorder()
		new(admin.Handler).ServeHTTP(recorder, httptest.NewRequest(http.MethodGet, path, nil))
		if recorder.Code != http.StatusForbidden {
			t.Errorf("the zero Handler answers %s with %d", path, recorder.Code)
		}
	}
}

// everyPath returns all paths of a handler, including assets, for a recorded key.
func (b *testBundle) everyPath(t testing.TB) (gets, posts []string) {
	t.Helper()
	c := b.as("alice", everything...)
	home := c.page(t, "")
	key := c.open(t, "acme", "key-1")
	gets = append([]string{"", "list", "open", "consumers", "outbox", "parked", "stats", "doctor", "live", key, c.filter(t, url.Values{"scope": {"acme"}})}, append(links(home, "admin-"), links(home, "icon-")...)...)
	for _, act := range []string{"body", "expire", "delete"} {
		gets = append(gets, strings.Replace(key, "key?", act+"?", 1))
	}
	return gets, []string{"search", "expire", "delete", "settle", "resume", "park", "abandon", "redrive", "drop", "retry"}
}

// Every path calls the authorization function before it shows or does anything.
func TestEveryPathIsAuthorized(t *testing.T) {
	t.Parallel()
	b := setup(t, func(o *admin.Options) { o.Challenge = `Basic realm="admin"` })
	b.record(t, "acme", "key-1", paid)
	gets, posts := b.everyPath(t)
	if len(gets) < 13 {
		t.Fatalf("only %d paths: %q", len(gets), gets)
	}
	form := url.Values{"ticket": {b.as("alice", everything...).ticket(t, "acme", "key-1", admin.PermissionDelete)}, "reason": {"x"}, "confirm": {"delete"}}
	for name, test := range map[string]struct {
		caller *caller
		want   int
	}{
		"nobody":            {b.as(""), http.StatusUnauthorized},
		"without any right": {b.as("alice"), http.StatusForbidden},
		"without the view":  {b.as("alice", admin.PermissionViewBody, admin.PermissionExpire, admin.PermissionDelete), http.StatusForbidden},
	} {
		ask := func(path string, response *http.Response) {
			body := text(t, response, test.want)
			for _, secret := range []string{"key-1", "acme", "secret reason", "1250"} {
				if strings.Contains(body, secret) {
					t.Errorf("%s, %s: the answer holds %q", name, path, secret)
				}
			}
			if challenged := response.Header.Get("WWW-Authenticate") != ""; challenged != (test.want == http.StatusUnauthorized) {
				t.Errorf("%s, %s: challenged is %v", name, path, challenged)
			}
		}
		for _, path := range append(gets, "nothing") {
			ask(path, test.caller.get(path))
		}
		for _, path := range posts {
			ask(path, test.caller.post(path, form))
		}
	}
	if n := b.Strings(t, "SELECT count(*)::text FROM idempotency_keys"); n[0] != "1" {
		t.Errorf("%s records are left", n)
	}
	for _, path := range gets {
		if response := b.as("alice", everything...).get(path); response.StatusCode != http.StatusOK {
			t.Errorf("with all rights %s is %d", path, response.StatusCode)
		}
	}
}

// A name that can't be stored in the audit table is not accepted as an actor, whatever the function
// returns.
func TestActorMustBeNamed(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	for actor, want := range map[string]int{
		"":                       http.StatusForbidden,
		"\x00":                   http.StatusForbidden,
		"\xff":                   http.StatusForbidden,
		strings.Repeat("a", 256): http.StatusForbidden,
		strings.Repeat("a", 255): http.StatusOK,
		"alice@example.com":      http.StatusOK,
	} {
		h := admin.New(b.Store, func(*http.Request, admin.Permission) (string, error) { return actor, nil }, nil)
		recorder := httptest.NewRecorder()
		h.ServeHTTP(recorder, httptest.NewRequest(http.MethodGet, "/", nil))
		if recorder.Code != want {
			t.Errorf("for %q: %d, want %d", actor, recorder.Code, want)
		}
	}
	h := admin.New(b.Store, func(*http.Request, admin.Permission) (string, error) { return "alice", errors.New("no") }, nil)
	recorder := httptest.NewRecorder()
	h.ServeHTTP(recorder, httptest.NewRequest(http.MethodGet, "/", nil))
	if recorder.Code != http.StatusForbidden {
		t.Errorf("an actor with an error: %d", recorder.Code)
	}
}

// Each permission allows only its own part, and pages offer no more than the permissions.
func TestEachPermissionIsApart(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.record(t, "acme", "key-1", paid)
	acts := []admin.Permission{admin.PermissionViewBody, admin.PermissionExpire, admin.PermissionDelete}
	path := map[admin.Permission]string{admin.PermissionViewBody: "body", admin.PermissionExpire: "expire", admin.PermissionDelete: "delete"}
	tickets := map[admin.Permission]string{}
	for _, act := range acts[1:] {
		tickets[act] = b.as("alice", everything...).ticket(t, "acme", "key-1", act)
	}
	for _, has := range append(acts, "none") {
		c := b.as("alice", admin.PermissionView, has)
		key := c.open(t, "acme", "key-1")
		page := c.page(t, key)
		for _, act := range acts {
			link := strings.Replace(strings.TrimPrefix(key, "./"), "key?", path[act]+"?", 1)
			offered := len(links(page, path[act]+"?")) > 0
			answer := c.get(link).StatusCode
			if allowed := act == has; offered != allowed || (answer == http.StatusOK) != allowed || !allowed && answer != http.StatusForbidden {
				t.Errorf("with %s: %s is offered: %v, and answered %d", has, act, offered, answer)
			}
			if ticket := tickets[act]; ticket != "" && act != has {
				text(t, c.post(path[act], url.Values{"ticket": {ticket}, "reason": {"x"}, "confirm": {"delete"}}), http.StatusForbidden)
			}
		}
	}
	b.wantUntouched(t, "key-1")
}

// wantUntouched requires that a record is unchanged, and that the audit table is empty.
func (b *testBundle) wantUntouched(t testing.TB, key string) {
	t.Helper()
	if got := b.Strings(t, "SELECT 'live' FROM idempotency_keys WHERE key = $1 AND expires_at > now() + interval '1 hour'", key); !slices.Equal(got, []string{"live"}) {
		t.Errorf("the record is gone, or its time ended")
	}
	if got := b.Strings(t, "SELECT action || ' by ' || actor FROM idempotency_audit"); got != nil {
		t.Errorf("the audit table has %q", got)
	}
}

// A read-only page shows and does not act, for every user.
func TestReadOnly(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.record(t, "acme", "key-1", paid)
	secret := func(o *admin.Options) { o.Secret = []byte(strings.Repeat("s", admin.SecretBytesMin)) }
	b.mount(secret)
	c := b.as("alice", everything...)
	form := url.Values{"reason": {"x"}, "confirm": {"delete"}}
	tickets := map[string]string{"expire": c.ticket(t, "acme", "key-1", admin.PermissionExpire), "delete": c.ticket(t, "acme", "key-1", admin.PermissionDelete)}
	b.mount(func(o *admin.Options) { secret(o); o.ReadOnly = true })
	key := c.open(t, "acme", "key-1")
	page := c.page(t, key)
	for act, ticket := range tickets {
		if len(links(page, act)) > 0 {
			t.Errorf("%s is offered", act)
		}
		text(t, c.get(strings.Replace(key, "key?", act+"?", 1)), http.StatusForbidden)
		form.Set("ticket", ticket)
		text(t, c.post(act, form), http.StatusForbidden)
	}
	if len(links(page, "body?")) == 0 {
		t.Error("the body is not offered")
	}
	b.wantUntouched(t, "key-1")
}

// A form from another site's page does nothing, even if it has all fields of one of our forms.
func TestCrossSiteFormIsRefused(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.record(t, "acme", "key-1", paid)
	c := b.as("alice", everything...)
	form := url.Values{"ticket": {c.ticket(t, "acme", "key-1", admin.PermissionDelete)}, "reason": {"x"}, "confirm": {"delete"}}
	for _, header := range []http.Header{
		{"Sec-Fetch-Site": {"cross-site"}},
		{"Sec-Fetch-Site": {"same-site"}},
		{"Sec-Fetch-Site": {""}, "Origin": {"https://evil.example"}}, // a browser of before 2023
		{"Sec-Fetch-Site": {""}, "Origin": {"null"}},
	} {
		for _, path := range []string{"delete", "expire", "search"} {
			from := c
			for name, values := range header {
				from = from.with(name, values[0])
			}
			body := text(t, from.post(path, form), http.StatusForbidden)
			if !strings.Contains(body, "another site") {
				t.Errorf("%v: %s", header, body)
			}
		}
	}
	b.wantUntouched(t, "key-1")
	location(t, c.with("Sec-Fetch-Site", "").with("Origin", "http://example.com").post("delete", form)) // its own: httptest's host
}

// Each path answers only its own methods.
func TestMethods(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	c := b.as("alice", everything...)
	for path, allow := range map[string]string{"search": "POST", "": "GET, HEAD", "key": "GET, HEAD", "live": "GET, HEAD", "delete": "GET, HEAD, POST"} {
		for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodDelete, http.MethodPatch, http.MethodOptions} {
			r := httptest.NewRequest(method, prefix+"/"+path, nil)
			r.Header.Set("Sec-Fetch-Site", "same-origin")
			response := c.send(r)
			refused := response.StatusCode == http.StatusMethodNotAllowed
			if allowed := strings.Contains(allow, method); refused == allowed || refused && response.Header.Get("Allow") != allow {
				t.Errorf("%s %q: %d, Allow %q", method, path, response.StatusCode, response.Header.Get("Allow"))
			}
		}
	}
}

// A form at its limit is read, and one over it is not.
func TestFormTooLarge(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	c := b.as("alice", everything...)
	const rest = "scope=acme&x="
	text(t, c.post("search", url.Values{"scope": {"acme"}, "x": {strings.Repeat("x", admin.FormBytesMax-len(rest))}}), http.StatusSeeOther)
	text(t, c.post("search", url.Values{"scope": {"acme"}, "x": {strings.Repeat("x", admin.FormBytesMax-len(rest)+1)}}), http.StatusBadRequest)
}

// Keys, scopes and bodies are in no log, whatever a user does.
func TestNoKeyInTheLog(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	const scope, key, body = "canary-scope", "canary-key", "canary-body"
	b.record(t, scope, key, &idempotency.Answer{Status: 201, Body: []byte(body)})
	c := b.as("alice", everything...)
	page := c.open(t, scope, key)
	c.page(t, strings.Replace(page, "key?", "body?", 1))
	form := url.Values{"ticket": {c.ticket(t, scope, key, admin.PermissionDelete)}, "reason": {"canary-reason"}, "confirm": {"delete"}}
	location(t, c.post("delete", form))
	text(t, c.post("delete", form), http.StatusNotFound) // again
	b.Exec(t, "ALTER TABLE idempotency_keys RENAME TO away")
	text(t, c.get(page), http.StatusServiceUnavailable)
	got := b.log.String()
	for _, want := range []string{"a recorded body was shown", "an act was done", "an act was not done", "a request failed", "actor=alice", "attempt="} {
		if !strings.Contains(got, want) {
			t.Errorf("the log does not say %q: %s", want, got)
		}
	}
	if strings.Contains(got, "canary") {
		t.Errorf("the log holds what it must not: %s", got)
	}
}

// Every link of every page leads to a page, under whatever prefix the handler is mounted.
func TestMountedAnywhere(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.fill(t, 120)
	b.record(t, "acme", "key-1", paid)
	for _, mounted := range []string{"", "/admin", "/a/b:c"} {
		mux := http.NewServeMux()
		handler := http.StripPrefix(mounted, b.handler)
		mux.Handle("/", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			r.Header.Set("User", "alice")
			r.Header.Set("May", "view view-body expire delete")
			handler.ServeHTTP(w, r)
		}))
		server := serve(t, mux)
		seen, left := map[string]bool{}, []string{server.URL + mounted}
		kinds := map[string]int{}
		for len(left) > 0 && len(seen) < 40 {
			at := left[0]
			left = left[1:]
			response, err := server.Client().Get(at) // follows the redirect to the slash
			if err != nil {
				t.Fatal(err)
			}
			page := text(t, response, http.StatusOK)
			base := response.Request.URL
			if mounted != "" && !strings.HasPrefix(base.EscapedPath(), mounted+"/") {
				t.Fatalf("%s led to %s, which is not under %s", at, base, mounted)
			}
			if !strings.HasPrefix(response.Header.Get("Content-Type"), "text/html") {
				continue
			}
			for _, link := range links(page, "") {
				if strings.HasPrefix(link, "/") || strings.Contains(link, "://") {
					t.Errorf("%s links to %s, which is not relative", at, link)
				}
				to, err := base.Parse(link)
				if err != nil {
					t.Fatal(err)
				}
				kind := strings.TrimPrefix(to.EscapedPath(), mounted+"/")
				if kind == "search" || kind == "#main" || kinds[kind] >= 3 { // a form; enough of these
					continue
				}
				to.Fragment = ""
				if !seen[to.String()] {
					seen[to.String()], kinds[kind] = true, kinds[kind]+1
					left = append(left, to.String())
				}
			}
		}
		for _, kind := range []string{"", "list", "key", "body", "expire", "delete", "stats", "doctor"} {
			if kinds[kind] == 0 {
				t.Errorf("under %q no link led to %q: %v", mounted, kind, kinds)
			}
		}
	}
}

// Every answer has the security headers, and no page has inline code or style.
func TestSecurityHeaders(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.record(t, "acme", "key-1", paid)
	c := b.as("alice", everything...)
	gets, _ := b.everyPath(t)
	responses := map[string]*http.Response{
		"nothing": c.get("nothing"), "nobody": b.as("").get(""), "a problem": b.as("").with("Accept", "application/json").get(""),
		"a redirect": c.post("search", url.Values{"scope": {"acme"}}), "another site's": c.with("Sec-Fetch-Site", "cross-site").post("delete", nil),
	}
	for _, path := range gets {
		responses[path] = c.get(path)
	}
	for path, response := range responses {
		for name, want := range map[string]string{
			"Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
			"Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin",
		} {
			if name == "Cache-Control" && (strings.HasPrefix(path, "admin-") || strings.HasPrefix(path, "icon-")) {
				want = "private, max-age=31536000, immutable" // no user's data
			}
			if got := response.Header.Get(name); got != want {
				t.Errorf("%s: %s is %q, want %q", path, name, got, want)
			}
		}
		policy := response.Header.Get("Content-Security-Policy")
		for _, want := range []string{"default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'self'", "script-src 'self'", "style-src 'self'"} {
			if !strings.Contains(policy, want) {
				t.Errorf("%s: the policy is %q, without %s", path, policy, want)
			}
		}
		if strings.Contains(policy, "unsafe") {
			t.Errorf("%s: the policy is %q", path, policy)
		}
		if len(response.Header.Values("Set-Cookie")) > 0 {
			t.Errorf("%s sets a cookie", path)
		}
		if !strings.HasPrefix(response.Header.Get("Content-Type"), "text/html") {
			continue
		}
		page := text(t, response, response.StatusCode)
		if inline := regexp.MustCompile(`<script>|<style|\sstyle=|\son[a-z]+=`).FindString(page); inline != "" {
			t.Errorf("%s has %q", path, inline)
		}
		wantAccessible(t, path, page)
	}
}

// wantAccessible checks the markup that a screen reader needs.
func wantAccessible(t *testing.T, path, page string) {
	t.Helper()
	for _, want := range []string{`<html lang="en">`, `<main id="main"`, `href="#main"`, `<header`, `name="viewport"`} {
		if !strings.Contains(page, want) {
			t.Errorf("%s has no %s", path, want)
		}
	}
	if n := strings.Count(page, "<h1"); n != 1 {
		t.Errorf("%s has %d headings of the first level", path, n)
	}
	ids := map[string]int{}
	for _, match := range regexp.MustCompile(`\sid="([^"]*)"`).FindAllStringSubmatch(page, -1) {
		ids[match[1]]++
	}
	for id, n := range ids {
		if n > 1 {
			t.Errorf("%s has %d elements with id %s", path, n, id)
		}
	}
	for _, match := range regexp.MustCompile(`\s(?:for|aria-labelledby)="([^"]*)"`).FindAllStringSubmatch(page, -1) {
		if ids[match[1]] != 1 {
			t.Errorf("%s: nothing has the id %s", path, match[1])
		}
	}
	for _, match := range regexp.MustCompile(`<(?:input|select|textarea)[^>]*>`).FindAllString(page, -1) {
		id := regexp.MustCompile(`\sid="([^"]*)"`).FindStringSubmatch(match)
		if !strings.Contains(match, `type="hidden"`) && (id == nil || !strings.Contains(page, `<label for="`+id[1]+`"`)) {
			t.Errorf("%s: %s has no label", path, match)
		}
	}
	for _, match := range regexp.MustCompile(`<th(?:\s[^>]*)?>`).FindAllString(page, -1) {
		if !strings.Contains(match, `scope="`) {
			t.Errorf("%s: %s has no scope", path, match)
		}
	}
}

// A request for the mount point without its slash is redirected to it, relative to the requested
// path.
func TestMissingSlash(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	for asked, want := range map[string]string{"/ops/keys": "./keys/", "/ops/keys?x=//evil.example": "./keys/", "/ops/a:b": "./a:b/", "/ops/%2F%2Fevil": "./%2F%2Fevil/"} {
		r := httptest.NewRequest(http.MethodGet, asked, nil)
		r.URL.Path = "" // the result of StripPrefix
		r.Header.Set("User", "alice")
		r.Header.Set("May", string(admin.PermissionView))
		recorder := httptest.NewRecorder()
		b.handler.ServeHTTP(recorder, r)
		if got := recorder.Header().Get("Location"); recorder.Code != http.StatusPermanentRedirect || got != want {
			t.Errorf("%s: %d to %q, want %q", asked, recorder.Code, got, want)
		}
	}
}

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

// serve serves a handler until the test ends.
func serve(t testing.TB, handler http.Handler) *httptest.Server {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	return server
}
