// Package chaos tests the bank under faults. It starts a PostgreSQL, proxies in front of it and
// bank processes behind them. Clients send requests while the package kills and stops processes,
// crashes PostgreSQL, cuts connections and fills pools, on a schedule that a seed decides. Then it
// heals everything, and judges the clients' replies against each other and against the books.
//
//   - [Run] is one run, phase by phase
//   - schedule.go decides from the seed which faults happen, to what and when
//   - cluster.go, banks.go, faults.go, commits.go make the faults
//   - keys.go, clients.go, send.go are the clients: their requests, their retries, and when they
//     give up
//   - effects.go has the faults of requests that call a processor. processor.go runs the processor,
//     gateway.go stands in front of it, directed.go has the schedules that a random one rarely meets,
//     and outside.go judges the state at the end
//   - watch.go observes the run; settle.go and judge.go reach the verdict; report.go reports it
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
	OperationsMax  = 2_000_000 // the accounts' money lasts for this many
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

// Config sets the load and the faults of a run. The zero value of each field is its default.
type Config struct {
	// Profile is one of [Profiles]. It sets the number of operations and of faults. Defaults to
	// "smoke".
	Profile string

	// Seed decides the schedule and the clients' requests. 0 draws one.
	Seed uint64

	// Operations is the minimum number of HTTP requests that the clients send before everything is
	// healed; settling and the final replay come on top. The number of faults scales with it.
	// Defaults to the profile's.
	Operations int

	// Clients is the number of concurrent clients. Defaults to 32.
	Clients int

	// Banks is the number of bank processes that share the database. Defaults to 2.
	Banks int

	// DurationMax bounds the whole run; a run that takes longer has failed. Defaults to the
	// profile's.
	DurationMax time.Duration

	// Wait makes duplicates at the banks wait for the answer for a moment before they get 409.
	Wait bool

	// Effects starts a processor too, which misbehaves, and makes some clients send requests that
	// call it.
	Effects bool

	// Bank is the path of the program that serves, a demo-bank or a variant of it. Defaults to this
	// program.
	Bank string

	// Keep keeps the data folder and the logs of a run that failed.
	Keep bool

	// Progress gets a line that is overwritten on a terminal, and a line every ten seconds
	// elsewhere. Nil: none.
	Progress io.Writer
	Terminal bool // Progress is a terminal
}

// Validate returns an error if the run is impossible.
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

// full returns the config with every default filled in, except the seed.
func (c *Config) full() Config {
	full := *c
	full.Profile = cmp.Or(full.Profile, ProfileDefault)
	p := profiles[full.Profile]
	if full.Effects {
		p = p.withEffects()
	}
	full.Operations = cmp.Or(full.Operations, p.operations)
	full.Clients = cmp.Or(full.Clients, ClientsDefault)
	full.Banks = cmp.Or(full.Banks, BanksDefault)
	full.DurationMax = cmp.Or(full.DurationMax, p.durationMax)
	return full
}

// profile returns the profile of a config with its defaults set.
func (c *Config) profile() profile {
	p := profiles[c.Profile]
	if c.Effects {
		p = p.withEffects()
	}
	return p.scaled(c.Operations)
}

// errDuration is the cause of a context that ended because the run took longer than allowed.
var errDuration = errors.New("the run took longer than --duration-max")

// Run does one run and returns its report. Its verdict may be that the bank is broken. An error
// means that there is no verdict: the cluster or the banks did not start, or ctx ended. Nothing is
// left behind except the things that Config.Keep keeps.
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
	// A finding already; nothing can be judged after it.
	case errors.Is(err, errUnsettled):
	default:
		return nil, err
	}
	return r.report(), nil
}

// phases runs everything from the first process to the last check.
func (r *run) phases(ctx context.Context) error {
	r.enter("starting")
	if err := r.cluster.start(ctx); err != nil {
		return err
	}
	if err := r.startOutside(ctx); err != nil {
		return err
	}
	if err := r.banks.start(ctx); err != nil {
		return err
	}
	if err := r.firstTransfer(ctx); err != nil {
		return err
	}
	if err := r.takeBaseline(ctx); err != nil {
		return err
	}
	r.enter("load")
	endWatch := r.watch(ctx)
	err := r.load(ctx)
	if err == nil && r.profile.effects {
		r.enter("directed")
		err = r.direct(ctx)
	}
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
