package events

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/paidonce/idempotency/broker/kafka"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
)

const naiveBatchMax = 100 // maximum number of messages between two commits at the broker

// RunNaive handles messages as many services do: first the effect, then the commit of the offset at
// the broker. It drops no copy, and after a crash between the two it handles messages again. It
// skips a message that it can't read.
func (c *Consumers) RunNaive(ctx context.Context) error {
	if c.Broker.Ready(ctx) != nil {
		return nil
	}
	return all(ctx,
		func(ctx context.Context) error { return c.naive(ctx, bank.StatementsConsumer, c.projectNaively) },
		func(ctx context.Context) error { return c.naive(ctx, bank.NoticesConsumer, c.notifyNaively) },
	)
}

func (c *Consumers) naive(ctx context.Context, name string, handle func(ctx context.Context, record *kgo.Record) error) error {
	options := []kgo.Opt{
		kgo.ConsumerGroup(name), kgo.ConsumeTopics(bank.Topic), kgo.DisableAutoCommit(), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()),
		kgo.SessionTimeout(sessionTimeout), kgo.HeartbeatInterval(sessionTimeout / 5), kgo.RebalanceTimeout(rebalanceTimeout),
	}
	if c.Broker.instance != "" {
		options = append(options, kgo.InstanceID(c.Broker.instance))
	}
	client, err := c.Broker.newClient(options...)
	if err != nil {
		return fmt.Errorf("consume: %w", err)
	}
	defer client.Close()
	for ctx.Err() == nil {
		fetches := client.PollRecords(ctx, naiveBatchMax)
		records := fetches.Records()
		handled := 0
		for _, record := range records {
			for try := 0; ctx.Err() == nil; try++ {
				err := handle(ctx, record)
				if err == nil {
					handled++
					break
				}
				c.Logger.WarnContext(ctx, "a message was not handled; it is tried again", "consumer", name, "partition", record.Partition, "offset", record.Offset, "error", err)
				pause(ctx, try)
			}
		}
		if handled > 0 {
			c.commit(ctx, client, name, records[:handled])
		}
	}
	return nil
}

// commitTriesMax is the maximum number of tries of a commit: the broker refuses it during a
// rebalance.
const commitTriesMax = 10

// commit commits the offsets of records, even if ctx has ended meanwhile.
func (c *Consumers) commit(ctx context.Context, client *kgo.Client, name string, records []*kgo.Record) {
	for try := range commitTriesMax {
		timed, cancel := context.WithTimeout(context.WithoutCancel(ctx), askTimeout)
		err := client.CommitRecords(timed, records...)
		cancel()
		if err == nil {
			return
		}
		c.Logger.WarnContext(ctx, "the broker did not commit", "consumer", name, "error", err)
		if ctx.Err() != nil {
			return
		}
		pause(ctx, try)
	}
}

// projectNaively adds a message to the projection in a transaction of its own.
func (c *Consumers) projectNaively(ctx context.Context, record *kgo.Record) error {
	entries, err := bank.EntriesOf(record.Value)
	if err != nil { // lost: a naive consumer has nowhere to put it
		c.Logger.ErrorContext(ctx, "a message can't be read and is skipped", "partition", record.Partition, "offset", record.Offset, "error", err)
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, batchTimeout)
	defer cancel()
	return pgx.BeginFunc(ctx, c.Store.Pool(), func(tx pgx.Tx) error {
		if err := bank.Project(ctx, tx, entries); err != nil {
			return err
		}
		return bank.CountHandled(ctx, tx, bank.StatementsConsumer, 1)
	})
}

func (c *Consumers) notifyNaively(ctx context.Context, record *kgo.Record) error {
	if notice, ok, err := bank.NoticeOf(record.Value); err == nil && ok {
		var id string
		for _, header := range record.Headers {
			if header.Key == kafka.IDHeader {
				id = string(header.Value)
			}
		}
		if err := c.mail(ctx, func(ctx context.Context, p *bank.Processor) error { return p.NotifyUnseen(ctx, id, notice) }); err != nil {
			return err
		}
	}
	return bank.CountHandled(ctx, c.Store.Pool(), bank.NoticesConsumer, 1)
}
