package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"time"

	"golang.org/x/term"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bench"
)

type benchCommand struct {
	Quick       bool            `help:"A smaller run, in under a minute: 64 clients, short slices, no full table, no slow network. Other flags override it."`
	Clients     []int           `placeholder:"N" help:"Numbers of concurrent clients. (default: 1,16,64)"`
	Fsync       []string        `placeholder:"on" help:"With PostgreSQL's fsync, without it, or both. (default: on,off)"`
	Keys        []int64         `placeholder:"N" help:"Records in the table before the run; 10000000 take 5 GB of disk and some more minutes. (default: 0,1000000)"`
	Delay       []time.Duration `placeholder:"DURATION" help:"Delay of the network between service and PostgreSQL, each way; 0s is none. (default: 1ms)"`
	Designs     []string        `placeholder:"NAME" help:"Measure only these: ${benchDesigns}."`
	Parts       []string        `placeholder:"NAME" help:"Run only these parts: ${benchParts}."`
	Rounds      int             `placeholder:"N" help:"Number of measurements of each design in each setting, in random order. (default: ${benchRounds})"`
	Slice       time.Duration   `placeholder:"DURATION" help:"Duration of one measurement. (default: ${benchSlice})"`
	PoolSize    int             `placeholder:"N" help:"Maximum number of database connections. Defaults to the number of clients."`
	Expired     int64           `placeholder:"N" help:"Number of records in the measurement of expiry. (default: ${benchExpired})"`
	Seed        uint64          `placeholder:"N" help:"Repeat the order and the choices of an earlier run. By default a seed is drawn and printed."`
	DurationMax time.Duration   `placeholder:"DURATION" help:"Maximum duration of the run. Measurements not done by then are left out. (default: ${benchDurationMax}, 4m with --quick)"`
	JSON        bool            `name:"json" help:"Print one JSON object instead of tables."`
	Report      string          `placeholder:"FILE" help:"Write the JSON object to a file too."`
	Plot        string          `placeholder:"FILE" help:"Draw the throughput at the most clients as an SVG."`
}

// Validate is called by kong.
func (c *benchCommand) Validate() error {
	config := c.config()
	return config.Validate()
}

func (c *benchCommand) config() bench.Config {
	return bench.Config{
		Quick: c.Quick, Clients: c.Clients, Fsync: c.Fsync, Keys: c.Keys, Delays: c.Delay, Designs: c.Designs, Parts: c.Parts,
		Rounds: c.Rounds, Slice: c.Slice, PoolSize: c.PoolSize, Expired: c.Expired, Seed: c.Seed, DurationMax: c.DurationMax,
	}
}

// Run is called by kong.
func (c *benchCommand) Run(ctx context.Context) error {
	config := c.config()
	if config.Seed == 0 {
		config.Seed = rand.Uint64()
	}
	config.Progress, config.Terminal = os.Stderr, term.IsTerminal(int(os.Stderr.Fd()))
	report, err := bench.Run(ctx, config)
	switch {
	case ctx.Err() != nil:
		return noVerdict{errors.New("interrupted")}
	case err != nil:
		return noVerdict{err}
	}
	report.Command = append([]string{"demo-bank"}, os.Args[1:]...)
	if c.Report != "" {
		if err := writeFile(c.Report, report.WriteJSON); err != nil {
			return noVerdict{fmt.Errorf("write the report: %w", err)}
		}
	}
	if c.Plot != "" {
		if err := writeFile(c.Plot, report.WritePlot); err != nil {
			return noVerdict{fmt.Errorf("draw the plot: %w", err)}
		}
	}
	write := report.WriteText
	if c.JSON {
		write = report.WriteJSON
	}
	if err := write(os.Stdout); err != nil {
		return noVerdict{fmt.Errorf("print the report: %w", err)}
	}
	if len(report.LeftOut) > 0 {
		return noVerdict{errors.New("the run reached its maximum duration before everything was measured: raise --duration-max")}
	}
	return nil
}

// benchServeCommand is the process that answers requests while bench measures.
type benchServeCommand struct{}

// Run is called by kong.
func (benchServeCommand) Run(ctx context.Context) error { return bench.Serve(ctx, os.Stdin, os.Stdout) }
