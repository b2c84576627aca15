// Package testclock is a clock that only its test moves.
package testclock

import (
	"sync/atomic"
	"time"
)

// Clock is for concurrent use.
type Clock struct{ ns atomic.Int64 }

// New returns a clock that stands at noon of a day in the past.
func New() *Clock {
	c := &Clock{}
	c.ns.Store(time.Date(2025, 7, 1, 12, 0, 0, 0, time.UTC).UnixNano())
	return c
}

// Now returns the clock's time.
func (c *Clock) Now() time.Time { return time.Unix(0, c.ns.Load()) }

// Advance moves the clock.
func (c *Clock) Advance(d time.Duration) { c.ns.Add(int64(d)) }
