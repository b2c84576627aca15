package admin_test

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"testing"

	"github.com/paidonce/idempotency/admin"
)

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

// Whatever is answered says what a browser may do with it, and no page has code or style of its own.
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
				want = "private, max-age=31536000, immutable" // nothing of anybody's
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

// wantAccessible checks what a screen reader needs of a page's markup.
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

// A request for the mount point without its slash is sent to it, relative to where it was asked for.
func TestMissingSlash(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	for asked, want := range map[string]string{"/ops/keys": "./keys/", "/ops/keys?x=//evil.example": "./keys/", "/ops/a:b": "./a:b/", "/ops/%2F%2Fevil": "./%2F%2Fevil/"} {
		r := httptest.NewRequest(http.MethodGet, asked, nil)
		r.URL.Path = "" // what StripPrefix leaves
		r.Header.Set("User", "alice")
		r.Header.Set("May", string(admin.PermissionView))
		recorder := httptest.NewRecorder()
		b.handler.ServeHTTP(recorder, r)
		if got := recorder.Header().Get("Location"); recorder.Code != http.StatusPermanentRedirect || got != want {
			t.Errorf("%s: %d to %q, want %q", asked, recorder.Code, got, want)
		}
	}
}
