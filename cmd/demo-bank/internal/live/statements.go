package live

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/events"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/process"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// This file shows two projections of the same payments, made from the same messages: one with an
// inbox and one without. A button makes payments, causes a fault in the consumers of both, and
// waits until both have handled everything. The counts are those of the audit's SQL, for the
// accounts of this page.

const (
	// statementsMax limits a demonstration. The broker misses a paused consumer after 6 seconds.
	statementsMax  = 3 * time.Minute
	statementsPoll = 20 * time.Millisecond

	payersShown  = 16 // enough for some in every partition
	paymentsEach = 3
	payClients   = 8
	// roundsMax is the maximum number of tries of a fault until the side without an inbox shows it.
	// A try shows nothing if it meets no consumer between an effect and its commit.
	roundsMax = 5
	biteMax   = 3 * time.Second
	// killsMax is the maximum number of kills in a round. After a few more at one message, the
	// consumer with an inbox would take the message for the cause of the deaths.
	killsMax = 3
	deadMax  = 20 // dead letters that are listed
)

// Consumers has what the page needs to run consumers of its own.
type Consumers struct {
	DatabaseURL string
	Broker      *events.Broker
	Books       *bank.Bank

	// Open opens a store in events.ShownSchema, and makes its tables.
	Open func(ctx context.Context) (*postgres.Store, error)
}

// Consumers lets the page show consumers. It must be called before the page is served. If it is not
// called, the buttons are refused.
func (l *Live) Consumers(consumers Consumers) { l.consumers = consumers }

// Act is what a button does to consumers.
type Act string

// The acts.
const (
	ActKill    Act = "kill"   // kill -9, and start again
	ActPause   Act = "pause"  // stop one process of each side past its session
	ActTwice   Act = "twice"  // publish messages again, under their ids
	ActPoison  Act = "poison" // a message that the consumers can't read
	ActLose    Act = "lose"   // lose the reply to a COMMIT
	ActRedrive Act = "redrive"
)

// StatementsState is the state of a demonstration.
type StatementsState string

// The states of a demonstration.
const (
	StatementsRunning StatementsState = "running"
	StatementsEnded   StatementsState = "ended"
	StatementsFailed  StatementsState = "failed"
)

// Statements are both projections as viewers see them.
type Statements struct {
	State    StatementsState   `json:"state"`
	Act      Act               `json:"act"`
	Line     string            `json:"line"`
	Payments int64             `json:"payments"` // payments of the page's accounts
	Sides    [2]StatementsSide `json:"sides"`    // protected, unprotected
	Dead     []DeadLetter      `json:"dead"`     // oldest first
}

// StatementsSide is one projection, compared with the books.
type StatementsSide struct {
	Projected  int64 `json:"projected"`  // distinct payments in it
	Missing    int64 `json:"missing"`    // payments that are not in it, and not parked
	Doubled    int64 `json:"doubled"`    // payments that are in it more than once
	Mismatches int64 `json:"mismatches"` // accounts whose sum differs
	Dead       int64 `json:"dead"`
}

// DeadLetter is a message that its consumer could not handle.
type DeadLetter struct {
	ID      string `json:"id"`
	Account string `json:"account"`
	Error   string `json:"error"`
}

var (
	errStatementsRun = errors.New("a demonstration of consumers runs")
	errNoConsumers   = errors.New("the bank has no broker inside")
	errCannotPause   = errors.New("this system can't pause a process")
	errSeesNoCommit  = errors.New("the database takes TLS only")
	errManyBanks     = errors.New("there are several banks with brokers of their own")
	errNoAct         = errors.New("there is no such act")
)

// postStatements answers POST /live/statements, a form with an act, and for redrive with the id of
// the message. It answers 202 with the state that is shown, 303 to the page for a browser without
// scripts, 400, or 409 if the act is not possible now.
func (l *Live) postStatements(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, formBytesMax)
	refused := func(status int, slug, title, detail string) {
		bank.WriteProblem(w, &bank.Problem{Status: status, Slug: slug, Title: title, Detail: detail})
	}
	if err := r.ParseForm(); err != nil {
		refused(http.StatusBadRequest, "invalid-act", "The request is not valid", "The form can't be read.")
		return
	}
	shown, err := l.startStatements(Act(r.PostForm.Get("act")), r.PostForm.Get("id"))
	switch {
	case errors.Is(err, errNoAct):
		refused(http.StatusBadRequest, "invalid-act", "The request is not valid", "act must be kill, pause, twice, poison, lose, or redrive with the id of a message.")
	case errors.Is(err, errStatementsRun):
		refused(http.StatusConflict, "act-runs", "The consumers are busy", "There is one demonstration at a time. Wait for its end.")
	case errors.Is(err, errNoConsumers):
		refused(http.StatusConflict, "act-unavailable", "The page has no consumers", "They need a broker inside. Start the bank without --brokers.")
	case errors.Is(err, errCannotPause):
		refused(http.StatusConflict, "act-unavailable", "The consumers can't be paused", "This system has no signal that pauses a process (SIGSTOP). Unix systems have it.")
	case errors.Is(err, errSeesNoCommit):
		refused(http.StatusConflict, "act-unavailable", "No COMMIT can be lost", "The database takes connections with TLS only, and a proxy must see the COMMIT to lose its reply.")
	case err != nil:
		refuse(w, err)
	case r.Header.Get("Accept") != "application/json":
		http.Redirect(w, r, "/", http.StatusSeeOther)
	default:
		bank.WriteJSON(w, http.StatusAccepted, shown)
	}
}

// startStatements starts a demonstration, which ends before Run returns.
func (l *Live) startStatements(act Act, id string) (*Statements, error) {
	switch {
	case !slices.Contains([]Act{ActKill, ActPause, ActTwice, ActPoison, ActLose, ActRedrive}, act) || (id != "") != (act == ActRedrive):
		return nil, errNoAct
	case l.consumers.Broker == nil:
		return nil, errNoConsumers
	case act == ActPause && !process.CanStop:
		return nil, errCannotPause
	case act == ActLose && !losesCommits(l.consumers.DatabaseURL):
		return nil, errSeesNoCommit
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.closed:
		return nil, errClosed
	case l.statementsRun:
		return nil, errStatementsRun
	}
	l.statementsRun = true
	p := l.statements
	shown := p.change(func(s *Statements) { s.State, s.Act, s.Line = StatementsRunning, act, "Both sides get ready." })
	l.storms.Go(func() {
		defer func() {
			l.mu.Lock()
			defer l.mu.Unlock()
			l.statementsRun = false
		}()
		ctx, cancel := context.WithTimeout(l.ending, statementsMax)
		defer cancel()
		line, err := p.run(ctx, act, id)
		state := StatementsEnded
		if err != nil {
			state, line = StatementsFailed, cmp.Or(line, "It did not end as it should; the bank's log has the reason. Try again.")
			if l.ending.Err() == nil {
				l.logger.Warn("the page's consumers were not shown", "act", act, "error", err)
			}
		}
		p.change(func(s *Statements) { s.State, s.Line = state, line })
	})
	return shown, nil
}

// statements are the projections and their consumers. It is safe for concurrent use.
type statements struct {
	live *Live

	reading sync.Mutex // held by read, so that an older reading never replaces a newer one

	mu    sync.Mutex
	shown Statements
	books *shownBooks // nil until the first act has opened them
	// The highest offsets that the consumer without an inbox has committed. A process that was
	// paused may set the broker's back.
	committed map[int32]int64
}

// shownBooks are the accounts, the store and the processes. One act at a time uses them.
type shownBooks struct {
	prefix   string // of the accounts
	accounts []string
	store    *postgres.Store
	operator *operator.Operator
	sides    [2]*consumers
	base     *http.Transport
	number   int // of acts
}

// change changes what viewers see, and returns a copy of it.
func (p *statements) change(change func(s *Statements)) *Statements {
	p.mu.Lock()
	defer p.mu.Unlock()
	change(&p.shown)
	shown := p.shown
	shown.Dead = append([]DeadLetter{}, shown.Dead...) // viewers may be reading
	p.live.board.showStatements(&shown)
	return &shown
}

func (p *statements) say(line string) { p.change(func(s *Statements) { s.Line = line }) }

// run does an act, and returns the line that viewers see at its end.
func (p *statements) run(ctx context.Context, act Act, id string) (line string, err error) {
	l := p.live
	b, err := p.open(ctx)
	if err != nil {
		return "", err
	}
	// Both processes of each side must be members, so that one can take over from the other.
	if err := p.until(ctx, func(ctx context.Context) (bool, error) { return p.members(ctx, consumersPerSide) }); err != nil {
		return "", fmt.Errorf("wait for the consumers: %w", err)
	}
	if banks, err := l.consumers.Books.Banks(ctx); err != nil || banks > 1 {
		return "Another bank works on this database, and messages may go to its broker. Stop it, and try again.", errors.Join(err, errManyBanks)
	}
	b.number++
	reference := fmt.Sprintf("act %d", b.number)
	switch act {
	case ActKill:
		line = "All consumers were killed with -9 while they handled messages, and started again."
		err = p.untilDoubled(ctx, func(ctx context.Context) error { return p.kill(ctx, b, reference) })
	case ActPause:
		line = "One consumer of each side slept past its session, so its partitions went to the other. Then it woke up and went on."
		err = p.untilDoubled(ctx, func(ctx context.Context) error { return p.pause(ctx, b, reference) })
	case ActTwice:
		line, err = p.twice(ctx, b, reference)
	case ActPoison:
		line = "No consumer could read the message about one payment. With the inbox it is kept below; without, it was skipped."
		err = p.poison(ctx, b, reference)
	case ActLose:
		line = "PostgreSQL committed, and the connection broke before its reply came. Each side had one such COMMIT."
		err = p.lose(ctx, b, reference)
	case ActRedrive:
		line = "The mistake is mended, and the message was redriven under its id."
		err = p.redrive(ctx, b, id)
	}
	if err == nil {
		err = p.read(ctx)
	}
	if err != nil {
		return "", err
	}
	return line, nil
}

// during makes payments, calls fault while the consumers handle them, and waits until all are
// handled. fault waits for its moment itself. paid is closed after the last payment.
func (p *statements) during(ctx context.Context, b *shownBooks, reference string, fault func(ctx context.Context, paid <-chan struct{}) error) error {
	if err := p.settle(ctx, b, sides[:]...); err != nil {
		return err
	}
	group, both := errgroup.WithContext(ctx)
	paid := make(chan struct{})
	group.Go(func() error {
		defer close(paid)
		return p.pay(both, b, reference, b.accounts, paymentsEach)
	})
	group.Go(func() error { return fault(both, paid) })
	if err := group.Wait(); err != nil {
		return err
	}
	return p.settle(ctx, b, sides[:]...)
}

// untilDoubled repeats a round until the side without an inbox has more doubles, at most roundsMax
// times.
func (p *statements) untilDoubled(ctx context.Context, round func(ctx context.Context) error) error {
	if err := p.read(ctx); err != nil {
		return err
	}
	before := p.side(Unprotected).Doubled
	doubled := func(ctx context.Context) (bool, error) {
		err := p.read(ctx)
		return p.side(Unprotected).Doubled > before, err
	}
	for range roundsMax {
		if err := round(ctx); err != nil {
			return err
		}
		// A consumer that was paused may still be handling its old batch.
		bite, cancel := context.WithTimeout(ctx, biteMax)
		err := p.until(bite, doubled)
		cancel()
		if err == nil || !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
			return err
		}
	}
	return nil
}

// kill kills all consumers while they handle messages: whenever the side without an inbox has an
// effect that it has not committed at the broker, until a payment is doubled, and at most killsMax
// times.
func (p *statements) kill(ctx context.Context, b *shownBooks, reference string) error {
	projection := projectionOf(Unprotected, b.prefix)
	read := func(ctx context.Context) (effects, doubled, committed int64, err error) {
		// The effects are read first, so the number of those that are not committed is never too
		// high.
		err = p.live.pool.QueryRow(ctx, `
			SELECT COALESCE(sum(copies), 0)::bigint, count(*) FILTER (WHERE copies > 1) FROM (
				SELECT count(*) AS copies FROM `+projection.Entries+` WHERE starts_with(account, $1) AND amount < 0 GROUP BY transfer) AS payments`, b.prefix).Scan(&effects, &doubled)
		if err != nil {
			return 0, 0, 0, err
		}
		offsets, err := p.live.consumers.Broker.Committed(ctx, projection.Consumer)
		for _, offset := range offsets {
			committed += max(0, offset)
		}
		return effects, doubled, committed, err
	}
	p.say("Payments are made. The consumers are killed while they handle them.")
	return p.during(ctx, b, reference, func(ctx context.Context, _ <-chan struct{}) error {
		effects, doubled, committed, err := read(ctx)
		if err != nil {
			return err
		}
		for range killsMax {
			over := false
			err := p.until(ctx, func(ctx context.Context) (bool, error) {
				effectsNow, doubledNow, committedNow, err := read(ctx)
				over = doubledNow > doubled || effectsNow-effects >= payersShown*paymentsEach
				return over || effectsNow-effects > committedNow-committed, err
			})
			if err != nil || over {
				return err
			}
			for _, side := range b.sides {
				for _, m := range side.members {
					m.kill()
				}
			}
		}
		return nil
	})
}

// pause pauses one consumer of each side, in the middle of a message, until the broker has given up
// on it and the other has taken over.
func (p *statements) pause(ctx context.Context, b *shownBooks, reference string) error {
	p.say("Payments are made. One consumer of each side is paused until the broker has given up on it.")
	return p.during(ctx, b, reference, func(ctx context.Context, paid <-chan struct{}) error {
		for i, side := range sides {
			err := p.until(ctx, func(ctx context.Context) (atWork bool, err error) {
				err = p.live.pool.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = $1 AND state = 'idle in transaction')`,
					events.ShownName(side == Protected, instanceOf(0))).Scan(&atWork)
				select {
				case <-paid: // it has handled all
					positions, positionsErr := p.handledAll(ctx, side)
					return atWork || positions, errors.Join(err, positionsErr)
				default:
					return atWork, err
				}
			})
			if err != nil {
				return err
			}
			resume, err := b.sides[i].members[0].pause()
			if err != nil {
				return err
			}
			defer resume()
		}
		select {
		case <-paid:
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := p.until(ctx, func(ctx context.Context) (bool, error) { return p.members(ctx, consumersPerSide-1) }); err != nil {
			return fmt.Errorf("wait for the end of the sessions: %w", err)
		}
		// With the inbox the paused process holds its partition until PostgreSQL ends its session.
		return p.settle(ctx, b, sides[:]...)
	})
}

// twice publishes all messages of the act twice.
func (p *statements) twice(ctx context.Context, b *shownBooks, reference string) (line string, err error) {
	p.say("Payments are made, and their messages published.")
	if err := p.pay(ctx, b, reference, b.accounts, paymentsEach); err != nil {
		return "", err
	}
	if err := p.settle(ctx, b, sides[:]...); err != nil {
		return "", err
	}
	p.say("The same messages are published again.")
	published, err := p.live.consumers.Books.PublishAgain(ctx, reference, b.accounts)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d messages were published twice, under the same ids, as by a relay that died before it noted the broker's confirmation.", published), p.settle(ctx, b, sides[:]...)
}

// poison makes a payment whose message no consumer can read.
func (p *statements) poison(ctx context.Context, b *shownBooks, reference string) error {
	account := fmt.Sprintf("%spoison-%d", b.prefix, b.number) // no other message waits behind it
	p.say("A payment is made whose message the consumers can't read.")
	if err := p.live.open(ctx, b.base, account, amount); err != nil {
		return fmt.Errorf("open account: %w", err)
	}
	if err := events.SetReadable(ctx, b.store, account, false); err != nil {
		return fmt.Errorf("make an account unreadable: %w", err)
	}
	if err := p.pay(ctx, b, reference, []string{account}, 1); err != nil {
		return err
	}
	return p.settle(ctx, b, sides[:]...)
}

// lose loses the reply to a COMMIT of each side.
func (p *statements) lose(ctx context.Context, b *shownBooks, reference string) error {
	p.say("Payments are made. The reply to a COMMIT of each side is lost.")
	for _, side := range b.sides {
		side.lose.Store(true)
	}
	if err := p.pay(ctx, b, reference, b.accounts, 1); err != nil {
		return err
	}
	err := p.until(ctx, func(context.Context) (bool, error) { return !b.sides[0].lose.Load() && !b.sides[1].lose.Load(), nil })
	if err != nil {
		return fmt.Errorf("wait for a COMMIT: %w", err)
	}
	return p.settle(ctx, b, sides[:]...)
}

// redrive mends the mistake of the consumers, and lets one try a dead letter again.
func (p *statements) redrive(ctx context.Context, b *shownBooks, id string) error {
	name := events.ShownProjection(true, "").Consumer
	p.say("The mistake is mended, and the message tried again.")
	var account string
	err := b.store.Pool().QueryRow(ctx, `SELECT convert_from(key, 'UTF8') FROM `+events.ShownSchema+`.message_parked WHERE consumer = $1 AND message_id = $2`, name, id).Scan(&account)
	if errors.Is(err, pgx.ErrNoRows) { // another viewer redrove it
		return nil
	}
	if err == nil {
		err = events.SetReadable(ctx, b.store, account, true)
	}
	if err == nil {
		_, err = b.operator.Redrive(ctx, name, id, operator.MessageAct{Act: operator.Act{Actor: "the page", Reason: "redriven on the page"}})
	}
	if err != nil {
		return fmt.Errorf("redrive: %w", err)
	}
	return p.settle(ctx, b, sides[:]...)
}

// open makes the accounts, the store and the processes for the acts, once.
func (p *statements) open(ctx context.Context) (b *shownBooks, err error) {
	p.mu.Lock()
	b = p.books
	p.mu.Unlock()
	if b != nil {
		return b, nil
	}
	l := p.live
	p.say("The consumers are started: two processes on each side.")
	b = &shownBooks{prefix: events.ShownAccounts + newRun(time.Now(), 0) + "-", base: &http.Transport{MaxIdleConnsPerHost: payClients, DisableCompression: true}}
	// The processes end with the bank, or with a failure here.
	running, end := context.WithCancel(l.ending)
	defer func() {
		if err != nil {
			end()
			b.close()
		}
	}()
	if b.store, err = l.consumers.Open(ctx); err != nil {
		return nil, err
	}
	b.operator = operator.New(b.store, nil)
	opening, inOpening := errgroup.WithContext(ctx)
	opening.SetLimit(payClients)
	for i := range payersShown {
		account := fmt.Sprintf("%s%02d", b.prefix, i+1)
		b.accounts = append(b.accounts, account)
		opening.Go(func() error { return l.open(inOpening, b.base, account, openingShown) })
	}
	if err := opening.Wait(); err != nil {
		return nil, fmt.Errorf("open account: %w", err)
	}
	for i, side := range sides {
		mark := "" // all its COMMITs are about payments
		if side == Protected {
			mark = events.ShownProjection(true, "").Consumer
		}
		if b.sides[i], err = l.startConsumers(running, side == Protected, mark); err != nil {
			return nil, err
		}
	}
	p.mu.Lock()
	p.books = b
	p.mu.Unlock()
	return b, nil
}

// openingShown is the opening balance of an account. It lasts for the page's lifetime, because the
// payments go round.
const openingShown = 1_000 * amount

func (b *shownBooks) close() {
	for _, side := range b.sides {
		side.close()
	}
	if b.store != nil {
		b.store.Close()
	}
	b.base.CloseIdleConnections()
}

// close closes what open has made. The acts and the processes must have ended.
func (p *statements) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.books != nil {
		p.books.close()
	}
}

// pay makes payments through the bank's HTTP interface: each account pays the next one. The amounts
// differ, so that every account's sum is wrong if all payments are doubled.
func (p *statements) pay(ctx context.Context, b *shownBooks, reference string, payers []string, each int) error {
	payer := newClient(&marking{base: b.base, token: p.live.token})
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(payClients)
	for n := range each {
		for i, from := range payers {
			group.Go(func() error {
				body := fmt.Appendf(nil, `{"from":"%s","to":"%s","amount":%d,"currency":"EUR","reference":"%s"}`, from, b.accounts[(i+1)%len(b.accounts)], amount+i, reference)
				status, answer, err := post(ctx, payer, p.live.url+bank.TransfersPath, fmt.Sprintf("%s-%d-%d", from, time.Now().UnixNano(), n), body)
				if err == nil && status != http.StatusCreated {
					err = fmt.Errorf("status %d: %.200s", status, answer)
				}
				return err
			})
		}
	}
	if err := group.Wait(); err != nil {
		return fmt.Errorf("pay: %w", err)
	}
	return nil
}

// until polls a condition until it holds, fails, or ctx ends.
func (p *statements) until(ctx context.Context, met func(ctx context.Context) (bool, error)) error {
	for {
		ok, err := met(ctx)
		if err != nil || ok {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(statementsPoll):
		}
	}
}

// members reports whether the group of each side has this number of members.
func (p *statements) members(ctx context.Context, number int) (bool, error) {
	for _, side := range sides {
		got, err := p.live.consumers.Broker.Members(ctx, projectionOf(side, "").Consumer)
		if err != nil || got != number {
			return false, err
		}
	}
	return true, nil
}

func projectionOf(side Side, prefix string) bank.Projection {
	return events.ShownProjection(side == Protected, prefix)
}

// settle waits until the outbox has no message of the page, these sides are at the end of the
// topic, and no parked message of the page is waiting or behind.
func (p *statements) settle(ctx context.Context, b *shownBooks, of ...Side) error {
	err := p.until(ctx, func(ctx context.Context) (relayed bool, err error) {
		err = p.live.pool.QueryRow(ctx, `
			SELECT NOT EXISTS (SELECT FROM message_outbox o WHERE position($1::bytea IN o.key) = 1)`, []byte(b.prefix)).Scan(&relayed)
		return relayed, err
	})
	if err != nil {
		return fmt.Errorf("wait for the relay: %w", err)
	}
	for _, side := range of {
		err := p.until(ctx, func(ctx context.Context) (bool, error) {
			all, err := p.handledAll(ctx, side)
			return all, errors.Join(err, p.read(ctx))
		})
		if err != nil {
			return fmt.Errorf("wait for the consumers (%s): %w", side, err)
		}
	}
	return p.until(ctx, func(ctx context.Context) (bool, error) {
		var waiting bool
		err := b.store.Pool().QueryRow(ctx, `
			SELECT EXISTS (SELECT FROM `+events.ShownSchema+`.message_parked WHERE state <> 3 AND position($1::bytea IN key) = 1)`, []byte(b.prefix)).Scan(&waiting)
		return !waiting, err
	})
}

// handledAll reports whether a side is at the end of the topic.
func (p *statements) handledAll(ctx context.Context, side Side) (bool, error) {
	source, ends, err := p.live.consumers.Broker.Ends(ctx)
	if err != nil {
		return false, err
	}
	positions, err := p.positions(ctx, side, source)
	for partition, end := range ends {
		if positions[partition] < end {
			return false, err
		}
	}
	return err == nil, err
}

// positions returns for each partition the offset after the last message that a side has handled.
// Without an inbox only the broker knows it.
func (p *statements) positions(ctx context.Context, side Side, source string) (map[int32]int64, error) {
	name := projectionOf(side, "").Consumer
	if side == Unprotected {
		committed, err := p.live.consumers.Broker.Committed(ctx, name)
		p.mu.Lock()
		defer p.mu.Unlock()
		for partition, offset := range committed {
			p.committed[partition] = max(p.committed[partition], offset)
		}
		return maps.Clone(p.committed), err
	}
	rows, err := p.live.pool.Query(ctx, `SELECT partition, next_offset FROM `+events.ShownSchema+`.message_offsets WHERE consumer = $1 AND source = $2`, name, source)
	if err != nil {
		return nil, err
	}
	positions := map[int32]int64{}
	var partition int32
	var next int64
	_, err = pgx.ForEachRow(rows, []any{&partition, &next}, func() error {
		positions[partition] = next
		return nil
	})
	return positions, err
}

// side returns the last reading of a side.
func (p *statements) side(side Side) StatementsSide {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.shown.Sides[side.index()]
}

// read reads the counts and dead letters for viewers, in one snapshot.
func (p *statements) read(ctx context.Context) error {
	p.reading.Lock()
	defer p.reading.Unlock()
	p.mu.Lock()
	b := p.books
	p.mu.Unlock()
	if b == nil {
		return nil
	}
	var got Statements
	err := bank.Snapshot(ctx, p.live.pool, func(tx pgx.Tx) error {
		if err := tx.QueryRow(ctx, `SELECT count(*) FROM transfers WHERE starts_with(from_account, $1)`, b.prefix).Scan(&got.Payments); err != nil {
			return err
		}
		for i, side := range sides {
			s, projection := &got.Sides[i], projectionOf(side, b.prefix)
			var err error
			if s.Missing, s.Doubled, s.Mismatches, err = projection.Compare(ctx, tx); err != nil {
				return err
			}
			if err := tx.QueryRow(ctx, `
				SELECT (SELECT count(DISTINCT transfer) FROM `+projection.Entries+` WHERE starts_with(account, $1)),
					(SELECT count(*) FROM `+projection.Parked+` WHERE consumer = $2 AND state = 3 AND position($3::bytea IN key) = 1)`,
				b.prefix, projection.Consumer, []byte(b.prefix)).Scan(&s.Projected, &s.Dead); err != nil {
				return err
			}
		}
		rows, err := tx.Query(ctx, `
			SELECT message_id, convert_from(key, 'UTF8'), error FROM `+events.ShownSchema+`.message_parked
			WHERE state = 3 AND position($1::bytea IN key) = 1 ORDER BY parked_at, message_id LIMIT $2`, []byte(b.prefix), deadMax)
		if err != nil {
			return err
		}
		got.Dead, err = pgx.CollectRows(rows, pgx.RowToStructByPos[DeadLetter])
		return err
	})
	if err != nil {
		return fmt.Errorf("read the projections: %w", err)
	}
	p.change(func(s *Statements) { s.Payments, s.Sides, s.Dead = got.Payments, got.Sides, got.Dead })
	return nil
}

// watch calls read while there are viewers, because a paused consumer may go on after its act.
func (p *statements) watch(ctx context.Context) {
	p.live.hub.whileWatched(ctx, func() time.Duration {
		started := time.Now()
		ctx, cancel := context.WithTimeout(ctx, proofTimeout)
		defer cancel()
		if err := p.read(ctx); err != nil && ctx.Err() == nil {
			p.live.logger.WarnContext(ctx, "the page's projections were not read; it is tried again", "error", err)
		}
		return max(proofInterval, proofRest*time.Since(started))
	})
}
