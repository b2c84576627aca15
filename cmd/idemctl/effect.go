package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/cmd/internal/terminal"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

type effectCommands struct {
	List   effectListCommand   `cmd:"" help:"Show a page of open requests, the oldest first."`
	Get    effectGetCommand    `cmd:"" help:"Show one open request with its effects."`
	Settle effectSettleCommand `cmd:"" help:"State what is known of an effect: one of --done, --declined, --not-sent and --retry. The service's handler then makes the answer."`
}

type (
	openJSON struct {
		Scope      string       `json:"scope"`
		Key        string       `json:"key"`
		Route      string       `json:"route"`
		State      string       `json:"state"` // running, due, waiting or parked
		Attempt    string       `json:"attempt_id"`
		Epoch      int64        `json:"epoch"`
		Runs       int          `json:"runs"`
		StartedAt  time.Time    `json:"started_at"`
		AgeMS      int64        `json:"age_ms"`
		NextAt     time.Time    `json:"next_at"`
		Parked     string       `json:"parked,omitempty"`
		LastReason string       `json:"last_reason,omitempty"`
		Unsettled  []string     `json:"unsettled"`
		Effects    []effectJSON `json:"effects,omitempty"`
	}

	effectJSON struct {
		Name        string     `json:"name"`
		Kind        string     `json:"kind"`
		State       string     `json:"state"`
		DerivedKey  string     `json:"derived_key"`
		Tries       int        `json:"tries"`
		Panics      int        `json:"panics"`
		SentFirstAt time.Time  `json:"sent_first_at"`
		DoubtAt     *time.Time `json:"doubt_at,omitempty"`
		SettledAt   *time.Time `json:"settled_at,omitempty"`
	}
)

func openOf(r *operator.OpenRequest) openJSON {
	j := openJSON{
		Scope: r.Key.Scope, Key: r.Key.Value, Route: r.Route, State: string(r.State()), Attempt: r.Attempt.String(), Epoch: r.Epoch, Runs: r.Runs,
		StartedAt: r.StartedAt, AgeMS: r.Age.Milliseconds(), NextAt: r.NextAt, Parked: r.Parked, LastReason: r.LastReason, Unsettled: r.Unsettled,
	}
	if j.Unsettled == nil {
		j.Unsettled = []string{}
	}
	for i := range r.Effects {
		e := &r.Effects[i]
		one := effectJSON{
			Name: e.Name, Kind: e.Kind.String(), State: e.StateText(), DerivedKey: e.DerivedKey,
			Tries: e.Tries, Panics: e.Panics, SentFirstAt: e.SentFirstAt,
		}
		if !e.DoubtAt.IsZero() {
			one.DoubtAt = &e.DoubtAt
		}
		if !e.SettledAt.IsZero() {
			one.SettledAt = &e.SettledAt
		}
		j.Effects = append(j.Effects, one)
	}
	return j
}

type effectListCommand struct {
	Scope  string `placeholder:"SCOPE" help:"Only keys of this account."`
	Route  string `placeholder:"NAME" help:"Only of this route, such as topup/1."`
	Name   string `placeholder:"EFFECT" help:"Only requests that have this effect."`
	Parked bool   `help:"Only those that wait for a person."`
	Rows   int    `placeholder:"N" default:"50" help:"Maximum number of rows, up to 1000. (default: ${default})"`
	After  string `placeholder:"CURSOR" help:"Continue after the previous page."`
}

// Run is called by kong.
func (c *effectListCommand) Run(a *app) error {
	return a.operate(func(o *operator.Operator) error {
		list, err := o.ListOpen(a.ctx, operator.OpenFilter{Scope: c.Scope, Route: c.Route, Effect: c.Name, Parked: c.Parked},
			operator.Page{Rows: c.Rows, After: operator.Cursor(c.After)})
		if err != nil {
			return err
		}
		if a.cli.JSON {
			for i := range list.Requests {
				if err := a.printJSON(openOf(&list.Requests[i])); err != nil {
					return err
				}
			}
			var end struct { // the last line
				Page struct {
					Requests int       `json:"requests"`
					Next     string    `json:"next,omitempty"`
					Now      time.Time `json:"now"`
				} `json:"page"`
			}
			end.Page.Requests, end.Page.Next, end.Page.Now = len(list.Requests), string(list.Next), list.Now
			return a.printJSON(end)
		}
		lines := []string{"SCOPE\tKEY\tROUTE\tSTATE\tAGE\tUNSETTLED\tWHY"}
		for i := range list.Requests {
			r := &list.Requests[i]
			why := r.Parked
			if why == "" {
				why = r.LastReason
			}
			lines = append(lines, fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%s\t%s", terminal.Clean(r.Key.Scope), terminal.Clean(r.Key.Value), terminal.Clean(r.Route), r.State(),
				r.Age.Round(time.Second), orDash(terminal.Clean(strings.Join(r.Unsettled, ","))), orDash(terminal.Clean(why))))
		}
		if err := a.table(lines); err != nil {
			return err
		}
		return a.printf("%s; %s\n", counted(int64(len(list.Requests)), "open request"), moreText(list.Next))
	})
}

type effectGetCommand struct{ keyArguments }

// Run is called by kong.
func (c *effectGetCommand) Run(a *app) error {
	key, err := c.read(a.stdin)
	if err != nil {
		return err
	}
	return a.operate(func(o *operator.Operator) error {
		r, err := o.GetOpen(a.ctx, key)
		if err != nil {
			return err
		}
		if a.cli.JSON {
			return a.printJSON(openOf(&r))
		}
		return a.table(openLines(&r))
	})
}

func openLines(r *operator.OpenRequest) []string {
	lines := []string{
		"scope\t" + terminal.Clean(r.Key.Scope), "key\t" + terminal.Clean(r.Key.Value), "route\t" + terminal.Clean(r.Route), "state\t" + string(r.State()),
		"parked\t" + orDash(terminal.Clean(r.Parked)), "last run\t" + orDash(terminal.Clean(r.LastReason)),
		"attempt\t" + r.Attempt.String(), fmt.Sprintf("epoch\t%d", r.Epoch), fmt.Sprintf("runs\t%d", r.Runs),
		"started\t" + stamp(r.StartedAt), "next\t" + stamp(r.NextAt),
		"", "EFFECT\tKIND\tSTATE\tTRIES\tFIRST SENT\tSENT AGAIN\tSETTLED\tDERIVED KEY",
	}
	for i := range r.Effects {
		e := &r.Effects[i]
		lines = append(lines, fmt.Sprintf("%s\t%s\t%s\t%d\t%s\t%s\t%s\t%s", terminal.Clean(e.Name), e.Kind, e.StateText(), e.Tries,
			stamp(e.SentFirstAt), stamp(e.DoubtAt), stamp(e.SettledAt), e.DerivedKey))
	}
	return lines
}

// openFlags are the flags of an act on an open request.
type openFlags struct {
	Reason   string `required:"" placeholder:"TEXT" help:"Reason for the act. It is kept in the audit table."`
	Actor    string `placeholder:"NAME" help:"Your name. (default: your account on this machine)"`
	Epoch    int64  `xor:"epoch" placeholder:"N" help:"The epoch that effect get shows: nothing is done if somebody has owned the request or acted on it since. Required, unless --any-epoch is given."`
	AnyEpoch bool   `xor:"epoch" help:"Act on the request whatever has become of it since you looked."`
}

func (c *openFlags) act() (operator.OpenAct, error) {
	actor, err := actorOr(c.Actor)
	act := operator.OpenAct{Act: operator.Act{Actor: actor, Reason: c.Reason}, Epoch: c.Epoch}
	if (c.Epoch > 0) == c.AnyEpoch {
		err = errors.Join(err, fmt.Errorf("%w: --epoch is missing: look with idemctl effect get, and add --epoch with the epoch that it shows (or --any-epoch)", operator.ErrInvalid))
	}
	return act, errors.Join(err, act.Validate())
}

func (c *openFlags) do(a *app, arguments *keyArguments, done string, do func(context.Context, *operator.Operator, idempotency.Key, operator.OpenAct) (operator.OpenRequest, error)) error {
	key, err := arguments.read(a.stdin)
	if err != nil {
		return err
	}
	act, err := c.act()
	if err != nil {
		return err
	}
	return a.operate(func(o *operator.Operator) error {
		before, err := do(a.ctx, o, key, act)
		if err != nil {
			return err
		}
		if a.cli.JSON {
			return a.printJSON(struct {
				Done   string   `json:"done"`
				Actor  string   `json:"actor"`
				Reason string   `json:"reason"`
				Before openJSON `json:"before"`
			}{done, act.Actor, act.Reason, openOf(&before)})
		}
		return a.printf("%s: the open request of attempt %s, started %s\n", done, before.Attempt, stamp(before.StartedAt))
	})
}

type effectSettleCommand struct {
	keyArguments
	Name string `arg:"" help:"Name of the effect."`
	openFlags
	Done     string `xor:"as" placeholder:"JSON" help:"The other service did it. JSON is the result that the effect's Do would return. The handler checks it, and you may state it again until it fits."`
	Declined bool   `xor:"as" help:"The other service refused, and will not do it later."`
	NotSent  bool   `xor:"as" help:"The other service never got it, and nothing is on its way to it: it is sent as if for the first time. Look it up there when the effect's SettleAfter has passed since the last send."`
	Retry    bool   `xor:"as" help:"Nothing is known: it is sent again with the same key, if the rules of the effect permit that."`
	Detail   string `placeholder:"JSON" help:"With --declined: the detail of the refusal, as the handler expects it."`
}

// Run is called by kong.
func (c *effectSettleCommand) Run(a *app) error {
	as, output, done := operator.SettleDone, []byte(c.Done), "stated as done"
	switch {
	case c.Done != "":
	case c.Declined:
		as, output = operator.SettleDeclined, nil
		if c.Detail != "" {
			output = []byte(c.Detail)
		}
	case c.NotSent:
		as, output = operator.SettleNotSent, nil
	case c.Retry:
		as, output = operator.SettleRetry, nil
	default:
		return fmt.Errorf(`%w: say what is known of the effect: --done '{"id":"ch_1"}', --declined, --not-sent or --retry`, operator.ErrInvalid)
	}
	if c.Detail != "" && !c.Declined {
		return fmt.Errorf("%w: --detail goes with --declined", operator.ErrInvalid)
	}
	if as != operator.SettleDone {
		done = "settled as " + string(as)
	}
	err := c.do(a, &c.keyArguments, done, func(ctx context.Context, o *operator.Operator, key idempotency.Key, act operator.OpenAct) (operator.OpenRequest, error) {
		return o.Settle(ctx, key, c.Name, as, output, act)
	})
	if err != nil || as != operator.SettleDone || a.cli.JSON {
		return err
	}
	return a.printf("the handler checks the result when it runs next; if it does not fit, idemctl effect get shows the fields, and you settle it again\n")
}

type (
	resumeCommand struct {
		keyArguments
		openFlags
	}
	parkCommand struct {
		keyArguments
		openFlags
	}
	abandonCommand struct {
		keyArguments
		openFlags
		Sent string `placeholder:"EFFECTS" help:"Names of the effects that may have been sent, separated by commas, or none: you have looked each of them up at the other service. Without it they are shown, and nothing is done."`
	}
)

// Run is called by kong.
func (c *resumeCommand) Run(a *app) error {
	return c.do(a, &c.keyArguments, "resumed", func(ctx context.Context, o *operator.Operator, key idempotency.Key, act operator.OpenAct) (operator.OpenRequest, error) {
		return o.Resume(ctx, key, act)
	})
}

// Run is called by kong.
func (c *parkCommand) Run(a *app) error {
	return c.do(a, &c.keyArguments, "parked", func(ctx context.Context, o *operator.Operator, key idempotency.Key, act operator.OpenAct) (operator.OpenRequest, error) {
		return o.Park(ctx, key, act)
	})
}

// Run is called by kong.
func (c *abandonCommand) Run(a *app) error {
	var sent []string
	if c.Sent != "" && c.Sent != "none" {
		sent = strings.Split(c.Sent, ",")
	}
	if c.Sent == "" { // it only looks
		c.Epoch, c.AnyEpoch = 0, true
	}
	return c.do(a, &c.keyArguments, "abandoned", func(ctx context.Context, o *operator.Operator, key idempotency.Key, act operator.OpenAct) (operator.OpenRequest, error) {
		if c.Sent == "" {
			r, err := o.GetOpen(ctx, key)
			if err != nil {
				return r, err
			}
			fmt.Fprintln(a.stderr, strings.Join(openLines(&r), "\n"))
			names := strings.Join(r.MaybeSent(), ",")
			if names == "" {
				names = "none"
			}
			return r, refused{fmt.Errorf("nothing was done. After this a retry RUNS AGAIN, and can PAY TWICE: look each effect up at the other service by its derived key, and then say --epoch %d --sent %s", r.Epoch, names)}
		}
		return o.Abandon(ctx, key, operator.Abandonment{OpenAct: act, Sent: sent})
	})
}
