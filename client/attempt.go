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

// headerStatus reports the outcome of a request.
const headerStatus = "Idempotency-Status"

// attempt is the result of sending a request once.
type attempt struct {
	seen     seen
	status   int
	outcome  idempotency.Outcome
	response *http.Response // nil if there was no answer
	content  []byte         // the part of its body that was read
	hopeless bool           // it was not sent, and another try would end the same way
	err      error          // set if there is no answer

	polled         bool // the answer is that of the status resource
	needsAttention bool // the server says that only a person can settle the request
}

// attempt sends the request once, or polls its status resource, and reads the answer.
func (t *Transport) attempt(op *operation) *attempt {
	op.attempts++
	t.trace(op, Event{Kind: EventStarted, Attempt: op.attempts})
	started := time.Now()
	var a *attempt
	if op.poll != nil {
		a = t.askPending(op)
	}
	if a == nil {
		a = t.exchange(op)
	}
	took := time.Since(started)
	switch a.seen {
	case seenAnswered:
		if !a.polled {
			op.status, op.last = a.status, a.outcome
		}
		op.accepted = op.accepted || a.accepted()
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
	if t.options.PreferAsync {
		r.Header.Add(headerPrefer, respondAsync)
	}
	response, err := t.base.RoundTrip(r)
	if out.got.Load() > 1 {
		op.maybe = true // net/http sent it before, and its outcome is unknown
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

// timedOut adds AttemptTimeout to an error that it caused.
func timedOut(ctx context.Context, err error) error {
	if errors.Is(context.Cause(ctx), ErrAttemptTimedOut) && !errors.Is(err, ErrAttemptTimedOut) {
		return fmt.Errorf("%w: %w", ErrAttemptTimedOut, err)
	}
	return err
}

// outcomeOf returns the outcome in an answer's header, or "". A header with two outcomes proves
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

// answered records an answer.
func (t *Transport) answered(op *operation, response *http.Response, content []byte) *attempt {
	a := &attempt{
		seen: seenAnswered, status: response.StatusCode, response: response, content: content,
		outcome: outcomeOf(response.Header),
	}
	op.notePending(a)
	switch {
	case a.outcome != "":
		op.honoured = op.honoured || t.options.Honours == nil
		t.routes.saw(routeOf(op.request.Method, op.request.URL), true)
	case a.status < 400:
		t.routes.saw(routeOf(op.request.Method, op.request.URL), false)
	}
	return a
}

// readBody reads an answer's body up to the limit and puts it back. It returns an error if the
// answer breaks off before. It calls release when nothing more will be read: now, or when the rest
// above the limit is closed.
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

// longBody is a body with only its beginning in memory.
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

// discard closes an answer that nobody will read.
func (a *attempt) discard() {
	if a.response != nil {
		_ = a.response.Body.Close() // the rest is not needed
	}
}

// why describes the result of the attempt, for an error's text.
func (a *attempt) why() error {
	if a.err != nil {
		return a.err
	}
	return errAnswer
}

// errAnswer is the cause if the last answer settles nothing; the [*Error] has its status.
var errAnswer = errors.New("no definite answer")

// retryAfter returns the delay in the answer's Retry-After, or 0. The header has seconds, to which
// some servers add a fraction, or a date, which is compared with the answer's Date if it has one.
func (a *attempt) retryAfter() time.Duration {
	if a.response == nil {
		return 0
	}
	value := strings.TrimSpace(a.response.Header.Get("Retry-After"))
	// Without this check ParseFloat would accept signs, exponents and words.
	if strings.Trim(value, "0123456789.") == "" {
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

// bodyUnread reports whether the server says that the body did not arrive whole: a fault of the
// network.
func (a *attempt) bodyUnread() bool {
	if a.seen != seenAnswered || a.status != http.StatusBadRequest {
		return false
	}
	problem, ok := a.problem()
	return ok && strings.HasSuffix(problem.Type, string(idempotency.ReasonBodyUnread))
}

// accepted reports whether the server says that it will end the request by itself.
func (a *attempt) accepted() bool {
	if a.seen != seenAnswered || a.outcome != idempotency.OutcomeUnknown {
		return false
	}
	problem, ok := a.problem()
	return ok && problem.Accepted
}

// problem has the members of a problem document that the client reads.
type problem struct {
	Type     string `json:"type"`
	Accepted bool   `json:"accepted"`
}

// problem returns the answer's problem document, if it is one.
func (a *attempt) problem() (p problem, ok bool) {
	if len(a.content) > problemBodyMax {
		return problem{}, false
	}
	if kind, _, err := mime.ParseMediaType(a.response.Header.Get("Content-Type")); err != nil || kind != "application/problem+json" {
		return problem{}, false
	}
	err := json.Unmarshal(a.content, &p)
	return p, err == nil
}
