package live

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/psp"
)

// This file shows a top-up twice: with a handler that charges inside its transaction, and through
// the bank's own route, which calls by an effect. Wire sits between bank and processor. It loses
// the first reply of each side, and counts the charges in all replies. Both clients give up early.

const (
	// topUpMax limits a demonstration. The bank's pauses are at most bank.BackoffMax.
	topUpMax      = time.Minute
	topUpPollTime = 200 * time.Millisecond
	topUpCard     = "4242-4242"
	stepsMax      = 20 // per side
)

// TopUpState is the state of a demonstration.
type TopUpState string

// The states of a demonstration.
const (
	TopUpRunning TopUpState = "running"
	TopUpEnded   TopUpState = "ended"
	TopUpFailed  TopUpState = "failed"
)

// TopUp is a demonstration as viewers see it.
type TopUp struct {
	State  TopUpState   `json:"state"`
	Amount int64        `json:"amount"` // in minor units
	Sides  [2]TopUpSide `json:"sides"`  // protected, unprotected
}

// TopUpSide is one side of a demonstration.
type TopUpSide struct {
	Steps    []string `json:"steps"`
	Charges  int      `json:"charges"`  // at the processor
	Postings int      `json:"postings"` // in the books
}

var errTopUpRuns = errors.New("a top-up is shown")

// postTopUp answers POST /live/topup: with 202 and the demonstration, with 303 to the page for a
// browser without scripts, or with 409 if one runs.
func (l *Live) postTopUp(w http.ResponseWriter, r *http.Request) {
	shown, err := l.startTopUp()
	switch {
	case errors.Is(err, errTopUpRuns):
		bank.WriteProblem(w, &bank.Problem{Status: http.StatusConflict, Slug: "topup-runs", Title: "A top-up is shown", Detail: "There is one at a time. Wait for its end."})
	case err != nil:
		refuse(w, err)
	case r.Header.Get("Accept") != "application/json":
		http.Redirect(w, r, "/", http.StatusSeeOther)
	default:
		bank.WriteJSON(w, http.StatusAccepted, shown)
	}
}

// startTopUp starts a demonstration, which ends before Run returns. It returns errTopUpRuns or
// errClosed.
func (l *Live) startTopUp() (*TopUp, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.closed:
		return nil, errClosed
	case l.topUp.Load() != nil:
		return nil, errTopUpRuns
	}
	run := newRun(time.Now(), 0)
	d := &demonstration{live: l, shown: TopUp{State: TopUpRunning, Amount: amount}}
	for i, side := range sides {
		d.accounts[i] = "topup-" + run + "-" + string(side)
		d.shown.Sides[i].Steps = []string{}
	}
	l.topUp.Store(d)
	l.storms.Go(func() {
		defer l.topUp.Store(nil)
		ctx, cancel := context.WithTimeout(l.ending, topUpMax)
		defer cancel()
		state := TopUpEnded
		if err := d.run(ctx); err != nil {
			state = TopUpFailed
			if l.ending.Err() == nil {
				l.logger.Warn("the page's top-up failed", "error", err)
			}
		}
		d.change(func(shown *TopUp) { shown.State = state })
	})
	return d.change(func(*TopUp) {}), nil
}

// demonstration is a top-up that is shown. It is safe for concurrent use.
type demonstration struct {
	live     *Live
	accounts [2]string

	mu      sync.Mutex
	shown   TopUp
	charges [2]map[string]bool // ids
	keys    [2]string          // of the first charge
}

// change changes what viewers see, and returns a copy of it.
func (d *demonstration) change(change func(shown *TopUp)) *TopUp {
	d.mu.Lock()
	defer d.mu.Unlock()
	change(&d.shown)
	shown := d.shown
	for i := range shown.Sides {
		shown.Sides[i].Steps = append([]string{}, shown.Sides[i].Steps...) // viewers may be reading
	}
	d.live.board.showTopUp(&shown)
	return &shown
}

// step adds a step to what viewers see.
func (d *demonstration) step(side Side, format string, arguments ...any) {
	d.change(func(shown *TopUp) {
		s := &shown.Sides[side.index()]
		if len(s.Steps) < stepsMax {
			s.Steps = append(s.Steps, fmt.Sprintf(format, arguments...))
		}
	})
}

// run shows both sides, one after the other.
func (d *demonstration) run(ctx context.Context) error {
	base := &http.Transport{DisableCompression: true}
	defer base.CloseIdleConnections()
	for _, account := range d.accounts {
		if err := d.live.open(ctx, base, account, 0); err != nil {
			return fmt.Errorf("open account: %w", err)
		}
	}
	if err := d.without(ctx); err != nil {
		return fmt.Errorf("without effects: %w", err)
	}
	if err := d.with(ctx, &marking{base: base, token: d.live.token}); err != nil {
		return fmt.Errorf("with effects: %w", err)
	}
	return nil
}

// without charges inside a transaction, at a separate processor. This charge is not in the books,
// but the audit requires that all charges at the bank's own processor are.
func (d *demonstration) without(ctx context.Context) error {
	inside := psp.New(psp.Config{Addr: "127.0.0.1:0"})
	running, end := context.WithCancel(ctx)
	var group sync.WaitGroup
	var failed error
	ended := make(chan struct{})
	group.Go(func() { defer close(ended); failed = inside.Run(running) })
	defer group.Wait()
	defer end()
	select {
	case <-inside.Serving():
	case <-ended:
		return failed
	case <-ctx.Done():
		return ctx.Err()
	}
	transport := bank.NewTransport()
	defer transport.CloseIdleConnections()
	processor, err := bank.NewProcessor(bank.ProcessorOptions{URL: inside.URL(), Transport: d.live.Wire(transport)})
	if err != nil {
		return err
	}
	d.step(Unprotected, "The handler begins its transaction and charges the card.")
	if err := d.live.withoutEffects(ctx, processor, d.accounts[Unprotected.index()], topUpCard, amount); err == nil {
		return errors.New("the reply was not lost")
	}
	d.step(Unprotected, "The handler fails, and its transaction is undone. The client gets an error, and gives up.")
	if err := d.countPostings(ctx, Unprotected); err != nil {
		return err
	}
	d.step(Unprotected, "That is the end: the card is charged, and the bank knows of nothing.")
	return nil
}

// with tops up through the bank's own route.
func (d *demonstration) with(ctx context.Context, base http.RoundTripper) error {
	key := "topup-" + uuid.NewString()
	body := fmt.Appendf(nil, `{"account":"%s","card":"%s","amount":%d}`, d.accounts[Protected.index()], topUpCard, amount)
	ask := func() (*http.Response, error) {
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, d.live.url+bank.TopUpsPath, bytes.NewReader(body))
		if err != nil {
			return nil, err
		}
		r.Header.Set("Content-Type", "application/json")
		r.Header.Set("Idempotency-Key", key)
		r.Header.Set("Prefer", "respond-async")
		response, err := base.RoundTrip(r)
		if err == nil {
			_, err = readAll(response.Body)
		}
		return response, err
	}
	tell := func(what string, response *http.Response) {
		d.step(Protected, "%s: %d %s.", what, response.StatusCode, response.Header.Get("Idempotency-Status"))
	}
	d.step(Protected, "The handler commits that it is about to charge, and charges the card.")
	response, err := ask()
	if err != nil {
		return err
	}
	tell("The client gets", response)
	if idempotency.Outcome(response.Header.Get("Idempotency-Status")) != idempotency.OutcomePending {
		return fmt.Errorf("the first answer is %d", response.StatusCode)
	}
	location := response.Header.Get("Location")
	if err := d.countPostings(ctx, Protected); err != nil {
		return err
	}
	if response, err = ask(); err != nil {
		return err
	}
	tell("It tries again at once with its key", response)
	d.step(Protected, "It gives up, and looks at the operation from time to time.")
	for status := ""; status != "done"; {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(topUpPollTime):
		}
		if status, err = d.operation(ctx, base, location); err != nil {
			return err
		}
	}
	d.step(Protected, "The completer has brought the request to its end: charged once, posted once.")
	if err := d.countPostings(ctx, Protected); err != nil {
		return err
	}
	if response, err = ask(); err != nil {
		return err
	}
	tell("A late retry gets", response)
	return nil
}

// operation returns the status of an operation, or "" if it could not be read just now.
func (d *demonstration) operation(ctx context.Context, base http.RoundTripper, location string) (string, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, d.live.url+location, nil)
	if err != nil {
		return "", err
	}
	response, err := base.RoundTrip(r)
	if err != nil {
		return "", err
	}
	content, err := readAll(response.Body)
	if err != nil || response.StatusCode == http.StatusServiceUnavailable {
		return "", err
	}
	var operation struct {
		Status string `json:"status"`
	}
	if err := json.Unmarshal(content, &operation); err != nil || response.StatusCode != http.StatusOK {
		return "", fmt.Errorf("the operation was answered %d", response.StatusCode)
	}
	return operation.Status, nil
}

func (d *demonstration) countPostings(ctx context.Context, side Side) error {
	var postings int
	err := d.live.pool.QueryRow(ctx, `SELECT count(*) FROM topups WHERE account = $1`, d.accounts[side.index()]).Scan(&postings)
	if err == nil {
		d.change(func(shown *TopUp) { shown.Sides[side.index()].Postings = postings })
	}
	return err
}

// WithoutEffects sets the function that tops up without effects: see
// [bank.Bank.TopUpWithoutEffects]. It must be called before the page is served.
func (l *Live) WithoutEffects(topUp func(ctx context.Context, processor *bank.Processor, account, card string, amount int64) error) {
	l.withoutEffects = topUp
}

// Wire returns a RoundTripper to a processor. It loses the first reply of each side of a
// demonstration, and changes nothing else.
func (l *Live) Wire(base http.RoundTripper) http.RoundTripper { return &wire{base, l} }

type wire struct {
	http.RoundTripper
	live *Live
}

// RoundTrip implements http.RoundTripper.
func (w *wire) RoundTrip(r *http.Request) (*http.Response, error) {
	d := w.live.topUp.Load()
	switch {
	case d == nil || !strings.HasSuffix(r.URL.Path, "/charges"):
		return w.RoundTripper.RoundTrip(r)
	case r.Method == http.MethodGet:
		d.lookedUp(r.URL.Query().Get("key"))
		return w.RoundTripper.RoundTrip(r)
	case r.Method != http.MethodPost || r.Body == nil:
		return w.RoundTripper.RoundTrip(r)
	}
	body, err := readAll(r.Body)
	if err != nil {
		return nil, err
	}
	sent := r.Clone(r.Context())
	sent.Body = io.NopCloser(bytes.NewReader(body))
	side, ok := d.sideOf(body)
	response, err := w.RoundTripper.RoundTrip(sent)
	if err != nil || !ok {
		return response, err
	}
	answer, err := readAll(response.Body)
	if err != nil {
		return nil, err
	}
	response.Body = io.NopCloser(bytes.NewReader(answer))
	var charge struct {
		ID string `json:"id"`
	}
	if json.Unmarshal(answer, &charge) != nil || response.StatusCode != http.StatusCreated {
		return response, nil
	}
	if d.charged(side, r.Header.Get("Idempotency-Key"), charge.ID) {
		return nil, errReplyLost
	}
	return response, nil
}

// CloseIdleConnections closes those of the base.
func (w *wire) CloseIdleConnections() {
	if base, ok := w.RoundTripper.(interface{ CloseIdleConnections() }); ok {
		base.CloseIdleConnections()
	}
}

// sideOf returns the side of a charge, by its reference.
func (d *demonstration) sideOf(body []byte) (side Side, ok bool) {
	var charge struct {
		Reference string `json:"reference"`
	}
	if json.Unmarshal(body, &charge) != nil {
		return "", false
	}
	for i, account := range d.accounts {
		if charge.Reference == "top-up of "+account {
			return sides[i], true
		}
	}
	return "", false
}

// lookedUp notes a look-up of a key at the processor.
func (d *demonstration) lookedUp(key string) {
	for i, side := range sides {
		d.mu.Lock()
		ours := d.keys[i] != "" && d.keys[i] == key
		d.mu.Unlock()
		if ours {
			d.step(side, "The request runs again, and asks the processor what became of this key.")
		}
	}
}

// charged notes a charge in a reply, and reports whether the reply is to be lost.
func (d *demonstration) charged(side Side, key, id string) (lose bool) {
	i := side.index()
	d.mu.Lock()
	lose = d.charges[i] == nil
	if lose {
		d.charges[i], d.keys[i] = map[string]bool{}, key
	}
	again, same := d.charges[i][id], d.keys[i] == key
	d.charges[i][id] = true
	charges := len(d.charges[i])
	d.mu.Unlock()
	d.change(func(shown *TopUp) { shown.Sides[i].Charges = charges })
	switch {
	case lose:
		d.step(side, "The processor charges the card. Its reply is lost.")
	case again && same:
		d.step(side, "The request runs again, and sends the charge with the same key: the processor repeats its answer.")
	default:
		d.step(side, "The processor charges the card once more.")
	}
	return lose
}
