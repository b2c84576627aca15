package events

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/relay"
	"github.com/paidonce/idempotency/storage/postgres"
)

const (
	// Messages of one transaction. Batches don't deadlock, because no other transaction changes the
	// rows that they write.
	statementsBatchMax = 100
	noticesBatchMax    = 10 // each waits for the mail service
	notifyTimeout      = 3 * time.Second
	notifyAgain        = 2 * time.Second // after the mail service failed
	publishTimeout     = 5 * time.Second
	countTimeout       = 2 * time.Second
)

// Retention is the time for which the consumers keep the ids of handled messages.
const Retention = 14 * 24 * time.Hour

// Mailer returns the processor that sends mails.
type Mailer func(ctx context.Context) (*bank.Processor, error)

// AtOnce returns the number of connections that the relay, and each of the two consumers, may hold
// at a time in a pool of this size. The others are for requests.
func AtOnce(poolSize int32) int { return int(max(1, min(poolSize/16, 4))) }

// Consumers handle the bank's messages. Each message has one effect; without an inbox it may have
// more.
type Consumers struct {
	Broker *Broker
	Store  *postgres.Store
	Books  *bank.Bank
	Mailer Mailer
	// OnBatch is called after each batch of consumers with an inbox. May be nil.
	OnBatch func(consumer.BatchEnd)
	Logger  *slog.Logger
}

// Relay publishes the messages of the store's outbox until ctx ends. onDrain is called after each
// batch; it may be nil.
func Relay(ctx context.Context, broker *Broker, store *postgres.Store, onDrain func(int, relay.Drained, time.Duration, error), logger *slog.Logger) {
	if broker.Ready(ctx) != nil {
		return
	}
	relay.New(store.Outbox(), broker.publisher, &relay.Options{
		AtOnce: AtOnce(store.Pool().Config().MaxConns), PublishTimeout: publishTimeout, OnDrain: onDrain, Logger: logger,
	}).Run(ctx)
}

// Run handles messages until ctx ends, and returns when the batches under way have ended. An error
// means that an operator must decide where to go on.
func (c *Consumers) Run(ctx context.Context) error {
	if c.Broker.Ready(ctx) != nil {
		return nil
	}
	options := consumer.Options{InFlightMax: AtOnce(c.Store.Pool().Config().MaxConns), BatchTimeout: batchTimeout, Retention: Retention, OnBatch: c.count, Logger: c.Logger}
	notices := options
	options.BatchMax, notices.BatchMax = statementsBatchMax, noticesBatchMax
	return all(ctx,
		consumer.New(bank.StatementsConsumer, c.Store.Inbox(), c.Broker.source(bank.StatementsConsumer), project, &options).Run,
		consumer.New(bank.NoticesConsumer, c.Store.Inbox(), c.Broker.source(bank.NoticesConsumer), c.notify, &notices).Run,
	)
}

// all runs functions and returns when all have returned. The first error ends the context of the
// others.
func all(ctx context.Context, functions ...func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	errs := make([]error, len(functions))
	var group sync.WaitGroup
	for i, f := range functions {
		group.Go(func() {
			if errs[i] = f(ctx); errs[i] != nil {
				cancel()
			}
		})
	}
	group.Wait()
	return errors.Join(errs...)
}

// project adds a message to the projection, in the consumer's transaction.
func project(ctx context.Context, d *consumer.Delivery) error {
	entries, err := bank.EntriesOf(d.Body)
	if err != nil {
		return consumer.Reject(err)
	}
	return bank.Project(ctx, postgres.Tx(ctx), entries)
}

// notify sends a mail about a transfer. The mail is not part of the transaction. Its key is derived
// from the message's id, and is looked up before the mail is sent. So if a run was undone, the next
// one finds the mail, and sends no second one.
//
// The batch holds its connection during the call: for notifyTimeout at most for each message, and
// for batchTimeout in all. So if the mail service hangs, each process holds as many connections as
// [AtOnce] returns, and requests have the others. A consumer that calls a slow service for many
// messages should write a row instead, and let a request of its own make the call by package
// effect.
func (c *Consumers) notify(ctx context.Context, d *consumer.Delivery) error {
	notice, ok, err := bank.NoticeOf(d.Body)
	switch {
	case err != nil:
		return consumer.Reject(err)
	case !ok:
		return nil
	}
	key := idempotency.DerivedKey(ctx, "mail")
	err = c.mail(ctx, func(ctx context.Context, p *bank.Processor) error { return p.Notify(ctx, key, notice) })
	if err == nil || errors.Is(err, bank.ErrKept) { // ErrKept is this mail's fault, and no outage
		return err
	}
	c.Logger.DebugContext(ctx, "a mail was not sent; it is tried again", "error", err)
	return consumer.Later(notifyAgain)
}

func (c *Consumers) mail(ctx context.Context, send func(context.Context, *bank.Processor) error) error {
	// The handler's context would refuse other connections of the pool.
	ctx, cancel := apart(ctx)
	defer cancel()
	processor, err := c.Mailer(ctx)
	if err != nil {
		return err
	}
	return send(ctx, processor)
}

// apart returns a context without the values of ctx. It ends with ctx, or after notifyTimeout.
func apart(ctx context.Context) (context.Context, context.CancelFunc) {
	other, cancel := context.WithTimeout(context.Background(), notifyTimeout)
	stop := context.AfterFunc(ctx, cancel)
	return other, func() { stop(); cancel() }
}

// count counts the copies that a batch dropped.
func (c *Consumers) count(end consumer.BatchEnd) {
	if c.OnBatch != nil {
		c.OnBatch(end)
	}
	copies := end.Duplicates + end.Redelivered
	if copies == 0 || end.Err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), countTimeout)
	defer cancel()
	if err := c.Books.CountCopies(ctx, end.Consumer, int64(copies)); err != nil {
		c.Logger.Warn("copies were not counted", "consumer", end.Consumer, "error", err)
	}
}

// Found returns a Mailer that reads the URL of the processor where the bank left it, for each mail.
func Found(books *bank.Bank) Mailer {
	var mu sync.Mutex
	var url string
	var processor *bank.Processor
	return func(ctx context.Context) (*bank.Processor, error) {
		mu.Lock()
		defer mu.Unlock()
		left, err := books.Address(ctx, bank.ProcessorAddress)
		switch {
		case err != nil:
			return nil, err
		case left == "":
			return nil, errors.New("no bank has left the URL of its processor: start one, or pass --psp")
		case left == url:
			return processor, nil
		}
		next, err := bank.NewProcessor(bank.ProcessorOptions{URL: left})
		if err != nil {
			return nil, fmt.Errorf("the URL of the processor can't be used: %w: pass --psp", err)
		}
		if processor != nil {
			processor.Close()
		}
		url, processor = left, next
		return processor, nil
	}
}
