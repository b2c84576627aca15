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

// CrashPoint kills the bank at a place that is chosen beforehand, as a power cut or kill -9 would. It
// goes in by the hooks that every service has: the library knows nothing of it. A nil CrashPoint is
// none, and nothing of it is installed. It is safe for concurrent use.
type CrashPoint struct {
	name   string
	nth    int64
	hits   atomic.Int64
	stderr io.Writer
}

// CrashPointFromEnvironment returns the point that [crashpoint.BankVariable] names, or nil if it is unset. The point's last words,
// one line, go to stderr.
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
	if err != nil || nth < 1 || !slices.Contains(crashpoint.Bank(), name) {
		return nil, fmt.Errorf("%s must be name:n, where n is at least 1 and the name one of %s", crashpoint.BankVariable, strings.Join(crashpoint.Bank(), ", "))
	}
	return &CrashPoint{name: name, nth: nth, stderr: stderr}, nil
}

// String returns the switch's value.
func (p *CrashPoint) String() string { return p.name + ":" + strconv.FormatInt(p.nth, 10) }

// reached counts that the process got to the named point, and does not return where its time has come.
func (p *CrashPoint) reached(name string) {
	if p.name != name || p.hits.Add(1) != p.nth {
		return
	}
	_, _ = fmt.Fprintf(p.stderr, "demo-bank: crash point %s\n", name) // nobody may be listening
	die()
	select {} // the other threads may run on for a moment, this one may not
}
