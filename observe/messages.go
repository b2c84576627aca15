package observe

import (
	"errors"

	"github.com/paidonce/idempotency/consumer"
)

// BatchResult returns the result of a consumer's batch: done, held (another process has the
// partition), fenced (another process was faster, and nothing was written) or failed.
func BatchResult(end *consumer.BatchEnd) string {
	switch {
	case end.Err == nil:
		return "done"
	case errors.Is(end.Err, consumer.ErrHeld):
		return "held"
	case errors.Is(end.Err, consumer.ErrFenced):
		return "fenced"
	}
	return "failed"
}

// BatchOutcomes returns the number of the batch's messages by their outcome: executed, parked,
// dead, mismatch, duplicate, redelivered. Each message is counted once. If the batch failed, only a
// parked message that is dead now is counted: all others come again.
func BatchOutcomes(end *consumer.BatchEnd) map[string]int {
	if end.Err != nil {
		return map[string]int{"executed": end.Executed, "parked": end.Parked, "dead": end.Dead}
	}
	return map[string]int{
		"executed": end.Executed, "parked": end.Parked, "dead": end.Dead - end.Mismatches, "mismatch": end.Mismatches,
		"duplicate": end.Duplicates, "redelivered": end.Redelivered,
	}
}
