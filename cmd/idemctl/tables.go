package main

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/term"

	"github.com/paidonce/idempotency/cmd/internal/terminal"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

type migrateCommands struct {
	Up     upCommand     `cmd:"" help:"Apply the missing migrations. Services need not stop."`
	Down   downCommand   `cmd:"" help:"Undo down to a version. At 0 every record is lost, and each retry RUNS AGAIN."`
	Status statusCommand `cmd:"" help:"Show the current and the latest version."`
}

type (
	upCommand   struct{}
	downCommand struct {
		To  *uint `required:"" placeholder:"VERSION" help:"Version to go back to; services need at least ${servingVersion}."`
		Yes bool  `short:"y" help:"Required: the data of undone migrations is lost."`
	}
	statusCommand struct{}
)

type versionJSON struct {
	Version uint `json:"version"`
	Latest  uint `json:"latest"`
	Serving uint `json:"serving"` // the lowest version that services accept
	Dirty   bool `json:"dirty"`
}

// Run is called by kong.
func (c *upCommand) Run(a *app) error {
	return a.migrated(func(store *postgres.Store) error { return migrations.Up(a.ctx, store, a.migrateOptions()) })
}

// Run is called by kong.
func (c *downCommand) Run(a *app) error {
	if !c.Yes {
		return refused{errors.New("--yes says that what is undone may be lost")}
	}
	return a.migrated(func(store *postgres.Store) error {
		return migrations.DownTo(a.ctx, store, *c.To, a.migrateOptions())
	})
}

// Run is called by kong.
func (c *statusCommand) Run(a *app) error {
	return a.migrated(func(*postgres.Store) error { return nil })
}

// migrateOptions print on stderr the sessions that a migration waits for, each once.
func (a *app) migrateOptions() *migrations.Options {
	told := map[string]bool{}
	return &migrations.Options{Waiting: func(w migrations.Waiting) {
		if len(w.Blockers) == 0 && w.Tries > 1 && !told[w.What] {
			told[w.What] = true
			fmt.Fprintf(a.stderr, "%s waits for a lock; it can't be seen who holds it (GRANT pg_monitor)\n", w.What)
		}
		for _, blocker := range w.Blockers {
			if name := fmt.Sprint(w.What, blocker.PID); !told[name] {
				told[name] = true
				fmt.Fprintf(a.stderr, "%s waits for %s; requests go on, and Ctrl-C undoes what was begun\n", w.What, terminal.Clean(blocker.String()))
			}
		}
	}}
}

// migrated calls do, and then prints the version of the tables.
func (a *app) migrated(do func(*postgres.Store) error) error {
	return a.connect(func(store *postgres.Store) error {
		if err := do(store); err != nil {
			return err
		}
		version, dirty, err := operator.New(store, nil).Version(a.ctx)
		if err != nil {
			return err
		}
		if a.cli.JSON {
			return a.printJSON(versionJSON{version, migrations.Latest, postgres.SchemaVersion, dirty})
		}
		text := fmt.Sprintf("version %d of %d", version, migrations.Latest)
		switch {
		case dirty:
			text += ": its migration failed in the middle. idemctl migrate up says how to mend it"
		case version < postgres.SchemaVersion:
			text += ": services can't work with it. idemctl migrate up"
		case version < migrations.Latest:
			text += ": services work; expire, delete and the history don't. idemctl migrate up"
		case version > migrations.Latest:
			text += ": of a later release than this program"
		}
		return a.printf("%s\n", text)
	})
}

type doctorCommand struct{}

type findingJSON struct {
	Check  string `json:"check"`
	Level  string `json:"level"`
	What   string `json:"what"`
	Remedy string `json:"remedy,omitempty"`
}

// Run is called by kong.
func (c *doctorCommand) Run(a *app) error {
	return a.operate(func(o *operator.Operator) error {
		findings := o.Doctor(a.ctx)
		worst := operator.LevelOK
		out := struct {
			Verdict  string        `json:"verdict"`
			Findings []findingJSON `json:"findings"`
		}{}
		var lines []string
		for _, f := range findings {
			if f.Level == operator.LevelFail || f.Level == operator.LevelWarn && worst == operator.LevelOK {
				worst = f.Level
			}
			out.Findings = append(out.Findings, findingJSON{f.Check, string(f.Level), f.What, f.Remedy})
			lines = append(lines, fmt.Sprintf("%s\t%s\t%s", f.Level, f.Check, terminal.Clean(f.What)))
			if f.Remedy != "" {
				lines = append(lines, "\t\t-> "+terminal.Clean(f.Remedy))
			}
		}
		out.Verdict = string(worst)
		var err error
		if a.cli.JSON {
			err = a.printJSON(out)
		} else {
			err = a.table(append(lines, "", "verdict\t"+string(worst)))
		}
		if err == nil && worst == operator.LevelFail {
			err = errFindings
		}
		return err
	})
}

type statsCommand struct{}

type countJSON struct {
	Rows      int64 `json:"rows"`
	Estimated bool  `json:"estimated"`
}

type statsJSON struct {
	At              time.Time    `json:"at"`
	Live            countJSON    `json:"live"`
	Expired         countJSON    `json:"expired"`
	OldestCreated   *time.Time   `json:"oldest_created,omitempty"`
	OldestExpiredMS int64        `json:"oldest_expired_ms"`
	Open            int          `json:"open"`
	Parked          int          `json:"parked"`
	OldestOpenMS    int64        `json:"oldest_open_ms"`
	TableBytes      int64        `json:"table_bytes"`
	IndexBytes      int64        `json:"index_bytes"`
	ToastBytes      int64        `json:"toast_bytes"`
	AuditBytes      int64        `json:"audit_bytes"`
	EventsBytes     int64        `json:"events_bytes"`
	Inserted        int64        `json:"inserted"`
	Deleted         int64        `json:"deleted"`
	DeadRows        int64        `json:"dead_rows"`
	LastVacuum      *time.Time   `json:"last_vacuum,omitempty"`
	LastAnalyze     *time.Time   `json:"last_analyze,omitempty"`
	InFlight        int          `json:"in_flight"`
	Holders         []holderJSON `json:"holders"`

	InsertedPerSecond *float64 `json:"inserted_per_second,omitempty"` // only of top
	DeletedPerSecond  *float64 `json:"deleted_per_second,omitempty"`
}

func statsOf(s *operator.Stats) statsJSON {
	j := statsJSON{
		At: s.Now, Live: countJSON(s.Live), Expired: countJSON(s.Expired), OldestExpiredMS: s.OldestExpired.Milliseconds(),
		Open: s.Open, Parked: s.Parked, OldestOpenMS: s.OldestOpen.Milliseconds(),
		TableBytes: s.TableBytes, IndexBytes: s.IndexBytes, ToastBytes: s.ToastBytes, AuditBytes: s.AuditBytes, EventsBytes: s.EventsBytes,
		Inserted: s.Inserted, Deleted: s.Deleted, DeadRows: s.DeadRows, InFlight: s.InFlight, Holders: []holderJSON{},
	}
	for to, at := range map[**time.Time]*time.Time{&j.OldestCreated: &s.OldestCreated, &j.LastVacuum: &s.LastVacuum, &j.LastAnalyze: &s.LastAnalyze} {
		if !at.IsZero() {
			*to = at
		}
	}
	for i := range s.Holders {
		j.Holders = append(j.Holders, *holderOf(&s.Holders[i]))
	}
	return j
}

// Run is called by kong.
func (c *statsCommand) Run(a *app) error {
	return a.operate(func(o *operator.Operator) error {
		s, err := o.Stats(a.ctx)
		if err != nil {
			return err
		}
		if a.cli.JSON {
			return a.printJSON(statsOf(&s))
		}
		return a.table(statsLines(&s))
	})
}

func countText(c operator.Count) string {
	if c.Estimated {
		return fmt.Sprintf("about %d (estimated)", c.Rows)
	}
	return fmt.Sprint(c.Rows)
}

func statsLines(s *operator.Stats) []string {
	behind := "-"
	if s.OldestExpired > 0 {
		behind = s.OldestExpired.Round(time.Second).String()
	}
	lines := []string{
		"live\t" + countText(s.Live),
		"expired\t" + countText(s.Expired),
		"reaper behind\t" + behind,
		fmt.Sprintf("open\t%d, %d of them parked, the oldest %v old", s.Open, s.Parked, s.OldestOpen.Round(time.Second)),
		"oldest\t" + stamp(s.OldestCreated),
		"table\t" + sizeText(s.TableBytes),
		"index\t" + sizeText(s.IndexBytes),
		"large bodies\t" + sizeText(s.ToastBytes),
		"audit, history\t" + sizeText(s.AuditBytes) + ", " + sizeText(s.EventsBytes),
		fmt.Sprintf("dead rows\t%d", s.DeadRows),
		"last vacuum\t" + stamp(s.LastVacuum),
		"last analyze\t" + stamp(s.LastAnalyze),
		fmt.Sprintf("in flight\t%d", s.InFlight),
	}
	for i := range s.Holders {
		lines = append(lines, "\t"+holderText(&s.Holders[i]))
	}
	return lines
}

type gcCommand struct {
	EventsAge time.Duration `placeholder:"DURATION" default:"${eventsAge}" help:"Time that the history of requests is kept; 0s keeps all of it. (default: ${default})"`
	AuditAge  time.Duration `placeholder:"DURATION" default:"0s" help:"Time that the acts of operators are kept; 0s keeps all of them. (default: ${default})"`
}

// Run is called by kong.
func (c *gcCommand) Run(a *app) error {
	if c.EventsAge < 0 || c.AuditAge < 0 {
		return fmt.Errorf("%w: --events-age and --audit-age are not negative", operator.ErrInvalid)
	}
	options := &operator.GCOptions{EventsAgeMax: c.EventsAge, AuditAgeMax: c.AuditAge}
	if c.EventsAge == 0 {
		options.EventsAgeMax = -1
	}
	shown := isTerminal(a.stderr)
	if shown {
		options.Progress = func(p operator.GCProgress) {
			fmt.Fprintf(a.stderr, "\r\x1b[K%s: %d of %d pages, %d deleted", p.Table, p.Pages, p.Of, p.Deleted)
		}
	}
	return a.operate(func(o *operator.Operator) error {
		started := time.Now()
		result, err := o.GC(a.ctx, options)
		took := time.Since(started).Round(time.Millisecond)
		if shown {
			fmt.Fprint(a.stderr, "\r\x1b[K")
		}
		var printed error // a partial result is printed too
		switch {
		case a.cli.JSON:
			printed = a.printJSON(struct {
				Records    int64 `json:"records"`
				Events     int64 `json:"events"`
				Audit      int64 `json:"audit"`
				DurationMS int64 `json:"duration_ms"`
			}{result.Records, result.Events, result.Audit, took.Milliseconds()})
		case err == nil || result != (operator.GCResult{}):
			printed = a.printf("deleted %s, %s of history, %d of the audit, in %v\n",
				counted(result.Records, "record"), counted(result.Events, "row"), result.Audit, took)
		}
		return errors.Join(err, printed)
	})
}

type topCommand struct {
	Interval time.Duration `placeholder:"DURATION" default:"2s" help:"Interval between looks, at least 500ms. (default: ${default})"`
	Count    int           `placeholder:"N" help:"End after this many looks; 0 continues until q or Ctrl-C."`
}

const topIntervalMin = 500 * time.Millisecond

// Run is called by kong.
func (c *topCommand) Run(a *app) error {
	if c.Interval < topIntervalMin || c.Count < 0 {
		return fmt.Errorf("%w: --interval is at least %v, and --count is positive", operator.ErrInvalid, topIntervalMin)
	}
	return a.operate(func(o *operator.Operator) error {
		screen := !a.cli.JSON && isTerminal(a.out)
		quit, restore := a.quit(screen)
		defer restore()
		var before operator.Stats
		for n := 1; ; n++ {
			s, err := o.Stats(a.ctx)
			if err != nil {
				return err
			}
			if err := c.show(a, &s, &before, screen); err != nil {
				return err
			}
			if before = s; n == c.Count {
				return nil
			}
			select {
			case <-quit:
				return nil
			case <-a.ctx.Done():
				return nil // the user ended it
			case <-time.After(c.Interval):
			}
		}
	})
}

// quit returns a channel that is closed if the user presses q or Ctrl-C at the terminal, and a
// function that restores the terminal.
func (a *app) quit(screen bool) (quit <-chan struct{}, restore func()) {
	pressed := make(chan struct{})
	file, ok := a.stdin.(interface{ Fd() uintptr })
	if !screen || !ok || !term.IsTerminal(int(file.Fd())) {
		return pressed, func() {}
	}
	before, err := term.MakeRaw(int(file.Fd()))
	if err != nil {
		return pressed, func() {} // Ctrl-C still ends it
	}
	go func() {
		one := make([]byte, 1)
		for {
			if n, err := a.stdin.Read(one); err != nil || n == 1 && (one[0] == 'q' || one[0] == 'Q' || one[0] == 3) {
				close(pressed)
				return
			}
		}
	}()
	return pressed, func() {
		_ = term.Restore(int(file.Fd()), before) // the program ends
		_ = a.printf("\n")
	}
}

// rates returns rows per second since the previous look. They are nil at the first look.
func rates(s, before *operator.Stats) (inserted, deleted *float64) {
	elapsed := s.Now.Sub(before.Now).Seconds()
	if before.Now.IsZero() || elapsed <= 0 {
		return nil, nil
	}
	i, d := max(float64(s.Inserted-before.Inserted)/elapsed, 0), max(float64(s.Deleted-before.Deleted)/elapsed, 0)
	return &i, &d
}

func (c *topCommand) show(a *app, s, before *operator.Stats, screen bool) error {
	inserted, deleted := rates(s, before)
	if a.cli.JSON {
		j := statsOf(s)
		j.InsertedPerSecond, j.DeletedPerSecond = inserted, deleted
		return a.printJSON(j)
	}
	rate := func(r *float64) string {
		if r == nil {
			return "-"
		}
		return fmt.Sprintf("%.1f/s", *r)
	}
	line := fmt.Sprintf("%s  in flight %d  recorded %s  deleted %s  live %s  expired %s  table %s",
		stamp(s.Now), s.InFlight, rate(inserted), rate(deleted), countText(s.Live), countText(s.Expired), sizeText(s.TableBytes+s.IndexBytes+s.ToastBytes))
	if !screen {
		return a.printf("%s\n", line)
	}
	lines := []string{line, ""}
	for i := range s.Holders {
		if i == topHoldersMax {
			lines = append(lines, fmt.Sprintf("... and %d more", s.InFlight-topHoldersMax))
			break
		}
		lines = append(lines, holderText(&s.Holders[i]))
	}
	lines = append(lines, "", "q ends")
	// In raw mode a line needs a carriage return.
	return a.printf("\x1b[H\x1b[2J%s\r\n", strings.Join(lines, "\r\n"))
}

// topHoldersMax is the number of attempts that fit on a screen.
const topHoldersMax = 15
