package admin_test

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"

	"github.com/paidonce/idempotency/admin"
	"github.com/paidonce/idempotency/internal/browsertest"
)

func TestShots(t *testing.T) {
	dir := os.Getenv("SHOTS")
	if dir == "" {
		t.Skip()
	}
	b := setup(t, func(o *admin.Options) { o.Title = "payments, production" })
	b.fill(t, 30_000)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Header.Set("User", "alice@example.com")
		r.Header.Set("May", "view view-body expire forget")
		b.site.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	ctx := browsertest.Start(t)
	problems := browsertest.Problems(t, ctx)
	c := b.as("alice@example.com", everything...)
	b.record(t, "acct_204", "7c83014a-3a22-4f69-994e-e75113e2d68e", paid)
	k := c.open(t, "acct_204", "7c83014a-3a22-4f69-994e-e75113e2d68e")
	b.exec(t, `INSERT INTO idempotency_events (at, duration_us, outcome, attempts, attempt_id, scope, key, trace_id) SELECT clock_timestamp() + interval '1s' * n, 1800*n, CASE n WHEN 1 THEN 'replayed' WHEN 2 THEN 'mismatch' ELSE 'replayed' END, 1, NULL, 'acct_204', '7c83014a-3a22-4f69-994e-e75113e2d68e', 'trace-'||n FROM generate_series(1,3) n`)
	b.exec(t, `INSERT INTO idempotency_audit (action, actor, reason, scope, key, attempt_id, status, record_created_at, record_expires_at) SELECT 'forget', 'bob@example.com', 'OPS-1123: customer asked for the order to be sent again', scope, key, attempt_id, 201, created_at, expires_at FROM idempotency_keys WHERE key = '7c83014a-3a22-4f69-994e-e75113e2d68e'`)
	longKey := strings.Repeat("abcdefghi-", 25) + "12345"
	b.record(t, strings.Repeat("tenant/eu-central-1/", 10), longKey, paid)
	for name, link := range map[string]string{
		"home": "", "list": "list", "key": k, "forget": strings.Replace(k, "key?", "forget?", 1), "expire": strings.Replace(k, "key?", "expire?", 1), "body": strings.Replace(k, "key?", "body?", 1), "stats": "stats", "doctor": "doctor", "nokey": c.open(t, "acct_204", "nothing"),
		"long": c.open(t, strings.Repeat("tenant/eu-central-1/", 10), longKey), "nothing": "nothing",
	} {
		for _, mode := range []string{"light", "dark", "phone"} {
			width, height := int64(1280), int64(900)
			scheme := mode
			if mode == "phone" {
				width, height, scheme = 390, 844, "light"
			}
			_, err := chromedp.Call(ctx, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}}})
			if err != nil {
				t.Fatal(err)
			}
			if err := chromedp.Do(ctx, chromedp.EmulateViewport(width, height), chromedp.Navigate(server.URL+prefix+"/"+strings.TrimPrefix(link, "./")), chromedp.WaitReady(chromedp.CSS("main"))); err != nil {
				t.Fatal(err)
			}
			png, err := chromedp.Run(ctx, chromedp.FullScreenshot(100))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, name+"-"+mode+".png"), png, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Log(problems())
}

// fill makes records by SQL.
func (b *testBundle) fill(t testing.TB, rows int) {
	t.Helper()
	b.exec(t, `
		INSERT INTO idempotency_keys (created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body, trace_id)
		SELECT at, at + interval '24 hours', CASE WHEN n % 50 = 0 THEN 402 WHEN n % 333 = 0 THEN 422 WHEN n % 2 = 0 THEN 200 ELSE 201 END, 1,
		       md5('attempt' || n)::uuid, 'acct_' || (100 + n % 400), md5('key' || n)::uuid::text, sha256(convert_to(n::text, 'UTF8')), '\x0100',
		       convert_to('{"id":"' || n || '","amount":1250,"currency":"EUR"}', 'UTF8'), md5('trace' || n)
		FROM (SELECT n, statement_timestamp() - interval '26 hours' * (1 - n / $1::float8) AS at FROM generate_series(1, $1::int) AS n) AS made`, rows)
}
