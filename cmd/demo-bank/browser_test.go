//go:build unix

package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"

	"github.com/paidonce/idempotency/internal/browsertest"
	"github.com/paidonce/idempotency/internal/pgtest"
)

// screenshots names an environment variable with a folder for pictures of the page. docs/page.png
// is one of them.
const screenshots = "DEMO_BANK_TEST_SCREENSHOTS"

// Conditions on the page, as scripts.
const (
	pageIsLive       = `document.querySelector("#connection").dataset.state === "live"`
	stormIsOver      = `document.querySelector("#storm-line").textContent.startsWith("The storm is over")`
	unprotectedLost  = `document.querySelector(".twin[data-side=unprotected]").dataset.state === "lost"`
	protectedIsExact = `document.querySelector(".twin[data-side=protected]").dataset.state === "exact"`
	proofHolds       = `document.querySelector("#proof-verdict").textContent === "holds" && document.querySelector("#proof").dataset.state === "ok"`
)

// tab is a page in a browser.
type tab struct {
	*testing.T
	ctx context.Context
}

func (t *tab) do(steps ...chromedp.Action[chromedp.Void]) {
	t.Helper()
	if err := chromedp.Do(t.ctx, steps...); err != nil {
		t.Fatal(err)
	}
}

// until waits until all conditions hold at the same time.
func (t *tab) until(conditions ...string) {
	t.Helper()
	condition := "(" + strings.Join(conditions, ") && (") + ")"
	if _, err := chromedp.Run(t.ctx, chromedp.Poll[bool](condition, chromedp.WithPollingTimeout(waitMax))); err != nil {
		body, _ := chromedp.Run(t.ctx, chromedp.Text(chromedp.CSS("body")))
		t.Fatalf("%s: %v; the page says:\n%s", condition, err, body)
	}
}

func (t *tab) text(selector string) string {
	t.Helper()
	text, err := chromedp.Run(t.ctx, chromedp.Text(chromedp.CSS(selector)))
	if err != nil {
		t.Fatalf("%s: %v", selector, err)
	}
	return text
}

func (t *tab) picture(name, scheme string, width, height int64, full bool) {
	t.Helper()
	folder := os.Getenv(screenshots)
	if folder == "" {
		return
	}
	if _, err := chromedp.Call(t.ctx, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
		Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}},
	}); err != nil {
		t.Fatal(err)
	}
	t.do(chromedp.EmulateViewport(width, height))
	take := chromedp.CaptureScreenshot()
	if full {
		take = chromedp.FullScreenshot(100)
	}
	png, err := chromedp.Run(t.ctx, take)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(folder, name+".png"), png, 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestPageShowsWhoLosesMoney: a storm on both sides, started by the form, costs the unprotected
// twin money and the protected one none, and the proof says so. After kill -9 and a start on the
// same data the page recovers by itself. It shows the same money, because it reads the books.
func TestPageShowsWhoLosesMoney(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a bank and a browser")
	}
	t.Parallel()
	page := &tab{T: t, ctx: browsertest.Start(t)}
	problems := browsertest.Problems(t, page.ctx)
	data := pgtest.Folder(t)
	p := serve(t, "--addr", "127.0.0.1:0", "--data-dir", data)
	page.do(chromedp.Navigate(p.url))
	page.until(pageIsLive)
	page.picture("first", "light", 1280, 900, false)

	page.do(chromedp.Click(chromedp.CSS("#own summary")))
	page.do(chromedp.SetValue(chromedp.CSS("[name=keys]"), "150"), chromedp.Click(chromedp.CSS("[name=fault][value=request-lost]")))
	page.do(chromedp.Click(chromedp.CSS("#storm [type=submit]")), chromedp.Click(chromedp.CSS("#own summary")))
	page.until(stormIsOver, unprotectedLost, protectedIsExact, proofHolds)
	lost := page.text(lostOf("unprotected"))
	if lost == "0.00 EUR" || !strings.HasPrefix(lost, "−") {
		t.Errorf("the unprotected twin has lost %q", lost)
	}
	if kept := page.text(lostOf("protected")); kept != "0.00 EUR" {
		t.Errorf("the protected twin has lost %q", kept)
	}
	for selector, want := range map[string]string{
		"[data-check=transfers] [data-side=protected]": "✓ 150 = 150", "[data-check=answers] [data-side=protected]": "✓ 150 = 150",
		"[data-check=transfers] [data-side=unprotected]": "✗ ", "[data-check=balances] [data-side=unprotected]": "✓ ",
	} {
		if got := page.text("#proof " + selector); !strings.HasPrefix(got, want) {
			t.Errorf("%s is %q, want %q", selector, got, want)
		}
	}
	page.until(`document.querySelectorAll(".lanes[data-side=unprotected] li.twice").length > 0`,
		`document.querySelectorAll(".lanes[data-side=protected] li.twice").length === 0`,
		`document.querySelector("#summary").textContent.includes("The storm is over")`,
		`document.querySelector("#bank-audit").textContent.endsWith("ok.")`)
	page.picture("page", "light", 1280, 900, false)
	page.picture("dark", "dark", 1280, 900, true)
	page.picture("phone", "light", 390, 844, true)

	page.do(chromedp.Click(chromedp.CSS("#send")))
	page.until(`document.querySelector("#exchanges li")?.dataset.status === "executed"`)
	page.do(chromedp.Click(chromedp.CSS("#again")))
	page.until(`document.querySelector("#exchanges li")?.dataset.status === "replayed"`)
	page.picture("light", "light", 1280, 900, true)
	if got := problems(); len(got) > 0 {
		t.Errorf("the browser complains: %q", got)
	}

	p.kill()
	page.until(`document.querySelector("#connection").dataset.state !== "live"`)
	serve(t, "--addr", strings.TrimPrefix(p.url, "http://"), "--data-dir", data)
	page.until(pageIsLive, unprotectedLost, protectedIsExact, proofHolds,
		`document.querySelector("#storm-line").textContent.startsWith("The last storm")`,
		`document.querySelectorAll(".lanes li").length === 0`) // the killed process had them
	if again := page.text(lostOf("unprotected")); again != lost {
		t.Errorf("after the restart the unprotected twin has lost %q, before %q", again, lost)
	}
	if alice := page.text("#alice"); alice != "99,987.50 EUR" {
		t.Errorf("after one payment by hand, sent twice, alice has %q", alice)
	}

	// Everything at once, without a mouse, on a phone.
	page.do(chromedp.EmulateViewport(390, 844), chromedp.SendKeys(chromedp.CSS("[data-preset=everything]"), "\r"))
	page.until(`document.querySelector("#storm-line").textContent.startsWith("Storm in flight")`, `!document.querySelector("#stop").disabled`)
	// Until this storm loses replies, the page may still show the last storm's losses.
	page.until(`/, [1-9][0-9,]* replies lost/.test(document.querySelector("#storm-line").textContent)`,
		unprotectedLost, protectedIsExact, `document.querySelector("#proof").dataset.state === "ok"`,
		`document.documentElement.scrollWidth <= innerWidth`)
	page.do(chromedp.SendKeys(chromedp.CSS("#stop"), "\r"))
	page.until(`document.querySelector("#storm-line").textContent.startsWith("The storm was stopped")`, unprotectedLost, protectedIsExact, proofHolds)
}

func lostOf(side string) string { return ".twin[data-side=" + side + "] [data-of=lost]" }

// TestPageShowsWhatAnInboxIsFor: without an inbox a lost COMMIT doubles a payment, and a message
// that can't be read is missing for good. With the inbox nothing is wrong, and a redrive handles
// the message. The counts are those of the audit's SQL.
func TestPageShowsWhatAnInboxIsFor(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a bank and a browser")
	}
	t.Parallel()
	page := &tab{T: t, ctx: browsertest.Start(t)}
	problems := browsertest.Problems(t, page.ctx)
	p := serve(t, "--addr", "127.0.0.1:0", "--database-url", pgtest.Database(t), "--pool-size", "16")
	page.do(chromedp.Navigate(p.url))
	page.until(pageIsLive, `document.querySelector("#dead").children.length === 0`)

	counted := func(row, side string) string { return `[data-count=` + row + `] [data-side=` + side + `]` }
	right := func(row string) string {
		return `document.querySelector("` + counted(row, "protected") + `").textContent === "✓ 0"`
	}
	exact := []string{
		right("missing"), right("doubled"), right("mismatches"),
		`document.querySelector("#statements").dataset.state === "ok"`, `document.querySelector("#statements-verdict").textContent === "each once with the inbox"`,
	}
	wrong := func(row string) string {
		return `document.querySelector("` + counted(row, "unprotected") + `").textContent.startsWith("✗ ")`
	}
	page.do(chromedp.Click(chromedp.CSS("#acts [value=lose]")))
	page.until(`document.querySelector("#acts [value=kill]").disabled`)
	page.until(append(exact, wrong("doubled"), wrong("mismatches"), `!document.querySelector("#acts [value=kill]").disabled`)...)

	page.do(chromedp.Click(chromedp.CSS("#acts [value=poison]")))
	page.until(append(exact, wrong("missing"), `document.querySelectorAll("#dead li").length === 1`)...)
	page.picture("statements", "light", 1280, 900, true)
	page.picture("statements-phone", "dark", 390, 844, true)
	page.until(`document.documentElement.scrollWidth <= innerWidth`)

	page.do(chromedp.SendKeys(chromedp.CSS("#dead button"), "\r"))
	page.until(append(exact, wrong("missing"), `document.querySelectorAll("#dead li").length === 0`, `!document.querySelector("#dead-none").hidden`)...)
	if got := problems(); len(got) > 0 {
		t.Errorf("the browser complains: %q", got)
	}
}
