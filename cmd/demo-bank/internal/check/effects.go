package check

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/paidonce/idempotency"
)

// The names of the checks of [Outside.Judge].
const (
	PostedOnce       = "posted once"
	RefusalsTookNone = "refusals took nothing"
	ToldIsTrue       = "told is true"
	NotExecutedHolds = "not-executed holds"
	NothingHeld      = "nothing held"
	OpenExplained    = "open explained"
	MailsOnce        = "mails at most once"
	EffectsKnown     = "effects known"
	OneInput         = "one input"
)

// Outside is the state that requests with calls to the processor left behind, once they have
// settled: in the books and tables of the bank, and at the processor.
type Outside struct {
	Postings []Posting        // of the bank
	Effects  []RecordedEffect // the bank's rows of calls and phases
	Open     []OpenRequest
	Answers  map[Key]int // status of the recorded answer
	Held     int64       // money that the bank holds for payouts

	// Of the processor.
	Charges, Refunds, Payouts, Mails []Item

	// Inputs are the different bodies that the processor was sent under a key.
	Inputs map[string][]string
}

// Posting is the bank's row of a top-up, a payout or a receipt.
type Posting struct {
	Kind   PostingKind
	Key    Key
	ID     string // the bank's
	Item   string // id of the processor's charge or payout
	Amount int64
	Sent   string // of a receipt: yes or maybe
}

// PostingKind is the kind of a posting.
type PostingKind string

// The kinds of postings.
const (
	TopUp   PostingKind = "topup"
	Payout  PostingKind = "payout"
	Receipt PostingKind = "receipt"
)

// RecordedEffect is the bank's row of a call to the processor, or of a phase.
type RecordedEffect struct {
	Key        Key
	Name       string
	Kind       idempotency.EffectKind
	State      idempotency.EffectState
	DerivedKey string
}

// OpenRequest is the bank's row of a request that has no answer yet.
type OpenRequest struct {
	Key       Key
	Parked    string // why only a person can end it
	Explained string // the fault of the run that explains this; empty if there was none
	Holds     int64  // the most that the bank may hold for it
}

// Item is a charge, a refund, a payout or a mail at the processor.
type Item struct {
	ID, Key string
	Of      string // of a refund: the charge; of a mail: the address
	Amount  int64
}

// MailOf returns the address to which a receipt under this key is sent. It tells the mails of
// different keys apart.
func MailOf(key Key) string { return key.Key + "@" + key.Scope + ".example" }

// Judge compares the state with the history of the requests that call the processor, once every
// fault has ended and everything has settled. It returns all of its checks.
func (o *Outside) Judge(ops []Operation, expected []Expectation) []Result {
	x := o.index()
	gs := groups(ops)
	return []Result{
		x.postedOnce(), x.refusalsTookNone(), x.toldIsTrue(gs), x.notExecutedHolds(gs, expected), x.nothingHeld(),
		x.openExplained(), x.mailsOnce(), x.effectsKnown(), x.oneInput(),
	}
}

// index has what several checks need.
type index struct {
	*Outside
	postings map[Key][]Posting
	refunded map[string]bool // ids of charges
	owner    map[string]Key  // by derived key
	effects  map[Key][]RecordedEffect
	open     map[Key]bool
	sides    [2]side
}

// side pairs the items that move money with the kind of their postings.
type side struct {
	name  string
	kind  PostingKind
	items []Item
}

func (o *Outside) index() *index {
	x := &index{
		Outside: o, postings: map[Key][]Posting{}, refunded: map[string]bool{}, owner: map[string]Key{},
		effects: map[Key][]RecordedEffect{}, open: map[Key]bool{},
		sides: [2]side{{"charge", TopUp, o.Charges}, {"payout", Payout, o.Payouts}},
	}
	for _, p := range o.Postings {
		x.postings[p.Key] = append(x.postings[p.Key], p)
	}
	for _, r := range o.Refunds {
		x.refunded[r.Of] = true
	}
	for _, e := range o.Effects {
		x.effects[e.Key] = append(x.effects[e.Key], e)
		if e.Kind != idempotency.EffectPhase {
			x.owner[e.DerivedKey] = e.Key
		}
	}
	for _, r := range o.Open {
		x.open[r.Key] = true
	}
	return x
}

// postedOnce is [PostedOnce]. A request that is open has no posting yet.
func (x *index) postedOnce() Result {
	r := effectsResult(PostedOnce)
	for _, side := range x.sides {
		byID, perKey := map[string]Item{}, map[string]int{}
		for _, item := range side.items {
			r.Seen++
			byID[item.ID] = item
			if perKey[item.Key]++; perKey[item.Key] == 2 {
				r.add("%s: there are two %ss under the key %s", x.owner[item.Key], side.name, item.Key)
			}
			key, known := x.owner[item.Key]
			if !known || x.open[key] || x.refunded[item.ID] {
				continue // other checks judge those
			}
			n := 0
			for _, p := range x.postings[key] {
				if p.Item != item.ID {
					continue
				}
				n++
				if p.Amount != item.Amount {
					r.add("%s: %s %s is %d, and %d was posted", key, side.name, item.ID, item.Amount, p.Amount)
				}
			}
			if n != 1 {
				r.add("%s: %s %s of %d has %d postings", key, side.name, item.ID, item.Amount, n)
			}
		}
		for key, postings := range sorted(x.postings) {
			n := 0
			for _, p := range postings {
				if p.Kind != side.kind {
					continue
				}
				r.Seen++
				n++
				item, found := byID[p.Item]
				switch {
				case n == 2:
					r.add("%s: there are two postings of the kind %s", key, p.Kind)
				case !found:
					r.add("%s: %s %s was posted, and the processor has no %s %q", key, p.Kind, p.ID, side.name, p.Item)
				case x.refunded[p.Item]:
					r.add("%s: %s %s was posted, and its %s was refunded", key, p.Kind, p.ID, side.name)
				case x.owner[item.Key] != key:
					r.add("%s: %s %s was posted for a %s under another key", key, p.Kind, p.ID, side.name)
				}
			}
		}
	}
	return r
}

// refusalsTookNone is [RefusalsTookNone].
func (x *index) refusalsTookNone() Result {
	r := effectsResult(RefusalsTookNone)
	for _, status := range x.Answers {
		if !success(status) {
			r.Seen++
		}
	}
	for _, side := range x.sides {
		for _, item := range side.items {
			key, known := x.owner[item.Key]
			if !known || x.open[key] || x.refunded[item.ID] {
				continue
			}
			switch status, answered := x.Answers[key]; {
			case !answered:
				r.add("%s: there is no answer, and the processor has %s %s", key, side.name, item.ID)
			case !success(status):
				r.add("%s: was refused with %d, and the processor has %s %s", key, status, side.name, item.ID)
			}
		}
	}
	return r
}

// toldIsTrue is [ToldIsTrue].
func (x *index) toldIsTrue(gs []group) Result {
	r := effectsResult(ToldIsTrue)
	for i := range gs {
		g := &gs[i]
		seen := map[int]bool{}
		for _, op := range g.ops {
			if !op.acknowledged() || seen[op.Status] {
				continue
			}
			seen[op.Status] = true
			r.Seen++
			status, answered := x.Answers[g.key]
			switch posted := x.postings[g.key]; {
			case !answered || status != op.Status:
				r.add("told %d, and the record has %d (0: there is none): %s", op.Status, status, g)
			case op.paid() && !slices.ContainsFunc(posted, func(p Posting) bool { return p.ID == op.ID }):
				r.add("told that %s was posted, and it was not: %s", op.ID, g)
			case !op.paid() && len(posted) > 0:
				r.add("refused with %d, and posted: %s", op.Status, g)
			}
		}
	}
	return r
}

// notExecutedHolds is [NotExecutedHolds]. A not-executed reply may come without a look at the
// table, and then it is only about its own request. So only a client that got no other reply may
// rely on it.
func (x *index) notExecutedHolds(gs []group, expected []Expectation) Result {
	r := effectsResult(NotExecutedHolds)
	wanted := expectations(expected)
	for i := range gs {
		g := &gs[i]
		r.Seen++
		other := slices.ContainsFunc(g.ops, func(op *Operation) bool { return op.outcome() != idempotency.OutcomeNotExecuted })
		if other && !wanted[g.key].GivenUp {
			continue
		}
		_, answered := x.Answers[g.key]
		switch {
		case len(x.effects[g.key]) > 0:
			r.add("told nothing but not-executed, and there is the effect %s: %s", x.effects[g.key][0].Name, g)
		case x.open[g.key] || answered || len(x.postings[g.key]) > 0:
			r.add("told nothing but not-executed, and it left something: %s", g)
		}
	}
	return r
}

// nothingHeld is [NothingHeld].
func (x *index) nothingHeld() Result {
	r := effectsResult(NothingHeld)
	r.Seen = 1
	var most int64
	for _, open := range x.Open {
		most += open.Holds
	}
	if x.Held < 0 || x.Held > most {
		r.add("%d is held, and at most %d may be, for what is left to a person", x.Held, most)
	}
	return r
}

// openExplained is [OpenExplained].
func (x *index) openExplained() Result {
	r := effectsResult(OpenExplained)
	r.Seen = len(x.Answers) + len(x.Open)
	for _, open := range x.Open {
		switch {
		case open.Parked == "":
			r.add("%s: is still open", open.Key)
		case open.Explained == "":
			r.add("%s: was left to a person, and no fault explains it: %s", open.Key, open.Parked)
		}
	}
	return r
}

// mailsOnce is [MailsOnce].
func (x *index) mailsOnce() Result {
	r := effectsResult(MailsOnce)
	mails := map[string]int{}
	for _, mail := range x.Mails {
		r.Seen++
		if mails[mail.Of]++; mails[mail.Of] == 2 {
			r.add("%s got two mails", mail.Of)
		}
	}
	for key, postings := range sorted(x.postings) {
		receipts := 0
		for _, p := range postings {
			if p.Kind != Receipt {
				continue
			}
			r.Seen++
			if receipts++; receipts == 2 {
				r.add("%s: there are two receipts", key)
			}
			if p.Sent == "yes" && mails[MailOf(key)] == 0 {
				r.add("%s: receipt %s says that a mail was sent, and none was", key, p.ID)
			}
		}
	}
	return r
}

// effectsKnown is [EffectsKnown].
func (x *index) effectsKnown() Result {
	r := effectsResult(EffectsKnown)
	there := map[string]string{} // the item by its derived key, or the mail by its address
	for _, list := range []struct {
		name  string
		items []Item
	}{{"charge", x.Charges}, {"payout", x.Payouts}, {"refund", x.Refunds}} {
		for _, item := range list.items {
			r.Seen++
			there[item.Key] = list.name + " " + item.ID
			if _, known := x.owner[item.Key]; !known {
				r.add("the processor has %s %s under the key %q, which the bank does not know", list.name, item.ID, item.Key)
			}
		}
	}
	mails := map[string]string{}
	for _, mail := range x.Mails {
		mails[mail.Of] = "mail " + mail.ID
	}
	known := map[string]bool{}
	for key, effects := range sorted(x.effects) {
		for _, e := range effects {
			item := there[e.DerivedKey]
			if e.Kind == idempotency.EffectAtMostOnce {
				known[MailOf(key)] = true
				item = mails[MailOf(key)]
			}
			switch {
			case e.Kind == idempotency.EffectPhase:
			case e.State == idempotency.EffectDone && item == "":
				r.add("%s: the effect %s is done, and the processor has nothing", key, e.Name)
			case e.State == idempotency.EffectDeclined && item != "":
				r.add("%s: the effect %s is declined, and the processor has %s", key, e.Name, item)
			}
		}
	}
	for address, mail := range sorted(mails) {
		r.Seen++
		if !known[address] {
			r.add("the processor has %s to %s, of which the bank does not know", mail, address)
		}
	}
	return r
}

// oneInput is [OneInput].
func (x *index) oneInput() Result {
	r := effectsResult(OneInput)
	for key, inputs := range sorted(x.Inputs) {
		r.Seen++
		if len(inputs) > 1 {
			r.add("%s: %d inputs were sent under the key %s: %.100q, then %.100q", x.owner[key], len(inputs), key, inputs[0], inputs[1])
		}
	}
	return r
}

// sorted yields a map in the order of its keys' text, so that examples don't change.
func sorted[K comparable, V any](m map[K]V) func(func(K, V) bool) {
	return func(yield func(K, V) bool) {
		for _, k := range slices.SortedFunc(maps.Keys(m), func(a, b K) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) }) {
			if !yield(k, m[k]) {
				return
			}
		}
	}
}

// effectsTitles are the promises of [Outside.Judge].
var effectsTitles = map[string]string{
	PostedOnce:       "each charge and payout has one posting of its amount, and each posting its charge or payout",
	RefusalsTookNone: "no refused request, and none without an answer, has a charge or payout that was not undone",
	ToldIsTrue:       "each answer that a client saw is the recorded one, and each 201 has its posting",
	NotExecutedHolds: "no client all of whose answers were not-executed has an intent",
	NothingHeld:      "no money is held, except for payouts that are left to a person",
	OpenExplained:    "nothing is open but what is left to a person, and a fault explains each of those",
	MailsOnce:        "each receipt is sent once at most, and one that says yes was sent",
	EffectsKnown:     "the bank knows all that the processor did, and the processor all that the bank calls done",
	OneInput:         "each key is sent with one input",
}

func effectsResult(name string) Result {
	return Result{Name: name, Title: effectsTitles[name], Examples: []string{}}
}
