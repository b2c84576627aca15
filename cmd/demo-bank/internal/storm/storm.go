// Package storm sends a bank thousands of duplicates of transfers, like clients that lose answers.
// From the bank's answers and books it judges whether each transfer happened exactly once.
//
// It knows only what any client knows: its own requests, the answers to them, and the bank's HTTP
// interface.
//
//   - [Run] is the storm from the first request to the verdict
//   - [Client] sends a request once, and can cause faults; package chaos uses it too
//   - verdict.go judges: package check checks the answers, and the bank's audit its books
package storm

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/check"
	"github.com/paidonce/idempotency/cmd/internal/terminal"
	"github.com/paidonce/idempotency/internal/deadline"
)

// Limits of [Config].
const (
	KeysMax    = 1_000_000
	CopiesMax  = 1000
	ClientsMax = 1024
)

const (
	accounts     = 1000 // acct-0000 to acct-0999 take part
	amountMax    = 50   // small, so that many storms on one bank still find funds
	changedEvery = 100  // one key in this many is also sent with a changed body
	helloMax     = 5 * time.Second
	cutAfter     = 4 * time.Millisecond
	scope        = "public" // of a request without an Authorization header
)

// Config configures a storm. All fields but Seed and Progress must be set.
type Config struct {
	URL      string        // of the bank
	Keys     int           // distinct transfers
	Copies   int           // number of times each is sent
	Clients  int           // number of concurrent senders
	Patience time.Duration // maximum time that one request is retried until its answer
	Seed     uint64        // of the random choices, 0 draws one; keys are always new
	Progress io.Writer     // a terminal, for a progress line; nil for none
}

// Validate returns an error if the config is invalid.
func (c *Config) Validate() error {
	base, err := url.Parse(c.URL)
	switch {
	case err != nil || base.Scheme != "http" || base.Host == "":
		return errors.New("--url must look like http://127.0.0.1:8080")
	case c.Keys < 1 || c.Keys > KeysMax:
		return fmt.Errorf("--keys must be from 1 to %d", KeysMax)
	case c.Copies < 1 || c.Copies > CopiesMax:
		return fmt.Errorf("--copies must be from 1 to %d", CopiesMax)
	case c.Clients < 1 || c.Clients > ClientsMax:
		return fmt.Errorf("--clients must be from 1 to %d", ClientsMax)
	case c.Patience <= 0:
		return errors.New("--patience must be positive")
	}
	return nil
}

// storm is one run.
type storm struct {
	config    Config
	base      *url.URL
	started   time.Time
	transfers []*transfer
	clients   []*client
	faults    faults

	phase    atomic.Value // of string
	done     atomic.Int64 // transfers done in this phase
	requests atomic.Int64
	retries  atomic.Int64
}

// client is a client without permanent faults. It is used by one goroutine at a time.
type client struct {
	*Client
	ops []check.Operation
}

// transfer is one thing that should happen once, whatever faults its copies meet.
type transfer struct {
	number int
	key    string
	choice *rand.Rand // for this transfer's copies, so that a seed repeats them in any order
	from   string
	to     string
	amount int64

	mu    sync.Mutex
	first *told // the first definite answer; package check compares the others with it
}

// told is a definite answer to a transfer.
type told struct {
	status int
	body   []byte
}

func (a *told) acknowledged() bool { return a != nil && a.status >= 200 && a.status < 300 }

// Run runs a storm and returns its report. An error means that there is no verdict: the bank can't
// be reached, or a request had no definite answer within the patience, or ctx ended.
func Run(ctx context.Context, config Config) (*Report, error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	base, err := url.Parse(config.URL)
	if err != nil {
		return nil, err
	}
	config.Seed = cmp.Or(config.Seed, rand.Uint64())
	s := &storm{config: config, base: base, started: time.Now()}
	s.phase.Store("starting")
	if err := s.plan(); err != nil {
		return nil, err
	}
	for i := range config.Clients {
		c := &client{Client: NewClient(i, s.clock, cutAfter)}
		s.clients = append(s.clients, c)
		defer c.Close()
	}
	reader := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: config.Clients}, Timeout: RequestTimeout}
	defer reader.CloseIdleConnections()
	var before, after bank.Audit
	// Do not wait long: the bank might not be there.
	if err := s.get(ctx, reader, "/v1/audit", min(helloMax, config.Patience), &before); err != nil {
		return nil, fmt.Errorf("there is no bank at %s: %w: start one with `demo-bank serve`, or name it with --url", config.URL, err)
	}

	sending := time.Now()
	endProgress := terminal.ShowProgress(config.Progress, true, "storm", s.progress)
	err = s.each(ctx, "sending", 2, s.sendCopies)
	sent := time.Since(sending)
	if err == nil {
		err = s.each(ctx, "replaying", 1, func(ctx context.Context, clients []*client, t *transfer) error {
			return s.ask(ctx, clients[0], t, manner{final: true})
		})
	}
	if err == nil {
		err = s.each(ctx, "reading back", 1, func(ctx context.Context, _ []*client, t *transfer) error { return s.readBack(ctx, reader, t) })
	}
	endProgress()
	if err != nil {
		return nil, err
	}
	if err := s.get(ctx, reader, "/v1/audit", config.Patience, &after); err != nil {
		return nil, fmt.Errorf("ask for the audit: %w", err)
	}
	return s.report(&before, &after, sent), nil
}

// clock returns the time since the start. It never returns 0, which means no time.
func (s *storm) clock() time.Duration { return max(1, time.Since(s.started)) }

func (s *storm) progress() string {
	return fmt.Sprintf("%v %d of %d keys, %d requests, %d retries", s.phase.Load(), s.done.Load(), s.config.Keys, s.requests.Load(), s.retries.Load())
}

// plan draws the transfers. Keys are new for each run and close together when sorted, like UUIDv7
// keys.
func (s *storm) plan() error {
	id, err := uuid.NewV7()
	if err != nil {
		return fmt.Errorf("make a key: %w", err)
	}
	for i := range s.config.Keys {
		t := &transfer{
			number: i, key: fmt.Sprintf("%s-%06d", id, i),
			choice: rand.New(rand.NewPCG(s.config.Seed, uint64(i))),
		}
		from := t.choice.IntN(accounts)
		to := (from + 1 + t.choice.IntN(accounts-1)) % accounts
		t.from, t.to = fmt.Sprintf("acct-%04d", from), fmt.Sprintf("acct-%04d", to)
		t.amount = 1 + t.choice.Int64N(amountMax)
		s.transfers = append(s.transfers, t)
	}
	return nil
}

// manner is how a transfer is requested.
type manner struct {
	changed bool // with another body
	final   bool // sent after all others have their answer
	trouble Trouble
}

func (s *storm) request(t *transfer, m manner) *Request {
	amount, number := t.amount, uint64(2*t.number)
	if m.changed {
		amount, number = amount+1, number+1
	}
	return &Request{
		Asked: check.Operation{Scope: scope, Key: t.key, Request: number, From: t.from, To: t.to, Amount: amount, Final: m.final},
		URL:   s.base.JoinPath(bank.TransfersPath).String(),
		Body:  fmt.Appendf(nil, `{"from":"%s","to":"%s","amount":%d,"currency":"EUR","reference":"storm"}`, t.from, t.to, amount),
	}
}

// sendCopies sends every copy of one transfer: some at once, some later, some with a lost reply.
// For one transfer in changedEvery it also sends a changed body with the same key.
func (s *storm) sendCopies(ctx context.Context, clients []*client, t *transfer) error {
	atOnce := min(len(clients), s.config.Copies)
	if atOnce > 1 && t.choice.IntN(4) == 0 {
		atOnce = 1
	}
	troubles := make([]Trouble, s.config.Copies)
	for n := range troubles {
		if t.choice.IntN(8) == 0 {
			troubles[n] = Cut
		}
	}
	barrier := make(chan struct{})
	group, groupCtx := errgroup.WithContext(ctx)
	for n, c := range clients[:atOnce] {
		group.Go(func() error {
			<-barrier
			return s.ask(groupCtx, c, t, manner{trouble: troubles[n]})
		})
	}
	close(barrier)
	if err := group.Wait(); err != nil {
		return err
	}
	for n := atOnce; n < s.config.Copies; n++ {
		if err := s.ask(ctx, clients[n%len(clients)], t, manner{trouble: troubles[n]}); err != nil {
			return err
		}
	}
	// After the transfer's own answer, so that the changed body can't be the one that is executed.
	if t.number%changedEvery == 0 {
		return s.ask(ctx, clients[0], t, manner{changed: true})
	}
	return nil
}

// ask sends a transfer's request until it has a definite answer: the same bytes with the same key,
// with growing pauses.
func (s *storm) ask(ctx context.Context, c *client, t *transfer, m manner) error {
	request := s.request(t, m)
	patient, cancel := context.WithTimeout(ctx, s.config.Patience)
	defer cancel()
	for backoff, trouble := BackoffFirst, m.trouble; ; backoff, trouble = min(2*backoff, BackoffMax), NoTrouble {
		op, body, sent := c.Send(patient, request, trouble)
		if sent {
			s.requests.Add(1)
			if definite(&op) {
				s.answered(c, t, m, op, body)
				return nil
			}
			c.ops = append(c.ops, op)
		}
		// A client that lost the reply on purpose retries at once, while the request may still run.
		if trouble != Cut {
			// Random, so that clients do not retry at the same time.
			_ = deadline.Sleep(patient, backoff/2+rand.N(backoff/2))
		}
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case patient.Err() != nil:
			return fmt.Errorf("%w within %v: the last try: %v", errPatience, s.config.Patience, &op)
		}
		s.retries.Add(1)
	}
}

// errPatience means that a request had no definite answer within the storm's patience.
var errPatience = errors.New("no definite answer")

// definite reports whether an answer is final.
func definite(op *check.Operation) bool {
	switch op.Outcome {
	case "executed", "replayed", "mismatch":
		return true
	case "in-progress", "unknown":
		return false
	}
	return op.Returned != 0 && op.Status < 500 && op.Status != http.StatusRequestTimeout &&
		op.Status != http.StatusTooEarly && op.Status != http.StatusTooManyRequests
}

// answered adds a definite answer to the history.
func (s *storm) answered(c *client, t *transfer, m manner, op check.Operation, body []byte) {
	if op.Outcome == "" { // without the middleware a definite answer means executed
		op.Outcome = "executed"
	}
	c.ops = append(c.ops, op)
	switch mismatch := op.Outcome == "mismatch"; {
	case m.changed && !mismatch:
		s.faults.add(faultChangedBody, "key %s: another body was answered with %v", t.key, &op)
	case m.changed:
	case mismatch:
		s.faults.add(faultUnexpected, "key %s: its own body was called a mismatch", t.key)
	case op.Status != http.StatusCreated && op.Status != http.StatusPaymentRequired:
		s.faults.add(faultUnexpected, "key %s: a good request was answered with %v", t.key, &op)
	default:
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.first == nil {
			t.first = &told{op.Status, body}
		}
	}
}

// readBack compares an acknowledged transfer with the bank's books.
func (s *storm) readBack(ctx context.Context, reader *http.Client, t *transfer) error {
	if !t.first.acknowledged() {
		return nil
	}
	var told, found bank.Transfer
	if err := json.Unmarshal(t.first.body, &told); err != nil || told.ID == "" {
		s.faults.add(faultUnexpected, "key %s: the answer is not a transfer", t.key)
		return nil
	}
	err := s.get(ctx, reader, bank.TransfersPath+"/"+told.ID, s.config.Patience, &found)
	switch {
	case errors.Is(err, StatusError(http.StatusNotFound)):
		s.faults.add(faultMissing, "key %s: transfer %s was acknowledged and is not in the books", t.key, told.ID)
	case err != nil:
		return err
	case found != told || found.From != t.from || found.To != t.to || found.Amount != t.amount:
		s.faults.add(faultMissing, "key %s: transfer %s is in the books, but is not what was acknowledged", t.key, told.ID)
	}
	return nil
}

// get reads JSON from the bank, and retries for as long as patience.
func (s *storm) get(ctx context.Context, reader *http.Client, path string, patience time.Duration, into any) error {
	until := time.Now().Add(patience)
	for backoff := BackoffFirst; ; backoff = min(2*backoff, BackoffMax) {
		err := Get(ctx, reader, s.base.JoinPath(path).String(), into)
		var status StatusError
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.As(err, &status) && status < 500 && status != http.StatusTooManyRequests:
			return fmt.Errorf("GET %s: %w", path, err)
		case time.Now().After(until):
			return fmt.Errorf("GET %s: %w within %v: %w", path, errPatience, patience, err)
		}
		_ = deadline.Sleep(ctx, backoff/2+rand.N(backoff/2)) // the loop checks ctx
	}
}

// each makes the clients call do for every transfer, in groups of the given size.
func (s *storm) each(ctx context.Context, phase string, together int, do func(context.Context, []*client, *transfer) error) error {
	s.phase.Store(phase)
	s.done.Store(0)
	return Each(ctx, slices.Collect(slices.Chunk(s.clients, together)), s.transfers, func(ctx context.Context, clients []*client, t *transfer) error {
		defer s.done.Add(1)
		return do(ctx, clients, t)
	})
}

// Each calls do for every item. Each worker handles one item at a time. No call begins after one
// has returned an error or ctx has ended.
func Each[W, T any](ctx context.Context, workers []W, items []T, do func(context.Context, W, T) error) error {
	free := make(chan W, len(workers))
	for _, worker := range workers {
		free <- worker
	}
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(len(workers))
	for _, item := range items {
		if groupCtx.Err() != nil {
			break
		}
		group.Go(func() error {
			worker := <-free
			defer func() { free <- worker }()
			return do(groupCtx, worker, item)
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	return ctx.Err()
}
