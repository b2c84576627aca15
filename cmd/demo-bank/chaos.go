package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"time"

	"golang.org/x/term"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/chaos"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/mutants"
)

type chaosCommand struct {
	Profile       string        `placeholder:"NAME" default:"${profile}" help:"Amount of requests and faults: smoke (20,000 requests, two minutes), nightly (200,000) or release (1,000,000). (default: ${default})"`
	Seed          uint64        `placeholder:"N" help:"Repeat the schedule of an earlier run. By default a seed is drawn and printed."`
	Operations    int           `placeholder:"N" help:"Minimum number of requests, with as many faults as fit. Defaults to the profile's."`
	Clients       int           `placeholder:"N" default:"${clients}" help:"Number of concurrent clients. (default: ${default})"`
	Banks         int           `placeholder:"N" default:"${banks}" help:"Bank processes that share the database. (default: ${default})"`
	Effects       bool          `help:"Start a processor that misbehaves too, and send top-ups, payouts and receipts, which call it. The run has a fifth of the profile's requests, and may take a minute longer."`
	Wait          bool          `help:"Make duplicates wait for the answer: run the banks with --wait."`
	DurationMax   time.Duration `placeholder:"DURATION" help:"Maximum duration: a longer run fails. Defaults to the profile's: 3m, 20m or 75m."`
	JSON          bool          `name:"json" help:"Print one JSON object instead of a table."`
	Report        string        `placeholder:"FILE" help:"Write the JSON object to a file too."`
	Keep          bool          `help:"Keep the data folder and the logs of a failed run, and print their path."`
	PrintSchedule bool          `help:"Print the schedule of faults, and do nothing."`
	Mutants       bool          `help:"Run banks with seeded bugs instead: each must be caught. Needs a checkout and -tags mutants."`
	Mutant        []string      `placeholder:"NAME" help:"With --mutants: only these."`
	Bank          string        `hidden:"" placeholder:"FILE" help:"The program that serves, instead of this one: a demo-bank with a bug that should be found."`
}

// Validate is called by kong.
func (c *chaosCommand) Validate() error {
	if len(c.Mutant) > 0 && !c.Mutants {
		return errors.New("--mutant needs --mutants")
	}
	config := c.config()
	return config.Validate()
}

func (c *chaosCommand) config() chaos.Config {
	return chaos.Config{
		Profile: c.Profile, Seed: c.Seed, Operations: c.Operations, Clients: c.Clients, Banks: c.Banks,
		Effects: c.Effects, Wait: c.Wait, DurationMax: c.DurationMax, Keep: c.Keep, Bank: c.Bank,
	}
}

// Run is called by kong.
func (c *chaosCommand) Run(ctx context.Context) error {
	config := c.config()
	if config.Seed == 0 {
		config.Seed = rand.Uint64()
	}
	if c.PrintSchedule {
		return chaos.WriteSchedule(os.Stdout, config)
	}
	config.Progress, config.Terminal = os.Stderr, term.IsTerminal(int(os.Stderr.Fd()))
	if c.Mutants {
		return c.runMutants(ctx, config)
	}
	report, err := chaos.Run(ctx, config)
	if report == nil {
		if ctx.Err() != nil {
			err = errors.New("interrupted")
		}
		return noVerdict{err}
	}
	if c.Report != "" {
		if err := writeFile(c.Report, report.WriteJSON); err != nil {
			return noVerdict{fmt.Errorf("write the report: %w", err)}
		}
	}
	write := report.WriteText
	if c.JSON {
		write = report.WriteJSON
	}
	if err := write(os.Stdout); err != nil {
		return noVerdict{fmt.Errorf("print the report: %w", err)}
	}
	if !report.OK() {
		return errBroken
	}
	return err
}

// runMutants runs each bank with a seeded bug under the profile for mutants.
func (c *chaosCommand) runMutants(ctx context.Context, config chaos.Config) error {
	config.Profile, config.Operations, config.DurationMax = "mutant", 0, 0
	judge := func(ctx context.Context, bank, name string) ([]string, error) {
		config := config
		config.Bank = bank
		report, err := chaos.Run(ctx, config)
		if report == nil {
			return nil, err
		}
		// A failure of the run itself, such as a run that took too long, does not count as finding
		// the bug.
		return slices.DeleteFunc(report.Found(), func(check string) bool { return check == chaos.RunCheck }), nil
	}
	err := mutants.Run(ctx, judge, c.Mutant, os.Stdout)
	switch {
	case ctx.Err() != nil:
		return noVerdict{errors.New("interrupted")}
	case err != nil && !errors.Is(err, mutants.ErrSurvived):
		return noVerdict{err}
	}
	return err
}

// writeFile creates the file and fills it by calling write.
func writeFile(path string, write func(io.Writer) error) error {
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(write(file), file.Close())
}
