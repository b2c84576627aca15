package storm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"time"

	keyed "github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
)

const (
	requestTimeout = 40 * time.Second // more than a bank lets any request take
	backoffFirst   = 10 * time.Millisecond
	backoffMax     = 500 * time.Millisecond
	// retryAfterMax caps Retry-After: a second, as the bank says, is right for a client and long for a storm.
	retryAfterMax  = 25 * time.Millisecond
	cutDelayMax    = 4 * time.Millisecond // from the last byte of a request to the end of its connection
	answerBytesMax = 1 << 20
)

// errPatience means that a request had no definite answer for as long as the storm's patience.
var errPatience = errors.New("no definite answer")

var errNotFound = errors.New("not found")

// client is one good client with a connection of its own. It is used by one goroutine at a time.
//
// How it retries is package client's doing, which here has no budget of retries: a storm is to go on through a bank's
// death. What it loses on purpose is the storm's, see cut.
type client struct {
	storm *storm
	keyed http.Client // for what carries a key
	plain http.Client // for what does not
}

func newClient(s *storm) *client {
	c := &client{storm: s}
	base := &http.Transport{MaxIdleConnsPerHost: 1, DisableCompression: true}
	c.plain = http.Client{Transport: base, Timeout: requestTimeout}
	c.keyed = http.Client{Transport: keyed.New(base, &keyed.Options{
		Honours: keyed.Everywhere, BackoffFirst: backoffFirst, BackoffMax: backoffMax, RetryAfterMax: retryAfterMax,
		AttemptTimeout: requestTimeout, TotalMax: s.config.Patience, AttemptsMax: math.MaxInt, Unbudgeted: true,
		AnswerBytesMax: answerBytesMax, Trace: s.tally.trace,
	})}
	return c
}

func (c *client) close() { c.plain.CloseIdleConnections() }

// answer is what came back: all of it that the bank must repeat, and what a client branches on.
type answer struct {
	status      int
	location    string
	contentType string
	body        []byte

	outcome string // of Idempotency-Status; empty where the bank has no middleware
}

// same reports whether two answers to one key are one answer.
func (a *answer) same(b *answer) bool {
	return a.status == b.status && a.location == b.location && a.contentType == b.contentType && bytes.Equal(a.body, b.body)
}

func (a *answer) acknowledged() bool { return a.status >= 200 && a.status < 300 }

// sendCopy sends one copy of a transfer and keeps asking until it has its answer. With cut the first reply is lost.
func (c *client) sendCopy(ctx context.Context, t *transfer, cut bool) error {
	if cut {
		if err := c.cut(ctx, t); err == nil {
			c.storm.tally.lostReplies.Add(1)
			c.storm.tally.retries.Add(1)
		}
	}
	a, err := c.ask(ctx, t.key, t.body)
	if err != nil {
		return err
	}
	c.storm.compare(t, a)
	return nil
}

// sendChanged sends another body under a transfer's key. It comes after the transfer's own answer, so that it can't be
// the one that is executed.
func (c *client) sendChanged(ctx context.Context, t *transfer) error {
	a, err := c.ask(ctx, t.key, t.bodyOf(t.amount+1))
	if err != nil {
		return err
	}
	if a.outcome != "mismatch" {
		c.storm.faults.add(faultChangedBody, "key %s: another body was answered with %d %s", t.key, a.status, a.outcome)
	}
	return nil
}

// replay asks for a transfer once more when all is over.
func (c *client) replay(ctx context.Context, t *transfer) error {
	a, err := c.ask(ctx, t.key, t.body)
	if err != nil {
		return err
	}
	if a.outcome == "executed" {
		c.storm.faults.add(faultForgotten, "key %s: was executed again after it had been answered", t.key)
	}
	c.storm.compare(t, a)
	return nil
}

// readBack looks an acknowledged transfer up in the bank's books.
func (c *client) readBack(ctx context.Context, t *transfer) error {
	if t.first == nil || !t.first.acknowledged() {
		return nil
	}
	var told, found bank.Transfer
	if err := json.Unmarshal(t.first.body, &told); err != nil || told.ID == "" {
		c.storm.faults.add(faultUnexpected, "key %s: the answer is not a transfer", t.key)
		return nil
	}
	err := c.get(ctx, "/v1/transfers/"+told.ID, c.storm.config.Patience, &found)
	switch {
	case errors.Is(err, errNotFound):
		c.storm.faults.add(faultMissing, "key %s: transfer %s was acknowledged and is not in the books", t.key, told.ID)
	case err != nil:
		return err
	case found != told || found.From != t.from || found.To != t.to || found.Amount != t.amount:
		c.storm.faults.add(faultMissing, "key %s: transfer %s is in the books, but is not what was acknowledged", t.key, told.ID)
	}
	return nil
}

// ask sends a request until it has a definite answer: the same bytes under the same key, with pauses that grow.
func (c *client) ask(ctx context.Context, key string, body []byte) (*answer, error) {
	r, err := c.request(ctx, key, body)
	if err != nil {
		return nil, err
	}
	response, err := c.keyed.Do(r)
	switch {
	case ctx.Err() != nil:
		if err == nil {
			_ = response.Body.Close() // nobody reads it
		}
		return nil, ctx.Err()
	case err != nil:
		return nil, fmt.Errorf("%w within %v: %w", errPatience, c.storm.config.Patience, err)
	}
	return read(response)
}

func (c *client) request(ctx context.Context, key string, body []byte) (*http.Request, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, c.storm.base.JoinPath("/v1/transfers").String(), bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Idempotency-Key", key)
	return r, nil
}

// read reads an answer to its end.
func read(response *http.Response) (*answer, error) {
	defer func() { _ = response.Body.Close() }() // it was read to its end, or the connection is broken
	body, err := io.ReadAll(io.LimitReader(response.Body, answerBytesMax))
	if err != nil {
		return nil, err
	}
	return &answer{
		status: response.StatusCode, body: body, outcome: response.Header.Get("Idempotency-Status"),
		location: response.Header.Get("Location"), contentType: response.Header.Get("Content-Type"),
	}, nil
}

// cut sends a request and closes the connection before its reply: at once, or a moment later. An error means that it
// was not sent whole.
func (c *client) cut(ctx context.Context, t *transfer) error {
	r, err := c.request(ctx, t.key, t.body)
	if err != nil {
		return err
	}
	address := c.storm.base.Host
	if c.storm.base.Port() == "" {
		address = net.JoinHostPort(c.storm.base.Hostname(), "80")
	}
	dialer := net.Dialer{Timeout: requestTimeout}
	conn, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }() // closed below, but where writing failed
	if err := r.Write(conn); err != nil {
		return err
	}
	c.storm.tally.requests.Add(1)
	select {
	case <-ctx.Done():
	case <-time.After(rand.N(cutDelayMax)):
	}
	if tcp, ok := conn.(*net.TCPConn); ok && rand.IntN(2) == 0 {
		_ = tcp.SetLinger(0) // a reset instead of a goodbye
	}
	return conn.Close()
}

// get reads something of the bank's, patiently.
func (c *client) get(ctx context.Context, path string, patience time.Duration, into any) error {
	a, err := c.patiently(ctx, c.storm.base.JoinPath(path).String(), patience)
	switch {
	case err != nil:
		return fmt.Errorf("GET %s: %w", path, err)
	case a.status == http.StatusNotFound:
		return fmt.Errorf("GET %s: %w", path, errNotFound)
	case a.status != http.StatusOK:
		return fmt.Errorf("GET %s: status %d", path, a.status)
	}
	if err := json.Unmarshal(a.body, into); err != nil {
		return fmt.Errorf("GET %s: %w", path, err)
	}
	return nil
}

// patiently asks for a URL until there is an answer or the patience is at its end. Reading needs no key.
func (c *client) patiently(ctx context.Context, url string, patience time.Duration) (*answer, error) {
	deadline := time.Now().Add(patience)
	for backoff := backoffFirst; ; backoff = min(2*backoff, backoffMax) {
		a, err := c.getOnce(ctx, url)
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case err == nil && a.status < 500 && a.status != http.StatusTooManyRequests:
			return a, nil
		case time.Now().After(deadline) && err != nil:
			return nil, fmt.Errorf("%w within %v: %w", errPatience, patience, err)
		case time.Now().After(deadline):
			return nil, fmt.Errorf("%w within %v: the last one was %d", errPatience, patience, a.status)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(backoff/2 + rand.N(backoff/2)): // or all would come back at once
		}
		c.storm.tally.retries.Add(1)
	}
}

func (c *client) getOnce(ctx context.Context, url string) (*answer, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	response, err := c.plain.Do(r)
	if err != nil {
		return nil, err
	}
	return read(response)
}
