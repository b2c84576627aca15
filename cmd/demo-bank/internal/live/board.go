package live

import (
	"reflect"
	"sync"
	"time"

	"github.com/paidonce/idempotency"
)

// Limits of the view. Counts include everything; only the newest lanes and bars are kept.
const (
	lanesMax = 48 // per side
	dotsMax  = 16 // per lane, the newest attempts
	barsMax  = 45 // seconds
)

// Side is one half of the page: with the middleware, or without it.
type Side string

// The sides.
const (
	Protected   Side = "protected"
	Unprotected Side = "unprotected"
)

// sides lists the sides in the order of the counts.
var sides = [2]Side{Protected, Unprotected}

func (s Side) index() int {
	if s == Unprotected {
		return 1
	}
	return 0
}

// Dot is the outcome of one attempt, as a letter.
type Dot byte

// The dots. The last two are known only to the client.
const (
	DotExecuted    Dot = 'e'
	DotReplayed    Dot = 'r'
	DotInProgress  Dot = 'p'
	DotMismatch    Dot = 'm'
	DotFailed      Dot = 'f' // no answer shows an execution: refused, rolled back, died
	DotLostReply   Dot = 'l'
	DotLostRequest Dot = 'x'
)

// dotOf returns the dot of an outcome.
func dotOf(outcome idempotency.Outcome) Dot {
	switch outcome {
	case idempotency.OutcomeExecuted:
		return DotExecuted
	case idempotency.OutcomeReplayed:
		return DotReplayed
	case idempotency.OutcomeInProgress:
		return DotInProgress
	case idempotency.OutcomeMismatch:
		return DotMismatch
	}
	return DotFailed
}

// Counts are the attempts of one side since the last storm began, or since the bank started. An
// attempt with a lost reply counts twice: as lost, and as its outcome in the bank, usually
// executed.
type Counts struct {
	Attempts     int64 `json:"attempts"`
	Executed     int64 `json:"executed"`
	Replayed     int64 `json:"replayed"`
	InProgress   int64 `json:"in_progress"`
	Mismatch     int64 `json:"mismatch"`
	Failed       int64 `json:"failed"`
	LostReplies  int64 `json:"lost_replies"`
	LostRequests int64 `json:"lost_requests"`
}

func (c *Counts) add(dot Dot) {
	switch dot {
	case DotExecuted:
		c.Executed++
	case DotReplayed:
		c.Replayed++
	case DotInProgress:
		c.InProgress++
	case DotMismatch:
		c.Mismatch++
	case DotFailed:
		c.Failed++
	case DotLostReply:
		c.LostReplies++
	case DotLostRequest:
		c.LostRequests++
	}
}

// Bar holds the counts of one second.
type Bar struct {
	Second int64     `json:"t"` // Unix time
	Sides  [2]Counts `json:"sides"`
}

// Lane is one key and its attempts.
type Lane struct {
	ID    int64  `json:"id"` // grows with time
	Side  Side   `json:"side"`
	Label string `json:"label"`
	Dots  string `json:"dots"`
	More  int    `json:"more,omitempty"` // earlier attempts, not shown
	Ran   int    `json:"ran"`            // number of executions
}

// Frame is a message to viewers: a snapshot holds everything, an update only the changes since the
// last frame. A field that is present replaces the viewer's. Bars and lanes replace those with the
// same t or id, and the viewer keeps the newest.
type Frame struct {
	Epoch  string     `json:"epoch,omitempty"` // of the process; snapshots only
	AtMS   int64      `json:"at_ms"`
	Reset  bool       `json:"reset,omitempty"` // delete the viewer's lanes
	Storm  *Storm     `json:"storm,omitempty"`
	Counts *[2]Counts `json:"counts,omitempty"` // protected, unprotected
	Bars   []Bar      `json:"bars,omitempty"`
	Lanes  []Lane     `json:"lanes,omitempty"`
	Proof  *Proof     `json:"proof,omitempty"`
	TopUp  *TopUp     `json:"topup,omitempty"`
	Limits *Limits    `json:"limits,omitempty"` // snapshots only

	Statements *Statements `json:"statements,omitempty"`
}

// board holds everything that viewers can see. Its size is limited. It is safe for concurrent use.
type board struct {
	mu     sync.Mutex
	storm  *Storm
	counts [2]Counts
	bars   []Bar // oldest first
	lanes  [2][]*Lane
	byKey  map[string]*Lane
	lastID int64
	proof  *Proof
	topUp  *TopUp

	statements *Statements

	changed change
}

// change lists the changes since the last update.
type change struct {
	any, reset, storm, counts, proof, topUp, statements bool

	barsFrom int64 // first changed second; 0 if none
	lanes    map[*Lane]struct{}
}

func newBoard() *board {
	return &board{byKey: map[string]*Lane{}, changed: change{lanes: map[*Lane]struct{}{}}}
}

// attempt counts an attempt. key identifies its lane and is never shown; label is. answered is the
// outcome in the bank, 0 if unknown. seen is the outcome that its client saw.
func (b *board) attempt(now time.Time, side Side, key, label string, answered, seen Dot) {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := side.index()
	bar := b.bar(now)
	for _, c := range []*Counts{&b.counts[s], &bar.Sides[s]} {
		c.Attempts++
		if answered != 0 {
			c.add(answered)
		}
		if seen != answered {
			c.add(seen)
		}
	}
	lane := b.lane(side, key, label)
	if answered == DotExecuted {
		lane.Ran++
	}
	lane.Dots += string(rune(seen))
	if over := len(lane.Dots) - dotsMax; over > 0 {
		lane.Dots, lane.More = lane.Dots[over:], lane.More+over
	}
	b.changed.any, b.changed.counts = true, true
	b.changed.lanes[lane] = struct{}{}
}

// bar returns the bar of the current second, and marks it as changed.
func (b *board) bar(now time.Time) *Bar {
	second := now.Unix()
	if n := len(b.bars); n > 0 && b.bars[n-1].Second >= second {
		second = b.bars[n-1].Second // a clock that goes back starts no new bar
	} else {
		if n == barsMax {
			b.bars = append(b.bars[:0], b.bars[1:]...)
		}
		b.bars = append(b.bars, Bar{Second: second})
	}
	if b.changed.barsFrom == 0 {
		b.changed.barsFrom = second
	}
	return &b.bars[len(b.bars)-1]
}

// lane returns the lane of a key. It makes a new one if the key has none or its lane was dropped.
func (b *board) lane(side Side, key, label string) *Lane {
	key = string(side) + " " + key
	if lane := b.byKey[key]; lane != nil {
		return lane
	}
	b.lastID++
	lane := &Lane{ID: b.lastID, Side: side, Label: label}
	list := &b.lanes[side.index()]
	if len(*list) == lanesMax {
		oldest := (*list)[0]
		*list = append((*list)[:0], (*list)[1:]...)
		delete(b.changed.lanes, oldest)
		for k, l := range b.byKey { // at most lanesMax per side
			if l == oldest {
				delete(b.byKey, k)
				break
			}
		}
	}
	*list = append(*list, lane)
	b.byKey[key] = lane
	return lane
}

// begin shows a new storm, with no lanes and with counts of zero.
func (b *board) begin(s Storm) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.storm, b.counts, b.lanes, b.byKey = &s, [2]Counts{}, [2][]*Lane{}, map[string]*Lane{}
	clear(b.changed.lanes)
	b.changed.any, b.changed.reset, b.changed.storm, b.changed.counts = true, true, true, true
}

// update changes the current storm.
func (b *board) update(change func(s *Storm)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := *b.storm // viewers may be reading the old one
	change(&s)
	b.storm = &s
	b.changed.any, b.changed.storm = true, true
}

func (b *board) showTopUp(t *TopUp) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.topUp = t
	b.changed.any, b.changed.topUp = true, true
}

// showStatements shows statements unless nothing has changed.
func (b *board) showStatements(s *Statements) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.statements != nil && reflect.DeepEqual(b.statements, s) {
		return
	}
	b.statements = s
	b.changed.any, b.changed.statements = true, true
}

func (b *board) prove(p *Proof) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.proof = p
	b.changed.any, b.changed.proof = true, true
}

// lastProof returns the last proof, or nil.
func (b *board) lastProof() *Proof {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.proof
}

// current returns the storm that runs or ran last in this process, or nil.
func (b *board) current() *Storm {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.storm
}

// snapshot returns everything that viewers can see.
func (b *board) snapshot(now time.Time) *Frame {
	b.mu.Lock()
	defer b.mu.Unlock()
	counts := b.counts
	f := &Frame{AtMS: now.UnixMilli(), Reset: true, Storm: b.storm, Counts: &counts, Bars: append([]Bar(nil), b.bars...), Proof: b.proof, TopUp: b.topUp, Statements: b.statements}
	for _, list := range b.lanes {
		for _, lane := range list {
			f.Lanes = append(f.Lanes, *lane)
		}
	}
	return f
}

// take returns the changes since the last call, or nil if there are none.
func (b *board) take(now time.Time) *Frame {
	b.mu.Lock()
	defer b.mu.Unlock()
	c := &b.changed
	if !c.any {
		return nil
	}
	f := &Frame{AtMS: now.UnixMilli(), Reset: c.reset}
	if c.storm {
		f.Storm = b.storm
	}
	if c.counts {
		counts := b.counts
		f.Counts = &counts
	}
	if c.proof {
		f.Proof = b.proof
	}
	if c.topUp {
		f.TopUp = b.topUp
	}
	if c.statements {
		f.Statements = b.statements
	}
	if c.barsFrom != 0 {
		for _, bar := range b.bars {
			if bar.Second >= c.barsFrom {
				f.Bars = append(f.Bars, bar)
			}
		}
	}
	for _, list := range b.lanes {
		for _, lane := range list {
			if _, ok := c.lanes[lane]; ok {
				f.Lanes = append(f.Lanes, *lane)
			}
		}
	}
	clear(c.lanes)
	*c = change{lanes: c.lanes}
	return f
}
