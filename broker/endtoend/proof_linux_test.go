package endtoend_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/kafkaserver"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/storage/postgres"
)

// sizeVariable makes the proof whole if it is "full".
const sizeVariable = "PAIDONCE_ENDTOEND"

const (
	processes = 3

	proofMax     = 30 * time.Minute
	conditionMax = 3 * time.Minute // for a condition that comes within seconds
	pollInterval = 10 * time.Millisecond
	// batchWaitMax bounds the wait of a fault for a batch that it can hit. Without one it hits a
	// process that has partitions and nothing to do.
	batchWaitMax = 2 * time.Second
)

// planned returns the plan of a proof. Each process is paused or killed in every round, so a whole
// proof has 20 pauses and 40 kills.
func planned(full bool) plan {
	if full {
		return plan{Messages: 20_000, Twins: 1_000, Keys: 97, Rounds: 20}
	}
	return plan{Messages: 2_100, Twins: 105, Keys: 97, Rounds: 7}
}

// The minimum of faults in a proof. One with fewer proves nothing, and fails.
const (
	processFaultsMin   = 20 // pauses and kills
	brokerCrashesMin   = 2
	databaseCrashesMin = 2
)

// faultsMade are the faults that really happened.
type faultsMade struct {
	Kills               int `json:"kills"` // -9, of a process that had partitions
	KillsInBatch        int `json:"kills_in_a_batch"`
	Pauses              int `json:"pauses"` // past the session, with others at its partitions when it went on
	PausesInTransaction int `json:"pauses_in_a_transaction"`
	BrokerCrashes       int `json:"broker_crashes"`
	DatabaseCrashes     int `json:"database_crashes"`
}

// enough returns the faults that are missing.
func (f *faultsMade) enough(plan *plan, twins int, messages int64) (wrong []string) {
	for _, c := range []struct {
		n, least int
		what     string
	}{
		{f.Pauses, plan.Rounds, "pauses past the session"}, {f.Kills, 2 * plan.Rounds, "kills"}, {f.Pauses + f.Kills, processFaultsMin, "pauses and kills"},
		{f.BrokerCrashes, brokerCrashesMin, "crashes of the broker"}, {f.DatabaseCrashes, databaseCrashesMin, "crashes of PostgreSQL"},
		{twins, plan.Twins, "messages that were published twice"}, {int(messages), plan.Messages + plan.Twins, "messages at the broker"},
	} {
		if c.n < c.least {
			wrong = append(wrong, fmt.Sprintf("it proves nothing: %d %s, want %d", c.n, c.what, c.least))
		}
	}
	return wrong
}

// Without enough faults a proof proves nothing.
func TestProofNeedsItsFaults(t *testing.T) {
	t.Parallel()
	plan := planned(false)
	enough := faultsMade{Kills: 14, Pauses: 7, BrokerCrashes: 2, DatabaseCrashes: 2}
	if wrong := enough.enough(&plan, 105, 2205); len(wrong) != 0 {
		t.Errorf("%q", wrong)
	}
	for name, less := range map[string]func(f *faultsMade, twins *int, messages *int64){
		"kills":             func(f *faultsMade, _ *int, _ *int64) { f.Kills-- },
		"pauses":            func(f *faultsMade, _ *int, _ *int64) { f.Pauses-- },
		"broker's crashes":  func(f *faultsMade, _ *int, _ *int64) { f.BrokerCrashes-- },
		"crashes":           func(f *faultsMade, _ *int, _ *int64) { f.DatabaseCrashes-- },
		"twins":             func(_ *faultsMade, twins *int, _ *int64) { *twins-- },
		"copies in the log": func(_ *faultsMade, _ *int, messages *int64) { *messages-- },
	} {
		f, twins, messages := enough, 105, int64(2205)
		less(&f, &twins, &messages)
		if len(f.enough(&plan, twins, messages)) == 0 {
			t.Errorf("fewer %s are enough", name)
		}
	}
}

// report is the outcome of a proof.
type report struct {
	Broker  string   `json:"broker"`
	Verdict string   `json:"verdict"` // ok or broken
	Broken  []string `json:"broken,omitempty"`
	Seconds float64  `json:"seconds"`

	Messages       int     `json:"messages"`
	PublishedTwice int     `json:"published_twice"`
	AtTheBroker    int64   `json:"at_the_broker"` // in its log, copies included
	RequestsAgain  int64   `json:"requests_again"`
	SessionSeconds float64 `json:"session_seconds"`

	faultsMade
	// What consumers reported of their batches; a process that was killed could not report its last
	// ones.
	Guards guards `json:"guards"`
	books

	PostgreSQL string `json:"postgresql"`
	Go         string `json:"go"`
}

type guards struct {
	Copies      int `json:"copies"`      // dropped by their id
	Redelivered int `json:"redelivered"` // dropped by the position
	Held        int `json:"held"`        // batches that found the partition's lock taken
	Fenced      int `json:"fenced"`      // batches that found the position moved
	Failed      int `json:"failed"`      // batches that failed otherwise
}

// proof is one run.
type proof struct {
	t        *testing.T
	plan     plan
	broker   *broker
	database *database
	load     *load
	twice    *twice
	members  [processes]*member
	report   report
	began    time.Time
	fail     context.CancelCauseFunc

	mu     sync.Mutex
	owners map[int32]*life // the process that was last given each partition
	guards guards
}

// member is the place of a consumer process. Its lives follow one another.
type member struct {
	proof    *proof
	number   int
	life     *life // used by the proof's goroutine
	children sync.WaitGroup
}

// life is one process of a member.
type life struct {
	*process
	inBatch map[int32]bool // partitions with effects that are not committed; guarded by proof.mu
	writes  chan struct{}  // has a value soon after an effect was written

	mu       sync.Mutex
	expected bool // its end
}

func (l *life) expectEnd() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.expected = true
}

// TestEveryMessageHasItsEffectOnce is the proof.
func TestEveryMessageHasItsEffectOnce(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "kills and pauses three processes seven times, which takes half a minute")
	const session = 3 * time.Second // as long as a loaded machine may stop a process
	kfake := func(dir string) brokerServer { return newKfake(dir, session) }
	real := func(dir string) brokerServer { return &realKafka{dir: dir, session: session} }
	full := os.Getenv(sizeVariable) == "full"
	for _, test := range []struct {
		name   string
		source source
		serve  func(dir string) brokerServer
		always bool // the small proof too
	}{
		{"kfake", source{Session: session}, kfake, true},
		{"NATS", source{Session: session, NATS: true}, func(dir string) brokerServer { return newNATS(dir) }, true},
		{"Kafka", source{Session: session}, real, true},
		{"kfake with KIP-848", source{Session: session, ServerAssigned: true}, kfake, false},
		{"Kafka with KIP-848", source{Session: session, ServerAssigned: true}, real, false},
	} {
		if !test.always && !full {
			continue
		}
		t.Run(test.name, func(t *testing.T) {
			if !full { // the whole one has the machine to itself
				t.Parallel()
			}
			prove(t, test.name, planned(full), &broker{brokerServer: test.serve(t.TempDir()), source: test.source})
		})
	}
}

// prove runs a proof, prints its report and judges it.
func prove(t *testing.T, name string, plan plan, b *broker) {
	p := &proof{
		t: t, plan: plan, broker: b, database: &database{dir: filepath.Join(pgtest.Folder(t), "data")},
		owners: map[int32]*life{}, began: time.Now(),
		report: report{Broker: name, Messages: plan.Messages, SessionSeconds: b.source.Session.Seconds(), Go: runtime.Version()},
	}
	ctx, cancel := context.WithTimeout(t.Context(), proofMax)
	defer cancel()
	ctx, p.fail = context.WithCancelCause(ctx)
	err := p.run(ctx)
	if errors.Is(err, kafkaserver.ErrNoJars) {
		t.Skip(err)
	}
	if cause := context.Cause(ctx); err != nil && cause != nil && !errors.Is(cause, context.DeadlineExceeded) {
		err = cause
	}
	p.fail(nil)
	if err != nil {
		p.report.Broken = append(p.report.Broken, err.Error())
	}
	p.report.Verdict, p.report.Seconds = "ok", time.Since(p.began).Round(100*time.Millisecond).Seconds()
	if len(p.report.Broken) > 0 {
		p.report.Verdict = "broken"
	}
	text, jsonErr := json.MarshalIndent(&p.report, "", "  ")
	if jsonErr != nil {
		t.Fatal(jsonErr)
	}
	t.Logf("%s", text)
	if p.report.Verdict != "ok" {
		t.Errorf("%s: %s", name, strings.Join(p.report.Broken, "; "))
	}
}

func (p *proof) run(ctx context.Context) error {
	defer func() { // after the processes have ended
		if err := p.database.close(); err != nil {
			p.t.Errorf("close the database: %v", err)
		}
		p.broker.close()
	}()
	if err := p.broker.open(ctx); err != nil {
		return err
	}
	if err := p.database.start(ctx, p.plan.Keys); err != nil {
		return err
	}
	p.report.PostgreSQL = p.database.server.Version()
	store, err := openStore(ctx, p.database.url("service"), &postgres.Options{PoolConfig: func(c *pgxpool.Config) { c.MaxConns = 20 }})
	if err != nil {
		return err
	}
	defer store.Close()

	var running sync.WaitGroup
	ctx, stop := context.WithCancel(ctx)
	defer running.Wait()
	defer stop()
	p.twice = newTwice(p.broker.publisher, &p.plan)
	p.load = &load{plan: &p.plan, engine: idempotency.NewEngine(store, nil)}
	running.Go(func() { runRelay(ctx, store, p.twice) })
	running.Go(func() { p.twice.run(ctx) })
	running.Go(func() {
		if err := p.load.run(ctx); err != nil && ctx.Err() == nil {
			p.fail(err)
		}
	})
	defer p.endMembers()
	for number := range p.members {
		p.members[number] = &member{proof: p, number: number}
		if err := p.members[number].start(); err != nil {
			return err
		}
	}
	for round := range p.plan.Rounds {
		if err := p.round(ctx, round); err != nil {
			return fmt.Errorf("round %d: %w", round+1, err)
		}
		p.log(fmt.Sprintf("round %d of %d", round+1, p.plan.Rounds))
	}
	return p.finish(ctx)
}

// round pauses one process past its session, and kills both others. Those that come in their place
// do its work before it goes on. In some rounds the broker or the database crashes too. Each fault
// waits until its share of the round's messages is under way.
func (p *proof) round(ctx context.Context, round int) error {
	const shares = 4
	allow := func(share int) {
		p.load.allowed.Store(int64(p.plan.Messages) * int64(shares*round+share) / int64(shares*p.plan.Rounds))
	}
	if err := p.await(ctx, "each process has a partition", p.allWork); err != nil {
		return err
	}
	order := [processes]*member{p.members[round%processes], p.members[(round+1)%processes], p.members[(round+2)%processes]}
	paused := order[0].life
	allow(1)
	paused.awaitBatch(ctx)
	if err := paused.signal(syscall.SIGSTOP); err != nil {
		return err
	}
	pausedAt := time.Now()
	defer paused.signal(syscall.SIGCONT) //nolint:errcheck // it may have ended
	held := p.partitionsOf(paused)
	open, _ := p.database.count(ctx, "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND state LIKE 'idle in transaction%'", order[0].application())

	for i, m := range order[1:] {
		allow(2 + i)
		m.life.awaitBatch(ctx)
		if err := p.kill(ctx, m); err != nil {
			return err
		}
	}
	// At 1, 4 and 2, 5 of seven.
	switch round {
	case p.plan.Rounds / 7, p.plan.Rounds * 4 / 7:
		if err := p.crashBroker(ctx); err != nil {
			return err
		}
	case p.plan.Rounds * 2 / 7:
		if err := p.database.crashPostmaster(ctx); err != nil {
			return err
		}
		p.report.DatabaseCrashes++
	case p.plan.Rounds * 5 / 7:
		if err := p.database.crashBackend(ctx); err != nil {
			return err
		}
		p.report.DatabaseCrashes++
	}
	allow(shares)
	all := int(p.load.allowed.Load())
	if err := p.await(ctx, fmt.Sprintf("others have the paused process's partitions, and %d effects are there", all), func() bool {
		n, ok := p.database.count(ctx, "SELECT count(*) FROM effects")
		return ok && n >= all && time.Since(pausedAt) > p.broker.source.Session && p.othersHave(held, paused)
	}); err != nil {
		return err
	}
	if paused.isStopped() && !paused.hasEnded() && len(held) > 0 {
		p.report.Pauses++
		if open > 0 {
			p.report.PausesInTransaction++
		}
	}
	return paused.signal(syscall.SIGCONT)
}

// awaitBatch waits until the process has written an effect that is not committed, at most
// batchWaitMax.
func (l *life) awaitBatch(ctx context.Context) {
	select { // an older one
	case <-l.writes:
	default:
	}
	select {
	case <-l.writes:
	case <-ctx.Done():
	case <-time.After(batchWaitMax):
	}
}

// kill kills a process that has partitions with signal 9. Another one comes in its place.
func (p *proof) kill(ctx context.Context, m *member) error {
	l := m.life
	if err := p.await(ctx, fmt.Sprintf("process %d has a partition", m.number), func() bool { return len(p.partitionsOf(l)) > 0 }); err != nil {
		return err
	}
	l.expectEnd()
	if !l.kill() {
		return fmt.Errorf("process %d died unasked: %v\n%s", m.number, l.cmd.ProcessState, l.said())
	}
	p.report.Kills++
	if p.writes(l) {
		p.report.KillsInBatch++
	}
	return m.start()
}

func (p *proof) crashBroker(ctx context.Context) error {
	if err := p.broker.crash(); err != nil {
		return err
	}
	if err := p.broker.start(ctx); err != nil {
		return err
	}
	p.report.BrokerCrashes++
	return nil
}

// finish waits until all messages of the broker are handled, stops the processes and judges.
func (p *proof) finish(ctx context.Context) error {
	if err := p.await(ctx, "each process has a partition", p.allWork); err != nil {
		return err
	}
	if err := p.await(ctx, "the outbox is empty and all copies are published", func() bool {
		n, ok := p.database.count(ctx, "SELECT count(*) FROM message_outbox")
		return ok && n == 0 && p.twice.confirmed() >= p.plan.Twins
	}); err != nil {
		return err
	}
	ends, messages, err := p.broker.logs(ctx)
	if err != nil {
		return err
	}
	p.report.AtTheBroker, p.report.PublishedTwice, p.report.RequestsAgain = messages, p.twice.confirmed(), p.load.again.Load()
	waiting := p.await(ctx, "everything at the broker is handled", func() bool {
		positions := p.database.positions(ctx)
		for number, end := range ends {
			if end > positions[number] && end > p.beginning() {
				return false
			}
		}
		return true
	})
	if waiting != nil { // the judge's words say more
		p.report.Broken = append(p.report.Broken, waiting.Error())
	}
	p.endMembers()
	p.mu.Lock()
	p.report.Guards = p.guards
	p.mu.Unlock()
	if err := p.report.read(ctx, p.database.pool, &p.plan); err != nil {
		return err
	}
	p.report.Parked, _ = p.database.count(ctx, "SELECT count(*) FROM message_parked")
	p.report.Broken = append(p.report.Broken, p.report.books.broken(&p.plan)...)
	p.report.Broken = append(p.report.Broken, p.report.enough(&p.plan, p.report.PublishedTwice, messages)...)
	return nil
}

// beginning is the offset of the first message of a partition.
func (p *proof) beginning() int64 {
	if p.broker.source.NATS {
		return 1
	}
	return 0
}

// application is the name of the member's sessions at PostgreSQL.
func (m *member) application() string { return fmt.Sprint(consumerName, "-", m.number) }

// start starts the member's next process.
func (m *member) start() error {
	p := m.proof
	l := &life{inBatch: map[int32]bool{}, writes: make(chan struct{}, 1)}
	process, err := startChild(child{
		Role: roleConsumer, Number: m.number, DatabaseURL: p.database.url(m.application()), Source: p.broker.source,
	}, func(line string) { p.hear(l, line) })
	if err != nil {
		return fmt.Errorf("start process %d: %w", m.number, err)
	}
	l.process, m.life = process, l
	m.children.Go(func() {
		<-l.ended
		l.mu.Lock()
		defer l.mu.Unlock()
		if !l.expected {
			p.fail(fmt.Errorf("process %d ended unasked: %v\n%s", m.number, l.cmd.ProcessState, l.said()))
		}
	})
	return nil
}

// hear handles an event that a process printed.
func (p *proof) hear(l *life, line string) {
	var e event
	if err := json.Unmarshal([]byte(line), &e); err != nil {
		p.fail(fmt.Errorf("a process printed %q", line))
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch e.Kind {
	case assigned:
		p.owners[e.Partition] = l
	case handled:
		l.inBatch[e.Partition] = true
		select {
		case l.writes <- struct{}{}:
		default:
		}
	case ended:
		delete(l.inBatch, e.Partition)
		p.guards.Copies += e.Duplicates
		p.guards.Redelivered += e.Redelivered
		switch e.Failure {
		case failureHeld:
			p.guards.Held++
		case failureFenced:
			p.guards.Fenced++
		case failureOther:
			p.guards.Failed++
		}
	}
}

// writes reports whether the process has written effects that are not committed.
func (p *proof) writes(l *life) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(l.inBatch) > 0
}

// partitionsOf returns the partitions that a process has.
func (p *proof) partitionsOf(l *life) (numbers []int32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for number, owner := range p.owners {
		if owner == l {
			numbers = append(numbers, number)
		}
	}
	return numbers
}

// othersHave reports whether other processes were given all of these partitions.
func (p *proof) othersHave(numbers []int32, l *life) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, number := range numbers {
		if p.owners[number] == l {
			return false
		}
	}
	return true
}

// allWork reports whether each process has a partition, and each partition a process.
func (p *proof) allWork() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	has := map[*life]bool{}
	for _, owner := range p.owners {
		has[owner] = true
	}
	for _, m := range p.members {
		if !has[m.life] {
			return false
		}
	}
	return len(p.owners) == partitions && len(has) == processes
}

// await waits for a condition.
func (p *proof) await(ctx context.Context, what string, is func() bool) error {
	late := time.Now().Add(conditionMax)
	for logged := time.Now(); !is(); sleep(ctx, pollInterval) {
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case time.Now().After(late):
			return fmt.Errorf("not within %v: %s\n%s", conditionMax, what, p.state())
		case time.Since(logged) > 10*time.Second:
			logged = time.Now()
			p.log("waiting: " + what)
		}
	}
	return nil
}

// state describes the partitions of the processes, and their last lines.
func (p *proof) state() string {
	var all strings.Builder
	for _, m := range p.members {
		if m != nil && m.life != nil {
			fmt.Fprintf(&all, "process %d has the partitions %v; stopped %t, ended %t\n%s\n", m.number, p.partitionsOf(m.life), m.life.isStopped(), m.life.hasEnded(), m.life.said())
		}
	}
	return all.String()
}

// log prints the progress of the proof.
func (p *proof) log(what string) {
	n, _ := p.database.count(p.t.Context(), "SELECT count(*) FROM effects")
	f := &p.report.faultsMade
	p.t.Logf("%5.1f s: %s: %d effects of %d requests, %d copies published; %d kills, %d pauses, %d crashes of the broker, %d of PostgreSQL",
		time.Since(p.began).Seconds(), what, n, p.load.published.Load(), p.twice.confirmed(), f.Kills, f.Pauses, f.BrokerCrashes, f.DatabaseCrashes)
}

// endMembers stops the processes in order.
func (p *proof) endMembers() {
	for _, m := range p.members {
		if m != nil && m.life != nil && !m.life.hasEnded() {
			m.life.expectEnd()
			_ = m.life.signal(syscall.SIGCONT)
			_ = m.life.signal(syscall.SIGTERM)
		}
	}
	const most = 30 * time.Second
	for _, m := range p.members {
		if m == nil || m.life == nil {
			continue
		}
		select {
		case <-m.life.ended:
		case <-time.After(most):
			p.report.Broken = append(p.report.Broken, fmt.Sprintf("process %d did not stop within %v\n%s", m.number, most, m.life.said()))
			m.life.kill()
		}
		m.children.Wait()
		m.life = nil
	}
}
