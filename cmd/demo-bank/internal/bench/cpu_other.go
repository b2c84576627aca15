//go:build !linux

package bench

import (
	"errors"
	"time"
)

// familyCPU is not known here.
func familyCPU(int) (time.Duration, error) { return 0, errors.ErrUnsupported }
