package client

import (
	"sync"
	"time"
)

// budget bounds the retries of all requests together, so that an outage does not multiply the load.
// Each first attempt adds a share of a retry, time adds RetriesPerSecond, and each retry spends
// one. It is safe for concurrent use.
type budget struct {
	perRequest float64
	perSecond  float64
	most       float64

	mu      sync.Mutex
	balance float64
	at      time.Time
}

// newBudget returns a full budget: a client that has just started may have keys to settle.
func newBudget(percent, perSecond, most int) *budget {
	return &budget{perRequest: float64(percent) / 100, perSecond: float64(perSecond), most: float64(most), balance: float64(most)}
}

// earn is called for each first attempt.
func (b *budget) earn() {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.balance = min(b.most, b.balance+b.perRequest)
}

// spend takes a retry from the budget, and reports whether there was one. A nil budget is
// unbounded.
func (b *budget) spend(now time.Time) bool {
	if b == nil {
		return true
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.at.IsZero() {
		b.balance = min(b.most, b.balance+max(0, now.Sub(b.at).Seconds())*b.perSecond)
	}
	b.at = now
	if b.balance < 1 {
		return false
	}
	b.balance--
	return true
}
