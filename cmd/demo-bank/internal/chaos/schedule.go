package chaos

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/paidonce/idempotency/internal/crashpoint"
)

// eventKind is a fault of the cluster, a proxy or a bank.
type eventKind string

const (
	// SIGKILL of a bank; its next life has a crash point.
	killBank eventKind = "bank-sigkill"
	// SIGQUIT to the postmaster, then a start on the same folder.
	crashPostmaster eventKind = "postgres-immediate"
	// SIGKILL of an idle or working backend: the cluster restarts itself.
	crashBackend eventKind = "backend-sigkill"
	// The same, while the backend's COMMIT is on the wire.
	crashCommitting eventKind = "backend-sigkill-at-commit"
	// pg_terminate_backend of working ones.
	terminateBackends eventKind = "terminate-backends"
	// Every conn of one bank to its database is cut.
	cutAll eventKind = "cut-all"
	// The same, and no new ones for a moment.
	refuse eventKind = "refuse-connections"
	// Nothing passes, but no side hangs up.
	pause eventKind = "pause"
	// A delay each way.
	latency eventKind = "latency"
	// A rate of a few kB/s.
	slowLink eventKind = "slow-link"
	// Another session holds rows for longer than lock_timeout.
	rowLocks eventKind = "row-locks"
	// A locked table: every conn of the pools waits.
	squeeze eventKind = "pool-squeeze"
	// Half-open COMMITs, and no other fault until the outcome of one is unknown.
	lull eventKind = "lull"
	// Locks taken in the other order.
	deadlock eventKind = "deadlock"
)

// commitKind is the fault of one COMMIT.
type commitKind string

const (
	cutBefore       commitKind = "cut-before"
	cutAfter        commitKind = "cut-after"
	silence         commitKind = "silence"
	lateCommit      commitKind = "late-commit"
	halfOpen        commitKind = "half-open"
	delayReply      commitKind = "delay-reply"
	terminateBefore commitKind = "terminate-before"
	terminateAfter  commitKind = "terminate-after"
	killCommitting  commitKind = "kill-bank"
	// The client hangs up while COMMIT is on its way. The COMMIT must not fail because of that.
	hangUpAtCommit commitKind = "hang-up"
)

// schedule holds the faults of a run. Only the seed decides them. The seed does not decide their
// effects: those depend on where each request is when the fault happens.
type schedule struct {
	events  []event
	commits []commitFault
	stops   []stop // of banks, with effects
}

// event is due when this many operations have finished.
type event struct {
	due    int64
	kind   eventKind
	bank   int           // the bank of the process or the proxy
	point  string        // crash point of the bank's next life
	nth    int           // the number of the pass at which the bank dies there
	length time.Duration // for faults that last
	amount int           // ms each way or of a call, bytes per second, backends, the first row, or percent
	with   eventKind     // another fault of the processor at the same time
}

// commitFault is due at the n-th COMMIT that carries a key, or at the first later one to which it
// can apply.
type commitFault struct {
	commit int64
	kind   commitKind
	delay  time.Duration
}

const (
	// commitsPerOperation is the minimum number of COMMITs with a key for each operation; the rest
	// are replays, copies and refusals. It spreads the faults of COMMITs over a run.
	commitsPerOperation = 0.20
	lateCommitDelay     = 2 * time.Second
)

// newSchedule draws the schedule of a profile.
func newSchedule(p profile, seed uint64, banks int) schedule {
	choice := rand.New(rand.NewPCG(seed, 0x5c4ed01e))
	var s schedule
	for _, kind := range slices.Sorted(maps.Keys(p.events)) { // in the same order each time
		n := p.events[kind]
		for i := range n {
			// Spread over the run, except its first and last moments.
			at := 0.03 + 0.92*(float64(i)+choice.Float64())/float64(n)
			e := event{due: int64(at * float64(p.operations)), kind: kind, bank: choice.IntN(banks)}
			e.draw(choice)
			s.events = append(s.events, e)
		}
	}
	slices.SortStableFunc(s.events, func(a, b event) int { return cmp.Compare(a.due, b.due) })
	s.armPoints(p.points, choice)

	gap := commitsPerOperation * float64(p.operations) / float64(max(1, p.commits))
	kinds := drawCommits(p, choice)
	for i, kind := range kinds {
		f := commitFault{commit: 1 + int64(gap*(float64(i)+choice.Float64())), kind: kind}
		switch kind {
		case lateCommit:
			f.delay = lateCommitDelay
		case delayReply:
			f.delay = between(choice, 50*time.Millisecond, 500*time.Millisecond)
		}
		s.commits = append(s.commits, f)
	}
	s.drawStops(p, choice)
	return s
}

// draw chooses the parameters of an event.
func (e *event) draw(choice *rand.Rand) {
	if e.kind.ofProcessor() {
		e.drawProcessor(choice)
		return
	}
	switch e.kind {
	case terminateBackends:
		e.amount = 1 + choice.IntN(4)
	case refuse:
		e.length = between(choice, 300*time.Millisecond, time.Second)
	case pause:
		e.length = between(choice, 300*time.Millisecond, 1200*time.Millisecond)
	case latency:
		e.length, e.amount = between(choice, time.Second, 2500*time.Millisecond), 20+choice.IntN(80)
	case slowLink:
		e.length, e.amount = between(choice, time.Second, 2*time.Second), 10_000
	case rowLocks:
		e.length, e.amount = between(choice, 1200*time.Millisecond, 2*time.Second), choice.IntN(accounts-lockedRows)
	case squeeze:
		e.length = between(choice, 1200*time.Millisecond, 2*time.Second)
	}
}

func between(choice *rand.Rand, least, most time.Duration) time.Duration {
	return (least + time.Duration(choice.Int64N(int64(most-least)))).Round(time.Millisecond)
}

// armPoints gives the crash points, all of them in turn, to the lives that follow the kills.
func (s *schedule) armPoints(points []string, choice *rand.Rand) {
	var turn []string
	for i := range s.events {
		e := &s.events[i]
		if e.kind != killBank || len(points) == 0 {
			continue
		}
		if len(turn) == 0 {
			turn = slices.Clone(points)
			choice.Shuffle(len(turn), func(a, b int) { turn[a], turn[b] = turn[b], turn[a] })
		}
		e.point, turn = turn[0], turn[1:]
		switch e.point {
		case crashpoint.Resolving:
			e.nth = 1
		case crashpoint.ReaperBatch, crashpoint.TakeOver, crashpoint.CompleterBatch:
			e.nth = 1 + choice.IntN(4)
		default:
			e.nth = 1 + choice.IntN(80)
			if slices.Contains(points, crashpoint.BeforeSend) { // with effects fewer requests reach each
				e.nth = 1 + e.nth/8
			}
		}
	}
}

// commitsOf returns the number of COMMITs that get this fault.
func (p profile) commitsOf(kind commitKind) int {
	total := 0
	for _, weight := range p.weights {
		total += weight
	}
	if p.weights[kind] == 0 {
		return 0
	}
	return max(2, p.commits*p.weights[kind]/total)
}

// drawCommits returns the kinds of all faults of COMMITs in random order: each by its share, and at
// least two of each.
func drawCommits(p profile, choice *rand.Rand) []commitKind {
	var kinds []commitKind
	for _, kind := range slices.Sorted(maps.Keys(p.weights)) {
		for range p.commitsOf(kind) {
			kinds = append(kinds, kind)
		}
	}
	choice.Shuffle(len(kinds), func(a, b int) { kinds[a], kinds[b] = kinds[b], kinds[a] })
	return kinds
}

// write prints the schedule, one line for each fault.
func (s schedule) write(w io.Writer) error {
	var b strings.Builder
	for _, e := range s.events {
		fmt.Fprintf(&b, "operation %8d  %s", e.due, e.kind)
		switch e.kind {
		case killBank:
			fmt.Fprintf(&b, " bank=%d", e.bank)
			if e.point != "" {
				fmt.Fprintf(&b, " next-life=%s:%d", e.point, e.nth)
			}
		case cutAll, refuse, pause, latency, slowLink:
			fmt.Fprintf(&b, " bank=%d", e.bank)
		}
		if e.length > 0 {
			fmt.Fprintf(&b, " for=%v", e.length)
		}
		switch e.kind {
		case terminateBackends:
			fmt.Fprintf(&b, " backends=%d", e.amount)
		case latency:
			fmt.Fprintf(&b, " each-way=%dms", e.amount)
		case slowLink:
			fmt.Fprintf(&b, " bytes-per-second=%d", e.amount)
		case rowLocks:
			fmt.Fprintf(&b, " accounts=%d-%d", e.amount, e.amount+lockedRows-1)
		case slowProcessor:
			fmt.Fprintf(&b, " delay=%dms", e.amount)
		case loseRequests, loseReplies, errorsAfter, errorsBefore, lateProcessor, sameErrors:
			fmt.Fprintf(&b, " share=%d%%", e.amount)
		}
		if e.with != "" {
			fmt.Fprintf(&b, " with=%s", e.with)
		}
		b.WriteByte('\n')
	}
	for _, f := range s.commits {
		fmt.Fprintf(&b, "commit    %8d  %s", f.commit, f.kind)
		if f.delay > 0 {
			fmt.Fprintf(&b, " delay=%v", f.delay)
		}
		b.WriteByte('\n')
	}
	for _, one := range s.stops {
		fmt.Fprintf(&b, "%s's    %8d  stop\n", one.kind, one.commit)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// hash returns a name for the schedule.
func (s schedule) hash() string {
	h := sha256.New()
	_ = s.write(h) // a hash accepts everything
	return hex.EncodeToString(h.Sum(nil)[:8])
}

// WriteSchedule prints the schedule of a run with this config, and runs nothing. The config's seed
// must be set.
func WriteSchedule(w io.Writer, config Config) error {
	if err := config.Validate(); err != nil {
		return err
	}
	config = config.full()
	s := newSchedule(config.profile(), config.Seed, config.Banks)
	if _, err := fmt.Fprintf(w, "profile %s, seed %d, %d operations, %d banks: schedule %s\n", config.Profile, config.Seed, config.Operations, config.Banks, s.hash()); err != nil {
		return err
	}
	return s.write(w)
}
