package main

import (
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/paidonce/idempotency/cmd/internal/terminal"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

type messageCommands struct {
	Consumers messageConsumersCommand `cmd:"" help:"Show the consumers: where they are in each partition, and what they have parked."`
	Outbox    messageOutboxCommand    `cmd:"" help:"Show what waits in the outbox, and a page of the messages that the broker refused."`
	Parked    messageParkedCommand    `cmd:"" help:"Show a page of the messages that consumers could not handle, the oldest first."`
	Get       messageGetCommand       `cmd:"" help:"Show one message: its row in the outbox, and its record or its parked row at each consumer."`
	Redrive   messageRedriveCommand   `cmd:"" help:"Make a dead or waiting message due now, under its id."`
	Drop      messageDropCommand      `cmd:"" help:"Delete a parked message. It is NEVER handled, or with --outbox never published."`
	Retry     messageRetryCommand     `cmd:"" help:"Give a message that the broker refused to the relay again."`
}

type (
	consumerJSON struct {
		Consumer     string         `json:"consumer"`
		Waiting      int64          `json:"waiting"`
		Behind       int64          `json:"behind"`
		Dead         int64          `json:"dead"`
		OldestDeadMS int64          `json:"oldest_dead_ms"`
		OldestDueMS  int64          `json:"oldest_due_ms"`
		Positions    []positionJSON `json:"positions"`
	}

	positionJSON struct {
		Source    string      `json:"source"`
		Partition int32       `json:"partition"`
		Next      int64       `json:"next_offset"`
		Deaths    int         `json:"deaths"`
		MovedAt   time.Time   `json:"moved_at"`
		AgeMS     int64       `json:"age_ms"`
		Attempt   string      `json:"attempt_id"`
		Holder    *holderJSON `json:"holder,omitempty"`
	}

	shardJSON struct {
		Shard    int         `json:"shard"`
		Pending  int64       `json:"pending"`
		Refused  int64       `json:"refused"`
		Behind   int64       `json:"behind"`
		OldestMS int64       `json:"oldest_ms"`
		Relay    *holderJSON `json:"relay,omitempty"`
	}

	outboxJSON struct {
		Pending int64       `json:"pending"`
		Refused int64       `json:"refused"`
		Behind  int64       `json:"behind"`
		Shards  []shardJSON `json:"shards"`
	}

	outboxMessageJSON struct {
		ID          string    `json:"id"`
		Topic       string    `json:"topic"`
		Key         string    `json:"key,omitempty"`
		KeyBytes    []byte    `json:"key_base64,omitempty"` // of a key that is not UTF-8
		Shard       int       `json:"shard"`
		Refused     string    `json:"refused,omitempty"`
		Front       string    `json:"front,omitempty"`
		PublishedAt time.Time `json:"published_at"`
		AgeMS       int64     `json:"age_ms"`
		BodyBytes   int64     `json:"body_bytes"`
	}

	parkedJSON struct {
		ID        string     `json:"id"`
		Consumer  string     `json:"consumer"`
		State     string     `json:"state"`
		Attempts  int        `json:"attempts"`
		Seen      string     `json:"seen"`
		Error     string     `json:"error"`
		Front     string     `json:"front,omitempty"`
		ParkedAt  time.Time  `json:"parked_at"`
		AgeMS     int64      `json:"age_ms"`
		NotBefore *time.Time `json:"not_before,omitempty"`
		Topic     string     `json:"topic"`
		Key       string     `json:"key,omitempty"`
		KeyBytes  []byte     `json:"key_base64,omitempty"`
		Source    string     `json:"source"`
		Partition int32      `json:"partition"`
		Offset    int64      `json:"offset"`
		BodyBytes int64      `json:"body_bytes"`
	}
)

// keyJSON returns the key as text, or as bytes if it is not UTF-8.
func keyJSON(key []byte) (text string, raw []byte) {
	if utf8.Valid(key) {
		return string(key), nil
	}
	return "", key
}

func outboxMessageOf(m *operator.OutboxMessage) outboxMessageJSON {
	j := outboxMessageJSON{
		ID: m.ID, Topic: m.Topic, Shard: m.Shard, Refused: m.Refused, Front: m.Front, PublishedAt: m.PublishedAt, AgeMS: m.Age.Milliseconds(), BodyBytes: m.BodyBytes,
	}
	j.Key, j.KeyBytes = keyJSON(m.Key)
	return j
}

func parkedOf(m *operator.ParkedMessage) parkedJSON {
	j := parkedJSON{
		ID: m.ID, Consumer: m.Consumer, State: string(m.State), Attempts: m.Attempts, Seen: m.Seen(), Error: m.Error, Front: m.Front, ParkedAt: m.ParkedAt, AgeMS: m.Age.Milliseconds(),
		Topic: m.Topic, Source: m.Source, Partition: m.Partition, Offset: m.Offset, BodyBytes: m.BodyBytes,
	}
	if !m.NotBefore.IsZero() {
		j.NotBefore = &m.NotBefore
	}
	j.Key, j.KeyBytes = keyJSON(m.Key)
	return j
}

func ageText(age time.Duration) string {
	if age == 0 {
		return "-"
	}
	return age.Round(time.Second).String()
}

type messageConsumersCommand struct {
	Consumer string `placeholder:"NAME" help:"Only this one."`
}

// Run is called by kong.
func (c *messageConsumersCommand) Run(a *app) error {
	return a.operate(func(o *operator.Operator) error {
		list, err := o.Consumers(a.ctx, c.Consumer)
		if err != nil {
			return err
		}
		if a.cli.JSON {
			for i := range list.Consumers {
				if err := a.printJSON(consumerOf(&list.Consumers[i])); err != nil {
					return err
				}
			}
			return nil
		}
		lines := []string{"CONSUMER\tWAITING\tBEHIND\tDEAD\tOLDEST DEAD\tLONGEST DUE"}
		for i := range list.Consumers {
			s := &list.Consumers[i]
			lines = append(lines, fmt.Sprintf("%s\t%d\t%d\t%d\t%s\t%s", terminal.Clean(s.Name), s.Waiting, s.Behind, s.Dead, ageText(s.OldestDead), ageText(s.OldestDue)))
		}
		lines = append(lines, "", "CONSUMER\tSOURCE\tPARTITION\tNEXT\tMOVED\tDEATHS\tHELD BY")
		for i := range list.Consumers {
			s := &list.Consumers[i]
			for j := range s.Positions {
				p := &s.Positions[j]
				next, holder := fmt.Sprint(p.Next), "-"
				if p.Next < 0 {
					next = "-"
				}
				if p.Holder != nil {
					holder = holderText(p.Holder)
				}
				lines = append(lines, fmt.Sprintf("%s\t%s\t%d\t%s\t%s ago\t%d\t%s", terminal.Clean(s.Name), terminal.Clean(p.Source), p.Partition, next, p.Age.Round(time.Second), p.Deaths, holder))
			}
		}
		if list.Truncated {
			lines = append(lines, fmt.Sprintf("and more than these %d positions: see --consumer", operator.PositionsMax))
		}
		return a.table(lines)
	})
}

func consumerOf(c *operator.Consumer) consumerJSON {
	j := consumerJSON{
		Consumer: c.Name, Waiting: c.Waiting, Behind: c.Behind, Dead: c.Dead, OldestDeadMS: c.OldestDead.Milliseconds(), OldestDueMS: c.OldestDue.Milliseconds(),
		Positions: []positionJSON{},
	}
	for i := range c.Positions {
		p := &c.Positions[i]
		j.Positions = append(j.Positions, positionJSON{
			Source: p.Source, Partition: p.Partition, Next: p.Next, Deaths: p.Deaths, MovedAt: p.MovedAt, AgeMS: p.Age.Milliseconds(), Attempt: p.Attempt.String(), Holder: holderOf(p.Holder),
		})
	}
	return j
}

// pageFlags select a page of a list of messages.
type pageFlags struct {
	Rows  int    `placeholder:"N" default:"50" help:"Maximum number of rows, up to 1000. (default: ${default})"`
	After string `placeholder:"CURSOR" help:"Continue after the previous page."`
}

func (c *pageFlags) page() operator.Page {
	return operator.Page{Rows: c.Rows, After: operator.Cursor(c.After)}
}

// pageEnd is the last line of a list in JSON.
type pageEnd struct {
	Page struct {
		Messages int       `json:"messages"`
		Next     string    `json:"next,omitempty"`
		Now      time.Time `json:"now"`
	} `json:"page"`
}

func (a *app) printPageEnd(messages int, next operator.Cursor, now time.Time) error {
	var end pageEnd
	end.Page.Messages, end.Page.Next, end.Page.Now = messages, string(next), now
	return a.printJSON(end)
}

type messageOutboxCommand struct{ pageFlags }

// Run is called by kong.
func (c *messageOutboxCommand) Run(a *app) error {
	return a.operate(func(o *operator.Operator) error {
		box, err := o.Outbox(a.ctx)
		if err != nil {
			return err
		}
		list, err := o.ListOutbox(a.ctx, c.page())
		if err != nil {
			return err
		}
		if a.cli.JSON {
			shards := []shardJSON{}
			for _, s := range box.Shards {
				shards = append(shards, shardJSON{s.Number, s.Pending, s.Refused, s.Behind, s.Oldest.Milliseconds(), holderOf(s.Relay)})
			}
			first := struct { // the first line
				Outbox outboxJSON `json:"outbox"`
			}{outboxJSON{box.Pending, box.Refused, box.Behind, shards}}
			if err := a.printJSON(first); err != nil {
				return err
			}
			for i := range list.Messages {
				if err := a.printJSON(outboxMessageOf(&list.Messages[i])); err != nil {
					return err
				}
			}
			return a.printPageEnd(len(list.Messages), list.Next, list.Now)
		}
		if len(box.Shards) > 0 {
			lines := []string{"SHARD\tPENDING\tREFUSED\tBEHIND\tOLDEST\tRELAY"}
			for i := range box.Shards {
				s := &box.Shards[i]
				relay := "-"
				if s.Relay != nil {
					relay = holderText(s.Relay)
				}
				lines = append(lines, fmt.Sprintf("%d\t%d\t%d\t%d\t%s\t%s", s.Number, s.Pending, s.Refused, s.Behind, ageText(s.Oldest), relay))
			}
			if err := a.table(append(lines, "")); err != nil {
				return err
			}
		}
		if len(list.Messages) > 0 {
			lines := []string{"ID\tTOPIC\tKEY\tAGE\tBODY\tREFUSED BECAUSE"}
			for i := range list.Messages {
				m := &list.Messages[i]
				lines = append(lines, fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%s", m.ID, terminal.Clean(m.Topic), orDash(terminal.Clean(string(m.Key))), ageText(m.Age), sizeText(m.BodyBytes), terminal.Clean(m.Refused)))
			}
			if err := a.table(lines); err != nil {
				return err
			}
		}
		return a.printf("%d pending, %d refused, %d behind those; %s\n", box.Pending, box.Refused, box.Behind, moreText(list.Next))
	})
}

type messageParkedCommand struct {
	Consumer string `placeholder:"NAME" help:"Only of this consumer."`
	State    string `placeholder:"STATE" help:"Only waiting, behind or dead ones."`
	pageFlags
}

// Run is called by kong.
func (c *messageParkedCommand) Run(a *app) error {
	return a.operate(func(o *operator.Operator) error {
		list, err := o.ListParked(a.ctx, operator.ParkedFilter{Consumer: c.Consumer, State: operator.ParkedState(c.State)}, c.page())
		if err != nil {
			return err
		}
		if a.cli.JSON {
			for i := range list.Messages {
				if err := a.printJSON(parkedOf(&list.Messages[i])); err != nil {
					return err
				}
			}
			return a.printPageEnd(len(list.Messages), list.Next, list.Now)
		}
		lines := []string{"ID\tCONSUMER\tSEEN\tAGE\tTOPIC\tKEY\tWHY"}
		for i := range list.Messages {
			m := &list.Messages[i]
			lines = append(lines, fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%s\t%s", terminal.Clean(m.ID), terminal.Clean(m.Consumer), m.Seen(), ageText(m.Age), terminal.Clean(m.Topic),
				orDash(terminal.Clean(string(m.Key))), terminal.Clean(m.Error)))
		}
		if err := a.table(lines); err != nil {
			return err
		}
		return a.printf("%s; %s\n", counted(int64(len(list.Messages)), "parked message"), moreText(list.Next))
	})
}

type messageGetCommand struct {
	ID       string `arg:"" help:"Id of the message."`
	Consumer string `placeholder:"NAME" help:"Only at this consumer."`
	Body     bool   `help:"Show the headers and the body as well. They may contain private data."`
}

// Run is called by kong.
func (c *messageGetCommand) Run(a *app) error {
	return a.operate(func(o *operator.Operator) error {
		state, err := o.Message(a.ctx, c.ID, c.Consumer)
		if err != nil {
			return err
		}
		var header map[string][]string
		var body []byte
		if c.Body {
			m, err := o.MessageContent(a.ctx, c.ID)
			if err != nil {
				return err
			}
			header, body = m.Header, m.Body
		}
		if a.cli.JSON {
			out := struct {
				ID       string                 `json:"id"`
				Outbox   []outboxMessageJSON    `json:"outbox"`
				Parked   []parkedJSON           `json:"parked"`
				Handled  map[string]*recordJSON `json:"handled"` // by consumer
				Timeline []eventJSON            `json:"timeline"`
				Headers  map[string][]string    `json:"headers,omitempty"`
				Body     []byte                 `json:"body,omitempty"` // base64
			}{c.ID, []outboxMessageJSON{}, []parkedJSON{}, map[string]*recordJSON{}, []eventJSON{}, header, body}
			for i := range state.Outbox {
				out.Outbox = append(out.Outbox, outboxMessageOf(&state.Outbox[i]))
			}
			for i := range state.Parked {
				out.Parked = append(out.Parked, parkedOf(&state.Parked[i]))
			}
			for i := range state.Handled {
				out.Handled[state.Handled[i].Consumer] = recordOf(&state.Handled[i].Record)
			}
			for i := range state.Events {
				out.Timeline = append(out.Timeline, eventOf(&state.Events[i]))
			}
			return a.printJSON(out)
		}
		lines := []string{"id\t" + terminal.Clean(c.ID)}
		for i := range state.Outbox {
			m := &state.Outbox[i]
			what := "waits for a relay"
			switch {
			case m.Refused != "":
				what = "refused: " + m.Refused
			case m.Front != "":
				what = "behind " + m.Front
			}
			lines = append(lines, "outbox\t"+terminal.Clean(fmt.Sprintf("%s; topic %s, shard %d, %s", what, m.Topic, m.Shard, sizeText(m.BodyBytes))))
		}
		for i := range state.Parked {
			m := &state.Parked[i]
			what := m.Error
			if m.Front != "" {
				what = "behind " + m.Front
			}
			lines = append(lines, "consumer\t"+terminal.Clean(fmt.Sprintf("%s: %s: %s; topic %s, from %s, partition %d, offset %d, %s", m.Consumer, m.Seen(), what, m.Topic, m.Source, m.Partition, m.Offset, sizeText(m.BodyBytes))))
		}
		for i := range state.Handled {
			h := &state.Handled[i]
			lines = append(lines, "consumer\t"+terminal.Clean(h.Consumer)+": handled "+stamp(h.Record.CreatedAt)+", attempt "+h.Record.Attempt.String())
		}
		for name, values := range header {
			lines = append(lines, "header\t"+terminal.Clean(name)+": "+terminal.Clean(strings.Join(values, ", ")))
		}
		lines = append(lines, "", "AT\tCONSUMER\tWHAT\t")
		for i := range state.Events {
			e := &state.Events[i]
			at, what, _ := strings.Cut(eventText(e), "\t")
			lines = append(lines, at+"\t"+orDash(terminal.Clean(e.Consumer))+"\t"+what)
		}
		if err := a.table(lines); err != nil || !c.Body {
			return err
		}
		return a.printf("\n%s\n", terminal.Clean(string(body)))
	})
}

// messageFlags are the flags of an act on a message.
type messageFlags struct {
	ID     string `arg:"" help:"Id of the message."`
	Reason string `required:"" placeholder:"TEXT" help:"Reason for the act. It is kept in the audit table."`
	Actor  string `placeholder:"NAME" help:"Your name. (default: your account on this machine)"`
}

// seenFlags are the additional flags of an act on a message that a consumer has parked.
type seenFlags struct {
	Seen    string `xor:"seen" placeholder:"STATE" help:"What message parked and message get show, such as dead-8: nothing is done if it was tried or acted on since. Required, unless --any-seen is given."`
	AnySeen bool   `xor:"seen" help:"Act on the message whatever has become of it since you looked."`
}

func (c *messageFlags) act() (operator.MessageAct, error) {
	actor, err := actorOr(c.Actor)
	act := operator.MessageAct{Act: operator.Act{Actor: actor, Reason: c.Reason}}
	return act, errors.Join(err, act.Validate())
}

func (c *seenFlags) check() error {
	if (c.Seen == "") != c.AnySeen {
		return fmt.Errorf("%w: look with idemctl message get, and add --seen with what it shows, such as dead-8 (or --any-seen)", operator.ErrInvalid)
	}
	return nil
}

// messageDone reports an act. before is the message as it was.
func (a *app) messageDone(done string, act *operator.MessageAct, before any, text string) error {
	if a.cli.JSON {
		return a.printJSON(struct {
			Done   string `json:"done"`
			Actor  string `json:"actor"`
			Reason string `json:"reason"`
			Before any    `json:"before"`
		}{done, act.Actor, act.Reason, before})
	}
	return a.printf("%s: %s\n", done, terminal.Clean(text))
}

type messageRedriveCommand struct {
	messageFlags
	Consumer string `required:"" placeholder:"NAME" help:"The consumer that has it."`
	seenFlags
}

// Run is called by kong.
func (c *messageRedriveCommand) Run(a *app) error {
	act, err := c.act()
	if err = errors.Join(err, c.check()); err != nil {
		return err
	}
	act.Seen = c.Seen
	return a.operate(func(o *operator.Operator) error {
		m, err := o.Redrive(a.ctx, c.Consumer, c.ID, act)
		if err != nil {
			return err
		}
		return a.messageDone("redriven", &act, parkedOf(&m), fmt.Sprintf("message %s of consumer %s, which was %s; it is tried as soon as that consumer runs", m.ID, m.Consumer, m.Seen()))
	})
}

type messageDropCommand struct {
	messageFlags
	Consumer string `xor:"where" placeholder:"NAME" help:"The consumer that has parked it: it never handles it."`
	Outbox   bool   `xor:"where" help:"In the outbox, where the broker refused it: nobody ever gets it."`
	seenFlags
}

// Run is called by kong.
func (c *messageDropCommand) Run(a *app) error {
	act, err := c.act()
	switch {
	case err != nil:
		return err
	case (c.Consumer == "") != c.Outbox:
		return fmt.Errorf("%w: say where it is dropped: --consumer NAME or --outbox", operator.ErrInvalid)
	case c.Outbox && (c.Seen != "" || c.AnySeen):
		return fmt.Errorf("%w: --seen is for a consumer's message", operator.ErrInvalid)
	case c.Outbox:
		return a.operate(func(o *operator.Operator) error {
			m, err := o.DropOutbox(a.ctx, c.ID, act)
			if err != nil {
				return err
			}
			return a.messageDone("dropped", &act, outboxMessageOf(&m), fmt.Sprintf("message %s for topic %s: nobody gets it, and those behind it go on", m.ID, m.Topic))
		})
	}
	if err := c.check(); err != nil {
		return err
	}
	act.Seen = c.Seen
	return a.operate(func(o *operator.Operator) error {
		m, err := o.Drop(a.ctx, c.Consumer, c.ID, act)
		if err != nil {
			return err
		}
		return a.messageDone("dropped", &act, parkedOf(&m), fmt.Sprintf("message %s, which was %s: consumer %s never handles it, and those behind it go on", m.ID, m.Seen(), m.Consumer))
	})
}

type messageRetryCommand struct{ messageFlags }

// Run is called by kong.
func (c *messageRetryCommand) Run(a *app) error {
	act, err := c.act()
	if err != nil {
		return err
	}
	return a.operate(func(o *operator.Operator) error {
		m, err := o.RetryOutbox(a.ctx, c.ID, act)
		if err != nil {
			return err
		}
		return a.messageDone("retried", &act, outboxMessageOf(&m), fmt.Sprintf("message %s for topic %s goes to the broker as soon as a relay runs", m.ID, m.Topic))
	})
}
