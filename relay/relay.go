// Package relay takes published messages from an outbox to a broker.
//
//	relay.New(store.Outbox(), client.Publisher(), nil).Run(ctx)
//
// Run one in a goroutine of every replica: they share the work. Close the store after Run has
// returned.
//
// A message is deleted from the outbox only after the broker has confirmed it, so none is lost. If
// the relay or the database dies in between, the message is published again with the same id, by
// which consumers drop the copy (package consumer). The relay keeps no cursor, so it skips no
// message that is committed late.
package relay

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/paidonce/idempotency/message"
)

// ErrRefused marks the error of a message that the broker will never take: it is too large, say, or
// its topic does not exist. The message stays in the outbox until an operator retries or drops it,
// and the later ones of its topic and key wait behind it.
var ErrRefused = errors.New("broker refuses the message")

// Publisher is a broker that takes messages. It is safe for concurrent use.
type Publisher interface {
	// Publish sends messages, waits until the broker has confirmed or refused each, and returns an
	// error for each, in their order: nil if it is confirmed and the broker keeps it, one that
	// wraps [ErrRefused], or any other if it is not known to be kept. Messages with one topic and
	// key arrive in their order: after an error all later ones get an error too, and if one is not
	// kept, no later one is. Publish returns soon after ctx ends, and then sends nothing more.
	Publish(ctx context.Context, messages []message.Message) []error
}

// Outbox has the messages that no broker has confirmed yet: postgres.Outbox is one. It is divided
// into shards, and all messages with one topic and key are in one shard. It is safe for concurrent
// use.
type Outbox interface {
	// Waiting returns the shards that have messages to publish.
	Waiting(ctx context.Context) (shards []int, err error)

	// Drain passes the oldest messages of a shard to publish, within the limits. Meanwhile no other
	// relay can pass any message of this shard on. If publish returns nil for a message, Drain
	// deletes it; if it returns [ErrRefused], Drain marks it. It does nothing if another relay has
	// the shard.
	Drain(ctx context.Context, shard int, limits Limits, publish func(context.Context, []message.Message) []error) (Drained, error)

	// Nudged returns a channel that gets a value soon after this process has committed a message.
	Nudged() <-chan struct{}
}

// Limits bound one batch.
type Limits struct {
	Messages int
	Bytes    int // of bodies: a batch ends with the message that reaches this number or exceeds it
}

// Drained is the result of one batch.
type Drained struct {
	Held      bool // by another relay: nothing was done
	Published int
	Refused   int           // by the broker, for good
	Failed    int           // they stay, and are tried again
	Age       time.Duration // of the oldest message
	Err       error         // of the first message that failed or was refused; the broker's words
}

// Options tune a [Relay]. Nil and the zero value are the defaults.
type Options struct {
	// Interval is the mean pause between two looks for messages of other processes. Those that a
	// handler of this process publishes are found at once. Each pause is random, from half to one
	// and a half of Interval. Defaults to 200 milliseconds.
	Interval time.Duration

	// AtOnce is the maximum number of shards that are drained at the same time, each on a
	// connection to the database. Defaults to 4.
	AtOnce int

	// BatchMessages and BatchBytes bound the messages of a shard that are sent to the broker at a
	// time: see [Limits]. They default to 500 messages and 8 MiB of bodies.
	BatchMessages int
	BatchBytes    int

	// PublishTimeout bounds the broker's confirmation of one batch. Meanwhile a transaction is open:
	// keep it below the store's IdleInTransactionTimeout. Defaults to 10 seconds.
	PublishTimeout time.Duration

	// PauseMax is the longest pause after a batch that failed. It begins at 100 milliseconds and
	// doubles. Defaults to 5 seconds.
	PauseMax time.Duration

	// OnDrain is called after each batch, from several goroutines, with its shard, result, duration
	// and error. The shard is -1 if the look for messages failed. May be nil.
	OnDrain func(shard int, drained Drained, duration time.Duration, err error)

	// Logger gets the relay's log: batches with errors. Defaults to slog.Default().
	Logger *slog.Logger
}

// Relay publishes the messages of an outbox while it runs. Every replica of a service should run
// one; they share the shards. It is safe for concurrent use.
type Relay struct {
	outbox    Outbox
	publisher Publisher
	options   Options
}

// New returns a relay, which does nothing until [Relay.Run]. It panics if an argument is missing or
// an option is negative.
func New(outbox Outbox, publisher Publisher, opts *Options) *Relay {
	var o Options
	if opts != nil {
		o = *opts
	}
	o.Interval = cmp.Or(o.Interval, 200*time.Millisecond)
	o.AtOnce = cmp.Or(o.AtOnce, 4)
	o.BatchMessages, o.BatchBytes = cmp.Or(o.BatchMessages, 500), cmp.Or(o.BatchBytes, 8<<20)
	o.PublishTimeout, o.PauseMax = cmp.Or(o.PublishTimeout, 10*time.Second), cmp.Or(o.PauseMax, 5*time.Second)
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if outbox == nil || publisher == nil || o.Interval < 0 || o.AtOnce < 0 || o.BatchMessages < 0 || o.BatchBytes < 0 || o.PublishTimeout < 0 || o.PauseMax < 0 {
		panic("idempotency/relay: New needs an outbox and a publisher, and no option may be negative")
	}
	return &Relay{outbox: outbox, publisher: publisher, options: o}
}

func (r *Relay) ended(shard int, drained Drained, duration time.Duration, err error) {
	if r.options.OnDrain != nil {
		r.options.OnDrain(shard, drained, duration, err)
	}
	if err = cmp.Or(err, drained.Err); err != nil {
		r.options.Logger.Warn("idempotency: messages were not published; they stay in the outbox and are tried again, unless the broker refused them",
			"shard", shard, "failed", drained.Failed, "refused", drained.Refused, "error", err)
	}
}

// Run publishes messages until ctx ends. It returns when the batches under way have ended: the
// broker has Options.PublishTimeout to confirm them, and then they are deleted from the outbox.
func (r *Relay) Run(ctx context.Context) {
	var all sync.WaitGroup
	defer all.Wait()
	slots := make(chan struct{}, r.options.AtOnce)
	var mu sync.Mutex
	busy, pauses := map[int]bool{}, map[int]pause{} // by shard
	lookFailed := pause{}
	for ctx.Err() == nil {
		shards, err := r.outbox.Waiting(ctx)
		if err != nil && ctx.Err() == nil {
			lookFailed = lookFailed.next(r.options.PauseMax)
			r.ended(-1, Drained{}, 0, fmt.Errorf("look for messages: %w", err))
			sleep(ctx, time.Until(lookFailed.until))
			continue
		}
		lookFailed = pause{}
		for _, shard := range shards {
			mu.Lock()
			free := !busy[shard] && !time.Now().Before(pauses[shard].until)
			busy[shard] = busy[shard] || free
			mu.Unlock()
			if !free {
				continue
			}
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return
			}
			all.Go(func() {
				failed := r.drain(ctx, shard)
				mu.Lock()
				busy[shard] = false
				if failed {
					pauses[shard] = pauses[shard].next(r.options.PauseMax)
				} else {
					delete(pauses, shard)
				}
				mu.Unlock()
				<-slots
			})
		}
		select {
		case <-ctx.Done():
		case <-r.outbox.Nudged():
		case <-time.After(r.options.Interval/2 + rand.N(r.options.Interval)):
		}
	}
}

// drain publishes the messages of a shard until there are none, and reports whether it failed.
func (r *Relay) drain(ctx context.Context, shard int) (failed bool) {
	limits := Limits{Messages: r.options.BatchMessages, Bytes: r.options.BatchBytes}
	for ctx.Err() == nil {
		started := time.Now()
		drained, err := r.outbox.Drain(ctx, shard, limits, func(_ context.Context, messages []message.Message) []error {
			// A batch that has begun goes on: otherwise a stop would publish messages twice.
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), r.options.PublishTimeout)
			defer cancel()
			return r.publisher.Publish(ctx, messages)
		})
		if ctx.Err() != nil && err != nil {
			return true
		}
		r.ended(shard, drained, time.Since(started), err)
		switch {
		case err != nil || drained.Failed > 0:
			return true
		case drained.Held || drained.Published+drained.Refused == 0:
			return false
		}
	}
	return false
}

// pause is the pause of a shard after batches that failed.
type pause struct {
	length time.Duration
	until  time.Time
}

func (p pause) next(most time.Duration) pause {
	length := min(max(2*p.length, 100*time.Millisecond), most)
	return pause{length: length, until: time.Now().Add(length/2 + rand.N(length/2+1))}
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
