//go:build unix

package bench

import "golang.org/x/sys/unix"

// syncDisks has the system write what it has not yet.
func syncDisks() { unix.Sync() }
