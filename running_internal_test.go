package idempotency

// Running returns how many keys have a handler that runs, by the engine's memory.
func Running(e *Engine) int {
	e.family.running.mu.Lock()
	defer e.family.running.mu.Unlock()
	return len(e.family.running.byKey)
}
