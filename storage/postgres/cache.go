package postgres

import (
	"container/list"
	"errors"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/paidonce/idempotency"
)

// CacheBytesMin is the least [Options.CacheBytesMax] that is not zero.
const CacheBytesMin = 1 << 20

const (
	// cacheProofMax is how long the cache counts without a word from the primary. It bounds how long a payment is
	// replayed that a fail-over has lost.
	cacheProofMax = time.Second

	// cacheAgeMax is how long an answer is replayed without a look at its row. It bounds how long one is replayed whose
	// row was deleted by hand.
	cacheAgeMax = 10 * time.Second

	// cacheShare: one entry takes at most this part of the cache, so that a few large ones don't empty it.
	cacheShare = 16

	// What an entry takes beside its bytes, in memory that is spread over maps, lists and headers.
	cacheEntryBytes  = 1024
	cacheHeaderBytes = 128 // for each value

	// absencesMax is how many places there are for the times at which keys were seen to be absent.
	absencesMax = 1 << 10
)

// cache holds records that were read of late, so that a replay takes no connection. It is bounded in bytes; what was
// not asked for longest goes first. A nil cache holds nothing. It is safe for concurrent use.
//
// It answers only what the database would have answered a moment ago:
//
//   - Nothing counts unless the primary was heard of within cacheProofMax. What was heard counts from when it was asked.
//   - All of it is forgotten when a connection fails, a standby answers or another server does. What was asked before
//     that and is heard after it comes too late.
//   - A key that is seen to be absent is forgotten, and so is a reading of it that was asked before.
//   - An entry counts for cacheAgeMax, and no longer than its record by the server's clock: nothing reads a wall clock
//     here.
//   - Where COMMIT waits for standbys it holds nothing: there a replay has to wait for them too.
type cache struct {
	bytesMax int64
	clock    func() time.Duration // monotonic

	mu       sync.Mutex
	server   serverID
	heard    time.Duration // when the last question was asked that server answered
	emptied  time.Duration
	absences [absencesMax]time.Duration // when a key of this place was last seen to be absent
	entries  map[idempotency.Key]*list.Element
	order    *list.List // of *cacheEntry, the one asked for last in front
	bytes    int64
}

// cacheEntry is a record. It is never changed.
type cacheEntry struct {
	key    idempotency.Key
	record idempotency.Record
	asked  time.Duration
	until  time.Duration
	bytes  int64
}

// newCache returns a cache of so many bytes, nil where they are none.
func newCache(bytesMax int64) *cache {
	if bytesMax == 0 {
		return nil
	}
	started := time.Now()
	return &cache{
		bytesMax: bytesMax, clock: func() time.Duration { return time.Since(started) },
		emptied: -1, entries: map[idempotency.Key]*list.Element{}, order: list.New(),
	}
}

// get returns a record of the key that shares nothing, nil where the database must be asked.
func (c *cache) get(key idempotency.Key) *idempotency.Record {
	if c == nil {
		return nil
	}
	now := c.clock()
	entry := c.find(key, now)
	if entry == nil {
		return nil
	}
	return cloneRecord(&entry.record)
}

func (c *cache) find(key idempotency.Key, now time.Duration) *cacheEntry {
	c.mu.Lock()
	defer c.mu.Unlock()
	element := c.entries[key]
	if element == nil || now-c.heard > cacheProofMax {
		return nil
	}
	entry := element.Value.(*cacheEntry)
	if now >= entry.until {
		c.remove(element)
		return nil
	}
	c.order.MoveToFront(element)
	return entry
}

// ask begins a question to the server: what is heard in reply is as old as this.
func (c *cache) ask() news {
	if c == nil {
		return news{}
	}
	return news{asked: c.clock()}
}

// learn takes in what was heard of a key; record is nil where it is absent, and the caller's to change afterwards.
func (c *cache) learn(key idempotency.Key, number int64, record *idempotency.Record, heard news) {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case heard.synchronous:
		c.empty()
		return
	case heard.asked <= c.emptied:
		return
	case heard.server != c.server:
		if heard.asked < c.heard {
			return // the server before
		}
		c.drop()
		c.server = heard.server
	}
	c.heard = max(c.heard, heard.asked)
	absence := &c.absences[uint64(number)%absencesMax]
	if element := c.entries[key]; element != nil {
		if element.Value.(*cacheEntry).asked > heard.asked {
			return // it was read later
		}
		c.remove(element)
	}
	if record == nil {
		*absence = c.clock()
		return
	}
	entry := newCacheEntry(key, record, heard)
	if heard.asked <= *absence || entry.until <= heard.asked || entry.bytes > c.bytesMax/cacheShare {
		return
	}
	c.entries[entry.key] = c.order.PushFront(entry)
	for c.bytes += entry.bytes; c.bytes > c.bytesMax; {
		c.remove(c.order.Back())
	}
}

func newCacheEntry(key idempotency.Key, record *idempotency.Record, heard news) *cacheEntry {
	e := &cacheEntry{
		// Clones: a part of a header or a token would keep the whole of it.
		key:    idempotency.Key{Scope: strings.Clone(key.Scope), Value: strings.Clone(key.Value)},
		record: *cloneRecord(record),
		asked:  heard.asked,
		until:  heard.asked + min(cacheAgeMax, record.ExpiresAt.Sub(heard.now)),
	}
	e.bytes = cacheEntryBytes + int64(len(key.Scope)+len(key.Value)+len(record.Answer.Body)+len(record.TraceID))
	for name, values := range record.Answer.Header {
		for _, value := range values {
			e.bytes += cacheHeaderBytes + int64(len(name)+len(value))
		}
	}
	return e
}

// forget drops the entry of a key.
func (c *cache) forget(key idempotency.Key) {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if element := c.entries[key]; element != nil {
		c.remove(element)
	}
}

// fail takes in an error of a connection, and empties the cache unless PostgreSQL itself refused a statement: behind any
// other there may be another server by now. A full pool is no such sign.
func (c *cache) fail(err error) {
	if c == nil || errors.Is(err, errRecord) {
		return
	}
	if pgErr, ok := definite(err); ok && pgErr.Code != "25006" && pgErr.Code != "0A000" { // a standby's, to a write and to a BEGIN
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.empty()
}

// failAcquire takes in an error of the pool.
func (c *cache) failAcquire(err error) {
	var refused *pgconn.ConnectError
	if errors.As(err, &refused) {
		c.fail(err)
	}
}

// empty forgets everything, also what is on its way.
func (c *cache) empty() {
	c.drop()
	c.emptied = c.clock()
}

func (c *cache) drop() {
	if len(c.entries) > 0 {
		c.entries = map[idempotency.Key]*list.Element{}
		c.order.Init()
		c.bytes = 0
	}
}

func (c *cache) remove(element *list.Element) {
	entry := c.order.Remove(element).(*cacheEntry)
	delete(c.entries, entry.key)
	c.bytes -= entry.bytes
}

// cloneRecord returns a copy that shares no memory with the record: a store's records are their callers' to change.
func cloneRecord(record *idempotency.Record) *idempotency.Record {
	clone := *record
	clone.Answer.Body = make([]byte, len(record.Answer.Body)) // not a byte more
	copy(clone.Answer.Body, record.Answer.Body)
	values := 0
	for _, list := range record.Answer.Header {
		values += len(list)
	}
	all := make([]string, 0, values)
	clone.Answer.Header = make(map[string][]string, len(record.Answer.Header))
	for name, list := range record.Answer.Header {
		from := len(all)
		all = append(all, list...)
		clone.Answer.Header[name] = all[from:len(all):len(all)] // nobody's append reaches the next
	}
	return &clone
}
