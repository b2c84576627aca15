package bench

import (
	"fmt"
	"time"
)

// progress says how far the run is.
func (r *run) progress() string {
	return fmt.Sprintf("%.0f s, seed %d, %s", time.Since(r.started).Seconds(), r.config.Seed, *r.doing.Load())
}
