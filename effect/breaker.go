package effect

import "sync"

// breakerUnknownMax is the number of unknown results in a row after which only one call at a time
// is made.
const breakerUnknownMax = 10

// breaker spares a service that gives no results, because after an outage all open requests are due
// at once. It knows only the calls of this process.
type breaker struct {
	mu      sync.Mutex
	unknown int // results in a row
	probing bool
}

type learned uint8

const (
	learnedNothing learned = iota // nothing was sent
	learnedAnswer
	learnedUnknown
)

// enter reports whether a call may be made, and whether it is the probe. If it may, leave must be
// called.
func (b *breaker) enter() (probe, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.unknown < breakerUnknownMax:
		return false, true
	case b.probing:
		return false, false
	}
	b.probing = true
	return true, true
}

func (b *breaker) leave(probe bool, learned learned) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if probe {
		b.probing = false
	}
	switch learned {
	case learnedAnswer:
		b.unknown = 0
	case learnedUnknown:
		b.unknown++
	}
}
