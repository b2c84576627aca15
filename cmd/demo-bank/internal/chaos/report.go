package chaos

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/check"
	"github.com/paidonce/idempotency/cmd/internal/terminal"
)

// Count is the number of times that something happened. Fewer than Least is a failure of the run: a
// fault that never hit tested nothing.
type Count struct {
	Name  string `json:"name"`
	Count int64  `json:"count"`
	Least int64  `json:"least,omitempty"`
}

// Report holds the findings of a run. Its JSON is one object.
type Report struct {
	Verdict string   `json:"verdict"` // ok or broken
	Broken  []string `json:"broken"`  // checks that found something, and counts that are too low
	Kept    string   `json:"kept,omitempty"`

	Profile         string  `json:"profile"`
	Seed            uint64  `json:"seed"`
	Schedule        string  `json:"schedule"` // its hash: the same for the same seed and options
	Operations      int     `json:"operations"`
	Clients         int     `json:"clients"`
	Banks           int     `json:"banks"`
	Wait            bool    `json:"wait"`
	WithEffects     bool    `json:"with_effects,omitempty"`
	DurationMaxSecs float64 `json:"duration_max_seconds"`

	Versions terminal.Versions `json:"versions"`

	Phase       string  `json:"phase"` // the last one
	Seconds     float64 `json:"seconds"`
	LoadSeconds float64 `json:"load_seconds"`
	// SettleSeconds is the time from the last fault to the last first answer of a key of the load.
	SettleSeconds float64 `json:"settle_seconds"`

	Requests     int64 `json:"requests"`      // of the load and the settling
	FinalReplays int64 `json:"final_replays"` // at least one for each key that was not given up
	Unsent       int64 `json:"unsent"`        // tries that found no bank
	Keys         int   `json:"keys"`
	GivenUp      int   `json:"given_up"`
	KeyedCommits int64 `json:"keyed_commits"` // that passed the proxies

	Faults       []Count `json:"faults"`
	CommitFaults []Count `json:"commit_faults"`
	CrashPoints  []Count `json:"crash_points"`
	Clientele    []Count `json:"client_faults"` // the clients' actions, some of them wrong
	Answers      []Count `json:"answers"`
	Totals       []Count `json:"totals"`

	Unknown int64 `json:"unknown"`
	// The unknown answers of keys with a COMMIT that was late, was left open or lost its backend.
	UnknownExempt int64   `json:"unknown_exempt"`
	UnknownRate   float64 `json:"unknown_rate"` // of the others, among all other answers

	CommitFailures    int   `json:"commit_failures"`     // as counted by the banks
	CommitFailuresMax int   `json:"commit_failures_max"` // those that have a cause
	Planted           int64 `json:"planted"`             // expired records
	PlantedReplays    int64 `json:"planted_replays"`     // of keys reused before they were reaped
	Reaped            int64 `json:"reaped"`              // as counted by the banks

	Effects *EffectsReport `json:"effects,omitempty"` // of a run with effects

	Checks []check.Result `json:"checks"`

	P50MS float64 `json:"p50_ms"` // of replies
	P99MS float64 `json:"p99_ms"`
	MaxMS float64 `json:"max_ms"`
}

// OK reports whether every promise held, and everything was tried.
func (r *Report) OK() bool { return len(r.Broken) == 0 }

// Found returns the names of the checks that found an error, even if the run lacks other things.
func (r *Report) Found() []string {
	var names []string
	for _, c := range r.Checks {
		if !c.OK() {
			names = append(names, c.Name)
		}
	}
	return names
}

// report sums the run up.
func (r *run) report() *Report {
	t := &r.tally
	keys := r.keys.all()
	p := &Report{
		Profile: r.config.Profile, Seed: r.config.Seed, Schedule: r.schedule.hash(), Operations: r.config.Operations,
		Clients: r.config.Clients, Banks: r.config.Banks, Wait: r.config.Wait, WithEffects: r.config.Effects, DurationMaxSecs: r.config.DurationMax.Seconds(),
		Versions: terminal.NewVersions(r.cluster.version()),
		Phase:    r.phase(), Seconds: r.clock().Seconds(), LoadSeconds: r.loadEnded.Seconds(), SettleSeconds: r.settledAfter().Seconds(),
		Requests: t.finished.Load(), FinalReplays: t.replays.Load(), Unsent: t.unsent.Load(), Keys: len(keys), KeyedCommits: r.commits.seen.Load(),
		Faults:       t.faults.list(slices.Sorted(namesOf(r.profile.events))),
		CommitFaults: t.commitFaults.list(slices.Sorted(namesOf(r.profile.weights))),
		CrashPoints:  t.crashPoints.list(r.profile.points),
		Clientele:    t.clientFaults.list(r.profile.clientele()),
		Answers:      t.answers.list(r.profile.answers()),
		Totals: []Count{
			{"kills of a bank", t.kills.Load(), int64(r.profile.killsMin)},
			{"crashes of PostgreSQL", t.crashes.Load(), int64(r.profile.crashesMin)},
			{"faults of a COMMIT", t.commitFaults.total(), int64(r.profile.commitsMin)},
			{"requests", t.finished.Load(), int64(r.config.Operations)},
		},
		Unknown: t.unknown.Load(), UnknownExempt: t.unknownExempt.Load(),
		Planted: r.planted.expired.Load() + r.planted.reused.Load(), PlantedReplays: t.plantedReplays, Reaped: r.banks.sum(metricReaped),
		CommitFailuresMax: r.causesMax, Checks: r.checks, Effects: r.effectsReport(),
		P50MS: t.quantile(50), P99MS: t.quantile(99), MaxMS: t.quantile(100),
	}
	for _, k := range keys {
		if k.abandoned() {
			p.GivenUp++
		}
	}
	if answers := t.replies.Load() - p.UnknownExempt; answers > 0 {
		p.UnknownRate = float64(p.Unknown-p.UnknownExempt) / float64(answers)
	}
	if p.Checks == nil { // the run ended before its checks
		p.Checks = r.ownChecks()
	}
	for _, c := range p.Checks {
		if c.Name == causesName {
			p.CommitFailures = c.Seen
		}
	}
	p.judge()
	return p
}

// judge decides the verdict.
func (p *Report) judge() {
	p.Broken, p.Verdict = []string{}, "ok"
	for _, c := range p.Checks {
		if !c.OK() {
			p.Broken = append(p.Broken, fmt.Sprintf("%s: %s (%d)", c.Name, c.Title, c.Count))
		}
		if c.Seen == 0 && !slices.Contains(maySeeNothing, c.Name) {
			p.Broken = append(p.Broken, fmt.Sprintf("%s: nothing was looked at", c.Name))
		}
	}
	lists := [][]Count{p.Faults, p.CommitFaults, p.CrashPoints, p.Clientele, p.Answers, p.Totals}
	if p.Effects != nil {
		lists = append(lists, p.Effects.Stops)
	}
	for _, list := range lists {
		for _, c := range list {
			if c.Count < c.Least {
				p.Broken = append(p.Broken, fmt.Sprintf("%s: %d, and at least %d were wanted", c.Name, c.Count, c.Least))
			}
		}
	}
	if p.Phase != phaseLast {
		p.Broken = append(p.Broken, fmt.Sprintf("the run ended in the phase %q", p.Phase))
	}
	if !p.OK() {
		p.Verdict = "broken"
	}
}

// maySeeNothing are checks that may see nothing in a run with few faults.
var maySeeNothing = []string{"run", causesName}

// clientele returns the names of the actions of a profile's clients.
func (p profile) clientele() []string {
	names := []string{"copies at once", "later copy"}
	s := p.shares
	for _, one := range []struct {
		share int
		name  string
	}{
		{s.changed, "changed body"}, {s.twin, "key of another tenant"}, {s.cut, "connection cut"}, {s.hangUp, "hang-up"},
		{s.halfSent, "half-sent body"}, {s.slow, "slow body"}, {s.declined, "declined request"}, {s.order, "order"},
		{s.account, "account"}, {s.reused, "expired key used again"},
	} {
		if one.share > 0 {
			names = append(names, one.name)
		}
	}
	if p.effects {
		names = append(names, "top-up", "payout", "receipt", "left before the end", "told to look later")
	}
	if p.giveUp > 0 {
		names = append(names, "given up")
	}
	return names
}

// answers returns the kinds of answers that a profile provokes.
func (p profile) answers() []string {
	names := []string{"executed", "replayed", "in-progress", "not-executed", "none"}
	if p.shares.changed > 0 {
		names = append(names, "mismatch")
	}
	if p.events[lull] > 0 {
		names = append(names, "unknown")
	}
	return names
}

func namesOf[K ~string](m map[K]int) func(func(string) bool) {
	return func(yield func(string) bool) {
		for name := range maps.Keys(m) {
			if !yield(string(name)) {
				return
			}
		}
	}
}

// WriteJSON writes the report as one JSON object.
func (p *Report) WriteJSON(w io.Writer) error {
	return terminal.WriteJSON(w, p, "")
}

// WriteText writes the report for people.
func (p *Report) WriteText(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "chaos: profile %s, seed %d, schedule %s\n", p.Profile, p.Seed, p.Schedule)
	fmt.Fprintf(&b, "options: %d operations, %d clients, %d banks, at most %.0f s", p.Operations, p.Clients, p.Banks, p.DurationMaxSecs)
	if p.Wait {
		fmt.Fprint(&b, ", duplicates wait")
	}
	if p.WithEffects {
		fmt.Fprint(&b, ", with effects")
	}
	fmt.Fprintln(&b)
	fmt.Fprint(&b, p.Versions)
	fmt.Fprintf(&b, "\ntime: %.1f s; load until %.1f s; every key had its answer %.1f s after the last fault\n", p.Seconds, p.LoadSeconds, p.SettleSeconds)
	fmt.Fprintf(&b, "sent: %d requests for %d keys, %d of them given up; %d in the final replay; %d tries found no bank\n",
		p.Requests, p.Keys, p.GivenUp, p.FinalReplays, p.Unsent)
	fmt.Fprintf(&b, "latency of replies: p50 %.1f ms, p99 %.1f ms, max %.1f ms\n", p.P50MS, p.P99MS, p.MaxMS)

	table := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	sections := []struct {
		name   string
		counts []Count
	}{
		{"totals", p.Totals}, {"faults", p.Faults}, {"faults of a COMMIT", p.CommitFaults},
		{"crash points", p.CrashPoints}, {"clients", p.Clientele}, {"answers", p.Answers},
	}
	if p.Effects != nil {
		sections = append(sections, struct {
			name   string
			counts []Count
		}{"stops", p.Effects.Stops})
	}
	for _, section := range sections {
		fmt.Fprintf(table, "\n%s\n", section.name)
		for _, c := range section.counts {
			note := ""
			if c.Count < c.Least {
				note = fmt.Sprintf("  at least %d were wanted", c.Least)
			}
			fmt.Fprintf(table, "%d\t  %s%s\n", c.Count, c.Name, note)
		}
	}
	if err := table.Flush(); err != nil {
		return err
	}
	if p.Effects != nil {
		p.Effects.write(&b)
	}
	fmt.Fprintf(&b, "\nunknown: %d answers, %d of them after a COMMIT that was late, left open or its backend ended; %.3f %% of the others\n", p.Unknown, p.UnknownExempt, 100*p.UnknownRate)
	fmt.Fprintf(&b, "COMMITs: %d with a key; %d failed, %d were broken at most\n", p.KeyedCommits, p.CommitFailures, p.CommitFailuresMax)
	fmt.Fprintf(&b, "expired records: %d planted, %d replayed before the reaper came, %d reaped\n\n", p.Planted, p.PlantedReplays, p.Reaped)

	table = tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, c := range p.Checks {
		verdict := "ok"
		if !c.OK() {
			verdict = fmt.Sprintf("BROKEN %d times", c.Count)
		}
		fmt.Fprintf(table, "%s\t%s\t%d looked at\t%s\n", c.Name, verdict, c.Seen, c.Title)
		for _, example := range c.Examples {
			fmt.Fprintf(table, "\t  %s\n", terminal.Clean(example))
		}
	}
	if err := table.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(&b, "\n")
	for _, broken := range p.Broken {
		fmt.Fprintf(&b, "broken: %s\n", terminal.Clean(broken))
	}
	if p.Kept != "" {
		fmt.Fprintf(&b, "kept: %s\n", p.Kept)
	}
	fmt.Fprintf(&b, "verdict: %s\n", p.Verdict)
	_, err := io.WriteString(w, b.String())
	return err
}
