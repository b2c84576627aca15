// Package bench measures the cost of idempotency: the same transfer over real HTTP and PostgreSQL,
// without idempotency, with ours, and with the designs of others, in one run and in random order,
// so that they can be compared.
//
//   - [Run] is one run; [Serve] is the serving process, separate from the process with the clients
//   - designs.go lists the designs and their comparisons; transfer.go is the transfer, rivals.go
//     the other designs, stand.go the routes
//   - cluster.go is the PostgreSQL, keys.go fills its tables
//   - client.go sends requests, measure.go measures one slice, run.go puts the slices in order
//   - wait.go and expiry.go measure duplicates of a running request, and the cost of expiry
//   - messages.go measures messages that are consumed one by one and in batches
//   - stats.go, report.go and plot.go report the results
package bench

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/paidonce/idempotency/cmd/internal/terminal"
)

// Limits of [Config].
const (
	ClientsMax     = 256
	KeysMax        = 50_000_000       // 20 GB
	DelayMin       = time.Millisecond // a shorter sleep takes as long as this
	DelayMax       = 100 * time.Millisecond
	RoundsMin      = 3 // fewer have no quartiles
	RoundsMax      = 1000
	SliceMin       = 20 * time.Millisecond
	SliceMax       = time.Minute
	DurationMaxMin = 10 * time.Second
	DurationMaxMax = 12 * time.Hour

	settingsMax = 8 // of one kind
)

// Defaults of [Config], normal and quick.
const (
	RoundsDefault      = 9
	RoundsQuick        = 5
	SliceDefault       = 500 * time.Millisecond
	SliceQuick         = 100 * time.Millisecond
	DurationMaxDefault = 20 * time.Minute
	DurationMaxQuick   = 4 * time.Minute
	ExpiredDefault     = 1_000_000
	ExpiredQuick       = 50_000
)

// The parts of a run.
const (
	// All designs, at each number of clients, with fsync and without.
	PartDesigns = "designs"
	// All designs, at the fewest and the most clients, with a slow network to PostgreSQL.
	PartDelay = "delay"
	// A full table against an empty one, at the most clients.
	PartKeys = "keys"
	// Duplicates of one request that takes long.
	PartWait = "wait"
	// The cost of deleting expired records.
	PartExpiry = "expiry"
	// The designs that consume messages, with 1 partition and with several.
	PartMessages = "messages"
)

// Parts returns the names of all parts, in their order.
func Parts() []string {
	return []string{PartDesigns, PartDelay, PartKeys, PartWait, PartExpiry, PartMessages}
}

// Config sets the measurements of a run. The zero value of each field is its default.
type Config struct {
	Quick       bool            // other defaults: a run of less than a minute
	Clients     []int           // numbers of concurrent clients
	Fsync       []string        // on, off
	Keys        []int64         // numbers of records in a full table; 0 is skipped
	Delays      []time.Duration // each way, service to PostgreSQL; 0 is skipped
	Designs     []string        // some of [Designs]
	Parts       []string        // some of [Parts]
	Rounds      int             // of each setting; a round has a slice of each design
	Slice       time.Duration   // time for which a design is measured in a round
	PoolSize    int             // maximum of conns; 0 means the number of clients
	Expired     int64           // number of records to expire and delete
	Seed        uint64          // for the order and the requests; 0 draws one
	DurationMax time.Duration   // bounds the whole run

	// Progress gets a line that is overwritten on a terminal, and a line every ten seconds
	// elsewhere. Nil: none.
	Progress io.Writer
	Terminal bool // Progress is a terminal

	waitWindows int // see the constant
}

// full returns the config with every default filled in, except the seed.
func (c *Config) full() Config {
	full := *c
	d := Config{
		Clients: []int{1, 16, 64}, Keys: []int64{0, 1_000_000}, Delays: []time.Duration{time.Millisecond}, Rounds: RoundsDefault,
		Slice: SliceDefault, Expired: ExpiredDefault, DurationMax: DurationMaxDefault, waitWindows: waitWindows,
	}
	if c.Quick {
		d = Config{
			Clients: []int{64}, Keys: []int64{0}, Delays: []time.Duration{0}, Rounds: RoundsQuick,
			Slice: SliceQuick, Expired: ExpiredQuick, DurationMax: DurationMaxQuick, waitWindows: waitWindowsQuick,
		}
	}
	full.Clients = orElse(full.Clients, d.Clients)
	full.Fsync = orElse(full.Fsync, []string{"on", "off"})
	full.Keys = orElse(full.Keys, d.Keys)
	full.Delays = orElse(full.Delays, d.Delays)
	full.Designs = orElse(full.Designs, Designs())
	full.Parts = orElse(full.Parts, Parts())
	full.Rounds = cmp.Or(full.Rounds, d.Rounds)
	full.Slice = cmp.Or(full.Slice, d.Slice)
	full.Expired = cmp.Or(full.Expired, d.Expired)
	full.DurationMax = cmp.Or(full.DurationMax, d.DurationMax)
	full.waitWindows = cmp.Or(full.waitWindows, d.waitWindows)
	return full
}

// orElse returns values, or others if there are none.
func orElse[T any](values, others []T) []T {
	if len(values) == 0 {
		return others
	}
	return values
}

// Validate returns an error if the run is impossible.
func (c *Config) Validate() error {
	full := c.full()
	for _, err := range []error{
		each("--clients", full.Clients, func(n int) bool { return n >= 1 && n <= ClientsMax }, fmt.Sprintf("from 1 to %d", ClientsMax)),
		each("--fsync", full.Fsync, func(s string) bool { return s == "on" || s == "off" }, "on or off"),
		each("--keys", full.Keys, func(n int64) bool { return n >= 0 && n <= KeysMax }, fmt.Sprintf("from 0 to %d", KeysMax)),
		each("--delay", full.Delays, func(d time.Duration) bool { return d == 0 || d >= DelayMin && d <= DelayMax }, fmt.Sprintf("0s, or from %v to %v", DelayMin, DelayMax)),
		each("--designs", full.Designs, func(s string) bool { return slices.Contains(Designs(), s) }, fmt.Sprintf("of %v", Designs())),
		each("--parts", full.Parts, func(s string) bool { return slices.Contains(Parts(), s) }, fmt.Sprintf("of %v", Parts())),
	} {
		if err != nil {
			return err
		}
	}
	switch {
	case full.Rounds < RoundsMin || full.Rounds > RoundsMax:
		return fmt.Errorf("--rounds must be from %d to %d", RoundsMin, RoundsMax)
	case full.Slice < SliceMin || full.Slice > SliceMax:
		return fmt.Errorf("--slice must be from %v to %v", SliceMin, SliceMax)
	case full.PoolSize < 0 || full.PoolSize > ClientsMax:
		return fmt.Errorf("--pool-size must be from 1 to %d, or 0 for as many as clients", ClientsMax)
	case full.Expired < 1 || full.Expired > KeysMax:
		return fmt.Errorf("--expired must be from 1 to %d", KeysMax)
	case full.DurationMax < DurationMaxMin || full.DurationMax > DurationMaxMax:
		return fmt.Errorf("--duration-max must be from %v to %v", DurationMaxMin, DurationMaxMax)
	}
	return nil
}

// each returns an error if a value of a list is impossible or repeated.
func each[T comparable](flag string, values []T, good func(T) bool, want string) error {
	if len(values) > max(settingsMax, len(designs)) {
		return fmt.Errorf("%s has too many values", flag)
	}
	for i, value := range values {
		if !good(value) {
			return fmt.Errorf("%s must be %s", flag, want)
		}
		if slices.Contains(values[:i], value) {
			return fmt.Errorf("%s names %v twice", flag, value)
		}
	}
	return nil
}

// errDuration is the cause of a context that ended because the run took longer than allowed.
var errDuration = errors.New("the time of --duration-max was over")

// Run does one run and returns its report. If DurationMax elapses before everything is measured,
// the report has the results so far and names the missing parts. An error means that there is no
// report: something failed, an answer was wrong, the books did not balance, or ctx ended. Nothing
// is left behind.
func Run(ctx context.Context, config Config) (_ *Report, err error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	config = config.full()
	if config.Seed == 0 {
		config.Seed = rand.Uint64()
	}
	r := newRun(config)
	bounded, cancel := context.WithTimeoutCause(ctx, config.DurationMax, errDuration)
	defer cancel()
	endProgress := terminal.ShowProgress(config.Progress, config.Terminal, "bench", r.progress)
	err = errors.Join(r.parts(bounded), r.close())
	endProgress()
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case err != nil && !errors.Is(err, errDuration):
		return nil, err
	}
	return r.report(), nil
}
