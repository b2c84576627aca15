package lostkey_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"runtime"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/testclock"
	"github.com/paidonce/idempotency/observe/lostkey"
)

func start(scope, key, body string) idempotency.RequestStart {
	return idempotency.RequestStart{
		Key: idempotency.Key{Scope: scope, Value: key}, Fingerprint: idempotency.NewFingerprint(100, []byte(body)), Route: "POST /transfers",
	}
}

func TestSameRequestWithAnotherKeyIsFound(t *testing.T) {
	t.Parallel()
	const window = 10 * time.Second
	type step struct {
		after            time.Duration
		scope, key, body string
		lost             bool
	}
	for name, steps := range map[string][]step{
		"a new key":                   {{0, "acme", "k1", "a", false}, {0, "acme", "k2", "a", true}},
		"the same key":                {{0, "acme", "k1", "a", false}, {0, "acme", "k1", "a", false}},
		"another request":             {{0, "acme", "k1", "a", false}, {0, "acme", "k2", "b", false}},
		"another scope":               {{0, "acme", "k1", "a", false}, {0, "globex", "k2", "a", false}},
		"the same key, other body":    {{0, "acme", "k1", "a", false}, {0, "acme", "k1", "b", false}},
		"at the end of the window":    {{0, "acme", "k1", "a", false}, {window, "acme", "k2", "a", true}},
		"after the window":            {{0, "acme", "k1", "a", false}, {window + 1, "acme", "k2", "a", false}},
		"long after":                  {{0, "acme", "k1", "a", false}, {5 * window, "acme", "k2", "a", false}},
		"each new key":                {{0, "acme", "k1", "a", false}, {0, "acme", "k2", "a", true}, {0, "acme", "k3", "a", true}},
		"a retry of the first":        {{0, "acme", "k1", "a", false}, {0, "acme", "k2", "a", true}, {0, "acme", "k1", "a", false}, {0, "acme", "k2", "a", false}},
		"a retry keeps it young":      {{0, "acme", "k1", "a", false}, {window - 1, "acme", "k1", "a", false}, {window - 1, "acme", "k2", "a", true}},
		"no key":                      {{0, "acme", "k1", "a", false}, {0, "acme", "", "a", false}, {0, "acme", "", "a", false}},
		"fields are not run together": {{0, "acme", "k1", "a", false}, {0, "acm", "ek1", "a", false}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			time := testclock.New()
			var events []lostkey.Event
			d := lostkey.New(&lostkey.Options{Window: window, Now: time.Now, OnLost: func(_ context.Context, e lostkey.Event) { events = append(events, e) }})
			found := 0
			for i, s := range steps {
				time.Advance(s.after)
				before := len(events)
				d.TraceRequestStart(context.Background(), start(s.scope, s.key, s.body))
				if lost := len(events) > before; lost != s.lost {
					t.Errorf("step %d: found is %t, want %t", i, lost, s.lost)
				}
				if s.lost {
					found++
					if e := events[len(events)-1]; e.Route != "POST /transfers" || e.After != s.after {
						t.Errorf("step %d: %+v, want after %v", i, e, s.after)
					}
				}
			}
			if d.Lost() != int64(found) || d.Dropped() != 0 {
				t.Errorf("%d lost and %d dropped, want %d and 0", d.Lost(), d.Dropped(), found)
			}
		})
	}
}

// A request is found within its window, even if another generation has begun since.
func TestRequestsOutlastTheirGeneration(t *testing.T) {
	t.Parallel()
	time := testclock.New()
	d := lostkey.New(&lostkey.Options{Window: 1000, Now: time.Now})
	for n := range 500 {
		time.Advance(7)
		d.TraceRequestStart(context.Background(), start("acme", "first"+strconv.Itoa(n), strconv.Itoa(n)))
		if late := n - 1000/7; late >= 0 {
			d.TraceRequestStart(context.Background(), start("acme", "second"+strconv.Itoa(late), strconv.Itoa(late)))
			if want := int64(late + 1); d.Lost() != want {
				t.Fatalf("after %d requests %d were found, want %d", n, d.Lost(), want)
			}
		}
	}
}

// Over the limit the older half is forgotten: findings are missed, memory does not grow, and there
// are no false findings.
func TestMemoryIsBounded(t *testing.T) {
	t.Parallel()
	const most = 100
	d := lostkey.New(&lostkey.Options{RequestsMax: most, Window: time.Hour})
	see := func(key string, body int) {
		d.TraceRequestStart(context.Background(), start("acme", key, strconv.Itoa(body)))
	}
	for n := range most { // all of them fit
		see("k", n)
	}
	if d.Dropped() != 0 {
		t.Errorf("%d of %d requests were dropped", d.Dropped(), most)
	}
	see("another", 0)
	if d.Lost() != 1 && d.Dropped() == 0 {
		t.Errorf("the first of %d requests is forgotten", most)
	}
	for n := range 100 * most {
		see("k", n)
	}
	if got := d.Dropped(); got < 98*most || got > 101*most {
		t.Errorf("%d requests were dropped of %d", got, 101*most)
	}
	lost := d.Lost()
	see("another", 0) // long forgotten
	see("another", 100*most-1)
	if got := d.Lost() - lost; got != 1 {
		t.Errorf("%d found, want the younger one alone", got)
	}
}

// The default limit costs as much memory as its doc comment states.
func TestRequestsMaxDefaultsMemory(t *testing.T) {
	const requestsMax = 32_768 // the default
	d := lostkey.New(&lostkey.Options{Window: time.Hour})
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for n := range 4 * requestsMax {
		s := start("acme", "k", "")
		s.Fingerprint.Sum = sha256.Sum256(strconv.AppendInt(nil, int64(n), 10))
		d.TraceRequestStart(context.Background(), s)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	bytes := int(after.HeapAlloc-before.HeapAlloc) / requestsMax
	t.Logf("%d bytes for each request", bytes)
	if bytes > 100 {
		t.Errorf("a request takes %d bytes", bytes)
	}
	runtime.KeepAlive(d)
}

func TestConcurrentRequests(t *testing.T) {
	t.Parallel()
	d := lostkey.New(nil)
	var group sync.WaitGroup
	for g := range 8 {
		group.Go(func() {
			for n := range 200 {
				d.TraceRequestStart(context.Background(), start("acme", fmt.Sprint("k", g), strconv.Itoa(n)))
			}
		})
	}
	group.Wait()
	if want := int64(7 * 200); d.Lost() != want { // the first of each is none
		t.Errorf("%d found, want %d", d.Lost(), want)
	}
}

func TestWiringMistakesPanic(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		options lostkey.Options
		panics  bool
	}{
		{lostkey.Options{RequestsMax: lostkey.RequestsMaxMin}, false}, {lostkey.Options{RequestsMax: lostkey.RequestsMaxMin - 1}, true},
		{lostkey.Options{RequestsMax: -1}, true}, {lostkey.Options{Window: -1}, true}, {lostkey.Options{Window: 1}, false}, {lostkey.Options{}, false},
	} {
		func() {
			defer func() {
				if value := recover(); (value != nil) != test.panics {
					t.Errorf("%+v: panics with %v", test.options, value)
				}
			}()
			lostkey.New(&test.options)
		}()
	}
}

func BenchmarkSee(b *testing.B) {
	d := lostkey.New(nil)
	s := start("acme", "8e03978e-40d5-43dd-bc93-6894a57f9324", "")
	b.ReportAllocs()
	for n := 0; b.Loop(); n++ {
		s.Fingerprint.Sum[0], s.Fingerprint.Sum[1], s.Fingerprint.Sum[2] = byte(n), byte(n>>8), byte(n>>16)
		d.TraceRequestStart(context.Background(), s)
	}
}
