package main

import (
	"context"
	"errors"
	"log/slog"
	"os"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/psp"
)

type pspCommand struct {
	Addr     string     `placeholder:"HOST:PORT" default:"${pspAddr}" help:"Address to listen on; port 0 takes any free one. (default: ${default})"`
	File     *string    `placeholder:"FILE" help:"File that keeps charges, refunds, payouts, mails and keys. Without it they are gone at exit."`
	LogLevel slog.Level `placeholder:"LEVEL" default:"INFO" help:"DEBUG, INFO, WARN or ERROR. (default: ${default})"`
}

// Help is shown below the summary of demo-bank psp --help.
func (c *pspCommand) Help() string {
	return `POST /charges, /refunds, /payouts with an Idempotency-Key, POST /mails; GET on each lists them, ?key=K those of a key.
Cards and IBANs that end in 0002 are refused. PUT /faults sets how it misbehaves, PUT /faults with {} ends that, GET /faults
shows it: probabilities lose_request, lose_reply, error_before, error_after, late, same_error; slow_ms, late_ms,
lookup_lag_ms; down, keeps_declines, key_lifetime_s, seed.`
}

// Validate is called by kong.
func (c *pspCommand) Validate() error {
	if c.File != nil && *c.File == "" { // probably an unset variable
		return errors.New("--file is empty: name a file, or leave it out and lose everything at exit")
	}
	return nil
}

// Run is called by kong.
func (c *pspCommand) Run(ctx context.Context) error {
	file := ""
	if c.File != nil {
		file = *c.File
	}
	return psp.New(psp.Config{
		Addr: c.Addr, File: file, Stdout: os.Stdout,
		Logger: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: c.LogLevel})),
	}).Run(ctx)
}
