//go:build !linux

package boltintent

import "os"

// holder is for Linux: other systems do not report the holder of a file.
func holder(*os.File) (pid int, name string) { return 0, "" }
