package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/term"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/cmd/internal/terminal"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

type keyCommands struct {
	Get    getCommand    `cmd:"" help:"Show one key: its record, its holder, and its known history."`
	List   listCommand   `cmd:"" help:"Show a page of keys."`
	Watch  watchCommand  `cmd:"" help:"Show the changes of one key as they happen."`
	Expire expireCommand `cmd:"" help:"Expire a record now. After the reaper's next walk, a retry RUNS AGAIN and can pay twice."`
	Delete deleteCommand `cmd:"" help:"Delete a record now. A retry RUNS AGAIN and can pay twice."`

	Resume  resumeCommand  `cmd:"" help:"Make an open request due now, parked or not."`
	Park    parkCommand    `cmd:"" help:"Leave an open request to a person."`
	Abandon abandonCommand `cmd:"" help:"Delete an open request without an answer. A retry RUNS AGAIN and can pay twice."`
}

type getCommand struct {
	keyArguments
	Body bool `help:"Show the recorded body as well, as it is stored. It may contain private data."`
}

// state returns a key's state in one word.
func state(s operator.State) string {
	switch {
	case s.Record != nil && s.Record.Open():
		return "open"
	case s.Record != nil && s.Record.Expired:
		return "expired"
	case s.Record != nil:
		return "recorded"
	case s.Holder != nil:
		return "in-progress"
	}
	return "absent"
}

// Run is called by kong.
func (c *getCommand) Run(a *app) error {
	key, err := c.read(a.stdin)
	if err != nil {
		return err
	}
	return a.operate(func(o *operator.Operator) error {
		found, err := o.Get(a.ctx, key)
		notFound := err
		if err != nil && !errors.Is(err, operator.ErrNotFound) {
			return err
		}
		events, err := o.Timeline(a.ctx, key)
		if err != nil {
			return err
		}
		var body []byte
		if c.Body && found.Record != nil {
			if body, err = o.Body(a.ctx, key); err != nil {
				return err
			}
		}
		if a.cli.JSON {
			err = a.getJSON(key, found, events, body)
		} else {
			err = a.getText(key, found, events, body)
		}
		return errors.Join(err, notFound)
	})
}

func (a *app) getJSON(key idempotency.Key, found operator.State, events []operator.Event, body []byte) error {
	out := struct {
		Scope    string      `json:"scope"`
		Key      string      `json:"key"`
		State    string      `json:"state"`
		Record   *recordJSON `json:"record,omitempty"`
		Holder   *holderJSON `json:"holder,omitempty"`
		Timeline []eventJSON `json:"timeline"`
	}{key.Scope, key.Value, state(found), recordOf(found.Record), holderOf(found.Holder), []eventJSON{}}
	if out.Record != nil {
		out.Record.Body = body
	}
	for i := range events {
		out.Timeline = append(out.Timeline, eventOf(&events[i]))
	}
	return a.printJSON(out)
}

func (a *app) getText(key idempotency.Key, found operator.State, events []operator.Event, body []byte) error {
	lines := []string{"scope\t" + terminal.Clean(key.Scope), "key\t" + terminal.Clean(key.Value), "state\t" + state(found)}
	if r := found.Record; r != nil {
		status, expires := strconv.Itoa(r.Status), stamp(r.ExpiresAt)
		if r.Open() {
			status, expires = "none yet: idemctl effect get shows what was sent", "-"
		}
		lines = append(lines,
			"status\t"+status,
			"attempt\t"+r.Attempt.String(),
			"trace\t"+orDash(terminal.Clean(r.TraceID)),
			"created\t"+stamp(r.CreatedAt),
			"expires\t"+expires,
			fmt.Sprintf("fingerprint\t%x (version %d)", r.Fingerprint.Sum, r.Fingerprint.Version),
			fmt.Sprintf("body\t%d bytes", r.BodyBytes))
		if r.HeaderErr != nil {
			lines = append(lines, "headers\t"+terminal.Clean(r.HeaderErr.Error()))
		}
		names := make([]string, 0, len(r.Header))
		for name := range r.Header {
			names = append(names, name)
		}
		slices.Sort(names)
		for _, name := range names {
			for _, value := range r.Header[name] {
				lines = append(lines, "header\t"+terminal.Clean(name)+": "+terminal.Clean(value))
			}
		}
	}
	if found.Holder != nil {
		lines = append(lines, "held by\t"+holderText(found.Holder))
	}
	if err := a.table(lines); err != nil {
		return err
	}
	if len(events) > 0 {
		lines = []string{"", "AT\tWHAT\t"}
		for i := range events {
			lines = append(lines, eventText(&events[i]))
		}
		if err := a.table(lines); err != nil {
			return err
		}
	}
	if body == nil {
		return nil
	}
	if !utf8.Valid(body) {
		return a.printf("\nthe body is not text: use --json, which has it in base64\n")
	}
	text := strings.Split(strings.TrimSuffix(string(body), "\n"), "\n")
	for i := range text {
		text[i] = terminal.Clean(text[i])
	}
	return a.printf("\n%s\n", strings.Join(text, "\n"))
}

type listCommand struct {
	Scope     string `placeholder:"SCOPE" help:"Only keys of this account."`
	KeyPrefix string `placeholder:"PREFIX" help:"Keys that begin with this."`
	Status    int    `placeholder:"2-5" help:"2 for 2xx, 4 for 4xx."`
	Live      bool   `xor:"expiry" help:"Only records that have not expired."`
	Expired   bool   `xor:"expiry" help:"Only expired records that wait for the reaper."`
	Since     string `placeholder:"TIME" help:"Created at or after: a duration ago (2h) or RFC 3339."`
	Until     string `placeholder:"TIME" help:"Created before."`
	TraceID   string `name:"trace-id" placeholder:"ID" help:"Of the attempt that was executed."`
	Attempt   string `placeholder:"UUID" help:"Of this attempt."`
	Rows      int    `placeholder:"N" default:"50" help:"Maximum number of rows, up to 1000. (default: ${default})"`
	After     string `placeholder:"CURSOR" help:"Continue after the previous page."`
	Desc      bool   `help:"From the last key to the first."`
	All       bool   `help:"Scan the whole table for a page, however long that takes."`
	Recent    bool   `help:"Roughly the newest keys of all accounts, from the end of the table. Not with a filter."`
}

func (c *listCommand) filter() (f operator.Filter, err error) {
	f = operator.Filter{Scope: c.Scope, KeyPrefix: c.KeyPrefix, StatusClass: c.Status, TraceID: c.TraceID}
	switch {
	case c.Live:
		f.Expiry = operator.ExpiryLive
	case c.Expired:
		f.Expiry = operator.ExpiryExpired
	}
	if f.CreatedFrom, err = instant(c.Since, "--since"); err != nil {
		return f, err
	}
	if f.CreatedTo, err = instant(c.Until, "--until"); err != nil {
		return f, err
	}
	if c.Attempt != "" {
		f.Attempt, err = operator.ParseAttemptID(c.Attempt)
	}
	return f, err
}

func instant(text, flag string) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	if ago, err := time.ParseDuration(text); err == nil {
		return time.Now().Add(-ago), nil
	}
	at, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		return at, fmt.Errorf("%w: %s is a duration such as 2h, or a time such as 2006-01-02T15:04:05Z", operator.ErrInvalid, flag)
	}
	return at, nil
}

// Run is called by kong.
func (c *listCommand) Run(a *app) error {
	filter, err := c.filter()
	if err != nil {
		return err
	}
	page := operator.Page{Rows: c.Rows, After: operator.Cursor(c.After), Descending: c.Desc}
	if c.Recent && (filter != operator.Filter{} || c.After != "" || c.Desc || c.All) {
		return fmt.Errorf("%w: --recent goes with --rows alone", operator.ErrInvalid)
	}
	return a.operate(func(o *operator.Operator) error {
		if c.Recent {
			list, err := o.Recent(a.ctx, c.Rows)
			if err != nil {
				return err
			}
			return a.printList(list)
		}
		var whole operator.List
		for {
			list, err := o.List(a.ctx, filter, page)
			if err != nil {
				return err
			}
			whole.Records, whole.Next, whole.Now = append(whole.Records, list.Records...), list.Next, list.Now
			whole.RowsExamined += list.RowsExamined
			page.After, page.Rows = list.Next, c.Rows-len(whole.Records)
			if !c.All || list.Next == "" || page.Rows <= 0 {
				return a.printList(whole)
			}
		}
	})
}

func (a *app) printList(list operator.List) error {
	if a.cli.JSON {
		for i := range list.Records {
			if err := a.printJSON(recordOf(&list.Records[i])); err != nil {
				return err
			}
		}
		var end struct { // the last line
			Page struct {
				Records      int       `json:"records"`
				RowsExamined int64     `json:"rows_examined"`
				Next         string    `json:"next,omitempty"`
				Now          time.Time `json:"now"`
			} `json:"page"`
		}
		end.Page.Records, end.Page.RowsExamined, end.Page.Next, end.Page.Now = len(list.Records), list.RowsExamined, string(list.Next), list.Now.UTC()
		return a.printJSON(end)
	}
	lines := []string{"SCOPE\tKEY\tSTATUS\tCREATED\tEXPIRES\tBODY\tATTEMPT"}
	for _, r := range list.Records {
		expires, status := stamp(r.ExpiresAt), strconv.Itoa(r.Status)
		switch {
		case r.Open():
			expires, status = "-", "open"
		case r.Expired:
			expires += " (over)"
		}
		lines = append(lines, fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%s\t%s", terminal.Clean(r.Key.Scope), terminal.Clean(r.Key.Value), status, stamp(r.CreatedAt), expires, sizeText(r.BodyBytes), r.Attempt))
	}
	if err := a.table(lines); err != nil {
		return err
	}
	return a.printf("%s, %s examined; %s\n", counted(int64(len(list.Records)), "record"), counted(list.RowsExamined, "row"), moreText(list.Next))
}

// moreText describes the rest of a list.
func moreText(next operator.Cursor) string {
	if next == "" {
		return "that is all"
	}
	return "more with --after " + string(next)
}

type watchCommand struct {
	keyArguments
	Interval time.Duration `placeholder:"DURATION" default:"1s" help:"Interval between looks, at least 100ms. (default: ${default})"`
	Until    string        `placeholder:"STATE" enum:"absent,in-progress,open,recorded,expired," default:"" help:"End once it is absent, in-progress, open, recorded or expired."`
	For      time.Duration `placeholder:"DURATION" help:"End after this long; with --until that is exit code 5."`
}

const watchIntervalMin = 100 * time.Millisecond

// Run is called by kong.
func (c *watchCommand) Run(a *app) error {
	key, err := c.read(a.stdin)
	if err != nil {
		return err
	}
	if c.Interval < watchIntervalMin || c.For < 0 {
		return fmt.Errorf("%w: --interval is at least %v, and --for is positive", operator.ErrInvalid, watchIntervalMin)
	}
	ctx := a.ctx
	if c.For > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.For)
		defer cancel()
	}
	return a.operate(func(o *operator.Operator) error {
		seen, last := map[string]bool{}, ""
		for {
			now, err := c.look(ctx, a, o, key, seen, last)
			switch {
			case err != nil && ctx.Err() == nil:
				return err
			case err == nil && c.Until != "" && now == c.Until:
				return nil
			}
			last = now
			select {
			case <-ctx.Done():
				if c.Until != "" {
					return refused{fmt.Errorf("it did not become %s", c.Until)}
				}
				return nil // --for has elapsed, or Ctrl-C
			case <-time.After(c.Interval):
			}
		}
	})
}

// look prints the changes of the key since the last look.
func (c *watchCommand) look(ctx context.Context, a *app, o *operator.Operator, key idempotency.Key, seen map[string]bool, last string) (string, error) {
	found, err := o.Get(ctx, key)
	if err != nil && !errors.Is(err, operator.ErrNotFound) {
		return last, err
	}
	events, err := o.Timeline(ctx, key)
	if err != nil {
		return last, err
	}
	now := state(found)
	if now != last {
		if a.cli.JSON {
			err = a.printJSON(struct {
				At    time.Time `json:"at"`
				Kind  string    `json:"kind"`
				State string    `json:"state"`
			}{time.Now().UTC(), "state", now})
		} else {
			err = a.printf("%s  is %s\n", stamp(time.Now()), now)
		}
		if err != nil {
			return now, err
		}
	}
	for i := range events {
		e := &events[i]
		name := fmt.Sprint(e.At.UnixNano(), e.Kind, e.Attempt, e.TraceID)
		if e.Holder != nil {
			name = fmt.Sprint(e.Holder.PID, e.Kind, e.Holder.Since.UnixNano())
		}
		if seen[name] {
			continue
		}
		seen[name] = true
		if a.cli.JSON {
			err = a.printJSON(eventOf(e))
		} else {
			err = a.printf("%s\n", strings.ReplaceAll(eventText(e), "\t", "  "))
		}
		if err != nil {
			return now, err
		}
	}
	return now, nil
}

type actFlags struct {
	keyArguments
	Reason  string `required:"" placeholder:"TEXT" help:"Reason for the act. It is kept in the audit table."`
	Actor   string `placeholder:"NAME" help:"Your name. (default: your account on this machine)"`
	Attempt string `placeholder:"UUID" help:"Act only if the record is still of this attempt, as shown by key get."`
	Yes     bool   `short:"y" help:"Don't ask. Required without a terminal."`
}

type (
	expireCommand struct{ actFlags }
	deleteCommand struct{ actFlags }
)

// Run is called by kong.
func (c *expireCommand) Run(a *app) error {
	return c.act(a, "expired", "its record is deleted on the reaper's next walk, and until then retries are replayed", (*operator.Operator).Expire)
}

// Run is called by kong.
func (c *deleteCommand) Run(a *app) error {
	return c.act(a, "deleted", "its record is deleted now", (*operator.Operator).Delete)
}

func (c *actFlags) act(a *app, done, means string, do func(*operator.Operator, context.Context, idempotency.Key, operator.Act) (operator.Record, error)) error {
	key, err := c.read(a.stdin)
	if err != nil {
		return err
	}
	act := operator.Act{Reason: c.Reason}
	if act.Actor, err = actorOr(c.Actor); err != nil {
		return err
	}
	if c.Attempt != "" {
		if act.Attempt, err = operator.ParseAttemptID(c.Attempt); err != nil {
			return err
		}
	}
	if err := act.Validate(); err != nil {
		return err
	}
	if !c.Yes && !(isTerminal(a.stdin) && isTerminal(a.stderr)) {
		return refused{errors.New("there is no terminal to ask on: --yes says that a retry of the request may run again, and pay twice")}
	}
	return a.operate(func(o *operator.Operator) error {
		if !c.Yes {
			found, err := o.Get(a.ctx, key)
			switch {
			case err != nil:
				return err
			case found.Record == nil:
				return operator.ErrInProgress
			}
			if act.Attempt.IsZero() {
				act.Attempt = found.Record.Attempt // acts only on the record shown
			}
			if err := a.ask(found.Record, means); err != nil {
				return err
			}
		}
		record, err := do(o, a.ctx, key, act)
		if err != nil {
			return err
		}
		if a.cli.JSON {
			return a.printJSON(struct {
				Done   string      `json:"done"`
				Actor  string      `json:"actor"`
				Reason string      `json:"reason"`
				Record *recordJSON `json:"record"`
			}{done, act.Actor, act.Reason, recordOf(&record)})
		}
		return a.printf("%s: the record of attempt %s, status %d, created %s\n", done, record.Attempt, record.Status, stamp(record.CreatedAt))
	})
}

// actorOr returns name, or if it is empty the name of the user that runs the program.
func actorOr(name string) (string, error) {
	if name != "" {
		return name, nil
	}
	account, err := user.Current()
	if err != nil {
		return "", fmt.Errorf("%w: say who you are with --actor: %w", operator.ErrInvalid, err)
	}
	return account.Username, nil
}

// ask returns nil if the user confirmed.
func (a *app) ask(r *operator.Record, means string) error {
	fmt.Fprintf(a.stderr, "%s / %s: status %d, created %s, expires %s\n", terminal.Clean(r.Key.Scope), terminal.Clean(r.Key.Value), r.Status, stamp(r.CreatedAt), stamp(r.ExpiresAt))
	fmt.Fprintf(a.stderr, "With yes %s.\nThen a retry of the request RUNS AGAIN, and can PAY TWICE. Type yes to go on: ", means)
	answers := make(chan string, 1)
	go func() {
		answer, _ := bufio.NewReader(a.stdin).ReadString('\n') // unreadable input is not a yes
		answers <- answer
	}()
	select {
	case answer := <-answers:
		if strings.TrimSpace(answer) == "yes" {
			return nil
		}
	case <-a.ctx.Done():
	}
	return refused{errors.New("nothing was done")}
}

// isTerminal reports whether end is a terminal.
func isTerminal(end any) bool {
	file, ok := end.(*os.File)
	return ok && term.IsTerminal(int(file.Fd()))
}
