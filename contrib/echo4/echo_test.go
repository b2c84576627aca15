package echoidem_test

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/labstack/echo/v4"

	"github.com/paidonce/idempotency"
	echoidem "github.com/paidonce/idempotency/contrib/echo4"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/middleware/mwtest"
	"github.com/paidonce/idempotency/storage/memory"
	"github.com/paidonce/idempotency/storage/postgres"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

const route = mwtest.Prefix + ":do"

// handler is the suite's handler in Echo.
func handler(s *mwtest.Service) echo.HandlerFunc {
	return func(c echo.Context) error {
		body, err := io.ReadAll(c.Request().Body)
		if err != nil {
			return err
		}
		probe := s.Probe(c.Request().Context(), c.Param("do"), body)
		switch probe.Do {
		case mwtest.Answer:
			c.Response().Header().Set("Location", probe.Location)
			return c.Blob(probe.Status, probe.ContentType, probe.Body)
		case mwtest.StatusOnly:
			return c.NoContent(probe.Status)
		case mwtest.FinalError:
			return echo.NewHTTPError(probe.Status, "declined")
		case mwtest.ReturnError:
			return probe.Err
		case mwtest.AnswerThenError:
			return errors.Join(c.Blob(probe.Status, probe.ContentType, probe.Body), probe.Err)
		case mwtest.Stream:
			_, _ = c.Response().Write(probe.Body)
			c.Response().Flush()
		case mwtest.Hijack:
			probe.Hijacked(c.Response().Hijack())
		}
		return nil
	}
}

func TestConformance(t *testing.T) {
	t.Parallel()
	mounts := map[string]func(e *echo.Echo, idem echo.MiddlewareFunc, handler echo.HandlerFunc){
		"Route": func(e *echo.Echo, idem echo.MiddlewareFunc, handler echo.HandlerFunc) { e.POST(route, handler, idem) },
		"Group": func(e *echo.Echo, idem echo.MiddlewareFunc, handler echo.HandlerFunc) {
			e.Group(strings.TrimSuffix(mwtest.Prefix, "/"), idem).POST("/:do", handler)
		},
	}
	for name, mount := range mounts {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			mwtest.Run(t, mwtest.Features{}, func(s *mwtest.Service) string {
				e := echo.New()
				mount(e, echoidem.Middleware(s.Middleware), handler(s))
				return s.Serve(e)
			})
		})
	}
}

// The whole app inside needs no adapter. Echo drops an error after an answer.
func TestWholeAppInside(t *testing.T) {
	t.Parallel()
	mwtest.Run(t, mwtest.Features{AnswerStands: true}, func(s *mwtest.Service) string {
		e := echo.New()
		e.POST(route, handler(s))
		return s.Serve(s.Middleware.Handler(e))
	})
}

// Echo's own bridge hands the handler's error to Echo after the middleware has ended. The client
// gets a 500 and nothing is recorded, also of an error that is a 402.
func TestEchosOwnBridgeFailsLoudly(t *testing.T) {
	t.Parallel()
	var log strings.Builder
	s := mwtest.New(t, func(o *middleware.Options) { o.Logger = logger(&log) })
	e := echo.New()
	e.POST(route, handler(s), echo.WrapMiddleware(s.Middleware.Handler))
	url := s.Serve(e)
	for _, do := range []mwtest.Behavior{mwtest.ReturnError, mwtest.FinalError} {
		for range 2 {
			got := s.Send(url, do, "key-"+string(do))
			if got.Status != http.StatusInternalServerError || got.Outcome != string(idempotency.OutcomeNotExecuted) {
				t.Errorf("%s: %v, want 500, %s", do, got, idempotency.OutcomeNotExecuted)
			}
		}
	}
	if s.Runs() != 4 || s.Store.Written() != 0 {
		t.Errorf("%d runs, %d writes, want 4 and none", s.Runs(), s.Store.Written())
	}
	for _, end := range s.Store.Ends() {
		if end.String() != "ROLLBACK" {
			t.Errorf("%v, want ROLLBACK", end)
		}
	}
	if !strings.Contains(log.String(), "adapter in contrib") {
		t.Errorf("the log does not name the adapter: %s", &log)
	}
}

// A GET is streamed as without the middleware, and its error goes on to what is outside.
func TestSafeMethodsAreUntouched(t *testing.T) {
	t.Parallel()
	e := echo.New()
	failure := errors.New("failed")
	var got error
	outside := func(next echo.HandlerFunc) echo.HandlerFunc {
		return func(c echo.Context) error {
			got = next(c)
			return got
		}
	}
	idem := echoidem.Middleware(onMemory(nil))
	e.GET("/stream", func(c echo.Context) error {
		err := c.String(http.StatusOK, "streamed")
		c.Response().Flush()
		return err
	}, outside, idem)
	e.GET("/fail", func(echo.Context) error { return failure }, outside, idem)
	w := httptest.NewRecorder()
	if e.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/stream", nil)); w.Body.String() != "streamed" || !w.Flushed || got != nil {
		t.Errorf("%d %q, flushed %t, %v", w.Code, w.Body, w.Flushed, got)
	}
	if e.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/fail", nil)); !errors.Is(got, failure) {
		t.Errorf("error %v", got)
	}
}

// Outside of the middleware a logger sees the status, and no error.
func TestOutsideSeesTheAnswer(t *testing.T) {
	t.Parallel()
	e := echo.New()
	var seen []string
	e.POST("/", func(echo.Context) error { return echo.NewHTTPError(http.StatusPaymentRequired, "declined") },
		func(next echo.HandlerFunc) echo.HandlerFunc {
			return func(c echo.Context) error {
				response, before := c.Response(), c.Request()
				err := next(c)
				seen = append(seen, fmt.Sprint(status(c), err, c.Response() == response, c.Request() == before))
				return err
			}
		}, echoidem.Middleware(onMemory(nil)))
	first, replay := send(e, "/", "key-1"), send(e, "/", "key-1")
	const body = `{"message":"declined"}` + "\n"
	if first != "402 executed "+body || replay != "402 replayed "+body || seen[0] != "402 <nil> true true" || seen[1] != seen[0] {
		t.Errorf("%q %q, seen %q", first, replay, seen)
	}
}

func status(c echo.Context) int { return c.Response().Status }

// A handler that returns without an answer fails, and so does one with an error that Echo's error
// handler leaves without an answer.
func TestHandlerWithoutAnAnswer(t *testing.T) {
	t.Parallel()
	e := echo.New()
	e.HTTPErrorHandler = func(error, echo.Context) {}
	idem := echoidem.Middleware(onMemory(nil))
	e.POST("/nothing", func(echo.Context) error { return nil }, idem)
	e.POST("/error", func(echo.Context) error { return errors.New("failed") }, idem)
	e.POST("/empty", func(c echo.Context) error { return c.NoContent(http.StatusOK) }, idem)
	for path, want := range map[string]string{"/nothing": "500 not-executed", "/error": "500 not-executed", "/empty": "200 executed"} {
		if got := send(e, path, path); !strings.HasPrefix(got, want) {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
}

// The route's name is Echo's.
func TestRoute(t *testing.T) {
	t.Parallel()
	e := echo.New()
	var got string
	e.POST("/payments/:id", func(c echo.Context) error {
		got = c.Request().Pattern
		return c.NoContent(http.StatusNoContent)
	}, echoidem.Middleware(onMemory(nil)))
	if send(e, "/payments/1", "key-1"); got != "POST /payments/:id" {
		t.Errorf("route %q", got)
	}
}

func TestResumableIsRefused(t *testing.T) {
	t.Parallel()
	defer func() {
		if text := fmt.Sprint(recover()); !strings.Contains(text, "around the app") {
			t.Errorf("panic %q, want one with the remedy", text)
		}
	}()
	echoidem.Middleware(onMemory(func(o *middleware.Options) { o.Resumable = "pay/1" }))
}

// The handler finds its transaction in the request's context: its writes commit with a 201, and are
// undone with a 402 and with an error.
func TestTransaction(t *testing.T) {
	t.Parallel()
	service := testservice.New(t, nil)
	e := echo.New()
	e.POST("/:status", func(c echo.Context) error {
		ctx := c.Request().Context()
		if _, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO effects DEFAULT VALUES"); err != nil {
			return err
		}
		switch c.Param("status") {
		case "created":
			return c.String(http.StatusCreated, "paid")
		case "declined":
			return c.String(http.StatusPaymentRequired, "declined")
		default:
			return errors.New("failed")
		}
	}, echoidem.Middleware(middleware.New(service.Store, account, nil)))
	for _, step := range []struct {
		path, want       string
		effects, records int
	}{
		{"/declined", "402 executed declined", 0, 1},
		{"/declined", "402 replayed declined", 0, 1},
		{"/failed", "500 not-executed {\"message\":\"Internal Server Error\"}\n", 0, 1},
		{"/created", "201 executed paid", 1, 2},
		{"/created", "201 replayed paid", 1, 2},
	} {
		got := send(e, step.path, step.path)
		if effects, records := service.Effects(t), service.Count(t, "SELECT count(*) FROM idempotency_keys"); got != step.want || effects != step.effects || records != step.records {
			t.Errorf("%s: %q, %d effects, %d records, want %q, %d, %d", step.path, got, effects, records, step.want, step.effects, step.records)
		}
	}
}

// An error is never an empty 200, whatever the app's HTTPErrorHandler does.
func TestErrorHandlerThatWritesNothing(t *testing.T) {
	t.Parallel()
	e := echo.New()
	e.HTTPErrorHandler = func(error, echo.Context) {}
	e.POST("/", func(echo.Context) error { return errors.New("failed") }, echoidem.Middleware(onMemory(func(o *middleware.Options) { o.EmptyOK = true })))
	if got := send(e, "/", "key-1"); !strings.HasPrefix(got, "500 not-executed") {
		t.Errorf("%q, want 500", got)
	}
}

// An error after an answer undoes the run, and the log says so without the error's text. An answer
// that is an error itself stays.
func TestErrorAfterAnAnswer(t *testing.T) {
	t.Parallel()
	for status, want := range map[int]string{201: "500 not-executed", 303: "500 not-executed", 402: "402 executed", 503: "503 not-executed"} {
		var log strings.Builder
		e := echo.New()
		e.POST("/", func(c echo.Context) error {
			return errors.Join(c.String(status, "answer"), errors.New("secret"))
		}, echoidem.Middleware(onMemory(func(o *middleware.Options) { o.Logger = logger(&log) })))
		if got := send(e, "/", "key-1"); !strings.HasPrefix(got, want) || strings.HasSuffix(got, "answer") != (status >= 400) {
			t.Errorf("%d: %q, want %q", status, got, want)
		}
		told := strings.Contains(log.String(), fmt.Sprintf("returned an error after it had answered %d", status))
		if told != (status < 400) || strings.Contains(log.String(), "secret") {
			t.Errorf("%d: logged %s", status, &log)
		}
	}
}

// The log of a second mount names the service's lines, and not those of this package.
func TestSecondMountIsNamed(t *testing.T) {
	t.Parallel()
	var log strings.Builder
	e := echo.New()
	idem := echoidem.Middleware(onMemory(func(o *middleware.Options) { o.Logger = logger(&log) }))
	e.POST("/", func(c echo.Context) error { return c.NoContent(http.StatusNoContent) }, idem, echoidem.Middleware(onMemory(nil)))
	if got := send(e, "/", "key-1"); !strings.HasPrefix(got, "500 not-executed") {
		t.Errorf("%q, want 500", got)
	}
	if text := log.String(); strings.Count(text, "echo_test.go:") != 2 || !strings.Contains(text, "mounted twice") {
		t.Errorf("the log does not name this file twice: %s", text)
	}
}

// If a handler goes on after its run, as with Echo's own timeout, its answer is dropped: the run
// does not count, and the client must not see its answer.
func TestHandlerThatGoesOnWritesToNobody(t *testing.T) {
	t.Parallel()
	e := echo.New()
	var late echo.Context
	idem := onMemory(func(o *middleware.Options) {
		o.Disposition = func(answer idempotency.Answer) idempotency.Disposition { // after the run, and before its end
			if err := late.String(http.StatusCreated, "paid"); err != nil {
				t.Error(err)
			}
			return idempotency.DefaultDisposition(answer)
		}
	})
	e.POST("/", func(c echo.Context) error {
		late = c
		return c.String(http.StatusServiceUnavailable, "timeout")
	}, echoidem.Middleware(idem))
	if got := send(e, "/", "key-1"); got != "503 not-executed timeout" {
		t.Errorf("%q, want the 503", got)
	}
}

func account(*http.Request) (string, error) { return "acme", nil }

func logger(w io.Writer) *slog.Logger { return slog.New(slog.NewTextHandler(w, nil)) }

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
