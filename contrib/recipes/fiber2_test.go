package recipes

import (
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/gofiber/fiber/v2"
	"github.com/gofiber/fiber/v2/middleware/adaptor"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/middleware/mwtest"
	"github.com/paidonce/idempotency/storage/postgres"
)

// There is no adapter for Fiber 2. Its bridge for middleware of net/http runs the handlers after the
// middleware has ended. Such a mount is refused, and no handler runs.
func TestFiber2sBridgeIsRefused(t *testing.T) {
	t.Parallel()
	var log strings.Builder
	s := mwtest.New(t, func(o *middleware.Options) { o.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
	var runs atomic.Int64
	app := fiber.New(fiber.Config{DisableStartupMessage: true})
	app.Use(adaptor.HTTPMiddleware(s.Middleware.Handler))
	app.Post(mwtest.Prefix+":do", func(c *fiber.Ctx) error {
		runs.Add(1)
		return c.SendStatus(http.StatusCreated)
	})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- app.Listener(listener) }()
	t.Cleanup(func() {
		if err := app.Shutdown(); err != nil {
			t.Error(err)
		}
		<-served
	})
	for range 2 {
		got := post(t, "http://"+listener.Addr().String()+mwtest.Prefix+string(mwtest.Answer), http.Header{"Idempotency-Key": {"key-1"}})
		if outcome := got.header.Get("Idempotency-Status"); got.status != http.StatusInternalServerError || outcome != string(idempotency.OutcomeNotExecuted) {
			t.Errorf("%d %s, want 500 %s", got.status, outcome, idempotency.OutcomeNotExecuted)
		}
	}
	if runs.Load() != 0 || len(s.Store.Ends()) != 0 {
		t.Errorf("%d runs, ends %v: want none", runs.Load(), s.Store.Ends())
	}
	if !strings.Contains(log.String(), "with Fiber 2") {
		t.Errorf("the log has no remedy: %s", &log)
	}
}

// The context of the request does not reach a Fiber app inside. Its handler finds no transaction and
// fails.
func TestFiber2AppInsideFails(t *testing.T) {
	t.Parallel()
	s := mwtest.New(t, func(o *middleware.Options) { o.Logger = slog.New(slog.NewTextHandler(io.Discard, nil)) })
	app := fiber.New()
	app.Use(func(c *fiber.Ctx) (err error) {
		defer func() {
			if recover() != nil {
				err = fiber.ErrInternalServerError
			}
		}()
		return c.Next()
	})
	app.Post("/", func(c *fiber.Ctx) error {
		_ = postgres.Tx(c.UserContext()) // panics
		return c.SendStatus(http.StatusCreated)
	})
	server := httptest.NewServer(s.Middleware.Handler(adaptor.FiberApp(app)))
	defer server.Close()
	for range 2 {
		got := post(t, server.URL, http.Header{"Idempotency-Key": {"key-1"}})
		if outcome := got.header.Get("Idempotency-Status"); got.status != http.StatusInternalServerError || outcome != string(idempotency.OutcomeNotExecuted) {
			t.Errorf("%d %s %s, want 500 %s", got.status, outcome, got.body, idempotency.OutcomeNotExecuted)
		}
	}
	if s.Store.Written() != 0 {
		t.Errorf("%d writes", s.Store.Written())
	}
}
