package main

import (
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"strings"
	"sync/atomic"

	"golang.org/x/term"

	"github.com/paidonce/idempotency/cmd/idemctl/internal/probe"
	"github.com/paidonce/idempotency/cmd/internal/terminal"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// testSystem is the flag that allows hosts other than this machine.
const testSystem = "--yes-this-is-a-test-system"

type probeCommand struct {
	URL         string   `arg:"" name:"url" help:"URL of the requests. They are real: each one with a new key has its effect."`
	Profile     string   `enum:"${profiles}" default:"ietf" help:"Rules to judge by: ${enum}. (default: ${default})"`
	Method      string   `placeholder:"METHOD" default:"POST" help:"Method of the requests. (default: ${default})"`
	Header      []string `sep:"none" placeholder:"'NAME: VALUE'" help:"Header line of each request; repeat for more. The output shows $$NAME in place of the value."`
	Body        *string  `xor:"body" placeholder:"TEXT" help:"Body of the requests. In it {{int}} (1, 3, 5, ...) and {{uuid}} are new for each request with a new key."`
	BodyFile    string   `xor:"body" placeholder:"FILE" help:"File with the body; \"-\" reads the standard input."`
	ScopeHeader []string `sep:"none" placeholder:"'NAME: VALUE'" help:"Header line of a second caller, in place of the header of that name; repeat for more. Without it key-scoped can't be judged."`
	EffectsURL  string   `name:"effects-url" placeholder:"URL" help:"URL to GET the number of effects from; it gets the lines of --header too. Without it the ids in the answers are compared."`
	EffectsPath string   `name:"effects-path" placeholder:"POINTER" help:"JSON pointer to that number, or to an array with one element per effect. (default: the whole document)"`
	JUnit       string   `name:"junit" placeholder:"FILE" help:"File to write a JUnit report to."`
	TestSystem  bool     `name:"yes-this-is-a-test-system" help:"Required unless the hosts are this machine: the requests are executed."`
}

// Help is called by kong.
func (*probeCommand) Help() string {
	return fmt.Sprintf(`Sends requests with new keys, retries, copies at once, other bodies under used keys, and requests with the connection cut
before the answer, and judges the answers. If effects are counted at --effects-url, no other client may use the system meanwhile.
It takes less than two minutes, and sends %d requests at most, up to %d a second. Ctrl-C ends it and prints the verdicts so far.

Exit codes: 0 ok, 1 a binding rule is broken, 2 a binding rule could not be judged, or not a command. Advisory rules never count.`,
		probe.RequestsMax, probe.RequestsPerSecondMax)
}

// profiles returns the names of all profiles, separated by commas.
func profiles() string {
	var names []string
	for _, profile := range probe.Profiles {
		names = append(names, string(profile))
	}
	return strings.Join(names, ",")
}

// probeVerdict is the error of an examination with a verdict other than ok. The report is already
// printed.
type probeVerdict string

func (v probeVerdict) Error() string { return "verdict: " + string(v) }

func (v probeVerdict) exitCode() int {
	if v == probe.ReportBroken {
		return 1
	}
	return 2
}

// Run is called by kong.
func (c *probeCommand) Run(a *app) error {
	config, err := c.config(a)
	if err != nil {
		return fmt.Errorf("%w: %w", operator.ErrInvalid, err)
	}
	if host := config.Foreign(a.ctx); host != "" && !c.TestSystem {
		return fmt.Errorf("%w: %s is not this machine. The requests are executed there: %s says that they may be", operator.ErrInvalid, host, testSystem)
	}
	var doing atomic.Value
	doing.Store("connecting")
	config.Progress = func(name string) { doing.Store(name) }
	onTerminal := false
	if file, ok := a.stderr.(*os.File); ok {
		onTerminal = term.IsTerminal(int(file.Fd()))
	}
	end := terminal.ShowProgress(a.stderr, onTerminal, "probe", func() string { return doing.Load().(string) })
	report, err := probe.Run(a.ctx, *config)
	end()
	if err != nil {
		return fmt.Errorf("%w: %w", operator.ErrInvalid, err)
	}
	return c.print(a, report)
}

// print prints the report, and returns its verdict as an error unless it is ok.
func (c *probeCommand) print(a *app, report *probe.Report) error {
	var err error
	if a.cli.JSON {
		err = a.printJSON(report)
	} else {
		err = report.WriteText(a.out)
	}
	if err == nil && c.JUnit != "" {
		err = c.writeJUnit(report)
	}
	switch {
	case err != nil: // no failed rule: 2
		return fmt.Errorf("%w: %w", operator.ErrInvalid, err)
	case report.Verdict != probe.ReportOK:
		return probeVerdict(report.Verdict)
	}
	return nil
}

func (c *probeCommand) writeJUnit(report *probe.Report) error {
	file, err := os.Create(c.JUnit)
	if err != nil {
		return fmt.Errorf("write the JUnit report: %w", err)
	}
	if err := errors.Join(report.WriteJUnit(file), file.Close()); err != nil {
		return fmt.Errorf("write the JUnit report: %w", err)
	}
	return nil
}

// bodyBytesMax is the maximum size of --body-file.
const bodyBytesMax = 1 << 20

// config returns the configuration of the examination. Its errors quote no argument.
func (c *probeCommand) config(a *app) (*probe.Config, error) {
	config := &probe.Config{Method: strings.ToUpper(c.Method), Profile: probe.Profile(c.Profile), EffectsPath: c.EffectsPath, AnyHost: c.TestSystem}
	var err error
	if config.URL, err = url.Parse(c.URL); err != nil {
		return nil, errors.New("the URL can't be read")
	}
	if c.EffectsURL != "" {
		if config.EffectsURL, err = url.Parse(c.EffectsURL); err != nil {
			return nil, errors.New("--effects-url can't be read")
		}
	}
	for lines, to := range map[*[]string]*[]probe.Field{&c.Header: &config.Header, &c.ScopeHeader: &config.SecondHeader} {
		for _, line := range *lines {
			name, value, found := strings.Cut(line, ":")
			if !found {
				return nil, errors.New("a header is 'Name: value'")
			}
			*to = append(*to, probe.Field{Name: strings.TrimSpace(name), Value: strings.TrimSpace(value)})
		}
	}
	switch {
	case c.BodyFile != "":
		text, err := c.readBody(a)
		if err != nil {
			return nil, err
		}
		config.Body = text
	case c.Body != nil:
		config.Body = *c.Body
	}
	return config, config.Validate()
}

// readBody reads --body-file.
func (c *probeCommand) readBody(a *app) (string, error) {
	from := a.stdin
	if c.BodyFile != "-" {
		file, err := os.Open(c.BodyFile)
		if err != nil {
			return "", errors.New("--body-file can't be opened")
		}
		defer file.Close()
		from = file
	}
	text, err := io.ReadAll(io.LimitReader(from, bodyBytesMax+1))
	switch {
	case err != nil:
		return "", errors.New("--body-file can't be read")
	case len(text) > bodyBytesMax:
		return "", fmt.Errorf("--body-file has more than %d bytes", bodyBytesMax)
	}
	return string(text), nil
}
