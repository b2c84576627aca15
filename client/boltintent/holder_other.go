//go:build !linux

package boltintent

import "os"

// holder returns nothing: only Linux reports the holder of a file.
func holder(*os.File) (pid int, name string) { return 0, "" }
