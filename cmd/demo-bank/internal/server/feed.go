package server

import (
	"context"
	"path/filepath"
	"strings"
	"time"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/events"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// brokerFolder is the folder of the broker inside, in the data folder.
const brokerFolder = "broker"

// openBroker returns the configured broker, or starts one inside, and passes it to the books. A
// broker inside listens on the port of the last one if it can, so that consumers and relays in
// other processes find it again.
func (s *Server) openBroker(ctx context.Context, store *postgres.Store, books *bank.Bank) (broker *events.Broker, err error) {
	if len(s.config.Brokers) > 0 {
		broker, err = events.Connect(s.config.Brokers, events.Instance(s.config.Addr), s.logger)
	} else {
		last, addressErr := books.Address(ctx, bank.BrokersAddress)
		if addressErr != nil {
			return nil, addressErr
		}
		dir := ""
		if s.config.DataDir != "" {
			dir = filepath.Join(s.config.DataDir, brokerFolder)
		}
		broker, err = events.Start(dir, events.Port(last), events.Instance(s.config.Addr), s.logger)
	}
	if err != nil {
		return nil, err
	}
	s.brokers = broker.Addresses()
	books.Feed(broker, operator.New(store, nil))
	return broker, nil
}

// leaveAddresses stores the addresses that consumers and relays in other processes need.
func (s *Server) leaveAddresses(ctx context.Context, books *bank.Bank) error {
	if err := books.LeaveAddress(ctx, bank.ProcessorAddress, s.psp); err != nil {
		return err
	}
	return books.LeaveAddress(ctx, bank.BrokersAddress, strings.Join(s.brokers, ","))
}

// feed returns the relay and the consumers of this process. Each runs until its context ends.
func (s *Server) feed(ctx context.Context, db *database, store *postgres.Store, books *bank.Bank, broker *events.Broker, processor *bank.Processor) (run []func(context.Context), err error) {
	if !s.config.NoRelay {
		run = append(run, func(ctx context.Context) { events.Relay(ctx, broker, store, s.metrics.messages.OnDrain, s.logger) })
	}
	if !s.config.NoConsumers {
		consumers := &events.Consumers{
			Broker: broker, Store: store, Books: books, OnBatch: s.metrics.messages.OnBatch, Logger: s.logger,
			Mailer: func(context.Context) (*bank.Processor, error) { return processor, nil },
		}
		run = append(run, func(ctx context.Context) {
			if err := consumers.Run(ctx); err != nil {
				s.logger.Error("the consumers have stopped; messages wait at the broker", "error", err)
			}
		})
	}
	if broker.Inside() && s.config.DataDir == "" && db.embedded == nil {
		// The log of the last broker inside is lost, but the books are not.
		republish, err := books.Lost(ctx, events.Retention, bank.StatementsConsumer, bank.NoticesConsumer)
		if err != nil {
			return nil, err
		}
		run = append(run, func(ctx context.Context) { s.republish(ctx, republish) })
	}
	return run, nil
}

// republishPause is the pause between two tries.
const republishPause = time.Second

func (s *Server) republish(ctx context.Context, republish func(context.Context) (int, error)) {
	for ctx.Err() == nil {
		published, err := republish(ctx)
		if err == nil {
			if published > 0 {
				s.logger.InfoContext(ctx, "messages that the last broker inside had are published again", "messages", published)
			}
			return
		}
		if ctx.Err() == nil {
			s.logger.WarnContext(ctx, "messages were not published again; this is tried again", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(republishPause):
		}
	}
}
