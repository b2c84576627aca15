package bench

import (
	"fmt"
	"time"
)

// progress describes the run's progress.
func (r *run) progress() string {
	return fmt.Sprintf("%.0f s, seed %d, %s", time.Since(r.started).Seconds(), r.config.Seed, *r.doing.Load())
}
