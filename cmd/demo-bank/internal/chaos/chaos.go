// Package chaos is the proof of the bank: it starts a PostgreSQL, proxies in front of it and bank processes behind them,
// drives load while it kills, crashes, cuts and squeezes them on a schedule that a seed decides, heals what it broke,
// and judges what the clients were told against each other and against the books.
//
//   - [Run] is one run, phase by phase
//   - schedule.go is what is done to whom and when, from the seed alone
//   - cluster.go, banks.go, faults.go, commits.go are what is broken, and how
//   - keys.go, clients.go, send.go are the clients: what they ask, when they ask again, when they give up
//   - watch.go looks on while it runs; settle.go and judge.go come to the verdict; report.go says it
package chaos

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"
)

// Limits of [Config].
const (
	OperationsMin  = 500
	OperationsMax  = 2_000_000 // the money of the accounts that take part lasts for as many
	ClientsMax     = 256
	BanksMax       = 4
	DurationMaxMin = 10 * time.Second
	DurationMaxMax = 12 * time.Hour
)

// Defaults of [Config].
const (
	ProfileDefault = "smoke"
	ClientsDefault = 32
	BanksDefault   = 2
)

// Config says how hard a run is. The zero value of each field is its default.
type Config struct {
	// Profile is one of [Profiles]: how many operations, and how much is broken. The default is [ProfileDefault].
	Profile string

	// Seed decides the schedule and what the clients ask. 0 draws one.
	Seed uint64

	// Operations is how many HTTP requests the clients send before all is healed, at least; settling and the final
	// replay come on top. Faults are scaled with it. The default is the profile's.
	Operations int

	// Clients is how many clients send at once. The default is [ClientsDefault].
	Clients int

	// Banks is how many bank processes share the database. The default is [BanksDefault].
	Banks int

	// DurationMax bounds the whole run; one that takes longer has failed. The default is the profile's.
	DurationMax time.Duration

	// Wait lets the banks' duplicates wait for the answer for a moment before they get 409.
	Wait bool

	// Bank is the program that serves, a demo-bank or a variant of it. The default is this program.
	Bank string

	// Keep leaves the data folder and the logs where they are after a run that failed.
	Keep bool

	// Progress gets a line that is written over on a terminal, and one every ten seconds elsewhere. Nil: none.
	Progress io.Writer
	Terminal bool // Progress is a terminal
}

// Validate reports whether the run is possible.
func (c *Config) Validate() error {
	profile, known := profiles[c.Profile]
	switch full := c.full(); {
	case c.Profile != "" && !known:
		return fmt.Errorf("--profile must be one of %v", Profiles())
	case full.Operations < OperationsMin || full.Operations > OperationsMax:
		return fmt.Errorf("--operations must be from %d to %d", OperationsMin, OperationsMax)
	case full.Clients < 1 || full.Clients > ClientsMax:
		return fmt.Errorf("--clients must be from 1 to %d", ClientsMax)
	case full.Banks < 1 || full.Banks > BanksMax:
		return fmt.Errorf("--banks must be from 1 to %d", BanksMax)
	case full.DurationMax < DurationMaxMin || full.DurationMax > DurationMaxMax:
		return fmt.Errorf("--duration-max must be from %v to %v", DurationMaxMin, DurationMaxMax)
	case profile.giveUp < 0 || profile.giveUp > 1:
		return fmt.Errorf("profile %s: a probability is from 0 to 1", c.Profile)
	}
	return nil
}

// full returns the config with nothing left out but the seed.
func (c *Config) full() Config {
	full := *c
	full.Profile = cmp.Or(full.Profile, ProfileDefault)
	p := profiles[full.Profile]
	full.Operations = cmp.Or(full.Operations, p.operations)
	full.Clients = cmp.Or(full.Clients, ClientsDefault)
	full.Banks = cmp.Or(full.Banks, BanksDefault)
	full.DurationMax = cmp.Or(full.DurationMax, p.durationMax)
	return full
}

// errDuration is the cause of a context that ended because a run took longer than it may.
var errDuration = errors.New("the run took longer than --duration-max")

// Run does one run and returns its report, whose verdict may be that the bank is broken. An error means that there is
// no verdict: the cluster or the banks did not start, or ctx ended. Nothing is left behind but what Config.Keep keeps.
func Run(ctx context.Context, config Config) (report *Report, err error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	config = config.full()
	if config.Seed == 0 {
		config.Seed = rand.Uint64()
	}
	r, err := newRun(config)
	if err != nil {
		return nil, err
	}
	defer func() {
		failed := err != nil && ctx.Err() == nil || report != nil && !report.OK()
		if closeErr := r.close(!config.Keep || !failed); closeErr != nil {
			err = errors.Join(err, closeErr)
		}
		switch {
		case !config.Keep || !failed:
		case report != nil:
			report.Kept = r.dir
		default:
			err = fmt.Errorf("%w; the data folder and the logs are in %s", err, r.dir)
		}
	}()

	bounded, cancel := context.WithTimeoutCause(ctx, config.DurationMax, errDuration)
	defer cancel()
	endProgress := r.showProgress()
	err = r.phases(bounded)
	endProgress()
	switch {
	case err == nil:
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case errors.Is(context.Cause(bounded), errDuration):
		r.findings.add("%v (%v), in the phase %q", errDuration, config.DurationMax, r.phase())
	case errors.Is(err, errUnsettled): // a finding already, and nothing can be judged after it
	default:
		return nil, err
	}
	return r.report(), nil
}

// phases is a run from its first process to its last check.
func (r *run) phases(ctx context.Context) error {
	r.enter("starting")
	if err := r.cluster.start(ctx); err != nil {
		return err
	}
	if err := r.banks.start(ctx); err != nil {
		return err
	}
	if err := r.takeBaseline(ctx); err != nil {
		return err
	}
	r.enter("load")
	endWatch := r.watch(ctx)
	err := r.load(ctx)
	if err == nil {
		r.enter("settling")
		err = r.settle(ctx)
	}
	if err == nil {
		r.enter("replaying")
		err = r.replay(ctx)
	}
	if err == nil {
		err = r.drainPlanted(ctx)
	}
	endWatch()
	if err != nil {
		return err
	}
	r.enter("judging")
	if err := r.judge(ctx); err != nil {
		return err
	}
	r.enter(phaseLast)
	return nil
}

const phaseLast = "judged"
