package chaos

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/check"
)

const (
	accounts    = 1000 // acct-0000 to acct-0999, which a new bank has
	hotAccounts = 5    // the first ones; many transfers share them
	lockedRows  = 100  // accounts that another session locks at once
	amountMax   = 50   // small, so that no account runs dry
)

// tenants are the scopes, each with the Authorization header of its callers.
var tenants = [...]struct{ scope, authorization string }{
	{"public", ""}, {"acme", "Bearer demo-acme"}, {"globex", "Bearer demo-globex"},
}

// asked is the kind of a key's request.
type asked uint8

const (
	askTransfer asked = iota
	askDeclined       // a transfer from an account that does not exist: 404 each time
	askOrder
	askAccount
	askReused // a transfer under a key that already has an expired record
	askTopUp
	askPayout
	askReceipt
)

// calls reports whether the request calls the processor.
func (a asked) calls() bool { return a == askTopUp || a == askPayout || a == askReceipt }

// key is one thing that should happen once. The seed chooses its request and the number of its
// copies; its text is new each run.
type key struct {
	index  int
	text   string
	tenant uint8
	asks   asked

	// The copies of its request.
	together int  // sent at once
	after    int  // sent after the answer
	later    int  // sent seconds after that
	changed  bool // another body is sent under the key too
	hot      bool // it uses an account that many transfers share

	from, to string // of a request that calls the processor: the account, and the card or IBAN
	amount   int64
	refused  bool // a good bank refuses it
	triesMax int  // for each copy; then its client gives up waiting. 0: no limit
	async    bool // it is sent with Prefer: respond-async
	scripted bool // a script uses it: its client never gives it up

	mu       sync.Mutex
	inFlight int
	// Some request got no reply, or another one than not-executed: it may have been executed.
	tainted bool
	settled bool                         // the key has its answer
	givenUp bool                         // no client sends it any more
	exempt  bool                         // a fault that can make the outcome unknown hit its COMMIT
	hangUps map[*lane]context.CancelFunc // of the requests that wait for an answer
	parked  bool                         // a bank said that it waits for a person
	status  string                       // path of its status resource, if a bank sent one
}

// path returns the path of its request.
func (k *key) path() string {
	switch k.asks {
	case askOrder:
		return "/v1/orders"
	case askAccount:
		return "/v1/accounts"
	case askTopUp:
		return "/v1/topups"
	case askPayout:
		return "/v1/payouts"
	case askReceipt:
		return "/v1/receipts"
	}
	return "/v1/transfers"
}

// body returns the body of its request: its own, or a changed one.
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
	switch k.asks {
	case askTopUp:
		return fmt.Appendf(nil, `{"account":%q,"card":%q,"amount":%d}`, k.from, k.to, amount)
	case askPayout:
		return fmt.Appendf(nil, `{"account":%q,"iban":%q,"amount":%d}`, k.from, k.to, amount)
	case askReceipt:
		to := k.to
		if changed {
			to += "x"
		}
		return fmt.Appendf(nil, `{"transfer":%q,"to":%q}`, k.from, to)
	}
	return fmt.Appendf(nil, `{"from":%q,"to":%q,"amount":%d,"currency":"EUR","reference":"chaos"}`, k.from, k.to, amount)
}

// begin counts a request that is about to be sent. It returns false if the key was given up.
func (k *key) begin() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.givenUp {
		return false
	}
	k.inFlight++
	return true
}

// end records a request's result, and reports whether it is the key's first answer.
func (k *key) end(what result) (first bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.inFlight--
	switch what {
	case resultUnsent, resultNotExecuted:
	case resultAnswered:
		first = !k.settled
		k.settled, k.tainted = true, true
	default:
		k.tainted = true
	}
	return first
}

// waits registers the function that hangs up a lane's request that waits for an answer. A nil
// hangUp removes it.
func (k *key) waits(l *lane, hangUp context.CancelFunc) {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case hangUp == nil && len(k.hangUps) == 1: // so that a million keys keep no map
		k.hangUps = nil
	case hangUp == nil:
		delete(k.hangUps, l)
	case k.hangUps == nil:
		k.hangUps = map[*lane]context.CancelFunc{l: hangUp}
	default:
		k.hangUps[l] = hangUp
	}
}

// giveUp gives the key up if that is allowed: every request that was ever sent for it was answered,
// each with not-executed. After that no client sends it.
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

// open reports whether the key has no answer yet and was not given up.
func (k *key) open() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return !k.givenUp && !k.settled
}

// park notes that a bank left the key to a person.
func (k *key) park() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.parked = true
}

// waiting reports whether the key is left to a person.
func (k *key) waiting() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.parked
}

// named returns the index in the key's text. If the key shares the text of another tenant's key, it
// is that key's index.
func (k *key) named() int {
	n, _ := strconv.Atoi(k.text[len(k.text)-indexDigits:]) // draw wrote it
	return n
}

// result is a client's interpretation of a reply.
type result uint8

const (
	resultUnsent      result = iota // nothing left the client
	resultAnswered                  // done
	resultMismatch                  // done, for a changed body
	resultNotExecuted               // retry, or give up
	resultAgain                     // in progress, unknown, or a record about to be deleted: retry
	resultLost                      // no reply: retry
	resultParked                    // it waits for a person
)

// ring holds all keys of a run, in order. It is safe for concurrent use.
type ring struct {
	seed   uint64
	shares shares
	prefix []byte // of every key's text
	names  []string

	mu       sync.RWMutex
	keys     []*key
	transfer string // that receipts are for
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

// draw makes the key of an index, from only the seed and the index.
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
	if choice.IntN(2) == 0 { // otherwise the hot accounts would run dry
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
		k.together = max(2, k.together) // two check if the expired record is gone
	default:
		k.asks = r.shares.call(n - r.shares.order - r.shares.account - r.shares.reused)
	}
	k.after = choice.IntN(2)
	if thousandth(250) {
		k.later = 1
	}
	k.changed = thousandth(r.shares.changed)
	if k.asks.calls() {
		r.drawCall(k, choice)
	}
	return k
}

// call returns the kind of a request that calls the processor, or that of a transfer.
func (s shares) call(n int) asked {
	for _, one := range []struct {
		share int
		asked
	}{{s.topUp, askTopUp}, {s.payout, askPayout}, {s.receipt, askReceipt}} {
		if n -= one.share; n < 0 {
			return one.asked
		}
	}
	return askTransfer
}

// drawCall chooses the parameters of a request that calls the processor. Its card, IBAN or address
// names the key, so that the gateway can tell the calls apart.
func (r *ring) drawCall(k *key, choice *rand.Rand) {
	k.hot = true // all of them share an account of the bank
	switch n := choice.IntN(100); {
	case k.asks == askReceipt:
		k.from, k.to, k.amount = r.transfer, check.MailOf(check.Key{Scope: tenants[k.tenant].scope, Key: k.text}), 0
	case n < 4:
		k.from, k.refused = "acct-none", true
		k.to = k.text
	case n < 14:
		k.to, k.refused = k.text+"-0002", true // the processor declines what ends in 0002
	case n < 18 && k.asks == askPayout:
		k.to, k.amount, k.refused = k.text, 1_000_000_000, true
	default:
		k.to = k.text + "-1"
	}
	if choice.IntN(1000) < r.shares.leave {
		k.triesMax = 1 + choice.IntN(3)
	}
	k.async = choice.IntN(1000) < r.shares.async
}

// script adds a key that a script sends.
func (r *ring) script(asks asked, card string) *key {
	r.mu.Lock()
	defer r.mu.Unlock()
	k := &key{index: len(r.keys), tenant: 1, asks: asks, together: 1, hot: true, scripted: true, from: r.names[len(r.keys)%accounts], amount: 10}
	k.text = fmt.Sprintf("%s%0*d", r.prefix, indexDigits, k.index)
	k.to = k.text + card
	if asks == askReceipt {
		k.from, k.to, k.amount = r.transfer, check.MailOf(check.Key{Scope: tenants[k.tenant].scope, Key: k.text}), 0
	}
	r.keys = append(r.keys, k)
	return k
}

// all returns the keys so far.
func (r *ring) all() []*key {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.keys[:len(r.keys):len(r.keys)]
}

// find returns the key that has its text in the messages from a bank to PostgreSQL, or nil. If keys
// of two tenants share the text, it returns the first.
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

// ofText returns the keys that share the text of k, the first with this text: k, and maybe another
// tenant's.
func (r *ring) ofText(k *key) []*key {
	r.mu.RLock()
	defer r.mu.RUnlock()
	same := r.keys[k.index:min(k.index+2, len(r.keys))]
	if len(same) == 2 && same[1].text != k.text {
		same = same[:1]
	}
	return same
}

// markExempt records that a fault that can make the outcome unknown hit the key's COMMIT.
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
