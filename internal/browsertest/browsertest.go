// Package browsertest gives a test its own Chromium, driven by chromedp:
//
//	ctx := browsertest.Start(t)
//	err := chromedp.Do(ctx, chromedp.Navigate(server.URL), chromedp.WaitVisible(chromedp.CSS("main")))
//
// It is for pages on the loopback interface: the browser resolves no names and makes no other
// calls.
package browsertest

import (
	"context"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
)

const (
	// Bounds everything that a test does with the browser, on a busy machine.
	runMax = 3 * time.Minute
	endMax = 10 * time.Second
)

// programs are the names of Chromium's program, Debian's first.
var programs = []string{"chromium", "chromium-browser", "google-chrome", "google-chrome-stable"}

// Start starts a Chromium without a window, with an empty profile folder of its own, and returns
// the context of its first tab. Browser and folder are gone when the test has ended. If no Chromium
// is installed, the test is skipped with a line that says how to run it; with
// PAIDONCE_FAULTS=required in the environment it fails instead.
//
// It is safe for parallel tests: each has its own browser. The context ends after 3 minutes at the
// latest; then the test's actions fail.
func Start(t testing.TB) context.Context {
	t.Helper()
	program := find()
	if program == "" {
		const missing = "Chromium is not installed; apt-get install --no-install-recommends chromium"
		if os.Getenv("PAIDONCE_FAULTS") == "required" {
			t.Fatalf("THE PAGE WAS NOT TESTED IN A BROWSER, and PAIDONCE_FAULTS=required: %s", missing)
		}
		t.Skipf("THE PAGE WAS NOT TESTED IN A BROWSER: %s", missing)
	}
	profile, err := os.MkdirTemp("", "paidonce-chromium-")
	if err != nil {
		t.Fatalf("make a profile folder: %v", err)
	}
	t.Cleanup(func() { remove(t, profile) }) // registered first: it runs when the browser has ended

	var output tail
	ctx, cancel := context.WithTimeout(context.Background(), runMax)
	t.Cleanup(cancel)
	allocator, cancelAllocator := chromedp.NewExecAllocator(ctx, append(slices.Clone(chromedp.DefaultExecAllocatorOptions[:]),
		chromedp.ExecPath(program),
		chromedp.UserDataDir(profile),
		// The sandbox needs rights that a container may lack; the pages are our own.
		chromedp.NoSandbox,
		chromedp.DisableGPU,
		chromedp.Flag("disable-quic", true),
		chromedp.Flag("disable-component-update", true),
		chromedp.Flag("host-resolver-rules", "MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
		chromedp.WindowSize(1280, 900),
		chromedp.CombinedOutput(&output),
	)...)
	tab, cancelTab := chromedp.NewContext(allocator)
	t.Cleanup(func() {
		end, stop := context.WithTimeout(tab, endMax)
		defer stop()
		if err := chromedp.Cancel(end); err != nil {
			t.Logf("close Chromium: %v", err) // it is killed next
		}
		cancelTab()
		cancelAllocator()
		chromedp.FromContext(tab).Allocator.Wait()
	})
	if err := chromedp.Do(tab); err != nil {
		t.Fatalf("start %s: %v\n%s", program, err, output.String())
	}
	return tab
}

// Problems returns a function that returns the problems of ctx's tab since this call: exceptions
// that no script caught, and errors on its console, such as a resource that a
// Content-Security-Policy blocked. The function is safe for concurrent use.
func Problems(t testing.TB, ctx context.Context) func() []string {
	t.Helper()
	var (
		mu       sync.Mutex
		problems []string
	)
	err := chromedp.Listen(ctx, func(event any) {
		var problem string
		switch event := event.(type) {
		case *runtime.EventExceptionThrown:
			problem = event.ExceptionDetails.Text
			if exception := event.ExceptionDetails.Exception; exception != nil {
				problem += " " + exception.Description
			}
		case *log.EventEntryAdded:
			if event.Entry.Level != log.EntryLevelError {
				return
			}
			problem = event.Entry.Text + " " + event.Entry.URL
		default:
			return
		}
		mu.Lock()
		defer mu.Unlock()
		problems = append(problems, problem)
	})
	if err != nil {
		t.Fatalf("listen to the tab: %v", err)
	}
	return func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(problems)
	}
}

func find() string {
	for _, name := range programs {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	return ""
}

// remove deletes the profile. A late process of the browser may still write to it, so it tries more
// than once.
func remove(t testing.TB, folder string) {
	var err error
	for deadline := time.Now().Add(endMax); ; time.Sleep(50 * time.Millisecond) {
		if err = os.RemoveAll(folder); err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("remove the profile: %v", err)
			return
		}
	}
}

// tail keeps the end of everything that is written to it.
type tail struct {
	mu   sync.Mutex
	kept []byte
}

var _ io.Writer = (*tail)(nil)

const tailBytesMax = 4 << 10

func (w *tail) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.kept = append(w.kept, p...)
	if over := len(w.kept) - tailBytesMax; over > 0 {
		w.kept = slices.Delete(w.kept, 0, over)
	}
	return len(p), nil
}

func (w *tail) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.ToValidUTF8(string(w.kept), "?")
}
