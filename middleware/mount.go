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

// mount is one call of [Middleware.Handler], known by its place in the program.
type mount struct {
	callers [16]uintptr
	n       int
}

func newMount() *mount {
	m := &mount{}
	m.n = runtime.Callers(3, m.callers[:]) // without Callers, newMount and Handler
	return m
}

// String names the line of the service's that mounted it: the first outside of the module cache and of vendor folders, where
// routers are.
func (m *mount) String() string {
	first := ""
	for frames := runtime.CallersFrames(m.callers[:m.n]); ; {
		frame, more := frames.Next()
		at := fmt.Sprintf("%s:%d", frame.File, frame.Line)
		if !strings.Contains(frame.File, "@v") && !strings.Contains(frame.File, "/vendor/") {
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

// mountContext tells a handler's context of the mount around it, and that mount of one within.
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

// String names the context alone. What is below it belongs to others, who may change it while it is printed.
func (*mountContext) String() string { return "middleware.WithMount" }

// Format keeps what is below out of every verb of fmt.
func (c *mountContext) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, c.String()) } // fmt has no use for the error

var errMountedTwice = errors.New("middleware is mounted twice on the way of a request: leave one of the two out")

func errSecondMount(outer, inner *mount) error {
	return fmt.Errorf("%w: outside at %v, and again at %v", errMountedTwice, outer, inner)
}

// refuseSecond answers a request that another mount has taken already. To claim its key a second time would be to wait for
// itself. The mount around it is told, whatever becomes of the answer on its way there: it fails the request, and logs why.
func (m *Middleware) refuseSecond(w http.ResponseWriter, r *http.Request, at *mount) {
	if around, ok := r.Context().Value(mountKey{}).(*mountContext); ok {
		around.inner.CompareAndSwap(nil, at)
		m.refuse(w, r, idempotency.ReasonHandlerFailed, errSecondMount(around.outer, at), nil)
		return
	}
	m.refuseBroken(w, r, fmt.Errorf("%w: an Engine's attempt runs already, and again at %v", errMountedTwice, at))
}

// noticesMax bounds what is remembered of notices; Options.Route should name few routes.
const noticesMax = 1000

// notices are what the log was told, to be told once per route.
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

// notice tells the log what a service should change, once per route.
func (m *Middleware) notice(r *http.Request, level slog.Level, text string, attributes ...slog.Attr) {
	route := m.options.Route(r)
	if m.notices.first(route, text) {
		m.options.Logger.LogAttrs(r.Context(), level, "idempotency: "+text, append(attributes, slog.String("route", route))...)
	}
}

// noticeAnswer tells of what surprises in a handler's answer: headers that were dropped, and a router's own 404 or 405,
// which is recorded as a handler's would be. ran is the request as the handler left it: a router names the route in it.
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
