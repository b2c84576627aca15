// Package mwtest is a conformance suite. It tests that an adapter, or a wiring of package middleware
// into a framework, keeps the promises of the middleware: an answer is recorded exactly as the
// client saw it, with the handler's writes or without them, and the handler runs once.
//
//	func TestConformance(t *testing.T) {
//		mwtest.Run(t, mwtest.Features{NoReturnedErrors: true}, func(s *mwtest.Service) string {
//			idem := s.Middleware.With(func(o *middleware.Options) { o.RouterState = chiroute.State })
//			router := chi.NewRouter()
//			router.With(idem.Handler).Method("POST", mwtest.Prefix+"{do}", s.Handler)
//			return s.Serve(router)
//		})
//	}
//
// Each case is a subtest on a fresh store and a fresh mount, and guards one rule. A case that fails
// prints its rule. Run it with -race.
//
// If a framework has a handler type of its own, write such a handler. It calls [Service.Probe] with
// its context, the parameter of its route and the body, and then behaves as the [Probe] says:
//
//	probe := s.Probe(c.Request().Context(), c.Param("do"), body)
//	switch probe.Do {
//	case mwtest.Answer:
//		c.Response().Header().Set("Location", probe.Location)
//		return c.Blob(probe.Status, probe.ContentType, probe.Body)
//	case mwtest.StatusOnly:
//		return c.NoContent(probe.Status)
//	case mwtest.FinalError:
//		return echo.NewHTTPError(probe.Status, "declined")
//	case mwtest.ReturnError:
//		return probe.Err
//	case mwtest.AnswerThenError:
//		return errors.Join(c.Blob(probe.Status, probe.ContentType, probe.Body), probe.Err)
//	case mwtest.Stream:
//		c.Response().Write(probe.Body)
//		c.Response().Flush()
//		return nil
//	case mwtest.Hijack:
//		probe.Hijacked(c.Response().Hijack())
//		return nil
//	}
//	return nil // mwtest.Nothing
package mwtest

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/paidonce/idempotency/middleware"
)

// Features names the abilities that a framework lacks. The zero value is a framework that has all.
type Features struct {
	// NoReturnedErrors: a handler has no error to return.
	NoReturnedErrors bool

	// AnswerStands: the framework drops an error that a handler returns after its answer, or only
	// logs it, so that the answer is recorded.
	AnswerStands bool

	// NoStream: a handler can't send a part of its answer before the rest.
	NoStream bool

	// NoHijack: a handler can't take the conn over.
	NoHijack bool

	// NoStatusOnly: a handler can't answer with a status and no body.
	NoStatusOnly bool

	// NoLocation: a handler can't set the header Location.
	NoLocation bool

	// AlwaysAnswers: a handler can't return without an answer, because the framework turns each
	// result into one.
	AlwaysAnswers bool
}

// Prefix begins the path of the route to mount, for POST. One more segment follows: the parameter of
// the route, which the handler passes to [Service.Probe].
const Prefix = "/mwtest/"

// Limits of the middleware in a [Service].
const (
	BodyBytesMax   = 4 << 10
	AnswerBytesMax = 64 << 10
)

// Mount mounts the middleware and a handler on the route [Prefix] + parameter in the framework, and
// serves it until the case ends (see [Service.Serve] and [Service.Cleanup]). It returns the server's
// address, such as "http://127.0.0.1:8080". It is called once for each case.
type Mount func(s *Service) (url string)

// Service has the parts that a [Mount] puts together. Each case has a Service of its own.
type Service struct {
	// Middleware is on Store. If the framework needs other options, use its With.
	Middleware *middleware.Middleware

	// Store keeps the records.
	Store *Store

	// Handler is the handler for frameworks with handlers of net/http. Others call Probe. It returns
	// no error: set Features.NoReturnedErrors.
	Handler http.Handler

	t       tester
	client  *http.Client
	entered chan struct{} // a run is held
	release chan struct{} // closed when a held run may go on
	gone    chan struct{} // of the latest request at Serve; nil if there was none

	mu     sync.Mutex
	body   string // the request's body must contain it; empty: any body
	runs   int
	faults []string
}

// tester is the part of a testing.TB that a case uses.
type tester interface {
	Helper()
	Logf(format string, args ...any)
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Failed() bool
	Cleanup(f func())
	Context() context.Context
}

var _ tester = testing.TB(nil)

// New returns a service for a test that is not a case of the suite. change changes the options of
// the middleware, and may be nil.
func New(t testing.TB, change func(o *middleware.Options)) *Service {
	return newService(t, change)
}

func newService(t tester, change func(o *middleware.Options)) *Service {
	s := &Service{Store: NewStore(), t: t, entered: make(chan struct{}, 1), release: make(chan struct{})}
	o := &middleware.Options{BodyBytesMax: BodyBytesMax, AnswerBytesMax: AnswerBytesMax, Logger: slog.New(slog.DiscardHandler)}
	if change != nil {
		change(o)
	}
	s.Middleware = middleware.New(s.Store, func(*http.Request) (string, error) { return "mwtest", nil }, o)
	s.Handler = http.HandlerFunc(s.serveHTTP)
	transport := &http.Transport{DisableCompression: true}
	s.client = &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	t.Cleanup(transport.CloseIdleConnections)
	return s
}

// Serve serves a handler of net/http until the case ends, and returns the server's address.
func (s *Service) Serve(handler http.Handler) (url string) {
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		gone := make(chan struct{})
		context.AfterFunc(r.Context(), func() { close(gone) })
		s.mu.Lock()
		s.gone = gone
		s.mu.Unlock()
		handler.ServeHTTP(w, r)
	}))
	server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	server.Start()
	s.Cleanup(func() {
		s.letGo()
		server.Close()
	})
	return server.URL
}

// Cleanup calls f when the case ends.
func (s *Service) Cleanup(f func()) { s.t.Cleanup(f) }

// Fatalf fails the case, because the mount can't be made.
func (s *Service) Fatalf(format string, args ...any) {
	s.t.Helper()
	s.t.Fatalf(format, args...)
}

// Runs returns the number of runs of the handler.
func (s *Service) Runs() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.runs
}

// fault keeps a finding of a handler's goroutine for the end of the case.
func (s *Service) fault(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = append(s.faults, fmt.Sprintf(format, args...))
}

// patience bounds every wait of a case. A correct mount never takes that long.
const patience = 20 * time.Second

// Run runs the suite, each case on a mount of its own.
func Run(t *testing.T, features Features, mount Mount) {
	for _, one := range cases {
		t.Run(one.name, func(t *testing.T) {
			if field := features.lacks(one.needs); field != "" {
				t.Skipf("Features.%s: the framework can't do this: %s", field, one.rule)
			}
			t.Parallel()
			one.check(t, features, mount, patience)
		})
	}
}

// need is an ability of the framework that a case needs.
type need uint8

const (
	nothing need = iota
	returnedErrors
	undoneAnswers
	stream
	hijack
	statusOnly
	noAnswer
)

// lacks returns the name of the feature that the framework lacks, or "".
func (f Features) lacks(n need) string {
	switch {
	case (n == returnedErrors || n == undoneAnswers) && f.NoReturnedErrors:
		return "NoReturnedErrors"
	case n == undoneAnswers && f.AnswerStands:
		return "AnswerStands"
	case n == stream && f.NoStream:
		return "NoStream"
	case n == hijack && f.NoHijack:
		return "NoHijack"
	case n == statusOnly && f.NoStatusOnly:
		return "NoStatusOnly"
	case n == noAnswer && f.AlwaysAnswers:
		return "AlwaysAnswers"
	}
	return ""
}
