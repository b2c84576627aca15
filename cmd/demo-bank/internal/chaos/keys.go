package chaos

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync"
)

const (
	accounts    = 1000 // acct-0000 to acct-0999, which the bank opens with
	hotAccounts = 5    // the first ones, which many transfers meet at
	lockedRows  = 100  // accounts that somebody else holds at once
	amountMax   = 50   // small, so that no account runs dry
)

// tenant is a scope, and how a caller says that it is it.
var tenants = [...]struct{ scope, authorization string }{
	{"public", ""}, {"acme", "Bearer demo-acme"}, {"globex", "Bearer demo-globex"},
}

// asked is what a key's request asks for.
type asked uint8

const (
	askTransfer asked = iota
	askDeclined       // a transfer from an account that is not there: 404 each time
	askOrder
	askAccount
	askReused // a transfer whose key has an expired record already
)

// key is one thing that should happen once. What it asks and how often is the seed's choice; its text is new each run.
type key struct {
	index  int
	text   string
	tenant uint8
	asks   asked

	// Of its copies.
	together int  // sent at once
	after    int  // sent when there is an answer
	later    int  // sent seconds after that
	changed  bool // another body is sent under the key too
	hot      bool // it takes part in what many meet at

	from, to string
	amount   int64

	mu       sync.Mutex
	inFlight int
	tainted  bool                         // something else than not-executed was answered, or nothing: it may have been executed
	settled  bool                         // it has its answer
	givenUp  bool                         // nobody sends it any more
	exempt   bool                         // a fault that leaves an unknown behind hit its COMMIT
	hangUps  map[*lane]context.CancelFunc // of the requests that wait for an answer
}

// path is where its request goes.
func (k *key) path() string {
	switch k.asks {
	case askOrder:
		return "/v1/orders"
	case askAccount:
		return "/v1/accounts"
	}
	return "/v1/transfers"
}

// body is what its request says: its own, or a changed one.
func (k *key) body(changed bool) []byte {
	amount := k.amount
	if changed {
		amount++
	}
	switch k.asks {
	case askOrder:
		return fmt.Appendf(nil, `{"account":%q,"sku":"coffee","quantity":%d}`, k.from, amount)
	case askAccount:
		return fmt.Appendf(nil, `{"id":"new-%s-%s","currency":"EUR","opening_balance":%d}`, tenants[k.tenant].scope, k.text, amount)
	}
	return fmt.Appendf(nil, `{"from":%q,"to":%q,"amount":%d,"currency":"EUR","reference":"chaos"}`, k.from, k.to, amount)
}

// begin notes a request that is about to be sent. It is false where the key was given up.
func (k *key) begin() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.givenUp {
		return false
	}
	k.inFlight++
	return true
}

// end notes what became of a request.
func (k *key) end(what result) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.inFlight--
	switch what {
	case resultUnsent, resultNotExecuted:
	case resultAnswered:
		k.settled, k.tainted = true, true
	default:
		k.tainted = true
	}
}

// waits notes that a lane's request waits for an answer, and how it is hung up; with nil that it waits no more.
func (k *key) waits(l *lane, hangUp context.CancelFunc) {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case hangUp == nil && len(k.hangUps) == 1: // a million keys keep no map
		k.hangUps = nil
	case hangUp == nil:
		delete(k.hangUps, l)
	case k.hangUps == nil:
		k.hangUps = map[*lane]context.CancelFunc{l: hangUp}
	default:
		k.hangUps[l] = hangUp
	}
}

// giveUp gives the key up where that is allowed: every request that was ever sent for it was answered, and each with
// not-executed. From then on nobody sends it.
func (k *key) giveUp() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.tainted || k.inFlight > 0 {
		return false
	}
	k.givenUp = true
	return true
}

func (k *key) abandoned() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.givenUp
}

// open reports whether the key has no answer yet, and somebody wants one.
func (k *key) open() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return !k.givenUp && !k.settled
}

// named is the index that its text has: that of another tenant's key, where it shares the text.
func (k *key) named() int {
	n, _ := strconv.Atoi(k.text[len(k.text)-indexDigits:]) // draw wrote it
	return n
}

// result is what a client makes of what came back.
type result uint8

const (
	resultUnsent      result = iota // nothing left the client
	resultAnswered                  // done
	resultMismatch                  // done, for a changed body
	resultNotExecuted               // again, or give up
	resultAgain                     // in progress, unknown, or a record that is about to go: again
	resultLost                      // no reply: again
)

// ring holds all keys of a run, in their order. It is safe for concurrent use.
type ring struct {
	seed   uint64
	shares shares
	prefix []byte // of every key's text
	names  []string

	mu   sync.RWMutex
	keys []*key
}

const indexDigits = 8

func newRing(seed uint64, s shares, id string) *ring {
	r := &ring{seed: seed, shares: s, prefix: []byte("chaos-" + id + "-")}
	for i := range accounts {
		r.names = append(r.names, fmt.Sprintf("acct-%04d", i))
	}
	return r
}

// next returns a new key.
func (r *ring) next() *key {
	r.mu.Lock()
	defer r.mu.Unlock()
	k := r.draw(len(r.keys))
	r.keys = append(r.keys, k)
	return k
}

// draw makes the key of an index, from the seed and the index alone.
func (r *ring) draw(index int) *key {
	choice := rand.New(rand.NewPCG(r.seed, uint64(index)))
	thousandth := func(share int) bool { return choice.IntN(1000) < share }
	k := &key{index: index, tenant: uint8(choice.IntN(len(tenants))), together: 1}
	named := index
	if index > 0 && thousandth(r.shares.twin) && index%2 == 1 {
		before := r.keys[index-1]
		named, k.tenant = index-1, (before.tenant+1)%uint8(len(tenants))
	}
	k.text = fmt.Sprintf("%s%0*d", r.prefix, indexDigits, named)

	from := choice.IntN(accounts)
	if thousandth(30) {
		from, k.hot = choice.IntN(hotAccounts), true
	}
	to := (from + 1 + choice.IntN(accounts-1)) % accounts
	if choice.IntN(2) == 0 { // or the hot ones would run dry
		from, to = to, from
	}
	k.from, k.to, k.amount = r.names[from], r.names[to], 1+choice.Int64N(amountMax)
	k.hot = k.hot || from < hotAccounts || to < hotAccounts

	switch n := choice.IntN(100); {
	case n < 28:
		k.together = 2
	case n < 36:
		k.together = 3
	case n < 38:
		k.together = 5
	}
	if r.shares.crowd > 0 && thousandth(r.shares.crowd) {
		k.together = lanesMax
	}
	switch n := choice.IntN(1000) - r.shares.declined; {
	case n < 0:
		k.asks, k.from = askDeclined, "acct-none"
	case n < r.shares.order:
		k.asks, k.to, k.hot, k.amount = askOrder, "", true, 1
	case n < r.shares.order+r.shares.account:
		k.asks, k.from, k.to, k.amount = askAccount, "", "", 1000*k.amount
	case n < r.shares.order+r.shares.account+r.shares.reused:
		k.asks = askReused
		k.together = max(2, k.together) // two ask whether the expired record is gone
	}
	k.after = choice.IntN(2)
	if thousandth(250) {
		k.later = 1
	}
	k.changed = thousandth(r.shares.changed)
	return k
}

// all returns the keys so far.
func (r *ring) all() []*key {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.keys[:len(r.keys):len(r.keys)]
}

// find returns the key whose text is in what a bank sends to PostgreSQL, nil where there is none. Of two tenants' keys
// of one text it is the first.
func (r *ring) find(messages []byte) *key {
	at := bytes.Index(messages, r.prefix)
	if at < 0 || len(messages) < at+len(r.prefix)+indexDigits {
		return nil
	}
	at += len(r.prefix)
	index, err := strconv.Atoi(string(messages[at : at+indexDigits]))
	if err != nil {
		return nil
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	if index < 0 || index >= len(r.keys) {
		return nil
	}
	return r.keys[index]
}

// ofText returns the keys that share a key's text: itself, and maybe another tenant's. It is the first of them.
func (r *ring) ofText(k *key) []*key {
	r.mu.RLock()
	defer r.mu.RUnlock()
	same := r.keys[k.index:min(k.index+2, len(r.keys))]
	if len(same) == 2 && same[1].text != k.text {
		same = same[:1]
	}
	return same
}

// markExempt notes that a fault hit the COMMIT of a key that leaves an unknown behind.
func (r *ring) markExempt(k *key) {
	for _, one := range r.ofText(k) {
		one.mu.Lock()
		one.exempt = true
		one.mu.Unlock()
	}
}

// hangUp hangs up all clients that wait for a key's answer.
func (r *ring) hangUp(k *key) {
	for _, one := range r.ofText(k) {
		one.mu.Lock()
		for _, hangUp := range one.hangUps {
			hangUp()
		}
		one.mu.Unlock()
	}
}
