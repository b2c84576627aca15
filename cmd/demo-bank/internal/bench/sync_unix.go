//go:build unix

package bench

import "golang.org/x/sys/unix"

// syncDisks makes the system write its dirty pages.
func syncDisks() { unix.Sync() }
