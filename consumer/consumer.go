// Package consumer handles each message of a source once.
//
//	source := client.Source("statements", "transfers") // client: of package broker/kafka or broker/nats
//	err := consumer.New("statements", store.Inbox(), source, project, nil).Run(ctx)
//
//	func project(ctx context.Context, m *consumer.Delivery) error {
//		_, err := postgres.Tx(ctx).Exec(ctx, addEntries, string(m.Body))
//		return err
//	}
//
// Run one in a goroutine of every replica: the broker gives each some of the partitions. Close the
// store after Run has returned. postgres.Store.Queue is a source and a store that need no broker.
//
// The effects of a message are committed together with its position and its id. The position
// (topic, partition, offset) is moved by compare-and-set. By it the consumer drops messages that a
// broker delivers again after a rebalance, a crash or a pause. The id is recorded as a request's
// key is. By it the consumer drops copies of a message that was published twice. The broker's own
// offsets decide nothing.
//
// If a handler fails, its message is tried again, and then parked, in the commit that moves the
// position behind it. So it blocks no other key. A parked message is tried again later. After
// AttemptsMax attempts it is dead until a person redrives it. A try that an outage of the database
// ended does not count.
package consumer

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/message"
)

// Limits.
const (
	NameBytesMax  = 100 // of a consumer's name
	ErrorBytesMax = 500 // of the reason that is kept with a parked message
)

// Handler handles a message. Its writes through postgres.Tx(ctx) are committed with the position,
// or not at all; it may publish messages too. idempotency.DerivedKey works as in a request: its key
// is the consumer and the message's id. A handler may run again for a message whose run was undone.
//
// After an error the writes are undone, and the message is tried again, up to Options.AttemptsMax
// times. [Reject] and [Later] make errors for other ends. The text of the error is kept with a
// parked message, up to 500 bytes ([ErrorBytesMax]).
type Handler func(ctx context.Context, m *Delivery) error

// BatchHandler handles the messages of one batch together, oldest first: with one statement for all
// of them, say. It is like a [Handler], except that its context belongs to no message:
// idempotency.DerivedKey and message.Publish need the context of one message, [Delivery.Context].
//
// After an error its writes are undone, and it runs again with half of the messages, until the
// message that can't be handled is found.
type BatchHandler func(ctx context.Context, messages []*Delivery) error

// Context returns the context of a [BatchHandler] as the context of this message. It panics in any
// other context.
func (d *Delivery) Context(ctx context.Context) context.Context {
	c, ok := ctx.Value(batchKey{}).(*batchContext)
	if !ok {
		panic(idempotency.UsageError("idempotency/consumer: Context outside a BatchHandler: pass the handler's context on"))
	}
	return idempotency.HandlerContext(ctx, c.service, idempotency.Key{Scope: idempotency.MessageScopePrefix + c.name, Value: d.ID}, c.attempt)
}

type batchKey struct{}

type batchContext struct {
	name, service string
	attempt       idempotency.AttemptID
}

// Order says which messages wait behind one that could not be handled.
type Order int

// The orders.
const (
	// ByKey: messages of the same topic and key wait behind it; others go on.
	ByKey Order = iota
	// ByPartition: the whole partition waits. The message is tried in place until it is handled, even
	// if it is rejected. It is dead only if it is a mismatch, or if DeathsMax processes died in it.
	ByPartition
	// Unordered: no message waits.
	Unordered
)

// Options tune a [Consumer]. Nil and the zero value are the defaults, which are the safest.
type Options struct {
	// Order defaults to ByKey.
	Order Order

	// BatchMax is the maximum number of messages of one partition that are handled in one transaction.
	// A batch holds its row locks until it ends, so handlers that update rows which other partitions
	// or requests update too must leave it at 1: they would deadlock. After a deadlock, and after a
	// batch that took longer than BatchTimeout, batches are halved. A batch costs the round trips of
	// its handlers and two: handlers that leave their writes to postgres.DeferExec cost none, and a
	// [BatchHandler] may need one for all. Defaults to 1.
	BatchMax int

	// InFlightMax is the maximum number of batches at a time. Each holds a connection. Defaults to 4.
	InFlightMax int

	// BatchTimeout bounds one batch. It must be below the broker's time for a rebalance, and below the
	// store's IdleInTransactionTimeout. Defaults to 10 seconds.
	BatchTimeout time.Duration

	// AttemptsInPlace is the maximum number of attempts of a message before it is parked. Between
	// them no transaction is open and no connection is held. Defaults to 3.
	AttemptsInPlace int

	// AttemptsMax is the maximum number of attempts of a message in all. Then it is dead. Defaults to
	// 8.
	AttemptsMax int

	// BackoffMax is the longest pause before a parked message is tried again. After n attempts the
	// pause is random, up to 2^n seconds and at least half of that: 4 to 8 seconds after the third
	// attempt. Defaults to 5 minutes.
	BackoffMax time.Duration

	// DeathsMax is the number of processes that may die while they handle a message. After that the
	// message is dead, and its handler does not run again. A process that dies leaves only a count
	// for its partition, so after DeathsMax - 3 deaths the partition's messages are handled one at
	// a time. Defaults to 5.
	DeathsMax int

	// Retention is the time for which the id of a handled message is kept. It must be longer than
	// the time for which the broker keeps a message plus the time that a dead message may wait for
	// its redrive. Defaults to 14 days.
	Retention time.Duration

	// DeadTopic, if set, is the topic to which each dead message is published too, in the commit
	// that makes it dead.
	DeadTopic string

	// Service goes into every derived key, as idempotency.Options.Service does.
	Service string

	// OnBatch is called after each batch, by the goroutine that ran it. May be nil.
	OnBatch func(BatchEnd)

	// ParkedInterval is the mean pause between two looks for parked messages that are due. Defaults to
	// 1 second.
	ParkedInterval time.Duration

	// Logger gets the consumer's log: parked and dead messages, and outages. It has no key and no
	// body. Defaults to slog.Default().
	Logger *slog.Logger
}

// BatchEnd is the result of a batch.
type BatchEnd struct {
	Consumer    string
	Partition   Partition
	Duration    time.Duration
	Executed    int
	Duplicates  int // recorded or parked before: published twice
	Redelivered int // in front of the position: delivered again
	Mismatches  int // an id that was recorded with other content; they are dead
	Parked      int // waiting, or behind another
	Dead        int // mismatches included
	Err         error
}

// Consumer handles the messages of a source. It is a [Receiver], and safe for concurrent use.
type Consumer struct {
	name    string
	store   Store
	source  Source
	handler Handler
	batch   BatchHandler // in place of handler
	options Options
	slots   chan struct{}

	unsettled []unsettledTry // of retry

	mu         sync.Mutex
	partitions map[Partition]*partition
	rewind     context.CancelCauseFunc // ends the source's run; nil outside of Run
}

// New returns a consumer, which does nothing until [Consumer.Run]. Positions and records belong to
// its name: two consumers of one topic need two names, and under a new name every message is new.
// The name is 1 to 100 letters, digits, dots, underscores and hyphens. New panics if an argument is
// missing or an option can't work.
func New(name string, store Store, source Source, handler Handler, opts *Options) *Consumer {
	if handler == nil {
		panic("idempotency/consumer: New needs a handler")
	}
	return newConsumer(name, store, source, handler, nil, opts)
}

// NewBatch is New with a handler that gets whole batches.
func NewBatch(name string, store Store, source Source, handler BatchHandler, opts *Options) *Consumer {
	if handler == nil {
		panic("idempotency/consumer: NewBatch needs a handler")
	}
	return newConsumer(name, store, source, nil, handler, opts)
}

func newConsumer(name string, store Store, source Source, handler Handler, batch BatchHandler, opts *Options) *Consumer {
	var o Options
	if opts != nil {
		o = *opts
	}
	o.BatchMax, o.InFlightMax = cmp.Or(o.BatchMax, 1), cmp.Or(o.InFlightMax, 4)
	o.AttemptsInPlace, o.AttemptsMax, o.DeathsMax = cmp.Or(o.AttemptsInPlace, 3), cmp.Or(o.AttemptsMax, 8), cmp.Or(o.DeathsMax, 5)
	o.BatchTimeout, o.BackoffMax, o.Retention = cmp.Or(o.BatchTimeout, 10*time.Second), cmp.Or(o.BackoffMax, 5*time.Minute), cmp.Or(o.Retention, 14*24*time.Hour)
	o.ParkedInterval = cmp.Or(o.ParkedInterval, time.Second)
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.OnBatch == nil {
		o.OnBatch = func(BatchEnd) {}
	}
	wrong := ""
	switch {
	case name == "" || len(name) > NameBytesMax || strings.ContainsFunc(name, notOfName):
		wrong = fmt.Sprintf("its name must be 1 to %d letters, digits, dots, underscores and hyphens", NameBytesMax)
	case store == nil || source == nil:
		wrong = "it needs a store and a source"
	case o.BatchMax < 0 || o.InFlightMax < 0 || o.AttemptsInPlace < 0 || o.AttemptsMax < 0 || o.DeathsMax < 0 || o.BatchTimeout < 0 || o.BackoffMax < 0 || o.ParkedInterval < 0 || o.Retention < idempotency.TTLMin:
		wrong = "no option may be negative, and Retention must be at least 1 second"
	case o.AttemptsMax < o.AttemptsInPlace:
		wrong = "AttemptsMax must not be below AttemptsInPlace"
	}
	if wrong != "" {
		panic("idempotency/consumer: " + wrong)
	}
	return &Consumer{name: name, store: store, source: source, handler: handler, batch: batch, options: o, slots: make(chan struct{}, o.InFlightMax), partitions: map[Partition]*partition{}}
}

func notOfName(r rune) bool {
	return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '.' && r != '_' && r != '-'
}

// Run handles messages until ctx ends, and returns when the batches under way have ended. The error
// is that of the source: see [ErrTrimmed] and [ErrRecreated].
//
// If the database was restored, or a standby without the last commits was promoted, its positions
// went back. Then Run begins all partitions again, from there.
func (c *Consumer) Run(ctx context.Context) error {
	parked, stop := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() { c.retry(parked) })
	err := c.consume(ctx)
	for errors.Is(err, errRewound) {
		err = c.consume(ctx)
	}
	stop()
	running.Wait()
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		err = nil
	}
	return err
}

// errRewound: a position is lower than one that this process has committed or read.
var errRewound = errors.New("the position went back")

// consume runs the source until it ends. It returns errRewound if a position went back.
func (c *Consumer) consume(ctx context.Context) error {
	source, end := context.WithCancelCause(ctx)
	defer end(nil)
	c.mu.Lock()
	c.rewind = end
	c.mu.Unlock()
	err := c.source.Run(source, c)
	if ctx.Err() == nil && errors.Is(context.Cause(source), errRewound) {
		err = errRewound
	}
	// This process lives, so it takes the deaths back that it has counted.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), forgiveTimeout)
	defer cancel()
	c.mu.Lock()
	defer c.mu.Unlock()
	for p, state := range c.partitions {
		if state.counted {
			_ = c.store.ForgiveDeath(ctx, c.name, p) // at worst it counts
		}
		delete(c.partitions, p)
	}
	return err
}

// forgiveTimeout bounds the statement that takes a death back.
const forgiveTimeout = 2 * time.Second

// BatchMax implements [Receiver].
func (c *Consumer) BatchMax() int { return c.options.BatchMax }

// Assigned implements [Receiver].
func (c *Consumer) Assigned(ctx context.Context, p Partition) (int64, error) {
	position, err := c.store.Position(ctx, c.name, p)
	switch {
	case err != nil:
		return 0, err
	case position.recreated(p):
		return 0, c.recreated(p)
	}
	c.partition(p).least.Store(position.Next)
	if position.Next >= 0 {
		return position.Next, nil
	}
	return FromOldest, nil
}

// recreated reports whether the position is that of another source with the partition's name.
func (p *Position) recreated(partition Partition) bool {
	return p.Next >= 0 && p.Incarnation != partition.Incarnation
}

func (c *Consumer) recreated(p Partition) error {
	return fmt.Errorf("consumer %s: %w: %s is not the one whose offset is stored: if that is meant, delete its rows from message_offsets", c.name, ErrRecreated, p.Source)
}

// partition is the state of a partition in this process. One call of Receive at a time uses it.
type partition struct {
	counted bool         // a death is counted, and not yet taken back
	lives   bool         // this process has committed a batch here: it counts no death any more
	least   atomic.Int64 // the position can't be lower, unless the database went back
	deaths  int

	size     int               // of the next batch
	trouble  map[int64]trouble // by offset
	failures int               // of the store, in a row
}

// trouble is the state of a message that can't be handled with others.
type trouble struct {
	attempts int
	park     *Park // set when its end is decided, and only has to be committed
	retry    time.Time
}

// notAssigned is partition.least if the source did not ask for the position.
const notAssigned = math.MinInt64

func (c *Consumer) partition(p Partition) *partition {
	c.mu.Lock()
	defer c.mu.Unlock()
	state := c.partitions[p]
	if state == nil {
		state = &partition{size: c.options.BatchMax, trouble: map[int64]trouble{}}
		state.least.Store(notAssigned)
		c.partitions[p] = state
	}
	return state
}

// Receive implements [Receiver].
func (c *Consumer) Receive(ctx context.Context, p Partition, deliveries []Delivery) (settled int, pause time.Duration) {
	state := c.partition(p)
	for settled < len(deliveries) && ctx.Err() == nil {
		n, wait := c.next(ctx, p, state, deliveries[settled:])
		settled += n
		if wait > 0 {
			return settled, wait
		}
	}
	return settled, 0
}

// next handles the first messages, as many as one batch may have. If it settles none, pause is the
// time after which they should be delivered again; 0 means at once.
func (c *Consumer) next(ctx context.Context, p Partition, state *partition, deliveries []Delivery) (settled int, pause time.Duration) {
	select {
	case c.slots <- struct{}{}:
	case <-ctx.Done():
		return 0, 0
	}
	defer func() { <-c.slots }()
	ctx, cancel := context.WithTimeout(ctx, c.options.BatchTimeout)
	defer cancel()

	n := min(len(deliveries), state.size)
	for i := range n {
		if _, ok := state.trouble[deliveries[i].Offset]; ok {
			n = max(i, 1)
			break
		}
	}
	known := state.trouble[deliveries[0].Offset]
	if wait := time.Until(known.retry); wait > 0 {
		return 0, wait
	}
	run := &run{Consumer: c, ctx: ctx, p: p, state: state, deliveries: slices.Clone(deliveries[:n]), decided: known.park, started: time.Now()}
	run.end = BatchEnd{Consumer: c.name, Partition: p}
	if err := run.countDeath(); err != nil {
		settled, pause = run.failed(0, err)
	} else {
		settled, pause = run.do()
	}
	run.forgiveDeath()
	run.end.Duration = time.Since(run.started)
	c.options.OnBatch(run.end)
	return settled, pause
}

// countDeath counts this process as dead before the batch begins, unless it has committed a batch
// in this partition: if it dies in the batch, the count stays. After many deaths the messages are
// handled one at a time. After DeathsMax of them the first message is dead.
func (r *run) countDeath() error {
	if r.state.lives {
		return nil
	}
	if !r.state.counted {
		deaths, err := r.store.CountDeath(r.ctx, r.name, r.p)
		if err != nil {
			return err
		}
		r.state.counted, r.state.deaths = true, deaths
	}
	const deathsAlone = 3 // before the last one
	if r.state.deaths > max(r.options.DeathsMax-deathsAlone, 0) {
		r.deliveries, r.state.size = r.deliveries[:1], 1 // the next ones grow again
	}
	if others := r.state.deaths - 1; others >= r.options.DeathsMax && r.decided == nil {
		r.decided = &Park{State: Dead, Attempts: others, Error: fmt.Sprintf("%d processes ended before it was handled", others)}
	}
	return nil
}

// forgiveDeath takes the count back after a batch that was not committed: whatever the failure was,
// the process did not end. If the store is away, the count stands for the next batch.
func (r *run) forgiveDeath() {
	if r.state.lives || !r.state.counted {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.ctx), forgiveTimeout)
	defer cancel()
	if r.store.ForgiveDeath(ctx, r.name, r.p) == nil {
		r.state.counted = false
	}
}

// outage returns the pause after a failure of the store.
func (c *Consumer) outage(p Partition, state *partition, err error) time.Duration {
	if state.failures++; state.failures == 1 {
		c.options.Logger.Warn("idempotency: the store of a consumer failed; it is tried again, and no message is parked for it", "consumer", c.name, "source", p.Source, "partition", p.Number, "error", err)
	}
	limit := min(100*time.Millisecond<<min(state.failures-1, 10), 10*time.Second)
	return limit/2 + rand.N(limit/2+1)
}

// run is one batch.
type run struct {
	*Consumer
	ctx        context.Context
	p          Partition
	state      *partition
	deliveries []Delivery
	decided    *Park // of the only message
	started    time.Time
	end        BatchEnd
}

func (r *run) do() (settled int, pause time.Duration) {
	claim := &Claim{Consumer: r.name, Partition: r.p, Attempt: idempotency.NewAttemptID(), Keys: r.options.Order == ByKey}
	for i := range r.deliveries {
		d := &r.deliveries[i]
		d.ID = recordID(d.ID)
		claim.Entries = append(claim.Entries, Entry{
			ID: d.ID, Offset: d.Offset, Topic: d.Topic, Key: d.Key,
			Fingerprint: FingerprintOf(&d.Message),
		})
	}
	batch, err := r.store.Begin(r.ctx, claim)
	if err != nil {
		return r.failed(0, err)
	}
	finish := End{TTL: r.options.Retention}
	position, least := batch.Position(), r.state.least.Load()
	switch {
	case position.recreated(r.p):
		_ = rollback(r.ctx, batch)
		return r.failed(0, r.recreated(r.p))
	case least != notAssigned && position.Next < least:
		_ = rollback(r.ctx, batch)
		return r.rewound(position.Next, least)
	}
	end := r.end // the counts, once the batch is committed
	failedAt, failure := anyOfThem, error(nil)
	var together []*Delivery    // of a BatchHandler
	behind := map[string]bool{} // topics and keys that were parked in this batch
	for i := range r.deliveries {
		d := &r.deliveries[i]
		if d.Offset < position.Next {
			end.Redelivered++
			continue
		}
		finish.Next = d.Offset + 1
		known := batch.Known(i)
		if known == Unknown && d.Key != nil && len(behind) > 0 && behind[groupOf(d)] {
			known = Behind
		}
		switch {
		case known == Recorded, known == Parked:
			end.Duplicates++
			continue
		case known == Mismatch:
			end.Mismatches++
			finish.Park = append(finish.Park, Park{Delivery: d, State: Dead, Error: "its id was recorded with another topic or body"})
		case known == Behind:
			finish.Park = append(finish.Park, Park{Delivery: d, State: WaitingBehind, Error: "it waits behind another message of its key"})
		case r.decided != nil:
			park := *r.decided
			park.Delivery = d
			finish.Park = append(finish.Park, park)
		case r.batch != nil:
			together = append(together, d)
			finish.Recorded = append(finish.Recorded, i)
		default:
			if failure = r.handle(r.ctx, batch, d, claim.Attempt); failure == nil {
				failure = batch.Check()
			}
			if failure != nil {
				failedAt = i
			} else {
				finish.Recorded = append(finish.Recorded, i)
			}
		}
		if failure != nil {
			break
		}
		if claim.Keys && d.Key != nil && (known != Unknown || r.decided != nil) {
			behind[groupOf(d)] = true
		}
	}
	if len(together) > 0 {
		failure = r.handleTogether(r.ctx, batch, together, claim.Attempt)
	}
	// The transaction's own failure comes first: it is not the fault of a message.
	if err := batch.Seal(); err != nil && (failure == nil || !errors.Is(err, idempotency.ErrAborted)) {
		_ = rollback(r.ctx, batch)
		if errors.Is(err, idempotency.ErrAborted) { // a query that was left open, say: it names no message
			return r.blame(failedAt, err)
		}
		return r.failed(0, err)
	}
	if failure != nil {
		_ = rollback(r.ctx, batch)
		return r.blame(failedAt, failure)
	}
	if finish.Next <= position.Next { // all of them were redelivered
		_ = rollback(r.ctx, batch)
		r.end = end
		return len(r.deliveries), 0
	}
	for i := range finish.Park {
		finish.Publish = append(finish.Publish, r.deadLetter(&finish.Park[i])...)
	}
	if err := commit(r.ctx, batch, &finish); err != nil {
		return r.failed(len(finish.Recorded), err)
	}
	end.Executed = len(finish.Recorded)
	for i := range finish.Park {
		park := &finish.Park[i]
		if park.State == Dead {
			end.Dead++
		} else {
			end.Parked++
		}
		if park.State != WaitingBehind {
			r.options.Logger.Warn("idempotency: a message is parked", "consumer", r.name, "source", r.p.Source, "partition", r.p.Number, "offset", park.Delivery.Offset,
				"dead", park.State == Dead, "attempts", park.Attempts)
		}
	}
	for i := range r.deliveries {
		delete(r.state.trouble, r.deliveries[i].Offset)
	}
	r.end = end
	if least != notAssigned {
		r.state.least.Store(finish.Next)
	}
	r.state.counted, r.state.lives, r.state.deaths, r.state.failures = false, true, 0, 0
	r.state.size = min(r.state.size+1, r.options.BatchMax)
	return len(r.deliveries), 0
}

// groupOf returns the topic and the key of a message.
func groupOf(d *Delivery) string { return d.Topic + "\x00" + string(d.Key) }

// endTimeout bounds COMMIT and ROLLBACK, and so the time that a silent connection can hold a batch
// after BatchTimeout.
const endTimeout = 5 * time.Second

// commit commits a batch, even if ctx has ended: its handlers have returned.
func commit(ctx context.Context, batch Batch, end *End) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTimeout)
	defer cancel()
	return batch.Commit(ctx, end)
}

func rollback(ctx context.Context, batch Batch) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTimeout)
	defer cancel()
	return batch.Rollback(ctx)
}

// deadLetter returns the message to publish for a dead one, if any.
func (c *Consumer) deadLetter(park *Park) []message.Message {
	if c.options.DeadTopic == "" || park.State != Dead {
		return nil
	}
	m := park.Delivery.Message
	m.Topic = c.options.DeadTopic
	m.ID = message.ID(idempotency.HandlerContext(context.Background(), c.options.Service, c.key(park.Delivery), idempotency.AttemptID{}), "dead")
	return []message.Message{m}
}

// key returns the key of a message's record.
func (c *Consumer) key(d *Delivery) idempotency.Key {
	return idempotency.Key{Scope: idempotency.MessageScopePrefix + c.name, Value: d.ID}
}

// handle runs the handler for a message.
func (c *Consumer) handle(ctx context.Context, batch Batch, d *Delivery, attempt idempotency.AttemptID) error {
	ctx = idempotency.HandlerContext(batch.Context(ctx), c.options.Service, c.key(d), attempt)
	return returned(func() error { return c.handler(ctx, d) })
}

// handleTogether runs a BatchHandler.
func (c *Consumer) handleTogether(ctx context.Context, batch Batch, messages []*Delivery, attempt idempotency.AttemptID) error {
	ctx = context.WithValue(batch.Context(ctx), batchKey{}, &batchContext{name: c.name, service: c.options.Service, attempt: attempt})
	return returned(func() error { return c.batch(ctx, messages) })
}

// returned runs a handler and returns its error, even if it panics or ends its goroutine. It runs
// in a goroutine of its own, because that of the source must go on.
func returned(handle func() error) error {
	err := errGoexit
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			if value := recover(); value != nil {
				err = &idempotency.PanicError{Value: value, Stack: debug.Stack()}
			}
		}()
		err = handle()
	}()
	<-done
	return err
}

// errGoexit stands for a handler that ended its goroutine.
var errGoexit = errors.New("handler did not return")

// failed returns the pause after an error that is no message's fault.
func (r *run) failed(recorded int, err error) (settled int, pause time.Duration) {
	r.end.Err = err
	switch {
	case errors.Is(err, ErrHeld):
		return 0, 500*time.Millisecond + rand.N(500*time.Millisecond)
	case errors.Is(err, ErrFenced):
		return 0, 10*time.Millisecond + rand.N(10*time.Millisecond) // the next batch reads the position again
	case errors.Is(err, idempotency.ErrNotSerializable):
		r.state.size = max(len(r.deliveries)/2, 1)
		return 0, time.Millisecond + rand.N(20*time.Millisecond)
	case errors.Is(err, idempotency.ErrKeyRecorded):
		// A copy of one of them was handled meanwhile. If each has its own batch, Begin finds
		// which.
		r.state.size = 1
		return 0, time.Millisecond
	case errors.Is(err, idempotency.ErrAborted) && recorded > 0:
		return r.blame(anyOfThem, err) // a deferred statement, or a deferred constraint
	case r.ctx.Err() == nil, errors.Is(err, idempotency.ErrUnknown):
	case errors.Is(r.ctx.Err(), context.Canceled):
		return 0, time.Millisecond
	case len(r.deliveries) > 1: // the same batch would take too long the next time too
		r.state.size = len(r.deliveries) / 2
		return 0, time.Millisecond
	}
	return 0, r.outage(r.p, r.state, err)
}

// rewound ends the source's run: its offsets are those of effects that the database has lost.
func (r *run) rewound(next, least int64) (settled int, pause time.Duration) {
	r.end.Err = fmt.Errorf("%w: to %d, from %d", errRewound, next, least)
	r.options.Logger.Warn("idempotency: the database has an earlier position than before, as after a restore or the promotion of a standby; its messages are consumed again",
		"consumer", r.name, "source", r.p.Source, "partition", r.p.Number, "next", next, "was", least)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.rewind != nil {
		r.rewind(errRewound)
	}
	return 0, time.Second
}

// anyOfThem is the index of a message that is not known.
const anyOfThem = -1

// blame decides the end of a message that could not be handled. If its batch has others, they are
// handled without it first. If it is not known which message it is, the batch is halved until it
// is.
func (r *run) blame(at int, cause error) (settled int, pause time.Duration) {
	r.end.Err = cause
	d := &r.deliveries[max(at, 0)]
	var later *laterError
	outage := errors.Is(cause, idempotency.ErrUnavailable) || errors.Is(cause, idempotency.ErrNotSerializable) || r.ctx.Err() != nil
	known := r.state.trouble[d.Offset]
	switch {
	case outage:
		return r.failed(0, cause)
	case at == anyOfThem && len(r.deliveries) > 1:
		r.state.size = len(r.deliveries) / 2
		return 0, time.Millisecond
	case errors.Is(cause, ErrRejected):
		known.park = &Park{State: Dead, Attempts: known.attempts + 1, Error: reason(cause)}
	case errors.As(cause, &later):
		known.park = &Park{State: Waiting, Attempts: known.attempts, NotBefore: later.wait, Error: reason(cause)}
	default:
		if len(r.deliveries) > 1 { // a run among others does not count as an attempt
			break
		}
		known.attempts++
		switch {
		case known.attempts >= r.options.AttemptsMax:
			known.park = &Park{State: Dead, Attempts: known.attempts, Error: reason(cause)}
		case known.attempts >= r.options.AttemptsInPlace:
			known.park = &Park{State: Waiting, Attempts: known.attempts, NotBefore: r.backoff(known.attempts), Error: reason(cause)}
		default:
			known.retry = time.Now().Add(20*time.Millisecond + rand.N(100*time.Millisecond<<min(known.attempts, 4)))
		}
	}
	if r.options.Order == ByPartition && known.park != nil { // it is not parked
		wait := r.backoff(known.attempts)
		if later != nil {
			wait = later.wait
		}
		known.park, known.retry = nil, time.Now().Add(wait)
		r.options.Logger.Error("idempotency: a message blocks its partition", "consumer", r.name, "source", r.p.Source, "partition", r.p.Number, "offset", d.Offset, "attempts", known.attempts)
	}
	r.state.trouble[d.Offset] = known
	return 0, max(time.Until(known.retry), 0)
}

// backoff returns the pause before the next try of a message.
func (c *Consumer) backoff(attempts int) time.Duration {
	limit := min(time.Second<<min(attempts, 20), c.options.BackoffMax)
	return limit/2 + rand.N(limit/2+1)
}

// FingerprintOf returns the fingerprint of a message: of its topic and body.
func FingerprintOf(m *message.Message) idempotency.Fingerprint {
	return idempotency.NewFingerprintV1("MESSAGE", m.Topic, "", "", m.Body)
}

// recordID returns the value of the key for a message's id: the id itself, or its hash if it is not
// a valid value.
func recordID(id string) string {
	if idempotency.ValidateKeyValue(id) == nil {
		return id
	}
	sum := sha256.Sum256([]byte(id))
	return "sha256:" + hex.EncodeToString(sum[:])
}

// ErrRejected marks an error of [Reject].
var ErrRejected = errors.New("message is rejected")

// Reject returns an error for a message that no later try can handle: it is dead at once. The text
// of err is kept for operators, up to 500 bytes ([ErrorBytesMax]); it must not quote the message.
func Reject(err error) error { return fmt.Errorf("%w: %w", ErrRejected, err) }

// Later returns an error for a message that should be tried again after this time: it is parked
// until then, and the try does not count. With the order ByPartition nothing is parked: its partition
// waits so long.
func Later(wait time.Duration) error { return &laterError{wait} }

type laterError struct{ wait time.Duration }

func (e *laterError) Error() string { return fmt.Sprintf("its handler asked for %v", e.wait) }

// withoutWords returns text with the SQLSTATE in place of each error of PostgreSQL that err wraps.
func withoutWords(text string, err error) string {
	switch e := err.(type) {
	case interface { // pgconn.PgError
		error
		SQLState() string
	}:
		return strings.ReplaceAll(text, e.Error(), "SQLSTATE "+e.SQLState())
	case interface{ Unwrap() error }:
		return withoutWords(text, e.Unwrap())
	case interface{ Unwrap() []error }:
		for _, one := range e.Unwrap() {
			text = withoutWords(text, one)
		}
	}
	return text
}

// reason returns the text of an error as it is kept with a parked message. A panic's value and the
// words of PostgreSQL may be data, so only the value's type and the SQLSTATE are kept.
func reason(err error) string {
	var panicked *idempotency.PanicError
	text := err.Error()
	if errors.As(err, &panicked) {
		text = panicked.Error()
	}
	text = withoutWords(text, err)
	text = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, text)
	if len(text) > ErrorBytesMax {
		text = strings.ToValidUTF8(text[:ErrorBytesMax], "")
	}
	return text
}

var _ Receiver = (*Consumer)(nil)
