package server

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/paidonce/idempotency/internal/crashpoint"
)

// CrashPoint kills the bank at a chosen place, like a power cut or kill -9. It uses the hooks that
// every service has: the library knows nothing about it. A nil CrashPoint installs nothing. It is
// safe for concurrent use.
type CrashPoint struct {
	name   string
	nth    int64
	hits   atomic.Int64
	stderr io.Writer
}

// CrashPointFromEnvironment returns the point in [crashpoint.BankVariable], or nil if that is
// unset. Before the point kills the process, it writes one line to stderr.
func CrashPointFromEnvironment(stderr io.Writer) (*CrashPoint, error) {
	value, set := os.LookupEnv(crashpoint.BankVariable)
	if !set {
		return nil, nil
	}
	return parseCrashPoint(value, stderr)
}

func parseCrashPoint(value string, stderr io.Writer) (*CrashPoint, error) {
	name, count, _ := strings.Cut(value, ":")
	nth, err := strconv.ParseInt(count, 10, 64)
	names := append(crashpoint.Bank(), crashpoint.BankCalls()...)
	if err != nil || nth < 1 || !slices.Contains(names, name) {
		return nil, fmt.Errorf("%s must be name:n, where n is at least 1 and the name one of %s", crashpoint.BankVariable, strings.Join(names, ", "))
	}
	return &CrashPoint{name: name, nth: nth, stderr: stderr}, nil
}

// String returns the point as name:n, the value of the variable.
func (p *CrashPoint) String() string { return p.name + ":" + strconv.FormatInt(p.nth, 10) }

// reached counts a visit to the named point. It does not return if this is the visit that must kill
// the process.
func (p *CrashPoint) reached(name string) {
	if p.name != name || p.hits.Add(1) != p.nth {
		return
	}
	_, _ = fmt.Fprintf(p.stderr, "demo-bank: crash point %s\n", name) // stderr may be closed
	die()
	select {} // other threads may run for a moment, this one must not
}
