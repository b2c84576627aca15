// Command demo-bank is a bank with transfers that can be retried safely, and a storm that tries to
// prove otherwise.
//
// go run ./cmd/demo-bank          # serves on http://127.0.0.1:8080, with a PostgreSQL of its own
// go run ./cmd/demo-bank storm    # in another terminal: thousands of duplicates, and a verdict
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
	"golang.org/x/term"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bench"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/chaos"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/psp"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/server"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/storm"
	"github.com/paidonce/idempotency/cmd/internal/terminal"
)

const description = `A bank with transfers that can be retried safely: the record of a request, its answer and the transfer are committed in
one PostgreSQL transaction.

Without a command it serves. Try:

  demo-bank                                      serve, with an embedded PostgreSQL that is gone at exit
  demo-bank --data-dir ./bank-data               serve, and find the money still there at the next start
  DATABASE_URL=postgres://... demo-bank          serve on a PostgreSQL of yours
  curl -i http://127.0.0.1:8080/v1/topups -H 'Content-Type: application/json' -H 'Idempotency-Key: topup-1' -d '{"account":"alice","amount":500,"card":"tok"}'
                                                 charge a card at the processor, and post it once
  demo-bank psp                                  serve the processor of cards, payouts and mails in another terminal
  demo-bank --psp http://127.0.0.1:8090          serve, and call that processor instead of the one inside
  demo-bank consume --no-inbox                   consume the bank's messages naively, beside demo-bank --no-consumers
  demo-bank storm                                send thousands of duplicates to it and read the verdict
  demo-bank storm --keys 20000 --clients 64      a longer one
  demo-bank storm --json >report.json            for a script: exit code 0 is ok, 1 is broken, 2 is no verdict`

type commands struct {
	Serve   serveCommand   `cmd:"" default:"withargs" help:"Serve the bank (the default)."`
	Storm   stormCommand   `cmd:"" help:"Send duplicates of transfers to a bank and read the verdict from its books."`
	Chaos   chaosCommand   `cmd:"" help:"Start banks and a PostgreSQL, break them while clients pay, and check the money afterwards."`
	Consume consumeCommand `cmd:"" help:"Run the consumers of the bank's messages as a process of their own."`
	Relay   relayCommand   `cmd:"" help:"Take the bank's messages to Kafka, as a process of its own."`
	PSP     pspCommand     `cmd:"" name:"psp" help:"Serve the card processor, bank rail and mail service that the bank calls, with faults on request."`
	Bench   benchCommand   `cmd:"" help:"Measure the cost of idempotency, compared with none and with other designs, in one run."`

	BenchServe benchServeCommand `cmd:"" hidden:""`
}

type serveCommand struct {
	Addr            string        `placeholder:"HOST:PORT" default:"${addr}" help:"Address to listen on; port 0 takes any free one. (default: ${default})"`
	DatabaseURL     string        `name:"database-url" env:"DATABASE_URL" placeholder:"URL" help:"PostgreSQL that holds the books. Without it an embedded one is started."`
	DataDir         *string       `name:"data-dir" placeholder:"DIR" help:"Folder that keeps the data of the embedded PostgreSQL and of the processor inside. Without it the data is deleted at exit."`
	PSP             string        `name:"psp" placeholder:"URL" help:"A processor of cards, payouts and mails that runs already (demo-bank psp). Without it one is started inside, on a loopback port."`
	PSPKeyLifetime  time.Duration `name:"psp-key-lifetime" placeholder:"DURATION" default:"${pspKeyLifetime}" help:"Time that the processor is sure to know a key, at least ${pspKeyLifetimeMin}: nothing is sent again after nine tenths of it. (default: ${default})"`
	Brokers         []string      `placeholder:"HOST:PORT" help:"Kafka brokers that get the bank's messages, separated by commas. Without it a broker for tests is started inside, on a loopback port."`
	NoRelay         bool          `help:"Leave messages in the outbox, for demo-bank relay."`
	NoConsumers     bool          `help:"Leave messages at the broker, for demo-bank consume."`
	PoolSize        int           `placeholder:"N" default:"${poolSize}" help:"Maximum number of database connections. (default: ${default})"`
	ShutdownTimeout time.Duration `placeholder:"DURATION" default:"${shutdownTimeout}" help:"Maximum time for requests in progress when the bank stops. (default: ${default})"`
	TTL             time.Duration `name:"ttl" placeholder:"DURATION" default:"${ttl}" help:"Time that an answer is kept for retries, from its commit. (default: ${default})"`
	ReapInterval    time.Duration `placeholder:"DURATION" default:"${reapInterval}" help:"Pause of the reaper of expired answers between two walks. (default: ${default})"`
	HandlerTimeout  time.Duration `placeholder:"DURATION" default:"${handlerTimeout}" help:"Maximum time of a request until its COMMIT, at most ${handlerTimeoutMax}. (default: ${default})"`
	Wait            time.Duration `placeholder:"DURATION" default:"0s" help:"Maximum time that a request waits for one in progress with the same key, at most ${waitMax} and less than --ttl; 0s means 409 at once. (default: ${default})"`
	AcquireTimeout  time.Duration `placeholder:"DURATION" default:"${acquireTimeout}" help:"Maximum time that a request waits for a database connection. (default: ${default})"`
	LogLevel        slog.Level    `placeholder:"LEVEL" default:"INFO" help:"DEBUG, INFO, WARN or ERROR; DEBUG logs each request. (default: ${default})"`
}

// Validate is called by kong.
func (c *serveCommand) Validate() error {
	if c.PoolSize < 1 || c.PoolSize > 1000 {
		return errors.New("--pool-size must be from 1 to 1000")
	}
	if c.DataDir != nil && *c.DataDir == "" { // probably an unset variable
		return errors.New("--data-dir is empty: name a folder, or leave it out and lose the money at exit")
	}
	if c.DataDir != nil && c.DatabaseURL != "" {
		use := "is used only by the processor inside"
		if c.PSP != "" {
			use = "is not used"
		}
		fmt.Fprintf(os.Stderr, "demo-bank: --data-dir %s: the books are in the database of --database-url (DATABASE_URL)\n", use)
	}
	if c.PSPKeyLifetime < bank.KeyLifetimeMin {
		return fmt.Errorf("--psp-key-lifetime must be at least %v", bank.KeyLifetimeMin)
	}
	if c.ShutdownTimeout <= 0 {
		return errors.New("--shutdown-timeout must be positive")
	}
	if c.TTL < idempotency.TTLMin {
		return fmt.Errorf("--ttl must be at least %v", idempotency.TTLMin)
	}
	if c.ReapInterval < server.ReapIntervalMin {
		return fmt.Errorf("--reap-interval must be at least %v", server.ReapIntervalMin)
	}
	if c.HandlerTimeout < server.HandlerTimeoutMin || c.HandlerTimeout > server.HandlerTimeoutMax {
		return fmt.Errorf("--handler-timeout must be from %v to %v", server.HandlerTimeoutMin, server.HandlerTimeoutMax)
	}
	if c.Wait < 0 || c.Wait > idempotency.WaitMax || c.Wait >= c.TTL {
		return fmt.Errorf("--wait must be from 0s to %v, and shorter than --ttl", idempotency.WaitMax)
	}
	if c.AcquireTimeout < server.AcquireTimeoutMin {
		return fmt.Errorf("--acquire-timeout must be at least %v", server.AcquireTimeoutMin)
	}
	return nil
}

// Run is called by kong.
func (c *serveCommand) Run(ctx context.Context) error {
	dataDir := ""
	if c.DataDir != nil {
		dataDir = *c.DataDir
	}
	point, err := server.CrashPointFromEnvironment(os.Stderr)
	if err != nil {
		return err
	}
	return server.New(server.Config{
		Addr: c.Addr, DatabaseURL: c.DatabaseURL, DataDir: dataDir, PoolSize: c.PoolSize,
		ShutdownTimeout: c.ShutdownTimeout, TTL: c.TTL, ReapInterval: c.ReapInterval,
		HandlerTimeout: c.HandlerTimeout, Wait: c.Wait, AcquireTimeout: c.AcquireTimeout,
		PSP: c.PSP, KeyLifetime: c.PSPKeyLifetime,
		Brokers: c.Brokers, NoRelay: c.NoRelay, NoConsumers: c.NoConsumers,
		CrashPoint: point, Stdout: os.Stdout, Stderr: os.Stderr,
		Logger: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: c.LogLevel})),
	}).Run(ctx)
}

type stormCommand struct {
	URL      string        `name:"url" placeholder:"URL" default:"http://${addr}" help:"URL of the bank. (default: ${default})"`
	Keys     int           `placeholder:"N" default:"2000" help:"Number of distinct transfers. (default: ${default})"`
	Copies   int           `placeholder:"N" default:"4" help:"Number of times each is sent. (default: ${default})"`
	Clients  int           `placeholder:"N" default:"32" help:"Number of concurrent clients. (default: ${default})"`
	Seed     uint64        `placeholder:"N" help:"Repeat the choices of an earlier storm. Keys are new each time."`
	Patience time.Duration `placeholder:"DURATION" default:"60s" help:"Maximum time that a request is retried until it has an answer. (default: ${default})"`
	JSON     bool          `name:"json" help:"Print one JSON object instead of a table."`
}

// Validate is called by kong.
func (c *stormCommand) Validate() error {
	config := c.config()
	return config.Validate()
}

func (c *stormCommand) config() storm.Config {
	return storm.Config{URL: c.URL, Keys: c.Keys, Copies: c.Copies, Clients: c.Clients, Seed: c.Seed, Patience: c.Patience}
}

// Run is called by kong.
func (c *stormCommand) Run(ctx context.Context) error {
	config := c.config()
	if term.IsTerminal(int(os.Stderr.Fd())) {
		config.Progress = os.Stderr
	}
	report, err := storm.Run(ctx, config)
	switch {
	case ctx.Err() != nil:
		return noVerdict{errors.New("interrupted")}
	case err != nil:
		return noVerdict{err}
	}
	write := report.WriteText
	if c.JSON {
		write = report.WriteJSON
	}
	if err := write(os.Stdout); err != nil {
		return fmt.Errorf("print the report: %w", err)
	}
	if report.Verdict == storm.VerdictNone {
		return noVerdict{errors.New("the bank acknowledged no transfer")}
	}
	if !report.OK() {
		return errBroken
	}
	return nil
}

// errBroken is the error of a storm or chaos run that failed. Its verdict is already on stdout.
var errBroken = errors.New("the bank's books or answers are broken")

// noVerdict is the error of a run without a verdict.
type noVerdict struct{ error }

func (e noVerdict) Error() string { return "no verdict: " + e.error.Error() }

// defaults are the values in the help of flags.
var defaults = kong.Vars{
	"addr": server.AddrDefault, "pspAddr": psp.AddrDefault, "consumeAddr": server.ConsumeAddrDefault, "poolSize": fmt.Sprint(server.PoolSizeDefault),
	"shutdownTimeout": server.ShutdownTimeoutDefault.String(),
	"ttl":             (24 * time.Hour).String(), "reapInterval": time.Minute.String(),
	"handlerTimeout": (10 * time.Second).String(), "handlerTimeoutMax": server.HandlerTimeoutMax.String(),
	"waitMax":        idempotency.WaitMax.String(),
	"pspKeyLifetime": bank.KeyLifetimeDefault.String(), "pspKeyLifetimeMin": bank.KeyLifetimeMin.String(),
	"acquireTimeout": server.AcquireTimeoutDefault.String(),
	"benchDesigns":   strings.Join(bench.Designs(), ", "), "benchParts": strings.Join(bench.Parts(), ", "),
	"benchRounds": fmt.Sprint(bench.RoundsDefault), "benchSlice": bench.SliceDefault.String(),
	"benchExpired": fmt.Sprint(bench.ExpiredDefault), "benchDurationMax": bench.DurationMaxDefault.String(),
	"profile": chaos.ProfileDefault, "clients": fmt.Sprint(chaos.ClientsDefault), "banks": fmt.Sprint(chaos.BanksDefault),
}

// exitUsage is kong's exit code for a wrong flag. So a script can tell a wrong flag from a storm
// without a verdict.
const exitUsage = 80

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the program at once

	var cli commands
	parser, err := kong.New(&cli,
		kong.Name("demo-bank"), kong.Description(description),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, FlagsLast: true, NoExpandSubcommands: false}),
		kong.BindTo(ctx, (*context.Context)(nil)),
		defaults)
	if err != nil {
		panic(err) // a wrong tag in commands
	}
	parsed, err := parser.Parse(os.Args[1:])
	if err != nil {
		fmt.Fprintf(os.Stderr, "demo-bank: %v: see demo-bank --help, or demo-bank COMMAND --help\n", err)
		os.Exit(exitUsage)
	}
	if err := parsed.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "demo-bank:", terminal.CleanLines(err.Error()))
		if errors.As(err, new(noVerdict)) {
			os.Exit(2) // 1 would mean that the bank is broken
		}
		os.Exit(1)
	}
}
