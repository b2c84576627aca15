package pgtest

import "syscall"

const (
	memoryFolder   = "/dev/shm"
	memoryBytesMin = 2 << 30
)

// memory returns a folder that is in memory, or "" if there is none with room for several servers.
// The server for the tests of storage/postgres needs 300 MB; a container's folder often has 64 MB.
func memory() string {
	var stat syscall.Statfs_t
	if err := syscall.Statfs(memoryFolder, &stat); err != nil || stat.Bavail*uint64(stat.Bsize) < memoryBytesMin {
		return ""
	}
	return memoryFolder
}
