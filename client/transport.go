package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/deadline"
)

// Transport is an [http.RoundTripper] that gives each request with a method of [Options.Methods] a
// key, and sends it until there is a definite answer. Make it with [New]. It is safe for concurrent
// use.
type Transport struct {
	base    http.RoundTripper
	options Options
	budget  *budget
	routes  routes
	flights flights
}

var _ http.RoundTripper = (*Transport)(nil)

// New returns a Transport that sends through base; nil is [http.DefaultTransport]. It panics on
// invalid options.
//
// base must not send a request twice by itself. net/http's does so in one case, which is detected
// and counted: if a request has no body and a kept connection breaks.
func New(base http.RoundTripper, options *Options) *Transport {
	if base == nil {
		base = http.DefaultTransport
	}
	o := options.full()
	if o.Intents != nil && o.Honours == nil {
		panic("idempotency/client: Options.Intents needs Options.Honours: what is resumed is sent again before the server has shown anything")
	}
	t := &Transport{base: base, options: o}
	if !o.Unbudgeted {
		t.budget = newBudget(o.RetryPercent, o.RetriesPerSecond, o.RetryBurst)
	}
	return t
}

// RoundTrip sends a request. With a method of [Options.Methods] it returns an answer with its body
// already read, or an [*Error]. With any other method it does the same as the base RoundTripper.
//
// It returns answers that sending again would not change: executed, replayed, mismatch, and
// not-executed that is about the request itself (400, 401, 404, 413 and so on) if no earlier
// attempt may have been executed. An answer without Idempotency-Status is returned unchanged if the
// server is not known to honour keys.
//
// A request that ended with [ErrUnknown] must not be sent by a new call without its key, which
// would mint another key: continue with [WithKey].
func (t *Transport) RoundTrip(r *http.Request) (*http.Response, error) {
	if !slices.Contains(t.options.Methods, r.Method) {
		return t.base.RoundTrip(r)
	}
	op, err := t.prepare(r)
	if op.key.Value != "" {
		t.flights.enter(op.key.Value)
		defer t.flights.leave(op.key.Value)
	}
	if err != nil {
		return nil, t.end(op, nil, err)
	}
	if t.options.Intents != nil {
		intent, err := t.intentOf(op)
		if err != nil {
			return nil, t.end(op, nil, err)
		}
		before, err := t.options.Intents.Save(r.Context(), intent)
		op.saved, op.savedBefore = !errors.Is(err, ErrIntentRefused), before
		op.maybe = before // as for a resumed intent
		if err != nil {
			return nil, t.end(op, nil, fmt.Errorf("save the intent: %w", err))
		}
	}
	response, err := t.send(op)
	return t.settle(op, response, err)
}

// CloseIdleConnections closes those of the base RoundTripper, if it supports that.
func (t *Transport) CloseIdleConnections() {
	if base, ok := t.base.(interface{ CloseIdleConnections() }); ok {
		base.CloseIdleConnections()
	}
}

// operation is one request until its definite answer.
type operation struct {
	ctx     context.Context
	request *http.Request // as it is sent, except its body
	key     idempotency.Key
	isNew   bool // no request with the key was sent before this call
	body    func() (io.ReadCloser, error)
	bytes   []byte // the body, if it is in memory

	saved       bool // an intent is kept
	savedBefore bool // it was kept before this call

	started  time.Time
	began    time.Time // as started, without the monotonic clock
	attempts int
	maybe    bool // an attempt of this call, or of another call with the key, may have been executed
	honoured bool
	status   int // of the last answer
	last     idempotency.Outcome
	accepted bool // the server has said that it will end the request by itself

	poll *http.Request // of the status resource; nil if the next attempt sends the request
}

func newOperation(ctx context.Context) *operation {
	now := time.Now()
	return &operation{ctx: ctx, started: now, began: now.Round(0)}
}

// age returns the time since the request began, by the clock that shows more: while the machine is
// suspended the monotonic clock stands still, and the wall clock may be set back.
func (op *operation) age() time.Duration {
	now := time.Now()
	return max(now.Sub(op.started), now.Round(0).Sub(op.began))
}

// prepare makes a request ready to be sent repeatedly, and closes its body. The operation is never
// nil.
func (t *Transport) prepare(r *http.Request) (*operation, error) {
	op := newOperation(r.Context())
	op.isNew = true
	closeBody := func() {
		if r.Body != nil {
			_ = r.Body.Close() // it was read, or will not be
		}
	}
	key, err := keyOf(r.Header)
	switch own, ok := r.Context().Value(contextKey{}).(ownKey); {
	case err != nil: // no server executes a request with an invalid key
	case key != "":
		op.isNew = false
	case ok:
		key = own.value
		err = idempotency.ValidateKeyValue(key)
		op.isNew = own.isNew || err != nil
	default:
		key, err = mint()
	}
	if err != nil {
		closeBody()
		return op, err
	}
	op.key.Value = key
	if err := sendable(r); err != nil {
		closeBody()
		return op, err
	}
	op.request = r.Clone(r.Context())
	op.request.GetBody = nil // else net/http silently sends a keyed request again by itself
	if op.request.Header == nil {
		op.request.Header = http.Header{}
	}
	// If intents are kept, the spelling is always set, because an intent does not keep it.
	if len(op.request.Header.Values(HeaderKey)) == 0 || t.options.Intents != nil {
		spelt := key
		if !t.options.BareKeys {
			spelt = quote(key)
		}
		op.request.Header.Set(HeaderKey, spelt)
	}
	op.honoured = t.honours(op.request)
	if err := t.takeBody(op, r); err != nil {
		closeBody()
		return op, err
	}
	closeBody()
	return op, nil
}

// takeBody reads the body, or makes each attempt read it from the start.
func (t *Transport) takeBody(op *operation, r *http.Request) error {
	if r.Body == nil || r.Body == http.NoBody {
		op.body = func() (io.ReadCloser, error) { return r.Body, nil }
		return nil
	}
	limit := t.options.BodyBytesMax
	if r.GetBody != nil && t.options.Intents == nil && (r.ContentLength > limit || r.ContentLength < 0) {
		op.body = r.GetBody
		return nil
	}
	switch {
	case len(r.Trailer) > 0:
		return errors.New("request has trailers, which can't be sent again")
	case r.ContentLength > limit:
		return fmt.Errorf("%w: it has %d bytes, over the limit of %d", ErrBodyTooLarge, r.ContentLength, limit)
	}
	content, err := io.ReadAll(io.LimitReader(r.Body, limit+1))
	switch {
	case err != nil:
		return fmt.Errorf("read body: %w", err)
	case int64(len(content)) > limit:
		return fmt.Errorf("%w: it has more than %d bytes", ErrBodyTooLarge, limit)
	case r.ContentLength > 0 && int64(len(content)) != r.ContentLength:
		return fmt.Errorf("body has %d bytes, and Content-Length says %d", len(content), r.ContentLength)
	}
	op.setBody(content)
	return nil
}

// setBody makes every attempt send these bytes.
func (op *operation) setBody(content []byte) {
	op.bytes = content
	op.request.TransferEncoding = nil
	op.request.ContentLength = int64(len(content))
	op.body = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil }
	if len(content) == 0 {
		op.body = func() (io.ReadCloser, error) { return http.NoBody, nil }
	}
}

// send sends until there is an answer for the caller, or until time, attempts or retries run out.
func (t *Transport) send(op *operation) (*http.Response, error) {
	ctx := op.ctx
	t.budget.earn()
	for bound := t.options.BackoffFirst; ; bound = min(2*bound, t.options.BackoffMax) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		a := t.attempt(op)
		op.maybe = op.maybe || t.flights.shared(op.key.Value)
		next := decide(fact{
			seen: a.seen, hopeless: a.hopeless, outcome: a.outcome, status: a.status, bodyUnread: a.bodyUnread(), honoured: op.honoured, maybe: op.maybe,
			needsAttention: a.needsAttention,
		})
		op.maybe = op.maybe || next.maybe
		if !next.again && !next.leave && a.seen == seenAnswered {
			return a.response, nil
		}
		a.discard()
		why := a.why()
		switch {
		case next.leave:
			return nil, ErrNeedsAttention
		case !next.again && a.seen == seenUnsent:
			return nil, fmt.Errorf("another try would not help: %w", why)
		case !next.again:
			return nil, fmt.Errorf("%w: %w", ErrNotHonoured, why)
		case ctx.Err() != nil:
			return nil, fmt.Errorf("%w: %w", ctx.Err(), why)
		case op.attempts >= t.options.AttemptsMax:
			return nil, fmt.Errorf("%w: %w", ErrAttemptsSpent, why)
		}
		pause := rand.N(bound) + min(a.retryAfter(), t.options.RetryAfterMax)
		if by, ok := ctx.Deadline(); ok && time.Now().Add(pause).After(by) {
			return nil, fmt.Errorf("%w before the next attempt: %w", context.DeadlineExceeded, why)
		}
		if op.age()+pause > t.options.TotalMax {
			return nil, fmt.Errorf("%w: %w", ErrTimeSpent, why)
		}
		if !t.budget.spend(time.Now()) {
			return nil, fmt.Errorf("%w: %w", ErrRetriesSpent, why)
		}
		t.trace(op, Event{Kind: EventWaiting, Attempt: op.attempts, Pause: pause})
		if err := deadline.Sleep(ctx, pause); err != nil {
			return nil, fmt.Errorf("%w: %w", err, why)
		}
		// The process may have been stopped, or the machine suspended, for so long that the key is
		// new at the server.
		if op.age() > t.options.TotalMax {
			return nil, fmt.Errorf("%w: %w", ErrTimeSpent, why)
		}
	}
}

// settle forgets the intent if its key is settled, and reports the end.
func (t *Transport) settle(op *operation, response *http.Response, err error) (*http.Response, error) {
	outcome := op.last
	if err == nil && settles(outcome) {
		t.done(op)
		t.trace(op, Event{Kind: EventEnded, Attempt: op.attempts, Status: op.status, Outcome: outcome, Took: time.Since(op.started)})
		return response, nil
	}
	if err != nil {
		return nil, t.end(op, nil, err)
	}
	// The caller may run the request again, so nobody else may.
	if err := t.flights.endAlone(op.key.Value, func() error { return t.abandon(op) }); err != nil {
		return nil, t.end(op, response, err)
	}
	t.trace(op, Event{Kind: EventEnded, Attempt: op.attempts, Status: op.status, Outcome: outcome, Took: time.Since(op.started)})
	return response, nil
}

// end makes the caller's error. It is not-executed only if that is proven, and nobody will send the
// request again.
func (t *Transport) end(op *operation, response *http.Response, err error) *Error {
	if response != nil {
		_ = response.Body.Close() // nobody will read it
	}
	e := &Error{
		Outcome: idempotency.OutcomeUnknown, Key: op.key, Started: op.started, Attempts: op.attempts, Status: op.status, Last: op.last, Err: err,
		Accepted: op.accepted,
	}
	if op.isNew && !op.maybe && response == nil {
		if abandonErr := t.flights.endAlone(op.key.Value, func() error { return t.abandon(op) }); abandonErr != nil {
			e.Err = errors.Join(err, abandonErr)
		} else {
			e.Outcome = idempotency.OutcomeNotExecuted
		}
	}
	t.trace(op, Event{Kind: EventEnded, Attempt: op.attempts, Status: op.status, Outcome: e.Outcome, Took: time.Since(op.started), Err: e})
	return e
}

func (t *Transport) trace(op *operation, e Event) {
	if t.options.Trace != nil {
		e.Key = op.key
		t.options.Trace(op.ctx, e)
	}
}

// honours reports whether the server is known to honour keys for a request.
func (t *Transport) honours(r *http.Request) bool {
	if t.options.Honours != nil {
		return t.options.Honours(r)
	}
	return t.routes.honour(routeOf(r.Method, r.URL))
}

// routes remembers the routes that honour keys, as their answers have shown. The zero value knows
// none. It is safe for concurrent use.
type routes struct {
	mu    sync.Mutex
	known map[string]struct{}
}

func routeOf(method string, u *url.URL) string {
	return method + " " + u.Scheme + "://" + u.Host + u.EscapedPath()
}

func (r *routes) honour(route string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, known := r.known[route]
	return known
}

// saw records whether an answer of a route had an Idempotency-Status.
func (r *routes) saw(route string, said bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !said {
		delete(r.known, route)
		return
	}
	if _, known := r.known[route]; known {
		return
	}
	if r.known == nil {
		r.known = make(map[string]struct{})
	}
	if len(r.known) >= RoutesMax {
		for one := range r.known { // any one: its next answer adds it again
			delete(r.known, one)
			break
		}
	}
	r.known[route] = struct{}{}
}

// flights counts the requests under way of each key. The zero value is ready; it is safe for
// concurrent use.
type flights struct {
	mu sync.Mutex
	of map[string]*flight
}

type flight struct {
	count  int
	shared bool // there were several at once
	// ending is closed when the ending request has forgotten its intent. It is nil if none is
	// ending.
	ending chan struct{}
}

// enter counts a request. It waits for one that is forgetting its intent, because that would also
// forget the intent of this one.
func (f *flights) enter(key string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for {
		one := f.of[key]
		if one == nil {
			f.add(key)
			return
		}
		if one.ending == nil {
			one.count++
			one.shared = true
			return
		}
		ended := one.ending
		f.mu.Unlock()
		<-ended
		f.mu.Lock()
	}
}

func (f *flights) add(key string) {
	if f.of == nil {
		f.of = make(map[string]*flight)
	}
	f.of[key] = &flight{count: 1}
}

// enterAlone is like enter, but reports false, and counts nothing, if another request of the key is
// under way.
func (f *flights) enterAlone(key string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.of[key] != nil {
		return false
	}
	f.add(key)
	return true
}

// shared reports whether another request of the key is or was under way at the same time.
func (f *flights) shared(key string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	one := f.of[key]
	return one != nil && one.shared
}

// endAlone runs a function and returns its error, unless another request of the key is or was under
// way at the same time: that one may be executed, and needs the intent.
func (f *flights) endAlone(key string, forget func() error) error {
	f.mu.Lock()
	one := f.of[key]
	if one == nil { // it was never counted
		f.mu.Unlock()
		return forget()
	}
	if one.shared {
		f.mu.Unlock()
		return errShared
	}
	ended := make(chan struct{})
	one.ending = ended
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		one.ending = nil
		close(ended)
	}()
	return forget()
}

var errShared = errors.New("another request of this client has the same key, and may be executed")

func (f *flights) leave(key string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	one := f.of[key]
	if one.count--; one.count == 0 {
		delete(f.of, key)
	}
}
