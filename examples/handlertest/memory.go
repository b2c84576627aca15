package main

import (
	"context"
	"sync"
)

// memoryBooks are books for a unit test. As in postgresBooks the money moves first, but here
// nothing undoes that.
type memoryBooks struct {
	mu        sync.Mutex
	balances  map[string]int64
	transfers int // number of calls of transfer
}

func (b *memoryBooks) transfer(_ context.Context, from, to string, amount int64) (balance int64, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.transfers++
	b.balances[to] += amount
	b.balances[from] -= amount
	if b.balances[from] < 0 {
		err = errNoMoney
	}
	return b.balances[from], err
}
