package middleware

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/testclock"
	"github.com/paidonce/idempotency/storage/memory"
)

func newTestQuota(c *testclock.Clock, keysMax, scopesMax int) *quota {
	return newQuota(Quota{KeysMax: keysMax, Window: time.Minute, ScopesMax: scopesMax, Now: c.Now}.full())
}

func TestQuotaOnBothSidesOfItsEdges(t *testing.T) {
	t.Parallel()
	c := testclock.New()
	q := newTestQuota(c, 3, 10)
	take := func(scope string, want bool) *slot {
		t.Helper()
		s, wait := q.take(scope)
		if (s != nil) != want || want && wait != 0 || !want && (wait <= 0 || wait > time.Minute) {
			t.Fatalf("taken %v, wait %v; want %v", s != nil, wait, want)
		}
		return s
	}
	// KeysMax.
	take("acme", true)
	c.Advance(10 * time.Second)
	take("acme", true)
	third := take("acme", true)
	take("acme", false)
	take("globex", true)
	if _, wait := q.take("acme"); wait != 50*time.Second {
		t.Errorf("the window began 10 s ago and is over in %v", wait)
	}
	// A request that left no record is no longer counted.
	q.giveBack(third)
	third = take("acme", true)
	take("acme", false)
	// Window.
	c.Advance(50*time.Second - time.Nanosecond)
	take("acme", false)
	c.Advance(time.Nanosecond)
	for range 3 {
		take("acme", true)
	}
	take("acme", false)
	q.giveBack(third) // it belongs to the previous window, so it makes no room in this one
	take("acme", false)
	c.Advance(time.Minute)
	q.take("somebody")
	if len(q.windows) != 1 || len(q.queue) != 1 {
		t.Errorf("%d windows and %d in the queue are left, want somebody's alone", len(q.windows), len(q.queue))
	}
}

// Over ScopesMax the later scopes share one count. Those that have a count of their own keep it.
func TestScopesOverTheirLimitShareOneCount(t *testing.T) {
	t.Parallel()
	c := testclock.New()
	q := newTestQuota(c, 2, 3)
	taken := map[string]int{}
	for i := range 10 {
		for range 5 {
			scope := fmt.Sprint(i)
			if s, _ := q.take(scope); s != nil {
				taken[scope]++
			}
		}
	}
	if fmt.Sprint(taken) != "map[0:2 1:2 2:2 3:2]" {
		t.Errorf("keys by scope: %v; want two for each of three, and two for all the others together", taken)
	}
	if s, _ := q.take("9"); s != nil {
		t.Error("the shared count has no end")
	}
	c.Advance(time.Minute)
	for _, scope := range []string{"9", "8", "7", "6"} {
		if s, _ := q.take(scope); s == nil {
			t.Errorf("scope %s is refused in the next window", scope)
		}
	}
	if len(q.windows) != 3 || q.rest == nil || q.rest.keys != 1 {
		t.Errorf("%d windows, shared %+v", len(q.windows), q.rest)
	}
}

// However many scopes come, the quota holds at most ScopesMax.
func TestQuotaHoldsNoMoreScopesThanItMay(t *testing.T) {
	t.Parallel()
	c := testclock.New()
	q := newTestQuota(c, 1, 1000)
	for i := range 200_000 {
		q.take(strconv.Itoa(i))
		if len(q.windows) > 1000 || len(q.queue) != len(q.windows) || cap(q.queue) > 4000 {
			t.Fatalf("after %d scopes %d are held, %d in the queue of %d", i+1, len(q.windows), len(q.queue), cap(q.queue))
		}
		if i%7 == 0 {
			c.Advance(time.Duration(rand.IntN(2000)) * time.Millisecond)
		}
	}
}

// An account that sends a million new keys leaves only its quota of records, and each answered
// request is still replayed.
func TestAMillionKeysStayBounded(t *testing.T) {
	t.Parallel()
	const keysMax = 1000
	flood := 1_000_000
	if testing.Short() {
		flood = 20 * keysMax
	}
	c := testclock.New()
	store := memory.New(nil)
	scope := func(r *http.Request) (string, error) { return r.Header.Get("Account"), nil }
	runs := 0
	handler := New(store, scope, &Options{Quota: Quota{KeysMax: keysMax, Now: c.Now}}).Handler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		runs++
		w.WriteHeader(http.StatusCreated)
	}))
	send := func(account, key string) *discard {
		r := &http.Request{Method: http.MethodPost, URL: requestURL, Header: http.Header{"Account": {account}, "Idempotency-Key": {key}}}
		w := &discard{header: http.Header{}}
		handler.ServeHTTP(w, r)
		return w
	}
	// On a slow machine fewer are sent: none of them may get through, however many there are.
	sent := 0
	for deadline := time.Now().Add(40 * time.Second); sent < flood && (sent < 10*keysMax || time.Now().Before(deadline)); sent++ {
		want := http.StatusCreated
		if sent >= keysMax {
			want = http.StatusTooManyRequests
		}
		if got := send("acme", strconv.Itoa(sent)); got.status != want {
			t.Fatalf("key %d: %d, want %d", sent, got.status, want)
		}
	}
	t.Logf("%d keys sent", sent)
	if store.Len() != keysMax || runs != keysMax {
		t.Errorf("%d records, %d runs; want %d of each", store.Len(), runs, keysMax)
	}
	for i := range keysMax {
		if got := send("acme", strconv.Itoa(i)); got.status != http.StatusCreated || got.header.Get("Idempotency-Status") != "replayed" {
			t.Fatalf("key %d is not replayed: %d", i, got.status)
		}
	}
	if got := send("globex", "0"); got.status != http.StatusCreated {
		t.Errorf("another account: %d", got.status)
	}
}

var requestURL = httptest.NewRequest(http.MethodPost, "/", nil).URL

// discard keeps the status of an answer.
type discard struct {
	header http.Header
	status int
}

func (d *discard) Header() http.Header         { return d.header }
func (d *discard) WriteHeader(status int)      { d.status = status }
func (d *discard) Write(p []byte) (int, error) { return len(p), nil }

func TestQuotasThatCannotWorkPanic(t *testing.T) {
	t.Parallel()
	scope := func(*http.Request) (string, error) { return "", nil }
	for _, q := range []Quota{{KeysMax: -1}, {KeysMax: 1, Window: time.Second - 1}, {KeysMax: 1, Window: -1}, {KeysMax: 1, ScopesMax: -1}} {
		text := func() (text string) {
			defer func() { text, _ = recover().(string) }()
			New(stubStore{}, scope, &Options{Quota: q})
			return ""
		}()
		if !strings.HasPrefix(text, "idempotency/middleware: Options.Quota") {
			t.Errorf("%+v: %q", q, text)
		}
	}
	m := New(stubStore{}, scope, &Options{Quota: Quota{KeysMax: 1, Window: time.Second}})
	if q := m.options.Quota; q.ScopesMax != 100_000 || q.Now == nil {
		t.Errorf("defaults %+v", q)
	}
	if New(stubStore{}, scope, nil).quota != nil {
		t.Error("there is a quota, and nobody asked for one")
	}
}

// Routes share the count if they leave the quota as it is. Each route gets the user's policy
// unchanged.
func TestRoutesShareTheQuota(t *testing.T) {
	t.Parallel()
	asked := 0
	policy := func(idempotency.Answer) idempotency.Disposition { asked++; return idempotency.DispositionCommit }
	m := New(stubStore{}, func(*http.Request) (string, error) { return "", nil }, &Options{
		Quota: Quota{KeysMax: 1}, Disposition: policy,
	})
	var seen idempotency.Disposition
	same := m.With(func(o *Options) { o.Optional = true; seen = o.Disposition(idempotency.Answer{Status: 429}) })
	other := same.With(func(o *Options) { o.Quota.KeysMax = 2 })
	none := same.With(func(o *Options) { o.Quota = Quota{} })
	if same.quota != m.quota || other.quota == m.quota || other.quota == nil || none.quota != nil {
		t.Errorf("counts %p, %p, %p, %p", m.quota, same.quota, other.quota, none.quota)
	}
	if seen != idempotency.DispositionCommit || asked != 1 {
		t.Errorf("With shows a policy that is not the user's: %v, asked %d times", seen, asked)
	}
}
