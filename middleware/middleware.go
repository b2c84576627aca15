package middleware

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"

	"github.com/paidonce/idempotency"
)

// ScopeFunc returns the scope of a request's key: the account, never the credential, so that a
// rotated token still finds its own requests. An error refuses the request with 401, or with the
// status of a [StatusError]; an empty or malformed scope is refused too. A function that reads the
// body must put all of it back into r.Body: otherwise the request gets 500, because its fingerprint
// would match other requests.
type ScopeFunc func(r *http.Request) (string, error)

// Middleware makes handlers idempotent. It is safe for concurrent use.
type Middleware struct {
	engine  *idempotency.Engine
	scope   ScopeFunc
	options Options
	headers map[string]bool // the allow-list
	stored  []string        // the request headers that a resumed run has
	quota   *quota          // nil: there is none
	notices notices
	routed  atomic.Bool // whether a router inside has been seen to name a route
}

// New returns a middleware on the store. It panics if the store or the scope function is nil, or if
// the options can't work together.
func New(store idempotency.Store, scope ScopeFunc, opts *Options) *Middleware {
	if scope == nil {
		panic("idempotency/middleware: New needs a ScopeFunc: without it one caller would get another's answers")
	}
	o := opts.full()
	return newMiddleware(idempotency.NewEngine(store, o.engine()), scope, o, newQuota(o.Quota))
}

// With returns a middleware with other options for other routes. It has the same store and scope
// function, shares the count of requests in progress, and shares the count of keys unless change
// alters Quota. change gets a copy of the options in force.
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
	in := engine.Options() // so that With shows the options in force
	o.TTL, o.Disposition, o.Restarts, o.InFlightMax, o.Timeouts = in.TTL, in.Disposition, in.Restarts, in.InFlightMax, in.Timeouts
	o.BackoffMax, o.ParkAfter = in.BackoffMax, in.ParkAfter
	m := &Middleware{engine: engine, scope: scope, options: o, headers: map[string]bool{}, quota: quota}
	for _, name := range append(RecordedHeaders(), o.RecordHeaders...) {
		m.headers[http.CanonicalHeaderKey(name)] = true
	}
	for _, name := range append(StoredHeaders(), o.StoreHeaders...) {
		m.stored = append(m.stored, http.CanonicalHeaderKey(name))
	}
	return m
}

// InFlight returns the number of requests in progress, counted after their body is read.
func (m *Middleware) InFlight() int { return m.engine.InFlight() }

// methodQuery is a safe method: a GET with a body (RFC 10008).
const methodQuery = "QUERY"

// Handler returns next made idempotent. GET, HEAD, OPTIONS, TRACE and QUERY pass through untouched.
//
// next runs on a copy of the request. Its body is in memory, and its context outlives the client:
// once begun, the work is finished. next may run more than once, always on the request as it
// arrived, and only one run counts. Headers that begin with Idempotency- and Idempotent- are the
// middleware's: if next sets one it is dropped, and the log says so once per route. If next writes
// nothing it has failed, unless [Options.EmptyOK] is set. If it wrote to w outside instead, Handler
// panics with [http.ErrAbortHandler] when its writes are undone. A gRPC call is refused.
//
// Mount it once, on the route and inside the router: if the router is inside, its own 404 and 405
// are recorded. A request that passes two mounts gets 500, and the log names both.
func (m *Middleware) Handler(next http.Handler) http.Handler {
	at := newMount()
	if m.options.Resumable != "" {
		m.register(next, at)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { m.serve(w, r, next, at) })
}

// serve takes one request from its headers to its answer.
func (m *Middleware) serve(w http.ResponseWriter, r *http.Request, next http.Handler, at *mount) {
	switch r.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, methodQuery:
		next.ServeHTTP(w, r)
		return
	}
	if _, within := idempotency.KeyFrom(r.Context()); within {
		m.refuseSecond(w, r, at)
		return
	}

	if err := wrongMount(w, r); err != nil {
		m.refuseBroken(w, r, err)
		if errors.Is(err, errGin) {
			panic(idempotency.UsageError("idempotency/middleware: " + err.Error())) // or gin would go on to the handlers
		}
		return
	}
	if isGRPC(r.Header) {
		m.notice(r, slog.LevelError, "gRPC calls are refused: put the interceptor of contrib/grpc into the gRPC server, and leave it out of the HTTP middleware")
		m.refuse(w, r, idempotency.ReasonMediaType, errGRPC, nil)
		return
	}

	// Find the key and the scope.
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
	run := &run{m: m, next: next, at: at, outer: w.Header(), request: r}
	_, run.typed = run.outer["Content-Type"]
	run.watch()
	scope, err := m.scope(r)
	if err != nil {
		err = &serviceError{err}
	} else {
		if err = idempotency.ValidateScope(scope); err == nil && strings.HasPrefix(scope, idempotency.MessageScopePrefix) {
			err = fmt.Errorf("%w: it begins with %q, as those of consumers do: put another word in front", idempotency.ErrScopeInvalid, idempotency.MessageScopePrefix)
		}
	}
	if err != nil {
		var status *StatusError
		errors.As(err, &status)
		m.refuse(w, r, idempotency.ReasonScope, err, status)
		return
	}

	traceID, route := m.options.TraceID(r), m.options.Route(r)

	// Fingerprint it. The whole body is read before a connection is taken, so that a slow client
	// holds none.
	err = run.readBody(w, key != "")
	var tooLarge *http.MaxBytesError
	switch {
	case errors.Is(err, errBodyTaken):
		m.refuseBroken(w, r, err)
		return
	case errors.Is(err, errBodyUnannounced):
		m.notice(r, slog.LevelWarn, "an empty body came without a length, and was refused: if something outside reads bodies, mount it inside")
		m.refuse(w, r, idempotency.ReasonBodyUnread, err, &StatusError{Status: http.StatusLengthRequired, Detail: "The body is empty, and its length was not announced. Send an empty body with Content-Length: 0. Nothing was executed."})
		return
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
		Fingerprint: run.fingerprint(m.options.Fingerprinters[0]),
		TraceID:     traceID,
		Route:       route,

		FingerprintAt: ofAnotherProtocol,
	}
	if len(m.options.Fingerprinters) > 1 {
		request.FingerprintAt = func(version int16) (idempotency.Fingerprint, bool) {
			for _, f := range m.options.Fingerprinters {
				if f.Version == version {
					return run.fingerprint(f), true
				}
			}
			return ofAnotherProtocol(version)
		}
	}

	if m.options.Resumable != "" {
		request.Resumable, request.Stored, request.ClaimFirst = m.options.Resumable, run.stored, m.quota != nil
	}

	// Nothing goes to the client before Do has returned. By then the request holds nothing, so that
	// a slow reader costs nothing either.
	run.key = request.Key
	if m.options.RouterState != nil {
		if run.router, err = m.options.RouterState(r.Context(), nil); err != nil {
			m.refuseBroken(w, r, fmt.Errorf("keep the router's state: %w", err))
			return
		}
	}
	var result idempotency.Result
	if m.quota == nil {
		result = m.engine.Do(r.Context(), request, run.once)
	} else {
		result = run.withinQuota(request)
	}
	if result.Record != nil {
		if err := vet(result.Answer); err != nil {
			result = idempotency.Result{Outcome: idempotency.OutcomeUnknown, Reason: idempotency.ReasonRecordCorrupt, Err: err}
			m.traceRefused(r, result.Reason, err, nil)
		}
	}
	m.log(r, request.Key, result)
	if errors.Is(result.Err, http.ErrAbortHandler) || errors.Is(result.Err, errAnsweredOutside) {
		panic(http.ErrAbortHandler)
	}
	m.answer(w, r, result, run)
}

// errGRPC refuses a gRPC call. Its errors are trailers of a 200, which would be committed, and a
// replay would not have them.
var errGRPC = errors.New("gRPC call came to the HTTP middleware")

// isGRPC reports whether the request is a call of gRPC or gRPC-Web.
func isGRPC(h http.Header) bool {
	const prefix = "application/grpc"
	mediaType := h.Get("Content-Type")
	return len(mediaType) >= len(prefix) && strings.EqualFold(mediaType[:len(prefix)], prefix)
}

// answer writes the client's answer. net/http sets its length: middleware outside may change it, as
// a compressor does, and a bare handler sets none either.
func (m *Middleware) answer(w http.ResponseWriter, r *http.Request, result idempotency.Result, run *run) {
	h := w.Header()
	values := run.values[:]
	set := func(name, value string) { // name is in canonical form
		values[0] = value
		h[name], values = values[:1:1], values[1:]
	}
	switch {
	case result.Reason == idempotency.ReasonQuotaExceeded:
		var refusal *idempotency.Refusal
		errors.As(result.Err, &refusal)
		h.Set("Retry-After", retryAfter(refusal.RetryAfter))
		m.refuse(w, r, result.Reason, errQuotaExceeded, nil)
		return
	case result.Accepted && m.options.Accepted != nil && prefersAsync(r.Header):
		m.options.Accepted.writePending(w, run, result)
		return
	case result.Accepted:
		m.writeAccepted(w, result)
		return
	case result.Answer == nil:
		m.writeDocument(w, textOf(result.Reason, nil), problem{Type: m.options.ProblemBase + string(result.Reason)}, result.Outcome, nil,
			max(result.RetryAfter, m.options.RetryAfter))
		return
	case result.Record == nil: // the handler's own answer, with all its headers
		clear(h)
		maps.Copy(h, run.recorder.sent)
	default:
		if m.options.AuthorizeReplay != nil {
			if err := run.authorize(result.Record); err != nil {
				m.refuse(w, r, idempotency.ReasonReplayDenied, &serviceError{err}, nil)
				return
			}
		}
		replay(h, result.Answer.Header)
		set("Idempotent-Replayed", "true")
		set("Idempotency-Created-At", result.Record.CreatedAt.UTC().Format(time.RFC3339))
		set("Idempotency-Expires-At", result.Record.ExpiresAt.UTC().Format(time.RFC3339))
	}
	set("Idempotency-Status", string(result.Outcome))
	w.WriteHeader(result.Answer.Status)
	_, _ = w.Write(result.Answer.Body) // a client that is gone asks again
}

// refuse answers a request that the middleware itself refuses. If status is set it overrides the
// reason's own.
func (m *Middleware) refuse(w http.ResponseWriter, r *http.Request, reason idempotency.Reason, err error, status *StatusError) {
	outcome := idempotency.OutcomeNotExecuted
	if reason == idempotency.ReasonReplayDenied {
		// Not-executed would be untrue, and replayed would reveal that there is an answer.
		outcome = idempotency.OutcomeUnknown
	}
	m.traceRefused(r, reason, err, status)
	m.writeProblem(w, reason, outcome, status)
}

func (m *Middleware) traceRefused(r *http.Request, reason idempotency.Reason, err error, status *StatusError) {
	if tracer := m.options.Tracer; tracer != nil {
		defer func() { // as in the engine, a Tracer's panic does not affect the request
			if value := recover(); value != nil {
				m.options.Logger.LogAttrs(r.Context(), slog.LevelError, "idempotency: a Tracer panicked",
					slog.String("error", fmt.Sprintf("Tracer panicked with a %T", value)), slog.String("stack", string(debug.Stack())))
			}
		}()
		tracer.TraceRefused(r.Context(), idempotency.Refused{
			Route: m.options.Route(r), Reason: reason, Status: textOf(reason, status).status, Err: err,
		})
	}
}

// serviceError hides the text of an error of the service's own, which may quote a credential. A
// caller that may see it unwraps it.
type serviceError struct{ err error }

func (e *serviceError) Error() string { return "refused by the service" }

func (e *serviceError) Unwrap() error { return e.err }

// run is the handler and all it needs to run again from the start.
type run struct {
	m       *Middleware
	next    http.Handler
	at      *mount
	outer   http.Header
	typed   bool          // outer had a Content-Type before the first run
	request *http.Request // as it came, and kept so
	body    []byte
	key     idempotency.Key
	router  RouterState // nil if there is none to restore

	watched watchedBody      // the body, as the service's own functions see it
	reader  io.LimitedReader // of the body
	values  [4]string        // of the headers that the middleware sets

	runs     int
	recorder *recorder // of the last run
	answered bool      // the last run gave an answer

	counted *slot // the request's place in its scope's quota; nil if it has none
}

// errRouterState is why a handler did not run again.
var errRouterState = errors.New("handler can't run again, because a router's state may have changed: set Options.RouterState (package middleware/chiroute)")

// once runs the handler on a copy of the request, into a recorder.
func (run *run) once(ctx context.Context) (*idempotency.Answer, error) {
	run.runs++
	run.answered = false
	if run.runs > 1 {
		switch {
		case run.router != nil:
			ctx = run.router.Restore(ctx)
		case mayCarryChiRoute(run.request.Context()):
			return nil, &idempotency.Refusal{Reason: idempotency.ReasonUnavailable, Err: errRouterState}
		}
	}
	one := &struct { // only of this run: an earlier one may still use its own
		recorder recorder
		body     memoryBody
		answer   idempotency.Answer
		ctx      mountContext
	}{recorder: newRecorder(run.outer, run.m.options.AnswerBytesMax), ctx: mountContext{Context: ctx, outer: run.at}}
	r := run.request.Clone(&one.ctx)
	run.give(r, &one.body)
	defer run.removeForm(r)
	run.recorder = &one.recorder
	run.next.ServeHTTP(run.recorder, r)
	if inner := one.ctx.inner.Load(); inner != nil {
		return nil, errSecondMount(run.at, inner)
	}
	if _, typed := run.outer["Content-Type"]; typed && !run.typed && run.recorder.status == 0 {
		return nil, errAnsweredOutside
	}
	if err := run.recorder.finish(run.outer, run.m.options.EmptyOK); err != nil {
		return nil, err
	}
	one.answer = idempotency.Answer{
		Status: run.recorder.status,
		Header: recordable(run.recorder.sent, run.outer, run.m.headers),
		Body:   run.recorder.body,
	}
	run.noticeAnswer(r)
	run.answered = true
	return &one.answer, nil
}

// refuseBroken answers a request that the service's own wiring makes impossible to serve: no retry
// helps, and the log names the remedy.
func (m *Middleware) refuseBroken(w http.ResponseWriter, r *http.Request, err error) {
	m.options.Logger.LogAttrs(r.Context(), slog.LevelError, "idempotency: request can't be taken",
		slog.String("method", r.Method), slog.String("route", m.options.Route(r)), slog.Any("error", err))
	m.refuse(w, r, idempotency.ReasonHandlerFailed, err, nil)
}

// log reports results that need an operator. It shows the key as eight digits of a hash, and a
// panic as its type and stack: its value may hold anything, and is for a Tracer
// (idempotency.PanicError).
func (m *Middleware) log(r *http.Request, key idempotency.Key, result idempotency.Result) {
	var panicked *idempotency.PanicError
	if result.Err != nil {
		panicked = panicOf(result.Err)
	}
	level, message := slog.LevelWarn, "idempotency: request was not answered by its handler"
	switch {
	case result.Accepted && result.Err == nil:
		return // nothing ran: the log of the run that left it open has the reason
	case result.Reason == idempotency.ReasonNeedsAttention:
		level, message = slog.LevelError, "idempotency: open request waits for a person"
	case result.Accepted:
		message = "idempotency: request stays open"
	case result.Reason == idempotency.ReasonHandlerFailed, result.Reason == idempotency.ReasonTransactionLost,
		result.Reason == idempotency.ReasonOutcomeUnknown, result.Reason == idempotency.ReasonCallUnknown,
		result.Reason == idempotency.ReasonRecordCorrupt:
		level = slog.LevelError
	case result.Reason == idempotency.ReasonUnavailable:
	case panicked != nil:
		level, message = slog.LevelError, "idempotency: a Tracer panicked"
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
		slog.Any("key", key), slog.String("method", r.Method), slog.String("route", m.options.Route(r)),
	}
	if result.Err != nil {
		attributes = append(attributes, slog.Any("error", result.Err))
	}
	if result.Answer != nil {
		attributes = append(attributes, slog.Int("status", result.Answer.Status))
	}
	if panicked != nil {
		attributes = append(attributes, slog.String("stack", string(panicked.Stack)))
	}
	m.options.Logger.LogAttrs(ctx, level, message, attributes...)
}

// panicOf returns the panic that an error wraps, or nil.
func panicOf(err error) (panicked *idempotency.PanicError) {
	errors.As(err, &panicked)
	return panicked
}
