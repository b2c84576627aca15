package psp

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/google/uuid"
)

// kind is one of the processor's four services, named by its path.
type kind string

const (
	charges kind = "charges"
	refunds kind = "refunds"
	payouts kind = "payouts"
	mails   kind = "mails"
)

// keyed reports whether the kind's requests need a key. Without one, each is applied.
func (k kind) keyed() bool { return k != mails }

// keyName identifies a key. Each kind has keys of its own.
type keyName struct {
	kind kind
	key  string
}

// entry is the outcome of a request: an item, or an error that is kept under its key. It is a line
// of the file.
type entry struct {
	Kind   kind            `json:"kind"`
	Key    string          `json:"key,omitempty"`
	Digest string          `json:"digest,omitempty"` // of the request, if it has a key
	At     time.Time       `json:"at"`
	Status int             `json:"status"`
	ID     string          `json:"id,omitempty"`   // of the item
	Item   json.RawMessage `json:"item,omitempty"` // as lists show it
	Error  string          `json:"error,omitempty"`
}

func (e *entry) name() keyName { return keyName{e.Kind, e.Key} }

// validate checks an entry from the file.
func (e *entry) validate() error {
	switch e.Kind {
	case charges, refunds, payouts, mails:
	default:
		return fmt.Errorf("the kind %.64q is unknown", e.Kind)
	}
	applied := e.Item != nil && e.ID != ""
	if e.Status < 200 || e.Status > 599 || applied == (e.Error != "") || e.Kind.keyed() && (e.Key == "" || e.Digest == "") {
		return errors.New("the entry is incomplete")
	}
	return nil
}

// keyState is a key that is taken. entry is nil while its request is under way.
type keyState struct {
	digest string
	entry  *entry
}

// Refusals of [ledger.claim].
var (
	errKeyUnderWay = errors.New("the key is under way")
	errKeyReused   = errors.New("the key was used with another body")
	errFull        = errors.New("the processor is full")
)

// ledger decides and holds the outcomes of requests. It is safe for concurrent use.
type ledger struct {
	instance   string
	journal    *journal
	entriesMax int
	now        func() time.Time

	mu       sync.Mutex
	faults   Faults
	tries    map[keyName]uint64 // requests so far, for the faults' draws
	keys     map[keyName]*keyState
	items    map[kind][]*entry
	byKey    map[keyName][]*entry
	chargeID map[string]bool
	entries  int // applied or under way
}

// openLedger reads the file, if there is one, and returns the ledger that it holds.
func openLedger(config *Config) (*ledger, error) {
	l := &ledger{
		entriesMax: config.EntriesMax, now: config.now, faults: FaultsDefault(),
		tries: map[keyName]uint64{}, keys: map[keyName]*keyState{}, items: map[kind][]*entry{},
		byKey: map[keyName][]*entry{}, chargeID: map[string]bool{},
	}
	var err error
	l.journal, l.instance, err = openJournal(config.File, newID("psp"), func(read line) error {
		switch {
		case (read.Entry == nil) == (read.Faults == nil):
			return errors.New("it must have an entry or faults")
		case read.Faults != nil:
			l.faults = *read.Faults
			return l.faults.validate()
		}
		if err := read.Entry.validate(); err != nil {
			return err
		}
		l.entries++
		l.apply(read.Entry)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return l, nil
}

// newID returns an id that no other processor makes.
func newID(prefix string) string { return prefix + "_" + uuid.Must(uuid.NewV7()).String() }

// apply makes an outcome visible. The caller holds mu, or is the only one.
func (l *ledger) apply(e *entry) {
	if e.Item != nil {
		l.items[e.Kind] = append(l.items[e.Kind], e)
		if e.Key != "" {
			l.byKey[e.name()] = append(l.byKey[e.name()], e)
		}
		if e.Kind == charges {
			l.chargeID[e.ID] = true
		}
	}
	if e.Kind.keyed() {
		l.keys[e.name()] = &keyState{digest: e.Digest, entry: e}
	}
}

// setFaults replaces the faults, and restarts their draws.
func (l *ledger) setFaults(f Faults) error {
	l.mu.Lock()
	wait := l.journal.enqueue(line{Faults: &f}, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.faults = f
		clear(l.tries)
	})
	l.mu.Unlock()
	return wait()
}

func (l *ledger) getFaults() Faults {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.faults
}

// draw returns the faults that the next request under a name meets.
func (l *ledger) draw(name keyName) draw {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.tries) >= l.entriesMax { // requests that were lost leave no entry
		clear(l.tries)
	}
	n := l.tries[name]
	l.tries[name] = n + 1
	return l.faults.draw(name, n)
}

// claim is a request that is under way. It must end in finish or abandon.
type claim struct {
	name   keyName
	digest string
	order  order
}

// claim takes the request's key. If an outcome is kept under it, claim returns that instead.
func (l *ledger) claim(name keyName, o order) (*claim, *entry, error) {
	c := &claim{name: name, order: o}
	l.mu.Lock()
	defer l.mu.Unlock()
	if name.kind.keyed() {
		c.digest = digest(o)
		state := l.keys[name]
		if state != nil && state.entry != nil && l.now().Sub(state.entry.At) >= l.faults.keyLifetime() {
			delete(l.keys, name)
			state = nil
		}
		switch {
		case state == nil:
		case state.digest != c.digest:
			return nil, nil, errKeyReused
		case state.entry == nil:
			return nil, nil, errKeyUnderWay
		default:
			return nil, state.entry, nil
		}
	}
	if l.entries >= l.entriesMax {
		return nil, nil, errFull
	}
	l.entries++
	if name.kind.keyed() {
		l.keys[name] = &keyState{digest: c.digest}
	}
	return c, nil, nil
}

// digest returns a hash of a request's fields.
func digest(o order) string {
	text, err := json.Marshal(o)
	if err != nil { // only our own types are passed
		panic(err)
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}

// finish decides the request and returns its outcome once it is on disk. If it returns an error,
// the request may or may not have been applied.
func (l *ledger) finish(c *claim, sameError bool) (*entry, error) {
	l.mu.Lock()
	e := &entry{Kind: c.name.kind, Key: c.name.key, Digest: c.digest, At: l.now().UTC()}
	refused, code := c.order.refusal(l)
	switch {
	case sameError:
		e.Status, e.Error = http.StatusInternalServerError, "internal"
	case code != "" && !l.faults.KeepsDeclines:
		e.Status, e.Error = refused, code
		l.release(c)
		l.mu.Unlock()
		return e, nil
	case code != "":
		e.Status, e.Error = refused, code
	default:
		c.order.fill(e)
	}
	wait := l.journal.enqueue(line{Entry: e}, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.apply(e)
	})
	l.mu.Unlock()
	if err := wait(); err != nil {
		l.abandon(c)
		return nil, err
	}
	return e, nil
}

// abandon releases the key of a request that left nothing.
func (l *ledger) abandon(c *claim) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.release(c)
}

func (l *ledger) release(c *claim) {
	l.entries--
	if c.name.kind.keyed() {
		delete(l.keys, c.name)
	}
}

// list returns all items of a kind in the order of their creation.
func (l *ledger) list(k kind) []*entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.items[k]
}

// lookup returns the items of a key that are old enough to be seen.
func (l *ledger) lookup(name keyName) []*entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	items := l.byKey[name]
	for n := len(items); n > 0; n-- {
		if l.now().Sub(items[n-1].At) >= l.faults.lookupLag() {
			return items[:n]
		}
	}
	return nil
}
