package live

import (
	"bytes"
	"context"
	cryptorand "crypto/rand"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
)

// Fault is one way in which a request goes wrong.
type Fault string

// The faults. The first three happen between client and bank, the others in the bank.
const (
	FaultRequestLost Fault = "request-lost" // never sent
	FaultReplyLost   Fault = "reply-lost"   // sent and executed, but its answer is dropped
	FaultDuplicate   Fault = "duplicate"    // sent twice at once with the same key
	FaultSlow        Fault = "slow"         // the handler is slow
	// The handler dies after its last write, before COMMIT.
	FaultKilled        Fault = "killed"
	FaultSerialization Fault = "serialization" // PostgreSQL refuses the transaction once: 40001
)

// Faults returns all faults.
func Faults() []Fault {
	return []Fault{FaultRequestLost, FaultReplyLost, FaultDuplicate, FaultSlow, FaultKilled, FaultSerialization}
}

const (
	slowMin = 80 * time.Millisecond
	slowMax = 250 * time.Millisecond
	// faultyAttemptsMax is the maximum number of faults per copy, so that a storm ends.
	faultyAttemptsMax = 2
	answerBytesMax    = 64 << 10
)

var (
	errRequestLost = errors.New("the request was lost, as the storm wants it")
	errReplyLost   = errors.New("the reply was lost, as the storm wants it")
)

// payment is one thing that should happen once, and the random source for its attempts' faults. It
// is in the context of each attempt.
type payment struct {
	number    int
	reference string
	key       string
	body      []byte
	draws     *rand.Rand // used by one goroutine at a time
	attempts  int        // of the current copy
}

type paymentKey struct{}

// weather is the http.RoundTripper between the storm's client and the bank. It draws a fault for
// each attempt, and reports the outcome to the board.
type weather struct {
	base   http.RoundTripper
	board  *board
	side   Side
	token  string
	faults []Fault
	share  float64 // share of attempts that meet a fault
}

var _ http.RoundTripper = (*weather)(nil)

// RoundTrip implements http.RoundTripper. Requests must carry a payment in their context.
func (t *weather) RoundTrip(r *http.Request) (*http.Response, error) {
	p, ok := r.Context().Value(paymentKey{}).(*payment)
	if !ok {
		return nil, errors.New("live: a request without a payment")
	}
	body, err := readAll(r.Body)
	if err != nil {
		return nil, err
	}
	fault := t.draw(p)
	switch fault {
	case FaultRequestLost:
		t.tell(p, 0, DotLostRequest)
		return nil, errRequestLost
	case FaultDuplicate:
		twin := make(chan struct{})
		go func() { // a proxy that repeats a request on its own
			defer close(twin)
			if response, err := t.send(r, p, body, ""); err == nil {
				_ = response.Body.Close() // it is in memory
			}
		}()
		defer func() { <-twin }()
	case FaultReplyLost:
		response, answered, err := t.exchange(r, body, "")
		if err != nil {
			t.tell(p, 0, DotFailed)
			return nil, err
		}
		_ = response.Body.Close() // it is in memory
		t.tell(p, answered, DotLostReply)
		return nil, errReplyLost
	}
	return t.send(r, p, body, fault)
}

// draw returns the fault that the next attempt at a payment meets, or "". Each attempt draws the
// same two numbers whatever its outcome, so that both sides meet the same faults as long as they
// make the same attempts.
func (t *weather) draw(p *payment) Fault {
	hit, which := p.draws.Float64(), p.draws.IntN(max(1, len(t.faults)))
	p.attempts++
	if len(t.faults) == 0 || hit >= t.share || p.attempts > faultyAttemptsMax {
		return ""
	}
	return t.faults[which]
}

// send sends a request and reports its answer to the board.
func (t *weather) send(r *http.Request, p *payment, body []byte, fault Fault) (*http.Response, error) {
	response, answered, err := t.exchange(r, body, fault)
	if err != nil {
		if r.Context().Err() == nil {
			t.tell(p, 0, DotFailed)
		}
		return nil, err
	}
	t.tell(p, answered, answered)
	return response, nil
}

// exchange sends a request and reads its answer to the end.
func (t *weather) exchange(r *http.Request, body []byte, fault Fault) (*http.Response, Dot, error) {
	sent := r.Clone(r.Context())
	sent.Body, sent.GetBody, sent.ContentLength = io.NopCloser(bytes.NewReader(body)), nil, int64(len(body))
	sent.Header.Set(headerStorm, t.token+" "+string(fault))
	response, err := t.base.RoundTrip(sent)
	if err != nil {
		return nil, 0, err
	}
	// Read to its end, or the connection is broken.
	defer func() { _ = response.Body.Close() }()
	answer, err := readAll(response.Body)
	if err != nil {
		return nil, 0, err
	}
	response.Body = io.NopCloser(bytes.NewReader(answer))
	outcome := idempotency.Outcome(response.Header.Get("Idempotency-Status"))
	if t.side == Unprotected && response.StatusCode == http.StatusCreated {
		outcome = idempotency.OutcomeExecuted
	}
	return response, dotOf(outcome), nil
}

func (t *weather) tell(p *payment, answered, seen Dot) {
	t.board.attempt(time.Now(), t.side, p.reference, fmt.Sprintf("#%03d", p.number+1), answered, seen)
}

func readAll(r io.ReadCloser) ([]byte, error) {
	if r == nil {
		return nil, nil
	}
	defer func() { _ = r.Close() }() // the result of the read counts
	content, err := io.ReadAll(io.LimitReader(r, answerBytesMax+1))
	if err == nil && len(content) > answerBytesMax {
		err = errors.New("live: a body is too large")
	}
	return content, err
}

// headerStorm marks the storm's own requests. Its value is a token that only this process knows,
// and a fault. Recognise removes it from every request.
const headerStorm = "Demo-Bank-Storm"

func newToken() string {
	var random [32]byte
	_, _ = cryptorand.Read(random[:]) // can't fail: crypto/rand crashes the program first
	return hex.EncodeToString(random[:])
}

// marked is in the context of the storm's own requests.
type marked struct {
	fault Fault
	runs  atomic.Int32 // number of calls of the handler
}

type markedKey struct{}

func markedFrom(ctx context.Context) *marked {
	m, _ := ctx.Value(markedKey{}).(*marked)
	return m
}

// Recognise marks the requests of the page's own storm. It must be the outermost handler. It
// removes the header from a request without the right token, and serves that like any other.
func (l *Live) Recognise(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		values, sent := r.Header[headerStorm]
		if !sent {
			next.ServeHTTP(w, r)
			return
		}
		r = r.Clone(r.Context())
		r.Header.Del(headerStorm)
		token, fault, _ := strings.Cut(values[0], " ")
		if len(values) == 1 && subtle.ConstantTimeCompare([]byte(token), []byte(l.token)) == 1 {
			r = r.WithContext(context.WithValue(r.Context(), markedKey{}, &marked{fault: Fault(fault)}))
		}
		next.ServeHTTP(w, r)
	})
}

// OnTransfer is a bank.TransferFunc. It causes the fault that a request of the storm asks for.
func (l *Live) OnTransfer(ctx context.Context, tx pgx.Tx, written bool) error {
	m := markedFrom(ctx)
	if m == nil {
		return nil
	}
	switch {
	case m.fault == FaultSlow && !written: // before any account is locked
		select {
		case <-time.After(slowMin + rand.N(slowMax-slowMin)):
		case <-ctx.Done():
			return ctx.Err()
		}
	case m.fault == FaultKilled && written:
		panic(http.ErrAbortHandler) // breaks the connection too
	case m.fault == FaultSerialization && written && m.runs.Add(1) == 1:
		_, err := tx.Exec(ctx, `DO $$ BEGIN RAISE EXCEPTION 'the storm wants it' USING ERRCODE = 'serialization_failure'; END $$`)
		return err
	}
	return nil
}
