package main

import (
	"context"
	"io"
	"log/slog"
	"os"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/server"
)

// apartFlags are the flags of both commands that run beside the bank.
type apartFlags struct {
	Brokers     []string   `placeholder:"HOST:PORT" help:"Kafka brokers, separated by commas. Without it those that the bank left in its database."`
	DatabaseURL string     `name:"database-url" env:"DATABASE_URL" placeholder:"URL" help:"PostgreSQL of the bank."`
	LogLevel    slog.Level `placeholder:"LEVEL" default:"INFO" help:"DEBUG, INFO, WARN or ERROR. (default: ${default})"`
}

func (f *apartFlags) config() server.ApartConfig {
	return server.ApartConfig{
		DatabaseURL: f.DatabaseURL, Brokers: f.Brokers, Stdout: os.Stdout,
		Logger: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: f.LogLevel})),
	}
}

type consumeCommand struct {
	apartFlags

	PSP     string `name:"psp" placeholder:"URL" help:"Processor that sends the mails. Without it the one that the bank left in its database."`
	NoInbox bool   `help:"Consume naively: first the effect, then the broker's own commit. The audit shows what that doubles."`
	Shown   string `hidden:"" help:"Be a consumer that the page of the bank shows: this instance. It ends with its standard input."`
	Addr    string `placeholder:"HOST:PORT" default:"${consumeAddr}" help:"Address of /healthz, /readyz and /metrics; port 0 takes any free one. (default: ${default})"`
}

// Run is called by kong.
func (c *consumeCommand) Run(ctx context.Context) error {
	config := c.config()
	if c.Shown != "" {
		ctx, end := context.WithCancel(ctx)
		defer end()
		go func() {
			_, _ = io.Copy(io.Discard, os.Stdin) // until the bank has ended
			end()
		}()
		return server.ConsumeShown(ctx, server.ShownConfig{
			DatabaseURL: config.DatabaseURL, Brokers: config.Brokers, NoInbox: c.NoInbox, Instance: c.Shown, Logger: config.Logger,
		})
	}
	config.PSP, config.NoInbox, config.Addr = c.PSP, c.NoInbox, c.Addr
	return server.Consume(ctx, config)
}

type relayCommand struct{ apartFlags }

// Run is called by kong.
func (c *relayCommand) Run(ctx context.Context) error { return server.Relay(ctx, c.config()) }
