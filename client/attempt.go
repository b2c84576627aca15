package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/http/httptrace"
	"strconv"
	"strings"
	"time"

	"github.com/paidonce/idempotency"
)

// headerStatus says what became of a request.
const headerStatus = "Idempotency-Status"

// attempt is what one sending of a request brought.
type attempt struct {
	seen     seen
	status   int
	outcome  idempotency.Outcome
	response *http.Response // of an answer
	content  []byte         // what was read of its body
	hopeless bool           // it was not sent, and another try would end the same way
	err      error          // where there is no answer
}

// attempt sends the request once, and reads the answer.
func (t *Transport) attempt(op *operation) *attempt {
	op.attempts++
	t.trace(op, Event{Kind: EventStarted, Attempt: op.attempts})
	started := time.Now()
	a := t.exchange(op)
	took := time.Since(started)
	switch a.seen {
	case seenAnswered:
		op.status, op.last = a.status, a.outcome
		t.trace(op, Event{Kind: EventAnswered, Attempt: op.attempts, Status: a.status, Outcome: a.outcome, Took: took})
	case seenUnsent:
		t.trace(op, Event{Kind: EventUnsent, Attempt: op.attempts, Took: took, Err: a.err})
	default:
		t.trace(op, Event{Kind: EventLost, Attempt: op.attempts, Took: took, Err: a.err})
	}
	return a
}

func (t *Transport) exchange(op *operation) *attempt {
	ctx, cancel := context.WithCancelCause(op.ctx)
	timer := time.AfterFunc(t.options.AttemptTimeout, func() { cancel(ErrAttemptTimedOut) })
	release := func() {
		timer.Stop()
		cancel(nil)
	}
	out := new(sending)
	r := op.request.Clone(httptrace.WithClientTrace(ctx, out.trace()))
	body, err := op.body()
	if err != nil {
		release()
		return &attempt{seen: seenUnsent, err: fmt.Errorf("get body: %w", err)}
	}
	r.Body = out.watch(body)
	response, err := t.base.RoundTrip(r)
	if out.got.Load() > 1 {
		op.maybe = true // net/http has sent it before, and nobody saw what became of that
	}
	if err != nil {
		release()
		a := &attempt{seen: seenLost, err: timedOut(ctx, err)}
		if out.unsent() {
			a.seen, a.hopeless = seenUnsent, hopeless(err)
		}
		return a
	}
	content, err := t.readBody(response, release)
	if err != nil {
		release()
		return &attempt{seen: seenLost, err: timedOut(ctx, err)}
	}
	response.Request = r
	return t.answered(op, response, content)
}

// timedOut adds to an error that AttemptTimeout is its cause.
func timedOut(ctx context.Context, err error) error {
	if errors.Is(context.Cause(ctx), ErrAttemptTimedOut) && !errors.Is(err, ErrAttemptTimedOut) {
		return fmt.Errorf("%w: %w", ErrAttemptTimedOut, err)
	}
	return err
}

// outcomeOf returns the outcome in an answer, "" if there is none. An answer with two proves
// neither.
func outcomeOf(header http.Header) idempotency.Outcome {
	values := header.Values(headerStatus)
	for _, value := range values {
		if value != values[0] {
			return idempotency.OutcomeUnknown
		}
	}
	return idempotency.Outcome(header.Get(headerStatus))
}

// answered notes what an answer says.
func (t *Transport) answered(op *operation, response *http.Response, content []byte) *attempt {
	a := &attempt{
		seen: seenAnswered, status: response.StatusCode, response: response, content: content,
		outcome: outcomeOf(response.Header),
	}
	switch {
	case a.outcome != "":
		op.honoured = op.honoured || t.options.Honours == nil
		t.routes.saw(routeOf(op.request.Method, op.request.URL), true)
	case a.status < 400:
		t.routes.saw(routeOf(op.request.Method, op.request.URL), false)
	}
	return a
}

// readBody reads an answer's body up to the limit and puts it back. An answer that breaks off before is an error. It
// calls release once nothing more is to come: now, or when the rest, over the limit, is closed.
func (t *Transport) readBody(response *http.Response, release func()) ([]byte, error) {
	content, err := io.ReadAll(io.LimitReader(response.Body, t.options.AnswerBytesMax+1))
	if err != nil {
		_ = response.Body.Close() // it is broken
		return nil, fmt.Errorf("read the answer: %w", err)
	}
	if int64(len(content)) <= t.options.AnswerBytesMax {
		_ = response.Body.Close() // read to its end
		response.Body = io.NopCloser(bytes.NewReader(content))
		release()
		return content, nil
	}
	response.Body = &longBody{Reader: io.MultiReader(bytes.NewReader(content), response.Body), rest: response.Body, release: release}
	return content, nil
}

// longBody is a body of which only the beginning is in memory.
type longBody struct {
	io.Reader
	rest    io.Closer
	release func()
}

// Close implements io.Closer.
func (b *longBody) Close() error {
	defer b.release()
	return b.rest.Close()
}

// discard closes an answer that nobody is going to read.
func (a *attempt) discard() {
	if a.response != nil {
		_ = a.response.Body.Close() // the rest is not needed
	}
}

// why says what came of the attempt, for an error's text.
func (a *attempt) why() error {
	if a.err != nil {
		return a.err
	}
	return errAnswer
}

// errAnswer stands for an answer, whose status the error tells.
var errAnswer = errors.New("no definite answer")

// retryAfter returns the delay in the answer's Retry-After: seconds, which some servers send with a
// fraction, or a date, compared with the answer's Date if it has one. It is 0 if there is none.
func (a *attempt) retryAfter() time.Duration {
	if a.response == nil {
		return 0
	}
	value := strings.TrimSpace(a.response.Header.Get("Retry-After"))
	if strings.Trim(value, "0123456789.") == "" { // else ParseFloat takes signs, exponents and words
		const most = 1e9 // seconds; more would overflow a Duration
		if seconds, err := strconv.ParseFloat(value, 64); err == nil || errors.Is(err, strconv.ErrRange) {
			return time.Duration(min(seconds, most) * float64(time.Second))
		}
	}
	at, err := http.ParseTime(value)
	if err != nil {
		return 0
	}
	now, err := http.ParseTime(a.response.Header.Get("Date"))
	if err != nil {
		now = time.Now()
	}
	return max(0, at.Sub(now))
}

// bodyUnread reports whether the server says that the body did not arrive whole, which is the network's doing.
func (a *attempt) bodyUnread() bool {
	if a.seen != seenAnswered || a.status != http.StatusBadRequest || len(a.content) > problemBodyMax {
		return false
	}
	if kind, _, err := mime.ParseMediaType(a.response.Header.Get("Content-Type")); err != nil || kind != "application/problem+json" {
		return false
	}
	var problem struct {
		Type string `json:"type"`
	}
	return json.Unmarshal(a.content, &problem) == nil && strings.HasSuffix(problem.Type, string(idempotency.ReasonBodyUnread))
}
