package fiberidem_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime/multipart"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/gofiber/fiber/v3"
	"github.com/gofiber/fiber/v3/middleware/adaptor"
	"go.uber.org/goleak"

	"github.com/paidonce/idempotency"
	fiberidem "github.com/paidonce/idempotency/contrib/fiber3"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/middleware/mwtest"
	"github.com/paidonce/idempotency/storage/memory"
	"github.com/paidonce/idempotency/storage/postgres"
)

// fasthttp's servers leave goroutines that sleep.
func TestMain(m *testing.M) {
	pgtest.Main(m, goleak.IgnoreAnyFunction("github.com/valyala/fasthttp.(*workerPool).Start.func2"), goleak.IgnoreAnyFunction("github.com/valyala/fasthttp.updateServerDate.func1"))
}

const route = mwtest.Prefix + ":do"

// handler is the suite's handler in Fiber. It changes all that a second run must find as it was.
func handler(s *mwtest.Service) fiber.Handler {
	return func(c fiber.Ctx) error {
		if c.Locals("run") != nil || c.Locals("outside") == "changed" || c.Get("Content-Type") != "application/json" || c.GetRespHeader("Run") != "" ||
			!strings.HasPrefix(c.Path(), mwtest.Prefix) || !strings.HasPrefix(string(c.Request().URI().Path()), mwtest.Prefix) || c.Query("changed") != "" {
			return errors.New("something of an earlier run is left")
		}
		body := string(c.Body())
		probe := s.Probe(c.Context(), strings.Clone(c.Params("do")), []byte(body))
		c.Locals("run", true)
		c.Locals("outside", "changed")
		c.Set("Run", "1")
		c.Path("/changed/path")
		c.Request().URI().SetQueryString("changed=1")
		c.Request().Header.Set("Content-Type", "text/plain")
		c.Request().SetBodyString("changed")
		switch probe.Do {
		case mwtest.Answer:
			c.Set("Location", probe.Location)
			c.Set("Content-Type", probe.ContentType)
			return c.Status(probe.Status).Send(probe.Body)
		case mwtest.StatusOnly:
			c.Status(probe.Status)
		case mwtest.FinalError:
			return fiber.NewError(probe.Status, "declined")
		case mwtest.ReturnError:
			return probe.Err
		case mwtest.AnswerThenError:
			return errors.Join(c.Status(probe.Status).Send(probe.Body), probe.Err)
		case mwtest.Stream:
			return c.SendStreamWriter(func(w *bufio.Writer) { _, _ = w.Write(probe.Body) })
		case mwtest.Hijack:
			c.RequestCtx().Hijack(func(conn net.Conn) { probe.Hijacked(conn, nil, nil) })
			return c.SendStatus(http.StatusSwitchingProtocols)
		}
		return nil
	}
}

// serve serves an app until the test ends.
func serve(t interface {
	Cleanup(f func())
	Fatalf(format string, args ...any)
}, app *fiber.App,
) (url string) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("listen: %v", err)
	}
	server := &conns{Listener: listener}
	ended := make(chan error, 1)
	go func() { ended <- app.Listener(server, fiber.ListenConfig{DisableStartupMessage: true}) }()
	t.Cleanup(func() {
		server.closeAll()
		_ = app.Shutdown()
		<-ended
	})
	return "http://" + listener.Addr().String()
}

// conns is a listener that closes its conns: fasthttp waits for those that sent no request yet.
type conns struct {
	net.Listener
	mu     sync.Mutex
	open   []net.Conn
	closed bool
}

func (l *conns) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		_ = conn.Close()
	}
	l.open = append(l.open, conn)
	return conn, nil
}

func (l *conns) closeAll() {
	_ = l.Listener.Close()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	for _, conn := range l.open {
		_ = conn.Close()
	}
}

func TestConformance(t *testing.T) {
	t.Parallel()
	outside := func(c fiber.Ctx) error {
		c.Locals("outside", "before")
		c.Set("Outside", "yes")
		return c.Next()
	}
	mounts := map[string]struct {
		config fiber.Config
		mount  func(app *fiber.App, idem, handler fiber.Handler)
	}{
		"Route": {fiber.Config{}, func(app *fiber.App, idem, handler fiber.Handler) { app.Post(route, outside, idem, handler) }},
		"Group": {fiber.Config{}, func(app *fiber.App, idem, handler fiber.Handler) {
			app.Use(outside)
			app.Group(strings.TrimSuffix(mwtest.Prefix, "/"), idem).Post("/:do", func(c fiber.Ctx) error { return c.Next() }, handler)
		}},
		"StreamedBody": {fiber.Config{StreamRequestBody: true}, func(app *fiber.App, idem, handler fiber.Handler) { app.Post(route, idem, handler) }},
	}
	for name, m := range mounts {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			mwtest.Run(t, mwtest.Features{}, func(s *mwtest.Service) string {
				app := fiber.New(m.config)
				m.mount(app, fiberidem.Middleware(s.Middleware), handler(s))
				return serve(s, app)
			})
		})
	}
}

// Fiber's bridge for middleware of net/http runs the handlers after the middleware has ended. Such a
// mount is refused, no handler runs, and the log names the adapter.
func TestFibersOwnBridgeIsRefused(t *testing.T) {
	t.Parallel()
	var log strings.Builder
	s := mwtest.New(t, func(o *middleware.Options) { o.Logger = logger(&log) })
	app := fiber.New()
	app.Use(adaptor.HTTPMiddleware(s.Middleware.Handler))
	var runs atomic.Int64
	app.Post(route, func(c fiber.Ctx) error {
		runs.Add(1)
		return c.SendStatus(http.StatusCreated)
	})
	url := serve(t, app)
	for range 2 {
		got := s.Send(url, mwtest.Answer, "key-1")
		if got.Status != http.StatusInternalServerError || got.Outcome != string(idempotency.OutcomeNotExecuted) {
			t.Errorf("%v, want 500, %s", got, idempotency.OutcomeNotExecuted)
		}
	}
	if runs.Load() != 0 || len(s.Store.Ends()) != 0 {
		t.Errorf("%d runs, ends %v: want none", runs.Load(), s.Store.Ends())
	}
	if !strings.Contains(log.String(), "contrib/fiber3") {
		t.Errorf("the log does not name the adapter: %s", &log)
	}
}

// A Fiber app inside of net/http does not get the context of the request. The handler does not find
// its transaction, and fails: nothing is executed without one.
func TestFiberAppInsideFails(t *testing.T) {
	t.Parallel()
	service := testservice.New(t, nil)
	app := fiber.New()
	app.Post("/", pay)
	idem := middleware.New(service.Store, account, &middleware.Options{Logger: logger(io.Discard)})
	server := httptest.NewServer(idem.Handler(adaptor.FiberApp(app)))
	defer server.Close()
	for range 2 {
		if got := post(t, server.URL, "key-1"); !strings.HasPrefix(got, "500 not-executed") {
			t.Errorf("%q, want 500", got)
		}
	}
	if effects, records := service.Effects(t), service.Count(t, "SELECT count(*) FROM idempotency_keys"); effects != 0 || records != 0 {
		t.Errorf("%d effects, %d records", effects, records)
	}
}

// A GET is streamed as without the middleware, and its error goes on to what is outside.
func TestSafeMethodsAreUntouched(t *testing.T) {
	t.Parallel()
	app := fiber.New()
	failure := fiber.NewError(http.StatusTeapot, "failed")
	got := make(chan error, 1)
	app.Use(func(c fiber.Ctx) error {
		err := c.Next()
		got <- err
		return err
	}, fiberidem.Middleware(onMemory(nil)))
	app.Get("/stream", func(c fiber.Ctx) error {
		return c.SendStreamWriter(func(w *bufio.Writer) { _, _ = w.WriteString("streamed") })
	})
	app.Get("/fail", func(fiber.Ctx) error { return failure })
	for path, want := range map[string]struct {
		status int
		body   string
		err    error
	}{"/stream": {http.StatusOK, "streamed", nil}, "/fail": {http.StatusTeapot, "failed", failure}} {
		response, err := app.Test(httptest.NewRequest(http.MethodGet, path, nil))
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(response.Body)
		if err := <-got; response.StatusCode != want.status || string(body) != want.body || !errors.Is(err, want.err) {
			t.Errorf("%s: %d %q, %v", path, response.StatusCode, body, err)
		}
	}
}

// Outside of the middleware a logger sees the status and the handlers' values, and no error. The
// headers that were set outside are in the answer and in the replay, but not in the record.
func TestOutsideSeesTheAnswer(t *testing.T) {
	t.Parallel()
	app := fiber.New()
	var seen []string
	requests := 0
	app.Post("/", func(c fiber.Ctx) error {
		requests++
		c.Set("Request", fmt.Sprint(requests))
		c.Cookie(&fiber.Cookie{Name: "session", Value: "1"})
		before := c.Context()
		err := c.Next()
		seen = append(seen, fmt.Sprint(c.Response().StatusCode(), err, c.Locals("run"), c.Context() == before))
		return err
	}, fiberidem.Middleware(onMemory(nil)), func(c fiber.Ctx) error {
		c.Locals("run", 1)
		return fiber.NewError(http.StatusPaymentRequired, "declined")
	})
	url := serve(t, app)
	for n, outcome := range []string{"executed", "replayed"} {
		r, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, url, nil)
		r.Header.Set("Idempotency-Key", "key-1")
		response, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		_ = response.Body.Close()
		if h := response.Header; h.Get("Idempotency-Status") != outcome || h.Get("Request") != fmt.Sprint(n+1) || len(h["Set-Cookie"]) != 1 || len(h["Request"]) != 1 {
			t.Errorf("headers %v", h)
		}
	}
	if want := []string{"402 <nil> 1 true", "402 <nil> <nil> true"}; fmt.Sprint(seen) != fmt.Sprint(want) {
		t.Errorf("seen %q, want %q", seen, want)
	}
}

// A handler that returns without an answer fails, and Options.EmptyOK allows it.
func TestHandlerWithoutAnAnswer(t *testing.T) {
	t.Parallel()
	for want, emptyOK := range map[string]bool{"500 not-executed": false, "200 executed": true} {
		app := fiber.New()
		app.Post("/", fiberidem.Middleware(onMemory(func(o *middleware.Options) { o.EmptyOK = emptyOK })), func(fiber.Ctx) error { return nil })
		if got := post(t, serve(t, app), "key-1"); !strings.HasPrefix(got, want) {
			t.Errorf("EmptyOK %t: %q, want %q", emptyOK, got, want)
		}
	}
}

// An error undoes an answer that the handler gave before, whatever the app's ErrorHandler does. An
// answer that is an error itself stays as Fiber leaves it.
func TestErrorAfterAnAnswer(t *testing.T) {
	t.Parallel()
	for status, want := range map[int]string{201: "500 not-executed", 303: "500 not-executed", 402: "402 executed answer"} {
		app := fiber.New(fiber.Config{ErrorHandler: func(fiber.Ctx, error) error { return nil }})
		app.Post("/", fiberidem.Middleware(onMemory(nil)), func(c fiber.Ctx) error {
			return errors.Join(c.Status(status).SendString("answer"), errors.New("failed"))
		})
		if got := post(t, serve(t, app), "key-1"); !strings.HasPrefix(got, want) || status < 400 && strings.Contains(got, "answer") {
			t.Errorf("%d: %q, want %q", status, got, want)
		}
	}
}

// A stream fails the handler, and the log says why.
func TestStreamIsRefused(t *testing.T) {
	t.Parallel()
	var log strings.Builder
	app := fiber.New()
	app.Post("/", fiberidem.Middleware(onMemory(func(o *middleware.Options) { o.Logger = logger(&log) })), func(c fiber.Ctx) error {
		return c.SendStream(strings.NewReader("receipt"))
	})
	if got := post(t, serve(t, app), "key-1"); !strings.HasPrefix(got, "500 not-executed") || strings.Contains(got, "receipt") || !strings.Contains(log.String(), "streams its answer") {
		t.Errorf("%q, logged %s", got, &log)
	}
}

// The route's name is Fiber's.
func TestRoute(t *testing.T) {
	t.Parallel()
	app := fiber.New()
	named := make(chan string, 1)
	idem := onMemory(func(o *middleware.Options) {
		o.Route = func(r *http.Request) string {
			select {
			case named <- r.Pattern:
			default:
			}
			return r.Pattern
		}
	})
	app.Post("/payments/:id", fiberidem.Middleware(idem), func(c fiber.Ctx) error { return c.SendStatus(http.StatusNoContent) })
	post(t, serve(t, app)+"/payments/1", "key-1")
	if got := <-named; got != "POST /payments/:id" {
		t.Errorf("route %q", got)
	}
}

func TestResumableIsRefused(t *testing.T) {
	t.Parallel()
	defer func() {
		if text := fmt.Sprint(recover()); !strings.Contains(text, "net/http") {
			t.Errorf("panic %q, want one with the remedy", text)
		}
	}()
	fiberidem.Middleware(onMemory(func(o *middleware.Options) { o.Resumable = "pay/1" }))
}

// The handler finds its transaction in c.Context(): its writes commit with a 201, and are undone with
// a 402 and with an error.
func TestTransaction(t *testing.T) {
	t.Parallel()
	service := testservice.New(t, nil)
	app := fiber.New()
	app.Post("/:status", fiberidem.Middleware(middleware.New(service.Store, account, nil)), pay)
	url := serve(t, app)
	for _, step := range []struct {
		path, want       string
		effects, records int
	}{
		{"declined", "402 executed declined", 0, 1},
		{"declined", "402 replayed declined", 0, 1},
		{"failed", "500 not-executed failed", 0, 1},
		{"created", "201 executed paid", 1, 2},
		{"created", "201 replayed paid", 1, 2},
	} {
		got := post(t, url+"/"+step.path, step.path)
		if effects, records := service.Effects(t), service.Count(t, "SELECT count(*) FROM idempotency_keys"); got != step.want || effects != step.effects || records != step.records {
			t.Errorf("%s: %q, %d effects, %d records, want %q, %d, %d", step.path, got, effects, records, step.want, step.effects, step.records)
		}
	}
}

func pay(c fiber.Ctx) error {
	if _, err := postgres.Tx(c.Context()).Exec(c.Context(), "INSERT INTO effects DEFAULT VALUES"); err != nil {
		return err
	}
	switch c.Params("status") {
	case "created":
		return c.Status(http.StatusCreated).SendString("paid")
	case "declined":
		return fiber.NewError(http.StatusPaymentRequired, "declined")
	default:
		return errors.New("failed")
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

// post posts a request, and returns the answer's status, outcome and body.
func post(t *testing.T, url, key string) string {
	t.Helper()
	return send(t, url, key, "", nil)
}

func postForm(t *testing.T, url, key, form string) string {
	t.Helper()
	return send(t, url, key, "multipart/form-data; boundary=mwtest", strings.NewReader(form))
}

func send(t *testing.T, url, key, contentType string, body io.Reader) string {
	t.Helper()
	r, err := http.NewRequestWithContext(context.Background(), http.MethodPost, url, body)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Idempotency-Key", key)
	if contentType != "" {
		r.Header.Set("Content-Type", contentType)
	}
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = response.Body.Close() }()
	answer, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(response.StatusCode, " ", response.Header.Get("Idempotency-Status"), " ", string(answer))
}

// fasthttp parses a multipart form before any handler runs, and writes its fields again in any order.
// A retry is the same request all the same.
func TestRetryOfAFormInParts(t *testing.T) {
	t.Parallel()
	app := fiber.New()
	app.Post("/", fiberidem.Middleware(onMemory(nil)), func(c fiber.Ctx) error {
		file, err := c.FormFile("receipt")
		if err != nil {
			return err
		}
		return c.Status(http.StatusCreated).SendString(c.FormValue("to") + " " + c.FormValue("amount") + " " + file.Filename)
	})
	url := serve(t, app)
	form := func(to string) string {
		var body strings.Builder
		parts := multipart.NewWriter(&body)
		if err := parts.SetBoundary("mwtest"); err != nil {
			t.Fatal(err)
		}
		for _, field := range []string{"to", "amount", "currency", "account", "text", "day"} {
			_ = parts.WriteField(field, to+field)
		}
		for _, name := range []string{"receipt", "bill", "photo"} {
			if part, err := parts.CreateFormFile(name, name+".txt"); err == nil {
				_, _ = io.WriteString(part, name)
			}
		}
		_ = parts.Close()
		return body.String()
	}
	if got := postForm(t, url, "key-1", form("")); got != "201 executed to amount receipt.txt" {
		t.Fatalf("%q", got)
	}
	for range 10 {
		if got := postForm(t, url, "key-1", form("")); got != "201 replayed to amount receipt.txt" {
			t.Fatalf("%q, want the replay", got)
		}
	}
	if got := postForm(t, url, "key-1", form("other ")); !strings.HasPrefix(got, "422 mismatch") {
		t.Errorf("%q, want a mismatch", got)
	}
}

// An error is never an empty 200, whatever the app's ErrorHandler does.
func TestErrorHandlerThatWritesNothing(t *testing.T) {
	t.Parallel()
	app := fiber.New(fiber.Config{ErrorHandler: func(fiber.Ctx, error) error { return nil }})
	app.Post("/", fiberidem.Middleware(onMemory(func(o *middleware.Options) { o.EmptyOK = true })), func(fiber.Ctx) error {
		return errors.New("failed")
	})
	if got := post(t, serve(t, app), "key-1"); !strings.HasPrefix(got, "500 not-executed") {
		t.Errorf("%q, want 500", got)
	}
}

// A path that net/http does not parse is Fiber's to route.
func TestMalformedPath(t *testing.T) {
	t.Parallel()
	app := fiber.New()
	app.Use(fiberidem.Middleware(onMemory(nil)))
	app.Get("/files/:name", func(c fiber.Ctx) error { return c.SendString("read") })
	app.Post("/files/:name", func(c fiber.Ctx) error { return c.Status(http.StatusCreated).SendString("paid") })
	address := strings.TrimPrefix(serve(t, app), "http://")
	for _, c := range []struct{ method, status, outcome string }{
		{http.MethodGet, "200 OK", ""},
		{http.MethodPost, "201 Created", "executed"},
		{http.MethodPost, "201 Created", "replayed"},
	} {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = fmt.Fprintf(conn, "%s /files/100%% HTTP/1.1\r\nHost: a\r\nIdempotency-Key: key-1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", c.method)
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := response.Header.Get("Idempotency-Status"); response.Status != c.status || got != c.outcome {
			t.Errorf("%s: %s %q, want %s %q", c.method, response.Status, got, c.status, c.outcome)
		}
		_ = response.Body.Close()
		_ = conn.Close()
	}
}

type (
	ownCtx        struct{ fiber.DefaultCtx }
	ownPointerCtx struct{ *fiber.DefaultCtx }
)

// The app may have a Ctx of its own. One that can't be taken back to the start of a run is refused:
// the second run would find the end of the chain, and its 404 would be recorded.
func TestCustomCtx(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		own  func(app *fiber.App) fiber.CustomCtx
		want string
	}{
		"embedded": {func(app *fiber.App) fiber.CustomCtx { return &ownCtx{*fiber.NewDefaultCtx(app)} }, "201 executed paid"},
		"pointer":  {func(app *fiber.App) fiber.CustomCtx { return &ownPointerCtx{fiber.NewDefaultCtx(app)} }, "500 not-executed"},
	} {
		s := mwtest.New(t, nil)
		s.Store.FailCommits(idempotency.ErrNotSerializable)
		app := fiber.NewWithCustomCtx(c.own)
		app.Post("/", fiberidem.Middleware(s.Middleware), func(c fiber.Ctx) error { return c.Status(http.StatusCreated).SendString("paid") })
		if got := post(t, serve(t, app), "key-1"); !strings.HasPrefix(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

// The bridge is recognized behind other middleware too, which gives the request a context of its
// own: otherwise Fiber would run the handlers after each request that the middleware has failed.
func TestBridgeBehindOtherMiddlewareIsRefused(t *testing.T) {
	t.Parallel()
	s := mwtest.New(t, nil)
	app := fiber.New()
	app.Use(adaptor.HTTPMiddleware(func(next http.Handler) http.Handler {
		inside := s.Middleware.Handler(next)
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			inside.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), outerKey{}, 1)))
		})
	}))
	var runs atomic.Int32
	app.Post("/", func(c fiber.Ctx) error {
		runs.Add(1)
		return c.Status(http.StatusCreated).SendString("paid")
	})
	url := serve(t, app)
	for range 2 {
		if got := post(t, url, "key-1"); !strings.HasPrefix(got, "500 not-executed") {
			t.Errorf("%q, want 500", got)
		}
	}
	if runs.Load() != 0 || len(s.Store.Ends()) != 0 {
		t.Errorf("%d runs, ends %v: want none", runs.Load(), s.Store.Ends())
	}
}

type outerKey struct{}

// A net/http handler finds the transaction in Fiber's context, and not in its own.
func TestNetHTTPHandlerInside(t *testing.T) {
	t.Parallel()
	s := mwtest.New(t, nil)
	app := fiber.New()
	app.Post("/", fiberidem.Middleware(s.Middleware), adaptor.HTTPHandlerWithContext(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, ok := adaptor.LocalContextFromHTTPRequest(r)
		if !ok {
			panic("Fiber's context is missing")
		}
		if err := s.Store.Write(ctx); err != nil {
			panic(err)
		}
		w.WriteHeader(http.StatusPaymentRequired)
	})))
	if got := post(t, serve(t, app), "key-1"); got != "402 executed " || s.Store.Written() != 0 {
		t.Errorf("%q, %d writes; want 402, and none", got, s.Store.Written())
	}
}
