package idempotency

// Running returns the number of keys with running handlers in the engine's memory.
func Running(e *Engine) int {
	e.family.running.mu.Lock()
	defer e.family.running.mu.Unlock()
	return len(e.family.running.byKey)
}
