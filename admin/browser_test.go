package admin_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/admin"
	"github.com/paidonce/idempotency/internal/browsertest"
	"github.com/paidonce/idempotency/internal/pgtest"
)

// shotsVariable names a folder in which the browser's test leaves pictures of its pages.
const shotsVariable = "PAIDONCE_SCREENSHOTS"

// answerMax is the maximum time for a page on a million keys.
const answerMax = time.Second

// In a browser, on a table of a million keys: search, page through, open a key, see its timeline
// and body, expire and delete. Each page is answered within a second, fits a phone, and logs no
// error.
func TestOperatorInABrowser(t *testing.T) {
	pgtest.Slow(t, "makes a million records and starts a browser")
	t.Parallel()
	ctx := browsertest.Start(t)
	b := setup(t, nil)
	b.fill(t, 1_000_000)
	const scope, first, second = "acct_204", "7c83014a-3a22-4f69-994e-e75113e2d68e", "9d1f2f62-6f3c-4b7e-8d7c-0b6a0a3a9a11"
	b.record(t, scope, first, paid)
	b.record(t, scope, second, &idempotency.Answer{Status: 402, Body: []byte("not enough money")})
	b.record(t, strings.Repeat("t", 255), strings.Repeat("k", 255), paid)
	b.Exec(t, `INSERT INTO idempotency_events (at, duration_us, outcome, attempts, scope, key) SELECT clock_timestamp() + interval '40 milliseconds' * n, 1800, 'replayed', 1, $1, $2 FROM generate_series(1, 2) AS n`, scope, first)
	times := &stopwatch{}
	b.mount(func(o *admin.Options) { o.Title = "payments, production" })
	server := serve(t, times.around(signedIn(b.site)))
	u := &user{t: t, ctx: ctx, home: server.URL + prefix + "/"}
	problems := browsertest.Problems(t, ctx)

	// The first page: figures, newest records, and a link that leads the keyboard to the content.
	u.do(chromedp.Navigate(u.home), chromedp.WaitVisible(chromedp.CSS("h1")))
	// There are 923,080 live records.
	if got := u.text(`[data-figure="live"]`); !regexp.MustCompile(`^about (8|9)\d\d,\d{3}$`).MatchString(got) {
		t.Errorf("live records are %q", got)
	}
	u.do(chromedp.KeyEvent(kb.Tab))
	if got := u.eval("document.activeElement.textContent"); got != "Skip to the content" {
		t.Errorf("the first Tab leads to %q", got)
	}
	u.eval("document.activeElement.blur() || ''")
	u.shots("home")

	// A key by its name, as it is copied.
	u.type_("#scope", scope)
	u.type_("#key", `"`+first+`"`)
	u.click("form.open button", ".timeline")
	for _, want := range []string{first, scope, "201 executed", "Attempt executed, its answer recorded", "Retry answered with a replay", "Record expires"} {
		u.wantText(want)
	}
	u.click(`a[href^="body?"]`, "pre.body")
	u.wantText(`"amount": 1250`)
	u.click(`a.button[href^="key?"]`, ".timeline")

	// Expire: the form requires a reason, and the audit table keeps it.
	u.click(`a[href^="expire?"]`, "form.confirm")
	u.wantText("may pay twice")
	u.click("form.confirm button", "")
	u.wait("document.activeElement.id === 'reason'") // the browser requires it
	u.type_("#reason", "OPS-1: cleaned up")
	u.click("form.confirm button", ".notice.good")
	u.wantText("Expired.")
	u.wantText("Expired by alice@example.com")
	u.shots("key")

	// All keys of an account, page by page, and back to the first.
	u.click(`nav a[href="list"]`, "form.filter")
	u.type_("#scope", scope)
	u.click("form.filter .primary", `#scope[value="`+scope+`"]`)
	for page := 2; page <= 4; page++ {
		u.click(`a[rel="next"]`, "")
		u.wait("document.querySelector('#found-title')?.textContent.includes('page " + string(rune('0'+page)) + "')")
	}
	u.wantText("50 rows gone through")
	u.click(`.pager a[href^="list?"]:not([rel])`, "")
	u.wait("document.querySelector('#found-title')?.textContent.includes('page 1')")
	u.shots("list")

	// A search that can't use the primary key stops at its limit, and the page offers to continue.
	u.type_("#scope", "")
	u.do(chromedp.SetValue(chromedp.CSS("#class"), "5"))
	u.click("form.filter .primary", `.empty`)
	u.wantText("Nothing so far.")

	// Delete: the page shows the consequence, and requires a reason and the word.
	u.do(chromedp.Navigate(u.home), chromedp.WaitVisible(chromedp.CSS("form.open")))
	u.type_("#scope", scope)
	u.type_("#key", second)
	u.click("form.open button", ".timeline")
	u.click(`a[href^="delete?"]`, "form.confirm")
	u.wantText("A retry of this request will run again, and may pay twice.")
	u.shots("delete")
	u.type_("#reason", "OPS-2: customer sends it again")
	u.type_("#confirm", "deleted")
	u.click("form.confirm button", `[role="alert"]`)
	u.wantText("Nothing was done")
	u.type_("#confirm", "delete")
	u.click("form.confirm button", ".notice.good")
	u.wantText("This key has no record.")
	u.wantText("Deleted by alice@example.com")
	got := b.Strings(t, auditRows)
	want := []string{
		"expire " + scope + " " + first + " 201 by alice@example.com: OPS-1: cleaned up",
		"delete " + scope + " " + second + " 402 by alice@example.com: OPS-2: customer sends it again",
	}
	if !slices.Equal(got, want) {
		t.Errorf("the audit table has %q, want %q", got, want)
	}
	if left := b.Strings(t, "SELECT key FROM idempotency_keys WHERE scope = $1 AND key = ANY ($2)", scope, []string{first, second}); !slices.Equal(left, []string{first}) {
		t.Errorf("records left are %q", left)
	}

	// The figures refresh by themselves, except while they are paused. Afterwards they refresh at
	// once.
	u.do(chromedp.Navigate(u.home+"stats"), chromedp.WaitVisible(chromedp.CSS(".refreshed button")))
	at := u.text(`[data-figure="at"]`)
	u.wait("(document.querySelector('[data-figure=\"at\"]')?.textContent ?? " + quote(at) + ") !== " + quote(at))
	u.click(".refreshed button", "")
	if got := u.text(".refreshed button"); got != "Go on" {
		t.Errorf("the paused button says %q", got)
	}
	u.shots("stats")
	u.click(`nav a[href="doctor"]`, ".findings, .notice.good")
	u.shots("doctor")

	// Nothing is wider than a phone, however long keys are.
	u.do(chromedp.EmulateViewport(390, 844))
	c := b.as("alice@example.com", everything...)
	long := c.open(t, strings.Repeat("t", 255), strings.Repeat("k", 255))
	for _, link := range []string{"", "list", c.open(t, scope, first), long, strings.Replace(long, "key?", "delete?", 1), strings.Replace(long, "key?", "body?", 1), "stats", "doctor", c.open(t, scope, "none")} {
		u.do(chromedp.Navigate(u.home+strings.TrimPrefix(link, "./")), chromedp.WaitVisible(chromedp.CSS("h1")))
		if got := u.eval("document.documentElement.scrollWidth + ''"); got != "390" {
			t.Errorf("%s is %s pixels wide on a phone of 390", link, got)
		}
	}

	for _, problem := range problems() {
		// The form was not complete.
		if !strings.Contains(problem, "status of 422") {
			t.Errorf("the browser complains: %s", problem)
		}
	}
	times.check(t, server)
}

// In a browser: from the list of open requests to a parked one, and on to settling its call. Each
// page fits a phone, and logs no error.
func TestOpenRequestsInABrowser(t *testing.T) {
	pgtest.Slow(t, "starts a browser")
	t.Parallel()
	ctx := browsertest.Start(t)
	b := setup(t, nil)
	b.openRequest(t, "key-1", "no reply")
	b.openRequest(t, strings.Repeat("k", 255), "no reply")
	server := serve(t, signedIn(b.site))
	u := &user{t: t, ctx: ctx, home: server.URL + prefix + "/"}
	problems := browsertest.Problems(t, ctx)

	u.do(chromedp.Navigate(u.home), chromedp.WaitVisible(chromedp.CSS("h1")))
	u.click(`nav a[href="open"]`, "#parked")
	u.do(chromedp.SetValue(chromedp.CSS("#parked"), "1"))
	u.click("form.filter .primary", `a[href="open"].button`)
	u.wantText("no reply")
	u.click(`th a[href^="key?"]`, ".timeline")
	u.wantText("Parked: it waits for a person")
	u.shots("open-key")
	u.click(`a[href^="settle?"]`, "form.confirm")
	u.wantText("What you say is believed.")
	u.do(chromedp.SetValue(chromedp.CSS("#as"), "done"))
	u.type_("#output", `{"id": "ch_1"}`)
	u.type_("#reason", "OPS-3: seen at the processor")
	u.shots("settle")
	u.click("form.confirm button", ".notice.good")
	u.wantText("settled as done by alice@example.com")

	u.do(chromedp.EmulateViewport(390, 844))
	key := strings.TrimPrefix(b.as("alice@example.com", everything...).open(t, "acme", strings.Repeat("k", 255)), "./")
	for _, link := range []string{"open", key, strings.Replace(key, "key?", "settle?", 1) + "&e=charge", strings.Replace(key, "key?", "abandon?", 1)} {
		u.do(chromedp.Navigate(u.home+link), chromedp.WaitVisible(chromedp.CSS("h1")))
		if got := u.eval("document.documentElement.scrollWidth + ''"); got != "390" {
			t.Errorf("%s is %s pixels wide on a phone of 390", link, got)
		}
	}
	for _, problem := range problems() {
		t.Errorf("the browser complains: %s", problem)
	}
}

// In a browser, an operator goes from the consumers to a dead letter, redrives it, and then drops
// it. Each page of messages fits a phone and a tablet, and logs no error.
func TestMessagesInABrowser(t *testing.T) {
	pgtest.Slow(t, "starts a browser")
	t.Parallel()
	ctx := browsertest.Start(t)
	b := setup(t, nil)
	b.park(t)
	b.refuse(t)
	server := serve(t, signedIn(b.site))
	u := &user{t: t, ctx: ctx, home: server.URL + prefix + "/"}
	problems := browsertest.Problems(t, ctx)

	u.do(chromedp.Navigate(u.home), chromedp.WaitVisible(chromedp.CSS("h1")))
	u.click(`nav a[href="outbox"]`, "table")
	u.wantText("too large")
	u.shots("outbox")
	u.click(`nav a[href="consumers"]`, "table")
	u.wantText("nobody now")
	u.shots("consumers")
	u.click(`nav a[href="parked"]`, "#state")
	u.wantText("unreadable")
	u.click(`th a[href^="message?"]`, ".facts")
	u.shots("message")
	u.click(`a[href^="redrive?"]`, "form.confirm")
	u.wantText("under the same id")
	u.type_("#reason", "OPS-4: the fix is out")
	u.click("form.confirm button", ".notice.good")
	u.wantText("Redriven by alice@example.com: OPS-4")
	u.click(`a[href^="drop?"]`, "form.confirm")
	u.type_("#reason", "OPS-4: not wanted")
	u.type_("#confirm", "drop")
	u.shots("drop")
	u.click("form.confirm button", ".notice.good")
	u.wantText("Dropped by alice@example.com: OPS-4")

	behind, refused := "", link(t, b.as("alice@example.com", everything...).page(t, "outbox"), "message?")
	for _, one := range links(b.as("alice@example.com", everything...).page(t, "parked?state="), "message?") {
		behind = one
	}
	for _, width := range []int64{390, 800} {
		u.do(chromedp.EmulateViewport(width, 844))
		for _, link := range []string{"consumers", "outbox", "parked?state=", behind, strings.Replace(behind, "message?", "drop?", 1), strings.Replace(refused, "message?", "retry?", 1)} {
			u.do(chromedp.Navigate(u.home+link), chromedp.WaitVisible(chromedp.CSS("h1")))
			if got := u.eval("document.documentElement.scrollWidth + ''"); got != fmt.Sprint(width) {
				t.Errorf("%s is %s pixels wide on a screen of %d", link, got, width)
			}
		}
	}
	for _, problem := range problems() {
		t.Errorf("the browser complains: %s", problem)
	}
}

// signedIn stands for authentication in front of the page.
func signedIn(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Header.Set("User", "alice@example.com")
		r.Header.Set("May", "view view-body expire delete settle abandon redrive drop")
		next.ServeHTTP(w, r)
	})
}

// stopwatch keeps the server's time for each page.
type stopwatch struct {
	mu    sync.Mutex
	taken map[string]time.Duration // by method and URL
}

func (s *stopwatch) around(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		started := time.Now()
		next.ServeHTTP(w, r)
		took := time.Since(started)
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.taken == nil {
			s.taken = map[string]time.Duration{}
		}
		s.taken[r.Method+" "+r.URL.RequestURI()] = took
	})
}

// check requires that each page was answered in time. On a busy machine it requests a late page
// again.
func (s *stopwatch) check(t *testing.T, server *httptest.Server) {
	t.Helper()
	s.mu.Lock()
	taken := maps.Clone(s.taken)
	s.mu.Unlock()
	slowest, which := time.Duration(0), ""
	for asked, took := range taken {
		method, uri, _ := strings.Cut(asked, " ")
		for again := 0; took > answerMax && again < 3 && method == http.MethodGet; again++ {
			response, err := server.Client().Get(server.URL + uri)
			if err != nil {
				t.Fatal(err)
			}
			text(t, response, http.StatusOK)
			s.mu.Lock()
			took = min(took, s.taken[asked])
			s.mu.Unlock()
		}
		if took > answerMax {
			t.Errorf("%.40s took %v", asked, took)
		}
		if took > slowest {
			slowest, which = took, asked
		}
	}
	t.Logf("%d pages on a million keys; the slowest, %.20s, took %v", len(taken), which, slowest.Round(time.Millisecond))
}

// user is a person at the browser. A step that takes too long fails the test.
type user struct {
	t    *testing.T
	ctx  context.Context
	home string
}

const patience = 20 * time.Second

func (u *user) do(steps ...chromedp.Action[chromedp.Void]) {
	u.t.Helper()
	ctx, cancel := context.WithTimeout(u.ctx, patience)
	defer cancel()
	if err := chromedp.Do(ctx, steps...); err != nil {
		u.t.Fatalf("%v; the page says: %s", err, u.body())
	}
}

func (u *user) body() string {
	ctx, cancel := context.WithTimeout(u.ctx, time.Second)
	defer cancel()
	text, err := chromedp.Run(ctx, chromedp.Evaluate[string]("document.body.innerText"))
	if err != nil {
		return err.Error()
	}
	return text
}

func (u *user) eval(expression string) string {
	u.t.Helper()
	ctx, cancel := context.WithTimeout(u.ctx, patience)
	defer cancel()
	text, err := chromedp.Run(ctx, chromedp.Evaluate[string](expression))
	if err != nil {
		u.t.Fatalf("%s: %v", expression, err)
	}
	return text
}

// wait waits until the expression is true, on this page or the next.
func (u *user) wait(expression string) {
	u.t.Helper()
	ctx, cancel := context.WithTimeout(u.ctx, patience)
	defer cancel()
	for {
		_, err := chromedp.Run(ctx, chromedp.Poll[bool](expression))
		if err == nil {
			return
		}
		// The page went away meanwhile.
		if ctx.Err() != nil || !strings.Contains(err.Error(), "(-32000)") {
			u.t.Fatalf("%s: %v; the page says: %s", expression, err, u.body())
		}
	}
}

func (u *user) text(selector string) string {
	u.t.Helper()
	return u.eval("document.querySelector(" + quote(selector) + ").textContent")
}

func (u *user) wantText(want string) {
	u.t.Helper()
	if got := u.body(); !strings.Contains(got, want) {
		u.t.Errorf("the page does not say %q: %s", want, got)
	}
}

// type_ replaces the text of a field.
func (u *user) type_(selector, text string) {
	u.t.Helper()
	u.eval("document.querySelector(" + quote(selector) + ").value = ''")
	if text != "" {
		u.do(chromedp.SendKeys(chromedp.CSS(selector), text))
	}
}

// click clicks, and waits for the element that must appear, if one is given.
func (u *user) click(selector, appears string) {
	u.t.Helper()
	u.do(chromedp.ScrollIntoView(chromedp.CSS(selector)), chromedp.Click(chromedp.CSS(selector)))
	if appears != "" {
		u.do(chromedp.WaitVisible(chromedp.CSS(appears)))
	}
}

func quote(s string) string {
	text, _ := json.Marshal(s) // of a string: never fails
	return string(text)
}

// shots leaves pictures of the page, if shotsVariable is set.
func (u *user) shots(name string) {
	u.t.Helper()
	folder := os.Getenv(shotsVariable)
	if folder == "" {
		return
	}
	for _, shot := range []struct {
		name, scheme  string
		width, height int64
	}{{"light", "light", 1280, 860}, {"dark", "dark", 1280, 860}, {"phone", "light", 390, 844}} {
		media := emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: shot.scheme}}}
		if _, err := chromedp.Call(u.ctx, emulation.SetEmulatedMedia, media); err != nil {
			u.t.Fatal(err)
		}
		u.do(chromedp.EmulateViewport(shot.width, shot.height))
		png, err := chromedp.Run(u.ctx, chromedp.CaptureScreenshot())
		if err != nil {
			u.t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(folder, name+"-"+shot.name+".png"), png, 0o644); err != nil {
			u.t.Fatal(err)
		}
	}
	u.do(chromedp.EmulateViewport(1280, 860))
}
