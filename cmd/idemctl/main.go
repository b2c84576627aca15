// Command idemctl is the operator's command line. It shows the records that a service keeps in
// PostgreSQL with this module, finds faults, and makes changes by hand.
//
//	export DATABASE_URL=postgres://operator@db/payments   # or the PG* variables of libpq
//	idemctl doctor
//	idemctl key get acme 0198c0de-...
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/paidonce/idempotency/cmd/internal/terminal"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

const description = `Looks at the records of idempotent requests, and after them.

  idemctl doctor                          what is wrong with the database, and what to do about it
  idemctl migrate up                      make or upgrade the tables
  idemctl key get acme 0198c0de-...       one key: its record, who holds it, what became of it
  idemctl key list --scope acme --status 4
  idemctl key watch acme 0198c0de-...     until Ctrl-C
  idemctl key delete acme 0198c0de-... --reason "ticket 7"     a retry RUNS AGAIN after this, and can pay twice
  idemctl effect list --parked            requests that called another service, and wait for a person
  idemctl effect settle acme 0198c0de-... charge --epoch 7 --done '{"id":"ch_1"}' --reason "ticket 7"
  idemctl message parked --state dead     messages that a consumer could not handle
  idemctl message redrive 0198c0de-... --consumer ledger --seen dead-8 --reason "ticket 7"
  idemctl stats, idemctl top              counts and sizes; what is in flight
  idemctl gc                              delete what is expired, as the service's reaper does
  idemctl serve                           the same as pages, on this machine, behind a token
  idemctl probe http://127.0.0.1:8080/v1/transfers --body '{"from":"alice","to":"bob","amount":{{int}}}'
                                          does any HTTP API honour Idempotency-Key? Needs no database

The database is that of --database-url, else of DATABASE_URL, else of the variables of libpq: PGHOST, PGUSER, PGPASSFILE, PGSERVICE
and so on. A password belongs in one of those, not into an argument, which other users of the machine can see; a
key can be kept from them too: "-" reads it from the standard input.

Exit codes: 0 done, 1 failed, 2 not a command, 3 no such record, 4 the doctor found a failure, 5 refused: the key is in
progress or changed, or nobody said yes. Those of probe: 0 ok, 1 a binding rule is broken, 2 one could not be judged.`

// Exit codes.
const (
	exitFailed   = 1
	exitUsage    = 2
	exitNotFound = 3
	exitDoctor   = 4
	exitRefused  = 5
)

type commands struct {
	DatabaseURL string `name:"database-url" env:"DATABASE_URL" placeholder:"URL" help:"PostgreSQL to connect to. Without it the variables of libpq (PGHOST, ...) apply."`
	Schema      string `placeholder:"NAME" default:"public" help:"Schema that holds the tables. (default: ${default})"`
	JSON        bool   `name:"json" help:"Print JSON: one object, or one per line for a list."`

	Migrate migrateCommands `cmd:"" help:"Make, upgrade or undo the tables."`
	Doctor  doctorCommand   `cmd:"" help:"Find faults of the database, each with its remedy."`
	Key     keyCommands     `cmd:"" help:"Show keys, expire or delete them."`
	Effect  effectCommands  `cmd:"" help:"Show open requests: those that called another service and have no answer yet. Settle their effects."`
	Message messageCommands `cmd:"" help:"Show consumers, the outbox and parked messages. Redrive, retry or drop them."`
	Stats   statsCommand    `cmd:"" help:"Count and measure."`
	Top     topCommand      `cmd:"" help:"Show the requests in progress, repeatedly."`
	GC      gcCommand       `cmd:"" name:"gc" help:"Delete expired records, and old history."`
	Serve   serveCommand    `cmd:"" help:"Serve the admin page to clients with a token."`
	Probe   probeCommand    `cmd:"" help:"Examine an HTTP API that claims to honour Idempotency-Key, in whatever language it is written."`
}

// app holds the state that commands share.
type app struct {
	ctx         context.Context
	cli         *commands
	stdin       io.Reader
	out, stderr io.Writer
}

// refused is an error with exit code 5.
type refused struct{ error }

func (r refused) Unwrap() error { return r.error }

var errFindings = errors.New("the doctor found a failure")

func exitCode(err error) int {
	var probed probeVerdict
	switch {
	case err == nil:
		return 0
	case errors.As(err, &probed):
		return probed.exitCode()
	case errors.Is(err, errFindings):
		return exitDoctor
	case errors.Is(err, operator.ErrNotFound), errors.Is(err, operator.ErrNotOpen), errors.Is(err, operator.ErrNoEffect),
		errors.Is(err, operator.ErrNotParked), errors.Is(err, operator.ErrNoMessage):
		return exitNotFound
	case errors.Is(err, operator.ErrInProgress), errors.Is(err, operator.ErrChanged), errors.Is(err, operator.ErrOpen), errors.Is(err, operator.ErrSettled),
		errors.Is(err, operator.ErrUnconfirmed), errors.Is(err, operator.ErrEncrypted), errors.Is(err, operator.ErrBehind), errors.As(err, new(refused)):
		return exitRefused
	case errors.Is(err, operator.ErrInvalid):
		return exitUsage
	}
	return exitFailed
}

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the program at once

	var cli commands
	exited := -1
	parser, err := kong.New(&cli,
		kong.Name("idemctl"), kong.Description(description),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, FlagsLast: true, NoExpandSubcommands: false}),
		kong.Exit(func(code int) { exited = code }), // after --help
		kong.Vars{
			"servingVersion": fmt.Sprint(postgres.SchemaVersion),
			"tokenVariable":  tokenVariable, "eventsAge": (30 * 24 * time.Hour).String(),
			"profiles": profiles(),
		},
	)
	if err != nil {
		panic(err) // a wrong tag in commands
	}
	parsed, err := parser.Parse(os.Args[1:])
	if exited >= 0 {
		return exited
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "idemctl:", terminal.Clean(withoutArguments(err.Error(), os.Args[1:], parser.Model)))
		fmt.Fprintln(os.Stderr, "idemctl --help, or idemctl COMMAND --help, says what there is")
		return exitUsage
	}
	err = parsed.Run(&app{ctx: ctx, cli: &cli, stdin: os.Stdin, out: os.Stdout, stderr: os.Stderr})
	printed := errors.Is(err, errFindings) || errors.As(err, new(probeVerdict)) // on stdout
	if err != nil && ctx.Err() != nil && !printed {
		err = errors.New("interrupted")
	}
	if err != nil && !printed {
		// pgx lists each address that it tried on its own line.
		fmt.Fprintln(os.Stderr, "idemctl:", terminal.Clean(strings.Join(strings.Fields(err.Error()), " ")))
		if errors.As(err, new(*pgconn.ConnectError)) {
			fmt.Fprintln(os.Stderr, "see --database-url, DATABASE_URL and the variables of libpq (PGHOST, PGPORT, PGSERVICE, ...), and that the server is up")
		}
	}
	return exitCode(err)
}

// shortArgument is the length from which an argument is replaced anywhere in a message. Shorter
// ones are replaced only as whole words.
const shortArgument = 4

// withoutArguments replaces the user's arguments in a message, except for names of commands and
// flags. They may be a key, a scope or a password, and the message may go to a log.
func withoutArguments(message string, arguments []string, model *kong.Application) string {
	var words []string
	var collect func(node *kong.Node)
	collect = func(node *kong.Node) {
		words = append(words, node.Name)
		for _, child := range node.Children {
			collect(child)
		}
	}
	collect(model.Node)
	for _, argument := range arguments {
		if strings.HasPrefix(argument, "-") {
			_, argument, _ = strings.Cut(argument, "=")
		}
		switch {
		case argument == "" || slices.Contains(words, argument):
		case len(argument) < shortArgument: // it is part of too many words
			message = regexp.MustCompile(`(^|\W)`+regexp.QuoteMeta(argument)+`(\W|$)`).ReplaceAllString(message, "$1...$2")
		default:
			message = strings.ReplaceAll(message, argument, "...")
		}
	}
	return message
}
