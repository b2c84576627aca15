package chaos

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/check"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/events"
)

// run is the state of one run.
type run struct {
	config   Config
	profile  profile
	schedule schedule
	started  time.Time
	dir      string // logs, and the cluster's data

	cluster *cluster
	broker  *events.Broker // of all banks' messages
	brokers string         // its address
	banks   *banks
	commits *commits
	keys    *ring
	planted *planter
	clients []*client
	working sync.WaitGroup // the clients
	later   queue

	// Of a run with effects.
	processor *processor
	gateway   *gateway
	directed  *directed
	closing   chan struct{}  // closed when the run ends
	stopped   sync.WaitGroup // banks that are stopped
	left      left

	tally      tally
	findings   findings // wrongs of the run itself
	unexpected findings // answers that no good request gets
	messages   findings // messages that were lost, or handled twice

	diary      *os.File     // the faults with their times, for readers of a kept folder
	phaseName  atomic.Value // of string
	calm       sync.RWMutex // held by a lull exclusively, and by all other events together
	eventsLeft atomic.Int64
	loadOver   atomic.Bool
	healed     atomic.Bool
	loadEnded  time.Duration
	lastFault  atomic.Int64 // nanoseconds of the run's clock
	lastAnswer atomic.Int64 // the same; the last first answer of a key of the load

	before, after check.Resources
	money         watched
	handled       int // messages, by both consumers together
	causesMax     int // maximum number of COMMITs that were made to fail
	checks        []check.Result
}

func newRun(config Config) (*run, error) {
	dir, err := os.MkdirTemp("", "demo-bank-chaos-")
	if err != nil {
		return nil, fmt.Errorf("make a folder for the run: %w", err)
	}
	if err := os.Chmod(dir, 0o755); err != nil { // PostgreSQL's account passes through
		return nil, errors.Join(fmt.Errorf("make a folder for the run: %w", err), os.RemoveAll(dir))
	}
	var id [4]byte
	_, _ = rand.Read(id[:]) // never fails
	diary, err := os.Create(filepath.Join(dir, "chaos.log"))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make a folder for the run: %w", err), os.RemoveAll(dir))
	}
	r := &run{diary: diary, config: config, profile: config.profile(), closing: make(chan struct{}), started: time.Now(), dir: dir, tally: newTally()}
	r.schedule = newSchedule(r.profile, config.Seed, config.Banks)
	r.eventsLeft.Store(int64(len(r.schedule.events)))
	r.keys = newRing(config.Seed, r.profile.shares, hex.EncodeToString(id[:]))
	r.commits = newCommits(r)
	r.cluster = newCluster(r, filepath.Join(dir, "postgres"))
	if r.broker, err = events.Start("", 0, "", slog.New(slog.DiscardHandler)); err != nil {
		return nil, errors.Join(err, diary.Close(), os.RemoveAll(dir))
	}
	r.brokers = strings.Join(r.broker.Addresses(), ",")
	r.banks = newBanks(r)
	r.planted = &planter{owner: r}
	r.processor, r.gateway, r.directed = newProcessor(r), newGateway(r), newDirected(r)
	return r, nil
}

// close ends everything that still runs, and removes the run's folder or keeps it.
func (r *run) close(remove bool) error {
	r.loadOver.Store(true)
	close(r.closing)
	r.working.Wait() // their context has ended
	r.stopped.Wait()
	r.directed.played.Wait()
	for _, c := range r.clients {
		c.close()
	}
	r.planted.session.close()
	err := r.banks.close()
	r.broker.Close()
	r.gateway.close()
	err = errors.Join(err, r.processor.close(), r.cluster.close(), r.diary.Close())
	if !remove {
		return err
	}
	if removeErr := os.RemoveAll(r.dir); removeErr != nil {
		err = errors.Join(err, fmt.Errorf("remove the run's folder: %w", removeErr))
	}
	return err
}

// clock returns the time since the start of the run. It is never 0, which means no time at all.
func (r *run) clock() time.Duration { return max(1, time.Since(r.started)) }

func (r *run) enter(phase string) {
	r.phaseName.Store(phase)
	r.note("%s", phase)
}

// note writes a line into the run's diary.
func (r *run) note(format string, args ...any) {
	// An error does not matter: the diary only helps.
	_, _ = fmt.Fprintf(r.diary, "%9.3f %6d  %s\n", r.clock().Seconds(), r.tally.finished.Load(), fmt.Sprintf(format, args...))
}

func (r *run) phase() string {
	name, _ := r.phaseName.Load().(string)
	return name
}

// finished counts an operation of the load.
func (r *run) finished(what result) {
	if what != resultUnsent {
		r.tally.finished.Add(1)
	}
}

// noteFault records the time of the last fault. It is not called for the faults of scripts, which
// check their own answers.
func (r *run) noteFault() { r.lastFault.Store(int64(r.clock())) }

// noteAnswer records the time at which a key of the load got its first answer.
func (r *run) noteAnswer() { r.lastAnswer.Store(int64(r.clock())) }

// settledAfter returns the time from the last fault to the last first answer of a key of the load,
// or 0 if all keys had theirs before the fault.
func (r *run) settledAfter() time.Duration {
	return max(0, time.Duration(r.lastAnswer.Load()-r.lastFault.Load()))
}

// findings counts errors and keeps the first as examples. The zero value is ready. It is safe for
// concurrent use.
type findings struct {
	mu       sync.Mutex
	count    int
	examples []string
}

func (f *findings) add(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.count++
	if len(f.examples) < check.ExamplesMax {
		f.examples = append(f.examples, fmt.Sprintf(format, args...))
	}
}

// result returns the findings as the result of a check. seen is the number of things that were
// checked.
func (f *findings) result(name, title string, seen int) check.Result {
	f.mu.Lock()
	defer f.mu.Unlock()
	return check.Result{Name: name, Title: title, Seen: seen, Count: f.count, Examples: append([]string{}, f.examples...)}
}
