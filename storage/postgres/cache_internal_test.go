package postgres

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/paidonce/idempotency"
)

// testCache is a cache with a clock that the test moves.
type testCache struct {
	*cache
	now time.Duration
}

func newTestCache(bytesMax int64) *testCache {
	c := &testCache{cache: newCache(bytesMax), now: time.Hour}
	c.clock = func() time.Duration { return c.now }
	return c
}

var serverNow = time.Date(2025, 7, 1, 12, 0, 0, 0, time.UTC)

// read is what a look-up hears that is asked and answered now.
func (c *testCache) read() news {
	c.now++ // no two things happen at once
	return news{asked: c.now, now: serverNow, server: serverID{1}}
}

func testKey(n int) idempotency.Key { return idempotency.Key{Scope: "acme", Value: fmt.Sprint(n)} }

func testRecord(body string) *idempotency.Record {
	return &idempotency.Record{
		Answer:    idempotency.Answer{Status: 201, Header: map[string][]string{"Vary": {"a", "b", "c"}, "Etag": {"1"}}, Body: []byte(body)},
		CreatedAt: serverNow, ExpiresAt: serverNow.Add(time.Hour),
	}
}

// put reads and keeps a record, without a number in common with others.
func (c *testCache) put(n int, body string) {
	c.learn(testKey(n), int64(n), testRecord(body), c.read())
}

func (c *testCache) body(n int) string {
	record := c.get(testKey(n))
	if record == nil {
		return ""
	}
	return string(record.Answer.Body)
}

func TestCacheIsOffByDefault(t *testing.T) {
	t.Parallel()
	c := newCache((*Options)(nil).full().CacheBytesMax)
	if c != nil {
		t.Fatal("there is a cache")
	}
	key := testKey(1)
	c.learn(key, 1, testRecord("a"), c.ask())
	c.forget(key)
	c.fail(errors.New("unexpected EOF"))
	c.failAcquire(errors.New("unexpected EOF"))
	if c.get(key) != nil {
		t.Error("it holds something")
	}
}

func TestCacheIsBoundedInBytes(t *testing.T) {
	t.Parallel()
	c := newTestCache(CacheBytesMin)
	sized := func(n, bytes int) (idempotency.Key, *idempotency.Record) {
		record := testRecord("")
		record.Answer.Body = make([]byte, bytes-int(newCacheEntry(testKey(n), record, news{}).bytes))
		return testKey(n), record
	}
	for n, bytes := range []int{CacheBytesMin / cacheShare, CacheBytesMin/cacheShare + 1} {
		key, record := sized(n, bytes)
		c.learn(key, int64(n), record, c.read())
		if kept := c.get(key) != nil; kept != (n == 0) {
			t.Errorf("an answer of %d bytes is kept: %t", bytes, kept)
		}
	}

	c = newTestCache(CacheBytesMin)
	const n = 2000
	for i := range n {
		c.put(i, "body")
		if c.bytes > c.bytesMax {
			t.Fatalf("%d bytes after %d answers", c.bytes, i+1)
		}
		c.get(testKey(0)) // asked for all the time
	}
	kept := 0
	for i := range n {
		if c.body(i) == "body" {
			kept++
		}
	}
	least := int(CacheBytesMin / (cacheEntryBytes + 4*cacheHeaderBytes + 100))
	if kept != len(c.entries) || kept < least || c.body(0) == "" || c.body(1) != "" || c.body(n-1) == "" {
		t.Errorf("%d of %d answers are kept (%d entries, at least %d); the one in use: %q, the oldest: %q, the newest: %q", kept, n, len(c.entries), least, c.body(0), c.body(1), c.body(n-1))
	}
	for i := range n {
		c.forget(testKey(i))
	}
	if c.bytes != 0 || c.order.Len() != 0 || len(c.entries) != 0 {
		t.Errorf("%d bytes and %d entries are left of nothing", c.bytes, len(c.entries))
	}
}

func TestCacheBytesCountEverything(t *testing.T) {
	t.Parallel()
	bytesOf := func(key idempotency.Key, change func(r *idempotency.Record)) int64 {
		record := testRecord("")
		change(record)
		return newCacheEntry(key, record, news{}).bytes
	}
	key := testKey(1)
	plain := bytesOf(key, func(*idempotency.Record) {})
	for name, c := range map[string]struct{ bytes, want int64 }{
		"body":     {bytesOf(key, func(r *idempotency.Record) { r.Answer.Body = make([]byte, 5000) }), 5000},
		"trace id": {bytesOf(key, func(r *idempotency.Record) { r.TraceID = strings.Repeat("t", 200) }), 200},
		"header":   {bytesOf(key, func(r *idempotency.Record) { r.Answer.Header["Link"] = []string{strings.Repeat("l", 900)} }), cacheHeaderBytes + 904},
		"scope":    {bytesOf(idempotency.Key{Scope: strings.Repeat("s", 204), Value: "1"}, func(*idempotency.Record) {}), 200},
		"key":      {bytesOf(idempotency.Key{Scope: "acme", Value: strings.Repeat("v", 201)}, func(*idempotency.Record) {}), 200},
	} {
		if got := c.bytes - plain; got != c.want {
			t.Errorf("%s counts for %d bytes, want %d", name, got, c.want)
		}
	}
}

// Nothing counts that the primary was not heard of within cacheProofMax.
func TestCacheNeedsAWordFromThePrimary(t *testing.T) {
	t.Parallel()
	c := newTestCache(CacheBytesMin)
	c.put(1, "a")
	if c.now += cacheProofMax; c.body(1) != "a" {
		t.Error("it does not count until cacheProofMax is over")
	}
	if c.now++; c.body(1) != "" {
		t.Error("it counts once cacheProofMax is over")
	}
	late := c.read()
	c.now += cacheProofMax / 2
	c.learn(testKey(2), 2, nil, late) // a slow reply proves what it was asked, not when it came
	if c.body(1) != "a" {
		t.Error("it does not count once the primary was heard of again")
	}
	if c.now += cacheProofMax/2 + 1; c.body(1) != "" {
		t.Error("a slow reply counts from when it came")
	}
}

// What is heard too late changes nothing.
func TestCacheGoesByWhenItAsked(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		between func(c *testCache)
		want    string // of the reading that was asked before that, and is heard after
	}{
		"nothing":             {func(*testCache) {}, "old"},
		"read again":          {func(c *testCache) { c.put(1, "new") }, "new"},
		"absent":              {func(c *testCache) { c.learn(testKey(1), 1, nil, c.read()) }, ""},
		"absent, then read":   {func(c *testCache) { c.learn(testKey(1), 1, nil, c.read()); c.put(1, "new") }, "new"},
		"a connection failed": {func(c *testCache) { c.now++; c.fail(errors.New("unexpected EOF")) }, ""},
		"a connection was refused": {func(c *testCache) {
			c.now++
			c.failAcquire(fmt.Errorf("acquire: %w", &pgconn.ConnectError{}))
		}, ""},
		"the pool was full": {func(c *testCache) { c.now++; c.failAcquire(errors.New("context deadline exceeded")) }, "old"},
		"the server shut down": {func(c *testCache) {
			c.now++
			c.fail(&pgconn.PgError{SeverityUnlocalized: "FATAL", Code: "57P01"})
		}, ""},
		"a standby answered a write": {func(c *testCache) {
			c.now++
			c.fail(&pgconn.PgError{SeverityUnlocalized: "ERROR", Code: "25006"})
		}, ""},
		"a standby answered BEGIN": {func(c *testCache) {
			c.now++
			c.fail(&pgconn.PgError{SeverityUnlocalized: "ERROR", Code: "0A000"})
		}, ""},
		"a statement was refused": {func(c *testCache) {
			c.now++
			c.fail(&pgconn.PgError{SeverityUnlocalized: "ERROR", Code: "57014"})
		}, "old"},
		"a record was unreadable": {func(c *testCache) { c.now++; c.fail(errRecord) }, "old"},
		"standbys are waited for": {func(c *testCache) {
			heard := c.read()
			heard.synchronous = true
			c.learn(testKey(2), 2, nil, heard)
		}, ""},
		"another server answered": {func(c *testCache) {
			heard := c.read()
			heard.server = serverID{2}
			c.learn(testKey(2), 2, nil, heard)
		}, ""},
	} {
		// Heard before, and heard too late.
		early, late := newTestCache(CacheBytesMin), newTestCache(CacheBytesMin)
		early.put(1, "old")
		c.between(early)
		before := late.read()
		c.between(late)
		late.learn(testKey(1), 1, testRecord("old"), before)
		if got := early.body(1); got != c.want {
			t.Errorf("%s: an answer that was there is now %q, want %q", name, got, c.want)
		}
		if got := late.body(1); got != c.want {
			t.Errorf("%s: an answer that comes too late is now %q, want %q", name, got, c.want)
		}
	}
}

// A pool may have connections to two servers for a while: each answer of the other empties the cache.
func TestCacheHoldsAnswersOfOneServerOnly(t *testing.T) {
	t.Parallel()
	c := newTestCache(CacheBytesMin)
	c.put(1, "a")
	other := c.read()
	other.server = serverID{2}
	c.learn(testKey(2), 2, testRecord("b"), other)
	if c.body(1) != "" || c.body(2) != "b" {
		t.Errorf("%q and %q", c.body(1), c.body(2))
	}
	c.put(3, "c")
	if c.body(2) != "" || c.body(3) != "c" {
		t.Errorf("%q and %q", c.body(2), c.body(3))
	}
}

// An answer counts no longer than its record, by the server's clock, and no longer than cacheAgeMax.
func TestCacheHonoursExpiry(t *testing.T) {
	t.Parallel()
	for remaining, counts := range map[time.Duration]time.Duration{
		-time.Second: 0, 0: 0, time.Microsecond: time.Microsecond, 3 * time.Second: 3 * time.Second,
		cacheAgeMax: cacheAgeMax, cacheAgeMax + 1: cacheAgeMax, time.Hour: cacheAgeMax,
	} {
		c := newTestCache(CacheBytesMin)
		record := testRecord("a")
		record.ExpiresAt = serverNow.Add(remaining)
		heard := c.read()
		c.learn(testKey(1), 1, record, heard)
		at := func(age time.Duration) string {
			c.now = heard.asked + age
			c.learn(testKey(2), 2, nil, news{asked: c.now, server: serverID{1}}) // the primary is heard of
			return c.body(1)
		}
		if counts > 0 && at(counts-1) != "a" {
			t.Errorf("%v are left: it is gone before %v", remaining, counts)
		}
		if at(counts) != "" {
			t.Errorf("%v are left: it is there after %v", remaining, counts)
		}
	}
}

// Requests share what is cached: none can change it for the others, nor for the cache.
func TestCachedRecordsShareNothing(t *testing.T) {
	t.Parallel()
	c := newTestCache(CacheBytesMin)
	read := testRecord("a")
	c.learn(testKey(1), 1, read, c.read())
	spoil := func(r *idempotency.Record) {
		r.Answer.Header["Vary"][0] = "spoilt"
		r.Answer.Header["Vary"] = append(r.Answer.Header["Vary"][:1], "spoilt")
		_ = append(r.Answer.Header["Etag"], "spoilt")
		r.Answer.Header["New"] = []string{"spoilt"}
		copy(r.Answer.Body, "X")
		r.Answer.Body = []byte("spoilt") // as storage/encrypted does
		r.Answer.Status, r.TraceID = 500, "spoilt"
	}
	spoil(read)
	for range 2 {
		got := c.get(testKey(1))
		if text := fmt.Sprintf("%v %d %s %q", got.Answer.Header, got.Answer.Status, got.Answer.Body, got.TraceID); text != `map[Etag:[1] Vary:[a b c]] 201 a ""` {
			t.Errorf("it became %s", text)
		}
		spoil(got)
	}
}

// Scope and key are compared apart.
func TestCacheOfOneKeyIsOfNoOther(t *testing.T) {
	t.Parallel()
	c := newTestCache(CacheBytesMin)
	c.learn(idempotency.Key{Scope: "a", Value: "b:c"}, 1, testRecord("mine"), c.read())
	for _, key := range []idempotency.Key{{Scope: "a:b", Value: "c"}, {Scope: "a", Value: "b"}, {Scope: "b", Value: "b:c"}, {Scope: "", Value: "ab:c"}, {Scope: "a"}} {
		if c.get(key) != nil {
			t.Errorf("%q %q: it is another key's", key.Scope, key.Value)
		}
	}
}

func TestHintsAreAboutOneNumber(t *testing.T) {
	t.Parallel()
	h := new(hints)
	one, samePlace := int64(5), int64(5+hintsMax)
	h.set(one)
	if !h.has(one) || h.has(samePlace) || h.has(6) {
		t.Error("a hint is about other numbers")
	}
	h.clear(samePlace)
	if !h.has(one) {
		t.Error("a hint was cleared for another number")
	}
	h.set(samePlace)
	if h.has(one) || !h.has(samePlace) {
		t.Error("a hint does not take the place of another")
	}
	if h.clear(samePlace); h.has(samePlace) {
		t.Error("a hint is there after it was cleared")
	}
	if negative := int64(-7); h.has(negative) {
		t.Error("a hint of a negative number")
	} else if h.set(negative); !h.has(negative) {
		t.Error("no hint of a negative number")
	}
}

// What is committed here replaces what was read before, whatever the claim said.
func TestCommittedRecordReplacesTheCachedOne(t *testing.T) {
	t.Parallel()
	for _, synchronous := range []bool{false, true} {
		c := newTestCache(CacheBytesMin)
		c.put(1, "old")
		a := &attempt{store: &Store{hints: new(hints), cache: c.cache}, req: &idempotency.Request{Key: testKey(1)}, number: 1, synchronous: synchronous}
		a.recorded()
		if hinted := a.store.hints.has(1); c.body(1) != "" || hinted == synchronous {
			t.Errorf("synchronous standbys: %t; cached %q, hinted: %t", synchronous, c.body(1), hinted)
		}
	}
}
