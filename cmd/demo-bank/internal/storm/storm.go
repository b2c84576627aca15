// Package storm sends a bank thousands of duplicates of transfers, as clients do whose answers get lost, and says from
// its answers and books whether each transfer happened exactly once.
//
// It knows what any client knows: its own requests, the answers it got, and the bank's HTTP interface.
//
//   - [Run] is the storm from the first request to the verdict
//   - client.go is a good client: how it retries, and how it loses an answer
//   - verdict.go is what must hold
package storm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/url"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
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
	changedEvery = 100  // one key in so many is sent with a changed body too
	helloMax     = 5 * time.Second
)

// Config says how hard it storms. All fields but Seed and Progress must be set.
type Config struct {
	URL      string        // of the bank
	Keys     int           // distinct transfers
	Copies   int           // how often each is sent
	Clients  int           // how many send at once
	Patience time.Duration // how long one request is retried until it has its answer
	Seed     uint64        // of the choices; keys are new each time. 0 draws one
	Progress io.Writer     // a terminal, for a progress line; nil: none
}

// Validate reports whether the storm is possible.
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
	transfers []*transfer
	tally     tally
	faults    faults
}

// transfer is one thing that should happen once, whatever its copies meet.
type transfer struct {
	key    string
	body   []byte
	choice *rand.Rand // of this transfer's copies, so that a seed repeats them whoever sends them
	from   string
	to     string
	amount int64

	mu    sync.Mutex
	first *answer // the first definite answer; every other must equal it
}

// Run storms and returns what it found. An error means that there is no verdict: the bank is not there, or a request
// had no definite answer within the patience, or ctx ended.
func Run(ctx context.Context, config Config) (*Report, error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	base, err := url.Parse(config.URL)
	if err != nil {
		return nil, err
	}
	if config.Seed == 0 {
		config.Seed = rand.Uint64()
	}
	s := &storm{config: config, base: base, tally: newTally()}
	if err := s.plan(); err != nil {
		return nil, err
	}
	clients := make([]*client, config.Clients)
	for i := range clients {
		clients[i] = newClient(s)
		defer clients[i].close()
	}
	before, err := s.hello(ctx, clients[0])
	if err != nil {
		return nil, err
	}

	started := time.Now()
	endProgress := s.showProgress(ctx)
	err = s.send(ctx, clients)
	sent := time.Since(started)
	if err == nil {
		err = s.each(ctx, clients, "replaying", (*client).replay)
	}
	if err == nil {
		err = s.each(ctx, clients, "reading back", (*client).readBack)
	}
	endProgress()
	if err != nil {
		return nil, err
	}
	var after bank.Audit
	if err := clients[0].get(ctx, "/v1/audit", config.Patience, &after); err != nil {
		return nil, fmt.Errorf("ask for the audit: %w", err)
	}
	return s.report(before, &after, sent), nil
}

// hello asks for the audit before the storm, and does not wait long for a bank that may not be there.
func (s *storm) hello(ctx context.Context, c *client) (*bank.Audit, error) {
	var audit bank.Audit
	if err := c.get(ctx, "/v1/audit", min(helloMax, s.config.Patience), &audit); err != nil {
		return nil, fmt.Errorf("there is no bank at %s: %w: start one with `demo-bank serve`, or name it with --url", s.config.URL, err)
	}
	return &audit, nil
}

// plan draws the transfers. Keys are new for each run and close together in time's order, as UUIDv7 keys are.
func (s *storm) plan() error {
	id, err := uuid.NewV7()
	if err != nil {
		return fmt.Errorf("make a key: %w", err)
	}
	for i := range s.config.Keys {
		t := &transfer{
			key:    fmt.Sprintf("%s-%06d", id, i),
			choice: rand.New(rand.NewPCG(s.config.Seed, uint64(i))),
		}
		from := t.choice.IntN(accounts)
		to := (from + 1 + t.choice.IntN(accounts-1)) % accounts
		t.from, t.to = fmt.Sprintf("acct-%04d", from), fmt.Sprintf("acct-%04d", to)
		t.amount = 1 + t.choice.Int64N(amountMax)
		t.body = t.bodyOf(t.amount)
		s.transfers = append(s.transfers, t)
	}
	return nil
}

// bodyOf is the transfer's body for an amount: its own, or a changed one.
func (t *transfer) bodyOf(amount int64) []byte {
	return fmt.Appendf(nil, `{"from":"%s","to":"%s","amount":%d,"currency":"EUR","reference":"storm"}`, t.from, t.to, amount)
}

// send sends all copies of all transfers. Clients work in pairs, so that two copies can leave at once.
func (s *storm) send(ctx context.Context, clients []*client) error {
	s.tally.phase.Store("sending")
	work := make(chan int)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		defer close(work)
		return feed(ctx, work, len(s.transfers))
	})
	for first := 0; first < len(clients); first += 2 {
		pair := clients[first:min(first+2, len(clients))]
		group.Go(func() error {
			for i := range work {
				if err := s.sendCopies(ctx, pair, i); err != nil {
					return err
				}
				s.tally.keys.Add(1)
			}
			return nil
		})
	}
	return group.Wait()
}

// sendCopies sends every copy of one transfer: some at once, some later, some whose answer gets lost, and for one
// transfer in a hundred one that asks for something else under the same key.
func (s *storm) sendCopies(ctx context.Context, clients []*client, i int) error {
	t := s.transfers[i]
	atOnce := min(len(clients), s.config.Copies)
	if atOnce > 1 && t.choice.IntN(4) == 0 {
		atOnce = 1
	}
	cut := make([]bool, s.config.Copies)
	for n := range cut {
		cut[n] = t.choice.IntN(8) == 0
	}
	barrier := make(chan struct{})
	group, groupCtx := errgroup.WithContext(ctx)
	for n, c := range clients[:atOnce] {
		group.Go(func() error {
			<-barrier
			return c.sendCopy(groupCtx, t, cut[n])
		})
	}
	close(barrier)
	if err := group.Wait(); err != nil {
		return err
	}
	for n := atOnce; n < s.config.Copies; n++ {
		if err := clients[n%len(clients)].sendCopy(ctx, t, cut[n]); err != nil {
			return err
		}
	}
	if i%changedEvery == 0 {
		return clients[0].sendChanged(ctx, t)
	}
	return nil
}

// each lets the clients do one thing with every transfer.
func (s *storm) each(ctx context.Context, clients []*client, phase string, do func(*client, context.Context, *transfer) error) error {
	s.tally.phase.Store(phase)
	s.tally.keys.Store(0)
	work := make(chan int)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		defer close(work)
		return feed(ctx, work, len(s.transfers))
	})
	for _, c := range clients {
		group.Go(func() error {
			for i := range work {
				if err := do(c, ctx, s.transfers[i]); err != nil {
					return err
				}
				s.tally.keys.Add(1)
			}
			return nil
		})
	}
	return group.Wait()
}

func feed(ctx context.Context, work chan<- int, n int) error {
	for i := range n {
		select {
		case work <- i:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// progressInterval is how often the progress line is written.
const progressInterval = 200 * time.Millisecond

// showProgress writes a progress line until the returned function is called, which removes it.
func (s *storm) showProgress(ctx context.Context) (end func()) {
	if s.config.Progress == nil {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	var group sync.WaitGroup
	group.Go(func() {
		tick := time.NewTicker(progressInterval)
		defer tick.Stop()
		for ctx.Err() == nil {
			// A terminal that is gone is no reason to stop.
			_, _ = fmt.Fprintf(s.config.Progress, "\r\x1b[K%v %d of %d keys, %d requests, %d retries",
				s.tally.phase.Load(), s.tally.keys.Load(), s.config.Keys, s.tally.requests.Load(), s.tally.retries.Load())
			select {
			case <-ctx.Done():
			case <-tick.C:
			}
		}
		_, _ = fmt.Fprint(s.config.Progress, "\r\x1b[K")
	})
	return func() {
		cancel()
		group.Wait()
	}
}
