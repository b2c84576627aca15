package ginidem_test

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/gin-gonic/gin"

	"github.com/paidonce/idempotency"
	ginidem "github.com/paidonce/idempotency/contrib/gin"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/middleware/mwtest"
	"github.com/paidonce/idempotency/storage/memory"
	"github.com/paidonce/idempotency/storage/postgres"
)

func TestMain(m *testing.M) {
	gin.SetMode(gin.ReleaseMode)
	pgtest.Main(m)
}

const route = mwtest.Prefix + ":do"

// handler is the suite's handler in gin.
func handler(s *mwtest.Service) gin.HandlerFunc {
	return func(c *gin.Context) {
		body, err := io.ReadAll(c.Request.Body)
		if err != nil {
			_ = c.Error(err)
			return
		}
		if _, left := c.Get("run"); left {
			_ = c.Error(errors.New("the keys of an earlier run are left"))
			return
		}
		c.Set("run", true)
		probe := s.Probe(c.Request.Context(), c.Param("do"), body)
		switch probe.Do {
		case mwtest.Answer:
			c.Header("Location", probe.Location)
			c.Data(probe.Status, probe.ContentType, probe.Body)
		case mwtest.StatusOnly:
			c.Status(probe.Status)
		case mwtest.FinalError:
			c.AbortWithStatusJSON(probe.Status, gin.H{"error": "declined"})
		case mwtest.ReturnError:
			_ = c.Error(probe.Err)
		case mwtest.Stream:
			c.Stream(func(w io.Writer) bool {
				_, _ = w.Write(probe.Body)
				return false
			})
		case mwtest.Hijack:
			probe.Hijacked(c.Writer.Hijack())
		}
	}
}

func TestConformance(t *testing.T) {
	t.Parallel()
	mounts := map[string]func(router *gin.Engine, idem gin.HandlerFunc, handler gin.HandlerFunc){
		"Route": func(router *gin.Engine, idem, handler gin.HandlerFunc) { router.POST(route, idem, handler) },
		"Group": func(router *gin.Engine, idem, handler gin.HandlerFunc) {
			router.Use(gin.Recovery(), func(c *gin.Context) { c.Set("outside", true) }, idem)
			router.POST(route, func(c *gin.Context) { c.Next() }, handler)
		},
	}
	for name, mount := range mounts {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			mwtest.Run(t, mwtest.Features{AnswerStands: true}, func(s *mwtest.Service) string {
				router := gin.New()
				mount(router, ginidem.Middleware(s.Middleware), handler(s))
				return s.Serve(router)
			})
		})
	}
}

// The whole router inside needs no adapter.
func TestWholeRouterInside(t *testing.T) {
	t.Parallel()
	mwtest.Run(t, mwtest.Features{NoReturnedErrors: true, NoHijack: true, NoStream: true, AlwaysAnswers: true}, func(s *mwtest.Service) string {
		router := gin.New()
		router.POST(route, handler(s))
		return s.Serve(s.Middleware.Handler(router))
	})
}

// gin's handlers write to gin's writer. Mounted by hand the middleware would commit without the
// answer, and after a rollback the client would hold a 201. So such a mount is refused, and the log
// names the adapter. The handlers don't run after the middleware has returned either: gin would run
// them unless the chain is aborted, and they would pay without a key, after a 500.
func TestMountWithoutTheAdapterIsRefused(t *testing.T) {
	t.Parallel()
	next := func(idem *middleware.Middleware) gin.HandlerFunc {
		return func(c *gin.Context) {
			idem.Handler(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				c.Request = r
				c.Next()
			})).ServeHTTP(c.Writer, c.Request)
		}
	}
	for name, mount := range map[string]func(*middleware.Middleware) gin.HandlerFunc{
		"c.Next": next,
		"c.Next and c.Abort": func(idem *middleware.Middleware) gin.HandlerFunc {
			return func(c *gin.Context) {
				next(idem)(c)
				c.Abort()
			}
		},
		"gin.WrapH": func(idem *middleware.Middleware) gin.HandlerFunc {
			return gin.WrapH(idem.Handler(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var log strings.Builder
			s := mwtest.New(t, func(o *middleware.Options) { o.Logger = logger(&log) })
			router := gin.Default()
			router.Use(mount(s.Middleware))
			var runs atomic.Int64
			router.POST(route, func(*gin.Context) { runs.Add(1) }, handler(s))
			url := s.Serve(router)
			for _, do := range []mwtest.Behavior{mwtest.Answer, mwtest.FinalError, mwtest.ReturnError} {
				got := s.Send(url, do, "key-1")
				if got.Status != http.StatusInternalServerError || got.Outcome != string(idempotency.OutcomeNotExecuted) || strings.Contains(got.Body, "run-") {
					t.Errorf("%s: %v, want 500, %s", do, got, idempotency.OutcomeNotExecuted)
				}
			}
			if runs.Load() != 0 || s.Runs() != 0 || s.Store.Written() != 0 || len(s.Store.Ends()) != 0 {
				t.Errorf("%d runs, %d writes, ends %v: want none", runs.Load(), s.Store.Written(), s.Store.Ends())
			}
			if !strings.Contains(log.String(), "contrib/gin") {
				t.Errorf("the log does not name the adapter: %s", &log)
			}
		})
	}
}

// A GET is streamed as without the middleware, and the chain is not aborted.
func TestSafeMethodsAreUntouched(t *testing.T) {
	t.Parallel()
	router := gin.New()
	aborted := make(chan bool, 1)
	router.Use(func(c *gin.Context) {
		c.Next()
		aborted <- c.IsAborted()
	}, ginidem.Middleware(onMemory(nil)))
	router.GET("/", func(c *gin.Context) {
		c.String(http.StatusOK, "streamed")
		c.Writer.Flush()
	})
	w := httptest.NewRecorder()
	router.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
	if w.Code != http.StatusOK || w.Body.String() != "streamed" || !w.Flushed || <-aborted {
		t.Errorf("%d %q, flushed %t", w.Code, w.Body, w.Flushed)
	}
}

// Outside of the middleware a logger sees the status and the errors, of a replay only the status.
func TestOutsideSeesTheAnswer(t *testing.T) {
	t.Parallel()
	router := gin.New()
	var seen []string
	router.Use(func(c *gin.Context) {
		writer, before := c.Writer, c.Request
		c.Next()
		seen = append(seen, fmt.Sprint(c.Writer.Status(), c.Writer.Size(), len(c.Errors), c.Writer == writer, c.Request == before))
	}, ginidem.Middleware(onMemory(nil)))
	router.POST("/", func(c *gin.Context) {
		_ = c.AbortWithError(http.StatusPaymentRequired, errors.New("declined"))
	})
	first, replay := send(router, "/", "key-1"), send(router, "/", "key-1")
	if first != "402 executed " || replay != "402 replayed " || seen[0] != "402 0 1 true true" || seen[1] != "402 0 0 true true" {
		t.Errorf("%q %q, seen %q", first, replay, seen)
	}
}

// gin's own 404 reaches the client as before.
func TestUnknownPath(t *testing.T) {
	t.Parallel()
	router := gin.New()
	router.Use(ginidem.Middleware(onMemory(nil)))
	if got := send(router, "/unknown", "key-1"); got != "404 executed " {
		t.Errorf("%q, want 404", got)
	}
}

// A handler that gives neither a status nor a body fails, and Options.EmptyOK allows it. An error in
// c.Errors without an answer is a 500 even then.
func TestHandlerWithoutAnAnswer(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		emptyOK bool
		handler gin.HandlerFunc
		want    string
	}{
		{false, func(*gin.Context) {}, "500 not-executed"},
		{false, func(c *gin.Context) { c.Status(http.StatusOK) }, "200 executed"},
		{true, func(*gin.Context) {}, "200 executed"},
		{true, func(c *gin.Context) { _ = c.Error(errors.New("failed")) }, "500 not-executed"},
		{true, func(c *gin.Context) { c.Status(http.StatusCreated); _ = c.Error(errors.New("failed")) }, "500 not-executed"},
		{true, func(c *gin.Context) { c.Status(http.StatusPaymentRequired); _ = c.Error(errors.New("declined")) }, "402 executed"},
	} {
		router := gin.New()
		router.POST("/", ginidem.Middleware(onMemory(func(o *middleware.Options) { o.EmptyOK = c.emptyOK })), c.handler)
		if got := send(router, "/", "key-1"); !strings.HasPrefix(got, c.want) {
			t.Errorf("EmptyOK %t: %q, want %q", c.emptyOK, got, c.want)
		}
	}
}

// The route's name is gin's.
func TestRoute(t *testing.T) {
	t.Parallel()
	router := gin.New()
	var got string
	router.POST("/payments/:id", ginidem.Middleware(onMemory(nil)), func(c *gin.Context) {
		got = c.Request.Pattern
		c.Status(http.StatusNoContent)
	})
	if send(router, "/payments/1", "key-1"); got != "POST /payments/:id" {
		t.Errorf("route %q", got)
	}
}

func TestResumableIsRefused(t *testing.T) {
	t.Parallel()
	defer func() {
		if text := fmt.Sprint(recover()); !strings.Contains(text, "around the router") {
			t.Errorf("panic %q, want one with the remedy", text)
		}
	}()
	ginidem.Middleware(onMemory(func(o *middleware.Options) { o.Resumable = "pay/1" }))
}

// The handler finds its transaction in the request's context: its writes commit with a 201, and are
// undone with a 402 and with an error.
func TestTransaction(t *testing.T) {
	t.Parallel()
	service := testservice.New(t, nil)
	router := gin.New()
	router.POST("/:status", ginidem.Middleware(middleware.New(service.Store, account, nil)), func(c *gin.Context) {
		if _, err := postgres.Tx(c.Request.Context()).Exec(c.Request.Context(), "INSERT INTO effects DEFAULT VALUES"); err != nil {
			t.Error(err)
		}
		switch c.Param("status") {
		case "created":
			c.String(http.StatusCreated, "paid")
		case "declined":
			c.String(http.StatusPaymentRequired, "declined")
		default:
			_ = c.Error(errors.New("failed"))
		}
	})
	for _, step := range []struct {
		path, want       string
		effects, records int
	}{
		{"/declined", "402 executed declined", 0, 1},
		{"/declined", "402 replayed declined", 0, 1},
		{"/failed", "500 not-executed ", 0, 1},
		{"/created", "201 executed paid", 1, 2},
		{"/created", "201 replayed paid", 1, 2},
	} {
		got := send(router, step.path, step.path)
		if effects, records := service.Effects(t), service.Count(t, "SELECT count(*) FROM idempotency_keys"); got != step.want || effects != step.effects || records != step.records {
			t.Errorf("%s: %q, %d effects, %d records, want %q, %d, %d", step.path, got, effects, records, step.want, step.effects, step.records)
		}
	}
}

// If a handler goes on after its run, as with a timeout, its answer is dropped: the run does not
// count, and the client must not see its answer.
func TestHandlerThatGoesOnWritesToNobody(t *testing.T) {
	t.Parallel()
	router := gin.New()
	var late *gin.Context
	idem := onMemory(func(o *middleware.Options) {
		o.Disposition = func(answer idempotency.Answer) idempotency.Disposition { // after the run, and before its end
			late.String(http.StatusCreated, "paid")
			return idempotency.DefaultDisposition(answer)
		}
	})
	router.POST("/", ginidem.Middleware(idem), func(c *gin.Context) {
		late = c
		c.String(http.StatusServiceUnavailable, "timeout")
	})
	if got := send(router, "/", "key-1"); got != "503 not-executed timeout" {
		t.Errorf("%q, want the 503", got)
	}
}

// HandleContext routes a request again, and uses gin's own writer for it. The answer is recorded like
// any other, and nothing goes out before COMMIT.
func TestHandleContext(t *testing.T) {
	t.Parallel()
	for _, fail := range []bool{false, true} {
		router := gin.New()
		runs := 0
		s := mwtest.New(t, nil)
		if fail {
			s.Store.FailCommits(idempotency.ErrUnavailable)
		}
		router.POST("/v1", ginidem.Middleware(s.Middleware), func(c *gin.Context) {
			c.Request.URL.Path = "/v2"
			router.HandleContext(c)
		})
		router.POST("/v2", func(c *gin.Context) {
			runs++
			c.String(http.StatusCreated, "paid")
		})
		want, again := "201 executed paid", "201 replayed paid"
		if fail {
			want, again = "503 not-executed ", "201 executed paid"
		}
		if got := send(router, "/v1", "key-1"); !strings.HasPrefix(got, want) || strings.HasSuffix(got, "paid") == fail {
			t.Errorf("%q, want %q", got, want)
		}
		if got := send(router, "/v1", "key-1"); got != again {
			t.Errorf("%q, want %q", got, again)
		}
	}
}

// The second run finds the path's parameters although the first was routed again, to others.
func TestHandleContextRunsAgain(t *testing.T) {
	t.Parallel()
	router := gin.New()
	s := mwtest.New(t, nil)
	s.Store.FailCommits(idempotency.ErrNotSerializable)
	var accounts []string
	router.POST("/v1/:account", ginidem.Middleware(s.Middleware), func(c *gin.Context) {
		accounts = append(accounts, c.Param("account"))
		c.Request.URL.Path = "/v2/changed"
		router.HandleContext(c)
	})
	router.POST("/v2/:payment", func(c *gin.Context) { c.String(http.StatusCreated, "paid") })
	if got := send(router, "/v1/alice", "key-1"); got != "201 executed paid" || fmt.Sprint(accounts) != "[alice alice]" {
		t.Errorf("%q, accounts %v", got, accounts)
	}
}

// gin's writer is recognized behind that of other middleware too.
func TestMountBehindOtherMiddlewareIsRefused(t *testing.T) {
	t.Parallel()
	router := gin.New()
	router.Use(gin.RecoveryWithWriter(io.Discard))
	s := mwtest.New(t, nil)
	router.Use(func(c *gin.Context) {
		s.Middleware.Handler(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			c.Request = r
			c.Next()
		})).ServeHTTP(wrapper{c.Writer}, c.Request)
		c.Abort()
	})
	router.POST("/", func(c *gin.Context) { c.String(http.StatusCreated, "paid") })
	if got := send(router, "/", "key-1"); !strings.HasPrefix(got, "500 not-executed") || strings.HasSuffix(got, "paid") {
		t.Errorf("%q, want 500", got)
	}
}

// wrapper is a writer of other middleware.
type wrapper struct{ http.ResponseWriter }

func (w wrapper) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func logger(w io.Writer) *slog.Logger { return slog.New(slog.NewTextHandler(w, nil)) }

func account(*http.Request) (string, error) { return "acme", nil }

func onMemory(change func(o *middleware.Options)) *middleware.Middleware {
	o := &middleware.Options{Logger: logger(io.Discard)}
	if change != nil {
		change(o)
	}
	return middleware.New(memory.New(nil), account, o)
}

// send posts a request, and returns the answer's status, outcome and body.
func send(handler http.Handler, path, key string) string {
	r := httptest.NewRequest(http.MethodPost, path, nil)
	r.Header.Set("Idempotency-Key", strings.Trim(key, "/"))
	w := httptest.NewRecorder()
	handler.ServeHTTP(w, r)
	return fmt.Sprint(w.Code, " ", w.Header().Get("Idempotency-Status"), " ", w.Body)
}
