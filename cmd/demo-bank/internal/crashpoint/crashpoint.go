// Package crashpoint kills the bank at a place that is chosen beforehand, as a power cut or kill -9 would. Nothing of it
// is installed where the environment names no place, and the library knows nothing of it: it goes in by the hooks that
// every service has.
package crashpoint

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
)

// Variable is the environment's switch, such as before_commit:3: the process kills itself when it gets to the named
// point for the third time.
const Variable = "DEMO_BANK_CRASH_POINT"

// The points, in the order in which a transfer gets to them. All but the last, which is the
// reaper's, count keyed transfers alone.
const (
	afterBody    = "after_body"    // body and headers are read, nothing was asked of the database
	afterBegin   = "after_begin"   // the key is claimed, nothing of the handler ran
	midHandler   = "mid_handler"   // the accounts are locked, nothing is written
	afterHandler = "after_handler" // everything is written but the record
	beforeCommit = "before_commit" // the answer is about to be recorded, and COMMIT sent with it
	afterCommit  = "after_commit"  // COMMIT returned, and the client has heard nothing
	halfResponse = "half_response" // half of a 201's body is with the client
	resolving    = "resolving"     // the connection that looks for a lost COMMIT is made, and nothing was asked on it
	reaperBatch  = "reaper_batch"  // the reaper's DELETE is sent, and its end not awaited
)

// Names returns the names of all points.
func Names() []string {
	return []string{
		afterBody, afterBegin, midHandler, afterHandler, beforeCommit, afterCommit, halfResponse, resolving, reaperBatch,
	}
}

// Point is one switched on. A nil Point is none, and must not be asked to install itself. It is safe for concurrent use.
type Point struct {
	name   string
	nth    int64
	hits   atomic.Int64
	stderr io.Writer
}

// FromEnvironment returns the point that [Variable] names, or nil where it is unset. The point's last words, one line,
// go to stderr.
func FromEnvironment(stderr io.Writer) (*Point, error) {
	value, set := os.LookupEnv(Variable)
	if !set {
		return nil, nil
	}
	return parse(value, stderr)
}

func parse(value string, stderr io.Writer) (*Point, error) {
	name, count, _ := strings.Cut(value, ":")
	nth, err := strconv.ParseInt(count, 10, 64)
	if err != nil || nth < 1 || !slices.Contains(Names(), name) {
		return nil, fmt.Errorf("%s must be name:n, where n is at least 1 and the name one of %s", Variable, strings.Join(Names(), ", "))
	}
	return &Point{name: name, nth: nth, stderr: stderr}, nil
}

// String returns the switch's value.
func (p *Point) String() string { return p.name + ":" + strconv.FormatInt(p.nth, 10) }

// reached counts that the process got to the named point, and does not return where its time has come.
func (p *Point) reached(name string) {
	if p.name != name || p.hits.Add(1) != p.nth {
		return
	}
	_, _ = fmt.Fprintf(p.stderr, "demo-bank: crash point %s\n", name) // nobody may be listening
	die()
	select {} // the other threads may run on for a moment, this one may not
}
