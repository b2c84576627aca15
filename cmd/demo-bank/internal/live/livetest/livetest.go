// Package livetest reads the page's stream in tests, like the page does.
package livetest

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"iter"
	"slices"
	"strconv"
	"strings"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/live"
)

// Event is one event of the stream.
type Event struct {
	ID   string
	Kind string // snapshot or update
	Data string
}

// Sequence is the number of the event in its process, or -1.
func (e Event) Sequence() int64 {
	_, text, _ := strings.Cut(e.ID, "-")
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return -1
	}
	return n
}

// Frame reads the event's data.
func (e Event) Frame() (live.Frame, error) {
	var f live.Frame
	if err := json.Unmarshal([]byte(e.Data), &f); err != nil {
		return f, fmt.Errorf("event %s: %w", e.ID, err)
	}
	return f, nil
}

// Events reads a stream to its end. It skips comments and the like. Its last error is the reader's,
// if any.
func Events(r io.Reader) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		lines := bufio.NewScanner(r)
		lines.Buffer(nil, 1<<20)
		var e Event
		for lines.Scan() {
			line := lines.Text()
			name, value, _ := strings.Cut(line, ": ")
			switch {
			case name == "id":
				e.ID = value
			case name == "event":
				e.Kind = value
			case name == "data":
				e.Data = value
			case line == "":
				if e.Kind != "" && !yield(e, nil) {
					return
				}
				e = Event{}
			}
		}
		if err := lines.Err(); err != nil {
			yield(e, err)
		}
	}
}

// State is the sum of a stream's events. It follows the same rule as the page's stream.js.
type State struct {
	Epoch  string
	AtMS   int64
	Storm  *live.Storm
	Counts [2]live.Counts
	Bars   []live.Bar
	Lanes  []live.Lane // by side, and then by id
	Proof  *live.Proof
	TopUp  *live.TopUp

	Statements *live.Statements

	limits live.Limits
}

// Apply applies an event.
func (s *State) Apply(e Event) error {
	f, err := e.Frame()
	if err != nil {
		return err
	}
	if e.Kind == "snapshot" {
		*s = State{Epoch: f.Epoch, limits: *f.Limits}
	}
	s.AtMS = f.AtMS
	if f.Reset {
		s.Lanes = nil
	}
	if f.Storm != nil {
		s.Storm = f.Storm
	}
	if f.Counts != nil {
		s.Counts = *f.Counts
	}
	if f.Proof != nil {
		s.Proof = f.Proof
	}
	if f.TopUp != nil {
		s.TopUp = f.TopUp
	}
	if f.Statements != nil {
		s.Statements = f.Statements
	}
	for _, bar := range f.Bars {
		s.Bars = append(slices.DeleteFunc(s.Bars, func(b live.Bar) bool { return b.Second == bar.Second }), bar)
	}
	slices.SortFunc(s.Bars, func(a, b live.Bar) int { return int(a.Second - b.Second) })
	s.Bars = s.Bars[max(0, len(s.Bars)-s.limits.BarsMax):]
	for _, lane := range f.Lanes {
		s.Lanes = append(slices.DeleteFunc(s.Lanes, func(l live.Lane) bool { return l.ID == lane.ID }), lane)
	}
	var kept []live.Lane
	for _, side := range []live.Side{live.Protected, live.Unprotected} {
		lanes := slices.DeleteFunc(slices.Clone(s.Lanes), func(l live.Lane) bool { return l.Side != side })
		slices.SortFunc(lanes, func(a, b live.Lane) int { return int(a.ID - b.ID) })
		kept = append(kept, lanes[max(0, len(lanes)-s.limits.LanesMax):]...)
	}
	s.Lanes = kept
	return nil
}

// Twin returns one side's twin of the last proof, or nil.
func (s *State) Twin(side live.Side) *live.Twin {
	if s.Proof == nil {
		return nil
	}
	for i := range s.Proof.Twins {
		if s.Proof.Twins[i].Side == side {
			return &s.Proof.Twins[i]
		}
	}
	return nil
}
