package middleware

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"net/http"
	"os"
	"strconv"
	"time"

	"github.com/paidonce/idempotency"
)

// ScopeFunc says whose key a request carries: the account, never the credential, so that a rotated token still finds
// its own requests. An error refuses the request with 401, or with the status of a [StatusError]; an empty or
// malformed scope is refused too.
type ScopeFunc func(r *http.Request) (string, error)

// Middleware makes handlers idempotent. It is safe for concurrent use.
type Middleware struct {
	engine  *idempotency.Engine
	scope   ScopeFunc
	options Options
	headers map[string]bool // the allow-list
	quota   *quota          // nil: there is none
}

// New returns a middleware on the store. It panics where the store or the scope function is missing, or the options
// can't work together.
func New(store idempotency.Store, scope ScopeFunc, opts *Options) *Middleware {
	if scope == nil {
		panic("idempotency/middleware: New needs a ScopeFunc: without it one caller would get another's answers")
	}
	o := opts.full()
	return newMiddleware(idempotency.NewEngine(store, o.engine()), scope, o, newQuota(o.Quota))
}

// With returns a middleware with other options for other routes: the same store and scope, one count of requests in
// flight, and one count of keys where change leaves Quota as it is. change gets a copy of the options in force.
func (m *Middleware) With(change func(o *Options)) *Middleware {
	o := m.options
	change(&o)
	o = o.full()
	quota := m.quota
	if !o.Quota.equal(m.options.Quota) {
		quota = newQuota(o.Quota)
	}
	return newMiddleware(m.engine.With(o.engine()), m.scope, o, quota)
}

func newMiddleware(engine *idempotency.Engine, scope ScopeFunc, o Options, quota *quota) *Middleware {
	// These stay the caller's: engine() wraps them, and With would wrap the wrapped ones.
	disposition, reduce := o.Engine.Disposition, o.Engine.Reduce
	o.Engine = engine.Options() // so that With shows those in force
	o.Engine.Disposition, o.Engine.Reduce = disposition, reduce
	m := &Middleware{engine: engine, scope: scope, options: o, headers: map[string]bool{}, quota: quota}
	for _, name := range append(RecordedHeaders(), o.RecordHeaders...) {
		m.headers[http.CanonicalHeaderKey(name)] = true
	}
	return m
}

// InFlight returns how many requests are past the reading of their body now.
func (m *Middleware) InFlight() int { return m.engine.InFlight() }

// Handler returns next made idempotent. GET, HEAD, OPTIONS and TRACE pass through untouched.
//
// next runs on a copy of the request whose body is in memory and whose context outlives the client: once begun, the
// work is finished. It may run more than once, always from the request as it came, and only one run counts.
func (m *Middleware) Handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { m.serve(w, r, next) })
}

// serve takes one request from its headers to its answer.
func (m *Middleware) serve(w http.ResponseWriter, r *http.Request, next http.Handler) {
	switch r.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace:
		next.ServeHTTP(w, r)
		return
	}

	// Whose request is it, and which?
	key, err := keyValue(r.Header, m.options.KeyBytesMin, m.options.KeyBytesMax)
	switch {
	case errors.Is(err, errKeyMissing) && m.options.Optional:
	case errors.Is(err, errKeyMissing):
		m.refuse(w, r, idempotency.ReasonKeyMissing, err, nil)
		return
	case err != nil:
		m.refuse(w, r, idempotency.ReasonKeyInvalid, err, nil)
		return
	}
	scope, err := m.scope(r)
	if err != nil {
		err = &serviceError{err}
	} else {
		err = idempotency.ValidateScope(scope)
	}
	if err != nil {
		var status *StatusError
		errors.As(err, &status)
		m.refuse(w, r, idempotency.ReasonScope, err, status)
		return
	}

	// What does it ask for? The whole body is read before any connection is taken: a slow client holds nothing.
	run := &run{m: m, next: next, outer: w.Header(), request: r}
	body, err := run.readBody(w)
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		m.refuse(w, r, idempotency.ReasonBodyTooLarge, err, nil)
		return
	case errors.Is(err, os.ErrDeadlineExceeded):
		m.refuse(w, r, idempotency.ReasonBodyUnread, err, &StatusError{Status: http.StatusRequestTimeout})
		return
	case err != nil:
		m.refuse(w, r, idempotency.ReasonBodyUnread, err, nil)
		return
	}
	request := idempotency.Request{
		Key:         idempotency.Key{Scope: scope, Value: key},
		Fingerprint: m.options.Fingerprints[0].of(r, body),
		TraceID:     m.options.TraceID(r),
		Route:       m.options.Route(r),
	}
	if len(m.options.Fingerprints) > 1 {
		request.FingerprintAt = func(version int16) (idempotency.Fingerprint, bool) {
			for _, f := range m.options.Fingerprints {
				if f.Version == version {
					return f.of(r, body), true
				}
			}
			return idempotency.Fingerprint{}, false
		}
	}

	// Nothing goes to the client before Do returned. By then nothing is held: a slow reader costs nothing either.
	run.body, run.key = body, request.Key
	if m.options.RouterState != nil {
		run.restore = m.options.RouterState(r.Context())
	}
	result := m.engine.Do(r.Context(), request, run.once)
	run.settle(result)
	if result.Record != nil {
		if err := vet(result.Answer); err != nil {
			result = idempotency.Result{Outcome: idempotency.OutcomeUnknown, Reason: idempotency.ReasonRecordCorrupt, Err: err}
			m.traceRefused(r, result.Reason, err, nil)
		}
	}
	m.log(r, request.Key, result)
	if errors.Is(result.Err, http.ErrAbortHandler) {
		panic(http.ErrAbortHandler)
	}
	m.answer(w, r, result, run)
}

// answer tells the client what became of its request.
func (m *Middleware) answer(w http.ResponseWriter, r *http.Request, result idempotency.Result, run *run) {
	h := w.Header()
	values := run.values[:]
	set := func(name, value string) { // name is in canonical form
		values[0] = value
		h[name], values = values[:1:1], values[1:]
	}
	switch {
	case result.Answer == nil:
		m.writeProblem(w, result.Reason, result.Outcome, nil)
		return
	case result.Answer == run.refused:
		h.Set("Retry-After", retryAfter(run.retryAfter))
		m.traceRefused(r, idempotency.ReasonQuotaExceeded, errQuotaExceeded, nil)
		m.writeProblem(w, idempotency.ReasonQuotaExceeded, result.Outcome, nil)
		return
	case result.Record == nil: // the handler's own answer, with all its headers
		clear(h)
		maps.Copy(h, run.recorder.sent)
	default:
		if m.options.AuthorizeReplay != nil {
			if err := m.options.AuthorizeReplay(r, result.Record); err != nil {
				m.refuse(w, r, idempotency.ReasonReplayDenied, &serviceError{err}, nil)
				return
			}
		}
		maps.Copy(h, result.Answer.Header)
		if _, set := h["Content-Type"]; !set {
			h["Content-Type"] = nil // the first answer had none, and net/http would guess one
		}
		set("Idempotent-Replayed", "true")
		set("Idempotency-Created-At", result.Record.CreatedAt.UTC().Format(time.RFC3339))
		set("Idempotency-Expires-At", result.Record.ExpiresAt.UTC().Format(time.RFC3339))
	}
	set("Idempotency-Status", string(result.Outcome))
	status := result.Answer.Status
	if status != http.StatusNoContent && status != http.StatusNotModified {
		set("Content-Length", strconv.Itoa(len(result.Answer.Body)))
	}
	w.WriteHeader(status)
	_, _ = w.Write(result.Answer.Body) // a client that is gone asks again
}

// refuse answers what the middleware itself refuses. status overrides the reason's own, where it is set.
func (m *Middleware) refuse(w http.ResponseWriter, r *http.Request, reason idempotency.Reason, err error, status *StatusError) {
	outcome := idempotency.OutcomeNotExecuted
	if reason == idempotency.ReasonReplayDenied {
		outcome = idempotency.OutcomeUnknown // not-executed would be a lie, and replayed would tell
	}
	m.traceRefused(r, reason, err, status)
	m.writeProblem(w, reason, outcome, status)
}

func (m *Middleware) traceRefused(r *http.Request, reason idempotency.Reason, err error, status *StatusError) {
	if tracer := m.options.Engine.Tracer; tracer != nil {
		tracer.TraceRefused(r.Context(), idempotency.Refused{
			Route: m.options.Route(r), Reason: reason, Status: textOf(reason, status).status, Err: err,
		})
	}
}

// serviceError hides the text of an error of the service's own, which may quote a credential. Who may see it unwraps it.
type serviceError struct{ err error }

func (e *serviceError) Error() string { return "refused by the service" }

func (e *serviceError) Unwrap() error { return e.err }

// errBodyRead is why a body is shorter than it was announced, although it arrived.
var errBodyRead = errors.New("body was read before the middleware: mount what reads it inside")

// readBody reads the body within its limit; over it the error is an *http.MaxBytesError. Where Content-Length says so
// nothing is read, so that a client that waits for 100 Continue keeps its body.
func (run *run) readBody(w http.ResponseWriter) ([]byte, error) {
	r, limit := run.request, run.m.options.BodyBytesMax
	tooLarge := func() ([]byte, error) {
		w.Header().Set("Connection", "close") // the rest is not worth reading
		return nil, &http.MaxBytesError{Limit: limit}
	}
	if r.ContentLength > limit {
		return tooLarge()
	}
	var buffer bytes.Buffer
	if r.Body != nil && r.Body != http.NoBody {
		if r.ContentLength > 0 {
			buffer.Grow(int(r.ContentLength) + bytes.MinRead) // so that ReadFrom need not grow it
		}
		run.reader = io.LimitedReader{R: r.Body, N: limit}
		if limit < math.MaxInt64 {
			run.reader.N++
		}
		if _, err := buffer.ReadFrom(&run.reader); err != nil {
			return nil, fmt.Errorf("read body: %w", err)
		}
		if int64(buffer.Len()) > limit {
			return tooLarge()
		}
	}
	if int64(buffer.Len()) < r.ContentLength || buffer.Len() == 0 && (len(r.PostForm) > 0 || r.MultipartForm != nil) { // its fingerprint would be that of other bodies
		return nil, errBodyRead
	}
	return buffer.Bytes(), nil
}

// run is the handler and all it needs to run again from the start.
type run struct {
	m       *Middleware
	next    http.Handler
	outer   http.Header
	request *http.Request // as it came, and kept so
	body    []byte
	key     idempotency.Key
	restore func(context.Context) context.Context // nil where there is no router state to restore

	reader io.LimitedReader // of the body
	values [5]string        // of the headers that the middleware sets

	runs     int
	recorder *recorder // of the last run

	counted    *slot               // the request's place in its scope's quota
	refused    *idempotency.Answer // what the last run answered where there was none
	retryAfter time.Duration       // and when there is one again
}

// errRouterState is why a handler did not run again.
var errRouterState = errors.New("handler can't run again, because a router's state may have changed: set Options.RouterState (package middleware/chiroute)")

// once runs the handler on a copy of the request, into a recorder.
func (run *run) once(ctx context.Context) (*idempotency.Answer, error) {
	if !run.count() {
		return run.refused, nil
	}
	run.runs++
	if run.runs > 1 {
		switch {
		case run.restore != nil:
			ctx = run.restore(ctx)
		case mayCarryChiRoute(run.request.Context()):
			return nil, fmt.Errorf("%w: %w", idempotency.ErrUnavailable, errRouterState)
		}
	}
	one := &struct { // of this run alone: an earlier one may not have let go of its own
		recorder recorder
		body     memoryBody
		answer   idempotency.Answer
	}{recorder: newRecorder(run.outer, run.m.options.AnswerBytesMax)}
	r := run.request.Clone(ctx)
	one.body.Reset(run.body)
	r.Body = &one.body
	r.ContentLength = int64(len(run.body))
	r.TransferEncoding = nil
	if len(run.body) == 0 {
		r.Body = http.NoBody
	}
	defer func() { // net/http does so for its own request, and knows nothing of the copy
		if r.MultipartForm != nil && run.request.MultipartForm == nil {
			_ = r.MultipartForm.RemoveAll() // temporary files
		}
	}()
	run.recorder = &one.recorder
	run.next.ServeHTTP(run.recorder, r)
	if err := run.recorder.finish(); err != nil {
		return nil, err
	}
	one.answer = idempotency.Answer{
		Status: run.recorder.status,
		Header: recordable(run.recorder.sent, run.outer, run.m.headers),
		Body:   run.recorder.body,
	}
	return &one.answer, nil
}

// memoryBody is a request's body that was read.
type memoryBody struct{ bytes.Reader }

// Close implements io.Closer.
func (*memoryBody) Close() error { return nil }

// log tells the operator of what needs one. The key is shown as eight digits of a hash.
func (m *Middleware) log(r *http.Request, key idempotency.Key, result idempotency.Result) {
	level, message := slog.LevelWarn, "idempotency: request was not answered by its handler"
	switch {
	case result.Reason == idempotency.ReasonHandlerFailed, result.Reason == idempotency.ReasonTransactionLost,
		result.Reason == idempotency.ReasonOutcomeUnknown, result.Reason == idempotency.ReasonCallUnknown,
		result.Reason == idempotency.ReasonRecordCorrupt:
		level = slog.LevelError
	case result.Reason == idempotency.ReasonUnavailable:
	case result.Answer != nil && result.Outcome == idempotency.OutcomeUnknown:
		message = "idempotency: handler asked for a derived key, and its answer is not recorded"
	default:
		return
	}
	ctx := r.Context()
	if !m.options.Logger.Enabled(ctx, level) || errors.Is(result.Err, http.ErrAbortHandler) {
		return
	}
	attributes := []slog.Attr{
		slog.String("outcome", string(result.Outcome)), slog.String("reason", string(result.Reason)),
		slog.Any("key", key), slog.String("method", r.Method),
	}
	if result.Err != nil {
		attributes = append(attributes, slog.Any("error", result.Err))
	}
	if result.Answer != nil {
		attributes = append(attributes, slog.Int("status", result.Answer.Status))
	}
	var panicked *idempotency.PanicError
	if errors.As(result.Err, &panicked) {
		attributes = append(attributes, slog.String("stack", string(panicked.Stack)))
	}
	m.options.Logger.LogAttrs(ctx, level, message, attributes...)
}
