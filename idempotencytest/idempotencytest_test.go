package idempotencytest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/crashpoint"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/memory"
)

func TestServiceInOrderPasses(t *testing.T) {
	t.Parallel()
	b := setup(t)
	t.Cleanup(func() {
		for n, times := range b.asked {
			if times != 1 {
				t.Errorf("request %d was asked for %d times", n, times)
			}
		}
	})
	Run(t, b.config())
}

// ledger counts in memory, so nothing is undone.
type ledger struct {
	mu   sync.Mutex
	paid int
}

// memoryConfig is a service on the memory store. If it pays, it pays outside of any transaction.
func memoryConfig(pays bool) Config {
	l := &ledger{}
	return Config{
		Store: memory.New(nil),
		New: func(store idempotency.Store) http.Handler {
			idem := middleware.New(store, func(*http.Request) (string, error) { return "acme", nil },
				&middleware.Options{Logger: slog.New(slog.DiscardHandler)})
			return idem.Handler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				l.mu.Lock()
				defer l.mu.Unlock()
				if pays {
					l.paid++
				}
				w.WriteHeader(http.StatusNoContent)
			}))
		},
		Request: func(n int) *http.Request {
			body, _ := json.Marshal(n) // a number
			r, err := http.NewRequest(http.MethodPut, fmt.Sprintf("/?n=%d", n), bytes.NewReader(body))
			if err != nil {
				panic(err)
			}
			return r
		},
		Invariant: func(_ context.Context, told Told) error {
			if l.mu.Lock(); pays && l.paid != len(told.Acknowledged) {
				defer l.mu.Unlock()
				return fmt.Errorf("paid %d, and %d were acknowledged", l.paid, len(told.Acknowledged))
			}
			l.mu.Unlock()
			return nil
		},
		Keys: 20,
	}
}

// Any store works, and so do an answer without a body and a handler that never uses its context.
func TestStoreOfAnotherKind(t *testing.T) {
	t.Parallel()
	Run(t, memoryConfig(false))
}

// failVariable makes TestFails fail, for TestFailureSaysHowToRepeatIt.
const failVariable = "PAIDONCE_PROOFTEST_FAIL"

func TestFails(t *testing.T) {
	if os.Getenv(failVariable) == "" {
		t.Skip("it fails, and so runs for TestFailureSaysHowToRepeatIt alone")
	}
	config := memoryConfig(true)
	config.Seed = 42
	Run(t, config)
}

func TestFailureSaysHowToRepeatIt(t *testing.T) {
	t.Parallel()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	run := func(pattern string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), program, "-test.run", pattern)
		cmd.Env = append(os.Environ(), failVariable+"=1")
		output, err := cmd.CombinedOutput()
		if err == nil {
			t.Errorf("it passes:\n%s", output)
		}
		return string(output)
	}
	output := run("^TestFails$/^Crash$/^after_handler$")
	for _, want := range []string{
		"--- FAIL: TestFails/Crash/after_handler", "invariant: paid 17, and 9 were acknowledged",
		"idempotencytest.Config.Seed = 42, and go test -run '^TestFails$/^Crash$/^after_handler$'",
	} {
		if !strings.Contains(output, want) {
			t.Errorf("it does not say %q:\n%s", want, output)
		}
	}
	if strings.Contains(output, "--- FAIL: TestFails/Crash/after_begin") || strings.Contains(output, "Seed = 0") {
		t.Errorf("it says more than that:\n%s", output)
	}
}

func TestWrongConfigIsRefused(t *testing.T) {
	t.Parallel()
	for missing, change := range map[string]func(c *Config){
		"Config.Store":     func(c *Config) { c.Store = nil },
		"Config.New":       func(c *Config) { c.New = nil },
		"Config.Request":   func(c *Config) { c.Request = nil },
		"Config.Invariant": func(c *Config) { c.Invariant = nil },
		"Config.Keys":      func(c *Config) { c.Keys = -1 },
	} {
		c := memoryConfig(false)
		change(&c)
		if _, err := c.full(); err == nil || !strings.HasPrefix(err.Error(), missing) {
			t.Errorf("%s: %v", missing, err)
		}
	}
	same := memoryConfig(false)
	request := same.Request
	same.Request = func(int) *http.Request { return request(7) }
	wantFinding(t, prove(t, same, "Prepare", 0), checkConfig)

	full := memoryConfig(false)
	full.Invariant = func(context.Context, Told) error { return fmt.Errorf("3 orders are there already") }
	wantFinding(t, prove(t, full, "Prepare", 0), checkInvariant)
}

// A service that gives the store a context of its own is not hit by any point, and gets a finding
// that says so.
func TestContextOfItsOwnIsFound(t *testing.T) {
	t.Parallel()
	c := memoryConfig(false)
	inner := c.New
	c.New = func(store idempotency.Store) http.Handler {
		next := inner(store)
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { next.ServeHTTP(w, r.WithContext(context.Background())) })
	}
	found := prove(t, c, "Prepare", 0)
	wantFinding(t, found, checkConfig)
}

// A point that no attempt reaches fails its part, and does not pass in silence.
func TestPointThatIsNeverHitIsFound(t *testing.T) {
	t.Parallel()
	full, err := memoryConfig(false).full()
	if err != nil {
		t.Fatal(err)
	}
	l := newLab(full)
	defer l.close()
	if found := l.prepare(t.Context()); len(found) > 0 {
		t.Fatal(found)
	}
	for _, p := range plans() {
		if p.point == crashpoint.MidHandler { // this handler does not use its context
			wantFinding(t, l.crash(t.Context(), p), checkHits)
		}
	}
	l.handlerUses = 1 // as if the handler used its context
	wantFinding(t, l.storm(t.Context()), checkHits)
}

// A half response is half: its client gets the headers, and an end that comes too early.
func TestHalfResponseIsHalf(t *testing.T) {
	t.Parallel()
	l := &lab{handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Context().Value(exchangeKey{}).(*exchange).half.Store(true)
		w.Header().Set("Content-Length", "10")
		_, _ = w.Write([]byte("0123456789"))
	})}
	w := &halfWriter{header: http.Header{}}
	func() {
		defer func() {
			if !aborted(recover()) {
				t.Error("the connection is not cut")
			}
		}()
		l.serve(w, mustRequest(t))
	}()
	if w.body.String() != "01234" || w.header.Get("Content-Length") != "10" || !w.flushed {
		t.Errorf("sent %q with Content-Length %q, flushed: %v", w.body.String(), w.header.Get("Content-Length"), w.flushed)
	}
}

func mustRequest(t *testing.T) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "/", nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

type halfWriter struct {
	header  http.Header
	body    bytes.Buffer
	flushed bool
}

func (w *halfWriter) Header() http.Header         { return w.header }
func (w *halfWriter) WriteHeader(int)             {}
func (w *halfWriter) Write(p []byte) (int, error) { return w.body.Write(p) }
func (w *halfWriter) Flush()                      { w.flushed = true }

// A client that gives up after a not-executed although an earlier request was lost would make this
// package blame a correct service. One that never gives up would miss a store that returns
// not-executed for something that happened.
func TestClientGivesUpOnlyWhereItMay(t *testing.T) {
	t.Parallel()
	full, err := memoryConfig(false).full()
	if err != nil {
		t.Fatal(err)
	}
	l := newLab(full)
	defer l.close()
	for n, test := range []struct {
		pending []point
		gives   bool
	}{
		{[]point{crashpoint.BeforeBegin}, true},
		{[]point{crashpoint.CommitNeverArrived}, true},
		{[]point{crashpoint.BeforeBegin, crashpoint.AfterCommit}, true},
		{[]point{crashpoint.AfterBegin, crashpoint.BeforeBegin}, false},   // no answer
		{[]point{crashpoint.AfterCommit, crashpoint.BeforeBegin}, false},  // no answer
		{[]point{crashpoint.HalfResponse, crashpoint.BeforeBegin}, false}, // half an answer
		{[]point{crashpoint.Unresolvable, crashpoint.BeforeBegin}, false}, // unknown
		{nil, false},
	} {
		var pending []step
		for _, p := range test.pending {
			pending = append(pending, step{point: p})
		}
		k := l.newKey(n, false, pending...)
		_, last, ok := l.follow(t.Context(), k, manner{quits: true}, l.random(n))
		if !ok || k.abandoned != test.gives || (k.answer == nil) != test.gives {
			t.Errorf("%q: gave up: %v, last answer %s, want given up: %v; %q", test.pending, k.abandoned, last, test.gives, l.take())
		}
	}
}

// The uses of a context are counted, and the planned one ends it, and so does a use of a context
// derived from it.
func TestTripwireEndsAtTheNamedUse(t *testing.T) {
	t.Parallel()
	for at := int64(1); at <= 4; at++ {
		w := newTripwire(t.Context(), at, func() bool { return true })
		derived := context.WithValue(w, exchangeKey{}, nil)
		uses := []func(){func() { _ = derived.Err() }, func() { derived.Value(0) }, func() { derived.Deadline() }, func() { derived.Done() }}
		for i, use := range uses {
			if ended := w.Context.Err() != nil; ended != (int64(i) >= at) {
				t.Errorf("use %d is named, and after %d uses it has ended: %v", at, i, ended)
			}
			use()
		}
		if !w.disarm() {
			t.Errorf("use %d is named, and it does not say that it was tripped", at)
		}
	}
	if w := newTripwire(t.Context(), 2, func() bool { return true }); w.Err() != nil || w.disarm() || w.Err() != nil {
		t.Error("it ended after it was disarmed")
	}
}

type foreignContext struct {
	context.Context
	Values fmt.Stringer
}

type stringFunc func() string

func (f stringFunc) String() string { return f() }

// A handler may print its context. That shows nothing that the service put below it, and does not
// count as a use.
func TestTripwirePrintsNothingThatIsNotOurs(t *testing.T) {
	t.Parallel()
	read := stringFunc(func() string { t.Error("a value of somebody else's was read"); return "" })
	w := newTripwire(t.Context(), 1, func() bool { t.Error("it was tripped"); return false })
	w.Context = foreignContext{w.Context, read}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%d"} {
		_ = fmt.Sprintf(verb, w)
		_ = fmt.Sprintf(verb, context.WithValue(w, exchangeKey{}, nil))
	}
}
