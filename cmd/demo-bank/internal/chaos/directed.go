package chaos

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/storm"
	"github.com/paidonce/idempotency/internal/deadline"
	"github.com/paidonce/idempotency/internal/pgfault"
)

const (
	scriptMax     = 50 * time.Second // for one script
	heldReply     = 2 * time.Second
	heldTopUps    = 6
	lateAfter     = time.Second      // from a decline to the arrival of the earlier request
	declineWithin = 9 * time.Second  // after the first send: a later decline may be final
	leaseMin      = 10 * time.Second // a little less than the lease of a request with a call
	afterSleep    = 3 * time.Second  // after a bank wakes, to see that it does not send
)

// directed are schedules that random faults rarely meet. Each script has a key of its own, and
// decides the faults of its COMMITs and calls. The scripts run after the load, except the longest,
// which runs beside it.
type directed struct {
	run      *run
	findings findings

	// played waits for the script that runs beside the load.
	played sync.WaitGroup

	mu    sync.Mutex
	hooks map[scriptStep]func(bank int) pgfault.Fault
	ended int
	lanes []*lane // of a script beside the load
}

// scriptStep is a COMMIT of a script's key.
type scriptStep struct {
	key  int
	kind openCommit
}

func newDirected(r *run) *directed {
	return &directed{run: r, hooks: map[scriptStep]func(int) pgfault.Fault{}}
}

// hookOf returns the function that decides on a COMMIT of a key, or nil.
func (d *directed) hookOf(k *key, kind openCommit) func(bank int) pgfault.Fault {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.hooks[scriptStep{k.index, kind}]
}

// once makes do decide on the first COMMIT of this kind of a key.
func (d *directed) once(k *key, kind openCommit, do func(bank int) pgfault.Fault) {
	d.mu.Lock()
	defer d.mu.Unlock()
	step := scriptStep{k.index, kind}
	d.hooks[step] = func(bank int) pgfault.Fault {
		d.mu.Lock()
		delete(d.hooks, step)
		d.mu.Unlock()
		return do(bank)
	}
}

// done returns the number of scripts that have ended.
func (d *directed) done() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.ended
}

// direct heals everything and plays the scripts.
func (r *run) direct(ctx context.Context) error {
	r.healed.Store(true)
	r.cluster.heal()
	if err := r.healOutside(ctx); err != nil {
		return err
	}
	r.stopped.Wait() // the banks that were stopped go on
	if err := r.banks.heal(ctx); err != nil {
		return err
	}
	d := r.directed
	if r.config.Banks < 2 { // nobody takes over
		d.played.Wait()
		return ctx.Err()
	}
	var scripts sync.WaitGroup
	play := func(name string, script func(context.Context) error) { d.play(ctx, &scripts, name, scriptMax, script) }
	for bank := range 2 {
		play("a call of a healed bank", func(ctx context.Context) error { return d.healed(ctx, bank) })
	}
	scripts.Wait()
	play("no transaction during a call", d.noTransaction)
	play("a take-over within the lease", d.within)
	scripts.Wait() // they want both banks awake
	play("a decline believed at once", d.decline)
	play("a sleeper and a last phase", d.sleepers)
	scripts.Wait()
	d.played.Wait()
	return ctx.Err()
}

// play plays a script in a goroutine, for at most limit.
func (d *directed) play(ctx context.Context, scripts *sync.WaitGroup, name string, limit time.Duration, script func(context.Context) error) {
	scripts.Go(func() {
		ctx, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		d.run.note("script %s begins", name)
		if err := script(ctx); err != nil {
			d.findings.add("%s: %v", name, err)
		}
		d.run.note("script %s is over", name)
		d.mu.Lock()
		defer d.mu.Unlock()
		d.ended++
	})
}

// early plays the script that takes longer than the others, beside the load.
func (d *directed) early(ctx context.Context) {
	if d.run.profile.effects {
		d.play(ctx, &d.played, "a key that is forgotten", 2*(keyLifetime+lifetimeMore), d.lifetime)
	}
}

// lifetime: every send of a request is lost, and its client has left. Once the processor may have
// forgotten the key, the request is left to a person, and nothing more is sent.
func (d *directed) lifetime(ctx context.Context) error {
	r := d.run
	k := r.keys.script(askTopUp, "-1")
	k.triesMax = 2
	r.gateway.hook(k, func(*call) verdict { return verdict{lose: true} })
	// A lane of its own: the clients of the load are still being made.
	l := newLane(r, ClientsMax*lanesMax)
	began := time.Now()
	l.ask(ctx, k, false, storm.NoTrouble)
	defer func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.lanes = append(d.lanes, l)
	}()
	var state struct {
		parked, derived string
		age             float64
	}
	for {
		err := r.cluster.with(ctx, databaseTimeout, func(ctx context.Context, conn *pgx.Conn) error {
			return conn.QueryRow(ctx, `
				SELECT COALESCE(o.parked, ''), e.derived_key::text, EXTRACT(epoch FROM clock_timestamp() - e.sent_first_at)
				FROM idempotency_open o JOIN idempotency_effects e USING (scope, key) WHERE scope = $1 AND key = $2`,
				tenants[k.tenant].scope, k.text).Scan(&state.parked, &state.derived, &state.age)
		})
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, pgx.ErrNoRows) && time.Since(began) < lifetimeMore: // it has not begun yet
			l.ask(ctx, k, false, storm.NoTrouble)
		case err == nil && state.parked != "":
			sent := r.gateway.seen(callName{"/charges", state.derived})
			if at := time.Duration(state.age * float64(time.Second)); at < keyLifetime/10*9 || sent.sent < 2 {
				return fmt.Errorf("key %s was left to a person after %v and %d sends: %s", k.text, at, sent.sent, state.parked)
			}
			return nil
		case time.Since(began) > keyLifetime+lifetimeMore:
			return fmt.Errorf("key %s is not left to a person %v after the processor forgot it (%v)", k.text, lifetimeMore, err)
		}
		_ = deadline.Sleep(ctx, scrapeInterval)
	}
}

// lifetimeMore is the time after the key's lifetime within which a request is left to a person:
// a take-over and a crash may come in between.
const lifetimeMore = 40 * time.Second

// sender returns a lane for a script that stays with one bank.
func (d *directed) sender(bank int) *lane {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := newClient(d.run, len(d.run.clients))
	d.run.clients = append(d.run.clients, c)
	for _, l := range c.lanes {
		l.pinned, l.bank = true, bank
	}
	return c.lanes[0]
}

// answer sends a request until it has an answer, and returns its status.
func (d *directed) answer(ctx context.Context, l *lane, k *key) (int, error) {
	l.ask(ctx, k, false, storm.NoTrouble)
	if ctx.Err() != nil || len(l.ops) == 0 {
		return 0, fmt.Errorf("key %s has no answer after %v", k.text, scriptMax)
	}
	return l.ops[len(l.ops)-1].Status, nil
}

// look reads one value from the database. It tries until ctx ends: a crash at the end of the load
// may have broken the session.
func (d *directed) look(ctx context.Context, value any, sql string, args ...any) error {
	for {
		err := d.run.cluster.admin.use(ctx, d.run.cluster, func(ctx context.Context, conn *pgx.Conn) error {
			return conn.QueryRow(ctx, sql, args...).Scan(value)
		})
		if err == nil {
			return nil
		}
		if deadline.Sleep(ctx, idlePause) != nil {
			return err
		}
	}
}

// wait blocks until the channel is closed.
func wait(ctx context.Context, done <-chan struct{}, what string) error {
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s did not happen within %v", what, scriptMax)
	}
}

// healed makes a call of a bank, to close its breaker. A bank with an open breaker makes one call
// at a time, and the scripts would wait for each other.
func (d *directed) healed(ctx context.Context, bank int) error {
	k := d.run.keys.script(askTopUp, "-1")
	if status, err := d.answer(ctx, d.sender(bank), k); err != nil || status != http.StatusCreated {
		return fmt.Errorf("key %s was told %d: %v", k.text, status, err)
	}
	return nil
}

// noTransaction: while the processor holds its replies, no session of the banks is in a
// transaction, nor holds a lock.
func (d *directed) noTransaction(ctx context.Context) error {
	r := d.run
	var group, arrived sync.WaitGroup
	var since time.Time
	if err := d.look(ctx, &since, `SELECT clock_timestamp()`); err != nil {
		return err
	}
	release := make(chan struct{})
	statuses := make(chan string, heldTopUps)
	arrived.Add(heldTopUps)
	for n := range heldTopUps {
		k := r.keys.script(askTopUp, "-1")
		first := sync.OnceFunc(arrived.Done)
		r.gateway.hook(k, func(*call) verdict { return verdict{before: first, hold: release} })
		l := d.sender(n % 2)
		group.Go(func() {
			status, err := d.answer(ctx, l, k)
			if err != nil || status != http.StatusCreated {
				statuses <- fmt.Sprintf("key %s: status %d: %v", k.text, status, err)
			}
		})
	}
	there := make(chan struct{})
	go func() {
		arrived.Wait()
		close(there)
	}()
	err := wait(ctx, there, "the calls")
	var worst string
	for until := time.Now().Add(heldReply); err == nil && time.Now().Before(until); {
		// Others begin and end meanwhile, and half-open COMMITs of the load are older.
		err = d.look(ctx, &worst, `
			SELECT COALESCE(max(format('session %s is %s since %s', pid, state, clock_timestamp() - xact_start)), '') FROM pg_stat_activity
			WHERE application_name = $1 AND xact_start BETWEEN $2 AND clock_timestamp() - interval '1 second'`, applicationBank, since)
		if worst != "" {
			err = fmt.Errorf("while calls were under way, %s", worst)
		}
		_ = deadline.Sleep(ctx, moneyInterval)
	}
	close(release)
	group.Wait()
	select {
	case status := <-statuses:
		err = fmt.Errorf("%w; %s", err, status)
	default:
	}
	return err
}

// decline: the first request is still under way when the processor, which keeps no declines,
// refuses its retry. Then the first one arrives. The client must not get the refusal.
func (d *directed) decline(ctx context.Context) error {
	r := d.run
	k := r.keys.script(askTopUp, "-1")
	var first time.Time
	arrive := make(chan struct{})
	late := sync.OnceFunc(func() {
		go func() {
			_ = deadline.Sleep(ctx, lateAfter)
			close(arrive)
		}()
	})
	declined := 0
	r.gateway.hook(k, func(c *call) verdict {
		switch {
		case first.IsZero():
			first = time.Now()
			return verdict{hold: arrive}
		case time.Since(first) < declineWithin:
			declined++
			return verdict{answer: http.StatusPaymentRequired, body: `{"error":"card_declined"}`, after: nil, before: late}
		}
		late()
		return verdict{hold: arrive}
	})
	status, err := d.answer(ctx, d.sender(1), k)
	late()
	r.note("the retry was declined %d times", declined)
	if err == nil && status != http.StatusCreated {
		err = fmt.Errorf("key %s was told %d, and its card was charged", k.text, status)
	}
	return err
}

// sleepers stops bank 0 between the intent of one request and its send, and between the fence of
// another and its COMMIT, for longer than their lease. Bank 1 takes the first over, and is refused,
// so bank 0 must not send when it wakes. The second must be posted once.
func (d *directed) sleepers(ctx context.Context) error {
	r := d.run
	sleeper, last := r.keys.script(askTopUp, "-1"), r.keys.script(askTopUp, "-1")
	sleeper.refused = true
	called, fenced := make(chan struct{}), make(chan struct{})
	reply := make(chan struct{})
	var fromSleeper atomic.Int64
	r.gateway.hook(sleeper, func(c *call) verdict {
		if c.bank == 0 {
			fromSleeper.Add(1)
			return verdict{}
		}
		return verdict{answer: http.StatusPaymentRequired, body: `{"error":"card_declined"}`}
	})
	isCalled, isFenced := sync.OnceFunc(func() { close(called) }), sync.OnceFunc(func() { close(fenced) })
	r.gateway.hook(last, func(*call) verdict {
		return verdict{after: func() { isCalled(); _ = wait(ctx, reply, "the intent of the sleeper") }}
	})
	d.once(last, resultCommit, func(int) pgfault.Fault { return pgfault.Fault{Kind: pgfault.CallAfter, Hook: isFenced} })
	var resume func()
	stopped := make(chan struct{})
	d.once(sleeper, intentCommit, func(bank int) pgfault.Fault {
		return pgfault.Fault{Kind: pgfault.CallBefore, Hook: func() {
			close(reply)
			_ = wait(ctx, fenced, "the fence")
			if ctx.Err() == nil {
				resume = r.banks.stop(bank)
			}
			close(stopped)
		}}
	})
	var group sync.WaitGroup
	defer group.Wait()
	ask := func(k *key) {
		l := d.sender(0)
		group.Go(func() { l.ask(ctx, k, false, storm.NoTrouble) })
	}
	ask(last)
	if err := wait(ctx, called, "the call"); err != nil {
		return err
	}
	ask(sleeper)
	if err := wait(ctx, stopped, "the stop"); err != nil {
		return err
	}
	if resume == nil {
		return fmt.Errorf("bank 0 could not be stopped")
	}
	r.note("bank 0 is stopped")
	wake := sync.OnceFunc(func() {
		r.note("bank 0 goes on")
		resume()
	})
	defer wake()
	_ = deadline.Sleep(ctx, stopLength)
	status, err := d.answer(ctx, d.sender(1), sleeper)
	if err == nil && status != http.StatusPaymentRequired {
		err = fmt.Errorf("key %s was told %d, and its card was declined", sleeper.text, status)
	}
	wake()
	_ = deadline.Sleep(ctx, afterSleep)
	if err == nil && fromSleeper.Load() > 0 {
		err = fmt.Errorf("key %s: bank 0 slept past its lease, and then sent", sleeper.text)
	}
	if status, lastErr := d.answer(ctx, d.sender(1), last); err == nil && (lastErr != nil || status != http.StatusCreated) {
		err = fmt.Errorf("key %s was told %d: %v", last.text, status, lastErr)
	}
	return err
}

// within: duplicates come to the other bank while a request is with the mail service, within the
// lease. None may take it over.
func (d *directed) within(ctx context.Context) error {
	r := d.run
	k := r.keys.script(askReceipt, "")
	var began time.Time
	arrived := make(chan struct{})
	release := make(chan struct{})
	r.gateway.hook(k, func(c *call) verdict {
		if c.nth > 1 {
			return verdict{}
		}
		began = time.Now()
		close(arrived)
		return verdict{hold: release}
	})
	owner, other := d.sender(1), d.sender(0)
	var group sync.WaitGroup
	group.Go(func() { owner.ask(ctx, k, false, storm.NoTrouble) })
	err := wait(ctx, arrived, "the mail")
	var tries int
	for err == nil && time.Since(began) < heldReply {
		what := other.send(ctx, k, false, false, storm.NoTrouble)
		if what == resultAnswered {
			err = fmt.Errorf("key %s has an answer while its mail is under way", k.text)
			break
		}
		_ = deadline.Sleep(ctx, moneyInterval)
	}
	if err == nil {
		err = d.look(ctx, &tries, `SELECT max(tries) FROM idempotency_effects WHERE scope = $1 AND key = $2`, tenants[k.tenant].scope, k.text)
	}
	early := time.Since(began) < leaseMin
	close(release)
	group.Wait()
	if err == nil && early && tries != 1 {
		err = fmt.Errorf("key %s was taken over within the lease of its owner (%d tries)", k.text, tries)
	}
	return err
}
