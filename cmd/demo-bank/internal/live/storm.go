package live

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
)

// StormState is the state of a storm.
type StormState string

// The states of a storm.
const (
	StormRunning  StormState = "running"
	StormEnded    StormState = "ended"     // every copy has an answer
	StormStopped  StormState = "stopped"   // by a viewer, or because the bank stopped
	StormTimedOut StormState = "timed-out" // after StormMax
	StormFailed   StormState = "failed"
)

const (
	// StormMax is the maximum duration of a storm. Copies not sent by then are never sent.
	StormMax = time.Minute

	// amount is the amount of each payment, in minor units.
	amount = 2500
	// openingFactor is the number of times that the payer's account can pay each copy, so that no
	// retry of an unprotected payment fails for lack of money.
	openingFactor = 4

	auditTimeout = 25 * time.Second
)

// Storm is a storm as viewers see it.
type Storm struct {
	Run      string     `json:"run"`
	State    StormState `json:"state"`
	Plan     Plan       `json:"plan"`
	Amount   int64      `json:"amount"` // of each payment, in minor units
	Copies   int        `json:"copies"` // to be sent, both sides together
	Answered int        `json:"answered"`
	// Protected copies with an answer that differs from the first one, byte by byte.
	Differing int   `json:"differing"`
	StartedMS int64 `json:"started_ms"`
	EndedMS   int64 `json:"ended_ms,omitempty"`
	// The result of the whole bank's audit after the storm: ok, broken or unknown.
	Audit string `json:"audit,omitempty"`
}

var errStormRuns = errors.New("a storm is running")

// start starts a storm, which ends before Run returns. The error is errStormRuns or errClosed.
func (l *Live) start(plan Plan) (*Storm, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.closed:
		return nil, errClosed
	case l.stop != nil:
		return nil, errStormRuns
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), StormMax, errTimedOut)
	l.stop = cancel
	copies := plan.Keys * plan.Copies * len(plan.sides())
	s := Storm{State: StormRunning, Plan: plan, Amount: amount, Copies: copies, StartedMS: time.Now().UnixMilli()}
	s.Run = newRun(time.Now(), 0) // until rage has read the ledger's end
	l.board.begin(s)
	l.storms.Go(func() {
		defer func() {
			l.mu.Lock()
			defer l.mu.Unlock()
			cancel()
			l.stop = nil
		}()
		l.run(ctx, s)
	})
	return &s, nil
}

var errTimedOut = errors.New("the storm took too long")

// stopStorm ends the running storm, if there is one.
func (l *Live) stopStorm() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stop != nil {
		l.stop()
	}
}

// run runs a storm from opening the accounts to the audit.
func (l *Live) run(ctx context.Context, s Storm) {
	err := l.rage(ctx, s)
	state := StormEnded
	switch {
	case errors.Is(context.Cause(ctx), errTimedOut):
		state = StormTimedOut
	case ctx.Err() != nil:
		state = StormStopped
	case err != nil:
		state = StormFailed
		l.logger.Warn("the page's storm failed", "error", err)
	}
	l.board.update(func(s *Storm) { s.State, s.EndedMS = state, time.Now().UnixMilli() })
	if l.isClosed() {
		return
	}
	verdict := l.audit()
	l.board.update(func(s *Storm) { s.Audit = verdict })
}

// rage opens the twins and sends all copies.
func (l *Live) rage(ctx context.Context, s Storm) error {
	end, err := l.ledgerEnd(ctx)
	if err != nil {
		return fmt.Errorf("find the ledger's end: %w", err)
	}
	s.Run = newRun(time.UnixMilli(s.StartedMS), end)
	l.board.update(func(view *Storm) { view.Run = s.Run })
	base := &http.Transport{MaxIdleConnsPerHost: 4 * s.Plan.Clients, DisableCompression: true}
	defer base.CloseIdleConnections()
	for _, side := range s.Plan.sides() {
		for account, opening := range map[string]int64{
			payerOf(s.Run, side): int64(s.Plan.Keys*s.Plan.Copies) * amount * openingFactor,
			payeeOf(s.Run, side): 0,
		} {
			if err := l.open(ctx, base, account, opening); err != nil {
				return fmt.Errorf("open account: %w", err)
			}
		}
	}
	group, ctx := errgroup.WithContext(ctx)
	for _, side := range s.Plan.sides() {
		group.Go(func() error { return l.rageOn(ctx, base, s, side) })
	}
	return group.Wait()
}

// rageOn sends one side's copies.
func (l *Live) rageOn(ctx context.Context, base http.RoundTripper, s Storm, side Side) error {
	payer := newClient(&weather{
		base: base, board: l.board, side: side, token: l.token, faults: s.Plan.Faults, share: float64(s.Plan.SharePercent) / 100,
	})
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(s.Plan.Clients)
	for i := range s.Plan.Keys {
		if ctx.Err() != nil {
			break
		}
		group.Go(func() error { return l.pay(ctx, payer, newPayment(s, side, i), s.Plan.Copies, side) })
	}
	return group.Wait()
}

// newPayment returns a payment. It is the same on both sides, except for its accounts.
func newPayment(s Storm, side Side, number int) *payment {
	reference := fmt.Sprintf("payment %03d", number+1)
	return &payment{
		number: number, reference: reference, key: fmt.Sprintf("storm-%s-%d", s.Run, number),
		body: fmt.Appendf(nil, `{"from":"%s","to":"%s","amount":%d,"currency":"EUR","reference":"%s"}`,
			payerOf(s.Run, side), payeeOf(s.Run, side), amount, reference),
		draws: rand.New(rand.NewPCG(uint64(s.StartedMS), uint64(number))),
	}
}

func payerOf(run string, side Side) string { return "twin-" + run + "-" + string(side) }
func payeeOf(run string, side Side) string { return payerOf(run, side) + "-payee" }

// newRun returns the name of a run. Names sort by time.
func newRun(at time.Time, ledgerEnd int64) string {
	return fmt.Sprintf("%012x-%x", at.UnixMilli(), ledgerEnd)
}

// endOfLedger returns the id of the last ledger entry before a run.
func endOfLedger(run string) (int64, error) {
	_, end, _ := strings.Cut(run, "-")
	return strconv.ParseInt(end, 16, 64)
}

// pay sends all copies of a payment, one after another, and compares their answers.
func (l *Live) pay(ctx context.Context, payer *http.Client, p *payment, copies int, side Side) error {
	ctx = context.WithValue(ctx, paymentKey{}, p)
	path := bank.TransfersPath
	if side == Unprotected {
		path = bank.UnprotectedTransfersPath
	}
	var first []byte
	for range copies {
		p.attempts = 0
		status, answer, err := post(ctx, payer, l.url+path, p.key, p.body)
		if err != nil {
			return fmt.Errorf("pay: %w", err)
		}
		if first == nil && status == http.StatusCreated {
			first = answer
		}
		differs := side == Protected && !bytes.Equal(first, answer)
		l.board.update(func(s *Storm) {
			s.Answered++
			if differs {
				s.Differing++
			}
		})
	}
	return nil
}

func post(ctx context.Context, sender *http.Client, url, key string, body []byte) (status int, answer []byte, err error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Idempotency-Key", key)
	response, err := sender.Do(r)
	if err != nil {
		return 0, nil, err
	}
	answer, err = readAll(response.Body)
	return response.StatusCode, answer, err
}

// open opens an account through the bank's HTTP interface.
func (l *Live) open(ctx context.Context, base http.RoundTripper, id string, opening int64) error {
	body := fmt.Appendf(nil, `{"id":"%s","currency":"EUR","opening_balance":%d}`, id, opening)
	status, answer, err := post(ctx, newClient(&marking{base: base, token: l.token}), l.url+"/v1/accounts", "open-"+id, body)
	if err == nil && status != http.StatusCreated {
		err = fmt.Errorf("status %d: %.200s", status, answer)
	}
	return err
}

// marking marks requests as the storm's own, and does nothing else.
type marking struct {
	base  http.RoundTripper
	token string
}

// RoundTrip implements http.RoundTripper.
func (m *marking) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set(headerStorm, m.token)
	return m.base.RoundTrip(r)
}

// audit requests the bank's audit, and returns ok, broken or unknown.
func (l *Live) audit() string {
	ctx, cancel := context.WithTimeout(context.Background(), auditTimeout)
	defer cancel()
	stop := context.AfterFunc(l.ending, cancel)
	defer stop()
	var audit struct {
		OK bool `json:"ok"`
	}
	err := func() error {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, l.url+"/v1/audit", nil)
		if err != nil {
			return err
		}
		transport := &http.Transport{DisableKeepAlives: true}
		response, err := transport.RoundTrip(r)
		if err != nil {
			return err
		}
		defer func() { _ = response.Body.Close() }() // read already, or useless
		if response.StatusCode != http.StatusOK {
			return fmt.Errorf("status %d", response.StatusCode)
		}
		return json.NewDecoder(io.LimitReader(response.Body, answerBytesMax)).Decode(&audit)
	}()
	switch {
	case err != nil:
		if l.ending.Err() == nil {
			l.logger.Warn("the audit after the page's storm was not answered", "error", err)
		}
		return "unknown"
	case audit.OK:
		return "ok"
	}
	return "broken"
}

// ledgerEnd returns the id of the last entry of the ledger.
func (l *Live) ledgerEnd(ctx context.Context) (id int64, err error) {
	err = l.pool.QueryRow(ctx, `SELECT COALESCE(max(id), 0) FROM entries`).Scan(&id)
	return id, err
}
