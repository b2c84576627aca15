package middleware

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/paidonce/idempotency"
)

// mount is one call of [Middleware.Handler], identified by its call stack.
type mount struct {
	callers [16]uintptr
	n       int
}

func newMount() *mount {
	m := &mount{}
	m.n = runtime.Callers(3, m.callers[:]) // without Callers, newMount and Handler
	return m
}

// String returns the service's line that mounted it: the first one outside of the adapters in
// contrib, the module cache and vendor folders, which hold the routers.
func (m *mount) String() string {
	first := ""
	for frames := runtime.CallersFrames(m.callers[:m.n]); ; {
		frame, more := frames.Next()
		at := fmt.Sprintf("%s:%d", frame.File, frame.Line)
		adapter := strings.HasPrefix(frame.Function, "github.com/paidonce/idempotency/contrib/") && !strings.HasSuffix(frame.File, "_test.go")
		if !adapter && !strings.Contains(frame.File, "@v") && !strings.Contains(frame.File, "/vendor/") {
			return at
		}
		if first == "" {
			first = at
		}
		if !more {
			return first
		}
	}
}

type mountKey struct{}

// mountContext lets an inner mount find the mount around it, and report itself to it.
type mountContext struct {
	context.Context
	outer *mount
	inner atomic.Pointer[mount]
}

// Value implements context.Context.
func (c *mountContext) Value(key any) any {
	if key == (mountKey{}) {
		return c
	}
	return c.Context.Value(key)
}

// String returns only the context's name. The contexts below it belong to other packages, which may
// change them meanwhile.
func (*mountContext) String() string { return "middleware.WithMount" }

// Format keeps the contexts below out of every verb of fmt. It drops the error, for which fmt has
// no use.
func (c *mountContext) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, c.String()) }

var errMountedTwice = errors.New("middleware is mounted twice on the way of a request: leave one of the two out")

func errSecondMount(outer, inner *mount) error {
	return fmt.Errorf("%w: outside at %v, and again at %v", errMountedTwice, outer, inner)
}

// refuseSecond answers a request that another mount already serves. Claiming its key a second time
// would make it wait for itself. It also marks the outer mount, which fails the request and logs
// why, even if the answer changes on its way there.
func (m *Middleware) refuseSecond(w http.ResponseWriter, r *http.Request, at *mount) {
	if around, ok := r.Context().Value(mountKey{}).(*mountContext); ok {
		around.inner.CompareAndSwap(nil, at)
		m.refuse(w, r, idempotency.ReasonHandlerFailed, errSecondMount(around.outer, at), nil)
		return
	}
	m.refuseBroken(w, r, fmt.Errorf("%w: an Engine's attempt runs already, and again at %v", errMountedTwice, at))
}

// These errors refuse a request that came through a framework's own bridge to net/http. The
// framework's handlers would answer past the middleware: before COMMIT, or after a rollback.
var (
	errGin      = errors.New("gin's ResponseWriter is outside: use the adapter in contrib/gin, or mount the middleware around the whole router")
	errFasthttp = errors.New("fasthttp's adaptor is outside: use the adapter in contrib/fiber3; with Fiber 2, which has none, serve the route by net/http")
)

// wrongMount returns an error if the middleware is mounted in a framework by a bridge that can't
// work. It imports neither gin nor fasthttp: it looks for a method that only gin's writer, or only
// fasthttp's context, has, behind the writers and contexts of other middleware too. gin's handlers
// write to gin's own writer, and run after the middleware unless the chain is aborted, which only a
// panic can do from here. fasthttp's adaptor runs its handlers after the middleware, and reuses the
// memory of the key.
func wrongMount(w http.ResponseWriter, r *http.Request) error {
	for {
		if _, ok := w.(interface{ WriteHeaderNow() }); ok {
			return errGin
		}
		wrapper, ok := w.(interface{ Unwrap() http.ResponseWriter })
		if !ok {
			break
		}
		w = wrapper.Unwrap()
	}
	if r.Context().Value(http.ServerContextKey) == nil && onFasthttp(r.Context()) { // net/http sets it
		return errFasthttp
	}
	return nil
}

// noticesMax is the maximum number of notices that are remembered; Options.Route should name few
// routes.
const noticesMax = 1000

// notices remembers the notices that were logged, so that each is logged once per route.
type notices struct {
	mu   sync.Mutex
	told map[[2]string]bool
}

// first reports whether the notice is new for the route.
func (n *notices) first(route, text string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.told[[2]string{route, text}] || len(n.told) >= noticesMax {
		return false
	}
	if n.told == nil {
		n.told = map[[2]string]bool{}
	}
	n.told[[2]string{route, text}] = true
	return true
}

// notice logs a mistake in the service's wiring, once per route.
func (m *Middleware) notice(r *http.Request, level slog.Level, text string, attributes ...slog.Attr) {
	route := m.options.Route(r)
	if m.notices.first(route, text) {
		m.options.Logger.LogAttrs(r.Context(), level, "idempotency: "+text, append(attributes, slog.String("route", route))...)
	}
}

// noticeAnswer logs two surprises in a handler's answer: headers that were dropped, and a router's
// own 404 or 405, which is recorded as a handler's would be. ran is the request as the handler left
// it: a router stores the route in it.
func (run *run) noticeAnswer(ran *http.Request) {
	m, r := run.m, run.request
	if len(run.recorder.dropped) > 0 {
		m.notice(r, slog.LevelWarn, "headers that the handler set are the middleware's, and were dropped", slog.Any("headers", run.recorder.dropped))
	}
	if r.Pattern != "" { // mounted inside of the router
		return
	}
	status := run.recorder.status
	switch {
	case ran.Pattern == "" && (status == http.StatusNotFound || status == http.StatusMethodNotAllowed) && m.routed.Load():
		m.notice(r, slog.LevelWarn, "a router's own 404 or 405 is recorded as an answer: mount the middleware on routes (With), inside of the router", slog.Int("status", status))
	case ran.Pattern != "" && !m.routed.Load():
		m.routed.Store(true)
	}
}
