package bench

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// clockTick is the unit of /proc/PID/stat: USER_HZ is 100 on every Linux.
const clockTick = 10 * time.Millisecond

// familyCPU returns the processor time of a process and all its children, including those that have
// ended. Living ones are counted to the nanosecond if the kernel keeps schedstat, otherwise by
// ticks.
func familyCPU(parent int) (time.Duration, error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return 0, err
	}
	var sum time.Duration
	found := false
	for _, path := range stats {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended: its parent's time now includes it
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		fields, ok := statFields(text)
		if !ok || pid != parent && fields[1] != strconv.Itoa(parent) {
			continue
		}
		own, ended, err := times(fields)
		if err != nil {
			return 0, err
		}
		if exact, ok := schedstat(pid); ok {
			own = exact
		}
		sum += own
		if pid == parent {
			found = true
			sum += ended
		}
	}
	if !found {
		return 0, fmt.Errorf("process %d is not there", parent)
	}
	return sum, nil
}

// statFields returns the fields after the process's name: state, parent, ... The name may contain
// anything, even spaces and parentheses.
func statFields(text []byte) ([]string, bool) {
	end := bytes.LastIndexByte(text, ')')
	if end < 0 {
		return nil, false
	}
	fields := strings.Fields(string(text[end+1:]))
	return fields, len(fields) > 14
}

// times returns a process's own time, and that of its children that have ended: utime, stime,
// cutime and cstime.
func times(fields []string) (own, ended time.Duration, err error) {
	var ticks [4]int64
	for i := range ticks {
		if ticks[i], err = strconv.ParseInt(fields[11+i], 10, 64); err != nil {
			return 0, 0, fmt.Errorf("read a process's times: %w", err)
		}
	}
	return time.Duration(ticks[0]+ticks[1]) * clockTick, time.Duration(ticks[2]+ticks[3]) * clockTick, nil
}

// schedstat returns the run time of a process with one thread.
func schedstat(pid int) (time.Duration, bool) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/schedstat")
	if err != nil {
		return 0, false
	}
	first, _, _ := strings.Cut(string(text), " ")
	ns, err := strconv.ParseInt(first, 10, 64)
	return time.Duration(ns), err == nil && ns > 0
}
