package mwtest

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/go-chi/chi/v5"
)

// recording is a tester that keeps its failures.
type recording struct {
	ctx      context.Context
	mu       sync.Mutex
	failures []string
	cleanups []func()
}

func (r *recording) Helper()             {}
func (r *recording) Logf(string, ...any) {}
func (r *recording) Cleanup(f func())    { r.cleanups = append(r.cleanups, f) }

func (r *recording) Context() context.Context { return r.ctx }

func (r *recording) Errorf(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failures = append(r.failures, fmt.Sprintf(format, args...))
}

func (r *recording) Fatalf(format string, args ...any) {
	r.Errorf(format, args...)
	runtime.Goexit()
}

func (r *recording) Failed() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.failures) > 0
}

// findings runs the suite, and returns the findings of each case.
func findings(t *testing.T, features Features, mount Mount, only ...string) map[string][]string {
	t.Helper()
	found := map[string][]string{}
	var mu sync.Mutex
	var all sync.WaitGroup
	for _, one := range cases {
		if features.lacks(one.needs) != "" || len(only) > 0 && !slices.Contains(only, one.name) {
			continue
		}
		all.Go(func() {
			ctx, cancel := context.WithCancel(t.Context())
			r := &recording{ctx: ctx}
			done := make(chan struct{})
			go func() {
				defer close(done)
				one.check(r, features, mount, 2*time.Second)
			}()
			<-done
			cancel()
			for _, f := range slices.Backward(r.cleanups) {
				f()
			}
			if len(r.failures) > 0 {
				mu.Lock()
				defer mu.Unlock()
				found[one.name] = r.failures
			}
		})
	}
	all.Wait()
	return found
}

// framework is a small framework with handlers that run in a chain and may return an error, as those
// of gin, echo and fiber do.
type framework struct {
	handlers []func(c *frame) error
}

// frame is one request in the framework.
type frame struct {
	w     http.ResponseWriter
	r     *http.Request
	chain []func(c *frame) error
	index int
}

// statusError is the framework's own error.
type statusError int

func (e statusError) Error() string { return http.StatusText(int(e)) }

// next runs the rest of the chain.
func (c *frame) next() (err error) {
	for c.index++; c.index < len(c.chain) && err == nil; c.index++ {
		err = c.chain[c.index](c)
	}
	return err
}

// abort keeps the rest of the chain from running.
func (c *frame) abort() { c.index = len(c.chain) }

// render answers with an error.
func (c *frame) render(err error) {
	status, ok := err.(statusError)
	if !ok {
		status = http.StatusInternalServerError
	}
	http.Error(c.w, status.Error(), int(status))
}

// ServeHTTP implements http.Handler.
func (f *framework) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c := &frame{w: w, r: r, chain: f.handlers, index: -1}
	if err := c.next(); err != nil {
		c.render(err)
	}
}

// frameHandler is a handler of the framework.
func frameHandler(s *Service) func(c *frame) error {
	return func(c *frame) error {
		body, err := io.ReadAll(c.r.Body)
		if err != nil {
			s.fault("the body can't be read: %v", err)
		}
		probe := s.Probe(c.r.Context(), path.Base(c.r.URL.Path), body)
		switch probe.Do {
		case Answer, AnswerThenError:
			c.w.Header().Set("Content-Type", probe.ContentType)
			c.w.Header().Set("Location", probe.Location)
			c.w.WriteHeader(probe.Status)
			_, _ = c.w.Write(probe.Body)
			if probe.Do == AnswerThenError {
				return probe.Err
			}
		case StatusOnly:
			c.w.WriteHeader(probe.Status)
		case FinalError:
			return statusError(probe.Status)
		case ReturnError:
			return probe.Err
		case Stream:
			_, _ = c.w.Write(probe.Body)
			_ = http.NewResponseController(c.w).Flush()
		case Hijack:
			probe.Hijacked(http.NewResponseController(c.w).Hijack())
		}
		return nil
	}
}

// mountFrames mounts an adapter in front of the framework's handler.
func mountFrames(adapter func(s *Service, c *frame) error) Mount {
	return func(s *Service) string {
		return s.Serve(&framework{handlers: []func(c *frame) error{
			func(c *frame) error { return adapter(s, c) },
			frameHandler(s),
		}})
	}
}

// protect serves one request of net/http by the middleware.
func protect(s *Service, w http.ResponseWriter, r *http.Request, handler http.HandlerFunc) {
	s.Middleware.Handler(handler).ServeHTTP(w, r)
}

func TestRightAdapterPasses(t *testing.T) {
	t.Parallel()
	Run(t, Features{}, mountFrames(func(s *Service, c *frame) error {
		before := *c
		protect(s, c.w, c.r, func(w http.ResponseWriter, r *http.Request) {
			*c = before // it may run again
			noticing := &noticing{ResponseWriter: w}
			c.w, c.r = noticing, r
			if err := c.next(); err != nil {
				if noticing.answered {
					panic("an error after the answer")
				}
				c.render(err)
			}
		})
		*c = before
		c.abort()
		return nil
	}))
}

// noticing notices an answer.
type noticing struct {
	http.ResponseWriter
	answered bool
}

// WriteHeader implements http.ResponseWriter.
func (w *noticing) WriteHeader(status int) {
	w.answered = true
	w.ResponseWriter.WriteHeader(status)
}

// The suite finds the mistake in each wiring that a user tries first, and each mistake of an adapter.
func TestSuiteFindsWrongWirings(t *testing.T) {
	t.Parallel()
	plain := Features{NoReturnedErrors: true}
	mount := func(wiring func(s *Service) http.Handler) Mount {
		return func(s *Service) string { return s.Serve(wiring(s)) }
	}
	inside := func(handler func(s *Service, w http.ResponseWriter, r *http.Request)) Mount {
		return mount(func(s *Service) http.Handler {
			return s.Middleware.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { handler(s, w, r) }))
		})
	}
	outside := func(change func(s *Service, inner http.Handler, w http.ResponseWriter, r *http.Request)) Mount {
		return mount(func(s *Service) http.Handler {
			inner := s.Middleware.Handler(s.Handler)
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { change(s, inner, w, r) })
		})
	}
	for name, wrong := range map[string]struct {
		features Features
		mount    Mount
		found    []string // by these cases at least
		text     string   // in one of their findings
		only     []string
	}{
		"as in gin: neither the writer nor Abort": {mount: mountFrames(func(s *Service, c *frame) error {
			protect(s, c.w, c.r, func(_ http.ResponseWriter, r *http.Request) {
				c.r = r
				_ = c.next()
			})
			return nil
		}), found: []string{"Answer", "FinalError", "RunAgain", "CommitFails", "KeyMissing", "Mismatch", "InProgress"}, text: "answered on the writer outside"},
		"as in gin: no Abort": {mount: mountFrames(func(s *Service, c *frame) error {
			outer := c.w
			protect(s, c.w, c.r, func(w http.ResponseWriter, r *http.Request) {
				c.w, c.r = w, r
				if err := c.next(); err != nil {
					c.render(err)
				}
			})
			c.w = outer
			return nil
		}), found: []string{"Answer", "RunAgain", "KeyMissing", "TwoKeys", "Mismatch", "InProgress", "BigBody"}, text: ErrTransactionMissing.Error()},
		"as in gin: the chain is not set back": {mount: mountFrames(func(s *Service, c *frame) error {
			protect(s, c.w, c.r, func(w http.ResponseWriter, r *http.Request) {
				c.w, c.r = w, r
				if err := c.next(); err != nil {
					c.render(err)
				}
			})
			c.abort()
			return nil
		}), found: []string{"RunAgain"}},
		"an error after the answer is dropped": {mount: mountFrames(func(s *Service, c *frame) error {
			before := *c
			protect(s, c.w, c.r, func(w http.ResponseWriter, r *http.Request) {
				*c = before
				c.w, c.r = w, r
				if err := c.next(); err != nil {
					c.render(err)
				}
			})
			*c = before
			c.abort()
			return nil
		}), only: []string{"Answer", "FinalError", "ReturnedError", "AnswerThenError"}, found: []string{"AnswerThenError"}},
		"as in echo: the error is handled outside": {mount: mountFrames(func(s *Service, c *frame) (err error) {
			before := *c
			protect(s, c.w, c.r, func(w http.ResponseWriter, r *http.Request) {
				*c = before
				c.w, c.r = w, r
				err = c.next()
			})
			c.abort()
			return err // the framework renders it after the middleware has read the recorder
		}), found: []string{"FinalError"}},
		"as in fiber: the handler runs after the middleware": {mount: mountFrames(func(s *Service, c *frame) error {
			ran := false
			thrown := httptest.NewRecorder()
			protect(s, thrown, c.r, func(http.ResponseWriter, *http.Request) { ran = true })
			if ran {
				return c.next()
			}
			c.abort()
			for name, values := range thrown.Header() {
				c.w.Header()[name] = values
			}
			c.w.WriteHeader(thrown.Code)
			_, _ = c.w.Write(thrown.Body.Bytes())
			return nil
		}), found: []string{"Answer", "FinalError", "ReturnedError", "RunAgain", "NothingIsOK"}},
		"the context is dropped": {features: plain, mount: inside(func(s *Service, w http.ResponseWriter, r *http.Request) {
			s.Handler.ServeHTTP(w, r.WithContext(context.Background()))
		}), found: []string{"Answer", "FinalError", "Panic"}, text: ErrTransactionMissing.Error()},
		"the handler ends with the client": {features: plain, mount: outside(func(s *Service, _ http.Handler, w http.ResponseWriter, r *http.Request) {
			client := r.Context()
			protect(s, w, r, func(w http.ResponseWriter, r *http.Request) {
				s.Handler.ServeHTTP(w, r.WithContext(clientContext{r.Context(), client}))
			})
		}), found: []string{"HangUp"}, text: "must outlive the client"},
		"header lines are joined": {features: plain, mount: outside(func(_ *Service, inner http.Handler, w http.ResponseWriter, r *http.Request) {
			if keys := r.Header["Idempotency-Key"]; len(keys) > 1 {
				r.Header["Idempotency-Key"] = keys[:1]
			}
			inner.ServeHTTP(w, r)
		}), found: []string{"TwoKeys"}},
		"requests without a key pass": {features: plain, mount: outside(func(s *Service, inner http.Handler, w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Idempotency-Key") == "" {
				inner = s.Handler
			}
			inner.ServeHTTP(w, r)
		}), found: []string{"KeyMissing"}},
		"strings are reused": {features: plain, only: []string{"BigBody"}, mount: mount(func(s *Service) http.Handler {
			inner := s.Middleware.Handler(s.Handler)
			var mu sync.Mutex
			var buffer [32]byte
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				mu.Lock()
				n := copy(buffer[:], r.Header.Get("Idempotency-Key"))
				mu.Unlock()
				r.Header.Set("Idempotency-Key", unsafe.String(&buffer[0], n))
				inner.ServeHTTP(w, r)
				s.Store.Ends() // orders the write above before the suite's reads
			})
		}), found: []string{"BigBody"}, text: "clone the strings"},
		"the body is read outside": {features: plain, mount: outside(func(_ *Service, inner http.Handler, w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			inner.ServeHTTP(w, r)
		}), found: []string{"Answer", "BigBody"}},
		"the body is cut": {features: plain, mount: inside(func(s *Service, w http.ResponseWriter, r *http.Request) {
			r.Body = io.NopCloser(io.LimitReader(r.Body, BodyBytesMax-3))
			s.Handler.ServeHTTP(w, r)
		}), found: []string{"BigBody"}, text: "did not get the request's body"},
		"the body is there once": {features: plain, mount: mount(func(s *Service) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				var first io.ReadCloser
				protect(s, w, r, func(w http.ResponseWriter, r *http.Request) {
					if first == nil {
						first = r.Body
					}
					r.Body = first
					s.Handler.ServeHTTP(w, r)
				})
			})
		}), found: []string{"RunAgain"}, text: "did not get the request's body"},
		"the answer goes out at once": {features: plain, mount: outside(func(s *Service, _ http.Handler, w http.ResponseWriter, r *http.Request) {
			protect(s, httptest.NewRecorder(), r, func(recorder http.ResponseWriter, r *http.Request) {
				copied := httptest.NewRecorder()
				s.Handler.ServeHTTP(copied, r)
				for _, to := range []http.ResponseWriter{recorder, w} {
					for name, values := range copied.Header() {
						to.Header()[name] = values
					}
					to.WriteHeader(copied.Code)
					_, _ = to.Write(copied.Body.Bytes())
				}
			})
		}), found: []string{"Answer", "CommitFails"}},
		"the status is lost": {features: plain, mount: inside(func(s *Service, w http.ResponseWriter, r *http.Request) {
			copied := httptest.NewRecorder()
			s.Handler.ServeHTTP(copied, r)
			_, _ = w.Write(copied.Body.Bytes())
		}), found: []string{"FinalError", "StatusOnly", "Nothing"}},
		"headers are lost": {features: plain, mount: inside(func(s *Service, w http.ResponseWriter, r *http.Request) {
			copied := httptest.NewRecorder()
			s.Handler.ServeHTTP(copied, r)
			w.WriteHeader(copied.Code)
			_, _ = w.Write(copied.Body.Bytes())
		}), found: []string{"Answer"}, text: "Location"},
		"flushes reach the client": {features: plain, mount: outside(func(s *Service, _ http.Handler, w http.ResponseWriter, r *http.Request) {
			protect(s, w, r, func(recorder http.ResponseWriter, r *http.Request) {
				s.Handler.ServeHTTP(flushing{recorder, w}, r)
			})
		}), found: []string{"Stream"}},
		"the conn can be taken over": {features: plain, mount: outside(func(s *Service, _ http.Handler, w http.ResponseWriter, r *http.Request) {
			protect(s, w, r, func(recorder http.ResponseWriter, r *http.Request) {
				s.Handler.ServeHTTP(hijacking{recorder, w}, r)
			})
		}), found: []string{"Hijack"}, text: "took the conn over"},
		"chi without its state": {features: plain, mount: mount(func(s *Service) http.Handler {
			router := chi.NewRouter()
			router.With(s.Middleware.Handler).Method("POST", Prefix+"{do}", s.Handler)
			return router
		}), found: []string{"RunAgain"}},
		"mounted twice": {features: plain, mount: mount(func(s *Service) http.Handler {
			return s.Middleware.Handler(s.Middleware.Handler(s.Handler))
		}), found: []string{"Answer", "FinalError", "NothingIsOK"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			found := findings(t, wrong.features, wrong.mount, wrong.only...)
			text := ""
			for _, one := range wrong.found {
				if found[one] == nil {
					t.Errorf("%s did not find it", one)
				}
				text += strings.Join(found[one], "\n")
			}
			if !strings.Contains(text, wrong.text) {
				t.Errorf("no finding has the text %q: %s", wrong.text, text)
			}
			t.Logf("%q", slices.Sorted(maps.Keys(found)))
		})
	}
}

// clientContext ends with the client.
type clientContext struct {
	context.Context
	client context.Context
}

// Done implements context.Context.
func (c clientContext) Done() <-chan struct{} { return c.client.Done() }

// Err implements context.Context.
func (c clientContext) Err() error { return c.client.Err() }

// flushing is a writer that also writes past the recorder, like a writer with a Flush that works.
type flushing struct {
	http.ResponseWriter
	outer http.ResponseWriter
}

// Write implements http.ResponseWriter.
func (w flushing) Write(p []byte) (int, error) {
	_, _ = w.outer.Write(p)
	return w.ResponseWriter.Write(p)
}

// hijacking is a writer that hands the conn out.
type hijacking struct {
	http.ResponseWriter
	outer http.ResponseWriter
}

// Hijack implements http.Hijacker.
func (w hijacking) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return http.NewResponseController(w.outer).Hijack()
}
