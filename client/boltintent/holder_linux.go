package boltintent

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// holder returns the process that has locked a file, and its name; 0 if it is not known, as for a
// process in another container.
func holder(file *os.File) (pid int, name string) {
	info, err := file.Stat()
	if err != nil {
		return 0, ""
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, ""
	}
	locks, err := os.ReadFile("/proc/locks")
	if err != nil {
		return 0, ""
	}
	inode := ":" + strconv.FormatUint(stat.Ino, 10)
	// "1: FLOCK  ADVISORY  WRITE 4711 08:01:123456 0 EOF"
	for line := range strings.Lines(string(locks)) {
		fields := strings.Fields(line)
		if len(fields) < 6 || fields[1] != "FLOCK" || !strings.HasSuffix(fields[5], inode) {
			continue
		}
		if pid, err := strconv.Atoi(fields[4]); err == nil && has(pid, info) {
			name, _ := os.ReadFile(filepath.Join("/proc", fields[4], "comm")) // it may be gone by now
			return pid, strings.TrimSpace(string(name))
		}
	}
	return 0, ""
}

// has reports whether a process has a file open: two disks may use the same number for two files.
func has(pid int, file os.FileInfo) bool {
	open, err := filepath.Glob(filepath.Join("/proc", strconv.Itoa(pid), "fd", "*"))
	if err != nil {
		return false
	}
	for _, link := range open {
		if info, err := os.Stat(link); err == nil && os.SameFile(info, file) {
			return true
		}
	}
	return false
}
