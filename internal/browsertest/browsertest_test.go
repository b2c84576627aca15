package browsertest_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/chromedp/chromedp"
	"go.uber.org/goleak"

	"github.com/paidonce/idempotency/internal/browsertest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A page is opened, its script runs, and its problems are reported. Nothing is left when the test
// has ended.
func TestStart(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a browser")
	}
	t.Setenv("TMPDIR", t.TempDir()) // other tests start browsers too
	t.Run("page", func(t *testing.T) {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/html")
			w.Header().Set("Content-Security-Policy", "style-src 'none'")
			_, _ = fmt.Fprint(w, `<title>one</title><style>p {}</style><p id=p></p><script>document.title = "two"; undefinedFunction()</script>`)
		}))
		t.Cleanup(server.Close)
		ctx := browsertest.Start(t)
		if n := profiles(t); n != 1 {
			t.Errorf("there are %d profile folders while it runs", n)
		}
		problems := browsertest.Problems(t, ctx)
		if err := chromedp.Do(ctx, chromedp.Navigate(server.URL), chromedp.WaitReady(chromedp.CSS("#p"))); err != nil {
			t.Fatal(err)
		}
		title, err := chromedp.Run(ctx, chromedp.Title())
		if err != nil {
			t.Fatal(err)
		}
		if title != "two" {
			t.Errorf("the title is %q: its script did not run", title)
		}
		got := strings.Join(problems(), "\n")
		for _, want := range []string{"undefinedFunction", "Content Security Policy"} {
			if !strings.Contains(got, want) {
				t.Errorf("problems are %q: none is of %s", got, want)
			}
		}
		if err := chromedp.Do(ctx, chromedp.Navigate("http://localhost:"+server.URL[strings.LastIndex(server.URL, ":")+1:])); err == nil {
			t.Error("it resolves names")
		}
	})
	if left := profiles(t); left != 0 {
		t.Errorf("%d profile folders are left", left)
	}
}

// Without Chromium the test is skipped with a message. If every fault is required, it fails.
func TestStartWithoutChromium(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	for required, want := range map[string]string{"": "skipped", "required": "failed"} {
		t.Setenv("PAIDONCE_FAULTS", required)
		if got := outcome(t); !strings.HasPrefix(got, want) || !strings.Contains(got, "NOT TESTED IN A BROWSER") || !strings.Contains(got, "apt-get install") {
			t.Errorf("with PAIDONCE_FAULTS=%q: %s; want %s", required, got, want)
		}
	}
}

// outcome returns how Start ends a test that cannot have a browser.
func outcome(t *testing.T) string {
	recorder := &recorder{TB: t}
	done := make(chan struct{})
	go func() { // Start ends its goroutine
		defer close(done)
		browsertest.Start(recorder)
	}()
	<-done
	return recorder.outcome
}

type recorder struct {
	testing.TB
	outcome string
}

func (r *recorder) Skipf(format string, args ...any) {
	r.outcome = "skipped: " + fmt.Sprintf(format, args...)
	r.SkipNow()
}

func (r *recorder) Fatalf(format string, args ...any) {
	r.outcome = "failed: " + fmt.Sprintf(format, args...)
	r.SkipNow()
}

func (r *recorder) SkipNow() { runtime.Goexit() }

func (r *recorder) Helper() {}

func profiles(t *testing.T) (n int) {
	t.Helper()
	entries, err := os.ReadDir(os.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if strings.HasPrefix(entry.Name(), "paidonce-chromium-") {
			n++
		}
	}
	return n
}
