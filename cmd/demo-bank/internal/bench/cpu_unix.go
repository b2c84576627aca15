//go:build unix

package bench

import (
	"syscall"
	"time"
)

// ownCPU is the processor time that this process has taken.
func ownCPU() time.Duration {
	var usage syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &usage) != nil {
		return 0
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}
